"""The paper's claims 1 to 6, on categorical spaces small enough to enumerate, against formulas written independently.

Shapes: G groups, N outputs per group, K elements of the space of outputs.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from nemo_brain.objectives import make_objective

GAMMA = 0.7


def problem(elements: int, seed: int) -> dict[str, torch.Tensor]:
    """Random log p, log q' (full support) and rewards over K outputs, float64 [K]."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(3, elements, generator=generator, dtype=torch.float64)
    return {"prior": draws[0].log_softmax(-1), "proposal": draws[1].log_softmax(-1), "rewards": draws[2]}


def posterior(prior_K: torch.Tensor, rewards_K: torch.Tensor) -> torch.Tensor:
    """log p(y | x, G=1) under Bradley-Terry goodness, normalised over the whole space."""
    return (prior_K + rewards_K / GAMMA).log_softmax(-1)


def all_groups(elements: int, n: int) -> torch.Tensor:
    """Every (y_1, ..., y_n) as a group: [K^n, n]."""
    return torch.tensor(list(itertools.product(range(elements), repeat=n)))


def brain_on(groups_GN: torch.Tensor, policy_K: torch.Tensor, prior, proposal, rewards, gamma: float = GAMMA):
    return make_objective("brain", gamma=gamma)(
        policy_K[groups_GN],
        prior_logprobs_GN=prior[groups_GN],
        proposal_logprobs_GN=proposal[groups_GN],
        rewards_GN=rewards[groups_GN],
    )


def expected_divergence(theta: list[float], prior, proposal, rewards, n: int) -> float:
    """E over (y_1..y_n) ~ q' of KL(alpha_hat || beta_hat), by loops over plain probabilities."""
    total = sum(math.exp(t) for t in theta)
    q = [math.exp(t) / total for t in theta]
    p, q0, r = prior.exp().tolist(), proposal.exp().tolist(), rewards.tolist()
    value = 0.0
    for ys in itertools.product(range(len(q)), repeat=n):
        alpha = [p[y] * math.exp(r[y] / GAMMA) / q0[y] for y in ys]
        beta = [q[y] / q0[y] for y in ys]
        kl = sum(a / sum(alpha) * math.log(a / sum(alpha) / (b / sum(beta))) for a, b in zip(alpha, beta, strict=True))
        value += math.prod(q0[y] for y in ys) * kl
    return value


@pytest.mark.parametrize("n", [2, 3])
def test_claim_1_the_estimate_is_unbiased(n):
    elements = 4
    known = problem(elements, seed=1)
    theta_K = torch.randn(elements, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    groups_GN = all_groups(elements, n)
    probabilities_G = known["proposal"][groups_GN].sum(-1).exp()
    policy_K = theta_K.log_softmax(-1)
    out = brain_on(groups_GN, policy_K, **known)

    # The paper's estimate, from the weights: - sum_i (alpha_hat_i - beta_hat_i) grad log q(y_i), averaged over groups.
    score_KK = torch.eye(elements, dtype=torch.float64) - policy_K.detach().exp()  # d log q(y) / d theta
    estimates_GK = -((out.alpha_GN - out.beta_GN)[..., None] * score_KK[groups_GN]).sum(1)
    mean_estimate_K = probabilities_G @ estimates_GK
    (mean_loss_gradient_K,) = torch.autograd.grad(probabilities_G @ out.loss_G, theta_K)

    step, theta = 1e-5, theta_K.tolist()
    differences = []
    for k in range(elements):
        up, down = ([t + s * (j == k) for j, t in enumerate(theta)] for s in (step, -step))
        high, low = (expected_divergence(t, **known, n=n) for t in (up, down))
        differences.append((high - low) / (2 * step))
    expected_K = torch.tensor(differences, dtype=torch.float64)
    # Central differences: step^2 of truncation and 1e-16 / step of rounding, 1e-10 and 1e-11.
    torch.testing.assert_close(mean_estimate_K, expected_K, rtol=0, atol=1e-9)
    torch.testing.assert_close(mean_loss_gradient_K, expected_K, rtol=0, atol=1e-9)
    assert expected_K.abs().max() > 1e-2
    assert (probabilities_G @ out.loss_G).item() == pytest.approx(expected_divergence(theta, **known, n=n), abs=1e-13)


def test_claim_2_zero_if_the_policy_is_the_posterior():
    for seed in range(20):
        known = problem(5, seed)
        out = brain_on(all_groups(5, 2), posterior(known["prior"], known["rewards"]), **known)
        # KL is quadratic in the weights' rounding, so what is left is the sum's: a few 1e-16.
        assert out.loss_G.max() < 1e-14
        assert out.zero_gradient_G.all()


def test_claim_2_positive_otherwise_and_its_minimum_is_the_posterior():
    known = problem(5, seed=3)
    groups_GN = all_groups(5, 2)
    probabilities_G = known["proposal"][groups_GN].sum(-1).exp()
    target_K = posterior(known["prior"], known["rewards"])
    # The smallest departure: one output's log-prob off by 1e-3. The divergence is quadratic in it.
    for k in range(5):
        policy_K = (target_K + 1e-3 * torch.eye(5, dtype=torch.float64)[k]).log_softmax(-1)
        assert probabilities_G @ brain_on(groups_GN, policy_K, **known).loss_G > 1e-9

    theta_K = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [theta_K], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = probabilities_G @ brain_on(groups_GN, theta_K.log_softmax(-1), **known).loss_G
        loss.backward()
        return loss

    assert closure() > 1e-2
    optimizer.step(closure)
    # The optimizer stops at gradients of 1e-12 or at the divergence's rounding, 1e-16: its root is 1e-8 in log-probs.
    torch.testing.assert_close(theta_K.log_softmax(-1).detach(), target_K, rtol=0, atol=1e-6)


@pytest.mark.parametrize("b", [0.05, 0.1, 1.0, 5.0])
def test_claim_3_dpo_value_and_gradient(b):
    generator = torch.Generator().manual_seed(4)
    policy_GN, prior_GN, rewards_GN = (
        20 * torch.randn(3, 16, 2, generator=generator, dtype=torch.float64) * torch.tensor([1, 1, 0.1])[:, None, None]
    )
    policy_GN.requires_grad_()
    out = make_objective("dpo_sft", beta=b)(
        policy_GN, prior_logprobs_GN=prior_GN, proposal_logprobs_GN=prior_GN, rewards_GN=rewards_GN
    )
    winner_G1 = rewards_GN.argmax(-1, keepdim=True)
    gap_GN = policy_GN - prior_GN
    margin_G = (gap_GN.gather(1, winner_G1) - gap_GN.gather(1, 1 - winner_G1)).squeeze(1)
    dpo_G = -F.logsigmoid(b * margin_G)
    torch.testing.assert_close(out.loss_G, dpo_G, rtol=1e-12, atol=1e-12)
    (gradient_GN,) = torch.autograd.grad(out.loss_G.sum(), policy_GN)
    (dpo_gradient_GN,) = torch.autograd.grad(dpo_G.sum(), policy_GN)
    torch.testing.assert_close(gradient_GN, dpo_gradient_GN, rtol=1e-12, atol=1e-12)


def test_claim_3_brain_of_small_gamma_is_dpo_sft():
    known = problem(6, seed=9)
    known["proposal"] = known["prior"]
    groups_GN = torch.combinations(torch.arange(6))
    policy_K = torch.linspace(-4, -1, 6, dtype=torch.float64, requires_grad=True)
    brain = brain_on(groups_GN, policy_K, **known, gamma=1e-3)
    dpo = make_objective("dpo_sft", beta=1.0)(
        policy_K[groups_GN],
        prior_logprobs_GN=known["prior"][groups_GN],
        proposal_logprobs_GN=known["prior"][groups_GN],
        rewards_GN=known["rewards"][groups_GN],
    )
    # No two rewards of this problem are closer than 0.13, so alpha_hat is one-hot up to exp(-130).
    torch.testing.assert_close(brain.loss_G, dpo.loss_G, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(brain.coefficients_GN, dpo.coefficients_GN, rtol=1e-12, atol=1e-12)


def test_claim_4_the_posterior_is_ppos_optimal_policy():
    known = problem(6, seed=6)
    logits_K = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits_K], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        policy_K = logits_K.log_softmax(-1)
        reward_less_kl = policy_K.exp() @ (known["rewards"] - GAMMA * (policy_K - known["prior"]))
        (-reward_less_kl).backward()
        return -reward_less_kl

    optimizer.step(closure)
    # Every output once, from a uniform proposal: alpha_hat is the whole posterior.
    known["proposal"] = torch.full((6,), -math.log(6), dtype=torch.float64)
    out = brain_on(torch.arange(6)[None], logits_K.log_softmax(-1), **known)
    # As above: the optimizer's objective is flat to 1e-16 within 1e-8 of its maximum.
    torch.testing.assert_close(out.alpha_GN[0], logits_K.detach().softmax(-1), rtol=0, atol=1e-7)


@pytest.mark.parametrize("where", ["proposal", "prior", "policy"])
def test_claim_5_only_the_proposals_errors_cancel_at_the_optimum(where):
    known = problem(6, seed=7)
    known["policy"] = posterior(known["prior"], known["rewards"])
    groups_GN = all_groups(6, 3)
    error_K = torch.randn(6, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    known[where] = known[where] + error_K
    coefficients_GN = brain_on(groups_GN, known.pop("policy"), **known).coefficients_GN
    if where == "proposal":
        assert coefficients_GN.abs().max() < 1e-14
    else:  # the weights move by w (1 - w) times the errors' differences, which are of order 1
        assert coefficients_GN.abs().max() > 0.1


@pytest.mark.parametrize("shifted", ["policy_logprobs_GN", "prior_logprobs_GN", "proposal_logprobs_GN", "rewards_GN"])
@pytest.mark.parametrize("name, options", [("brain", {"gamma": GAMMA}), ("dpo_sft", {"beta": 0.3})])
def test_claim_6_constants_within_a_group_change_nothing(name, options, shifted):
    generator = torch.Generator().manual_seed(9)
    names = ("policy_logprobs_GN", "prior_logprobs_GN", "proposal_logprobs_GN", "rewards_GN")
    matrices = dict(zip(names, torch.randn(4, 5, 4, generator=generator, dtype=torch.float64), strict=True))
    constants_G1 = torch.tensor([[-300.0], [-1.0], [0.0], [2.0], [70.0]], dtype=torch.float64)
    objective = make_objective(name, **options)
    before = objective(**matrices)
    after = objective(**{**matrices, shifted: matrices[shifted] + constants_G1})
    for field in ("loss_G", "coefficients_GN", "alpha_GN", "beta_GN"):
        # 300 + a number of order 1 is rounded at 3e-14, divided by gamma.
        torch.testing.assert_close(getattr(after, field), getattr(before, field), rtol=1e-12, atol=2e-13)


def test_claim_1_the_estimate_is_biased_for_the_kl_of_the_posterior_and_less_so_with_more_outputs():
    """With n, the expected divergence and its gradient approach KL(posterior, policy) and its gradient."""
    known = problem(4, seed=1)
    target_K = posterior(known["prior"], known["rewards"])
    theta_K = 2 * torch.randn(4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    kl = target_K.exp() @ (target_K - theta_K.log_softmax(-1))
    kl_gradient_K = theta_K.softmax(-1) - target_K.exp()
    theta_K.requires_grad_()
    values, errors = [], []
    for n in range(1, 8):
        groups_GN = all_groups(4, n)
        probabilities_G = known["proposal"][groups_GN].sum(-1).exp()
        value = probabilities_G @ brain_on(groups_GN, theta_K.log_softmax(-1), **known).loss_G
        (gradient_K,) = torch.autograd.grad(value, theta_K)
        values.append(value.item())
        errors.append(((gradient_K - kl_gradient_K).norm() / kl_gradient_K.norm()).item())
    assert values[0] == 0.0 and values == sorted(values) and values[-1] < kl
    assert errors == sorted(errors, reverse=True)
    assert values[1] < 0.6 * kl and values[-1] > 0.8 * kl
    assert errors[0] == 1.0 and errors[1] > 0.3 > errors[-1] > 0.01


def test_claim_2_needs_two_outputs():
    """With n = 1 both weights are 1: the divergence is zero for every policy."""
    known = problem(5, seed=3)
    policy_K = torch.randn(5, generator=torch.Generator().manual_seed(4), dtype=torch.float64).log_softmax(-1)
    assert (policy_K - posterior(known["prior"], known["rewards"])).abs().max() > 0.5
    out = brain_on(all_groups(5, 1), policy_K, **known)
    assert out.loss_G.eq(0).all() and out.coefficients_GN.eq(0).all()


def test_claim_2_needs_a_proposal_with_support():
    """Of an output that the proposal never gives nothing is learnt: another policy has divergence zero too."""
    known = problem(5, seed=3)
    target_K = posterior(known["prior"], known["rewards"])
    groups_GN = all_groups(4, 3)  # the fifth output never comes
    policy_K = (target_K + 3 * torch.eye(5, dtype=torch.float64)[4]).log_softmax(-1)
    assert (policy_K.exp() - target_K.exp()).abs().sum() > 0.3
    assert brain_on(groups_GN, policy_K, **known).loss_G.max() < 1e-14  # rounding, squared
