"""Puts a BRAIn run together from its configuration: model, objective, prompts, reward, loop."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, cast

import lightning.pytorch as pl
from omegaconf import DictConfig, OmegaConf

from nemo_brain.config.brain import Config, check
from nemo_brain.convert.adapter import export_adapter
from nemo_brain.convert.export import export_model
from nemo_brain.core.groups import RewardedGroup
from nemo_brain.data.prompts import TOKENISED_AT_ONCE
from nemo_brain.model.reward_head import RewardGPTConfig
from nemo_brain.objectives import make_objective
from nemo_brain.rewards.build import make_reward
from nemo_brain.rewards.megatron import MegatronReward
from nemo_brain.rewards.protocol import check_prompts
from nemo_brain.training.brain.colocated_rollout import ColocatedRollout
from nemo_brain.training.brain.data import read_data
from nemo_brain.training.brain.engine import EngineRollout
from nemo_brain.training.brain.loop import BRAInLoop
from nemo_brain.training.brain.nemo_model import BRAInGPTModel
from nemo_brain.training.brain.remote_rollout import RemoteRollout
from nemo_brain.training.brain.rollout import RolloutWorker
from nemo_brain.training.brain.state import BRAInState
from nemo_brain.training.brain.strategy import BRAInStrategy
from nemo_brain.training.build import make_ddp, make_optimizer, make_strategy
from nemo_brain.training.frame import Frame
from nemo_brain.training.model import export_for, make_gpt_config, make_lora, make_weights, rollout_stop
from nemo_brain.training.run import Parts, train


def run(cfg: DictConfig, callbacks: Sequence[pl.Callback] = ()) -> BRAInGPTModel:
    """Trains as the configuration says and leaves the results in its ``run_dir``.

    Args:
        cfg: the composed Hydra configuration.
        callbacks: more Lightning callbacks for the trainer.

    Raises:
        ValueError: on every rank, for what is wrong with the configuration, the data or the weights.
        Interrupted: on every rank, when the run was asked to end early; it has been saved.
    """
    config = check(cfg)
    given = cast(dict[str, Any], OmegaConf.to_container(cfg))
    stated = OmegaConf.create({**given, "objective": config.objective})
    return train("brain", stated, config, lambda: _parts(config), callbacks)


def _parts(config: Config) -> Parts[BRAInGPTModel, BRAInState]:
    objective = make_objective(**config.objective)
    reward = make_reward(config.reward)
    weights = make_weights(config.model, config.seed)
    gpt = make_gpt_config(config.model, config.trainer, weights, config.lengths)
    stop = rollout_stop(weights, config.rollout, config.data.template)
    if isinstance(reward, MegatronReward):
        reward_gpt = make_gpt_config(config.model, config.trainer, reward.weights, config.lengths, RewardGPTConfig)
        reward.configure(reward_gpt, weights.tokenizer, config.data.template)
    engine: EngineRollout | None = None
    # As many positions as fill the pipeline are scored at a time.
    block = config.train.micro_batch_tokens * config.model.pipeline_model_parallel_size
    if config.rollout.remote is not None:
        engine = RemoteRollout(config, config.rollout.remote, gpt, weights, stop, block)
    elif config.rollout.engine == "colocated":
        engine = ColocatedRollout(config, gpt, weights, stop, block)
    lora = make_lora(config.model.peft, config.seed)
    model = BRAInGPTModel(gpt, weights, objective, lora, make_optimizer(config.optim, config.trainer))
    strategy = make_strategy(
        BRAInStrategy,
        config.model,
        config.trainer,
        config.train,
        config.checkpoint,
        make_ddp(config.ddp, config.optim),
        config.seed,
        prior_placement=config.prior.placement,
        own_proposal=config.rollout.refresh == "kl_adaptive",
    )
    data = read_data(
        config.data,
        config.seed,
        weights.tokenizer,
        stop,
        weights.vocab_size,
        max_new_tokens=config.rollout.max_new_tokens,
        max_held_out=config.validation.max_prompts,
    )
    unrewarded = [group.prompt for group in data.offline if not isinstance(group, RewardedGroup)]
    check_prompts(reward, itertools.chain(data.prompts[:TOKENISED_AT_ONCE], data.held_out, unrewarded))
    merged = export_for("model.export_to", config.model.export_to, gpt, weights, stop.token_ids)
    adapter = export_for("model.export_adapter_to", config.model.export_adapter_to, gpt, weights, stop.token_ids)

    def at_end() -> None:
        strategy.wait_for_param_gather()
        if merged is not None:
            export_model(strategy.chunks, merged, str(config.model.export_to))
        if adapter is not None and lora is not None:
            start, directory = config.model.restore_from, str(config.model.export_adapter_to)
            export_adapter(strategy.chunks, adapter, lora, start, directory)

    def loop(frame: Frame[BRAInState]) -> BRAInLoop:
        worker = RolloutWorker(
            strategy,
            reward,
            engine,
            frame.interruption,
            stop,
            seed=config.seed,
            run_dir=frame.run_dir,
            skip_nonfinite=config.train.on_nonfinite == "skip",
            max_gap=config.max_proposal_gap,
            refresh=config.rollout.refresh,
        )
        return BRAInLoop(config, frame, worker, objective, data, stop)

    return Parts(
        model,
        strategy,
        BRAInState(objective=objective),
        steps=config.trainer.max_iterations * config.steps_per_iteration,
        data=data.sizes,
        loop=loop,
        at_end=at_end,
    )
