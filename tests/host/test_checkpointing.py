"""Checkpoints of Megatron's format are written by the ranks themselves, read back, and read without Megatron."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from nemo.lightning.io import pl as nemo_io
from nemo.lightning.io.pl import MegatronCheckpointIO
from ranks import run_ranks
from small_models import fill_gradients, start, trainable, weights_and_states

from nemo_brain.host.checkpoint_index import ModelReader, read_index
from nemo_brain.host.checkpointing import InProcessSave, loading, loading_optimizers, save_with
from nemo_brain.host.optimizer import keeping_settings
from nemo_brain.model.parameters import layer_tensor

METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
ROWS = 50  # of the vocabulary


def sharded(wrapped, optimizer, is_loading: bool = False) -> dict:
    model = wrapped.module.sharded_state_dict(prefix="module.")
    return {**model, "optimizer": optimizer.mcore_optimizer.sharded_state_dict(model, is_loading, metadata=METADATA)}


def write(folder: str, distributed: bool, copy: bool, tensor: int = 1) -> dict[str, torch.Tensor]:
    """Trains for two steps and saves; with ``copy`` the weights change before they are written."""
    start(tensor)
    wrapped, optimizer = trainable(distributed)
    for _ in range(2):
        fill_gradients(wrapped, 0.1)
        optimizer.mcore_optimizer.step()
    saver, io = InProcessSave(copy), MegatronCheckpointIO(save_ckpt_format="torch_dist")
    save_with(io, saver)
    replicated = parallel_state.get_data_parallel_world_size() > 1
    assert isinstance(io.save_sharded_strategy, FullyParallelSaveStrategyWrapper if replicated else InProcessSave)
    state = weights_and_states(wrapped, optimizer).clone()
    weights = {name: parameter.detach().clone() for name, parameter in wrapped.module.named_parameters()}
    if dist.get_rank() == 0:
        os.makedirs(folder, exist_ok=True)
    dist.barrier()
    io.save_checkpoint(sharded(wrapped, optimizer), folder)
    if copy:
        for parameter in wrapped.parameters():
            parameter.data.fill_(9.0)
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
    assert not children, "a helper process was started"
    saver.write(None)
    return {"state": state, **weights}


def read(folder: str, distributed: bool) -> torch.Tensor:
    """A model of another seed and other settings, which it keeps, filled from the checkpoint as NeMo does it."""
    start()
    wrapped, optimizer = trainable(distributed, seed=2)
    settings = {"lr": 0.5, "weight_decay": 0.25, "betas": (0.5, 0.5)}
    for group in optimizer.param_groups:
        assert group.items().isdisjoint(settings.items())
        group.update(settings)
    before = nemo_io._fix_tensors_device
    with loading([optimizer]):
        loaded = MegatronCheckpointIO().load_checkpoint(folder, sharded(wrapped, optimizer, is_loading=True))
    assert nemo_io._fix_tensors_device is before
    wrapped.module.load_state_dict({k.removeprefix("module."): v for k, v in loaded.items() if k != "optimizer"}, False)
    with loading_optimizers([optimizer]), keeping_settings([optimizer]):
        optimizer.load_state_dict(loaded["optimizer"])
    assert all(group[name] == value for group in optimizer.param_groups for name, value in settings.items())
    return weights_and_states(wrapped, optimizer)


@pytest.mark.parametrize("copy", [False, True], ids=["in place", "copied"])
@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed optimizer"])
def test_weights_and_optimizer_states_come_back_bit_by_bit_but_not_settings(tmp_path, distributed, copy):
    """Saved by one rank, with Adam's step count. What was copied is what was there when it was taken."""
    (saved,) = run_ranks(write, 1, str(tmp_path), distributed, copy)
    (loaded,) = run_ranks(read, 1, str(tmp_path), distributed)
    assert torch.equal(loaded, saved["state"])


def test_replicas_share_what_they_write(tmp_path):
    saved = run_ranks(write, 2, str(tmp_path), True, False)
    assert {path.name[:4] for path in (tmp_path / "weights").glob("*.distcp")} == {"__0_", "__1_"}
    weights = sum(value.numel() for name, value in saved[0].items() if name != "state")
    (loaded,) = run_ranks(read, 1, str(tmp_path), True)
    assert torch.equal(loaded[:weights], saved[0]["state"][:weights])


def without_our_loading(folder: str) -> None:
    start()
    wrapped, optimizer = trainable(distributed=True, seed=2)
    if not torch.cuda.is_available():
        with pytest.raises(AssertionError):  # that CUDA is there
            nemo_io._fix_tensors_device({})
    with pytest.raises(AssertionError):  # of one step count for all parameters: there is none yet
        sharded(wrapped, optimizer, is_loading=True)
    with loading([optimizer]):
        loaded = MegatronCheckpointIO().load_checkpoint(folder, sharded(wrapped, optimizer, is_loading=True))
    with pytest.raises(KeyError, match="step"):
        optimizer.load_state_dict(loaded["optimizer"])


def test_megatron_alone_cannot_load_where_adam_is_torchs_own(tmp_path):
    run_ranks(write, 1, str(tmp_path), True, False)
    run_ranks(without_our_loading, 1, str(tmp_path))


def write_nowhere(folder: str) -> str:
    start()
    wrapped, optimizer = trainable(distributed=False)
    saver, io = InProcessSave(copy=False), MegatronCheckpointIO()
    save_with(io, saver)
    os.makedirs(folder, exist_ok=True)
    dist.barrier()
    io.save_checkpoint(sharded(wrapped, optimizer), folder)
    dist.barrier()
    if dist.get_rank() == 1:
        (Path(folder) / "weights" / "__1_0.distcp").mkdir()  # what rank 1 is about to open
    with pytest.raises(OSError, match="rank 1: ") as raised:
        saver.write(None)
    return str(raised.value)


def test_a_failure_of_one_rank_is_raised_on_all(tmp_path):
    first, second = run_ranks(write_nowhere, 2, str(tmp_path))
    assert first == second


@pytest.mark.parametrize("ranks", [1, 2], ids=["one process", "TP2"])
def test_the_model_is_read_without_megatron(tmp_path, ranks):
    saved = run_ranks(write, ranks, str(tmp_path), False, False, ranks)
    reader = ModelReader(tmp_path / "weights")
    stored = {(tensor.layer, tensor.name): tensor for tensor in reader.tensors()}
    expected = {name for name in saved[0] if name != "state"}
    flat = {name if layer is None else layer_tensor(layer, name) for layer, name in stored}
    assert {name for name in flat if not name.endswith("_extra_state")} == expected
    norm = reader.read(stored[1, "self_attention.linear_qkv.layer_norm_weight"])
    assert torch.equal(norm, saved[0]["decoder.layers.1.input_layernorm.weight"])
    rows = torch.cat([rank["embedding.word_embeddings.weight"] for rank in saved])
    assert torch.equal(reader.read(stored[None, "embedding.word_embeddings.weight"])[:ROWS], rows[:ROWS])
    columns = torch.cat([rank["decoder.layers.1.self_attention.linear_proj.weight"] for rank in saved], 1)
    assert torch.equal(reader.read(stored[1, "self_attention.linear_proj.weight"]), columns)


class Trap:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_an_index_runs_no_code(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Trap(tmp_path / "executed")))
    with pytest.raises(ValueError, match=r"weights/\.metadata names "):
        read_index(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match=r"weights/\.metadata is damaged"):
        read_index(tmp_path)
    assert not (tmp_path / "executed").exists()
