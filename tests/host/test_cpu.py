"""Megatron's and NeMo's calls for CUDA mean host memory where there is no CUDA."""

from __future__ import annotations

import importlib.util
import logging
import os
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import megatron.core
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from ranks import run_ranks
from torch.utils import cpp_extension
from torch.utils._cpp_extension_versioner import ExtensionVersioner

from nemo_brain.host import cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA nothing is replaced")


def test_the_device_cuda_is_host_memory():
    plain = torch.arange(3.0)
    made = [
        torch.empty(3, device="cuda"),
        torch.zeros(3, device=torch.device("cuda", 0)),
        torch.ones(3, pin_memory=True),
        torch.arange(3, device=torch.cuda.current_device()),
        plain.to("cuda"),
        plain.to(device="cuda:0", dtype=torch.float64),
        plain.to("cuda", torch.float64, non_blocking=True),
        torch.zeros_like(plain, device="cuda"),
        plain.new_full((2,), 1.0, device="cuda"),
        torch.nn.Linear(2, 2).cuda(torch.cuda.current_device()).weight,
    ]
    with ThreadPoolExecutor() as threads:
        made.append(threads.submit(torch.empty, 3, device="cuda").result())
    assert {tensor.device.type for tensor in made} == {"cpu"}
    assert plain.cuda() is plain
    assert made[5].dtype == made[6].dtype == torch.float64


def test_the_type_of_tensors_is_the_one_that_megatron_compares_with():
    """Its clipping and its optimizers take fp32 gradients and weights by this string only."""
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64  # conversions are none of it


def test_random_states_of_the_device_are_the_hosts():
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(2)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(2), first)
    assert torch.cuda.default_generators[0] is torch.default_generator and len(torch.cuda.default_generators) == 1
    called = []
    torch.cuda._lazy_call(lambda: called.append(True))
    assert called == [True]
    torch.cuda.synchronize(), torch.cuda.empty_cache(), torch.cuda.set_device(0), torch.cuda._lazy_init()


def test_a_second_call_changes_nothing():
    before = torch.cuda.current_device, torch.empty, torch.Tensor.to
    assert cpu.enable()
    assert (torch.cuda.current_device, torch.empty, torch.Tensor.to) == before


@pytest.mark.skipif(not megatron.core.__version__.startswith("0.15."), reason="of 0.15 it is known to compile")
def test_a_compiler_of_cuda_without_a_card_does_not_stop_megatrons_import(tmp_path, monkeypatch):
    """Importing, it compiles an allocator for the cards that it finds; torch fails where there is none."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)  # ninja
    assert cpp_extension.CUDA_HOME is None, "hidden by cpu.enable, which the tests begin with"
    assert not _imported_again(monkeypatch)["has_unified_memory"]
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    with pytest.raises(IndexError):
        _imported_again(monkeypatch)


def _imported_again(monkeypatch) -> dict:
    # Or torch takes what it has compiled once for compiled.
    monkeypatch.setattr(cpp_extension, "JIT_EXTENSION_VERSIONER", ExtensionVersioner())
    return runpy.run_path(importlib.util.find_spec("megatron.core.inference.unified_memory").origin)


def test_contexts_of_another_device_still_place_what_is_made_in_them():
    with torch.device("meta"):
        assert torch.empty(2).is_meta and torch.nn.Linear(2, 2).weight.is_meta


def tracked(tensor_parallel: int) -> tuple[bool, list[float]]:
    """Whether the tracker can be used before it is seeded; a draw of this rank's from it."""
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_parallel, dist.get_world_size() // tensor_parallel)
    tracker = get_cuda_rng_tracker()
    usable = "model-parallel-rng" in tracker.get_states()
    cpu.seed_tracker(7)
    with tracker.fork():
        return usable, torch.rand(2).tolist()


@pytest.mark.parametrize("tensor_parallel", [1, 2], ids=["PP2", "TP2"])
def test_megatrons_tracker_of_random_numbers_is_seeded(tensor_parallel):
    """Differently on each rank of a model, as NeMo does it on GPUs; without it Megatron raises."""
    (unseeded, first), (_, second) = run_ranks(tracked, 2, tensor_parallel)
    assert not unseeded
    assert first != second
    assert run_ranks(tracked, 2, tensor_parallel)[0][1] == first
