"""Settings of NeMo's and Megatron's without which they fail or go wrong under us, each with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from torch.nn import functional

# Of nemo.lightning.MegatronStrategy.
STRATEGY_OPTIONS: dict[str, Any] = dict(
    # Checkpoints are written by ``checkpointing.InProcessSave``.
    ckpt_async_save=False,
    # The default writes a distributed optimizer's state so that only the same layout can read it.
    ckpt_optim_fully_reshardable=True,
    # NeMo's progress bar gathers on rank 0 alone, which the other ranks' collectives do not survive on gloo.
    replace_progress_bar=False,
)


# Of NeMo's GPTConfig, with virtual stages: how Megatron's interleaved schedule passes hidden states on. Batched, two
# ranks that send to each other in both directions take one message for the other; deallocated once they have been
# sent, outputs under way are overwritten. docs/layouts.md has more, tests/host/test_pipeline.py the first.
INTERLEAVED: dict[str, Any] = dict(overlap_p2p_comm=True, batch_p2p_comm=False, deallocate_pipeline_outputs=False)


def gpt_options(virtual_stages: bool, gpt: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of NeMo's GPTConfig.

    Args:
        virtual_stages: the pipeline's stages are divided further.
        gpt: what the model says of itself, in the same fields.
    """
    options = dict(
        cross_entropy_loss_fusion=False,
        # The card is waited for after every message between stages, because of a fault that torch had until 1.13
        # (pytorch/pytorch#82450): the messages themselves are waited for.
        batch_p2p_sync=False,
    )
    if virtual_stages:
        options |= INTERLEAVED
    if torch.cuda.is_available():
        options |= _fusions(gpt)
    else:
        # Kernels of Apex and Transformer Engine, and weights made on the device.
        options |= dict(use_cpu_initialization=True, masked_softmax_fusion=False, gradient_accumulation_fusion=False)
    return options


def plain_rotary(t_SBHD: torch.Tensor, freqs_SR: torch.Tensor) -> torch.Tensor:
    """Rotary embeddings by Megatron's operations, not interleaved."""
    turned: torch.Tensor = rope_utils._apply_rotary_pos_emb_bshd(t_SBHD, freqs_SR)
    return turned


def lacks_fused_rotary() -> bool:
    """Whether neither Transformer Engine nor Apex brings Megatron a fused function, and none was given."""
    return rope_utils.fused_apply_rotary_pos_emb is None


def give_fused_rotary(function: Callable[..., torch.Tensor]) -> None:
    """What Megatron calls from now on where ``apply_rope_fusion`` is set: with t, freqs and ``interleaved``."""
    rope_utils.fused_apply_rotary_pos_emb = function


def _fusions(gpt: Mapping[str, Any]) -> dict[str, Any]:
    """Those of Megatron's that compute what the model says, and are off unless a model of NeMo's asks for them: SwiGLU
    by torch.compile (exact GELU would become another function), rotary embeddings by whose function there is."""
    found = {}
    gated = gpt.get("gated_linear_unit") and gpt.get("activation_func") is functional.silu
    if gated and gpt.get("activation_func_clamp_value") is None and not gpt.get("glu_linear_offset"):
        found["bias_activation_fusion"] = True
    if not lacks_fused_rotary() and not gpt.get("rotary_interleaved"):
        found["apply_rope_fusion"] = True
    return found
