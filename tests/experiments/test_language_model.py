"""The language model's figures on a tiny random Llama: sampling, KL, gradients and training against sums written out.

Shapes: N outputs, M a pool, D weights, V vocabulary, S positions.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.gradients import SECTIONS
from experiments.known_z import objective_with
from experiments.lm import groups, sampling, training, variance
from experiments.lm.groups import Group
from experiments.lm.model import LanguageModel

VOCABULARY, END, LENGTH = 5, 2, 3
PROMPTS = [[1, 3], [4, 1, 0, 3]]


@pytest.fixture(scope="module")
def hugging_face() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, initializer_range=0.4, **sizes)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model(hugging_face) -> LanguageModel:
    return LanguageModel(hugging_face, trained=2)


@pytest.fixture(scope="module")
def policy(model):
    moved = model.policy()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in moved.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return moved


def draw(model, blocks, n: int, seed: str = "s", prompts=PROMPTS) -> list[Group]:
    return sampling.sample(model, blocks, sampling.prefill(model, prompts, n), n, LENGTH, END, seed)


def outputs() -> list[tuple[int, ...]]:
    """Every output of at most ``LENGTH`` tokens."""
    ended = [(*y, END) for k in range(LENGTH) for y in itertools.product([0, 1, 3, 4], repeat=k)]
    return ended + list(itertools.product([0, 1, 3, 4], repeat=LENGTH))


def every_output(model, prompt: list[int]) -> Group:
    """All outputs as one group, their frozen hidden states from passes without a cache."""
    found, longest = outputs(), LENGTH
    tokens_NT = torch.tensor([[*y, *[0] * longest][:longest] for y in found])
    whole_NS = torch.cat([torch.tensor(prompt).expand(len(found), -1), tokens_NT], 1)
    positions_NS = torch.arange(whole_NS.shape[1]).expand(len(found), -1)
    causal = torch.ones(whole_NS.shape[1], whole_NS.shape[1], dtype=torch.bool).tril().expand(len(found), -1, -1)
    with torch.no_grad():
        hidden_NSH = model.below(whole_NS, positions_NS, causal, None)
    unknown_N = torch.zeros(len(found), dtype=torch.float64)
    counts_N = torch.tensor([len(y) for y in found])
    prompt_LH, hidden_NTH = hidden_NSH[0, : len(prompt)], hidden_NSH[:, len(prompt) :]
    return Group(0, tokens_NT, counts_N, prompt_LH, hidden_NTH, unknown_N, unknown_N, unknown_N)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_log_probs_are_those_of_the_whole_model_and_sum_to_one(hugging_face, model, prompt):
    everything = every_output(model, prompt)
    with torch.no_grad():
        logprobs_N = groups.logprobs(model, model.prior, everything)
        for y, found in list(zip(outputs(), logprobs_N.tolist(), strict=True))[::7]:
            laws_SV = hugging_face(torch.tensor([[*prompt, *y]])).logits[0].log_softmax(-1)
            each = [float(laws_SV[len(prompt) - 1 + t, token]) for t, token in enumerate(y)]
            assert found == pytest.approx(sum(each), abs=1e-5)  # float32
    assert float(logprobs_N.exp().sum()) == pytest.approx(1.0, abs=1e-5)


def test_sampled_outputs_have_the_log_probs_that_training_gives_them(model, policy):
    for group in draw(model, policy, 16):
        with torch.no_grad():
            again_N = groups.logprobs(model, policy, group)
        torch.testing.assert_close(group.proposal_N, again_N, rtol=0, atol=1e-5)
        for tokens, count in zip(group.tokens_NT.tolist(), group.counts_N.tolist(), strict=True):
            assert END not in tokens[: count - 1] and (tokens[count - 1] == END or count == LENGTH)


def test_draws_follow_the_enumerated_law_and_do_not_depend_on_the_batch(model, policy):
    draws = 4000
    (group,) = draw(model, policy, draws, prompts=PROMPTS[1:])
    with torch.no_grad():
        law_N = groups.logprobs(model, policy, every_output(model, PROMPTS[1])).exp()
    drawn = [tuple(y[:count]) for y, count in zip(group.tokens_NT.tolist(), group.counts_N.tolist(), strict=True)]
    for y, chance in zip(outputs(), law_N.tolist(), strict=True):
        deviation = math.sqrt(draws * chance * (1 - chance))
        assert abs(drawn.count(y) - draws * chance) <= 5 * deviation + 1
    few = draw(model, policy, 3, seed="t")
    many = draw(model, policy, 8, seed="t")
    for fewer, more in zip(few, many, strict=True):
        first = more.first(3)
        assert torch.equal(fewer.counts_N, first.counts_N), "nested: the draws of fewer outputs are the first"
        width = int(fewer.counts_N.max())
        assert torch.equal(fewer.tokens_NT, first.tokens_NT[:, :width])


def test_the_sum_of_next_token_kls_is_the_kl_of_whole_outputs(model, policy):
    everything = every_output(model, PROMPTS[0])
    with torch.no_grad():
        kl_N, ratio_N = groups.kl(model, policy, everything)
        policy_N, prior_N = (groups.logprobs(model, b, everything) for b in (policy, model.prior))
    exact = float(policy_N.exp() @ (policy_N - prior_N))
    assert exact > 0.01
    assert float(policy_N.exp() @ kl_N) == pytest.approx(exact, abs=1e-5)
    torch.testing.assert_close(ratio_N, policy_N - prior_N, rtol=0, atol=1e-5)
    spread = [float(policy_N.exp() @ (v_N - exact).square()) for v_N in (kl_N, ratio_N)]
    assert spread[0] < spread[1], "which is why it is taken"


def scored(model, policy, n: int) -> Group:
    group = draw(model, policy, n)[0]
    with torch.no_grad():
        prior_N = groups.logprobs(model, model.prior, group)
    rewards_N = torch.randn(n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return replace(group, prior_N=prior_N, rewards_N=rewards_N)


def world_of(model):
    return type("World", (), {"model": model})()


@pytest.mark.parametrize("method", SECTIONS)
def test_an_estimates_norm_from_the_gram_matrix_is_autograds(model, policy, method):
    group = scored(model, policy, 6)
    gradients_MD, policy_M = variance.output_gradients(world_of(model), policy, group)
    objective = objective_with({**SECTIONS[method], "gamma": 0.5}, {str(group.prompt): 0.3})
    given = training.scores([group], 6)
    c_N = objective(policy_M[None], **given).coefficients_GN[0]
    from_gram = float(c_N @ (gradients_MD @ gradients_MD.T).double() @ c_N)
    weights = list(policy[-1].requires_grad_(True).parameters())
    loss = objective(groups.logprobs(model, policy, group)[None], **given).loss_G.sum()
    square = sum(float(part.double().square().sum()) for part in torch.autograd.grad(loss, weights))
    assert from_gram == pytest.approx(square, rel=1e-4)  # float32 gradients


def test_moments_hold_the_theorems_and_a_broken_one_ends_the_run(model, policy, monkeypatch):
    run = {"gamma": 0.5, "sizes": [2, 8], "partitions": 3, "seed": 0, "proposal": "policy"}
    group = scored(model, policy, 32)
    gradients_MD, policy_M = variance.output_gradients(world_of(model), policy, group)
    gram_MM = (gradients_MD @ gradients_MD.T).double()
    found = variance.moments(group, policy_M, gram_MM, 0.2, run)
    assert 0 < found["bound"] <= 1 and 1 <= found["ess"] <= 32
    for n in (2, 8):
        assert found["methods"][f"brain, {n}"] == pytest.approx(found["methods"][f"gdc++ (group), {n}"], rel=1e-9)
    with pytest.raises(RuntimeError, match="its bound"):
        no_gram_MM = 51 * torch.eye(32, dtype=torch.float64) - 50
        variance.moments(group, policy_M, no_gram_MM, 0.2, run)
    monkeypatch.setitem(variance.SECTIONS, "gdc++ (group)", {"name": "snis"})
    with pytest.raises(RuntimeError, match="differs from BRAIn"):
        variance.moments(group, policy_M, gram_MM, 0.2, run)


def test_u_statistics_give_the_known_variance_of_independent_terms():
    """DPG with a known Z: n times the variance does not depend on n."""
    from experiments.gram import products, spread

    generator = torch.Generator().manual_seed(0)
    terms_MD = torch.randn(4096, 3, generator=generator, dtype=torch.float64) + 1
    gram_MM, per_output = terms_MD @ terms_MD.T, []
    for n in (2, 8, 32):
        places_GN = torch.randperm(4096, generator=generator).view(-1, n)
        c_GM = spread(torch.full(places_GN.shape, 1 / n, dtype=torch.float64), places_GN, 4096)
        norms_G, mean_square = products(gram_MM, c_GM)
        per_output.append(n * (float(norms_G.mean()) - mean_square))
        assert mean_square == pytest.approx(3.0, abs=0.3)
    assert per_output == pytest.approx([3.0] * 3, rel=0.25)  # 128 groups at n = 32: 5 standard errors of a chi-square


def test_training_moves_a_policy_towards_reward_and_leaves_the_rest_of_the_model(model):
    """Two of the three blocks are trained; rewards favour short outputs."""
    world = world_of(model)
    world.rollouts = []
    prompts = [[1, 3], [4, 1, 0, 3], [0], [3, 3, 1], [1], [4, 4], [0, 1, 4], [3]]
    for group in draw(model, model.prior, 8, prompts=prompts):
        world.rollouts.append(replace(group, prior_N=group.proposal_N, rewards_N=-group.counts_N.double()))
    run = {"objective": {"name": "brain", "gamma": 0.5}, "refresh": "never", "n": 8, "draws": 8, "seed": 0}
    run |= {"prompts_per_iteration": 8, "passes": 30, "rate": 0.01}
    before = [weight.clone() for weight in model._model.parameters()]
    policy, history = training.train(world, run)
    assert len(history) == 30 and history[-1]["loss"] < 0.8 * history[0]["loss"]
    lengths = [
        torch.cat([g.counts_N for g in draw(model, b, 64, seed="e", prompts=prompts)]) for b in (model.prior, policy)
    ]
    assert lengths[1].double().mean() < lengths[0].double().mean() - 0.3
    assert all(torch.equal(old, new) for old, new in zip(before, model._model.parameters(), strict=True))
    pairs = training.train(world, {**run, "n": 2, "draws": 4, "passes": 1})[1]
    assert len(pairs) == 1 and math.isfinite(pairs[0]["loss"])
