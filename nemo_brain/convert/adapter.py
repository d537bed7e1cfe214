"""A policy's adapters as a directory of the PEFT library: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from nemo_brain.convert.export import DirectoryWriter, write_parameters
from nemo_brain.convert.mapping import MappedExport, Mapping
from nemo_brain.model.lora import LoRA
from nemo_brain.model.parameters import global_parameters, is_adapter, unwrap

_MATRICES = {"linear_in.weight": "lora_A", "linear_out.weight": "lora_B"}


def export_adapter(
    chunks: Sequence[torch.nn.Module], export: MappedExport, lora: LoRA, base: str | None, directory: str | Path
) -> None:
    """Writes the adapters to ``directory``, in the parameters' own dtype, for PEFT's ``PeftModel.from_pretrained``.

    A collective of all ranks; arguments, replacement of an earlier export and errors as in ``export.export_model``.

    Args:
        export: of the model, which says how its layers are called; see ``export.make_export``.
        lora: what the adapters were made with.
        base: the start model's ``model.restore_from``; adapter_config.json names it where it is a directory.
    """
    base = str(Path(base).resolve()) if base is not None and Path(base).is_dir() else None
    writer = _AdapterWriter(export.mapping, lora, base, Path(directory)) if dist.get_rank() == 0 else None
    parameters = [parameter for chunk in chunks for parameter in global_parameters(unwrap(chunk))]
    write_parameters([parameter for parameter in parameters if is_adapter(parameter.name)], writer)


class _AdapterWriter(DirectoryWriter):
    def __init__(self, mapping: Mapping, lora: LoRA, base: str | None, directory: Path):
        self._mapping, self._lora, self._base = mapping, lora, base
        super().__init__(directory)

    def add(self, name: str, full: torch.Tensor) -> None:
        for theirs, tensor in adapter_tensors(self._mapping, name, full):
            # A is that of all parts; safetensors writes no tensor twice.
            self._tensors[theirs] = tensor.cpu().contiguous().clone()

    def write_rest(self) -> None:
        save_file(self._tensors, self._incomplete / "adapter_model.safetensors", metadata={"format": "pt"})
        content = json.dumps(adapter_config(self._mapping, self._lora, self._base), indent=2)
        (self._incomplete / "adapter_config.json").write_text(content + "\n", encoding="utf-8")


def adapter_tensors(mapping: Mapping, name: str, full: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """PEFT's names and tensors of an adapter's matrix: A for each part of a fused layer, of B each part's rows."""
    layer, _, matrix = name.partition(".adapter.")
    module, parts = mapping.parts(f"{layer}.weight")
    kind = _MATRICES[matrix]
    tensors = [full] * len(parts) if kind == "lora_A" else module.split_rows(full)
    for part, tensor in zip(parts, tensors, strict=True):
        yield f"base_model.model.{part.removesuffix('.weight')}.{kind}.weight", tensor


def adapter_config(mapping: Mapping, lora: LoRA, base: str | None) -> dict:
    """What adapter_config.json holds."""
    all_parts = [part for module in mapping.inside.values() for part in module.parts]
    last = [part.rpartition(".")[2] for part in all_parts]
    targeted = [module for name, module in mapping.inside.items() if name.rpartition(".")[2] in lora.target_modules]
    names = []
    for part in (part for module in targeted for part in module.parts):
        short = part.rpartition(".")[2]
        # The name alone, unless another module of the layer has it too.
        names.append(short if last.count(short) == 1 else part)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.dim,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": names,
        "fan_in_fan_out": any(module.transposed for module in targeted),
        "inference_mode": True,
    }
