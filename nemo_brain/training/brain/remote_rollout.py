"""Groups from an inference server for all ranks of a run: new weights for the server, its answers for the ranks.

The first rank of each data-parallel replica asks the server for the replica's share. While the server works on the
rest, the replica's ranks score what has come with the prior.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from nemo.collections.llm.gpt.model.base import GPTConfig

from nemo_brain.config.brain import RemoteConfig
from nemo_brain.convert.export import export_model
from nemo_brain.core.groups import Prompt, SampledGroup
from nemo_brain.core.interruption import Interruption
from nemo_brain.core.packing import chunk_tokens
from nemo_brain.core.ranks import on_first_rank
from nemo_brain.data.stop import Stop
from nemo_brain.model.weights import Weights
from nemo_brain.sampling.remote import RemoteSampler
from nemo_brain.sampling.sampler import SamplingOptions
from nemo_brain.sampling.server import Server
from nemo_brain.training.brain.strategy import BRAInStrategy
from nemo_brain.training.build import export_for

_EXPORT_KEY = "rollout.remote.export_to"


class RemoteRollout:
    """Samples from the server of ``rollout.remote``.

    Args:
        config: that section.
        gpt, weights: of the policy.
        stop: what ends its outputs.
        layout: of the rows in which the prior scores what the server has sampled.
        block: so many row positions are scored at a time.

    Raises:
        ValueError: the model cannot be exported for the server, the directory for it is taken, or the API key is not
            set.
    """

    def __init__(self, config: RemoteConfig, gpt: GPTConfig, weights: Weights, stop: Stop, layout: str, block: int):
        self.config = config
        self._block = block
        self._layout = layout
        self._weights = weights
        self._export = None
        self._served: int | None = None
        Server(self.config)
        if self.config.export_to is not None:
            self._export = export_for(_EXPORT_KEY, self.config.export_to, gpt, weights, stop.token_ids)

    def refresh(self, strategy: BRAInStrategy, step: int, options: SamplingOptions, interruption: Interruption) -> None:
        """Gives the server the policy as it stands after ``step`` optimizer steps. A collective of all ranks.

        Raises:
            ValueError, OSError: on every rank, when the export or the server's reload failed.
            Interrupted: on every rank, when the run was asked to end meanwhile.
        """
        if step == self._served:
            return
        if self._export is not None:
            strategy.wait_for_param_gather()
            export_model(strategy.chunks, self._export, str(self.config.export_to))
        on_first_rank(lambda: self._sampler(options).refresh(self.config.export_to), interruption=interruption)
        self._served = step

    def sample(
        self,
        strategy: BRAInStrategy,
        prompts: Sequence[Prompt],
        options: SamplingOptions,
        seed: int,
        iteration: int,
        on_outputs: Callable[[int], None],
        stop: Callable[[], bool],
    ) -> Iterator[tuple[int, SampledGroup]]:
        """As ``Sampler.sample``, with ``prior_logprobs`` too.

        Raises:
            ValueError: on every rank of the replica, when the server gave no usable answer.
        """
        members = parallel_state.get_model_parallel_group()
        first = members.rank() == 0
        blocks: Any = self._blocks(prompts, options, seed, iteration, on_outputs) if first else None
        with strategy.prior(alone=True) as score:
            while True:
                message: list = [None]
                if first:
                    try:
                        message = [next(blocks, None)]
                    except ValueError as error:
                        message = [error]
                if members.size() > 1:
                    dist.broadcast_object_list(message, dist.get_process_group_ranks(members)[0], group=members)
                (block,) = message
                if block is None or stop():
                    return
                if isinstance(block, ValueError):
                    raise block
                if block:
                    logprobs_GN = score([group for _, group in block], lambda tokens: None)[0].tolist()
                    for (index, group), values in zip(block, logprobs_GN, strict=True):
                        yield index, replace(group, prior_logprobs=values)

    def _blocks(
        self, prompts: Any, options: Any, seed: int, iteration: int, on_outputs: Callable[[int], None]
    ) -> Iterator[list[tuple[int, SampledGroup]]]:
        """What the server has finished, enough for a scoring pass at a time; nothing where it has to be waited for."""
        block: list[tuple[int, SampledGroup]] = []
        positions = 0
        for answer in self._sampler(options).sample(prompts, seed, iteration, on_outputs):
            if answer is None:
                yield []
                continue
            _, group = answer
            block.append(answer)
            positions += chunk_tokens(group, range(len(group.outputs)), self._layout)
            if positions >= self._block:
                yield block
                block, positions = [], 0
        if block:
            yield block

    def _sampler(self, options: SamplingOptions) -> RemoteSampler:
        return RemoteSampler(self.config, options, self._weights.tokenizer, self._weights.vocab_size)
