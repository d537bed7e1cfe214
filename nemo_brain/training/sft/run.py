"""Puts supervised fine-tuning together from its configuration.

NeMo's own (``llm.finetune``) pads its rows, or packs them for Transformer Engine's attention, which a machine without
CUDA cannot have. These are the packed rows and the passes of BRAIn's runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import lightning.pytorch as pl
from omegaconf import DictConfig

from nemo_brain.config.sft import SFTConfig, check_sft_config
from nemo_brain.convert.export import export_model
from nemo_brain.data.demonstrations import load_demonstrations
from nemo_brain.data.examples import checksum, read_examples
from nemo_brain.training.build import make_ddp, make_optimizer, make_strategy
from nemo_brain.training.epochs import EpochState, steps_per_epoch
from nemo_brain.training.model import export_for, make_gpt_config, make_lora, make_weights, model_stop
from nemo_brain.training.nemo_model import PackedModel
from nemo_brain.training.run import Parts, train
from nemo_brain.training.sft.training import CompletionLoop, CompletionStrategy


def fine_tune(cfg: DictConfig, callbacks: Sequence[pl.Callback] = ()) -> PackedModel:
    """Trains as the configuration says and leaves the results in its ``run_dir`` and ``model.export_to``.

    Args:
        cfg: the composed Hydra configuration.
        callbacks: more Lightning callbacks for the trainer.

    Raises:
        ValueError: on every rank, for what is wrong with the configuration, the data or the weights.
        Interrupted: on every rank, when the run was asked to end early; it has been saved.
    """
    config = check_sft_config(cfg)
    return train("sft", cfg, config, lambda: _parts(config), callbacks)


def _parts(config: SFTConfig) -> Parts[PackedModel, EpochState]:
    weights = make_weights(config.model, config.seed)
    gpt = make_gpt_config(config.model, config.trainer, weights, config.lengths)
    stop = model_stop(weights, config.data.template)
    export = export_for("model.export_to", config.model.export_to, gpt, weights, stop.token_ids)
    optim = make_optimizer(config.optim, config.trainer)
    load = partial(load_demonstrations, assistant_turns=config.data.assistant_turns)
    examples, held_out = read_examples(config.data, config.seed, weights.tokenizer, stop, load)
    strategy = make_strategy(
        CompletionStrategy,
        config.model,
        config.trainer,
        config.train,
        config.checkpoint,
        make_ddp(config.ddp, config.optim),
        config.seed,
    )

    def at_end() -> None:
        if export is not None:
            strategy.wait_for_param_gather()
            export_model(strategy.chunks, export, str(config.model.export_to))

    return Parts(
        PackedModel(gpt, weights, make_lora(config.model.peft, config.seed), optim),
        strategy,
        EpochState(),
        steps=config.trainer.epochs * steps_per_epoch(examples, config.train.global_batch_size),
        data={"examples": checksum(examples), "held-out examples": checksum(held_out)},
        loop=lambda frame: CompletionLoop(config, frame, strategy, examples, held_out, stop),
        at_end=at_end,
    )
