"""What one rank has found, or what has gone wrong on it, becomes every rank's; a request to end reaches every wait."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time

import pytest
import torch.distributed as dist
from ranks import run_ranks

from nemo_brain.core.interruption import Interrupted, Interruption
from nemo_brain.core.ranks import gathered, in_thread, on_all_ranks, on_first_rank

SIZES = [1, 3]
SECONDS = 5.0  # within which all ranks end that are asked to, on a busy machine


def start() -> int:
    """Joins the ranks; this one's number."""
    dist.init_process_group("gloo")
    return dist.get_rank()


def found(interruptible: bool) -> tuple:
    rank = start()
    interruption = Interruption() if interruptible else None
    own = on_all_ranks(lambda: {"rank": rank}, interruption=interruption)
    called = []
    first = on_first_rank(lambda: called.append(rank) or f"of {rank}", interruption=interruption)
    return gathered(rank), own, first, called


def test_a_process_by_itself_needs_no_others():
    assert gathered("x") == ["x"]
    assert on_all_ranks(lambda: 1) == on_first_rank(lambda: 1) == 1
    for call in (on_all_ranks, on_first_rank):
        with pytest.raises(KeyError) as caught:
            call(lambda: {}["a key"])
        assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize("interruptible", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_results(size, interruptible):
    for rank, result in enumerate(run_ranks(found, size, interruptible)):
        assert result == (list(range(size)), {"rank": rank}, "of 0", [0] if rank == 0 else [])


def found_in_groups(interruptible: bool) -> tuple:
    """Ranks 1 and 2 are a group, rank 0 is one by itself."""
    rank = start()
    alone, both = dist.new_group([0]), dist.new_group([1, 2])
    group, interruption = both if rank else alone, Interruption() if interruptible else None
    results = gathered(rank, group), on_first_rank(lambda: f"of {rank}", group, interruption)
    dist.barrier()  # rank 0 holds the store that the others meet in
    return results


@pytest.mark.parametrize("interruptible", [False, True])
def test_results_in_groups(interruptible):
    assert run_ranks(found_in_groups, 3, interruptible) == [([0], "of 0"), ([1, 2], "of 1"), ([1, 2], "of 1")]


class Refused(ValueError):
    """An error of a user's own."""


class OfTwo(Exception):
    """Pickled, but not made again."""

    def __init__(self, name: str, line: int):
        super().__init__(f"{name}:{line}")


class WithLock(Exception):
    """Not to be pickled."""

    def __init__(self, message: str):
        super().__init__(message)
        self.lock = threading.Lock()


ERRORS = {
    "a class of one's own": (Refused("no such key"), Refused),
    "a TypeError": (TypeError("'int' object is not callable"), TypeError),
    "an OSError": (OSError(28, "No space left on device"), OSError),
    "pickled, but not made again": (OfTwo("file", 3), RuntimeError),
    "not to be pickled": (WithLock("held"), RuntimeError),
}


def raised(call, *failing: int, name: str, interruptible: bool) -> tuple[type, str, list[str]]:
    """What each rank raises where ``work`` fails on some of them."""
    rank = start()

    def where_it_broke() -> None:
        if rank in failing:
            raise ERRORS[name][0]

    try:
        call(where_it_broke, interruption=Interruption() if interruptible else None)
    except Exception as error:
        return type(error), str(error), getattr(error, "__notes__", [])
    return type(None), "", []


def test_errors_are_as_hard_to_pickle_as_they_claim():
    for name, (error, _) in ERRORS.items():
        try:
            fine = type(pickle.loads(pickle.dumps(error))) is type(error)
        except Exception:
            fine = False
        assert fine == (ERRORS[name][1] is type(error)), name


@pytest.mark.parametrize("interruptible", [False, True])
@pytest.mark.parametrize("name", ERRORS)
def test_an_error_of_one_rank_is_every_ranks_with_its_traceback(name, interruptible):
    error, elsewhere = ERRORS[name]
    said = str(error) if elsewhere is type(error) else f"{type(error).__name__}: {error}"
    results = run_ranks(raised, 3, on_all_ranks, 1, name=name, interruptible=interruptible)
    assert results[1] == (type(error), str(error), [])
    for rank in (0, 2):
        kind, message, (note,) = results[rank]
        assert (kind, message) == (elsewhere, said)
        assert note.startswith("Raised on rank 1:\nTraceback (most recent call last)")
        assert "in where_it_broke" in note and note.endswith(f"{type(error).__name__}: {error}")
    (result,) = run_ranks(raised, 1, on_all_ranks, 0, name=name, interruptible=interruptible)
    assert result == (type(error), str(error), [])


def test_an_error_of_the_first_rank_is_every_ranks():
    results = run_ranks(raised, 3, on_first_rank, 0, 1, 2, name="a TypeError", interruptible=False)
    assert [result[:2] for result in results] == [(TypeError, "'int' object is not callable")] * 3
    assert [len(notes) for *_, notes in results] == [0, 1, 1], "the others were not asked"


def test_what_all_ranks_raise_alike_needs_no_note():
    results = run_ranks(raised, 3, on_all_ranks, 0, 1, 2, name="an OSError", interruptible=False)
    assert results == [(OSError, "[Errno 28] No space left on device", [])] * 3


def of_several() -> tuple[str, int]:
    rank = start()

    def fail() -> None:
        if rank:
            raise ValueError(f"rank {rank} has a trouble of its own")

    with pytest.raises(ValueError) as caught:
        on_all_ranks(fail)
    return str(caught.value), len(getattr(caught.value, "__notes__", []))


def test_of_several_errors_the_first_ranks_is_every_ranks():
    said = "rank 1 has a trouble of its own"
    assert run_ranks(of_several, 3) == [(said, 1), (said, 0), (said, 1)]


def asked_to_end(call, told: int) -> tuple[str, float]:
    """Rank 0 sleeps for a minute; half a second later SIGTERM comes to one rank. Why this rank ends, and when."""
    rank = start()
    interruption = Interruption()
    interruption.listen()
    if rank == told:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    with pytest.raises(Interrupted) as caught:
        call(lambda: time.sleep(60 if rank == 0 else 0), interruption=interruption)
    return str(caught.value), time.monotonic() - began


@pytest.mark.parametrize("call", [on_all_ranks, on_first_rank])
@pytest.mark.parametrize(("size", "told"), [(1, 0), (3, 0), (3, 2)])
def test_a_request_to_end_reaches_a_rank_that_waits(call, size, told):
    for rank, (reason, seconds) in enumerate(run_ranks(asked_to_end, size, call, told)):
        assert reason == ("signal SIGTERM" if rank == told else "another rank was asked to end")
        assert seconds < SECONDS


def test_a_thread_hands_on_its_result_or_error():
    assert in_thread(lambda: threading.current_thread().name, "mine").result() == "mine"
    with pytest.raises(KeyError, match="a key"):
        in_thread(lambda: {}["a key"], "mine").result()
