"""Runs of conf/toy.yaml inside tests, with every gradient of every step recorded."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from megatron.core import parallel_state
from omegaconf import DictConfig

from nemo_brain.model.parameters import VOCABULARY_TENSORS, global_parameters
from nemo_brain.report.metrics import read_metrics
from nemo_brain.training.brain.run import run

ROOT = Path(__file__).resolve().parent.parent
QUIET = ("logger.tensorboard=false",)


def toy_config(*overrides: str, name: str = "toy") -> DictConfig:
    return composed(name, *QUIET, *overrides)


def composed(name: str, *overrides: str) -> DictConfig:
    """A file of conf/ with overrides."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return compose(name, overrides=list(overrides))


class GradientRecorder(pl.Callback):
    """The full gradients of each step by canonical name, after Megatron has reduced and before it has clipped them.

    Of what is frozen there are none.
    """

    def __init__(self):
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.steps.append(full_gradients(trainer.strategy.chunks))


def full_gradients(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Of this rank's chunks, as a step has accumulated and reduced them, by canonical name."""
    gradients = {}
    for chunk in chunks:
        if chunk.ddp_config.use_distributed_optimizer:
            _complete(chunk)
        inner = chunk
        while hasattr(inner, "module"):
            inner = inner.module
        for parameter in global_parameters(inner):
            if not parameter.parameter.requires_grad:
                continue
            gradient = parameter.gather(parameter.parameter.main_grad).clone()
            if parameter.name in VOCABULARY_TENSORS:
                # Each tensor-parallel size pads the vocabulary to another length.
                assert not gradient[inner.config.vocab_size :].any()
                gradient = gradient[: inner.config.vocab_size]
            gradients[parameter.name] = gradient
    return gradients


def _complete(chunk) -> None:
    """The distributed optimizer leaves each data-parallel rank its own slice of every bucket: gather the others'."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for buffer in chunk.buffers:
        for bucket in buffer.buckets:
            slices = list(bucket.grad_data.view(group.size(), -1).unbind())
            dist.all_gather(slices, slices[group.rank()].clone(), group=group)


def recorded_run(*overrides: str, name: str = "toy", callbacks: Sequence[pl.Callback] = ()) -> dict:
    """One rank's view of a run: its gradients per step, and rank 0's metrics and sampled outputs."""
    logging.disable(logging.WARNING)
    recorder = GradientRecorder()
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = Path(scratch) / "run"
        run(toy_config(f"run_dir={run_dir}", *overrides, name=name), callbacks=[recorder, *callbacks])
        metrics = read_metrics(run_dir / "metrics.jsonl") if dist.get_rank() == 0 else None
        samples = (run_dir / "samples.jsonl").read_text() if dist.get_rank() == 0 else None
    return {"gradients": recorder.steps, "metrics": metrics, "samples": samples}
