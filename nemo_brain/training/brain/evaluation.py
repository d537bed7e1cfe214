"""Compares models on held-out prompts: each samples with the same draws, a reward judges, and every one is set against
the start model as a training's validations are."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.utils import unwrap_model
from omegaconf import DictConfig, OmegaConf

from nemo_brain.config.common import CheckpointConfig, GroupTrainConfig
from nemo_brain.config.evaluate import EvaluationConfig, check_evaluation
from nemo_brain.convert.open import open_weights
from nemo_brain.core.groups import Prompt, SampledGroup, ScoredGroup
from nemo_brain.core.interruption import Interruption
from nemo_brain.core.ranks import is_first_rank, on_all_ranks, on_first_rank, raise_on_all_ranks
from nemo_brain.data.stop import Stop
from nemo_brain.durability.supervision import Supervisor
from nemo_brain.host.distributed import connect
from nemo_brain.model.gpt import PackedGPTConfig
from nemo_brain.model.reward_head import RewardGPTConfig
from nemo_brain.model.weights import Weights, load_weights
from nemo_brain.report.evaluate import against, evaluate, gold_metrics, win_rate_interval
from nemo_brain.report.metrics import MetricsWriter, read_metrics, write_samples
from nemo_brain.report.page import write_report
from nemo_brain.report.progress import progress
from nemo_brain.report.run_dir import locked, prepare_run_dir, write_status
from nemo_brain.report.summary import summary_lines
from nemo_brain.rewards.build import make_reward
from nemo_brain.rewards.judge import Judge
from nemo_brain.rewards.megatron import MegatronReward
from nemo_brain.rewards.protocol import Reward, load_reward, score_groups
from nemo_brain.sampling.sampler import SamplingOptions
from nemo_brain.training.brain.data import read_prompts
from nemo_brain.training.brain.rollout import VALIDATION, RolloutWorker
from nemo_brain.training.brain.strategy import BRAInStrategy
from nemo_brain.training.build import make_strategy, make_trainer, reduce_log_noise, world_size
from nemo_brain.training.model import make_gpt_config, make_weights, rollout_stop
from nemo_brain.training.nemo_model import PackedModel
from nemo_brain.training.run import ending_recorded


class EvaluationModel(PackedModel):
    """PackedModel that is not trained. A batch of Lightning's test loop is the place of a model to be looked at."""

    look: Callable[[int], None]

    def test_step(self, place: int) -> None:
        """Looks at it."""
        self.look(place)


class EvaluationStrategy(BRAInStrategy):
    """BRAInStrategy without gradients and optimizer, whose model is filled with one model's weights after another's."""

    def test_step(self, dataloader_iter: Iterator, *args: Any, **kwargs: Any) -> None:
        """NeMo's would split a batch of tokens."""
        place, *_ = next(dataloader_iter)
        self.lightning_module.test_step(place)

    def load(self, weights: Weights) -> None:
        """Fills the model with other weights. ValueError: on every rank, when they cannot be loaded on one."""
        errors: list[Exception] = []
        try:
            load_weights(unwrap_model(self.chunks), weights)
        except ValueError as error:
            errors.append(error)
        raise_on_all_ranks(errors)


def evaluate_models(cfg: DictConfig) -> None:
    """Evaluates as the configuration says and leaves the results in its ``run_dir``.

    Raises:
        ValueError: on every rank, for what is wrong with the configuration, the data, the weights or the reward.
        Interrupted: on every rank, when it was asked to end early.
    """
    config = check_evaluation(cfg)
    reduce_log_noise()
    world_size(config.trainer, config.model)
    connect(config.trainer.hang_timeout_minutes + 2)
    parts = on_all_ranks(lambda: _parts(config))
    run_dir, interruption = Path(config.run_dir), Interruption()
    with contextlib.ExitStack() as stack:

        def begin() -> None:
            stack.enter_context(locked(run_dir))
            prepare_run_dir(run_dir)
            (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True), encoding="utf-8")
            write_status(run_dir, "running", 0)

        on_first_rank(begin)
        writer = MetricsWriter(run_dir) if is_first_rank() else None
        parts.model.look = Evaluation(config, parts, interruption, writer).look
        trainer = make_trainer(
            config.trainer,
            [],
            parts.strategy,
            1,
            [Supervisor(config.trainer.hang_timeout_minutes, run_dir, interruption)],
        )
        with ending_recorded(writer, run_dir, lambda: 0):
            trainer.test(parts.model, dataloaders=range(1 + len(config.candidates)), verbose=False)
        if writer:
            report = write_report(run_dir)
            stated: Any = OmegaConf.to_container(cfg, resolve=True)
            print("\n".join(summary_lines(read_metrics(run_dir / "metrics.jsonl"), stated, report)))


@dataclass(frozen=True)
class _Parts:
    """What an evaluation consists of, read and checked before anything is written."""

    model: EvaluationModel
    strategy: EvaluationStrategy
    candidates: Sequence[Weights]
    prompts: Sequence[Prompt]
    stop: Stop
    reward: Any
    gold: Mapping[str, Reward]
    judge: Judge | None


def _parts(config: EvaluationConfig) -> _Parts:
    reward = make_reward(config.reward)
    gold = {name: _made(f"gold.{name}", arguments) for name, arguments in (config.gold or {}).items()}
    judge = None
    if config.judge is not None:
        options = dataclasses.asdict(config.judge)
        judge = Judge(**{name: value for name, value in options.items() if name not in ("against", "cache")})
    section = config.model.complete
    weights = make_weights(section, config.seed)
    gpt = make_gpt_config(section, config.trainer, weights, config.lengths)
    stop = rollout_stop(weights, config.rollout, config.data.template)
    candidates = [_candidate(path, weights, section.allow_nonfinite) for path in config.candidates]
    if isinstance(reward, MegatronReward):
        reward_gpt = make_gpt_config(section, config.trainer, reward.weights, config.lengths, RewardGPTConfig)
        reward.configure(reward_gpt, weights.tokenizer, config.data.template)
    strategy = make_strategy(
        EvaluationStrategy,
        section,
        config.trainer,
        GroupTrainConfig(global_batch_size=1, micro_batch_tokens=config.rollout.micro_batch_tokens),
        CheckpointConfig(),
        DistributedDataParallelConfig(),
        config.seed,
        prior_placement="resident",
        setup_optimizers=False,
    )
    prompts = read_prompts(config.data.validation, "data.validation", config.data, weights.tokenizer)
    prompts = prompts[: config.validation.max_prompts]
    compared = config.judge is not None and config.judge.against == "reference"
    if compared and all(prompt.reference is None for prompt in prompts):
        raise ValueError("judge.against=reference: no prompt of data.validation has a reference")
    return _Parts(EvaluationModel(gpt, weights), strategy, candidates, prompts, stop, reward, gold, judge)


def _made(key: str, section: Mapping[str, Any]) -> Reward:
    try:
        return make_reward(section, alone=f"{key} of an evaluation")
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _candidate(path: str, start: Weights, allow_nonfinite: bool) -> Weights:
    """Opens a model. ValueError: it cannot be read, or is not of the start model's kind."""
    try:
        weights = open_weights(path, None if allow_nonfinite else "model.allow_nonfinite")
    except ValueError as error:
        raise ValueError(f"candidates: {error}") from error
    ours, theirs = (PackedGPTConfig(**{"vocab_size": 0, **model.gpt_config}) for model in (start, weights))
    stated = {**start.gpt_config, **weights.gpt_config}
    differing = [name for name in stated if getattr(ours, name) != getattr(theirs, name)]
    if weights.vocab_size != start.vocab_size or weights.tokenizer.get_vocab() != start.tokenizer.get_vocab():
        differing.append("tokenizer")
    if differing:
        raise ValueError(
            f"candidates: {path} differs from model.restore_from in {', '.join(sorted(differing))}, so that outputs of "
            "one are not outputs of the other: evaluate it with a start model of its own kind"
        )
    return weights


class Evaluation:
    """Looks at one model after the other, the start model first.

    Args:
        config, parts: the evaluation.
        interruption: may end it early.
        writer: of rank 0; None on the others.
    """

    def __init__(
        self, config: EvaluationConfig, parts: _Parts, interruption: Interruption, writer: MetricsWriter | None
    ):
        self._config, self._parts = config, parts
        self._interruption, self._writer = interruption, writer
        self._worker = RolloutWorker(
            parts.strategy,
            parts.reward,
            None,
            interruption,
            parts.stop,
            seed=config.seed,
            run_dir=Path(config.run_dir),
            skip_nonfinite=False,
        )
        rollout = config.rollout
        self._sampling = SamplingOptions(
            outputs=config.validation.outputs_per_prompt,
            max_new_tokens=rollout.max_new_tokens,
            stop=parts.stop,
            temperature=rollout.temperature,
            rows_in_flight=rollout.rows_in_flight,
            prefill_tokens=rollout.micro_batch_tokens,
        )
        self._start: list[ScoredGroup] = []
        self._references: list[float | None] = []
        self._gold: dict[str, list[ScoredGroup]] = {}  # the start model's outputs
        # Those of the candidates before, by the reward ("") and by other scores ("gold/NAME/").
        self._earlier: dict[str, list[tuple[str, list[ScoredGroup]]]] = defaultdict(list)

    def look(self, place: int) -> None:
        """At the start model (0), or at a candidate: samples, has judged, and records how it compares."""
        prompts = on_all_ranks(lambda: list(self._parts.prompts))
        if place == 0:
            self._interruption.listen()  # Lightning has installed its own handlers by now
            self._worker.setup()
            on_first_rank(self._load_gold)
            self._start = self._outputs(prompts, "start model", untrained=True)
            self._references = self._worker.reference_rewards(prompts)
            self._gold = {name: self._judged_by(gold, self._start) for name, gold in self._parts.gold.items()}
            self._write_samples(0, self._start, "start")
            return
        name = self._config.candidates[place - 1]
        self._parts.strategy.load(self._parts.candidates[place - 1])
        groups = self._outputs(prompts, name, untrained=False)
        metrics: dict[str, Any] = evaluate(self._start, groups, self._references).as_metrics()
        if self._config.rollout.temperature != 1:
            metrics |= {name: math.nan for name in metrics if name.startswith("eval/kl_to_prior")}
        metrics |= self._against_earlier("", name, groups)
        for gold_name, gold in self._parts.gold.items():
            scored = self._judged_by(gold, groups)
            metrics |= gold_metrics(gold_name, self._gold[gold_name], groups, scored)
            metrics |= self._against_earlier(f"gold/{gold_name}/", name, scored)
        if self._parts.judge is not None:
            metrics |= on_first_rank(lambda: self._compare(groups, name), interruption=self._interruption)
        if self._writer:
            self._writer.write("eval", 0, {"candidate": name, **metrics})
        self._write_samples(place, groups, "final")

    def _outputs(self, prompts: Sequence[Prompt], name: str, untrained: bool) -> list[ScoredGroup]:
        sampled = self._worker.sample(prompts, self._sampling, VALIDATION, f"{name}: sampling")
        return self._worker.scorer.score(self._worker.reward(sampled), 1.0, untrained)[0]

    def _against_earlier(self, score: str, name: str, groups: list[ScoredGroup]) -> dict[str, Any]:
        """By this score; nothing for the first candidate."""
        found = against(self._earlier[score], groups)
        self._earlier[score].append((name, groups))
        return {f"{score}against": found} if found else {}

    def _load_gold(self) -> None:
        for reward in self._parts.gold.values():
            load_reward(reward)

    def _judged_by(self, reward: Reward, groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
        """The groups with another reward."""

        def work() -> list[list[float]]:
            sampled = [SampledGroup(group.prompt, group.outputs) for group in groups]
            return [group.rewards for group in score_groups(reward, sampled)]

        rewards = on_first_rank(work, interruption=self._interruption)
        return [dataclasses.replace(group, rewards=values) for group, values in zip(groups, rewards, strict=True)]

    def _compare(self, groups: Sequence[ScoredGroup], name: str) -> dict[str, float]:
        """What the LLM says of the outputs against the start model's of the same place, or against the references."""
        config, judge = self._config.judge, self._parts.judge
        assert config is not None and judge is not None
        pairs, owners = [], []
        for start, group in zip(self._start, groups, strict=True):
            for output, other in zip(group.outputs, start.outputs, strict=True):
                theirs = other.text if config.against == "start" else group.prompt.reference
                if theirs is not None:
                    pairs.append((group.prompt.text, output.text, theirs))
                    owners.append(group.prompt.id)
        cache = Path(config.cache or f"{self._config.run_dir}/judgements.jsonl")
        with progress(2 * len(pairs), f"{name}: judging", "answers") as bar:
            session = judge.judge(pairs, cache, bar.update)
        scores: dict[str, list[float]] = {}
        for owner, judgement in zip(owners, session.judgements, strict=True):
            if judgement.score is not None:
                scores.setdefault(owner, []).append(judgement.score)
        if not scores:
            raise ValueError(f"judge: no answer had a verdict, the texts are in {cache}: see judge.prompt")
        win_rate = win_rate_interval(np.array([np.mean(values) for values in scores.values()]))
        return {**win_rate.as_metrics("judge/win_rate"), **session.as_metrics()}

    def _write_samples(self, place: int, groups: Sequence[ScoredGroup], kind: str) -> None:
        if self._writer:
            write_samples(self._config.run_dir, place, groups, kind)
