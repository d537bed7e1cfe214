"""Programs in the sandbox: what tests they pass, and what they try instead."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from nemo_brain.core.groups import Prompt
from nemo_brain.rewards.build import make_reward
from nemo_brain.rewards.protocol import RewardError, check_prompts, compute_rewards, load_reward
from nemo_brain.rewards.verifiers import sandbox_start
from nemo_brain.rewards.verifiers.sandbox import run

TARGET = {"_target_": "nemo_brain.rewards.verifiers.code.CodeReward"}
NEXT = ["assert f(1) == 2", "assert f(2) == 3", "assert 4 == f(3)"]
DOUBLED = [{"input": "21\n", "output": "42\n"}, {"input": "1\n", "output": "2"}]
RIGHT = "def f(x):\n    return x + 1\n"
SYSTEM_PYTHON = Path("/usr/bin/python3")
PR_CAPBSET_DROP, CAP_SYS_ADMIN = 24, 21


def made(**arguments):
    return make_reward({**TARGET, "wall_seconds": 15.0, "cpu_seconds": 1, **arguments})


def fenced(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\nGood luck."


def score(reward, programs: list[str], tests, reference: str | None = None) -> list[float]:
    count, record = len(programs), {} if tests is None else {"tests": tests}
    outputs = [fenced(program) for program in programs]
    return compute_rewards(reward, ["p"] * count, outputs, references=[reference] * count, metadata=[record] * count)


@pytest.fixture(scope="module")
def sandbox():
    reward = made()
    try:
        load_reward(reward)
    except ValueError as error:
        pytest.skip(str(error))
    return reward


@pytest.fixture
def marked():
    """A name that processes of this test alone have; none of them is to be left."""
    name = f"nemo_brain_{os.urandom(8).hex()}"
    yield name
    assert processes(name) == []


def processes(name: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:
            continue
        if name.encode() in command:
            found.append(path.parent.name)
    return found


# Tests and their scores


@pytest.mark.parametrize("way", ["the record", "JSON in the reference", "lines of the reference"])
def test_the_score_is_the_share_of_the_tests_that_pass(sandbox, way):
    tests = NEXT if way == "the record" else None
    reference = {"the record": None, "JSON in the reference": json.dumps(NEXT)}.get(way, "\n".join(NEXT) + "\n\n")
    programs = [RIGHT, "def f(x):\n    return 2", "def f(x):\n    return 1 / (x - 2)", "def f(x)", ""]
    assert score(sandbox, programs, tests, reference) == [1.0, 1 / 3, 0.0, 0.0, 0.0]


def test_a_program_is_judged_by_what_it_prints(sandbox):
    programs = [
        "print(int(input()) * 2, '')",
        "print(42)",
        "print(int(input()) * 2)\nraise SystemExit(3)",
        "print(input('2'))",
    ]
    assert score(sandbox, programs, DOUBLED) == [1.0, 0.5, 0.0, 0.0]
    assert score(sandbox, ["if __name__ == '__main__':\n    print(2 * int(input()))"], DOUBLED) == [1.0]


def test_all_tests_or_nothing_and_programs_without_a_fence(sandbox):
    reward = made(score="all", fenced=False)
    outputs = [RIGHT, "def f(x): return 2", fenced(RIGHT)]
    scores = compute_rewards(reward, [""] * 3, outputs, references=[None] * 3, metadata=[{"tests": NEXT}] * 3)
    assert scores == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("expression", "literal"),
    [
        ("(1, [2.5, None], {'a': {3}})", "(1, [2.5, None], {'a': {3}})"),
        ("__import__('collections').Counter('aab')", "{'a': 2, 'b': 1}"),
        ("frozenset('a')", "{'a'}"),
        ("-1", "-1"),
        ("1.0", "1"),
        ("'\\ud800'", "'\\ud800'"),
        ("__import__('enum').IntEnum('E', 'a').a", "1"),
    ],
)
def test_values_are_compared_as_an_assertion_would(sandbox, expression, literal):
    tests = [f"assert f() == {literal}", f"assert f() == [{literal}]"]
    assert score(sandbox, [f"def f():\n    return {expression}"], tests) == [0.5]


def test_assertions_of_other_forms_are_tests_too(sandbox):
    tests = [
        "assert f(1) > 1",
        "assert not f(-1), 'zero'",
        "assert abs(f(0.5) - 1.5) < 1e-9\nassert f(3) == 5",
        "f('a')",
    ]
    assert score(sandbox, [RIGHT], tests) == [0.5]


def test_modules_of_the_environment_can_be_imported(sandbox):
    assert score(sandbox, ["import numpy\ndef f(x):\n    return numpy.int64(x) + 1"], NEXT) == [1.0]


def test_programs_run_side_by_side(sandbox):
    """Each sleeps; their scores are in their order."""
    reward = made(workers=8)
    started = time.monotonic()
    programs = [f"import time\ntime.sleep(3)\ndef f(x):\n    return {1 + index % 2}" for index in range(8)]
    assert score(reward, programs, ["assert f(0) == 1"]) == [1.0, 0.0] * 4
    assert time.monotonic() - started < 20  # one after another they take 24


def test_a_program_gives_the_same_each_time(sandbox):
    program = "def f():\n    return ''.join({'a', 'b', 'c', 'd', 'e'})"
    tests = [f"assert f() == {''.join(order)!r}" for order in itertools.permutations("abcde")]
    assert score(sandbox, [program] * 3, tests) == [1 / 120] * 3


# What is not a solution

FORGERIES = {
    "exits before the tests": "import sys\nsys.exit(0)",
    "ends at once": "import os\nos._exit(0)",
    "prints that all is well": "print('OK')\nprint('passed', 1.0, '42')\nprint([None, 0, 'True'])",
    "is equal to everything": "class E:\n    __eq__ = lambda self, other: True\n    __repr__ = lambda self: '2'\n"
    "f = lambda x: E()",
    "is an integer equal to everything": "class E(int):\n    __eq__ = lambda self, other: True\nf = lambda x: E(7)",
    "writes reports of its own": "import json, os\nlines = [json.dumps(['0' * 32, i, str(i + 2)]) for i in range(3)]\n"
    "for number in range(3, 64):\n    try:\n        os.write(number, ('\\n'.join(lines) + '\\n').encode())\n"
    "    except OSError:\n        pass\ndef f(x):\n    return x + 1",
    "replaces what compares": "import builtins, ast\nbuiltins.repr = ast.literal_eval = lambda _: 'True'\nf = int",
    "never ends": "while True:\n    pass",
    "never ends in a test": "def f(x):\n    while True:\n        pass",
    "sleeps": "import time\ntime.sleep(1000)",
    "never stops printing": "while True:\n    print('x' * 1000)",
    "takes all memory": "x = []\nwhile True:\n    x.append(bytes(10**7))",
    "takes all memory at once": "x = bytes(10**11)",
    "recurses": "def f(x):\n    return f(x)",
    "nests": "def f(x):\n    y = []\n    for _ in range(10**5):\n        y = [y]\n    return y",
    "returns too much": "def f(x):\n    return 'x' * 10**7",
    "is killed": "import os\nos.kill(os.getpid(), 9)",
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_program_passes_no_assertion_that(sandbox, what):
    started = time.monotonic()
    assert score(sandbox, [FORGERIES[what]], NEXT) == [0.0]
    assert time.monotonic() - started < 60


def test_it_passes_no_input_either(sandbox):
    programs = [program for program in FORGERIES.values() if "sleep" not in program]
    assert score(sandbox, programs, DOUBLED[:1]) == [0.0] * len(programs)


def test_the_answers_are_nowhere_in_the_programs_process(sandbox):
    program = """
import gc, sys
def f(part):
    frame, seen = sys._getframe(), []
    while frame:
        seen += [frame.f_locals, frame.f_globals]
        frame = frame.f_back
    return part * 3 if part * 3 in repr([seen, gc.get_objects()]) else 0
"""
    assert score(sandbox, [program], ["assert f('8273') == '827382738273'"]) == [0.0]
    assert score(sandbox, [program], ["assert f('8273') == f('8273') == '827382738273'"]) == [1.0]  # there it would be


def test_forks_without_end_are_stopped_and_nothing_is_left(sandbox, marked):
    bomb = f"import os\nname = {marked!r}\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    counted = []
    watching = threading.Event()

    def watch() -> None:
        while not watching.wait(0.05):
            counted.append(len(list(Path("/proc").glob("[0-9]*"))))

    before = len(list(Path("/proc").glob("[0-9]*")))
    thread = threading.Thread(target=watch)
    thread.start()
    assert score(sandbox, [bomb], NEXT) == [0.0]
    watching.set()
    thread.join()
    assert max(counted) < before + 60  # eight, and what others start meanwhile


def test_a_process_that_is_left_running_ends_with_the_program(sandbox, marked):
    daemon = f"""
import os, subprocess, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in range(3):
            os.close(number)
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(60)", {marked!r}])
    os._exit(0)
time.sleep(0.5)
{RIGHT}"""
    assert score(sandbox, [daemon], NEXT) == [1.0]


# What a program reaches


def answer(reward, program: str) -> str:
    """What a program prints in a reward's sandbox."""
    return run({"program": program}, "", reward._limits).output.decode()


def test_there_is_no_network(sandbox):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = listener.getsockname()
        program = f"import socket\ntry:\n    socket.create_connection({address!r}, 2)\n    print('connected')\n"
        program += "except OSError as error:\n    print(type(error).__name__)"
        assert answer(sandbox, program) == "OSError\n"
        assert answer(made(isolation="none"), program) == "connected\n"  # so it is the sandbox that does it


def test_there_are_no_files_but_the_interpreters_and_none_can_be_written(sandbox, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("the answers")
    tmp_path.chmod(0o777)
    program = f"""
import os, sys
def tried(work):
    try:
        return work()
    except OSError as error:
        return type(error).__name__
print(tried(lambda: open({str(secret)!r}).read()))
places = ["/", "/usr", "/dev", sys.prefix, {str(tmp_path)!r}]
print([tried(lambda: open(os.path.join(place, "x"), "w")) for place in places])
print(os.listdir("."), os.getcwd(), open("x", "w").write("abc"), os.path.exists("/proc"), os.path.exists("/home"))
"""
    assert answer(sandbox, program).splitlines() == [
        "FileNotFoundError",
        str(["OSError"] * 3 + ["OSError", "FileNotFoundError"]),
        "[] /tmp 3 False False",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_the_directory_is_removed_and_files_have_room_only_for_so_much(sandbox):
    before = set(Path("/tmp").glob("sandbox_*"))
    program = "import os\nopen('a', 'w').write('x')\nprint(os.path.getsize('a'))\n"
    program += "try:\n    for i in range(100):\n        open(f'{i}', 'wb').write(bytes(10**6))\n"
    program += "except OSError as error:\n    print(error.strerror)"
    assert answer(sandbox, program) == "1\nNo space left on device\n"
    assert set(Path("/tmp").glob("sandbox_*")) <= before


def test_a_program_is_nobody_and_sees_no_environment(sandbox, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    program = """
import ctypes, os
print("HF_TOKEN" in os.environ, os.getuid() != 0, os.getgroups(), os.getppid())
for pid in (1, os.getppid(), -1):
    try:
        os.kill(pid, 0)
        os.kill(pid, 9)
        print("still here")
    except OSError as error:
        print(type(error).__name__)
print(ctypes.CDLL(None).unshare(0x20000), ctypes.CDLL(None).setuid(0))
"""
    output = answer(sandbox, program).splitlines()
    # A signal to init does nothing; one to all goes to all but init and itself.
    assert output[0] == "False True [] 1" and output[-1] == "-1 -1"
    assert set(output[1:-1]) <= {"PermissionError", "ProcessLookupError", "still here"}


def test_without_isolation_the_other_limits_hold(tmp_path):
    reward = made(isolation="none", wall_seconds=2.0)
    load_reward(reward)
    names = ["never ends", "sleeps", "never stops printing", "takes all memory", "exits before the tests"]
    assert score(reward, [RIGHT, *(FORGERIES[name] for name in names)], NEXT) == [1.0] + [0.0] * 5
    assert answer(reward, "import os\nprint(os.listdir(), os.environ.keys() - {'LC_CTYPE'})").startswith("[] {")


# Where there is no sandbox


@pytest.mark.skipif(os.geteuid() != 0, reason="takes a capability from root")
def test_a_machine_that_allows_no_namespaces_is_refused_before_training_unless_asked_for():
    script = f"""
import ctypes
from nemo_brain.rewards.build import make_reward
from nemo_brain.rewards.protocol import load_reward
ctypes.CDLL(None).prctl({PR_CAPBSET_DROP}, {CAP_SYS_ADMIN}, 0, 0, 0)
load_reward(make_reward({{**{TARGET!r}, "isolation": "none"}}))
print("without isolation it works")
load_reward(make_reward({TARGET!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ})
    assert done.stdout == "without isolation it works\n" and done.returncode == 1
    assert (
        "no sandbox can be made on this machine (PermissionError: [Errno 1] unshare: Operation not permitted)"
        in done.stderr
    )
    assert "reward.isolation=none" in done.stderr


def test_a_sandbox_in_which_python_does_not_start_is_refused(sandbox):
    with pytest.raises(ValueError, match=r"ends with status .* in the sandbox: raise its limits \(reward\.memory_mb"):
        load_reward(made(memory_mb=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": "some"}, "reward.score must be share or all, not 'some'"),
        ({"isolation": "docker"}, "reward.isolation must be namespaces or none, not 'docker'"),
        ({"fenced": 1}, "reward.fenced must be true or false, not 1"),
        ({"workers": 0}, "reward.workers must be an integer of at least 1, not 0"),
        ({"cpu_seconds": 0.5}, "reward.cpu_seconds must be an integer of at least 1, not 0.5"),
        ({"memory_mb": "1"}, "reward.memory_mb must be an integer of at least 1, not '1'"),
        ({"wall_seconds": -1}, "reward.wall_seconds must be a number above 0, not -1"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        made(**arguments)


@pytest.mark.parametrize(
    ("tests", "reference", "message"),
    [
        (None, None, r"no tests \(write them into the record's 'tests' or 'reference': a list of Python assertions"),
        ([], "assert f(1) == 2", r"no tests \("),
        (["assert f(1) =="], None, r"'tests' holds no tests: invalid syntax .*\(write a list"),
        ([{"input": "1"}], None, r"'tests' holds no tests: \{'input': '1'\} \(write a list"),
        ([3], None, r"'tests' holds no tests: 3 \(write a list"),
        (3, None, r"'tests' holds no tests: 'int' object is not iterable"),
        (None, "forty two", r"'reference' holds no tests: invalid syntax"),
    ],
)
def test_prompts_without_tests_are_named(tests, reference, message):
    record = {} if tests is None else {"tests": tests}
    with pytest.raises(ValueError, match=f"to the prompt 'train:7': {message}"):
        check_prompts(made(), [Prompt("train:7", "p", [1], reference, record)])
    with pytest.raises(RewardError, match=message):
        score(made(), [RIGHT], tests, reference)


@pytest.mark.skipif(os.geteuid() != 0 or not SYSTEM_PYTHON.exists(), reason="becomes another user")
def test_a_user_without_privileges_makes_the_same_sandbox():
    """With a user namespace; root has no need of one, so the other tests may not have come by it."""
    limits = {"isolated": True, "cpu_seconds": 2, "memory_bytes": 2**29, "file_bytes": 2**20, "processes": 8}
    program = "import os\nprint(os.getuid(), os.getpid(), os.getcwd(), os.listdir(), os.path.exists('/proc'))\n"
    program += "import socket, sys\ntry:\n    os.chroot('/')\nexcept PermissionError:\n    print('no capabilities')\n"
    program += (
        "try:\n    socket.create_connection(('127.0.0.1', 9))\nexcept OSError as error:\n    print(error.strerror)"
    )
    rules = json.dumps({**limits, "prefixes": ["/usr"]})
    starter = Path(sandbox_start.__file__).read_text()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        command = [str(SYSTEM_PYTHON), "-c", starter, rules, str(SYSTEM_PYTHON), "-c", program]
        done = subprocess.run(
            command, user=12345, group=12345, extra_groups=[], cwd=folder, capture_output=True, text=True
        )
    if "unshare" in done.stderr:
        pytest.skip(done.stderr)
    assert done.stdout == "65534 2 /tmp [] False\nno capabilities\nNetwork is unreachable\n", done.stderr
