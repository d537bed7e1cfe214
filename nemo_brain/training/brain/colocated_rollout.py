"""Groups from vLLM in the training processes: ``rollout.engine=colocated``.

A replica's ranks are one engine's: they hand it the policy's weights in memory, sample, and put it to sleep before they
score and train.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from nemo_brain.config.brain import Config
from nemo_brain.convert.export import gathered_tensors, make_export
from nemo_brain.core.groups import Output, Prompt, SampledGroup
from nemo_brain.core.heartbeat import heartbeat
from nemo_brain.core.http import BadAnswer
from nemo_brain.core.interruption import Interruption
from nemo_brain.core.ranks import gathered, on_all_ranks
from nemo_brain.data.stop import Stop
from nemo_brain.model.gpt import PackedGPTConfig
from nemo_brain.model.weights import Weights
from nemo_brain.sampling.answers import Reader
from nemo_brain.sampling.in_process import InProcessEngine
from nemo_brain.sampling.remote import PROBE, request_seed
from nemo_brain.sampling.sampler import SamplingOptions
from nemo_brain.training.brain.engine import Draws, EngineRollout, probe_options
from nemo_brain.training.brain.strategy import BRAInStrategy

_SECTION = "rollout.engine=colocated"


def vllm_engine(directory: Path, **arguments: Any) -> InProcessEngine:
    """An engine of vLLM's. ValueError: there cannot be one."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            f"{_SECTION}: vLLM is not installed in the training's environment: install it there, or start it in its "
            "own as a server (rollout.remote)"
        )
    return InProcessEngine(directory, **arguments)


class ColocatedRollout(EngineRollout):
    """Samples with an engine of this replica's ranks, which is made at the first refresh.

    Args:
        config: the run's.
        gpt, weights: of the policy.
        stop: what ends its outputs.
        block: so many row positions are scored at a time.
        make_engine: see ``InProcessEngine``.

    Raises:
        ValueError: vLLM has no such model, or no such layout.
    """

    def __init__(
        self,
        config: Config,
        gpt: PackedGPTConfig,
        weights: Weights,
        stop: Stop,
        block: int,
        make_engine: Callable[..., InProcessEngine] = vllm_engine,
    ):
        super().__init__(config, _SECTION, "vLLM", held=True, on_mismatch="redraw", block=block)
        _check_layout(config)
        self._weights = weights
        self._export = make_export(gpt, weights.vocab_size, weights.tokenizer, _SECTION)
        self._make_engine = make_engine
        self._arguments = {
            "dtype": gpt.params_dtype,
            "context": sum(config.lengths.values()),
            "rows": config.rollout.rows_in_flight,
            "memory": config.rollout.colocated_memory,
            "options": config.rollout.colocated_options or {},
        }
        self._engine: InProcessEngine | None = None
        self._loaded = False

    @property
    def follows(self) -> bool:
        return True

    def refresh(
        self,
        strategy: BRAInStrategy,
        step: int,
        options: SamplingOptions,
        prompts: Sequence[Prompt],
        interruption: Interruption,
    ) -> dict[str, float]:
        """See ``EngineRollout.refresh``. The weights are given up after each sampling, and so are given each time."""
        self._remember(prompts)
        started = time.perf_counter()
        moved = self._load(strategy)
        seconds = time.perf_counter() - started
        probe = on_all_ranks(lambda: self._probed(probe_options(options)))
        replicas = gathered(probe, parallel_state.get_data_parallel_group())
        probes = {f"replica {number}": groups for number, groups in enumerate(replicas)}
        if problem := self._problem(strategy, probes, options.temperature):
            raise ValueError(problem)
        return {"refresh_bytes": moved, "refresh_bytes_per_second": moved / seconds}

    def _load(self, strategy: BRAInStrategy) -> int:
        """Hands this replica's engine the policy's weights; their bytes. A collective of its ranks."""
        engine = self._engine or self._made()
        moved = 0

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal moved
            for name, tensor in gathered_tensors(strategy.chunks, self._export, everywhere=True):
                moved += tensor.nbytes
                yield name, tensor

        strategy.wait_for_param_gather()
        engine.load(tensors())
        self._engine, self._loaded = engine, True
        return moved

    def _made(self) -> InProcessEngine:
        """vLLM reads the model's configuration from files."""
        ranks = parallel_state.get_model_parallel_group().size()
        with tempfile.TemporaryDirectory() as directory:
            self._export.config.save_pretrained(directory)
            self._export.tokenizer.save_pretrained(directory)
            return self._make_engine(Path(directory), ranks=ranks, **self._arguments)

    def _probed(self, options: SamplingOptions) -> list[SampledGroup]:
        found = dict(self._sampled(Draws(self._prompts, options, 0, PROBE, [[0]] * len(self._prompts))))
        return [found[p] for p in range(len(self._prompts))]

    def _drawn(self, strategy: BRAInStrategy, draws: Draws) -> Iterator[list[tuple[int, SampledGroup]]]:
        """All of them are drawn before the first is scored: then the memory is the training's again."""
        if not self._loaded:
            self._load(strategy)
        found = list(self._sampled(draws))
        assert self._engine is not None
        self._engine.sleep()
        self._loaded = False
        yield from self._blocks(found)

    def _sampled(self, draws: Draws) -> Iterator[tuple[int, SampledGroup]]:
        """Groups as they are finished, on all ranks of the replica."""
        assert self._engine is not None
        prompts, numbers = draws.prompts, draws.numbers
        reader = Reader(draws.options, self._weights.tokenizer, self._weights.vocab_size)
        jobs = [(p, i) for p, outputs in enumerate(numbers) for i in outputs]
        requests = [
            (prompts[p].token_ids, request_seed(draws.seed, draws.iteration, prompts[p].id, i)) for p, i in jobs
        ]
        found: list[dict[int, tuple[Output, float]]] = [{} for _ in prompts]
        for index, choice in self._engine.generate(requests, _parameters(draws.options), draws.stop):
            heartbeat()
            p, i = jobs[index]
            try:
                found[p][i] = reader.output(choice, prompts[p])
            except BadAnswer as error:
                raise ValueError(f"{_SECTION}: prompt {prompts[p].id!r}, output {i}: {error}") from None
            draws.on_outputs(1)
            if len(found[p]) == len(numbers[p]):
                outputs, logprobs = zip(*(found[p][number] for number in numbers[p]), strict=True)
                yield p, SampledGroup(prompts[p], list(outputs), proposal_logprobs=list(logprobs))


def _check_layout(config: Config) -> None:
    model, trainer = config.model, config.trainer
    ranks = model.tensor_model_parallel_size * model.pipeline_model_parallel_size
    replicas = (trainer.devices or 1) * trainer.num_nodes // ranks
    if model.pipeline_model_parallel_size > 1 and replicas > 1:
        raise ValueError(
            f"{_SECTION}: vLLM's tensor-parallel groups are consecutive ranks, and those of a replica are not with "
            f"model.pipeline_model_parallel_size={model.pipeline_model_parallel_size} and {replicas} replicas: use "
            "tensor parallelism alone (model.tensor_model_parallel_size), or set rollout.engine=own or server"
        )


def _parameters(options: SamplingOptions) -> dict[str, Any]:
    """vLLM's names for what is sampled."""
    strings = list(options.stop.strings)
    return {
        "max_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_k": options.top_k or -1,
        "top_p": options.top_p,
        "stop": strings,
        "stop_token_ids": list(options.stop.token_ids),
        "include_stop_str_in_output": True,
        "detokenize": bool(strings),
        "skip_special_tokens": False,
    }
