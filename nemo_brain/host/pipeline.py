"""Messages between a pipeline's stages whose lengths both sides know, so that none has to be asked for.

Rows differ in length. Megatron's stages tell each other the shape of every message in a message of its own, and wait
for the card to read it; but every stage has the same micro-batches in hand, and knows the order of its schedule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config


def run_schedule(chunks: Sequence[torch.nn.Module], lengths: Sequence[int], **arguments: Any) -> list[Any]:
    """Megatron's forward and backward passes over micro-batches of one row each; what the last stage keeps.

    Args:
        chunks: this rank's parts of the model, whose configuration has ``variable_seq_lengths``.
        lengths: positions of every micro-batch, the same on all stages.
        arguments: of Megatron's function, the others.

    Raises:
        RuntimeError: a stage is about to send something of another length than ``lengths`` say, and with it the next.
    """
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        arguments["p2p_communicator"] = _KnownLengths(get_model_config(chunks[0]), lengths)
        arguments["pg_collection"] = ProcessGroupCollection.use_mpu_process_groups()
    arguments |= dict(num_microbatches=len(lengths), seq_length=max(lengths, default=0), micro_batch_size=1)
    kept: list[Any] = get_forward_backward_func()(model=list(chunks), **arguments)
    return kept


class _KnownLengths(P2PCommunicator):
    def __init__(self, config: ModelParallelConfig, lengths: Sequence[int]) -> None:
        super().__init__(parallel_state.get_pipeline_model_parallel_group(), config)
        rank, stages = self.pp_group.rank(), self.pp_group.size()
        virtual = config.virtual_pipeline_model_parallel_size or 1
        table: list[tuple[int, int]] = get_schedule_table(
            len(lengths), virtual, config.microbatch_group_size_per_vp_stage or stages
        )
        shards = config.tensor_model_parallel_size if config.sequence_parallel else 1

        def forward_from(sender: int) -> Iterator[list[int]]:
            """Shapes of the hidden states that a rank sends; its last part of the model has none to send."""
            return shapes([batch for batch, part in table if sender < stages - 1 or part < virtual - 1])

        def backward_from(sender: int) -> Iterator[list[int]]:
            """Of the gradients, for which the parts take their turns from the last on."""
            return shapes([batch for batch, part in table if sender > 0 or part < virtual - 1])

        def shapes(batches: list[int]) -> Iterator[list[int]]:
            return iter([[lengths[batch] // shards, 1, config.hidden_size] for batch in batches])

        self._from_prev, self._from_next = forward_from((rank - 1) % stages), backward_from((rank + 1) % stages)
        self._to_next, self._to_prev = forward_from(rank), backward_from(rank)

    def _communicate_shapes(
        self,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[list[int], list[int]]:
        """The shapes of what comes; in Megatron's class the others are asked."""
        for tensor, expected in ((tensor_send_next, self._to_next), (tensor_send_prev, self._to_prev)):
            if tensor is not None and list(tensor.shape) != (shape := next(expected, None)):
                raise RuntimeError(f"a stage is about to send {list(tensor.shape)} where {shape} is due")
        nothing = [0, 0, 0]
        return next(self._from_prev) if recv_prev else nothing, next(self._from_next) if recv_next else nothing
