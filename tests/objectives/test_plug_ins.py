"""What an objective from outside may use: raw weights, a smallest group of its own, lengths, prompts' names, state.

Shapes: G groups, N outputs per group.
"""

from __future__ import annotations

import json

import pytest
import torch
from plug_ins import GDCPlusPlus, RunningDPG

from nemo_brain.objectives import Brain, Objective, coefficients, make_objective

NAMES = ("policy_logprobs_GN", "prior_logprobs_GN", "proposal_logprobs_GN", "rewards_GN")
CLOSE = {"rtol": 1e-12, "atol": 1e-13}  # roundings of float64 log-probs of 40 nats
GAMMA = 0.5


def scores(groups: int = 3, n: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    draws = torch.randn(4, groups, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    draws[:3] -= 40
    return dict(zip(NAMES, draws, strict=True))


def alpha_and_beta(known: dict) -> tuple[torch.Tensor, torch.Tensor]:
    q, p, q0, r = (known[name] for name in NAMES)
    return torch.exp(p + r / GAMMA - q0), torch.exp(q - q0)


def gdc_coefficients(known: dict) -> torch.Tensor:
    """- (alpha / Z - beta) / n."""
    alpha_GN, beta_GN = alpha_and_beta(known)
    return -(alpha_GN / alpha_GN.mean(-1, keepdim=True) - beta_GN) / alpha_GN.shape[1]


def make(target: str, **options) -> Objective:
    return make_objective(_target_=f"plug_ins.{target}", gamma=GAMMA, **options)


def test_gdc_plus_plus_has_its_papers_gradient():
    known = scores()
    expected_GN = gdc_coefficients(known)
    torch.testing.assert_close(make("GDCPlusPlus")(**known).coefficients_GN, expected_GN, **CLOSE)
    brain_GN = make_objective("brain", gamma=GAMMA)(**known).coefficients_GN
    assert (expected_GN - brain_GN).abs().amax(-1).min() > 0.01


def test_gdc_plus_plus_is_brain_where_the_policy_is_the_proposal():
    """With the group's mean of alpha as normaliser."""
    known = scores()
    known["policy_logprobs_GN"] = known["proposal_logprobs_GN"]
    brain = make_objective("brain", gamma=GAMMA)(**known)
    torch.testing.assert_close(make("GDCPlusPlus")(**known).coefficients_GN, brain.coefficients_GN, **CLOSE)


def test_diagnostics_are_the_normalised_weights_whatever_the_loss_takes():
    brain = vars(make_objective("brain", gamma=GAMMA)(**scores()))
    ours = vars(make("GDCPlusPlus")(**scores()))
    same = {name for name in brain if torch.equal(brain[name], ours[name])}
    assert same == brain.keys() - {"loss_G", "coefficients_GN"}


def test_a_smallest_group_of_one_trains_on_single_outputs_and_never_on_none():
    known = scores()
    mask_GN = torch.tensor([[True] * 4, [False, True, False, False], [False] * 4])
    single = {name: matrix_GN[1:2, 1:2] for name, matrix_GN in known.items()}
    spoiled = {name: matrix_GN.masked_fill(~mask_GN, torch.nan) for name, matrix_GN in known.items()}
    policy_GN = spoiled.pop("policy_logprobs_GN").requires_grad_()
    with torch.autograd.set_detect_anomaly(True):  # no NaN inside the graph either
        out = make("GDCPlusPlus")(policy_GN, **spoiled, mask_GN=mask_GN)
        out.loss_G.sum().backward()
    assert torch.equal(policy_GN.grad, out.coefficients_GN)
    torch.testing.assert_close(out.coefficients_GN[1:2, 1:2], gdc_coefficients(single), **CLOSE)
    assert out.coefficients_GN[1, 1] != 0
    assert (out.coefficients_GN[~mask_GN] == 0).all() and out.loss_G[2] == 0
    assert make_objective("brain", gamma=GAMMA)(**known, mask_GN=mask_GN).loss_G[1:].tolist() == [0.0, 0.0]


class Careless(Brain):
    """Sums over masked outputs too."""

    def loss(self, inputs, weights):
        return -inputs.policy_logprobs_GN.sum(-1)


def test_masked_outputs_have_no_coefficient_even_of_a_careless_loss():
    mask_GN = torch.tensor([[True, True, False, True]] * 3)
    assert torch.equal(Careless()(**scores(), mask_GN=mask_GN).coefficients_GN, -mask_GN.double())


def test_a_loss_that_is_not_one_number_per_group_is_refused():
    class PerOutput(Brain):
        def loss(self, inputs, weights):
            return inputs.policy_logprobs_GN

    with pytest.raises(ValueError, match=r"PerOutput.loss is \[3, 4\]; it must be \[G\], here \[3\]"):
        PerOutput()(**scores())


class SteerLM(Brain):
    """SteerLM 2.0 (arXiv 2406.08673, section 4.5): BRAIn's loss by the group's mean number of tokens."""

    def loss(self, inputs, weights):
        return super().loss(inputs, weights) / inputs.mean(inputs.lengths_GN)


def test_lengths_reach_an_objective():
    known, mask_GN = scores(groups=2), torch.tensor([[True] * 4, [True, True, True, False]])
    lengths_GN = torch.tensor([[1, 2, 3, 6], [1, 3, 5, 100]])
    steered = SteerLM(gamma=GAMMA)(**known, mask_GN=mask_GN, lengths_GN=lengths_GN)
    brain = Brain(gamma=GAMMA)(**known, mask_GN=mask_GN)
    torch.testing.assert_close(steered.coefficients_GN * 3, brain.coefficients_GN, **CLOSE)


class PerPrompt(Brain):
    """Remembers the log of each prompt's last mean of alpha."""

    def __init__(self):
        super().__init__(GAMMA)
        self.log_z: dict[str, float] = {}

    def update(self, inputs, weights):
        log_z_G = inputs.mean(weights.log_alpha_GN.exp()).log()
        self.log_z |= dict(zip(inputs.prompt_ids, log_z_G.tolist(), strict=True))


def advance(objective: Objective, known: dict, **more) -> None:
    matrices = dict(known)
    objective.advance(matrices.pop("policy_logprobs_GN"), **matrices, **more)


def test_prompts_names_reach_the_state_with_their_own_groups():
    objective, known = PerPrompt(), scores(groups=4)
    mask_GN = torch.ones(4, 4, dtype=torch.bool)
    mask_GN[1, 1:] = False  # fewer outputs than brain's smallest group
    mask_GN[3, 2] = False
    advance(objective, known, mask_GN=mask_GN, prompt_ids=["a", "b", "c", "d"])
    alpha_GN, _ = alpha_and_beta(known)
    expected = {"a": alpha_GN[0].mean(), "c": alpha_GN[2].mean(), "d": alpha_GN[3, [0, 1, 3]].mean()}
    assert objective.log_z == pytest.approx({name: z.log().item() for name, z in expected.items()}, rel=1e-12)


def test_names_and_matrices_must_belong_together():
    with pytest.raises(ValueError, match="prompt_ids names 2 prompts; policy_logprobs_GN has 3 groups"):
        PerPrompt()(**scores(), prompt_ids=["a", "b"])


def test_state_is_constant_within_a_step_and_moves_with_advance():
    objective, known = make("RunningDPG"), scores()
    first_GN, _ = coefficients(objective, **known)
    alpha_GN, _ = alpha_and_beta(known)
    torch.testing.assert_close(first_GN, -alpha_GN / 4, **CLOSE)
    assert torch.equal(coefficients(objective, **known)[0], first_GN)
    assert objective.state_dict() == {"z": 1.0, "steps": 0}
    advance(objective, known)
    assert objective.state_dict() == {"z": pytest.approx((1 + alpha_GN.mean().item()) / 2, rel=1e-12), "steps": 1}
    torch.testing.assert_close(coefficients(objective, **known)[0], first_GN / objective.z, **CLOSE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_do_not_reach_the_state(name, bad):
    known = scores()
    clean, spoiled = make("RunningDPG"), make("RunningDPG")
    advance(clean, {key: matrix_GN[1:] for key, matrix_GN in known.items()})
    known[name][0, 2] = bad
    advance(spoiled, known)
    assert spoiled.state_dict() == clean.state_dict() != RunningDPG(GAMMA).state_dict()
    known[name][:] = bad
    advance(spoiled, known)
    assert spoiled.state_dict() == clean.state_dict()


def test_a_restored_objective_goes_on_as_the_one_that_was_saved():
    saved = make("RunningDPG", decay=0.7)
    for seed in range(3):
        advance(saved, scores(seed=seed))
    state = json.loads(json.dumps(saved.state_dict()))
    restored = make("RunningDPG", decay=0.7)
    restored.load_state_dict(state)
    for seed in range(3, 6):
        outputs = [vars(objective(**scores(seed=seed))) for objective in (saved, restored, make("RunningDPG"))]
        assert all(torch.equal(value, outputs[1][key]) for key, value in outputs[0].items())
        assert not torch.equal(outputs[0]["coefficients_GN"], outputs[2]["coefficients_GN"])
        for objective in (saved, restored):
            advance(objective, scores(seed=seed))
    assert restored.state_dict() == saved.state_dict() != state


def test_objectives_without_state_have_an_empty_one():
    objective = GDCPlusPlus(GAMMA)
    advance(objective, scores())
    assert objective.state_dict() == {}
    objective.load_state_dict({})


class Shaped(Brain):
    """Takes a callable."""

    def __init__(self, gamma: float, shape):
        super().__init__(gamma)
        self.shape = shape


def test_an_option_may_be_a_target_of_its_own():
    shape = {"_target_": "functools.partial", "_args_": [max, 0]}
    assert make_objective(_target_=f"{__name__}.Shaped", gamma=GAMMA, shape=shape).shape(-1) == 0
