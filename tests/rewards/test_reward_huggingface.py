"""Hugging Face reward models: scores as transformers gives them one by one, templates, limits, and what is refused."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path

import pytest
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from scored_models import (
    CHAT,
    CLOSE,
    OUTPUTS,
    PROMPTS,
    WORDS,
    as_bytes,
    chat_ids,
    chat_tokenizer,
    one_by_one,
    save_reward_model,
    scores,
    user,
)
from tokenizers import processors
from toy_runs import recorded_run
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from nemo_brain.rewards.huggingface import HuggingFaceReward
from nemo_brain.rewards.protocol import RewardError

CHAT += "{% if add_generation_prompt %}<|assistant|>{% endif %}"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_reward_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return save_reward_model("bert", tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize("pad", [None, 257, 256], ids=["no padding token", "padding token", "padding is the end token"])
@pytest.mark.parametrize("batch_tokens", [1, 130, 10_000])
def test_a_chat_model_scores_as_transformers_does_one_by_one(tmp_path, pad, batch_tokens):
    """Whatever the batches; the texts of special tokens in prompts and outputs stay texts."""
    path = save_reward_model("llama", tmp_path, pad)
    expected = one_by_one(path, [chat_ids(path, user(p), o) for p, o in zip(PROMPTS, OUTPUTS, strict=True)])
    assert max(expected) - min(expected) > 0.1
    reward = HuggingFaceReward(str(path), batch_tokens=batch_tokens)
    assert scores(reward) == pytest.approx(expected, **CLOSE)
    backwards = scores(reward, PROMPTS[::-1], OUTPUTS[::-1])
    assert backwards == pytest.approx(expected[::-1], **CLOSE)


def test_batches_hold_what_the_budget_allows(llama):
    reward = HuggingFaceReward(str(llama), batch_tokens=20)
    assert reward._batches([3, 1, 0, 2], [6, 5, 30, 4]) == [[3, 1, 0], [2]]
    assert reward._batches([], []) == [[]]


def test_the_prompts_messages_are_what_the_reward_model_sees(llama):
    """Not the text that the policy's template made of them."""
    messages = [{"role": "system", "content": "Be brief."}, *user("hi"), {"role": "assistant", "content": "yes?"}]
    messages += user("bye")
    expected = one_by_one(llama, [chat_ids(llama, messages, "so"), chat_ids(llama, user("<s>plain"), "so")])
    prompts = ["[INST] what the policy saw [/INST]", "<s>plain"]
    found = scores(HuggingFaceReward(str(llama)), prompts, ["so", "so"], [{"messages": messages}, {}])
    assert found == pytest.approx(expected, **CLOSE)


def test_pairs_are_scored_as_the_tokenizer_makes_them(bert):
    tokenizer = AutoTokenizer.from_pretrained(bert)
    plain = ["blue!", "", "no,thanks", "apple," * 6, "z"]
    whole = tokenizer(PROMPTS, plain, truncation=False)  # lists: of two texts, an empty second one would be left out
    rows = [{name: whole[name][i] for name in ("input_ids", "token_type_ids")} for i in range(len(PROMPTS))]
    assert len(rows[0]["input_ids"]) == len(PROMPTS[0]) + len(plain[0]) + 3
    expected = one_by_one(bert, [row["input_ids"] for row in rows], [row["token_type_ids"] for row in rows])
    assert max(expected) - min(expected) > 0.01
    for batch_tokens in (1, 10_000):
        reward = HuggingFaceReward(str(bert), template="pair", batch_tokens=batch_tokens)
        assert scores(reward, PROMPTS, plain) == pytest.approx(expected, **CLOSE)
    # A text that spells a special token is characters.
    ids = [2, *(WORDS.index(c) for c in "a[SEP]"), 3, *(WORDS.index(c) for c in "[CLS]"), 3]
    forged = one_by_one(bert, [ids], [[0] * 8 + [1] * 6])
    assert scores(reward, ["a[SEP]"], ["[CLS]"]) == pytest.approx(forged, **CLOSE)


def test_a_format_string_writes_special_tokens_and_its_values_do_not(tmp_path):
    path = save_reward_model("gpt2", tmp_path)
    pairs = list(zip(PROMPTS, OUTPUTS, strict=True))
    rows = [[*as_bytes("Q: "), *as_bytes(p), 256, *as_bytes("{A} "), *as_bytes(o)] for p, o in pairs]
    template = "Q: {prompt}<eos>{{A}} {output}"
    reward = HuggingFaceReward(str(path), template=template, batch_tokens=200)
    assert scores(reward) == pytest.approx(one_by_one(path, rows), **CLOSE)
    ended = HuggingFaceReward(str(path), template=template, append_end_token=True)
    assert scores(ended) == pytest.approx(one_by_one(path, [[*row, 256] for row in rows]), **CLOSE)
    with pytest.raises(ValueError, match=r"reward\.max_tokens=161 is more than the model's 160 positions"):
        HuggingFaceReward(str(path), template=template, max_tokens=161)


def test_an_end_token_is_not_appended_twice(llama):
    """The chat template writes it already."""
    assert scores(HuggingFaceReward(str(llama), append_end_token=True)) == scores(HuggingFaceReward(str(llama)))


def test_rows_that_are_too_long_are_refused_or_truncated_on_the_left(llama, bert):
    ids = chat_ids(llama, user("Name a colour."), "blue")
    refusing = HuggingFaceReward(str(llama), max_tokens=len(ids) - 3)
    with pytest.raises(
        ValueError, match=r"22 tokens .*reward\.max_tokens=19 .*too_long=truncate.* on output 1: 'blue'"
    ):
        scores(refusing, ["x", "Name a colour.", "y"], ["a", "blue", "b"])
    cutting = HuggingFaceReward(str(llama), max_tokens=len(ids) - 3, too_long="truncate")
    assert scores(cutting, ["Name a colour."], ["blue"]) == pytest.approx(one_by_one(llama, [ids[3:]]), **CLOSE)
    # Of a pair, the prompt; its special tokens stay.
    pair = HuggingFaceReward(str(bert), template="pair", max_tokens=9, too_long="truncate")
    row = [2, WORDS.index("c"), WORDS.index("d"), 3, *(WORDS.index(c) for c in "blue"), 3]
    expected = one_by_one(bert, [row], [[0] * 4 + [1] * 5])
    assert scores(pair, ["abcd"], ["blue"]) == pytest.approx(expected, **CLOSE)
    with pytest.raises(ValueError, match=r"the output alone fills reward\.max_tokens=9 \(raise it\)"):
        scores(pair, ["abcd"], ["blueblue"])


def test_the_start_token_survives_truncation(tmp_path):
    path = save_reward_model("llama", tmp_path)
    tokenizer = chat_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", 257)]
    )
    tokenizer.chat_template = "<pad>" + CHAT
    tokenizer.save_pretrained(path)
    ids = [257, *chat_ids(path, user("Name a colour."), "blue")]
    reward = HuggingFaceReward(str(path), max_tokens=10, too_long="truncate")
    assert scores(reward, ["Name a colour."], ["blue"]) == pytest.approx(one_by_one(path, [[257, *ids[-9:]]]), **CLOSE)


def test_several_messages_need_the_chat_template(bert):
    with pytest.raises(ValueError, match=r"a prompt of 2 messages: reward\.template=pair takes one"):
        scores(HuggingFaceReward(str(bert), template="pair"), ["x"], ["y"], [{"messages": [*user("a"), *user("b")]}])


def test_dtype_and_limits_are_taken(llama, bert):
    exact, rounded = (scores(HuggingFaceReward(str(llama), dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert exact != rounded and rounded == pytest.approx(exact, abs=0.3)  # bf16 has 8 bits
    assert HuggingFaceReward(str(bert), template="pair")._max_tokens == 512  # BERT's positions


def edit_config(path: Path, **changes) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"model": "/none"}, r"reward\.model: there is no /none/config\.json"),
        ({"template": "{prompt}"}, r"reward\.template: '\{prompt\}' has no \{output\} \(use chat, pair, or a format"),
        ({"template": None}, r"reward\.template is None, which is not text"),
        ({"too_long": "cut"}, r"reward\.too_long must be refuse or truncate, not 'cut'"),
        ({"dtype": "int8"}, r"reward\.dtype must be float32, bfloat16 or float16, not 'int8'"),
        ({"batch_tokens": 0}, r"reward\.batch_tokens must be an integer of at least 1, not 0"),
        ({"max_tokens": 1.5}, r"reward\.max_tokens must be an integer of at least 1, not 1\.5"),
        ({"device": "abacus"}, r"reward\.device='abacus' cannot be used"),
    ],
)
def test_arguments_that_cannot_be_are_named(llama, arguments, match):
    with pytest.raises(ValueError, match=match):
        HuggingFaceReward(**{"model": str(llama), **arguments})


def test_directories_that_hold_no_reward_model_are_refused(llama, bert, tmp_path, caplog):
    with pytest.raises(ValueError, match=r"reward\.template=chat: the reward model's tokenizer has no chat template"):
        HuggingFaceReward(str(bert))
    with pytest.raises(ValueError, match=r"the tokenizer in .* has no end token"):
        HuggingFaceReward(str(bert), template="pair", append_end_token=True)

    two = shutil.copytree(llama, tmp_path / "two")
    edit_config(two, id2label={"0": "bad", "1": "good"}, label2id={"bad": 0, "good": 1})
    with pytest.raises(ValueError, match=r"has 2 labels, a reward model has one"):
        HuggingFaceReward(str(two))

    pickled = shutil.copytree(llama, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"^reward\.model: \S+pickled: only pickled weights .* \(safetensors alone"):
        HuggingFaceReward(str(pickled))

    sharded = shutil.copytree(llama, tmp_path / "sharded")
    AutoModelForSequenceClassification.from_pretrained(llama).save_pretrained(sharded, max_shard_size="10KB")
    (sharded / "model.safetensors").unlink()
    expected = scores(HuggingFaceReward(str(llama)))
    assert scores(HuggingFaceReward(str(sharded))) == expected
    shard = next(sharded.glob("model-00002-*.safetensors"))
    shard.unlink()
    with pytest.raises(ValueError, match=rf"names files that are not there: {shard.name}"):
        HuggingFaceReward(str(sharded))

    # A language model: its head would be random.
    headless = tmp_path / "headless"
    LlamaForCausalLM(LlamaConfig.from_pretrained(llama)).save_pretrained(headless)
    chat_tokenizer().save_pretrained(headless)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with pytest.raises(ValueError, match=r"no weights of the right shape for score\.weight, and random ones would"):
        HuggingFaceReward(str(headless)).load()

    encoder_decoder = shutil.copytree(llama, tmp_path / "bart")
    AutoConfig.for_model("bart", num_labels=1).save_pretrained(encoder_decoder)
    with pytest.raises(ValueError, match="encoder-decoder model, which is not supported"):
        HuggingFaceReward(str(encoder_decoder))
    AutoConfig.for_model("clip").save_pretrained(encoder_decoder)
    with pytest.raises(ValueError, match=r"is a clip, of which transformers knows no sequence classification|labels"):
        HuggingFaceReward(str(encoder_decoder))


def test_weights_that_are_not_finite_are_refused_unless_allowed(llama, tmp_path):
    """Also those that are not, in the type that they are computed in."""
    path = shutil.copytree(llama, tmp_path / "nan")
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e30
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    HuggingFaceReward(str(path), dtype="bfloat16").load()
    with pytest.raises(ValueError, match=r"^reward\.model: \S+/nan: model\.norm\.weight is not finite: 1 of 16 values"):
        HuggingFaceReward(str(path), dtype="float16").load()
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.norm\.weight is not finite: .* with reward\.allow_nonfinite=true"):
        HuggingFaceReward(str(path)).load()
    with pytest.raises(RewardError, match="returned nan"):  # which the run does not take
        scores(HuggingFaceReward(str(path), allow_nonfinite=True))


def test_a_run_takes_it_on_every_layout(llama):
    """With the policy's template around the prompt, which the reward model does not see."""
    overrides = ["trainer.max_iterations=1", "rollout.prompts_per_iteration=8", "data.holdout=0"]
    overrides += ["data.template='Q: {prompt} A:'", "model.tensor_model_parallel_size=2"]
    overrides += ["reward._target_=nemo_brain.rewards.huggingface.HuggingFaceReward", "reward.function=null"]
    result, _ = run_ranks(recorded_run, 2, *overrides, f"+reward.model={llama}")
    groups = [json.loads(line) for line in result["samples"].splitlines()]
    pairs = [(group["prompt"], output) for group in groups for output in group["outputs"]]
    assert len(pairs) == 8 * 8 and all(prompt.startswith("Q: ") and prompt.endswith(" A:") for prompt, _ in pairs)
    rows = [chat_ids(llama, user(prompt[3:-3]), output["text"]) for prompt, output in pairs]
    assert [output["reward"] for _, output in pairs] == pytest.approx(one_by_one(llama, rows), **CLOSE)
