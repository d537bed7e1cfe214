"""Runs a program inside the sandbox: ``python -c THIS JOB REPORT``, two file descriptors.

The job is JSON: ``program``, and with ``tests`` also a ``token``. Without tests the program is the script that the
process runs. With tests it is a module, in which they are evaluated after it: each is Python source and whether its
value is asked for. For each one that does not fail a line goes to the report: token, index, and the value as a literal,
made of built-in types. The answers to compare the values with are not here.
"""

import json
import os
import sys
import types
from typing import Any


def plain(value: Any) -> Any:
    if isinstance(value, (bool, type(None), type(...))):
        return value
    if hasattr(type(value), "tolist"):  # numpy
        return plain(value.tolist())
    kind: Any
    for kind in (int, float, complex, str, bytes):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    for kind, items in ((list, list), (tuple, tuple), (set, set), (frozenset, set)):
        if isinstance(value, kind):
            return items(plain(item) for item in value)
    raise TypeError(type(value))


def module(name: str) -> dict[str, Any]:
    made = sys.modules[name] = types.ModuleType(name)
    return made.__dict__


def main() -> None:
    with open(int(sys.argv[1])) as file:
        job = json.load(file)
    report = int(sys.argv[2])
    if "tests" not in job:
        os.close(report)
        sys.argv[:] = ["program"]
        exec(compile(job.pop("program"), "<program>", "exec"), module("__main__"))
        return
    sys.argv[:] = ["solution"]
    names, write, dumps = module("solution"), os.write, json.dumps
    exec(compile(job["program"], "<program>", "exec"), names)
    for index, (source, valued) in enumerate(job["tests"]):
        try:
            if valued:
                value = repr(plain(eval(compile(source, "<test>", "eval"), names)))
            else:
                exec(compile(source, "<test>", "exec"), names)
                value = "True"
        except BaseException:
            continue
        write(report, (dumps([job["token"], index, value]) + "\n").encode())


if __name__ == "__main__":
    main()
