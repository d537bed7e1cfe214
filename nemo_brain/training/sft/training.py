"""Fine-tunes on demonstrations: the strategy whose batches they are, and what is recorded of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from nemo_brain.report.progress import number, progress
from nemo_brain.training.epochs import EpochLoop, EpochStep
from nemo_brain.training.sft.passes import CompletionPasses, CompletionResult, completion_tokens
from nemo_brain.training.strategy import PackedStrategy


class CompletionStrategy(PackedStrategy):
    """PackedStrategy whose batches are ``EpochStep``s of ``Demonstration``s."""

    def setup(self, trainer) -> None:
        """NeMo's, then the passes."""
        super().setup(trainer)
        self.passes = CompletionPasses(self.lightning_module.config, self.layout, self.micro_batch_tokens)

    def run_step(self, step: EpochStep) -> torch.Tensor:
        step.result = self.passes.train(self.chunks, [example.group for example in step.examples])
        return torch.tensor(step.result.loss)


class CompletionLoop(EpochLoop):
    """``EpochLoop`` over ``Demonstration``s."""

    evaluates_start = True

    def step_metrics(self, result: CompletionResult) -> dict[str, Any]:
        return {"loss": result.loss, "completion_tokens": result.completion_tokens}

    def eval_metrics(self) -> dict[str, Any]:
        """The loss is in nats per token of all held-out completions together; perplexity is its exponential."""
        groups = [example.group for example in self.held_out]
        with progress(None, "evaluation", "tokens") as bar:
            loss = self.strategy.passes.loss(self.strategy.chunks, groups, bar.update)
        return {
            "eval/loss": loss,
            "eval/perplexity": math.exp(loss),
            "eval/start_loss": loss if self._evaluation is None else self._evaluation["eval/start_loss"],
            "eval/completions": len(groups),
            "eval/completion_tokens": completion_tokens(groups),
        }

    def eval_summary(self, record: Mapping[str, Any]) -> list[tuple[str, str]]:
        before, after = record["eval/start_loss"], record["eval/loss"]
        size = f"{record['eval/completion_tokens']} tokens of {record['eval/completions']} completions"
        return [
            ("held-out loss", f"{before:.3f} -> {after:.3f} nats per token, on {size}"),
            ("perplexity", f"{number(math.exp(before))} -> {number(math.exp(after))}"),
        ]
