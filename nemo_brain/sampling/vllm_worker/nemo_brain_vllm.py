"""What a vLLM server needs to take the policy's weights: from a directory, on a disk or in shared memory (/dev/shm), or
from the training itself, over a process group.

One file that imports nothing of ours: its directory is put on the server's path, which needs no environment of ours.

    PYTHONPATH=<this directory> vllm serve ... --worker-extension-cls nemo_brain_vllm.Weights

vLLM makes ``Weights`` a base of each of its workers; ``/collective_rpc`` calls its methods by name.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open


class Weights:
    """Beside vLLM's own ``reload_weights``: nothing is touched before the weights are seen, and tied heads follow."""

    # vLLM's, of the worker that this class becomes a base of.
    model_runner: Any
    parallel_config: Any
    device: torch.device

    def nemo_brain_load(self, path: str) -> None:
        """Loads the weights of a Hugging Face directory. FileNotFoundError, the model unharmed: there are none."""
        files = sorted(Path(path).glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"this server sees no safetensors files in {path}")
        take(self.model_runner, _tensors(files))

    def nemo_brain_worker(self) -> dict[str, Any]:
        """What the other side has to know of this worker before it sends."""
        return {"device": self.device.type, "engines": self.parallel_config.data_parallel_size}

    def nemo_brain_receive(self, host: str, port: int, workers: int, device: str, seconds: float) -> dict[str, int]:
        """Joins the process group that is made at this address, and takes what its first rank sends.

        Args:
            workers: of this server; all of them are called at the same time.
            device: of the tensors on their way.
            seconds: for each step of it.

        Raises:
            RuntimeError: what is sent did not arrive in full. The model answers as before, but some of its weights are
                the new ones and some may be neither: it has to be given all of them again.
        """
        store = dist.TCPStore(host, port, timeout=timedelta(seconds=seconds))
        rank = 1 + self.parallel_config.rank
        group = process_group(store, rank, 1 + workers, device, address_towards(host, port), seconds)
        incoming = _Incoming(store, group, torch.device(device if device == "cpu" else self.device))
        take(self.model_runner, incoming)
        if incoming.failure is not None:
            raise RuntimeError(f"the weights did not arrive in full: {incoming.failure}")
        return {"tensors": incoming.tensors, "bytes": incoming.bytes}


def take(model_runner: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Has vLLM's model take tensors by Hugging Face's names. A module that is given one of its tensors must be given
    all of them: vLLM makes it anew. Modules that are given none keep theirs."""
    model_runner.reload_weights(weights_iterator=tensors)
    if model_runner.model_config.hf_config.tie_word_embeddings:
        # A CPU multiplies by a packed copy of the head's weights, which a reload leaves as it was where they are
        # the embedding's: nothing by the head's name is among the tensors. Elsewhere this does nothing.
        for module in model_runner.get_model().modules():
            if type(module).__name__ == "ParallelLMHead":
                module.quant_method.process_weights_after_loading(module)


def process_group(store: dist.Store, rank: int, size: int, device: str, address: str, seconds: float) -> Any:
    """A process group beside the default one, of the ranks that share the store: NCCL's for CUDA, otherwise gloo's.

    Waits until all of them are there. RuntimeError: one is not, within ``seconds``.

    Args:
        address: of this machine, where gloo is to listen.
    """
    limit = timedelta(seconds=seconds)
    kinds: Any = dist  # whose stubs lack what follows
    store.set_timeout(limit)
    if device == "cuda":
        options = kinds.ProcessGroupNCCL.Options()
        options._timeout = limit
        group = kinds.ProcessGroupNCCL(store, rank, size, options)
        group.broadcast(torch.zeros(1, device="cuda"), 0).wait()  # it connects at its first use
        return group
    options = kinds.ProcessGroupGloo._Options()
    options._devices = [kinds.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = limit
    return kinds.ProcessGroupGloo(store, rank, size, options)


def address_towards(host: str, port: int) -> str:
    """This machine's address on the way to another."""
    family, kind, _, _, there = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(there)  # sends nothing
        return probe.getsockname()[0]


class _Incoming:
    """The tensors that the group's first rank sends, bucket by bucket: names, types and shapes are in the store under
    the bucket's number, a bucket without any is the last. Ends early with ``failure`` where they cease to come."""

    def __init__(self, store: dist.Store, group: Any, device: torch.device):
        self.tensors = self.bytes = 0
        self.failure: Exception | None = None
        self._store, self._group, self._device = store, group, device

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        number = 0
        while bucket := self._received(number):
            number += 1
            for name, tensor in bucket:
                self.tensors += 1
                self.bytes += tensor.nbytes
                yield name, tensor

    def _received(self, number: int) -> list[tuple[str, torch.Tensor]]:
        try:
            described = json.loads(self._store.get(str(number)))
            bucket = [
                (name, torch.empty(shape, dtype=getattr(torch, dtype), device=self._device))
                for name, dtype, shape in described
            ]
            for work in [self._group.broadcast(tensor, 0) for _, tensor in bucket]:
                work.wait()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # what has not arrived shows here
        except Exception as error:  # vLLM would be left without a model
            self.failure = error
            return []
        return bucket


def _tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor by name, mapped from its file."""
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no mapping
                yield name, tensors.get_tensor(name)
