"""Starts a program in a sandbox: ``python sandbox_start.py LIMITS PROGRAM ARGUMENT...``, a process of ``sandbox.py``.

With ``isolated`` the program has namespaces of its own:

- no network but a loopback that is down;
- a file system of the system's libraries and this interpreter, read-only, and a /tmp in memory, which is its working
  directory; no /proc, so nothing of any other process;
- its own process numbers, under an init that ends when it does, and all that it left running with it.

In any case it has the resource limits, no capabilities, no way to gain privileges, and is the first that the kernel
ends where memory is short. What goes wrong before it starts is written to standard error, which the program does not
have. Uses the standard library alone.
"""

import ctypes
import json
import os
import resource
import signal
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
SYS_PIVOT_ROOT, SYS_MOUNT_SETATTR = {"x86_64": (155, 442), "aarch64": (41, 442)}.get(os.uname().machine, (None, None))
AT_RECURSIVE = 0x8000
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
NOBODY = 65534


def check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind)]
    check(LIBC.mount(*texts, ctypes.c_ulong(flags), options and options.encode()), f"mounting {target}")


def isolate(limits: dict) -> None:
    """New namespaces, in which this process's next child is the first; a new root, and /tmp in it as directory."""
    if SYS_PIVOT_ROOT is None:
        raise OSError(f"no sandbox for {os.uname().machine} processors")
    flags = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        check(LIBC.unshare(flags), "unshare")
    else:
        check(LIBC.unshare(flags | CLONE_NEWUSER), "unshare")
        for file, content in {
            "setgroups": "deny",
            "uid_map": f"{NOBODY} {user} 1",
            "gid_map": f"{NOBODY} {group} 1",
        }.items():
            with open(f"/proc/self/{file}", "w") as mapping:
                mapping.write(content)
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    root = os.getcwd()  # empty, and the sandbox's own
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=64k,mode=755")
    os.chdir(root)
    placed: list[str] = []
    for path in dict.fromkeys((*SYSTEM, *limits["prefixes"])):
        if os.path.islink(path):
            os.makedirs(os.path.dirname(f"{root}{path}"), exist_ok=True)
            os.symlink(os.path.realpath(path), f"{root}{path}")
            path = os.path.realpath(path)
        if os.path.exists(path) and not any(path == known or path.startswith(f"{known}/") for known in placed):
            place(path, root)
            placed.append(path)
    for path in DEVICES:
        if os.path.exists(path):
            place(path, root, bind=False)
    os.makedirs(f"{root}/tmp", exist_ok=True)
    attributes = (ctypes.c_uint64 * 4)(
        MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0
    )  # set, clear, propagation, user namespace
    check(LIBC.syscall(SYS_MOUNT_SETATTR, -100, root.encode(), AT_RECURSIVE, attributes, 32), "mount_setattr")
    for path in DEVICES:
        if os.path.exists(path):
            mount(path, f"{root}{path}", None, MS_BIND)
    mount(
        "tmpfs", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={limits['file_bytes']},nr_inodes=1000,mode=1777"
    )
    os.chdir(root)  # what has been mounted there
    check(LIBC.syscall(SYS_PIVOT_ROOT, b".", b"."), "pivot_root")
    check(LIBC.umount2(b".", 2), "unmounting the old root")  # lazily: it lies over the new one
    os.chdir("/tmp")


def place(path: str, root: str, bind: bool = True) -> None:
    """Makes the path in the new root, and binds what is there to it."""
    target = f"{root}{path}"
    if os.path.isdir(path):
        os.makedirs(target)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "w").close()
    if bind:
        mount(path, target, None, MS_BIND | MS_REC)


def start(limits: dict, user: int, command: list[str]) -> None:
    """Becomes the program."""
    if user == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        try:  # a number of its own, for whose processes the kernel keeps a count
            number = 2**30 + limits["pid"]
            os.setresuid(number, number, number)
        except OSError:  # not one of those that this container has
            os.setresuid(NOBODY, NOBODY, NOBODY)
    for name, value in {
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NPROC: limits["processes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }.items():
        resource.setrlimit(name, (value, value))
    check(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    nothing = os.open("/dev/null", os.O_WRONLY)
    os.dup2(nothing, 2)
    os.execv(command[0], command)


def main() -> None:
    limits, command = json.loads(sys.argv[1]), sys.argv[2:]
    limits["pid"] = os.getpid()
    user = os.geteuid()
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    if not limits["isolated"]:
        start(limits, -1, command)
    isolate(limits)
    init = os.fork()
    if init:
        os._exit(code(os.waitpid(init, 0)[1]))
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    program = os.fork()
    if program == 0:
        start(limits, user, command)
    ended, status = 0, 0
    while ended != program:
        ended, status = os.wait()
    os._exit(code(status))


def code(status: int) -> int:
    number = os.waitstatus_to_exitcode(status)
    return number if number >= 0 else 128 - number


if __name__ == "__main__":
    try:
        main()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
