"""``nemo-brain convert``: a checkpoint to a Hugging Face directory through Megatron's names, tensor by tensor.

No model is built and no process group is needed: every tensor is read, put into Megatron's order and taken apart again
by the code that runs import and export with.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_brain.convert.export import MAX_SHARD_BYTES, Writer, make_export
from nemo_brain.convert.open import open_weights
from nemo_brain.model.gpt import PackedGPTConfig
from nemo_brain.model.parameters import VOCABULARY_TENSORS
from nemo_brain.report.progress import progress

USAGE = "nemo-brain convert from=SOURCE to=DIRECTORY [dtype=fp32|bf16] [max_shard_size=5GB] [allow_nonfinite=true]"
_KEYS = ("from", "to", "dtype", "max_shard_size", "allow_nonfinite")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def main(arguments: Sequence[str]) -> None:
    """Converts as the command line says. Raises ValueError for a mistake in it; see ``convert`` for the rest."""
    given = _parse(arguments)
    dtype = None
    if "dtype" in given:
        if given["dtype"] not in _DTYPES:
            raise ValueError(f"dtype must be {' or '.join(_DTYPES)}, not {given['dtype']!r}")
        dtype = _DTYPES[given["dtype"]]
    size = _bytes(given["max_shard_size"]) if "max_shard_size" in given else MAX_SHARD_BYTES
    allow = given.get("allow_nonfinite", "false")
    if allow not in ("true", "false"):
        raise ValueError(f"allow_nonfinite must be true or false, not {allow!r}")
    written = convert(given["from"], given["to"], dtype, size, allow == "true")
    print(f"{given['to']}: {written}")


def convert(
    source: str,
    target: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    allow_nonfinite: bool = False,
) -> str:
    """Writes the checkpoint ``source`` to the new directory ``target``; returns what was written, in words.

    Args:
        source: what ``open_weights`` opens.
        target: absent, or an empty directory.
        dtype: of the written tensors; None keeps what the checkpoint has (a GGUF file is dequantised to fp32, a run's
            checkpoint has what the run trained in).
        max_shard_bytes: the largest safetensors file, and what is held in memory.
        allow_nonfinite: tensors with values that are NaN or infinite are written as they are.

    Raises:
        ValueError: ``target`` holds something, or ``source`` cannot be read or represented exactly, or is not finite.
        OSError: ``target`` could not be written; nothing is left there.
    """
    target = Path(target)
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise ValueError(f"to: {target} exists, and nothing is overwritten: name another directory, or remove it")
    try:
        # Of a file, which names its tensors and needs no shape.
        weights: Any = open_weights(source, None if allow_nonfinite else "allow_nonfinite")
        tokenizer = weights.tokenizer
    except ValueError as error:
        raise ValueError(f"from: {error}") from error
    gpt = PackedGPTConfig(**{**weights.gpt_config, "vocab_size": weights.vocab_size})
    export = make_export(gpt, weights.vocab_size, tokenizer, "from", weights.generation_config, weights.stop_token_ids)
    writer = Writer(export, target, max_shard_bytes, replaceable=False)

    def copy(name: str) -> None:
        full = weights.tensor(name)
        if name in VOCABULARY_TENSORS and len(full) != weights.vocab_size:
            raise ValueError(f"from: {name} has {len(full)} rows, config.json says vocab_size={weights.vocab_size}")
        writer.add(name, full if dtype is None else full.to(dtype))

    with progress(len(weights.names), "convert", "tensors") as bar:
        for name in weights.names:
            writer.attempt(copy, name)
            bar.update()
    writer.attempt(writer.finish)
    if writer.error is not None:
        kind, message = writer.error
        raise kind(message)
    return f"{export.config.architectures[0]}, {writer.tensors} tensors, {writer.total_bytes / 1e9:.3g} GB"


def _parse(arguments: Sequence[str]) -> dict[str, str]:
    given = {}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in _KEYS or not value:
            raise ValueError(f"{argument!r} is not one of {', '.join(f'{key}=...' for key in _KEYS)}. Usage: {USAGE}")
        if key in given:
            raise ValueError(f"{key} is given twice")
        given[key] = value
    if missing := [key for key in ("from", "to") if key not in given]:
        raise ValueError(f"{' and '.join(missing)} must be given. Usage: {USAGE}")
    return given


def _bytes(size: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)?", size, re.IGNORECASE)
    value = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if value < 1:
        raise ValueError(f"max_shard_size must be a size such as 5GB or 500MB, not {size!r}")
    return value
