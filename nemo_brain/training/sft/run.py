"""Puts supervised fine-tuning together from its configuration.

NeMo's own (``llm.finetune``) pads its rows, or packs them for Transformer Engine's attention, which a machine without
CUDA cannot have. These are the packed rows and the passes of BRAIn's runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import lightning.pytorch as pl
from omegaconf import DictConfig

from nemo_brain.config.sft import check_sft_config
from nemo_brain.data.demonstrations import load_demonstrations
from nemo_brain.data.examples import read_examples
from nemo_brain.training.build import (
    check_export,
    make_ddp,
    make_gpt_config,
    make_lora,
    make_optimizer,
    make_strategy,
    make_weights,
    quiet,
    world_size,
)
from nemo_brain.training.epochs import train_epochs
from nemo_brain.training.nemo_model import PackedModel
from nemo_brain.training.sft.training import CompletionLoop, CompletionStrategy


def fine_tune(cfg: DictConfig, callbacks: Sequence[pl.Callback] = ()) -> PackedModel:
    """Trains as the configuration says and leaves the results in its ``run_dir`` and ``model.export_to``.

    Args:
        cfg: the composed Hydra configuration.
        callbacks: more Lightning callbacks for the trainer.

    Raises:
        ValueError: on every rank, for what is wrong with the configuration, the data or the weights.
    """
    quiet()
    config = check_sft_config(cfg)
    world_size(config.trainer, config.model)
    weights = make_weights(config.model, config.seed)
    gpt = make_gpt_config(config.model, config.trainer, weights, config.lengths)
    check_export(config.model.export_to, gpt, weights)
    optim = make_optimizer(config.optim, config.trainer)
    load = partial(load_demonstrations, assistant_turns=config.data.assistant_turns)
    examples, held_out = read_examples(config.data, config.seed, weights.tokenizer, load)
    loop = CompletionLoop(config, examples, held_out)
    model = PackedModel(gpt, weights, make_lora(config.model.peft, config.seed), optim)
    strategy = make_strategy(
        CompletionStrategy,
        config.model,
        config.trainer,
        config.train,
        make_ddp(config.ddp, config.optim),
        config.seed,
    )
    train_epochs(cfg, model, strategy, loop, callbacks)
    return model
