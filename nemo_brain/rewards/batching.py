"""One thread that calls a reward for many: what comes at about the same time is scored in one call."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from nemo_brain.rewards.protocol import Reward, compute_rewards, load_reward


@dataclass
class Items:
    """Prompts, outputs, references and metadata to score; lists of one length."""

    prompts: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    references: list[str | None] = field(default_factory=list)
    metadata: list[dict] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.outputs)

    def __iadd__(self, other: Items) -> Items:
        for name, values in vars(self).items():
            values += getattr(other, name)
        return self


class RewardBatcher:
    """Loads a reward and calls it, both on a thread of its own.

    Args:
        reward: what is called.
        max_batch: items of a call that serves several submissions; a larger submission is a call of its own.
        wait_seconds: how long a call may wait for more submissions.
        on_failure: called on the thread if the reward cannot be loaded.
    """

    def __init__(self, reward: Reward, max_batch: int, wait_seconds: float, on_failure: Callable[[], None]):
        self.failure: Exception | None = None  # why the reward could not be loaded
        self.ready = False
        self._reward = reward
        self._max_batch = max_batch
        self._wait_seconds = wait_seconds
        self._on_failure = on_failure
        self._thread = threading.Thread(target=self._work, name="reward", daemon=True)
        self._queue: queue.SimpleQueue[tuple[Items, Future] | None] = queue.SimpleQueue()
        self._held: tuple[Items, Future] | None = None  # taken from the queue, too large for the call that it was for

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, items: Items) -> Future:
        """The future rewards of ``items``, or the RewardError about them. Cancelling it before its call saves that."""
        future: Future = Future()
        self._queue.put((items, future))
        return future

    def close(self, timeout: float) -> None:
        """Ends the thread after what has been submitted, and waits so many seconds for that."""
        self._queue.put(None)
        self._thread.join(timeout)

    def _work(self) -> None:
        try:
            load_reward(self._reward)
        except Exception as error:
            self.failure = error
            self._on_failure()
            return
        self.ready = True
        while jobs := self._next():
            self._score([job for job in jobs if job[1].set_running_or_notify_cancel()])

    def _next(self) -> list[tuple[Items, Future]]:
        """The submissions of the next call; none when it is time to end."""
        first = self._held or self._queue.get()
        self._held = None
        if first is None:
            return []
        jobs, size = [first], len(first[0])
        deadline = time.monotonic() + self._wait_seconds
        while size < self._max_batch:
            try:
                job = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if job is None:
                self._queue.put(None)
                break
            if size + len(job[0]) > self._max_batch:
                self._held = job
                break
            jobs.append(job)
            size += len(job[0])
        return jobs

    def _score(self, jobs: list[tuple[Items, Future]]) -> None:
        if not jobs:
            return
        together = Items()
        for items, _ in jobs:
            together += items
        try:
            rewards = compute_rewards(self._reward, **vars(together))
        except BaseException as error:  # whatever it is, somebody waits for it, and the next ones for this thread
            if len(jobs) == 1:
                jobs[0][1].set_exception(error)
                return
            for job in jobs:  # one's failure is not the others'
                self._score([job])
            return
        for items, future in jobs:
            future.set_result(rewards[: len(items)])
            rewards = rewards[len(items) :]
