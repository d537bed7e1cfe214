"""Model cards: what they say of a run, and what they do not say of the machine."""

from __future__ import annotations

import yaml
from omegaconf import OmegaConf
from toy_runs import toy_config

from nemo_brain.report.model_card import model_card

STEP = {"kind": "step", "step": 1, "iteration": 0, "loss": 0.5, "kl_alpha_beta": 0.5, "step_seconds": 1.0, "tokens": 10}


def configuration(*overrides: str) -> dict:
    return OmegaConf.to_container(toy_config(*overrides), resolve=True)


def test_a_card_has_front_matter_method_results_and_configuration():
    card = model_card(
        "brain",
        "org/name",
        [STEP],
        configuration(
            "model.restore_from=/home/me/secret/start", "+reward.url=http://secret:80", "data.train=/home/x.jsonl"
        ),
    )
    head, body = card.removeprefix("---\n").split("\n---\n")
    assert yaml.safe_load(head) == {"library_name": "transformers", "tags": ["nemo_brain", "brain"]}
    assert body.startswith(
        "# name\n\nTrained by BRAIn (Bayesian Reward-conditioned Amortized Inference) from `start` with"
    )
    assert "| training speed | 10 tokens/s |" in body
    shown = yaml.safe_load(body.partition("```yaml\n")[2].partition("```")[0])
    assert shown["rollout"]["outputs_per_prompt"] == 8 and shown["data"]["train"] == "x.jsonl"
    assert not shown.keys() & {"run_dir", "logger", "checkpoint", "trainer"} and "/home" not in card
    assert shown["reward"]["url"] == "..."


def test_the_method_is_the_objectives():
    def method(kind, *overrides):
        return (
            model_card(kind, "org/name", [], configuration(*overrides))
            .partition("Trained by ")[2]
            .partition(" from random")[0]
        )

    assert method("brain", "objective.name=dpo_sft", "objective.beta=0.1") == "DPO-sft on groups of outputs"
    assert method("brain", "objective.name=null", "objective._target_=my.Own") == "the objective `my.Own`"
    sft = {**configuration(), "objective": None}
    assert "Trained by supervised fine-tuning" in model_card("sft", "org/name", [], sft)
