"""Settings of NeMo's and Megatron's without which they fail or go wrong under us, each with the reason."""

from __future__ import annotations

from typing import Any

import torch

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
# sent, outputs under way are overwritten. docs/layouts.md has more, tests/host/test_virtual_stages.py the first.
INTERLEAVED: dict[str, Any] = dict(overlap_p2p_comm=True, batch_p2p_comm=False, deallocate_pipeline_outputs=False)


def gpt_options(virtual_stages: bool) -> dict[str, Any]:
    """Fields of NeMo's GPTConfig; ``virtual_stages``: the pipeline's stages are divided further."""
    options = dict(
        cross_entropy_loss_fusion=False,
    )
    if virtual_stages:
        options |= INTERLEAVED
    if not torch.cuda.is_available():
        # Kernels of Apex and Transformer Engine, and weights made on the device.
        options |= dict(use_cpu_initialization=True, masked_softmax_fusion=False, gradient_accumulation_fusion=False)
    return options
