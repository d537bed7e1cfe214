"""Sampling n outputs per prompt from a Megatron GPT on tensor- and pipeline-parallel ranks, with a key-value cache.

Shapes: R rows (outputs in flight), V vocabulary columns of this rank, S positions of a row, H hidden.

Every draw is one uniform number keyed by (seed, iteration, prompt id, output index, position) and turned into a token
by the inverse of the cumulative distribution over the whole vocabulary, so every layout samples the same outputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_brain.attention import KVCache
from nemo_brain.groups import Group, Output, Prompt
from nemo_brain.logprobs import vocab_parallel_logprobs


@dataclass(frozen=True)
class SamplingOptions:
    """``top_k`` (0: all) and ``top_p`` (1: all) truncate the law that is sampled; log q' is then that law's."""

    outputs: int
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    rows_in_flight: int = 256

    @property
    def truncated(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0


def uniforms(seed: int, iteration: int, prompt_id: str, output: int, positions: int) -> np.ndarray:
    """The draws of one output: [positions] float64 strictly between 0 and 1, by splitmix64 from a hashed key."""
    key = hashlib.blake2b(f"{seed}\x1f{iteration}\x1f{output}\x1f{prompt_id}".encode(), digest_size=8).digest()
    with np.errstate(over="ignore"):
        z = np.uint64(int.from_bytes(key, "little")) + np.arange(1, positions + 1, dtype=np.uint64) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return ((z >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def draw_tokens(law_RV: torch.Tensor, uniforms_R: torch.Tensor, real_vocab_size: int, group=None) -> torch.Tensor:
    """One token per row by inverse transform: the first token whose cumulative probability exceeds the draw.

    Args:
        law_RV: logits of the law to sample, this rank's vocabulary columns.
        uniforms_R: float64 in (0, 1), the same on every rank of ``group``.
        real_vocab_size: columns from there on are padding and are never drawn.
        group: the tensor-parallel group (None: one rank holds all columns).

    Returns:
        int64 token ids [R], the same on every rank.
    """
    ranks = 1 if group is None else group.size()
    rank = 0 if group is None else group.rank()
    start = rank * law_RV.shape[-1]
    real = max(0, min(law_RV.shape[-1], real_vocab_size - start))
    peak_R = torch.full_like(uniforms_R, float("-inf"))
    total_R = torch.zeros_like(uniforms_R)
    if real:
        values_RV = law_RV[:, :real].float()
        peak_R1 = values_RV.amax(dim=-1, keepdim=True)
        # float64: the cumulative sum of 100k columns decides which token a draw falls on.
        cumulative_RV = (values_RV - peak_R1).exp().cumsum(dim=-1, dtype=torch.float64)
        peak_R, total_R = peak_R1[:, 0].double(), cumulative_RV[:, -1]
    shares = _gather(torch.stack([peak_R, total_R]), ranks, group)  # [ranks, 2, R]
    top_R = shares[:, 0].amax(dim=0)
    masses = shares[:, 1] * (shares[:, 0] - top_R).exp()  # [ranks, R], in units of exp(top)
    edges = torch.cat([torch.zeros_like(masses[:1]), masses.cumsum(dim=0)])  # where the ranks' intervals meet
    before_R, after_R, mass_R = edges[rank], edges[rank + 1], edges[-1]
    draw_R = torch.minimum(uniforms_R * mass_R, _below(mass_R))
    tokens_R = torch.full_like(draw_R, -1, dtype=torch.int64)
    if real:
        inside_R = (draw_R >= before_R) & (draw_R < after_R)
        # Rounding must not carry a draw past this rank's last token that has any probability.
        local_R = torch.minimum((draw_R - before_R) * (top_R - peak_R).exp(), _below(total_R))
        index_R = torch.searchsorted(cumulative_RV, local_R[:, None], right=True)[:, 0]
        tokens_R = torch.where(inside_R, start + index_R, tokens_R)
    if ranks > 1:
        dist.all_reduce(tokens_R, op=dist.ReduceOp.MAX, group=group)
    return tokens_R


def _below(tensor: torch.Tensor) -> torch.Tensor:
    """The next smaller number of each (they are positive, or zero)."""
    return torch.nextafter(tensor, torch.zeros_like(tensor))


def _gather(tensor: torch.Tensor, ranks: int, group) -> torch.Tensor:
    if ranks == 1:
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(ranks)]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.stack(parts)


def _truncate(logits_RV: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
    """Columns outside top-k, then outside top-p, get probability zero."""
    if options.top_k:
        kth_R1 = logits_RV.topk(min(options.top_k, logits_RV.shape[-1]), dim=-1).values[:, -1:]
        logits_RV = logits_RV.masked_fill(logits_RV < kth_R1, float("-inf"))
    if options.top_p < 1.0:
        ordered_RV, order_RV = logits_RV.sort(dim=-1, descending=True)
        probs_RV = ordered_RV.softmax(dim=-1)
        beyond_RV = probs_RV.cumsum(dim=-1) - probs_RV >= options.top_p
        logits_RV = logits_RV.masked_fill(torch.zeros_like(beyond_RV).scatter(1, order_RV, beyond_RV), float("-inf"))
    return logits_RV


class PipelineForward:
    """One forward pass of a packed row through all pipeline stages, without gradients: logits on the last stage.

    Args:
        chunks: this rank's model chunks as Megatron's schedules take them (DDP-wrapped or not), one per virtual stage.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], config):
        self.chunks = chunks
        self.config = config
        self.group = parallel_state.get_pipeline_model_parallel_group()
        self.size = parallel_state.get_pipeline_model_parallel_world_size()
        self.rank = parallel_state.get_pipeline_model_parallel_rank()
        self.last_stage = self.rank == self.size - 1

    def __call__(self, tokens_1S, positions_1S, attention, select_T) -> torch.Tensor | None:
        ranks = dist.get_process_group_ranks(self.group)
        shards = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        shape = (tokens_1S.shape[1] // shards, 1, self.config.hidden_size)
        stages = len(self.chunks) * self.size
        out = None
        for index, chunk in enumerate(self.chunks):
            stage = index * self.size + self.rank
            if stage > 0:
                hidden = torch.empty(shape, dtype=self.config.pipeline_dtype, device=tokens_1S.device)
                dist.recv(hidden, ranks[self.rank - 1], group=self.group)
                _unwrap(chunk).set_input_tensor(hidden)
            out = chunk(tokens_1S, positions_1S, attention, select_T)
            if stage < stages - 1:
                dist.send(out.contiguous(), ranks[(self.rank + 1) % self.size], group=self.group)
        return out if self.last_stage else None

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        """The last stage's tensor on every stage (in place)."""
        if self.size > 1:
            dist.broadcast(tensor, dist.get_process_group_ranks(self.group)[-1], group=self.group)
        return tensor


def _unwrap(chunk: torch.nn.Module) -> torch.nn.Module:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


class Sampler:
    """Samples groups from the model as it stands.

    Args:
        chunks, config: the model's chunks on this rank and its config.
        tokenizer: gives the end token and turns ids into text.
        options: what to sample.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], config, tokenizer, options: SamplingOptions):
        self.forward = PipelineForward(chunks, config)
        self.tokenizer = tokenizer
        self.options = options
        self.end = tokenizer.eos_token_id
        self.real_vocab_size = config.vocab_size
        self.pad_multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Prompt],
        seed: int,
        iteration: int,
        on_outputs: Callable[[int], None] = lambda count: None,
    ) -> list[Group]:
        """n outputs for each prompt, with ``proposal_logprob`` and ``policy_logprob`` filled in.

        All ranks of a model-parallel group call it with the same prompts and get the same groups; ``on_outputs`` is
        told how many outputs have ended since its last call.
        """
        modes = [chunk.training for chunk in self.forward.chunks]
        for chunk in self.forward.chunks:
            chunk.eval()
        groups = []
        for batch in self._batches(prompts):
            groups += self._sample_batch(batch, seed, iteration, on_outputs)
        for chunk, mode in zip(self.forward.chunks, modes, strict=True):
            chunk.train(mode)
        return groups

    def _batches(self, prompts: Sequence[Prompt]) -> Iterator[Sequence[Prompt]]:
        size = max(1, self.options.rows_in_flight // self.options.outputs)
        for start in range(0, len(prompts), size):
            yield prompts[start : start + size]

    def _sample_batch(self, prompts, seed, iteration, on_outputs) -> list[Group]:
        n, limit = self.options.outputs, self.options.max_new_tokens
        draws = np.stack([uniforms(seed, iteration, p.id, i, limit) for p in prompts for i in range(n)])
        draws_RL = torch.from_numpy(draws).to(self.device)
        rows = len(draws)
        lengths = [len(prompt.token_ids) for prompt in prompts]
        prompt_length_R = torch.tensor(lengths, device=self.device).repeat_interleave(n)
        tokens_RL = torch.full((rows, limit), self.end, device=self.device)
        length_R = torch.full((rows,), limit, device=self.device)
        logprobs_2R = torch.zeros(2, rows, dtype=torch.float64, device=self.device)
        active = torch.arange(rows, device=self.device)  # the rows that are in the cache, in its order
        running = torch.ones(rows, dtype=torch.bool, device=self.device)
        reported = 0
        cache = KVCache(lengths, n, self.device)

        logits = self._prefill(prompts, lengths, cache)
        for step in range(limit):
            if step > 0:
                logits = self._decode(tokens_RL[active, step - 1], prompt_length_R[active] + step - 1, cache)
            tokens_R = torch.zeros(len(active), dtype=torch.int64, device=self.device)
            if self.forward.last_stage:
                if step == 0:
                    logits = logits.repeat_interleave(n, dim=0)
                tokens_R, logprobs = self._draw(logits, draws_RL[active, step])
                logprobs_2R[:, active] += logprobs * running[active]
            self.forward.share(tokens_R)
            tokens_RL[active, step] = tokens_R
            ended = active[(tokens_R == self.end) & running[active]]
            length_R[ended] = step + 1
            running[ended] = False
            still = int(running.sum())
            on_outputs(rows - still - reported)
            reported = rows - still
            if not still:
                break
            # Finished rows leave the batch, once enough of them have ended to pay for moving the cache.
            if still <= 0.875 * len(active):
                keep = running[active].nonzero()[:, 0]
                cache.keep(keep)
                active = active[keep]
        self.forward.share(logprobs_2R)
        on_outputs(rows - reported)
        return self._groups(prompts, tokens_RL, length_R, ~running, logprobs_2R)

    def _draw(self, logits_RV, uniforms_R) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [R], and their log-probs [2, R] under the sampled law and under the model at temperature 1."""
        options, group = self.options, parallel_state.get_tensor_model_parallel_group()
        if group.size() == 1:
            group = None
        law_RV, law_group = logits_RV / options.temperature, group
        if options.truncated:
            shards = _gather(law_RV, 1 if group is None else group.size(), group)
            law_RV, law_group = _truncate(torch.cat(list(shards), dim=-1)[:, : self.real_vocab_size], options), None
        tokens_R = draw_tokens(law_RV, uniforms_R, self.real_vocab_size, law_group)
        logprobs = [
            vocab_parallel_logprobs(values, tokens_R, tp_group=over, real_vocab_size=self.real_vocab_size)
            for values, over in ((law_RV, law_group), (logits_RV, group))
        ]
        return tokens_R, torch.stack(logprobs).double()

    def _prefill(self, prompts, lengths, cache) -> torch.Tensor | None:
        """The prompts as one packed row; logits [G, V] after each prompt's last token."""
        tokens = [token for prompt in prompts for token in prompt.token_ids]
        positions = [position for length in lengths for position in range(length)]
        last_T = torch.tensor(lengths, device=self.device).cumsum(0) - 1
        return self._run(torch.tensor(tokens), torch.tensor(positions), cache, last_T)

    def _decode(self, tokens_R, positions_R, cache) -> torch.Tensor | None:
        """One more token for each active row; logits [R, V]."""
        return self._run(tokens_R, positions_R, cache, torch.arange(len(tokens_R), device=self.device))

    def _run(self, tokens, positions, cache, select_T) -> torch.Tensor | None:
        padding = -len(tokens) % self.pad_multiple
        tokens, positions = (
            torch.nn.functional.pad(t, (0, padding))[None].to(self.device) for t in (tokens, positions)
        )
        logits = self.forward(tokens, positions, cache, select_T)
        cache.advance()
        return logits

    def _groups(self, prompts, tokens_RL, length_R, ended_R, logprobs_2R) -> list[Group]:
        n = self.options.outputs
        tokens, lengths, ended = tokens_RL.tolist(), length_R.tolist(), ended_R.tolist()
        sampled, plain = logprobs_2R.tolist()
        outputs = []
        for row, length in enumerate(lengths):
            ids = tokens[row][:length]
            text = self.tokenizer.decode(ids[: length - ended[row]], skip_special_tokens=False)
            outputs.append(Output(ids, text, ended[row], proposal_logprob=sampled[row], policy_logprob=plain[row]))
        return [Group(prompt, outputs[i * n : (i + 1) * n]) for i, prompt in enumerate(prompts)]
