"""A pipeline's stages get the hidden states and the gradients of the micro-batch that they work on, and tell each other
nothing else.

Every message carries its sender and its micro-batch as its value, and ranks are late at random.
"""

from __future__ import annotations

import random
import time

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import p2p_communication
from megatron.core.transformer.transformer_config import TransformerConfig
from ranks import run_ranks

from nemo_brain.host.options import INTERLEAVED, gpt_options
from nemo_brain.host.pipeline import run_schedule

HIDDEN = 8
PASSES = 12
LATEST = 0.004  # seconds


class _Relabel(torch.autograd.Function):
    """Notes what came, forwards and backwards, where it is not ``expected``, and sends the next label on."""

    @staticmethod
    def forward(ctx, hidden, batch, stage, wrong):
        ctx.of = batch, stage, wrong
        if (hidden != 100 * batch + stage).any():
            wrong.append(("hidden states", stage, batch))
        return torch.full_like(hidden, 100 * batch + stage + 1)

    @staticmethod
    def backward(ctx, gradient):
        batch, stage, wrong = ctx.of
        if (gradient != 100 * batch + stage + 1).any():
            wrong.append(("gradients", stage, batch))
        return torch.full_like(gradient, 100 * batch + stage), None, None, None


class _Chunk(torch.nn.Module):
    def __init__(self, config, stage: int, last: bool):
        super().__init__()
        self.config, self.stage, self.last, self.model_type = config, stage, last, None
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.wrong: list[tuple] = []

    def set_input_tensor(self, tensors) -> None:
        (self.hidden,) = tensors

    def forward(self, batch: int, length: int):
        first = self.hidden is None
        hidden = torch.full((length, 1, HIDDEN), 100.0 * batch) + self.weight if first else self.hidden
        out = _Relabel.apply(hidden, batch, self.stage, self.wrong)
        return out.sum() * (100 * batch + self.stage + 1) if self.last else out


def _late(call):
    def later(*args, **kwargs):
        time.sleep(random.random() * LATEST)
        return call(*args, **kwargs)

    return later


class _Counted:
    """Messages that this rank sends, and how often it waits for its card."""

    def __init__(self) -> None:
        self.messages = self.waits = 0
        operation, unbatched = dist.P2POp, p2p_communication._p2p_ops

        def batched(function, *args, **kwargs):
            self.messages += function is dist.isend
            return operation(function, *args, **kwargs)

        def alone(**tensors):
            self.messages += sum(tensors[name] is not None for name in ("tensor_send_prev", "tensor_send_next"))
            return unbatched(**tensors)

        def wait(*_):
            self.waits += 1

        dist.P2POp, p2p_communication._p2p_ops, torch.cuda.synchronize = batched, alone, wait


def _config(stages: int, virtual: int | None, options: dict) -> TransformerConfig:
    return TransformerConfig(
        num_layers=stages * (virtual or 1),
        hidden_size=HIDDEN,
        num_attention_heads=1,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=virtual,
        pipeline_dtype=torch.float32,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        batch_p2p_sync=gpt_options(virtual is not None, {})["batch_p2p_sync"],
        **options,
    )


def exchanged(stages: int, virtual: int | None, forward_only: bool, options: dict, lengths: list[int]) -> tuple:
    """What a rank got that was not meant for the micro-batch it worked on, in several passes over rows of ``lengths``;
    the messages of all ranks for each that was needed; and how often the rank waited for its card."""
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(1, stages, virtual)
    config = _config(stages, virtual, options)
    rank, parts = dist.get_rank(), virtual or 1
    places = [rank + stages * index for index in range(parts)]
    chunks = [_Chunk(config, place, place == stages * parts - 1) for place in places]
    counted = _Counted()
    p2p_communication._p2p_ops = _late(p2p_communication._p2p_ops)
    p2p_communication._batched_p2p_ops = _late(p2p_communication._batched_p2p_ops)
    random.seed(rank)
    draw = random.Random(0)
    needed = 0
    for _ in range(PASSES):
        count = stages * draw.randint(1, 4)
        batches = [(batch, draw.choice(lengths)) for batch in range(count)]
        needed += count * (stages * parts - 1) * (1 if forward_only else 2)

        @_late
        def step(iterator, chunk, count=count):
            batch, length = next(iterator)
            return chunk(batch, length), lambda out, **_: (out * count, batch)  # Megatron divides by the count

        run_schedule(
            chunks,
            [length for _, length in batches],
            forward_step_func=step,
            data_iterator=[iter(batches) for _ in chunks],
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
    messages = torch.tensor(counted.messages)
    dist.all_reduce(messages)
    return [found for chunk in chunks for found in chunk.wrong], messages.item() / needed, counted.waits


@pytest.mark.parametrize("forward_only", [False, True], ids=["training", "scoring"])
@pytest.mark.parametrize(("stages", "virtual"), [(2, None), (4, None), (2, 2), (2, 3), (4, 2)])
def test_no_micro_batch_is_taken_for_another_and_nothing_else_is_sent(stages, virtual, forward_only):
    options = {} if virtual is None else INTERLEAVED
    for lengths in ([4], [3, 4, 5]):
        found = run_ranks(exchanged, stages, stages, virtual, forward_only, options, lengths)
        assert found == [([], 1.0, 0)] * stages


def _a_stage_in_error() -> str:
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(1, 2)
    config = _config(2, None, {})
    rank = dist.get_rank()
    chunk = _Chunk(config, rank, rank == 1)

    def step(iterator, chunk):
        return chunk(0, next(iterator)), lambda out, **_: (out, 0)

    try:
        run_schedule([chunk], [5], forward_step_func=step, data_iterator=iter([4]), forward_only=True)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_a_stage_that_would_send_something_else_than_is_due_says_so():
    first, second = run_ranks(_a_stage_in_error, 2)
    assert first == f"a stage is about to send [4, 1, {HIDDEN}] where [5, 1, {HIDDEN}] is due"
    assert "losed" in second or "reset" in second  # connection
