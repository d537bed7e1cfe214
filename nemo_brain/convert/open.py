"""Where a model's weights come from, and how they get into its shards.

NeMo's importers (``llm.import_ckpt``) hold a whole Hugging Face model and a whole Megatron model in one process, write
a checkpoint that is loaded again, and name Transformer Engine's parameters as their targets; there are none for GPT-2
and GPT-NeoX. This package reads one tensor at a time into the shards of a model that exists already, in any layout,
with or without Transformer Engine and CUDA.
"""

from __future__ import annotations

from pathlib import Path

from nemo_brain.convert.gguf import GGUFFile
from nemo_brain.convert.gpt2 import GPT2Weights
from nemo_brain.convert.gpt_neox import GPTNeoXWeights
from nemo_brain.convert.huggingface import HuggingFaceDirectory
from nemo_brain.convert.llama import LlamaWeights
from nemo_brain.convert.run_checkpoint import RunWeights, newest_intact
from nemo_brain.convert.source import CheckpointSource
from nemo_brain.core.packages import PREFIX, package_folders
from nemo_brain.data.tokenizers import byte_tokenizer, load_tokenizer
from nemo_brain.durability import checkpoint
from nemo_brain.model.random_weights import RandomWeights
from nemo_brain.model.weights import Weights

# By Hugging Face's model_type.
ARCHITECTURES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LlamaWeights),
    "gpt_neox": GPTNeoXWeights,
    "gpt2": GPT2Weights,
}


def open_weights(path: str | Path, finite_unless: str | None = "model.allow_nonfinite") -> Weights:
    """Opens a checkpoint without reading its tensors.

    Args:
        path: a Hugging Face directory (config.json and safetensors), a .gguf file, ``package:NAME`` (the GGUF file
            inside the installed Python package NAME, which is not imported), a run's checkpoint, or a run's directory:
            its newest intact checkpoint.
        finite_unless: a tensor that is not finite is refused when it is read; the key that would allow it, for the
            error. None: it is allowed.

    Raises:
        ValueError: the path holds no such checkpoint, or one that cannot be represented exactly; says why.
    """
    path = resolve(path)
    if path.is_file() and path.suffix == ".gguf":
        source: CheckpointSource = GGUFFile(path, finite_unless)
    elif checkpoint.find(path):
        return _open_checkpoint(newest_intact(path), finite_unless)
    elif path.is_dir():
        source = HuggingFaceDirectory(path, finite_unless)
    else:
        raise ValueError(
            f"{path} is neither a directory with config.json and safetensors, a .gguf file, nor a run's checkpoint; "
            "a model of the Hugging Face hub is downloaded first: huggingface-cli download NAME --local-dir DIRECTORY"
        )
    architecture = source.config.get("model_type")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{path}: architecture {architecture!r} is not supported; known: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[architecture](source)


def start_weights(
    restore_from: str | None, gpt: dict | None, tokenizer: str | None, seed: int, allow_nonfinite: bool = False
) -> Weights:
    """The model that a run starts from, by the keys of its ``model`` section and its seed."""
    if restore_from is not None:
        return open_weights(restore_from, None if allow_nonfinite else "model.allow_nonfinite")
    found = byte_tokenizer() if tokenizer is None else load_tokenizer(tokenizer, key="model.tokenizer")
    rows = max(found.get_vocab().values()) + 1  # of ids with gaps there are fewer
    return RandomWeights(dict(gpt or {}), rows, found, seed)


def _open_checkpoint(path: Path, finite_unless: str | None) -> RunWeights:
    run = checkpoint.read_json(path / "run.json")
    configuration = run["configuration"]
    if run["kind"] == "reward_model":
        raise ValueError(
            f"{path} holds a reward model, no language model: go on with its training, which writes it to "
            "model.export_to at its end, for reward.restore_from"
        )
    if configuration["model"].get("peft") is not None:
        raise ValueError(
            f"{path} holds adapters alone (model.peft): go on with the run, which writes merged weights to "
            "model.export_to at its end"
        )
    model = {name: configuration["model"][name] for name in ("restore_from", "gpt", "tokenizer")}
    try:
        start = start_weights(**model, seed=configuration["seed"])
    except ValueError as error:
        raise ValueError(f"{path}: architecture and tokenizer are those of its run's start model: {error}") from error
    return RunWeights(path, start, finite_unless)


def resolve(path: str | Path) -> Path:
    """The path itself, or the one .gguf file of the package that ``package:NAME`` names."""
    prefix, _, package = str(path).partition(PREFIX)
    if prefix or not package:
        return Path(path)
    files = [file for place in package_folders(package) for file in sorted(place.rglob("*.gguf"))]
    if len(files) != 1:
        raise ValueError(f"{path}: the package holds {len(files)} .gguf files, not one: {[f.name for f in files]}")
    return files[0]
