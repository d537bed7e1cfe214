"""Passes over groups through Megatron's pipeline schedules: scoring, and BRAIn's forward-backward by both exact routes.

Shapes: G groups of the global batch, N outputs per group, E temperatures, T targets and K outputs of a micro-batch.

- one pass: every group lies in one micro-batch; its coefficients c = d loss / d log q come from that micro-batch.
- two pass: groups are spread over micro-batches or data-parallel ranks; a pass without gradients collects log q first,
  every rank computes the same coefficients, and the second pass backpropagates sum c_i log q_i.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from nemo_brain.groups import Group, MicroBatch, Plan, chunk_tokens, output_matrix, pack, plan
from nemo_brain.objectives import Objective, ObjectiveOutput, coefficients
from nemo_brain.pulse import beat


@dataclass
class Scores:
    """What an objective needs besides log q, as matrices [G, N] (float64; mask bool, True where an output counts)."""

    prior_logprobs_GN: torch.Tensor
    proposal_logprobs_GN: torch.Tensor
    rewards_GN: torch.Tensor
    mask_GN: torch.Tensor

    @classmethod
    def of(cls, groups: Sequence[Group], keep_truncated: bool) -> Scores:
        """Collects the groups' scores. Outputs whose reward is not finite are masked, and those without an end token
        unless ``keep_truncated``."""
        matrices = [output_matrix(groups, name) for name in ("prior_logprob", "proposal_logprob", "reward")]
        mask_GN = torch.zeros(matrices[0].shape, dtype=torch.bool)
        for g, group in enumerate(groups):
            for i, output in enumerate(group.outputs):
                mask_GN[g, i] = (keep_truncated or output.ended) and math.isfinite(output.reward)
        return cls(*matrices, mask_GN)

    def rows(self, groups: Sequence[int]) -> dict[str, torch.Tensor]:
        """The objective's keyword arguments for some of the groups."""
        return {name: matrix[list(groups)] for name, matrix in vars(self).items()}


@dataclass
class StepResult:
    """A training pass's outcome, the same on every rank: log q [G, N] before the step, the objective's output on the
    whole global batch, and the number of row positions that it took (over all ranks, without padding)."""

    policy_logprobs_GN: torch.Tensor
    objective: ObjectiveOutput
    tokens: int


class GroupPasses:
    """Runs passes of one layout.

    Args:
        config: the model's Megatron config.
        layout: one of ``groups.LAYOUTS``.
        budget: positions per micro-batch.
    """

    def __init__(self, config, layout: str, budget: int):
        self.config = config
        self.layout = layout
        self.budget = budget
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"

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

    def train(
        self,
        chunks: Sequence[torch.nn.Module],
        groups: Sequence[Group],
        scores: Scores,
        objective: Objective,
        policy_logprobs_GN: torch.Tensor | None = None,
    ) -> StepResult:
        """Accumulates the gradient of the mean loss over the groups into the chunks' gradient buffers.

        Args:
            policy_logprobs_GN: log q if it is known from the training kernels and the weights have not changed since;
                the two-pass route then needs no pass to collect it.
        """
        planned = self._plan(groups)
        known = None
        if not planned.whole:
            known = self.logprobs(chunks, groups)[0] if policy_logprobs_GN is None else policy_logprobs_GN
            known, _ = coefficients(objective, known, **vars(scores))
        # Megatron averages over micro-batches and data-parallel ranks; ours is a mean over the groups of the batch.
        scale = len(planned.ranks[0]) * len(planned.ranks) / len(groups)
        loss = _Loss(objective, scores, known, scale)
        results = self._run(chunks, planned, groups, (1.0,), loss)
        policy_logprobs_GN = self._collect(results, planned, groups, 1)[0]
        _, output = coefficients(objective, policy_logprobs_GN, **vars(scores))
        members = [chunk for rank in planned.ranks for batch in rank for chunk in batch]
        tokens = sum(chunk_tokens(groups[chunk.group], chunk.outputs, self.layout) for chunk in members)
        return StepResult(policy_logprobs_GN, output, tokens)

    def _plan(self, groups: Sequence[Group], alone: bool = False) -> Plan:
        virtual = self.config.virtual_pipeline_model_parallel_size is not None
        return plan(
            groups,
            self.budget,
            self.layout,
            ranks=1 if alone else parallel_state.get_data_parallel_world_size(),
            # The interleaved schedule wants a multiple of the pipeline size.
            multiple=self.config.pipeline_model_parallel_size if virtual else 1,
        )

    def _pack(self, groups, chunks) -> MicroBatch:
        return pack(groups, chunks, self.layout, pad_multiple=self.config.row_multiple)

    def _run(self, chunks, planned: Plan, groups, temperatures, finish: _Collect | _Loss) -> list[torch.Tensor]:
        """Sends this rank's micro-batches through the schedule; what ``finish`` keeps of each, on the last stage."""
        mine = _mine(planned)
        batches = [self._pack(groups, members).to(self.device) for members in mine]

        def step(iterator, chunk):
            batch = next(iterator)
            beat()
            out = chunk(
                batch.tokens_1S,
                batch.positions_1S,
                batch.layout,
                batch.target_positions_T,
                batch.targets_T,
                temperatures=temperatures,
            )
            return out, lambda logprobs_ET, **_: finish(batch, logprobs_ET)

        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
            model=list(chunks),
            num_microbatches=len(mine),
            seq_length=self.budget,
            micro_batch_size=1,
            forward_only=isinstance(finish, _Collect),
            collect_non_loss_data=isinstance(finish, _Collect),
        )

    def _collect(self, results: list[torch.Tensor], planned: Plan, groups, temperatures: int) -> torch.Tensor:
        """The micro-batches' log-probs [E, K], gathered from all ranks into [E, G, N]."""
        outputs = max(len(group.outputs) for group in groups)
        matrix_EGN = torch.zeros(temperatures, len(groups), outputs, dtype=torch.float64, device=self.device)
        stages = parallel_state.get_pipeline_model_parallel_group()
        if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            for members, logprobs_EK in zip(_mine(planned), results, strict=True):
                rows = [(chunk.group, index) for chunk in members for index in chunk.outputs]
                if rows:
                    g, i = zip(*rows, strict=True)
                    matrix_EGN[:, list(g), list(i)] = logprobs_EK
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


@dataclass
class _Loss:
    """The loss of a micro-batch, sum c_i log q_i. ``known_GN``: the coefficients where they are known in advance."""

    objective: Objective
    scores: Scores
    known_GN: torch.Tensor | None
    scale: float

    def __call__(self, batch: MicroBatch, logprobs_ET: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs_K = batch.output_sums(logprobs_ET[0].double())
        detached_K = logprobs_K.detach()
        groups = [group for group, _ in batch.rows]
        outputs = [output for _, output in batch.rows]
        if self.known_GN is not None:
            coefficients_K = self.known_GN[groups, outputs]
        else:
            present = sorted(set(groups))
            places = [present.index(group) for group in groups]
            policy_GN = torch.zeros(len(present), self.scores.mask_GN.shape[1], dtype=torch.float64)
            policy_GN[places, outputs] = detached_K.cpu()
            coefficients_GN, _ = coefficients(self.objective, policy_GN, **self.scores.rows(present))
            coefficients_K = coefficients_GN[places, outputs]
        loss = (coefficients_K.to(logprobs_K.device) * logprobs_K).sum() * self.scale
        return loss, detached_K[None]
