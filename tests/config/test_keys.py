"""What a key's field says is what is checked, and what the YAML files and docs/configuration.md say of it."""

from __future__ import annotations

import copy
import functools
import math

import pytest
from omegaconf import DictConfig, OmegaConf
from toy_runs import ROOT, composed

from nemo_brain.config.__main__ import FILES, _commented, contents
from nemo_brain.config.brain import Config
from nemo_brain.config.reward_model import RewardConfig
from nemo_brain.config.schema import Unless, key, keys, parse, resume_rule, rules
from nemo_brain.config.serve_reward import ServeConfig
from nemo_brain.config.sft import SFTConfig

KINDS = {"brain": Config, "sft": SFTConfig, "reward_model": RewardConfig, "serve_reward": ServeConfig}


@pytest.mark.parametrize("file", [*FILES, "docs/configuration.md"])
def test_comments_and_page_are_what_the_fields_say(file):
    assert (ROOT / file).read_text() == contents()[file], "python -m nemo_brain.config writes them"


def test_a_comment_that_differs_is_written_anew_and_those_of_free_keys_stay():
    text = "trainer:\n  fp8: null # wrong,\n" + " " * 31 + "# on two lines\noptim:\n  lr: 1 # kept\n"
    _, fp8, optim, lr = _commented(text, Config).splitlines()
    assert fp8.startswith("  fp8: null ") and "hybrid" in fp8 and "wrong" not in fp8
    assert "OptimizerConfig" in optim and lr == "  lr: 1 # kept"


@pytest.mark.parametrize("kind", KINDS.values())
def test_every_key_has_a_meaning(kind):
    silent = [name for name, item, section in keys(kind) if section is None and not rules(item).comment]
    assert silent == []


# Sections that the files leave null, and what has no default.
GIVEN = {
    "brain": {"model": {"peft": {}}, "rollout": {"remote": {"url": "http://host:1", "model": "m"}}},
    "sft": {"model": {"peft": {}}, "data": {"train": "x"}},
    "reward_model": {"model": {"peft": {}}, "data": {"train": "x"}},
    "serve_reward": {"reward": {"model": "x"}},
}


@functools.cache
def shipped(name: str) -> DictConfig:
    cfg = OmegaConf.merge(composed(name), GIVEN[name])
    OmegaConf.set_struct(cfg, False)
    return cfg


def refusal(name: str, path: str, value: object) -> str:
    """What is said of a value in a shipped file; '' where it is taken."""
    cfg = copy.deepcopy(shipped(name))
    OmegaConf.update(cfg, path, value)
    try:
        parse(KINDS[name], cfg, "the file")
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", KINDS)
def test_every_bound_is_checked_and_can_be_reached(name):
    checked = 0
    for path, item, _ in keys(KINDS[name]):
        rule, many = rules(item), str(item.type).startswith("list")
        outside: list = [bound for bound in (rule.above, rule.below) if bound is not None]
        outside += [rule.at_least - 1] if rule.at_least is not None else []
        outside += [rule.at_most + 1] if rule.at_most is not None else []
        outside += ["none of them"] if rule.among is not None else []
        for value in outside:
            said = refusal(name, path, [value] if many else value)
            assert said.startswith(f"{path} must be {rule.bounds}"), said
            checked += 1
        for bound in (rule.at_least, rule.at_most):
            assert bound is None or not refusal(name, path, [bound] if many else bound), path
        if str(item.type).startswith("float"):
            assert refusal(name, path, math.nan) == f"{path} must be a finite number, not nan"
    assert checked >= 6


def test_what_may_change_is_said_at_a_section_or_at_a_key():
    assert resume_rule(SFTConfig, "ddp.bucket_size") is True
    assert resume_rule(SFTConfig, "checkpoint.keep_last") is True
    assert resume_rule(RewardConfig, "model.options.num_layers_in_first_pipeline_stage") is True
    assert resume_rule(Config, "rollout.remote.url") is True
    assert resume_rule(Config, "trainer.devices") is True
    for fixed in ("seed", "optim.lr", "model.peft.dim", "model.gpt.num_layers", "data.train", "no.such.key", "trainer"):
        assert resume_rule(Config, fixed) is False, fixed
    for kind, name in ((Config, "trainer.max_iterations"), (SFTConfig, "trainer.epochs")):
        assert isinstance(resume_rule(kind, name), Unless)


def test_instances_do_not_share_their_defaults():
    Config().model.options["x"] = 1
    Config().checkpoint.allow_changes.append("x")
    assert Config().model.options == {} and Config().checkpoint.allow_changes == []


def test_an_unknown_rule_is_a_mistake_of_ours():
    with pytest.raises(TypeError):
        key(1, "a key", atleast=1)
