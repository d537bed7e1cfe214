"""What all kinds of training share, without a model: which checkpoints are kept, and where a run goes on from one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from megatron.core import parallel_state
from ranks import run_ranks

from nemo_brain.config.common import CheckpointConfig
from nemo_brain.core.groups import Output, Prompt, ScoredGroup
from nemo_brain.core.interruption import Interruption
from nemo_brain.durability import checkpoint
from nemo_brain.durability.saving import Checkpointer
from nemo_brain.objectives import make_objective
from nemo_brain.report.metrics import MetricsWriter, read_metrics, read_samples
from nemo_brain.training.brain.state import BRAInState
from nemo_brain.training.frame import Frame, Outcome, State

OBJECTIVE = make_objective("brain", gamma=0.1)
GROUP = ScoredGroup(
    Prompt("p", "x", [1]),
    [Output([2], "y", True)] * 2,
    rewards=[0.0, 1.0],
    prior_logprobs=[-1.0, -2.0],
    proposal_logprobs=[-3.0, -4.0],
    policy_logprobs=[-5.0, -1 / 3],
)


class NoWeights:
    """Saves as a strategy does, but there is no model."""

    fingerprint = "none"

    def __init__(self):
        self.saver = self

    def save_weights(self, path: Path) -> None:
        pass

    def write(self, group) -> None:
        pass


@dataclass
class Batch:
    groups = (GROUP,)


def new_frame(run_dir: Path, state: State | None = None, **config) -> Frame:
    """On a process group of one rank."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
        parallel_state.initialize_model_parallel()
    run_dir.mkdir(exist_ok=True)
    options = {"every_minutes": None, "async_save": False, **config}
    writer = MetricsWriter(run_dir)
    state = state or State()
    return Frame(NoWeights(), state, CheckpointConfig(**options), run_dir, writer, Interruption(), "stop", {})


def step(frame: Frame) -> None:
    """An optimizer step, as the loop's generator and Lightning's callback make it between them."""
    steps = frame.step(Batch(), {}, lambda result: {"loss": result.loss})
    assert next(steps) == Batch()
    result = SimpleNamespace(tokens=10, loss=float(frame.state.step))
    with pytest.raises(StopIteration):
        steps.send(Outcome(result, grad_norm=1.0, lr=0.1, seconds=2.0, skipped=False))


def kept(run_dir: Path) -> dict[int, float | None]:
    """The scores of the checkpoints on the disk, by their steps."""
    return {
        checkpoint.step_of(path): checkpoint.score_of(path) for path in checkpoint.complete(run_dir / "checkpoints")
    }


def evaluated(run_dir: Path, scores: list[float | None], last: bool, config: dict) -> dict[int, float | None]:
    """What is kept of a run that is evaluated after some of its steps."""
    frame = new_frame(run_dir, **config)
    for index, score in enumerate(scores):
        step(frame)
        if score is not None:
            frame.state.score = score
        frame.save_point(last=last and index + 1 == len(scores))
    return kept(run_dir)


EVERY = {"every_steps": 1, "keep_last": 1}
RARELY = {"every_steps": None, "keep_last": 1}
KEPT = {
    "the evaluated step, not those saved after it": (EVERY, 1, [None, 0.3, None, 0.2, None], {2: 0.3, 5: None}),
    "several": (EVERY, 2, [0.1, 0.3, None, 0.2, None], {2: 0.3, 4: 0.2, 5: None}),
    "a score of zero counts": (EVERY, 1, [0.0, None, None], {1: 0.0, 3: None}),
    "a negative score counts": (EVERY, 1, [-2.0, None, -3.0, None], {1: -2.0, 4: None}),
    "zero is above a negative score": (EVERY, 1, [-2.0, 0.0, None], {2: 0.0, 3: None}),
    "nothing but the newest without an evaluation": (EVERY, 3, [None, None, None], {3: None}),
    "none is asked for": (EVERY, 0, [0.5, None], {2: None}),
    "of equal ones the newest": (EVERY, 1, [0.5, 0.5, None], {2: 0.5, 3: None}),
    "the best is saved when nothing else is due": (RARELY, 1, [None, -0.5, None, 0.0, -1.0, None], {4: 0.0}),
    "a new best takes the place of the one before": (RARELY, 1, [-0.5, 0.25, 0.125, 0.5], {4: 0.5}),
    "an equal one is none": (RARELY, 1, [0.5, 0.5], {1: 0.5}),
    "the second best too": (RARELY, 2, [0.5, 0.25, 0.125, 0.375], {1: 0.5, 4: 0.375}),
    "nothing is due and nothing asked for": (RARELY, 0, [0.5, 0.25], {}),
}


@pytest.mark.parametrize("case", KEPT)
def test_a_checkpoint_is_kept_for_the_evaluation_of_its_own_weights(case, tmp_path):
    config, keep_best, scores, expected = KEPT[case]
    options = {**config, "keep_best": keep_best}
    assert run_ranks(evaluated, 1, tmp_path / "run", scores, False, options) == [expected]


def test_the_last_step_is_saved_whatever_its_score(tmp_path):
    options = {**RARELY, "keep_best": 1}
    assert run_ranks(evaluated, 1, tmp_path / "run", [0.5, None], True, options) == [{1: 0.5, 2: None}]
    options["at_end"] = False
    assert run_ranks(evaluated, 1, tmp_path / "other", [0.5, None], True, options) == [{1: 0.5}]


def test_a_best_checkpoint_is_one_that_would_be_kept(tmp_path):
    """``best`` says so before it is written, ``prune`` afterwards."""
    for number, score in enumerate([0.25, None, -0.5], start=1):
        path = checkpoint.begin(tmp_path, number)
        checkpoint.write_text(path / "run.json", json.dumps({"score": score}))
        checkpoint.publish(path, {})
    saving = Checkpointer(CheckpointConfig(keep_best=2), tmp_path, {})
    assert [saving.best(score) for score in (None, -1.0, -0.5, -0.25, 0.0, 0.25, 1.0)] == [False] * 3 + [True] * 4
    assert Checkpointer(CheckpointConfig(keep_best=3), tmp_path, {}).best(-9.0), "there are only two scores"
    assert not Checkpointer(CheckpointConfig(), tmp_path, {}).best(9.0)
    assert Checkpointer(CheckpointConfig(keep_best=1), tmp_path / "new", {}).best(-9.0)
    checkpoint.prune(tmp_path, keep_last=1, keep_best=1)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step_000000003", "step_000000001"]


def redone(run_dir: Path) -> list[int]:
    """Three steps, the second of which is saved; then what another process does after the first has been killed."""
    first = new_frame(run_dir, BRAInState(objective=OBJECTIVE), every_steps=2)
    for number in range(3):
        first.state.rollout, first.state.record = [GROUP] * number, {"kl_to_prior": 0.5 * number}
        first.write_samples(number, [GROUP], "train")
        step(first)
        first.save_point()
    (path,) = checkpoint.complete(run_dir / "checkpoints")
    before = [record["step"] for record in read_metrics(run_dir / "metrics.jsonl")]
    assert (before, len(read_samples(run_dir / "samples.jsonl"))) == ([1, 2, 3], 3)
    again = new_frame(run_dir, BRAInState(objective=OBJECTIVE), every_steps=2)
    again.restore(path)
    assert again.state == BRAInState(objective=OBJECTIVE, step=2, rollout=[GROUP], record={"kl_to_prior": 0.5})
    assert len(read_samples(run_dir / "samples.jsonl")) == 2
    step(again)
    # In a directory of its own there is nothing to cut.
    other = new_frame(run_dir.with_name("other"), BRAInState(objective=OBJECTIVE))
    step(other)
    other.restore(path)
    assert other.state.step == 2 and len(read_metrics(other.run_dir / "metrics.jsonl")) == 1
    return [record["step"] for record in read_metrics(run_dir / "metrics.jsonl")]


def test_a_run_that_goes_on_has_each_step_once(tmp_path):
    assert run_ranks(redone, 1, tmp_path / "run") == [[1, 2, 3]]


def test_the_state_of_a_run_comes_back_whole():
    state = BRAInState(
        objective=OBJECTIVE,
        step=7,
        score=-0.5,
        rollout=[GROUP],
        record={"kl_to_prior": float("inf"), "sample_seconds": 0.1 + 0.2},
        start=[GROUP, GROUP],
        reference_rewards=[None, 0.0],
        validated=3,
    )
    again = BRAInState(objective=OBJECTIVE)
    again.load_json(json.loads(json.dumps(state.as_json())))
    assert again == state and type(again.start[0]) is ScoredGroup
