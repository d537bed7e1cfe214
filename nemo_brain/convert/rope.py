"""Rotary embeddings: Hugging Face's keys to fields of ``PackedGPTConfig``, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_brain.model.gpt import PackedGPTConfig

# Fields of PackedGPTConfig by the keys of rope_scaling of type llama3.
_LLAMA3 = {
    "factor": "scale_factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "old_context_len",
}


def rope_fields(kind: str, config: dict, default_base: float, base_key: str = "rope_theta") -> dict:
    """The fields that say how positions rotate.

    Args:
        kind: the architecture, for errors.
        config: the keys of config.json.
        default_base: where config.json names none under ``base_key``.

    Raises:
        ValueError: a scaling that Megatron does not compute (yarn, dynamic, longrope, ...), or one without its numbers.
    """
    # Transformers 5 writes rope_parameters where transformers 4 wrote the base and rope_scaling.
    parameters = config.get("rope_parameters") or {}
    base = parameters.get("rope_theta", config.get(base_key, default_base))
    fields = {
        "position_embedding_type": "rope",
        "rotary_base": int(base) if float(base).is_integer() else base,
        "seq_len_interpolation_factor": None,
        "scale_factor": None,
    }
    for rope in (parameters, config.get("rope_scaling") or {}):
        scaling = rope.get("rope_type", rope.get("type", "default"))
        needed = {"default": (), "linear": ("factor",), "llama3": tuple(_LLAMA3)}
        if scaling not in needed:
            raise ValueError(
                f"{kind}: rope_scaling of type {scaling!r} is not supported, only linear and llama3: Megatron would "
                "rotate by other angles"
            )
        if missing := [key for key in needed[scaling] if key not in rope]:
            raise ValueError(f"{kind}: rope_scaling of type {scaling!r} lacks {', '.join(missing)}")
        if scaling == "linear":
            fields["seq_len_interpolation_factor"] = rope["factor"]
        elif scaling == "llama3":
            fields |= {field: rope[key] for key, field in _LLAMA3.items()}
    return fields


def rope_scaling(kind: str, gpt: PackedGPTConfig) -> dict | None:
    """The value of rope_scaling in config.json. Raises ValueError for two scalings at once."""
    linear, llama3 = gpt.seq_len_interpolation_factor, getattr(gpt, "scale_factor", None)
    if linear is not None and llama3 is not None:
        raise ValueError(f"{kind} cannot express both seq_len_interpolation_factor={linear} and scale_factor={llama3}")
    if linear is not None:
        return {"rope_type": "linear", "factor": linear}
    if llama3 is not None:
        return {"rope_type": "llama3", **{key: getattr(gpt, field) for key, field in _LLAMA3.items()}}
    return None
