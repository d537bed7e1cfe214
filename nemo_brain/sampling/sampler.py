"""Sampling n outputs per prompt from a Megatron GPT on tensor- and pipeline-parallel ranks, with continuous batching.

Shapes: R rows (outputs in flight), G new prompts, V vocabulary columns of this rank, S positions of a row.

A prompt is computed once for its n outputs. When rows end, the next prompt's rows take their places at once: one pass
computes its prompt and a token of every other row together. With pipeline parallelism the rows are divided into as many
lanes as there are ranks in the pipeline, and each rank works on another lane, so that none waits.

Every draw is one uniform number keyed by (seed, iteration, prompt id, output index, position) and turned into a token
by the inverse of the cumulative distribution over the whole vocabulary, so every layout samples the same outputs.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from transformers import PreTrainedTokenizerFast

from nemo_brain.core.first_use import working
from nemo_brain.core.groups import Prompt, SampledGroup
from nemo_brain.core.heartbeat import heartbeat
from nemo_brain.core.logprobs import vocab_parallel_logprobs
from nemo_brain.data.stop import Stop
from nemo_brain.host.send import sent
from nemo_brain.model.gpt import PackedGPTConfig
from nemo_brain.model.parameters import unwrap
from nemo_brain.sampling.draws import draw_tokens, gather, truncate, uniforms
from nemo_brain.sampling.kv_cache import KVCache
from nemo_brain.sampling.lanes import Kept, Lane, OpenGroup, Pass, Row

_STOP_TICKS = 16  # between two questions whether to stop
_STEPS = {"cpu": 1, "cuda": 16}  # tokens of every row between two looks at them


@dataclass(frozen=True)
class SamplingOptions:
    """What is sampled: outputs that end as ``stop`` says. ``top_k`` (0: all) and ``top_p`` (1: all) truncate the law;
    log q' is then that law's.

    How: ``rows_in_flight`` outputs at a time (at least one group's, for each lane), of which new prompts bring at most
    ``prefill_tokens`` positions into one pass (or one prompt). ``steps``: tokens that every row gets before the host
    looks at any, where no prompt joins and there is no pipeline (None: 16 with CUDA, 1 otherwise); what rows get after
    their end is left out.
    """

    outputs: int
    max_new_tokens: int
    stop: Stop
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    rows_in_flight: int = 256
    prefill_tokens: int = 4096
    steps: int | None = None

    @property
    def truncated(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0


def kernel_usable(device: torch.device, config: PackedGPTConfig) -> bool:
    """Whether the attention of what is behind the prompts can be that of ``decode_kernels``."""
    per_kv = config.num_attention_heads // (config.num_query_groups or config.num_attention_heads)
    return device.type == "cuda" and _kernel_works(device, config.params_dtype, per_kv, config.kv_channels)


@functools.cache
def _kernel_works(*case: Any) -> bool:
    name, otherwise = "nemo_brain.sampling.decode_kernels", "attention in sampling goes by products"
    return working(name, lambda kernels: kernels.problem(*case), otherwise) is not None


class Sampler:
    """Samples groups from the model as it stands.

    Args:
        chunks: this rank's model chunks as Megatron's schedules take them (DDP-wrapped or not), one per virtual stage.
        config: the model's config.
        tokenizer: turns ids into text.
        options: what to sample.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        config: PackedGPTConfig,
        tokenizer: PreTrainedTokenizerFast,
        options: SamplingOptions,
    ) -> None:
        self.chunks = chunks
        self.config = config
        self.tokenizer = tokenizer
        self.options = options
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        self._pipeline = parallel_state.get_pipeline_model_parallel_group()
        self._rank, self._size = self._pipeline.rank(), self._pipeline.size()
        self._last_stage = len(chunks) * self._size - 1
        tensor_parallel = parallel_state.get_tensor_model_parallel_group()
        self._tensor_parallel = tensor_parallel if tensor_parallel.size() > 1 else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._records = torch.cuda.is_available()
        self._most_steps = options.steps or _STEPS[torch.device(self.device).type]
        self._kernel = kernel_usable(torch.device(self.device), config)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Prompt],
        seed: int,
        iteration: int,
        on_outputs: Callable[[int], None] = lambda count: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[int, SampledGroup]]:
        """n outputs for each prompt, with their ``proposal_logprobs`` and ``policy_logprobs``.

        All ranks of a model-parallel group call it with the same prompts and go through it to the end; they get the
        same groups in the same order.

        Args:
            on_outputs: is told how many outputs have ended since its last call.
            stop: asked now and then, on all ranks at the same point; where it says so, sampling ends there, with groups
                missing.

        Yields:
            The place of a prompt in ``prompts`` and its group, as soon as the group's last output has ended.

        Raises:
            ValueError: the logits of an output are not finite (other than by -inf, probability zero); on all of these
                ranks.
        """
        modes = [chunk.training for chunk in self.chunks]
        for chunk in self.chunks:
            chunk.eval()
        try:
            waiting = deque(OpenGroup(index, prompt) for index, prompt in enumerate(prompts))
            for tick, ended in enumerate(self._ticks(waiting, seed, iteration)):
                heartbeat()
                on_outputs(len(ended))
                if tick % _STOP_TICKS == 0 and stop():
                    return
                for row in ended:
                    rows = row.group.ended
                    rows[row.output] = row
                    if len(rows) == self.options.outputs:
                        yield row.group.index, self._sampled(row.group.prompt, [rows[i] for i in range(len(rows))])
        finally:
            self._graph = None  # and its memory
            for chunk, mode in zip(self.chunks, modes, strict=True):
                chunk.train(mode)

    def _ticks(self, waiting: deque[OpenGroup], seed: int, iteration: int) -> Iterator[list[Row]]:
        """Every rank's clock: in one tick each rank runs one chunk on one lane. Yields the rows that ended in it."""
        lanes = [Lane(KVCache(self.device)) for _ in range(self._size)]
        groups = max(1, self.options.rows_in_flight // self.options.outputs)
        # A few prompts are divided evenly over the lanes.
        rows = self.options.outputs * max(1, min(groups // self._size, -(-len(waiting) // self._size)))
        tick = 0
        while waiting or any(lane.rows or lane.current is not None for lane in lanes):
            # Passes of lane i start at ticks i, i + size, ...: so two lanes never meet on a rank.
            lane = lanes[tick % self._size]
            if lane.current is None:
                admitted = self._admit(lane, waiting, rows)
                steps, most = self._steps_of(lane), self._most_steps if self._kernel else 0
                lane.begin(admitted, self.options.outputs, self.config.row_multiple, steps, most)
            yield self._tick(lanes, seed, iteration)
            tick += 1

    def _admit(self, lane: Lane, waiting: deque[OpenGroup], rows: int) -> list[OpenGroup]:
        """Takes prompts from those that wait, as long as the lane has places for all outputs of one."""
        admitted: list[OpenGroup] = []
        positions = 0
        while waiting and len(lane.rows) + (len(admitted) + 1) * self.options.outputs <= rows:
            positions += len(waiting[0].prompt.token_ids)
            if admitted and positions > self.options.prefill_tokens:
                break
            admitted.append(waiting.popleft())
        return admitted

    def _steps_of(self, lane: Lane) -> int:
        """How many tokens the lane's rows get at once: no more than one of them may still get."""
        if self._size > 1 or not lane.rows:
            return 1
        return min(self._most_steps, max(self.options.max_new_tokens - len(row.tokens) for row in lane.rows))

    def _tick(self, lanes: list[Lane], seed: int, iteration: int) -> list[Row]:
        running = [lane.current for lane in lanes if lane.current is not None]
        if running and running[0].steps > 1:
            return self._decode(running[0])
        mine = next((pass_ for pass_ in running if pass_.stage % self._size == self._rank), None)
        out = None
        if mine is not None:
            chunk = self.chunks[mine.stage // self._size]
            if mine.stage > 0:
                unwrap(chunk).set_input_tensor(mine.hidden)
            out = chunk(mine.tokens_1S, mine.positions_1S, mine.lane.cache, mine.select_T)
        self._exchange(running, mine, out)
        ended = []
        for pass_ in running:
            if pass_.stage == self._last_stage:
                ended = self._end(pass_, out if pass_ is mine else None, seed, iteration)
            else:
                pass_.stage += 1
        return ended

    def _exchange(self, running: list[Pass], mine: Pass | None, out: torch.Tensor | None) -> None:
        """Hidden states go on to the next rank, each rank sending and receiving at the same time."""
        ranks = dist.get_process_group_ranks(self._pipeline)
        operations = []
        if mine is not None and out is not None and mine.stage < self._last_stage:
            following = ranks[(self._rank + 1) % self._size]
            operations.append(dist.P2POp(dist.isend, out.contiguous(), following, self._pipeline))
        for pass_ in running:
            if pass_.stage < self._last_stage and (pass_.stage + 1) % self._size == self._rank:
                shards = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
                shape = (pass_.tokens_1S.shape[1] // shards, 1, self.config.hidden_size)
                pass_.hidden = torch.empty(shape, dtype=self.config.pipeline_dtype, device=self.device)
                operations.append(dist.P2POp(dist.irecv, pass_.hidden, ranks[self._rank - 1], self._pipeline))
        if operations:
            for request in dist.batch_isend_irecv(operations):
                request.wait()

    def _end(self, pass_: Pass, logits: torch.Tensor | None, seed: int, iteration: int) -> list[Row]:
        """A token for each of the lane's rows, from the logits on the last stage. Returns the rows that ended."""
        options, lane = self.options, pass_.lane
        new_rows = [
            Row(group, i, uniforms(seed, iteration, group.prompt.id, i, options.max_new_tokens))
            for group in pass_.new
            for i in range(options.outputs)
        ]
        rows = [*lane.rows, *new_rows]
        drawn_3R = torch.empty(3, len(rows), dtype=torch.float64, device=self.device)
        if logits is not None:
            if new_rows:
                # The prompts' logits come first; each serves all of its group's rows.
                news = torch.arange(len(pass_.new)).repeat_interleave(options.outputs)
                places = torch.cat([torch.arange(len(lane.rows)) + len(pass_.new), news])
                logits = logits.index_select(0, sent(places, self.device))
            drawn_3R = self._draw(logits, self._uniforms(rows, 1)[0])
        if self._size > 1:
            dist.broadcast(drawn_3R, dist.get_process_group_ranks(self._pipeline)[-1], group=self._pipeline)
        lane.end(new_rows)
        return self._take(lane, drawn_3R[None])

    def _decode(self, pass_: Pass) -> list[Row]:
        """As many tokens for each of the lane's rows as the pass has steps, and no look at any of them meanwhile."""
        lane, rows, kept = pass_.lane, pass_.lane.rows, pass_.kept
        uniforms_KR = self._uniforms(rows, pass_.steps)
        if kept is None:
            drawn_K3R = torch.empty(pass_.steps, 3, len(rows), dtype=torch.float64, device=self.device)
            k_1 = torch.zeros(1, dtype=torch.int64, device=self.device)
        else:
            kept.uniforms_KR[: pass_.steps, : len(rows)] = uniforms_KR
            uniforms_KR, drawn_K3R, k_1 = kept.uniforms_KR, kept.drawn_K3R, kept.k_1.zero_()
        count = drawn_K3R.shape[2]
        tokens_R, positions_R = pass_.tokens_1S[0, :count], pass_.positions_1S[0, :count]

        def step() -> None:
            logits_RV = self.chunks[0](pass_.tokens_1S, pass_.positions_1S, lane.cache, pass_.select_T)
            drawn_3R = self._draw(logits_RV, uniforms_KR.index_select(0, k_1)[0])
            drawn_K3R.index_copy_(0, k_1, drawn_3R[None])
            tokens_R.copy_(drawn_3R[0].clamp(min=0))
            # Rows that go on after their end may come to the end of the model's positions.
            positions_R.add_(1).clamp_(max=self.config.seq_length - 1)
            k_1.add_(1)
            lane.cache.advance()

        self._repeat(step, pass_.steps, kept, lane.cache.moves)
        lane.end([])
        return self._take(lane, drawn_K3R[: pass_.steps, :, : len(rows)])

    def _repeat(self, step: Callable[[], None], times: int, kept: Kept | None, moves: int) -> None:
        """Calls ``step``, which always does the same to the same tensors and reads nothing of them.

        With CUDA the second call is recorded in a graph instead, which is replayed: one launch for each step. With
        ``kept`` tensors it is replayed from then on, until the cache's buffers are others.
        """
        if kept is not None and kept.graph is not None and kept.moves == moves:
            for _ in range(times):
                kept.graph.replay()
            return
        if not self._records or times < (3 if kept is None else 2):
            for _ in range(times):
                step()
            return
        step()  # what is made at the first use must not be made in the graph
        graph = self._recorded(step)
        if kept is not None:
            kept.graph, kept.moves = graph, moves
        for _ in range(times - 1):
            graph.replay()

    def _recorded(self, step: Callable[[], None]) -> Any:
        graph, stream, current = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            # Memory of the last graph's. Other threads, a reward's for one, may go on using the device.
            graph.capture_begin(None if self._graph is None else self._graph.pool(), "thread_local")
            step()
            graph.capture_end()
        current.wait_stream(stream)
        self._graph = graph
        return graph

    def _uniforms(self, rows: Sequence[Row], steps: int) -> torch.Tensor:
        """The rows' next draws [steps, R] float64, the last one again where there are no more."""
        last = self.options.max_new_tokens - 1
        draws = [[row.draws[min(len(row.tokens) + k, last)] for row in rows] for k in range(steps)]
        return sent(torch.tensor(draws, dtype=torch.float64), self.device)

    def _take(self, lane: Lane, drawn_K3R: torch.Tensor) -> list[Row]:
        """The rows' next tokens, each row's up to its end. Takes the rows that have ended out, and returns them."""
        ended = []
        for place, (row, drawn_3K) in enumerate(zip(lane.rows, drawn_K3R.permute(2, 1, 0).tolist(), strict=True)):
            for token, sampled, plain in zip(*drawn_3K, strict=True):
                if token < 0:  # every rank has it
                    raise ValueError(
                        f"the model's logits are not finite (NaN, or infinite) after {len(row.tokens)} tokens of "
                        f"output {row.output} to the prompt {row.group.prompt.id!r}: its weights are damaged, or have "
                        "diverged (look at model.restore_from, or lower optim.lr)"
                    )
                row.tokens.append(int(token))
                row.proposal_logprob += sampled
                row.policy_logprob += plain
                full = len(row.tokens) == self.options.max_new_tokens
                if full or self.options.stop.ended(self.tokenizer, row.tokens):
                    ended.append(place)
                    break
        rows = [lane.rows[place] for place in ended]
        lane.drop(ended)
        return rows

    def _draw(self, logits_RV: torch.Tensor, uniforms_R: torch.Tensor) -> torch.Tensor:
        """Tokens, and their log-probs under the sampled law and under the model at temperature 1: [3, R] float64."""
        options, group, vocab_size = self.options, self._tensor_parallel, self.config.vocab_size
        if options.truncated:
            whole_RV = torch.cat(list(gather(logits_RV, group)), dim=-1)[:, :vocab_size] / options.temperature
            law_RV = truncate(whole_RV, options.top_k, options.top_p)
            tokens_R, sampled_R = draw_tokens(law_RV, uniforms_R, vocab_size)
        else:
            tokens_R, sampled_R = draw_tokens(logits_RV, uniforms_R, vocab_size, group, options.temperature)
            if options.temperature == 1.0:
                return torch.stack([tokens_R.double(), sampled_R, sampled_R])
        targets_R = tokens_R.clamp(min=0)  # no token was drawn where there is no law
        plain_R = vocab_parallel_logprobs(logits_RV, targets_R, tp_group=group, real_vocab_size=vocab_size)
        return torch.stack([tokens_R.double(), sampled_R, plain_R.double()])

    def _sampled(self, prompt: Prompt, rows: Sequence[Row]) -> SampledGroup:
        return SampledGroup(
            prompt,
            [self.options.stop.output(self.tokenizer, row.tokens) for row in rows],
            proposal_logprobs=[row.proposal_logprob for row in rows],
            policy_logprobs=[row.policy_logprob for row in rows],
        )
