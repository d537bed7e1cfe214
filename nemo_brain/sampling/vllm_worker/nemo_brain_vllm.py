"""What a vLLM server needs to take the policy's weights from a directory, on a disk or in shared memory (/dev/shm).

One file that imports nothing of ours: its directory is put on the server's path, which needs no environment of ours.

    PYTHONPATH=<this directory> vllm serve ... --worker-extension-cls nemo_brain_vllm.Weights

vLLM makes ``Weights`` a base of each of its workers; ``/collective_rpc`` calls its methods by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


class Weights:
    """Beside ``reload_weights`` of vLLM's own: nothing is touched before the files are seen, and tied heads follow."""

    model_runner: Any  # vLLM's, of the worker that this class becomes a base of

    def nemo_brain_load(self, path: str) -> None:
        """Loads the weights of a Hugging Face directory. FileNotFoundError, the model unharmed: there are none."""
        files = sorted(Path(path).glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"this server sees no safetensors files in {path}")
        self.model_runner.reload_weights(weights_iterator=_tensors(files))
        if self.model_runner.model_config.hf_config.tie_word_embeddings:
            # A CPU multiplies by a packed copy of the head's weights, which a reload leaves as it was where they are
            # the embedding's: nothing by the head's name is in the files. Elsewhere this does nothing.
            for module in self.model_runner.get_model().modules():
                if type(module).__name__ == "ParallelLMHead":
                    module.quant_method.process_weights_after_loading(module)


def _tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor by name, mapped from its file."""
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no mapping
                yield name, tensors.get_tensor(name)
