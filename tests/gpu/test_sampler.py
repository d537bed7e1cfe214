"""The sampler on a card: steps replayed from a CUDA graph give the tokens of steps that are looked at one by one."""

from __future__ import annotations

import cards
import pytest
from sampled_steps import sampled_by_steps
from spawned import run_spawned

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("changes", [{}, {"temperature": 1.4}, {"top_k": 9, "top_p": 0.9}], ids=str)
def test_several_tokens_at_a_time_are_the_same_tokens(changes):
    (((one, *others), used),) = run_spawned(sampled_by_steps, 1, [1, 16, 7, None], **changes)
    assert used == (["attention", "draws", "graphs"] if cards.ON_CARD else []), "what a card has for it"
    assert len({len(tokens) for tokens, _ in one}) > 5, "rows end at different times"
    for other in others:
        assert [tokens for tokens, _ in other] == [tokens for tokens, _ in one]
        # fp32, of up to 60 tokens: keys of weight zero are added in another order.
        assert [logprob for _, logprob in other] == pytest.approx([logprob for _, logprob in one], abs=1e-4)


def test_a_cards_tokens_are_the_cpus():
    """fp32: the same draws from logits that differ by rounding."""
    (((card,), _),) = run_spawned(sampled_by_steps, 1, [None], hidden=["transformer_engine"])
    (((host,), _),) = run_spawned(sampled_by_steps, 1, [1], on_cpu=True)
    assert [tokens for tokens, _ in card] == [tokens for tokens, _ in host]
    assert [logprob for _, logprob in card] == pytest.approx([logprob for _, logprob in host], abs=1e-3)
