"""Passes over groups through Megatron's pipeline schedules: scoring; trainings add their own.

Shapes: G groups of the global batch, N outputs per group, E temperatures, T targets and K outputs of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_brain.core.groups import Group
from nemo_brain.core.heartbeat import heartbeat
from nemo_brain.core.packing import Chunk, MicroBatch, Plan, pack, plan
from nemo_brain.host.pipeline import run_schedule
from nemo_brain.host.send import sent
from nemo_brain.model.gpt import PackedGPTConfig


class GroupPasses:
    """Runs passes of one layout.

    Args:
        config: the model's Megatron config.
        layout: one of ``groups.LAYOUTS``.
        budget: positions per micro-batch.
    """

    def __init__(self, config: PackedGPTConfig, layout: str, budget: int) -> None:
        self.config = config
        self.layout = layout
        self.budget = budget
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")

    def logprobs(
        self,
        chunks: Sequence[torch.nn.Module],
        groups: Sequence[Group],
        temperatures: tuple[float, ...] = (1.0,),
        on_tokens: Callable[[int], None] = lambda tokens: None,
        alone: bool = False,
    ) -> torch.Tensor:
        """Log-probs of whole outputs [E, G, N] (float64, on every rank; zero where a group has no such output).

        ``alone``: only this model-parallel group takes part, with groups of its own.
        """
        planned = self._plan(groups, alone)
        modes = [chunk.training for chunk in chunks]
        for chunk in chunks:
            chunk.eval()
        with torch.no_grad():
            results = self._run(chunks, planned, groups, temperatures, _Collect(on_tokens))
        for chunk, mode in zip(chunks, modes, strict=True):
            chunk.train(mode)
        return self._collect(results, planned, groups, len(temperatures))

    def _plan(self, groups: Sequence[Group], alone: bool = False, split: bool = True) -> Plan:
        virtual = self.config.virtual_pipeline_model_parallel_size is not None
        return plan(
            groups,
            self.budget,
            self.layout,
            ranks=1 if alone else parallel_state.get_data_parallel_world_size(),
            # The interleaved schedule wants a multiple of the pipeline size.
            multiple=self.config.pipeline_model_parallel_size if virtual else 1,
            split=split,
        )

    def _pack(self, groups: Sequence[Group], chunks: Sequence[Chunk]) -> MicroBatch:
        return pack(groups, chunks, self.layout, pad_multiple=self.config.row_multiple)

    def _run(
        self,
        chunks: Sequence[torch.nn.Module],
        planned: Plan,
        groups: Sequence[Group],
        temperatures: tuple[float, ...],
        finish: Callable,
    ) -> list[torch.Tensor]:
        """Sends this rank's micro-batches through the schedule; what ``finish`` keeps of each, on the last stage."""
        mine = _mine(planned)
        batches = [self._pack(groups, members).to(self.device) for members in mine]

        def step(iterator: Iterator[MicroBatch], chunk: torch.nn.Module) -> Any:
            batch = next(iterator)
            heartbeat()
            out = chunk(
                batch.tokens_1S,
                batch.positions_1S,
                batch.layout,
                batch.target_positions_T,
                batch.targets_T,
                temperatures=temperatures,
            )
            return out, lambda logprobs_ET, **_: finish(batch, logprobs_ET)

        return run_schedule(
            chunks,
            [batch.tokens_1S.shape[1] for batch in batches],
            forward_step_func=step,
            data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
            forward_only=isinstance(finish, _Collect),
            collect_non_loss_data=isinstance(finish, _Collect),
        )

    def _collect(
        self, results: list[torch.Tensor], planned: Plan, groups: Sequence[Group], temperatures: int
    ) -> torch.Tensor:
        """The micro-batches' log-probs [E, K], gathered from all ranks into [E, G, N]."""
        outputs = max(len(group.outputs) for group in groups)
        matrix_EGN = torch.zeros(temperatures, len(groups), outputs, dtype=torch.float64, device=self.device)
        stages = parallel_state.get_pipeline_model_parallel_group()
        if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            members = [chunk for batch in _mine(planned) for chunk in batch]
            places = torch.tensor(
                [chunk.group * outputs + i for chunk in members for i in chunk.outputs], dtype=torch.long
            )
            # All at once, and without waiting for them.
            matrix_EGN.flatten(1).index_copy_(1, sent(places, self.device), torch.cat(list(results), dim=1))
            if len(planned.ranks) > 1:
                dist.all_reduce(matrix_EGN, group=parallel_state.get_data_parallel_group())
        if stages.size() > 1:
            dist.broadcast(matrix_EGN, dist.get_process_group_ranks(stages)[-1], group=stages)
        return matrix_EGN.cpu()


def _mine(planned: Plan) -> list:
    """The micro-batches of this rank; a plan for one rank is this rank's alone."""
    return planned.ranks[parallel_state.get_data_parallel_rank() if len(planned.ranks) > 1 else 0]


@dataclass
class _Collect:
    """Keeps the outputs' log-probs of a scoring pass."""

    on_tokens: Callable[[int], None]

    def __call__(self, batch: MicroBatch, logprobs_ET: torch.Tensor) -> torch.Tensor:
        self.on_tokens(batch.tokens)
        return torch.stack([batch.output_sums(logprobs_T.double()) for logprobs_T in logprobs_ET])
