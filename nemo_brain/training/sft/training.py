"""Fine-tunes on demonstrations: the strategy whose batches they are, and what is recorded of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from megatron.core import parallel_state

from nemo_brain.config.sft import SFTConfig
from nemo_brain.core.groups import Group
from nemo_brain.core.interruption import Interrupted
from nemo_brain.core.ranks import gathered, on_all_ranks
from nemo_brain.data.demonstrations import Demonstration
from nemo_brain.data.stop import Stop
from nemo_brain.report.progress import progress
from nemo_brain.sampling.sampler import SamplingOptions
from nemo_brain.training.epochs import EpochLoop, EpochState, EpochStep
from nemo_brain.training.frame import Frame
from nemo_brain.training.sft.passes import CompletionPasses, CompletionResult, completion_tokens
from nemo_brain.training.strategy import PackedStrategy


class CompletionStrategy(PackedStrategy):
    """PackedStrategy whose batches are ``EpochStep``s of ``Demonstration``s."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._passes: CompletionPasses | None = None

    def setup(self, trainer: pl.Trainer) -> None:
        """PackedStrategy's, then the passes."""
        super().setup(trainer)
        self._passes = CompletionPasses(self.lightning_module.config, self.layout, self.micro_batch_tokens)

    @property
    def passes(self) -> CompletionPasses:
        assert self._passes is not None, "the strategy has not been set up"
        return self._passes

    def run_step(self, batch: EpochStep[Demonstration]) -> CompletionResult:
        return self.passes.train(self.chunks, batch.groups)


class CompletionLoop(EpochLoop[Demonstration]):
    """``EpochLoop`` over ``Demonstration``s."""

    def __init__(
        self,
        config: SFTConfig,
        frame: Frame[EpochState],
        strategy: CompletionStrategy,
        examples: Sequence[Demonstration],
        held_out: Sequence[Demonstration],
        stop: Stop,
    ):
        super().__init__(config, frame, examples, held_out)
        self.strategy = strategy
        self._stop = stop

    def step_metrics(self, result: CompletionResult) -> dict[str, Any]:
        return {"loss": result.loss, "completion_tokens": result.completion_tokens}

    def eval_metrics(self) -> dict[str, Any]:
        """The loss is in nats per token of all held-out completions together; perplexity is its exponential."""
        groups = [example.group for example in self.held_out]
        with progress(None, "evaluation", "tokens") as bar:
            loss = self.strategy.passes.loss(self.strategy.chunks, groups, bar.update)
        first = self.frame.state.evaluation
        return {
            "eval/loss": loss,
            "eval/perplexity": math.exp(loss),
            "eval/start_loss": loss if first is None else first["eval/start_loss"],
            "eval/completions": len(groups),
            "eval/completion_tokens": completion_tokens(groups),
        }

    def score(self, metrics: Any) -> float:
        return -metrics["eval/loss"]

    def shown_groups(self) -> Sequence[Group]:
        """What the model answers to the held-out prompts, one output each at temperature 1, always with the same draws;
        each replica samples for its share of them."""
        chosen = self.held_out[: self.config.validation.samples]
        prompts = [dataclasses.replace(e.group.prompt, reference=e.group.outputs[0].text) for e in chosen]
        options = SamplingOptions(outputs=1, max_new_tokens=self.config.data.max_output_tokens, stop=self._stop)
        replicas, interruption = parallel_state.get_data_parallel_group(), self.frame.interruption
        members = parallel_state.get_model_parallel_group()
        share = prompts[replicas.rank() :: replicas.size()]

        def stop() -> bool:
            return interruption.agreed(group=members)[0]

        with progress(len(share), "samples of the held-out prompts", "outputs") as bar:
            arguments = (share, options, self.config.seed, -1, bar.update, stop)
            groups = on_all_ranks(lambda: dict(self.strategy.sample(*arguments)))
        if any(gathered(len(groups) < len(share))):
            raise Interrupted(interruption.reason)
        shares = gathered(groups, replicas)
        return [shares[i % len(shares)][i // len(shares)] for i in range(len(prompts))]
