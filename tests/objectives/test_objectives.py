"""Objectives: gradients, masks, ties, diagnostics, extreme log-probs and the registry.

Shapes: G groups, N outputs per group.
"""

import math
from collections.abc import Callable

import pytest
import torch

from nemo_brain.objectives import GOODNESS, OBJECTIVES, Brain, coefficients, make_objective, register

EVERY = [
    ("brain", {"gamma": 0.5}),
    ("brain", {"gamma": 0.5, "goodness": "sigmoid", "goodness_center": 0.3}),
    ("brain", {"gamma": 4.0, "goodness": "beta"}),
    ("dpo_sft", {"beta": 0.2}),
    ("dpg", {"gamma": 0.5}),
    ("dpg", {"gamma": 0.5, "z": "prompt"}),
    ("gdc++", {"gamma": 0.5}),
    ("gdc++", {"gamma": 0.5, "z": "prompt"}),
    ("snis", {"gamma": 0.5}),
    *(("f_brain", {"gamma": 0.5, "divergence": divergence}) for divergence in ("kl", "reverse_kl", "js", "tv")),
    *((name, {"beta": 0.2, "pairs": pairs}) for name in ("dpo", "ipo", "hinge") for pairs in ("best_worst", "all")),
    ("slic", {"delta": 5.0}),
    ("slic", {"delta": 2.0, "regulariser": 0.1, "pairs": "all"}),
    *(("rpo", {"beta": 0.2, "eta": 2.0, "variant": variant}) for variant in ("bwd_kl", "fwd_kl", "sq")),
    ("infonca", {"tau": 0.5, "beta": 0.2}),
    ("nca", {"tau": 0.5, "beta": 0.2}),
    ("rloo", {"gamma": 0.5}),
    ("rloo", {"gamma": 0.5, "clip": 0.0}),
    ("log_variance", {"gamma": 0.5}),
    ("rebel", {"eta": 2.0}),
    ("steerlm2", {"gamma": 0.5}),
]
# Of losses that are bounded where log-probs are far apart: at least so much there.
BOUNDED = {"js": 0.5, "tv": 0.5, "fwd_kl": 1.0}
every_objective = pytest.mark.parametrize("name, options", EVERY)


def made(name: str, options: dict) -> Callable:
    """The objective, told of lengths and prompts."""
    objective = make_objective(name, **options)

    def told(policy_logprobs_GN: torch.Tensor, **known: torch.Tensor):
        ids = [f"prompt-{g}" for g in range(len(policy_logprobs_GN))]
        lengths_GN = torch.full_like(policy_logprobs_GN, 5.0)
        return objective(policy_logprobs_GN, **known, lengths_GN=lengths_GN, prompt_ids=ids)

    return told


def scores(groups: int = 6, n: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Log-probs of a few dozen nats that differ by a few, and rewards of order 1."""
    names = ("policy_logprobs_GN", "prior_logprobs_GN", "proposal_logprobs_GN", "rewards_GN")
    draws = torch.randn(4, groups, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    draws[:3] -= 40
    return dict(zip(names, draws.to(dtype), strict=True))


def gradient(objective: Callable, matrices: dict) -> torch.Tensor:
    """d(sum of loss_G) / d log q by backward, as the trainer's one-pass route takes it."""
    policy_GN = matrices["policy_logprobs_GN"].clone().requires_grad_()
    objective(**{**matrices, "policy_logprobs_GN": policy_GN}).loss_G.sum().backward()
    return policy_GN.grad


def test_brain_weights_loss_and_gradient_are_the_papers():
    known = scores()
    q, p, q0, r = known.values()
    alpha = p.exp() * torch.exp(r / 0.5) / q0.exp()
    beta = q.exp() / q0.exp()
    alpha, beta = alpha / alpha.sum(-1, keepdim=True), beta / beta.sum(-1, keepdim=True)
    objective = make_objective("brain", gamma=0.5)
    out = objective(**known)
    # The formulas above lose a few float64 roundings of numbers of 40 nats: 1e-14 each.
    close = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(out.alpha_GN, alpha, **close)
    torch.testing.assert_close(out.beta_GN, beta, **close)
    torch.testing.assert_close(out.loss_G, (alpha * (alpha / beta).log()).sum(-1), **close)
    torch.testing.assert_close(gradient(objective, known), beta - alpha, **close)


def test_sigmoid_goodness_is_the_posterior_of_a_calibrated_probability():
    known = scores()
    objective = make_objective("brain", gamma=0.5, goodness="sigmoid", goodness_center=0.3)
    good_GN = 1 / (1 + torch.exp(-(known["rewards_GN"] - 0.3) / 0.5))
    alpha_GN = torch.exp(known["prior_logprobs_GN"] - known["proposal_logprobs_GN"]) * good_GN
    alpha_GN /= alpha_GN.sum(-1, keepdim=True)
    torch.testing.assert_close(objective(**known).alpha_GN, alpha_GN, rtol=1e-12, atol=1e-13)


def test_sigmoid_goodness_of_extreme_rewards():
    known = {name: torch.zeros(2, 3) for name in scores()}
    known["rewards_GN"] = torch.tensor([[-1e4, 2e3, 1e4], [-1e4, -2e3, -2e3]])
    out = make_objective("brain", gamma=1.0, goodness="sigmoid")(**known)
    # Group 0: two outputs are surely good, where Bradley-Terry would have taken the last one alone. Group 1: all are
    # surely bad, with probabilities that underflow, but not their ratios.
    assert out.alpha_GN.tolist() == [[0.0, 0.5, 0.5], [0.0, 0.5, 0.5]]


@every_objective
def test_gradcheck(name, options):
    known = scores(groups=3, n=4)
    known["mask_GN"] = torch.tensor([[True] * 4, [True, False, True, True], [False, True, False, False]])
    policy_GN = known.pop("policy_logprobs_GN").requires_grad_()
    objective = made(name, options)
    assert torch.autograd.gradcheck(lambda q: objective(q, **known).loss_G, policy_GN)


@every_objective
def test_coefficients_are_the_loss_gradient_with_gradients_off_too(name, options):
    objective = made(name, options)
    for dtype in (torch.float32, torch.float64):
        known = scores(dtype=dtype)
        expected_GN = gradient(objective, known)
        assert expected_GN.dtype == dtype and expected_GN.abs().max() > 0.01
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with context():
                # Made inside the context, so that inference mode hands over inference tensors.
                inside = {key: value.clone() for key, value in known.items()}
                inside["mask_GN"] = torch.ones_like(inside["rewards_GN"], dtype=torch.bool)
                c_GN, out = coefficients(objective, inside.pop("policy_logprobs_GN"), **inside)
            assert torch.equal(c_GN, expected_GN) and c_GN.dtype == dtype
            assert not c_GN.requires_grad and not out.loss_G.requires_grad


@every_objective
def test_only_the_policy_receives_a_gradient(name, options):
    known = {key: value.requires_grad_() for key, value in scores().items()}
    out = made(name, options)(**known)
    out.loss_G.sum().backward()
    assert torch.equal(known.pop("policy_logprobs_GN").grad, out.coefficients_GN)
    assert all(matrix.grad is None for matrix in known.values())
    attached = {key for key, value in vars(out).items() if value.requires_grad}
    assert attached == {"loss_G"}


class Sharper(Brain):
    """A target made from the policy itself."""

    def log_alpha(self, inputs):
        return 2 * inputs.policy_logprobs_GN


def test_a_target_is_constant_even_if_it_is_made_from_the_policy():
    objective = Sharper(gamma=1.0)
    out = objective(**scores())
    torch.testing.assert_close(gradient(objective, scores()), out.beta_GN - out.alpha_GN, rtol=1e-12, atol=1e-13)


@every_objective
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), float("-inf"), 1e300])
def test_masked_outputs_leave_the_group(name, options, garbage):
    """A mask gives what the group without these outputs gives, whatever the masked entries hold."""
    objective = made(name, options)
    known = scores(groups=4, n=5)
    left = [0, 2, 3]
    expected = objective(**{key: value[:, left] for key, value in known.items()})
    mask_GN = torch.zeros(4, 5, dtype=torch.bool)
    mask_GN[:, left] = True
    known = {key: value.masked_fill(~mask_GN, garbage) for key, value in known.items()}
    out = objective(**known, mask_GN=mask_GN)
    for field, value in vars(out).items():
        value = value[:, left] if field.endswith("_GN") else value
        # The same numbers in sums of other lengths: the order of additions differs, by 1e-16.
        torch.testing.assert_close(value, getattr(expected, field), rtol=1e-13, atol=1e-15)
    gradient_GN = gradient(objective, {**known, "mask_GN": mask_GN})
    for matrix_GN in (gradient_GN, out.coefficients_GN, out.alpha_GN, out.beta_GN):
        assert (matrix_GN[~mask_GN] == 0).all()
        assert matrix_GN.isfinite().all() and (matrix_GN[mask_GN] != 0).any()


class Pull(Brain):
    """Pulls every output's log-prob up: a loss that does not vanish by itself where one output is left."""

    def loss(self, inputs, weights):
        return -inputs.policy_logprobs_GN.sum(-1)


@pytest.mark.parametrize(
    "objective",
    [*(made(name, options) for name, options in EVERY if OBJECTIVES[name].smallest_group == 2), Pull(gamma=1.0)],
)
def test_groups_of_fewer_than_two_outputs_contribute_nothing(objective):
    known = scores(groups=3, n=4)
    mask_GN = torch.tensor([[True, True, False, True], [False, True, False, False], [False] * 4])
    known = {key: value.masked_fill(~mask_GN, float("nan")) for key, value in known.items()} | {"mask_GN": mask_GN}
    with torch.autograd.set_detect_anomaly(True):  # no NaN inside the graph either
        out = objective(**known)
        gradient_GN = gradient(objective, known)
    assert out.loss_G[0] != 0 and (out.loss_G[1:] == 0).all()
    assert gradient_GN[0].abs().max() > 0 and (gradient_GN[1:] == 0).all()
    assert out.zero_gradient_G.tolist() == [False, True, True]
    # One output has all the weight; a group without outputs has none.
    for ess_G in (out.ess_alpha_G, out.ess_beta_G):
        assert ess_G[1:].tolist() == [1.0, 0.0]
    assert out.max_alpha_G[1:].tolist() == [1.0, 0.0]
    assert out.kl_G[1:].tolist() == [0.0, 0.0]


def test_equal_weights_give_no_gradient_and_are_counted():
    known = scores(groups=3, n=4, dtype=torch.float32)
    # Group 0: q = p = q' and one reward, as in a first step; group 1: q at the posterior; group 2: neither.
    known["policy_logprobs_GN"][0] = known["proposal_logprobs_GN"][0] = known["prior_logprobs_GN"][0]
    known["rewards_GN"][0] = 1 / 3
    known["rewards_GN"][1] = torch.tensor([0.0, 0.5, 1.0, -2.0])
    known["prior_logprobs_GN"][1] = -40
    known["policy_logprobs_GN"][1] = torch.tensor([-40.0, -39.0, -38.0, -44.0])  # log p + r / gamma
    objective = make_objective("brain", gamma=0.5)
    out = objective(**known)
    assert out.zero_gradient_G.tolist() == [True, True, False]
    assert gradient(objective, known)[:2].abs().max() < 1e-14 and out.loss_G[:2].max() < 1e-14
    assert (out.loss_G >= 0).all()


def test_rounding_neither_makes_the_loss_negative_nor_cuts_its_gradient():
    """alpha_hat and beta_hat apart by 1e-9: the KL is 1e-18, below the rounding of its sum; the gradient is 1e-9."""
    known = scores(groups=2000, n=4)
    known["prior_logprobs_GN"] = known["policy_logprobs_GN"] + 1e-9 * known["rewards_GN"]
    objective = make_objective("brain", gamma=1e12)
    out = objective(**known)
    assert (out.loss_G >= 0).all() and (out.kl_G >= 0).all()
    torch.testing.assert_close(gradient(objective, known), out.beta_GN - out.alpha_GN, rtol=0, atol=1e-15)


def test_diagnostics():
    weights_GN = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.25, 0.125, 0.125]], dtype=torch.float64)
    zero_GN = torch.zeros(2, 4, dtype=torch.float64)
    out = make_objective("brain", gamma=1.0)(
        weights_GN.flip(0).log() + 3,
        prior_logprobs_GN=zero_GN,
        proposal_logprobs_GN=zero_GN,
        rewards_GN=weights_GN.log(),
    )
    skewed = 1 / (0.25 + 0.0625 + 2 * 0.015625)
    expected = {
        "ess_alpha_G": [4.0, skewed],
        "ess_beta_G": [skewed, 4.0],
        "max_alpha_G": [0.25, 0.5],
        "kl_G": [math.log(2) / 4, math.log(2) / 4],  # (-1 + 0 + 1 + 1) / 4 and 1 / 2 + 0 - 1 / 8 - 1 / 8, times log 2
    }
    for field, values in expected.items():
        torch.testing.assert_close(
            getattr(out, field), torch.tensor(values, dtype=torch.float64), rtol=1e-14, atol=1e-15
        )
    assert torch.equal(out.kl_G, out.loss_G)


@every_objective
def test_log_probs_of_ten_thousand_nats(name, options):
    known = scores(groups=8, n=4, dtype=torch.float32)
    for key in ("policy_logprobs_GN", "prior_logprobs_GN", "proposal_logprobs_GN"):
        known[key] = -1e4 + 300 * (known[key] + 40)  # apart by hundreds of nats: weights underflow
    out = made(name, options)(**known)
    for value in vars(out).values():
        assert value.isfinite().all()
    one_G = torch.ones(8, dtype=torch.float64)
    torch.testing.assert_close(out.alpha_GN.sum(-1), one_G)
    torch.testing.assert_close(out.beta_GN.sum(-1), one_G)
    assert out.loss_G.max() > BOUNDED.get(options.get("divergence", options.get("variant")), 10)


def test_dpo_sft_of_more_than_two_outputs():
    known = scores()
    out = make_objective("dpo_sft", beta=0.2)(**known)
    gap_GN = known["policy_logprobs_GN"] - known["prior_logprobs_GN"]
    expected_G = torch.nn.functional.cross_entropy(0.2 * gap_GN, known["rewards_GN"].argmax(-1), reduction="none")
    torch.testing.assert_close(out.loss_G, expected_G, rtol=1e-12, atol=1e-13)


def test_dpo_sft_ties_share_the_target():
    known = scores(groups=2, n=3)
    known["rewards_GN"] = torch.tensor([[1.0, 1.0, 0.0], [-2.0, -2.0, -1.0]])
    mask_GN = torch.tensor([[True, True, True], [True, True, False]])
    objective = make_objective("dpo_sft", beta=0.2)
    out = objective(**known, mask_GN=mask_GN)
    assert out.alpha_GN.tolist() == [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]
    flipped = objective(**{key: value.flip(-1) for key, value in known.items()}, mask_GN=mask_GN.flip(-1))
    torch.testing.assert_close(flipped.coefficients_GN.flip(-1), out.coefficients_GN, rtol=0, atol=1e-15)
    # A pair of equal rewards has its minimum at the prior: there its gradient is zero, and counted.
    known["policy_logprobs_GN"] = known["prior_logprobs_GN"]
    assert objective(**known, mask_GN=mask_GN).zero_gradient_G.tolist() == [False, True]


def test_dpo_sft_ignores_the_proposal():
    known = scores()
    before = make_objective("dpo_sft", beta=0.2)(**known)
    known["proposal_logprobs_GN"] = torch.full_like(known["rewards_GN"], float("nan"))
    assert torch.equal(make_objective("dpo_sft", beta=0.2)(**known).coefficients_GN, before.coefficients_GN)


def test_a_nan_that_counts_is_not_hidden():
    for key in scores():
        known = scores()
        known[key][1, 2] = float("nan")
        loss_G = make_objective("brain", gamma=1.0)(**known).loss_G
        assert loss_G.isnan().tolist() == [False, True, False, False, False, False]


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("brian", {}, "unknown objective.name 'brian'; known: brain, dpg, dpo, dpo_sft, f_brain,"),
        ("brain", {"gama": 1.0}, "objective.gama; options of objective 'brain': gamma, goodness, goodness_center"),
        ("brain", {"gamma": 0.0}, "objective.gamma is 0.0; it must be a positive number"),
        ("brain", {"gamma": float("nan")}, "objective.gamma is nan; it must be a positive number"),
        ("brain", {"gamma": math.inf}, "objective.gamma is inf; it must be a positive number"),
        ("brain", {"gamma": "high"}, "objective.gamma is 'high'; it must be a positive number"),
        ("brain", {"goodness_center": math.nan}, "objective.goodness_center is nan; it must be a finite number"),
        ("brain", {"gamma": 1.0, "goodness": "elo"}, "objective.goodness 'elo'; known: beta, bradley_terry, sigmoid"),
        ("dpo_sft", {"gamma": 1.0}, "objective.gamma; options of objective 'dpo_sft': beta"),
        ("dpo_sft", {"gamma": 0.1, "beta": 1.0}, "objective.gamma; options of objective 'dpo_sft': beta. One that is"),
        ("dpo_sft", {}, "objective.beta is required; options of objective 'dpo_sft': beta"),
        ("dpo_sft", {"beta": -1.0}, "objective.beta is -1.0; it must be a positive number"),
        ("brain", {"_target_": "plug_ins.GDCPlusPlus"}, "objective.name=brain and objective._target_=plug_ins.GDCPlus"),
        (
            None,
            {},
            "rloo, rpo, slic, snis, steerlm2, or objective._target_ to a class of your own",
        ),
        (None, {"_target_": "plug_ins.GDC"}, "objective._target_=plug_ins.GDC cannot be imported"),
        (None, {"_target_": "no_such.Module"}, "objective._target_=no_such.Module cannot be imported"),
        (None, {"_target_": "torch.nn.Linear"}, "torch.nn.Linear is no subclass of nemo_brain.objectives.Objective"),
        (None, {"_target_": "plug_ins.RunningDPG"}, "objective.gamma is required; options of objective._target_=plug_"),
        (
            None,
            {"_target_": "plug_ins.GDCPlusPlus", "beta": 1},
            "objective.beta; options of objective._target_=plug_ins",
        ),
        (
            None,
            {"_target_": "plug_ins.GDCPlusPlus", "gamma": -1},
            "cannot be made: objective.gamma is -1; it must be a",
        ),
    ],
)
def test_wrong_options_name_the_remedy(name, options, message):
    with pytest.raises(ValueError) as error:
        make_objective(name, **options)
    assert message in str(error.value)


def test_matrices_of_different_shapes_are_refused():
    for key in ("prior_logprobs_GN", "proposal_logprobs_GN", "rewards_GN", "mask_GN"):
        with pytest.raises(ValueError, match=rf"{key} is \[6, 4\]; policy_logprobs_GN is \[6, 5\]"):
            make_objective("brain", gamma=1.0)(**{**scores(), key: torch.ones(6, 4)})
    with pytest.raises(ValueError, match="to be \\[G, N\\]"):
        make_objective("brain", gamma=1.0)(**{key: value[0] for key, value in scores().items()})


def test_plug_ins_register_objectives_and_goodness_models():
    try:
        register("pull")(Pull)
        register("steep", GOODNESS)(lambda scaled_rewards_GN: 2 * scaled_rewards_GN)
        assert isinstance(make_objective("pull", gamma=1.0), Pull)
        steep = make_objective("brain", gamma=1.0, goodness="steep")(**scores())
        torch.testing.assert_close(steep.alpha_GN, make_objective("brain", gamma=0.5)(**scores()).alpha_GN)
        with pytest.raises(ValueError, match="'pull' is already registered"):
            register("pull")(Pull)
    finally:
        OBJECTIVES.pop("pull", None)
        GOODNESS.pop("steep", None)
