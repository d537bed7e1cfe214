"""An autoregressive GPT over 7 letters and an end symbol, and all of its 2,801 outputs of at most 4 tokens.

Shapes: B rows, K all outputs, T the 4 tokens of an output, S the 5 positions (prompt, then all letters but the last),
R the 343 rows that hold every prefix, V vocabulary, H hidden.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import nn

LETTERS, LENGTH, PROMPT = 7, 4, 2
END = LETTERS  # a token


def _outputs() -> list[tuple[int, ...]]:
    """Every output without its end token, which those shorter than ``LENGTH`` have."""
    return [y for length in range(LENGTH + 1) for y in itertools.product(range(LETTERS), repeat=length)]


OUTPUTS = _outputs()
TOKENS_KT = torch.tensor([[*y, END, *[0] * LENGTH][:LENGTH] for y in OUTPUTS])
COUNTS_KT = torch.arange(LENGTH) < torch.tensor([min(len(y) + 1, LENGTH) for y in OUTPUTS])[:, None]
_PREFIXES_RT = torch.tensor(list(itertools.product(range(LETTERS), repeat=LENGTH - 1)))
# Where an output's prefixes stand: the row that begins with its letters.
_ROW_K = sum((TOKENS_KT[:, t] % LETTERS) * LETTERS ** (LENGTH - 2 - t) for t in range(LENGTH - 1))


class Block(nn.Module):
    """Attention and an MLP, each after a layer norm and beside a residual."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden_BSH: torch.Tensor) -> torch.Tensor:
        rows, positions, width = hidden_BSH.shape
        qkv = self.qkv(self.norm_1(hidden_BSH)).view(rows, positions, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        future_SS = torch.ones(positions, positions, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future_SS, -torch.inf).softmax(-1) @ value
        hidden_BSH = hidden_BSH + self.out(mixed.transpose(1, 2).reshape(rows, positions, width))
        return hidden_BSH + self.down(F.gelu(self.up(self.norm_2(hidden_BSH))))


class GPT(nn.Module):
    """The policy. A prompt is two letters. Weights are float32, log-probs of whole outputs are summed in float64."""

    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.tokens = nn.Embedding(LETTERS + 1, width)
        self.positions = nn.Parameter(0.02 * torch.randn(PROMPT + LENGTH - 1, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, LETTERS + 1)

    def forward(self, prompts_B2: torch.Tensor, letters_BT: torch.Tensor) -> torch.Tensor:
        """Log-probs of each next token [B, T, V], after a prompt and all tokens of an output but the last."""
        hidden_BSH = self.tokens(torch.cat([prompts_B2, letters_BT], 1)) + self.positions
        for block in self.blocks:
            hidden_BSH = block(hidden_BSH)
        return self.head(self.norm(hidden_BSH[:, PROMPT - 1 :])).double().log_softmax(-1)

    def logprobs(self, prompts_B2: torch.Tensor, outputs_B: torch.Tensor) -> torch.Tensor:
        """log q(y|x) [B] of whole outputs, the end token included; ``outputs_B`` are places in ``OUTPUTS``."""
        tokens_BT, counts_BT = TOKENS_KT[outputs_B], COUNTS_KT[outputs_B]
        logprobs_BTV = self(prompts_B2, tokens_BT[:, :-1])
        return (logprobs_BTV.gather(-1, tokens_BT[..., None]).squeeze(-1) * counts_BT).sum(-1)

    def enumerate(self, prompts_P2: torch.Tensor) -> torch.Tensor:
        """log q(y|x) of all outputs of every prompt [P, K], through the 343 rows that hold every prefix."""
        rows = len(_PREFIXES_RT)
        logprobs = self(prompts_P2.repeat_interleave(rows, 0), _PREFIXES_RT.repeat(len(prompts_P2), 1))
        logprobs_PRTV = logprobs.view(len(prompts_P2), rows, LENGTH, LETTERS + 1)
        logprobs_PKT = logprobs_PRTV[:, _ROW_K].gather(-1, TOKENS_KT.expand(len(prompts_P2), -1, -1)[..., None])
        return (logprobs_PKT.squeeze(-1) * COUNTS_KT).sum(-1)
