"""A micro-batch never waits for the device: forward, objective and backward read nothing of it.

The device is torch's meta device, whose tensors have no values: whoever asks for one fails, as do ``.item()``,
``.tolist()``, ``.cpu()``, boolean indexing and ``nonzero``. Copies to it must say that they do not wait.
"""

from __future__ import annotations

import pytest
import torch
from devices import noted_waits
from ranks import run_ranks
from small_models import small_config, start

from nemo_brain.core.groups import Output, Prompt, ScoredGroup
from nemo_brain.host.flash import FlashKernel
from nemo_brain.model import attention
from nemo_brain.model.passes import _Collect
from nemo_brain.model.reward_head import RewardGPTConfig
from nemo_brain.objectives import make_objective
from nemo_brain.objectives.goodness import GOODNESS
from nemo_brain.objectives.registry import OBJECTIVES
from nemo_brain.training.brain.passes import BRAInPasses, Scores, _ObjectiveLoss
from nemo_brain.training.reward_model.passes import PreferencePasses, _PreferenceLoss
from nemo_brain.training.sft.passes import CompletionPasses, _CompletionLoss

CASCADE, VARLEN, MERGED = "cascade", "one variable-length call", "two parts merged"
OPTIONS = {"tau": 1.0, "beta": 0.1, "eta": 1.0}


def varlen(q_SHD, k_MKD, v_MKD, sequences, scale):
    """Depends on all that a variable-length kernel gets."""
    ends = (sequences.lengths.query_ends.sum() + sequences.lengths.key_ends.sum()).to(q_SHD.dtype)
    return q_SHD * (k_MKD.mean() + v_MKD.mean()) * ends


def groups_of(lengths: list[list[int]]) -> list[ScoredGroup]:
    return [
        ScoredGroup(
            Prompt(f"p{g}", "", [1, 2, 3 + g]),
            [Output([4] * length, True, "") for length in outputs],
            rewards=[0.1 * i for i in range(len(outputs))],
            proposal_logprobs=[-1.0] * len(outputs),
            policy_logprobs=[-1.0] * len(outputs),
            prior_logprobs=[-1.1] * len(outputs),
        )
        for g, outputs in enumerate(lengths)
    ]


def run_on_meta(make, kernel: str = CASCADE, recompute: bool = False) -> list[str]:
    """Sends two micro-batches through Megatron's schedule; the copies that waited."""
    start()
    groups = groups_of([[5, 3, 4], [2, 2, 6]])
    passes, chunk, finish = make(groups)
    if recompute:
        chunk.config.recompute_granularity, chunk.config.recompute_method = "full", "uniform"
        chunk.config.recompute_num_layers = 1
    if kernel == VARLEN:
        attention.find_kernel = lambda q: varlen
    elif kernel == MERGED:  # torch's own operations: the meta device knows what they give
        attention.find_merging = lambda q, k: FlashKernel()
    chunk = chunk.to("meta")
    # No buffer to Megatron, which takes it to the device with the first row, once.
    chunk.rotary_pos_emb.inv_freq = chunk.rotary_pos_emb.inv_freq.to("meta")
    passes.device = torch.device("meta")
    with noted_waits() as waits:
        planned = passes._plan(groups, split=False)
        assert len(planned.ranks[0]) == 2
        results = passes._run([chunk], planned, groups, (1.0,), finish)
    assert all(result.device.type == "meta" for result in results)
    if not isinstance(finish, _Collect):
        assert all(parameter.grad is not None for parameter in chunk.parameters())
    return waits


def brain(groups, objective, known: bool = False):
    config = small_config()
    scores = Scores.of(groups, keep_truncated=True)
    known_GN = torch.zeros_like(scores.rewards_GN) if known else None
    passes = BRAInPasses(config, "shared_prefix", 16)
    return passes, config.configure_model(), _ObjectiveLoss(objective, scores, known_GN, 1.0)


def options_of(name: str) -> dict:
    needed = {"dpo_sft": ["beta"], "dpo": ["beta"], "ipo": ["beta"], "hinge": ["beta"], "rpo": ["beta", "eta"]}
    needed |= {"infonca": ["tau", "beta"], "nca": ["tau", "beta"], "rebel": ["eta"]}
    return {option: OPTIONS[option] for option in needed.get(name, [])}


def every_objective() -> dict[str, list[str]]:
    sections = {name: {"name": name, **options_of(name)} for name in OBJECTIVES}
    sections["dpg, z of the prompt"] = {"name": "dpg", "z": "prompt"}
    sections |= {f"brain, {goodness}": {"name": "brain", "goodness": goodness} for goodness in GOODNESS}
    found = {}
    for title, section in sections.items():
        objective = make_objective(**section)
        found[title] = run_on_meta(lambda groups, objective=objective: brain(groups, objective))
    return found


def test_no_objective_waits():
    (found,) = run_ranks(every_objective, 1)
    assert found == {title: [] for title in found} and found.keys() > OBJECTIVES.keys()


def other_passes(kernel: str) -> list[list[str]]:
    def completions(groups):
        config = small_config()
        return CompletionPasses(config, "separate_rows", 24), config.configure_model(), _CompletionLoss(1.0)

    def preferences(groups):
        config = RewardGPTConfig(**{name: value for name, value in vars(small_config()).items() if name != "__io__"})
        passes = PreferencePasses(config, "shared_prefix", 12)
        for group in groups:
            del group.outputs[2:]
        return passes, config.configure_model(), _PreferenceLoss(torch.zeros(2, dtype=torch.float64), 0.1, 1.0)

    def scoring(groups):
        passes, chunk, _ = brain(groups, None)
        return passes, chunk.eval(), _Collect(lambda tokens: None)

    objective = make_objective("brain")
    return [
        *(run_on_meta(make, kernel) for make in (completions, preferences)),
        run_on_meta(lambda groups: brain(groups, objective, known=True), kernel),
        run_on_meta(lambda groups: brain(groups, objective), kernel, recompute=True),
        run_on_meta(scoring, kernel),
    ]


@pytest.mark.parametrize("kernel", [CASCADE, VARLEN, MERGED])
def test_neither_does_fine_tuning_nor_reward_training_nor_the_second_pass_nor_recompute_nor_scoring(kernel):
    assert run_ranks(other_passes, 1, kernel) == [[[]] * 5]


class Curious(type(make_objective("brain"))):
    """Asks for a value, by one of several ways."""

    def __init__(self, ask):
        super().__init__()
        self.ask = ask

    def loss(self, inputs, weights):
        self.ask(inputs.policy_logprobs_GN.detach())
        return super().loss(inputs, weights)


WAYS = {
    "item": lambda values: values.sum().item(),
    "branch": lambda values: bool((values > 0).any()),
    "boolean index": lambda values: values[values > 0],
    "copy": lambda values: values.cpu(),
}


def reads(way: str) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        run_on_meta(lambda groups: brain(groups, Curious(WAYS[way])))


def waiting_copy() -> list[str]:
    def ask(values):
        return torch.tensor([1.0, 2.0], device=values.device), torch.ones(2).to(values.device)

    return run_on_meta(lambda groups: brain(groups, Curious(ask)))


def test_a_read_would_be_found_and_so_would_a_copy_that_waits():
    for way in WAYS:
        run_ranks(reads, 1, way)
    (found,) = run_ranks(waiting_copy, 1)
    assert len(found) == 2 * 2  # both copies, in both micro-batches
