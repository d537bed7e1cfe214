"""The other methods of the family: values and gradients against formulas written by hand, what they share with BRAIn,
where they end.

Shapes: G groups, N outputs per group, K elements of the space of outputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from scipy import stats

from nemo_brain.objectives import make_objective, target_divergences
from nemo_brain.objectives.goodness import GOODNESS

NAMES = ("policy_logprobs_GN", "prior_logprobs_GN", "proposal_logprobs_GN", "rewards_GN")
CLOSE = {"rtol": 1e-11, "atol": 1e-12}  # roundings of float64 log-probs of 40 nats
GAMMA, B, ETA, TAU = 0.5, 0.2, 1.5, 0.4


def scores(groups: int = 5, n: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    draws = torch.randn(4, groups, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    draws[:3] -= 40
    return dict(zip(NAMES, draws, strict=True))


def softmax(values: Sequence[float]) -> list[float]:
    weights = [math.exp(value - max(values)) for value in values]
    return [weight / sum(weights) for weight in weights]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


class Group:
    """A group in plain numbers: q, p, q0 (log-probs), r, and what the formulas are written with."""

    def __init__(self, q, p, q0, r):
        self.q, self.r, self.n = q, r, len(q)
        self.s = [a - b for a, b in zip(q, p, strict=True)]
        self.w = [a - b for a, b in zip(q, q0, strict=True)]
        self.log_alpha = [b + reward / GAMMA - c for b, c, reward in zip(p, q0, r, strict=True)]
        self.alpha, self.beta = softmax(self.log_alpha), softmax(self.w)
        self.a = [math.exp(value) for value in self.log_alpha]
        self.a = [value / (sum(self.a) / self.n) for value in self.a]
        self.ratio = [math.exp(value) for value in self.w]
        self.rank = sorted(range(self.n), key=lambda i: -r[i])
        self.label = softmax([reward / TAU for reward in r])

    def pairs(self) -> list[tuple[int, int]]:
        return [(i, j) for i in range(self.n) for j in range(self.n) if self.r[i] > self.r[j]]

    def mean(self, values) -> float:
        return sum(values) / self.n


def dpg(g):
    return -g.mean(a * q for a, q in zip(g.a, g.q, strict=True)), [-a / g.n for a in g.a]


def gdc_plus_plus(g):
    loss = g.mean(a * math.log(a / b) - a + b for a, b in zip(g.a, g.ratio, strict=True))
    return loss, [-(a - b) / g.n for a, b in zip(g.a, g.ratio, strict=True)]


def snis(g):
    return -sum(a * q for a, q in zip(g.alpha, g.q, strict=True)), [-a for a in g.alpha]


def f_brain(f: Callable, slope: Callable):
    def formula(g):
        t = [b / a for a, b in zip(g.alpha, g.beta, strict=True)]
        mean = sum(b * slope(x) for b, x in zip(g.beta, t, strict=True))
        return (
            sum(a * f(x) for a, x in zip(g.alpha, t, strict=True)),
            [b * (slope(x) - mean) for b, x in zip(g.beta, t, strict=True)],
        )

    return formula


def pairwise(f: Callable, slope: Callable, every: bool, values: str = "s"):
    """The mean over pairs of f of the difference."""

    def formula(g):
        pairs = g.pairs() if every else [(g.rank[0], g.rank[-1])]
        x = getattr(g, values)
        c = [0.0] * g.n
        for i, j in pairs:
            c[i] += slope(x[i] - x[j]) / len(pairs)
            c[j] -= slope(x[i] - x[j]) / len(pairs)
        return sum(f(x[i] - x[j]) for i, j in pairs) / len(pairs), c

    return formula


def slic(g):
    loss, c = pairwise(lambda d: max(0, 5 - d), lambda d: -float(d < 5), False, "q")(g)
    c[g.rank[0]] -= 0.3
    return loss - 0.3 * g.q[g.rank[0]], c


def rpo(distance: Callable, slope: Callable):
    def formula(g):
        pairs = [(i, j) for i in range(g.n) for j in range(i)]
        c, loss = [0.0] * g.n, 0.0
        for i, j in pairs:
            wanted, margin = ETA * (g.r[i] - g.r[j]), B * (g.s[i] - g.s[j])
            loss += distance(wanted, margin) / len(pairs)
            c[i] += B * slope(wanted, margin) / len(pairs)
            c[j] -= B * slope(wanted, margin) / len(pairs)
        return loss, c

    return formula


def bernoulli_kl(x: float, y: float) -> float:
    p, q = sigmoid(x), sigmoid(y)
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def infonca(g):
    found = softmax([B * s for s in g.s])
    loss = -sum(label * math.log(f) for label, f in zip(g.label, found, strict=True))
    return loss, [-B * (label - f) for label, f in zip(g.label, found, strict=True)]


def nca(g):
    loss = -sum(label * math.log(sigmoid(B * s)) for label, s in zip(g.label, g.s, strict=True))
    loss -= g.mean(math.log(sigmoid(-B * s)) for s in g.s)
    c = [-B * (label * sigmoid(-B * s) - sigmoid(B * s) / g.n) for label, s in zip(g.label, g.s, strict=True)]
    return loss, c


def rloo(clip: float):
    def formula(g):
        returns = [GAMMA * value for value in g.log_alpha]
        advantage = [x - (sum(returns) - x) / (g.n - 1) for x in returns]
        loss, c = 0.0, []
        for beta, a in zip(g.ratio, advantage, strict=True):
            inside = not clip or (beta < 1 + clip if a > 0 else beta > 1 - clip)
            loss -= (beta if inside else 1 + clip if a > 0 else 1 - clip) * a / g.n
            c.append(-beta * a / g.n if inside else 0.0)
        return loss, c

    return formula


def log_variance(g):
    d = [w - value for w, value in zip(g.w, g.log_alpha, strict=True)]  # log q - log p - r / gamma
    mean = g.mean(d)
    return sum((x - mean) ** 2 for x in d) / (2 * (g.n - 1)), [(x - mean) / (g.n - 1) for x in d]


def rebel(g):
    x = [w - ETA * reward for w, reward in zip(g.w, g.r, strict=True)]
    pairs = [(i, j) for i in range(g.n) for j in range(i)]
    mean = g.mean(x)
    return sum((x[i] - x[j]) ** 2 for i, j in pairs) / len(pairs), [4 * (v - mean) / (g.n - 1) for v in x]


def steerlm2(g):
    kl = sum(a * math.log(a / b) for a, b in zip(g.alpha, g.beta, strict=True))
    return kl / 2.5, [-(a - b) / 2.5 for a, b in zip(g.alpha, g.beta, strict=True)]


LOG_SIGMOID = (lambda d: -math.log(sigmoid(B * d)), lambda d: -B * sigmoid(-B * d))
HINGE = (lambda d: max(0, 1 - B * d), lambda d: -B * float(B * d < 1))
SQUARE = (lambda d: (d - 1 / (2 * B)) ** 2, lambda d: 2 * (d - 1 / (2 * B)))
METHODS = {
    "dpg": ("dpg", {"gamma": GAMMA}, dpg),
    "gdc": ("gdc", {"gamma": GAMMA}, dpg),
    "gdc++": ("gdc++", {"gamma": GAMMA}, gdc_plus_plus),
    "snis": ("snis", {"gamma": GAMMA}, snis),
    "f_brain, kl": ("f_brain", {"gamma": GAMMA}, f_brain(lambda t: -math.log(t), lambda t: -1 / t)),
    "f_brain, reverse_kl": (
        "f_brain",
        {"gamma": GAMMA, "divergence": "reverse_kl"},
        f_brain(lambda t: t * math.log(t), lambda t: math.log(t) + 1),
    ),
    "f_brain, js": (
        "f_brain",
        {"gamma": GAMMA, "divergence": "js"},
        f_brain(
            lambda t: t * math.log(t) - (t + 1) * math.log((t + 1) / 2),
            lambda t: math.log(2) - math.log(1 + 1 / t),
        ),
    ),
    "f_brain, tv": (
        "f_brain",
        {"gamma": GAMMA, "divergence": "tv"},
        f_brain(lambda t: abs(t - 1) / 2, lambda t: math.copysign(0.5, t - 1)),
    ),
    "dpo": ("dpo", {"beta": B}, pairwise(*LOG_SIGMOID, every=False)),
    "dpo, all": ("dpo", {"beta": B, "pairs": "all"}, pairwise(*LOG_SIGMOID, every=True)),
    "ipo": ("ipo", {"beta": B}, pairwise(*SQUARE, every=False)),
    "hinge": ("hinge", {"beta": B}, pairwise(*HINGE, every=True)),
    "slic": ("slic", {"delta": 5.0, "regulariser": 0.3}, slic),
    "rpo, bwd_kl": (
        "rpo",
        {"beta": B, "eta": ETA},
        rpo(bernoulli_kl, lambda x, y: sigmoid(y) - sigmoid(x)),
    ),
    "rpo, fwd_kl": (
        "rpo",
        {"beta": B, "eta": ETA, "variant": "fwd_kl"},
        rpo(lambda x, y: bernoulli_kl(y, x), lambda x, y: (y - x) * sigmoid(y) * sigmoid(-y)),
    ),
    "rpo, sq": (
        "rpo",
        {"beta": B, "eta": ETA, "variant": "sq"},
        rpo(lambda x, y: (x - y) ** 2, lambda x, y: 2 * (y - x)),
    ),
    "infonca": ("infonca", {"tau": TAU, "beta": B}, infonca),
    "nca": ("nca", {"tau": TAU, "beta": B}, nca),
    "rloo": ("rloo", {"gamma": GAMMA}, rloo(0.2)),
    "rloo, no clip": ("rloo", {"gamma": GAMMA, "clip": 0.0}, rloo(0.0)),
    "log_variance": ("log_variance", {"gamma": GAMMA}, log_variance),
    "rebel": ("rebel", {"eta": ETA}, rebel),
    "steerlm2": ("steerlm2", {"gamma": GAMMA}, steerlm2),
}


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_are_the_papers(method):
    name, options, formula = METHODS[method]
    known = scores()
    lengths_GN = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(5, 4)
    out = make_objective(name, **options)(**known, lengths_GN=lengths_GN)
    found = [formula(Group(*(matrix_GN[g].tolist() for matrix_GN in known.values()))) for g in range(5)]
    torch.testing.assert_close(out.loss_G, torch.tensor([loss for loss, _ in found], dtype=torch.float64), **CLOSE)
    expected_GN = torch.tensor([c for _, c in found], dtype=torch.float64)
    torch.testing.assert_close(out.coefficients_GN, expected_GN, **CLOSE)


# What they share.


def of(name: str, known: dict, **options) -> torch.Tensor:
    """An objective's coefficients."""
    return make_objective(name, **options)(**known).coefficients_GN


def test_dpg_with_the_groups_own_z_is_snis():
    torch.testing.assert_close(of("dpg", scores(), gamma=GAMMA), of("snis", scores(), gamma=GAMMA), **CLOSE)


def test_gdc_plus_plus_is_brain_where_the_policy_is_the_proposal():
    known = scores()
    known["policy_logprobs_GN"] = known["proposal_logprobs_GN"]
    torch.testing.assert_close(of("gdc++", known, gamma=GAMMA), of("brain", known, gamma=GAMMA), **CLOSE)


@pytest.mark.parametrize(
    "name, options",
    [("f_brain", {"gamma": GAMMA, "divergence": "kl"}), ("infonca", {"tau": GAMMA, "beta": 1.0})],
)
def test_these_are_brain_on_samples_of_the_prior(name, options):
    known = scores()
    known["proposal_logprobs_GN"] = known["prior_logprobs_GN"]
    torch.testing.assert_close(of(name, known, **options), of("brain", known, gamma=GAMMA), **CLOSE)


def test_rpo_of_a_pair_of_the_priors_is_brain():
    known = scores(n=2)
    known["proposal_logprobs_GN"] = known["prior_logprobs_GN"]
    torch.testing.assert_close(of("rpo", known, beta=1.0, eta=1 / GAMMA), of("brain", known, gamma=GAMMA), **CLOSE)


def test_steerlm2_is_brain_per_token():
    known, lengths_GN = scores(), torch.tensor([[2.0, 4.0, 6.0, 12.0]]).expand(5, 4)
    ours_GN = make_objective("steerlm2", gamma=GAMMA)(**known, lengths_GN=lengths_GN).coefficients_GN
    torch.testing.assert_close(6 * ours_GN, of("brain", known, gamma=GAMMA), **CLOSE)
    mask_GN = torch.tensor([[True, True, True, False]]).expand(5, 4)
    masked_GN = make_objective("steerlm2", gamma=GAMMA)(**known, lengths_GN=lengths_GN, mask_GN=mask_GN)
    brain_GN = make_objective("brain", gamma=GAMMA)(**known, mask_GN=mask_GN)
    torch.testing.assert_close(4 * masked_GN.coefficients_GN, brain_GN.coefficients_GN, **CLOSE)


def test_dpo_of_a_pair_is_dpo_sft():
    known = scores(n=2)
    torch.testing.assert_close(of("dpo", known, beta=B), of("dpo_sft", known, beta=B), **CLOSE)


def test_brain_is_rloo_where_rewards_hardly_differ():
    """At q = q' = p: to (n - 1) / (n gamma) of it."""
    known = scores()
    known["policy_logprobs_GN"] = known["proposal_logprobs_GN"] = known["prior_logprobs_GN"]
    known["rewards_GN"] = 1e-6 * known["rewards_GN"]
    brain_GN, rloo_GN = of("brain", known, gamma=GAMMA), of("rloo", known, gamma=GAMMA)
    # What is left is of second order in rewards of 1e-6.
    torch.testing.assert_close(brain_GN, 3 / 4 / GAMMA * rloo_GN, rtol=1e-4, atol=1e-11)


@pytest.mark.parametrize(
    "name, options, total",
    [
        ("brain", {"gamma": GAMMA}, 0),
        ("f_brain", {"gamma": GAMMA, "divergence": "js"}, 0),
        ("dpo", {"beta": B}, 0),
        ("rpo", {"beta": B, "eta": ETA}, 0),
        ("infonca", {"tau": TAU, "beta": B}, 0),
        ("log_variance", {"gamma": GAMMA}, 0),
        ("rebel", {"eta": ETA}, 0),
        ("snis", {"gamma": GAMMA}, -1),
        ("dpg", {"gamma": GAMMA}, -1),
    ],
)
def test_coefficients_sum_to_what_the_baseline_leaves(name, options, total):
    sums_G = of(name, scores(groups=20), **options).sum(-1)
    torch.testing.assert_close(sums_G, torch.full_like(sums_G, total), **CLOSE)


def test_rloos_coefficients_sum_to_zero_on_policy():
    known = scores()
    known["policy_logprobs_GN"] = known["proposal_logprobs_GN"]
    assert of("rloo", known, gamma=GAMMA).sum(-1).abs().max() < 1e-12


def test_brains_coefficients_are_bounded_and_gdc_plus_plus_s_are_not():
    """The sum of their magnitudes is at most 2, whatever the weights."""
    known = scores(groups=500)
    known["policy_logprobs_GN"] = known["policy_logprobs_GN"] * 4 + 120
    assert of("brain", known, gamma=0.01).abs().sum(-1).max() <= 2 + 1e-12
    assert of("gdc++", known, gamma=0.01).abs().sum(-1).max() > 100


@pytest.mark.parametrize("shifted", NAMES)
@pytest.mark.parametrize(
    "name, options",
    [
        ("snis", {"gamma": GAMMA}),
        ("f_brain", {"gamma": GAMMA, "divergence": "reverse_kl"}),
        ("dpo", {"beta": B, "pairs": "all"}),
        ("ipo", {"beta": B}),
        ("hinge", {"beta": B}),
        ("slic", {}),
        ("rpo", {"beta": B, "eta": ETA}),
        ("infonca", {"tau": TAU, "beta": B}),
        ("log_variance", {"gamma": GAMMA}),
        ("rebel", {"eta": ETA}),
    ],
)
def test_constants_within_a_group_change_no_coefficient(name, options, shifted):
    known = scores()
    constants_G1 = torch.tensor([[-300.0], [-1.0], [0.0], [2.0], [70.0]], dtype=torch.float64)
    moved = {**known, shifted: known[shifted] + constants_G1}
    # 300 + a number of order 1 is rounded at 3e-14, divided by gamma.
    torch.testing.assert_close(of(name, moved, **options), of(name, known, **options), rtol=1e-11, atol=1e-11)


# Ties, goodness, normalisers.


@pytest.mark.parametrize("name", ["dpo", "ipo", "hinge"])
def test_equal_rewards_are_no_pair_and_ties_share_a_place(name):
    known = scores(groups=2, n=3)
    known["rewards_GN"] = torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 2.0]])
    out = make_objective(name, beta=B, pairs="best_worst")(**known)
    assert out.loss_G[1] == 0 and (out.coefficients_GN[1] == 0).all()
    halves = []
    for left in ([0, 2], [1, 2]):
        pair = make_objective(name, beta=B)(**{key: value[:1, left] for key, value in known.items()})
        halves.append(pair.loss_G[0] / 2)
    torch.testing.assert_close(out.loss_G[0], sum(halves), **CLOSE)


def test_beta_goodness_is_the_chance_that_its_law_exceeds_one_half():
    known = scores()
    known["proposal_logprobs_GN"] = known["prior_logprobs_GN"]
    alpha_GN = make_objective("brain", gamma=5.0, goodness="beta", goodness_center=0.5)(**known).alpha_GN
    places = ((known["rewards_GN"] - 0.5) / 5.0 + 0.5).numpy()
    good_GN = torch.from_numpy(stats.beta.sf(0.5, 24 * places, 24 - 24 * places))
    torch.testing.assert_close(alpha_GN, good_GN / good_GN.sum(-1, keepdim=True), rtol=1e-9, atol=1e-12)


def test_beta_goodness_is_exact_over_its_whole_range():
    scores = torch.linspace(1e-3, 1 - 1e-3, 2001, dtype=torch.float64)
    exact = stats.beta.logsf(0.5, 24 * scores.numpy(), 24 - 24 * scores.numpy())
    torch.testing.assert_close(GOODNESS["beta"](scores - 0.5), torch.from_numpy(exact), rtol=0, atol=1e-13)


def test_beta_goodness_takes_rewards_beyond_its_range_as_its_ends():
    known = scores(groups=1, n=4)
    known["proposal_logprobs_GN"] = known["prior_logprobs_GN"]
    known["rewards_GN"] = torch.tensor([[-1e4, -0.5, 0.5, 1e4]])
    alpha = make_objective("brain", gamma=1.0, goodness="beta")(**known).alpha_GN[0].tolist()
    assert alpha[:2] == pytest.approx([0.0, 0.0], abs=1e-6) and alpha[2:] == pytest.approx([0.5, 0.5])


def test_a_prompts_z_is_the_mean_over_all_of_its_outputs_so_far():
    objective = make_objective("dpg", gamma=GAMMA, z="prompt")
    first, second = scores(groups=2, seed=1), scores(groups=2, seed=2)
    ids = ["x", "y"]
    start = objective(**first, prompt_ids=ids).coefficients_GN
    torch.testing.assert_close(start, of("dpg", first, gamma=GAMMA), **CLOSE)
    objective.advance(**first, prompt_ids=ids)
    resumed = make_objective("dpg", gamma=GAMMA, z="prompt")
    resumed.load_state_dict(json.loads(json.dumps(objective.state_dict())))
    alpha_GN = torch.cat([torch.exp(k[NAMES[1]] + k[NAMES[3]] / GAMMA - k[NAMES[2]]) for k in (first, second)], dim=1)
    expected_GN = -alpha_GN[:, 4:] / alpha_GN.mean(-1, keepdim=True) / 4
    for known in (objective, resumed):
        torch.testing.assert_close(known(**second, prompt_ids=ids).coefficients_GN, expected_GN, **CLOSE)
    # Another prompt has had no outputs yet.
    other_GN = objective(**second, prompt_ids=["z", "w"]).coefficients_GN
    torch.testing.assert_close(other_GN, of("dpg", second, gamma=GAMMA), **CLOSE)


def test_a_known_z_comes_from_its_file(tmp_path):
    (tmp_path / "z.json").write_text('{"x": 0.5, "y": -1}')
    known = scores(groups=2)
    objective = make_objective("dpg", gamma=GAMMA, z="known", log_z=str(tmp_path / "z.json"))
    alpha_GN = torch.exp(known[NAMES[1]] + known[NAMES[3]] / GAMMA - known[NAMES[2]])
    expected_GN = -alpha_GN / torch.tensor([[0.5], [-1.0]]).double().exp() / 4
    torch.testing.assert_close(objective(**known, prompt_ids=["x", "y"]).coefficients_GN, expected_GN, **CLOSE)
    with pytest.raises(ValueError, match=r"objective\.log_z has no log Z of the prompt 'z': add it"):
        objective(**known, prompt_ids=["x", "z"])
    with pytest.raises(ValueError, match=r"need the prompts' ids: use objective\.z=group"):
        objective(**known)


@pytest.mark.parametrize(
    "content, message",
    [(None, "cannot be read"), ("{", "cannot be read"), ("[1]", "one JSON object"), ('{"x": "1"}', "finite numbers")],
)
def test_a_file_of_z_that_cannot_be_used_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "z.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        make_objective("gdc++", z="known", log_z=str(tmp_path / "z.json"))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("dpg", {"z": "all"}, "unknown objective.z 'all'; known: group, prompt, known"),
        (
            "dpg",
            {"z": "known"},
            "objective.log_z (a JSON file of log Z by prompt id) and objective.z=known go together",
        ),
        ("dpg", {"log_z": "x.json"}, "go together"),
        ("f_brain", {"divergence": "chi2"}, "unknown objective.divergence 'chi2'; known: kl, reverse_kl, js, tv"),
        ("dpo", {"beta": 1.0, "pairs": "some"}, "unknown objective.pairs 'some'; known: best_worst, all"),
        ("rpo", {"beta": 1.0, "eta": 1.0, "variant": "x"}, "unknown objective.variant 'x'; known: bwd_kl, fwd_kl, sq"),
        ("slic", {"regulariser": -1.0}, "objective.regulariser is -1.0; it must not be negative"),
        ("slic", {"delta": 0.0}, "objective.delta is 0.0; it must be a positive number"),
        ("rloo", {"clip": 1.0}, "objective.clip is 1.0; it must be at least 0 and below 1"),
        ("rebel", {"eta": -1.0}, "objective.eta is -1.0; it must be a positive number"),
        ("infonca", {"tau": 1.0}, "objective.beta is required"),
    ],
)
def test_wrong_options_name_the_remedy(name, options, message):
    with pytest.raises(ValueError) as error:
        make_objective(name, **options)
    assert message in str(error.value)


def test_steerlm2_says_what_it_lacks():
    with pytest.raises(ValueError, match="steerlm2 needs the outputs' lengths"):
        make_objective("steerlm2")(**scores())


# Where they end: on a space of six outputs.


@pytest.fixture
def world() -> tuple[torch.Tensor, torch.Tensor]:
    """log p and r [K]; no two rewards are equal."""
    known = torch.randn(2, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return known[0].log_softmax(-1), known[1]


def distance(one_K: torch.Tensor, other_K: torch.Tensor) -> float:
    """Total variation of two laws by their log-probs."""
    return ((one_K.exp() - other_K.exp()).abs().sum() / 2).item()


def sampled(name: str, options: dict, prior_K: torch.Tensor, rewards_K: torch.Tensor, rate: float) -> torch.Tensor:
    """The policy [K] that on-policy training ends with, on average over the last half of its steps."""
    generator = torch.Generator().manual_seed(0)
    theta_K = prior_K.clone().requires_grad_()
    objective = make_objective(name, **options)
    average_K, steps = torch.zeros_like(prior_K), 600
    for step in range(steps):
        proposal_K = theta_K.detach().log_softmax(-1)  # q' <- q
        groups_GN = torch.multinomial(proposal_K.exp(), 256 * 4, replacement=True, generator=generator).view(256, 4)
        out = objective(
            theta_K.log_softmax(-1)[groups_GN],
            prior_logprobs_GN=prior_K[groups_GN],
            proposal_logprobs_GN=proposal_K[groups_GN],
            rewards_GN=rewards_K[groups_GN],
            lengths_GN=torch.ones(256, 4),
        )
        (slope_K,) = torch.autograd.grad(out.loss_G.mean(), theta_K)
        theta_K = (theta_K - rate / (1 + step / 30) * slope_K).detach().requires_grad_()
        if step >= steps // 2:
            average_K += theta_K.detach().log_softmax(-1) / (steps // 2)
    return average_K.log_softmax(-1)


@pytest.mark.parametrize(
    "name, options, rate",
    [
        ("brain", {}, 1),
        ("gdc++", {}, 1),
        ("dpg", {}, 1),
        ("snis", {}, 1),
        ("f_brain", {"divergence": "reverse_kl"}, 1),
        ("f_brain", {"divergence": "js"}, 2),  # half as curved at its minimum
        ("log_variance", {}, 1),
        ("rloo", {}, 1),
        ("steerlm2", {}, 1),
    ],
)
def test_these_end_at_the_posterior(world, name, options, rate):
    prior_K, rewards_K = world
    target_K = (prior_K + rewards_K / 0.7).log_softmax(-1)
    assert distance(prior_K, target_K) > 0.25
    # 256 groups of 4 at a rate that falls: 0.004 to 0.01 is what the sampling's noise leaves.
    assert distance(sampled(name, {"gamma": 0.7, **options}, prior_K, rewards_K, rate), target_K) < 0.02


def exact(name: str, options: dict, prior_K: torch.Tensor, rewards_K: torch.Tensor, n: int, iterations: int = 200):
    """log q - log p [K] at the minimum of the exact expectation over groups of the prior's outputs; what that is."""
    groups_GN = torch.cartesian_prod(*[torch.arange(6)] * n)
    probabilities_G = prior_K[groups_GN].sum(-1).exp()
    objective = make_objective(name, **options)
    theta_K = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [theta_K], max_iter=iterations, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        out = objective(
            (prior_K + theta_K).log_softmax(-1)[groups_GN],
            prior_logprobs_GN=prior_K[groups_GN],
            proposal_logprobs_GN=prior_K[groups_GN],
            rewards_GN=rewards_K[groups_GN],
        )
        loss = probabilities_G @ out.loss_G
        loss.backward()
        return loss

    optimizer.step(closure)
    return (prior_K + theta_K.detach()).log_softmax(-1) - prior_K, float(closure())


@pytest.mark.parametrize(
    "name, options, scale",
    [
        ("infonca", {"tau": 0.7, "beta": 1.0}, 1 / 0.7),
        ("infonca", {"tau": 0.7, "beta": 0.5}, 2 / 0.7),
        ("rpo", {"beta": 0.5, "eta": 0.9}, 0.9 / 0.5),
        ("rpo", {"beta": 0.5, "eta": 0.9, "variant": "fwd_kl"}, 0.9 / 0.5),
        ("rpo", {"beta": 0.5, "eta": 0.9, "variant": "sq"}, 0.9 / 0.5),
        ("rebel", {"eta": 0.9}, 0.9),
    ],
)
def test_these_end_where_the_log_ratio_is_the_scaled_reward(world, name, options, scale):
    """Their optimum on samples of the prior is p exp(scale r), normalised, for any n."""
    prior_K, rewards_K = world
    ratio_K, _ = exact(name, options, prior_K, rewards_K, n=2)
    expected_K = (prior_K + scale * rewards_K).log_softmax(-1) - prior_K
    # The optimizer stops at the loss's rounding, 1e-16: its root is 1e-8 in log-probs, more where q is small.
    torch.testing.assert_close(ratio_K, expected_K, rtol=0, atol=1e-5)


def test_nca_ends_there_as_n_grows(world):
    """Its label and its share 1/n estimate p exp(r / tau) / Z: log q - log p -> (r / tau - log Z) / beta."""
    prior_K, rewards_K = world
    expected_K = (prior_K + rewards_K / 0.7).log_softmax(-1) - prior_K
    errors = [
        (exact("nca", {"tau": 0.7, "beta": 1.0}, prior_K, rewards_K, n)[0] - expected_K).abs().max().item()
        for n in (2, 4, 6)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_ipo_ends_at_the_share_of_outputs_that_are_worse(world):
    """The least squares of s_i - s_j = sign(r_i - r_j) / (2 beta) over pairs of p's outputs: s_i is the mean over j."""
    prior_K, rewards_K = world
    ratio_K, _ = exact("ipo", {"beta": 0.6}, prior_K, rewards_K, n=2)
    signs_KK = (rewards_K[:, None] - rewards_K[None, :]).sign()
    expected_K = signs_KK @ prior_K.exp() / (2 * 0.6)
    torch.testing.assert_close(ratio_K - ratio_K[0], expected_K - expected_K[0], rtol=0, atol=1e-5)


def test_dpo_on_a_ranking_has_no_end(world):
    """Where the better output is always the same one, the margins grow without bound, and the loss falls to 0."""
    short_K, before = exact("dpo", {"beta": 1.0}, *world, n=2, iterations=5)
    long_K, after = exact("dpo", {"beta": 1.0}, *world, n=2, iterations=50)
    assert after < before / 10 and after < 1e-3
    order = world[1].argsort()
    assert (long_K[order].diff() > 4).all() and (long_K[order].diff() > short_K[order].diff()).any()


@pytest.mark.parametrize("name, options, margin", [("hinge", {"beta": 0.5}, 2.0), ("slic", {"delta": 1.5}, None)])
def test_a_hinge_ends_where_every_pair_has_its_margin(world, name, options, margin):
    prior_K, rewards_K = world
    ratio_K, loss = exact(name, options, prior_K, rewards_K, n=2)
    assert loss < 1e-6
    gained_K = ratio_K if margin else ratio_K + prior_K
    # The loss of a pair is what it lacks, weighted with its probability, at least 1e-5 here.
    assert (gained_K[rewards_K.argsort()].diff() > (margin or 1.5) - 0.1).all()


def test_divergences_of_the_target_are_estimated_by_its_weights(world):
    """From all outputs as a group, each once, from a uniform proposal they are exact."""
    prior_K, rewards_K = world
    uniform_K = torch.full((6,), -math.log(6), dtype=torch.float64)
    target_K, policy_K = ((prior_K + scale * rewards_K).log_softmax(-1) for scale in (1 / 0.7, 0.5))
    out = make_objective("brain", gamma=0.7)(
        policy_K[None],
        prior_logprobs_GN=prior_K[None],
        proposal_logprobs_GN=uniform_K[None],
        rewards_GN=rewards_K[None],
    )
    found = target_divergences(out.alpha_GN, (policy_K - uniform_K)[None], torch.ones(1, 6, dtype=torch.bool))
    exact = [(target_K.exp() * (target_K - other_K)).sum().item() for other_K in (uniform_K, policy_K)]
    assert found == pytest.approx(exact)
    # A group whose outputs are all masked says nothing; masked outputs of others are left out.
    mask_GN = torch.tensor([[True] * 6, [False] * 6])
    alpha_GN = torch.cat([out.alpha_GN, torch.zeros(1, 6)])
    ratios_GN = torch.cat([(policy_K - uniform_K)[None], torch.full((1, 6), math.nan)])
    assert target_divergences(alpha_GN, ratios_GN, mask_GN) == pytest.approx(exact)
