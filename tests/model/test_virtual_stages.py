"""Virtual pipeline stages: each gets the hidden states and the gradients of the micro-batch that it works on.

Every message carries its sender and its micro-batch as its value, and ranks are late at random.
"""

from __future__ import annotations

import random
import time

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func, p2p_communication
from megatron.core.transformer.transformer_config import TransformerConfig
from ranks import run_ranks

from nemo_brain.model.passes import INTERLEAVED

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


def exchanged(stages: int, virtual: int, forward_only: bool, options: dict, lengths: list[int]) -> list[tuple]:
    """What a rank got that was not meant for the micro-batch it worked on, in several passes over rows of ``lengths``.

    Ranks are late with their work, and with their messages after both sides have agreed on a message's length.
    """
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(1, stages, virtual)
    config = TransformerConfig(
        num_layers=stages * virtual,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=virtual,
        pipeline_dtype=torch.float32,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        **options,
    )
    rank = dist.get_rank()
    places = [rank + stages * index for index in range(virtual)]
    chunks = [_Chunk(config, place, place == stages * virtual - 1) for place in places]
    p2p_communication._p2p_ops = _late(p2p_communication._p2p_ops)
    random.seed(rank)
    draw = random.Random(0)
    for _ in range(PASSES):
        count = stages * draw.randint(1, 4)
        batches = [(batch, draw.choice(lengths)) for batch in range(count)]

        @_late
        def step(iterator, chunk, count=count):
            batch, length = next(iterator)
            return chunk(batch, length), lambda out, **_: (out * count, batch)  # Megatron divides by the count

        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(batches) for _ in chunks],
            model=chunks,
            num_microbatches=count,
            seq_length=1,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
    return [found for chunk in chunks for found in chunk.wrong]


@pytest.mark.parametrize("forward_only", [False, True], ids=["training", "scoring"])
@pytest.mark.parametrize(("stages", "virtual"), [(2, 2), (2, 3), (4, 2)])
def test_no_micro_batch_is_taken_for_another(stages, virtual, forward_only):
    for lengths in ([4], [3, 4, 5]):
        assert run_ranks(exchanged, stages, stages, virtual, forward_only, INTERLEAVED, lengths) == [[]] * stages


def test_batched_messages_between_two_stages_are_taken_for_each_other():
    """The gradient that comes has another micro-batch's length; of one length, it would pass."""
    options = INTERLEAVED | {"overlap_p2p_comm": False, "batch_p2p_comm": True}
    with pytest.raises(AssertionError, match="Mismatch in shape: grad_output"):
        run_ranks(exchanged, 2, 2, 2, False, options, [3, 5])
