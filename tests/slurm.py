"""A Slurm of two nodes on this machine: network namespaces joined by a cable, with a slurmd in each. For root.

Nothing outside of its own directory is written to. Other than on a real cluster, processes are tracked by their group
and not by control groups, jobs run as root, and a requeued job waits for 6 seconds, not for 120 (``cred_expire``).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from toy_runs import ROOT

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
NODES = {"brain1": "10.214.7.1", "brain2": "10.214.7.2"}
_CONFIGURATION = """
ClusterName=test
SlurmctldHost=brain1(10.214.7.1)
AuthInfo=socket={here}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={here}/state
SlurmctldPidFile={here}/slurmctld.pid
SlurmdPidFile={here}/%n.pid
SlurmdSpoolDir={here}/%n
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MailProg=/bin/true
SlurmdTimeout=10
KillWait=5
ReturnToService=2
SchedulerParameters=sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=brain1 NodeAddr=10.214.7.1 CPUs=1 Gres=gpu:1
NodeName=brain2 NodeAddr=10.214.7.2 CPUs=1 Gres=gpu:1
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why there can be no Slurm here."""
    programs = ("slurmctld", "slurmd", "sbatch", "munged", "unshare", "nsenter", "ip")
    absent = [program for program in programs if shutil.which(program, path=PATH) is None]
    if absent:
        return f"needs slurm-wlm, munge and iproute2: no {', '.join(absent)}"
    if os.geteuid() or subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True).returncode:
        return "needs root and network namespaces"
    return None


def until(happened: Callable[[], bool], seconds: float, otherwise: Callable[[], str]) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, otherwise()
        time.sleep(0.05)


class Slurm:
    """A context: while it lasts, jobs can be submitted."""

    def __enter__(self) -> Slurm:
        self._folder = tempfile.TemporaryDirectory(prefix="slurm-")  # short: a socket's path has at most 107 characters
        self._here = here = Path(self._folder.name)
        self._environment = {**os.environ, "PATH": PATH, "SLURM_CONF": f"{here}/slurm.conf"}
        self._daemons: list[subprocess.Popen] = []
        self._namespaces = {name: subprocess.Popen(["unshare", "-num", "sleep", "infinity"]) for name in NODES}
        try:
            self._begin(here)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _begin(self, here: Path) -> None:
        (here / "slurm.conf").write_text(_CONFIGURATION.format(here=here))
        (here / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        (here / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{NODES[name]} {name}\n" for name in NODES))
        (here / "state").mkdir()
        (here / "munge.key").write_bytes(os.urandom(128))
        (here / "munge.key").chmod(0o600)
        files = [f"--{name}-file={here}/munge.{name}" for name in ("key", "log", "pid", "seed")]
        self._start("munged", "--foreground", "--force", f"--socket={here}/munge.socket", *files)
        for holder in self._namespaces.values():
            until(lambda: _apart(holder.pid), 10, lambda: "no namespaces")  # noqa: B023
        until((here / "munge.socket").exists, 10, self.log)
        first, second = (str(holder.pid) for holder in self._namespaces.values())
        cable = ["type", "veth", "peer", "cable0", "netns", second]
        subprocess.run(["ip", "link", "add", "cable0", "netns", first, *cable], check=True, env=self._environment)
        for name, address in NODES.items():
            self.run("hostname", name, node=name)
            self.run("mount", "--bind", f"{here}/hosts", "/etc/hosts", node=name)
            self.run("ip", "addr", "add", f"{address}/24", "dev", "cable0", node=name)
            for device in ("lo", "cable0"):
                self.run("ip", "link", "set", device, "up", node=name)
        self._start(*self._in("brain1"), "slurmctld", "-D")
        for name in NODES:
            self.power_on(name)
        until(lambda: self._idle() == len(NODES), 60, self.log)

    def __exit__(self, *_: object) -> None:
        for name in self._namespaces:
            self.power_off(name)
        for process in [*self._daemons, *self._namespaces.values()]:
            process.kill()
            process.wait()
        self._folder.cleanup()

    def power_on(self, node: str) -> None:
        self._start(*self._in(node), "slurmd", "-D", "-N", node)

    def power_off(self, node: str) -> None:
        """Kills all that runs there."""
        holder = self._namespaces[node].pid
        if not _apart(holder):
            return  # it is this machine's own network still
        for pid in [int(name) for name in os.listdir("/proc") if name.isdecimal()]:
            with contextlib.suppress(OSError):
                if pid != holder and _network(pid) == _network(holder):
                    os.kill(pid, signal.SIGKILL)

    def run(self, *command: str, node: str = "brain1", **variables: str) -> str:
        """What the command printed on that node."""
        done = subprocess.run(
            [*self._in(node), *command], env={**self._environment, **variables}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, *arguments: str | Path, **variables: str) -> str:
        """A job's number."""
        return self.run("sbatch", "--parsable", f"--chdir={ROOT}", *map(str, arguments), **variables).strip()

    def job(self, job: str) -> dict[str, str]:
        """What Slurm says of a job: JobState, Restarts, ExitCode, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", job)))

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self._here.glob("*.log")))

    def _idle(self) -> int:
        return len(re.findall("State=IDLE ", self.run("scontrol", "show", "nodes")))

    def _in(self, node: str) -> list[str]:
        return ["nsenter", "-n", "-u", "-m", "-t", str(self._namespaces[node].pid)]

    def _start(self, *command: str) -> None:
        with (self._here / f"{len(self._daemons)}.log").open("w") as log:
            self._daemons.append(subprocess.Popen(command, env=self._environment, stdout=log, stderr=log))


def _apart(pid: int) -> bool:
    """Whether a process has a network of its own."""
    return _network(pid) != _network(os.getpid())


def _network(pid: int) -> int:
    return os.stat(f"/proc/{pid}/ns/net").st_ino
