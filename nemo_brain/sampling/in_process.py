"""vLLM inside the training processes: one engine for the ranks of a replica, which all call it alike.

Needs torch and vLLM alone, which is imported when an engine is made.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_brain.sampling.vllm_worker.nemo_brain_vllm import take

_OPTIONS = "rollout.colocated_options"
_STOP_STEPS = 16  # between two questions whether to stop


class InProcessEngine:
    """vLLM over the ranks of a replica, which have met before (``torch.distributed``).

    Its tensor-parallel groups are runs of consecutive ranks. It has no weights before the first ``load``, and with CUDA
    gives up its memory, weights included, in ``sleep``.

    Args:
        directory: config.json and the tokenizer.
        dtype: of weights and computation.
        ranks: of the replica.
        context: so many tokens a prompt and its output may have together.
        rows: outputs at a time.
        memory: the fraction of the device's memory that it may use.
        options: more arguments of ``vllm.LLM``.

    Raises:
        ValueError: vLLM has no such option or no such model, or an option is not the caller's to choose.
    """

    def __init__(
        self,
        directory: Path,
        *,
        dtype: torch.dtype,
        ranks: int,
        context: int,
        rows: int,
        memory: float,
        options: dict[str, Any],
    ):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        self._sleeps = torch.cuda.is_available()
        self._asleep = False
        self._requests = 0
        ours: dict[str, Any] = {
            "model": str(directory),
            "load_format": "dummy",
            "distributed_executor_backend": "external_launcher",
            "tensor_parallel_size": ranks,
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": context,
            "max_num_seqs": rows,
            "gpu_memory_utilization": memory,
            "enable_sleep_mode": self._sleeps,
            "enable_prefix_caching": True,
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",
            "seed": 0,
            "disable_log_stats": True,
        }
        if taken := sorted(ours.keys() & options.keys()):
            raise ValueError(f"{_OPTIONS}: {', '.join(taken)}: follows from the rest of the configuration")
        try:
            self._llm = LLM(**ours, **options)
        except TypeError as error:
            raise ValueError(f"{_OPTIONS}: {error}") from error

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Takes all weights by Hugging Face's names, and forgets what was computed with others."""
        self._wake("weights")
        self._llm.collective_rpc(lambda worker: take(worker.model_runner, tensors))
        self._wake("kv_cache")
        self._asleep = False
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM keeps prefixes that older weights have computed")

    def generate(
        self,
        requests: Sequence[tuple[Sequence[int], int]],
        parameters: dict[str, Any],
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Samples an output for each prompt and seed.

        Args:
            parameters: of vLLM's SamplingParams.
            stop: asked from time to time, by all ranks at the same step.

        Yields:
            A request's index and its output as a choice of OpenAI's completions, as they are finished: on all ranks in
            the same order.
        """
        from vllm import SamplingParams, TokensPrompt

        engine, first = self._llm.llm_engine, self._requests
        self._requests += len(requests)
        for number, (tokens, seed) in enumerate(requests, first):
            sampling = SamplingParams(**parameters, seed=seed, n=1, logprobs=0)
            engine.add_request(str(number), TokensPrompt(prompt_token_ids=list(tokens)), sampling)
        left, steps = set(range(first, self._requests)), 0
        try:
            while left:
                for answer in engine.step():
                    if answer.finished:
                        left.remove(int(answer.request_id))
                        yield int(answer.request_id) - first, _choice(answer.outputs[0])
                steps += 1
                if steps % _STOP_STEPS == 0 and stop():
                    return
        finally:
            engine.abort_request([str(number) for number in left])

    def sleep(self) -> None:
        """Gives up the device's memory until the next ``load``."""
        if self._sleeps and not self._asleep:
            self._llm.sleep(level=2)
            self._asleep = True

    def _wake(self, what: str) -> None:
        if self._asleep:
            self._llm.wake_up(tags=[what])


def _choice(output: Any) -> dict[str, Any]:
    tokens = list(output.token_ids)
    values = [position[token].logprob for position, token in zip(output.logprobs, tokens, strict=True)]
    return {"token_ids": tokens, "logprobs": {"token_logprobs": values}, "finish_reason": output.finish_reason}
