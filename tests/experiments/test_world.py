"""The exact world: its laws, its sampling and its quantities against sums written out.

Shapes: P prompts, K all outputs.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from experiments import gradients, toy, training
from experiments.figure2.figure import frontier
from experiments.gpt import OUTPUTS
from experiments.world import Task, World, expected, kl, make_world

SETTINGS = {
    "seed": 1,
    "width": 16,
    "layers": 2,
    "heads": 2,
    "sft": {"steps": 20, "batch": 32, "rate": 0.01},
    "prompts": 2,
    "reference": 4,
}
RUN = {
    "objective": {"name": "brain", "gamma": 0.4},
    "refresh": "always",
    "n": 8,
    "draws": 16,
    "steps": 12,
    "steps_per_iteration": 4,
    "rate": 0.01,
    "seed": 0,
    "prompts": "reported",
}


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(SETTINGS)


def test_the_prior_is_one_law_over_all_outputs(world):
    prior_PK = world.reported.prior_PK
    assert prior_PK.shape == (2, len(OUTPUTS)) and len(OUTPUTS) == 2801
    # Hidden states are float32, the softmax of each position float64: every prefix's law sums to 1.
    torch.testing.assert_close(prior_PK.exp().sum(-1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-12)


def test_outputs_by_themselves_have_the_enumerated_log_probs(world):
    task, outputs_B = world.reported, torch.arange(0, 2801, 7)
    with torch.no_grad():
        alone_B = world.prior.logprobs(task.prompts_P2[1:].expand(len(outputs_B), -1), outputs_B)
    # float32 hidden states, whose sums depend on the batch's shape.
    torch.testing.assert_close(alone_B, task.prior_PK[1, outputs_B], rtol=0, atol=1e-5)


def test_draws_follow_the_law_and_those_of_fewer_outputs_are_the_first(world):
    law_PK = (3 * world.reported.prior_PK).log_softmax(-1)
    outputs_CPM = training.sample(law_PK, 2000, 16, seed=3, iteration=0)
    for p in range(2):
        counts_K = outputs_CPM[:, p].flatten().bincount(minlength=2801)
        common_K = law_PK[p].exp() > 0.0005
        assert common_K.sum() > 5
        expected_K = 32000 * law_PK[p].exp()
        # Counts of 16 and more: within 5 standard deviations.
        assert ((counts_K - expected_K).abs() < 5 * expected_K.sqrt())[common_K].all()
    assert torch.equal(training.sample(law_PK, 2000, 4, seed=3, iteration=0), outputs_CPM[..., :4])
    assert not torch.equal(training.sample(law_PK, 2000, 16, seed=3, iteration=1), outputs_CPM)


def test_the_win_rate_is_that_of_all_references():
    """Every draw of four outputs of the prior, their best by gold, against every output of the policy."""
    draws = torch.randn(2, 1, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prior_1K, policy_1K = draws.log_softmax(-1)
    gold = [0.5, 2.0, -1.0, 2.0, 0.5]
    task = Task(torch.zeros(1, 2), prior_1K, torch.zeros(1, 5), torch.tensor([gold], dtype=torch.float64), reference=4)
    p, q, wins = prior_1K[0].exp().tolist(), policy_1K[0].exp().tolist(), 0.0
    for drawn in itertools.product(range(5), repeat=4):
        best = max(gold[y] for y in drawn)
        share = sum(q[y] * ((gold[y] > best) + 0.5 * (gold[y] == best)) for y in range(5))
        wins += p[drawn[0]] * p[drawn[1]] * p[drawn[2]] * p[drawn[3]] * share
    assert task.win_rate(policy_1K).item() == pytest.approx(wins, abs=1e-12)


def test_only_the_posterior_reaches_the_bound(world):
    task, gamma = world.reported, 0.4
    target_PK = task.posterior(gamma)
    assert abs(task.slack(target_PK, [gamma])) < 1e-12
    other_PK = (target_PK + 0.1 * task.gold_PK).log_softmax(-1)
    slack_P = gamma * task.log_z(gamma) - expected(other_PK, task.rewards_PK) + gamma * kl(other_PK, task.prior_PK)
    torch.testing.assert_close(slack_P, gamma * kl(other_PK, target_PK), rtol=1e-9, atol=1e-12)
    points = [frontier(task, g) for g in (2.0, 1.0, 0.5, 0.25)]
    assert points == sorted(points), "more KL, more reward"


def test_a_run_repeats_itself_and_goes_towards_the_posterior(world):
    checkpoints, _ = training.train(world, RUN, [0.2, 0.4, 1.0])
    assert [point["step"] for point in checkpoints] == [0, 4, 8, 12]
    assert all(point["slack"] >= -training.BOUND for point in checkpoints)
    assert checkpoints[-1]["kl_posterior_policy"] < 0.95 * checkpoints[0]["kl_posterior_policy"]
    assert checkpoints[-1]["regret"] < 0.95 * checkpoints[0]["regret"]
    assert training.train(world, RUN, [0.2, 0.4, 1.0])[0] == checkpoints
    assert training.train(world, {**RUN, "seed": 1}, [0.2])[0] != checkpoints


def test_a_law_beyond_the_bound_ends_the_run(world):
    """A control of the check: log-probs that sum to more than one."""
    too_much_PK = world.reported.posterior(0.4) + 0.1
    with pytest.raises(RuntimeError, match="exceeds gamma log Z"):
        training._checkpoint(world.reported, too_much_PK, 0, 0.4, [0.4])


# Gradients.


def test_per_output_gradients_give_every_methods_moments(world):
    """DPG's and GDC++'s by groups against enumeration; GDC++ with the group's Z is BRAIn at q' = q; BRAIn's bound."""
    task = world.reported
    _, policy = training.train(world, {**RUN, "steps": 4, "rate": 0.001}, [0.4])
    with torch.no_grad():
        policy_K = policy.enumerate(task.prompts_P2[:1])[0]
    gradients_KD = gradients.output_gradients(policy, task.prompts_P2[0])
    policy.zero_grad()
    policy.logprobs(task.prompts_P2[:1], torch.tensor([1234])).sum().backward()
    alone_D = torch.cat([weight.grad.flatten() for weight in policy.parameters()])
    torch.testing.assert_close(gradients_KD[1234], alone_D, rtol=1e-4, atol=1e-5)  # float32
    assert (policy_K.exp() @ gradients_KD.double()).abs().max() < 1e-5, "the mean of a law's score is zero"

    settings = {"gamma": 5.0, "sizes": [2, 8], "pool": 512, "partitions": 4, "seed": 0}
    squares_K = gradients_KD.double().square().sum(-1)
    for law_K in (policy_K, task.prior_PK[0]):
        found = gradients.measure(task, 0, policy_K, gradients_KD, law_K, settings)
        a_K, beta_K = (task.posterior(5.0)[0] - law_K).exp(), (policy_K - law_K).exp()
        for method, weights_K in (("dpg", a_K), ("gdc++", a_K - beta_K)):
            terms_K = weights_K.square() * squares_K
            mean = law_K.exp() @ terms_K
            error = ((law_K.exp() @ (terms_K - mean).square()) / settings["pool"]).sqrt().item()
            assert error < 0.25 * found["exact"][method] or method == "gdc++", "the pool says something"
            per_output = [n * found["methods"][f"{method}, {n}"]["variance"] for n in (2, 8)]
            # Five standard errors of the pool's mean of squares; the mean's own square is a hundredth of it.
            assert per_output == pytest.approx([found["exact"][method]] * 2, abs=5 * error)
        assert 0 < found["bound"] < 1
        if law_K is policy_K:
            brain, same = (found["methods"][f"{name}, 8"] for name in ("brain", "gdc++ (group)"))
            assert brain == pytest.approx(same, rel=1e-9)


# The toy.


@pytest.mark.parametrize(
    "mu, dpg, gdc, brain, mean",
    [(0.0, 0.125, 0.5546, 0.173, -0.77), (0.5, 0.3966, 0.3539, 0.192, -0.85), (1.0, 1.5739, 1.1989, 0.173, -0.77)],
)
def test_the_toys_variances_are_the_known_ones(mu, dpg, gdc, brain, mean):
    assert toy.exact_variance("dpg", mu, 8) == pytest.approx(dpg, abs=5e-5)
    assert toy.exact_variance("gdc++", mu, 8) == pytest.approx(gdc, abs=5e-5)
    found = toy.measure(mu, 8, groups=20000, seed=1)
    # BRAIn's known value is of 400,000 draws and to three digits: 0.0005 beside our own error, 5 times that.
    assert abs(found["brain"]["variance"] - brain) < 5 * found["brain"]["variance_error"] + 0.001
    assert found["brain"]["mean"] == pytest.approx(mean, abs=5 * found["brain"]["mean_error"] + 0.005)
    for method, exact in (("dpg", dpg), ("gdc++", gdc)):
        # Weights with heavy tails: the standard error is itself an estimate.
        assert abs(found[method]["variance"] - exact) < 6 * found[method]["variance_error"]
        assert abs(found[method]["mean"] + 1) < 5 * found[method]["mean_error"]
