"""A process of ``BoxedAnswerReward``: compares the pairs of expressions that it is given, a line each, until the input
ends. Who started it kills it where one takes too long."""

import json
import logging
import resource
import sys

from math_verify import parse, verify

MEMORY_BYTES = 4 * 2**30


def equal(gold: str, answer: str) -> bool:
    logging.disable(logging.WARNING)  # that there is no time limit
    expected, given = (parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer))
    return verify(expected, given, timeout_seconds=None)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    equal("1", "2")  # the parser is made when it is used first, which is no comparison's fault
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            found = equal(*json.loads(line))
        except Exception:  # the library's own bugs on odd texts, MemoryError, RecursionError
            found = False
        print("equal" if found else "unequal", flush=True)


if __name__ == "__main__":
    main()
