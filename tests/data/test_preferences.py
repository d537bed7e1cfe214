"""Preference files in every format, and what is wrong with a line; the hold-out split; metrics of rewards of pairs."""

from __future__ import annotations

import gzip
import json
import math

import numpy as np
import pytest
from chat_tokenizers import BLUE, END, RED, USER, VALUES, chat_tokenizer, own_stop
from hypothesis import given
from hypothesis import strategies as st

from nemo_brain.data.examples import split_conversations
from nemo_brain.data.preferences import demonstrations, load_preferences, prompts
from nemo_brain.data.tokenizers import byte_tokenizer
from nemo_brain.report.preferences import preference_metrics


def load(source, template=None, tokenizer=None, prompt=100, output=100, **options):
    tokenizer = tokenizer or byte_tokenizer()
    return load_preferences(
        source,
        **options,
        tokenizer=tokenizer,
        stop=own_stop(tokenizer),
        template=template,
        max_prompt_tokens=prompt,
        max_output_tokens=output,
    )


def texts(record: dict, template: str | None = None) -> tuple[str, str, str]:
    """Prompt, chosen and rejected as the model sees them, without the end tokens that both must have."""
    tokenizer = chat_tokenizer()
    (pair,) = load([record], template, tokenizer).examples
    outputs = pair.group.outputs
    assert all(output.token_ids[-1] == END and output.ended for output in outputs)
    decoded = [tokenizer.decode(output.token_ids[:-1]) for output in outputs]
    assert decoded == [output.text for output in outputs]
    assert tokenizer.decode(pair.group.prompt.token_ids) == pair.group.prompt.text
    return pair.group.prompt.text, *decoded


HH = "\n\nHuman: Hi \n\nAssistant: Hello.\n\nHuman: What colour?\n\nAssistant:"


def test_plain_prompt():
    assert texts({"prompt": "What colour?", "chosen": "Blue.", "rejected": "Red."}) == ("What colour?", "Blue.", "Red.")


def test_implicit_prompt_of_texts_ends_at_a_word():
    """TRL's own example; and a beginning that ends within a word."""
    assert texts({"chosen": "The sky is blue.", "rejected": "The sky is green."}) == ("The sky is", " blue.", " green.")
    assert texts({"chosen": "The sky is blue.", "rejected": "The sky is bluish."})[1:] == (" blue.", " bluish.")


def test_messages_with_and_without_a_prompt_are_the_same():
    explicit = texts({"prompt": [USER], "chosen": [BLUE], "rejected": [RED]}, "chat")
    implicit = texts({"chosen": [USER, BLUE], "rejected": [USER, RED]}, "chat")
    assert explicit == implicit
    assert explicit[1:] == ("Blue.", "Red.") and "What colour?" in explicit[0]


def test_transcripts_are_messages_with_a_chat_template_and_text_without():
    record = {"chosen": HH + " Blue.\n", "rejected": HH + " Red."}
    assert texts(record) == (HH, " Blue.\n", " Red.")
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "What colour?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert texts(record, "chat") == texts({"prompt": messages, "chosen": [BLUE], "rejected": [RED]}, "chat")


WHY = {"role": "user", "content": "Why?"}
EARLY = "\n\nHuman: Hi \n\nAssistant: No.\n\nHuman: Why?\n\nAssistant: So."
FORKS = {
    "parts early": (
        {"chosen": HH + " Blue.", "rejected": EARLY},
        "chosen goes on with 3 messages .* of role assistant",
    ),
    "one ends with the human": (
        {"chosen": HH + " Blue.\n\nHuman: Thanks.", "rejected": HH + " Red."},
        "chosen goes on with 2 messages .* of role human",
    ),
    "both end with the human": (
        {"chosen": HH + " Blue.\n\nHuman: Thanks.", "rejected": HH + " Red.\n\nHuman: What?"},
        "chosen goes on with 2 messages .* of role human",
    ),
    "behind a prompt": (
        {"prompt": HH, "chosen": " Blue.", "rejected": " Red.\n\nHuman: What?"},
        "rejected goes on with 2 messages .* of role human",
    ),
    "messages": (
        {"chosen": [USER, BLUE], "rejected": [USER, RED, USER, BLUE]},
        "rejected goes on with 3 messages .* of role assistant",
    ),
    "messages that end with the user": (
        {"prompt": [USER], "chosen": [BLUE, USER], "rejected": [RED]},
        "chosen goes on with 2 messages .* of role user",
    ),
}


@pytest.mark.parametrize("case", FORKS)
def test_pairs_that_part_before_the_last_answer_are_refused_or_cut_where_they_part(case):
    """No further turn becomes part of an answer."""
    record, words = FORKS[case]
    for template in ("chat", None) if isinstance(record["chosen"], str) else ("chat",):
        with pytest.raises(ValueError, match=rf"^data\.train\[0\]: {words}.*or set data\.forks=cut"):
            load([record], template, chat_tokenizer())
        (pair,) = load([record], template, chat_tokenizer(), forks="cut").examples
        found = [output.text.strip() for output in pair.group.outputs]
        assert found == (["Hello.", "No."] if case == "parts early" else ["Blue.", "Red."])
        prompt = pair.group.prompt.text
        assert prompt.count("Hi") == (isinstance(record["chosen"], str)) and prompt.count("What") == (
            case != "parts early"
        )


def test_transcripts_without_an_answer_in_which_they_part_are_refused_in_any_case():
    for record, words in (
        ({"chosen": HH + " Blue.", "rejected": "\n\nHuman: Hi"}, "no common beginning up to an answer"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"}, "up to an answer"),
        ({"chosen": HH + " Blue.", "rejected": "Red."}, "no common beginning up to an answer"),
        (
            {"chosen": HH + " Blue.", "rejected": HH + " Blue.\n\nHuman: So?\n\nAssistant: No."},
            "part in what the human",
        ),
        ({"chosen": EARLY, "rejected": EARLY.replace("Why", "How")}, "part in what the human says"),
        ({"chosen": [USER, BLUE, WHY, RED], "rejected": [USER, BLUE, USER, RED]}, "part in what the human says"),
        ({"prompt": "Hi", "chosen": HH + " Blue.", "rejected": HH + " Red."}, "do not begin with the prompt"),
        ({"chosen": HH + " Blue.", "rejected": HH + " Blue."}, "the same"),
    ):
        for template in ("chat", None):
            with pytest.raises(ValueError, match=rf"^data\.train\[0\]: .*{words}"):
                load([record], template, chat_tokenizer(), forks="cut")


def test_transcripts_behind_a_prompt_or_beginning_with_it_are_the_same():
    """As some copies of hh-rlhf have them; the first line break is not always there."""
    expected = texts({"chosen": HH + " Blue.", "rejected": HH + " Red."}, "chat")
    assert texts({"prompt": HH, "chosen": " Blue.", "rejected": " Red."}, "chat") == expected
    assert texts({"prompt": HH + " ", "chosen": HH + " Blue.", "rejected": HH + " Red."}, "chat") == expected
    assert texts({"chosen": HH.strip() + " Blue.", "rejected": HH.strip() + " Red."}, "chat") == expected
    assert texts({"prompt": HH, "chosen": HH + " Blue.", "rejected": HH + " Red."}) == (HH, " Blue.", " Red.")


SYSTEM = {"role": "system", "content": "Be brief."}
NULLS = {"name": None, "tool_calls": None}
PLAIN = {"prompt": [USER], "chosen": [BLUE], "rejected": [RED]}
LONG = {"prompt": [USER, BLUE, WHY], "chosen": [BLUE], "rejected": [RED]}
WITH_SYSTEM = {"prompt": [SYSTEM, USER], "chosen": [BLUE], "rejected": [RED]}
SAME = {
    "UltraFeedback": (
        PLAIN,
        {
            "prompt": "What colour? ",
            "prompt_id": "7",
            "messages": [USER, BLUE],
            "chosen": [USER, BLUE],
            "rejected": [USER, RED],
            "score_chosen": 8.0,
            "score_rejected": 5.0,
        },
    ),
    "a text prompt beside several turns": (
        LONG,
        {"prompt": "What colour?", "chosen": [USER, BLUE, WHY, BLUE], "rejected": [USER, BLUE, WHY, RED]},
    ),
    "the last of several turns": (
        LONG,
        {"prompt": "Why?", "chosen": [USER, BLUE, WHY, BLUE], "rejected": [USER, BLUE, WHY, RED]},
    ),
    "messages that repeat the prompt": (
        LONG,
        {**LONG, "chosen": [*LONG["prompt"], BLUE], "rejected": [*LONG["prompt"], RED]},
    ),
    "messages as the prompt": (LONG, {"messages": LONG["prompt"], "chosen": [BLUE], "rejected": [RED]}),
    "messages that are the chosen ones": (
        PLAIN,
        {"messages": [USER, BLUE], "chosen": [USER, BLUE], "rejected": [USER, RED]},
    ),
    "null columns": (PLAIN, {**PLAIN, "margin": None, "system": None, "messages": None, "id": None, "tools": None}),
    "null keys of messages": (
        PLAIN,
        {"chosen": [{**USER, **NULLS}, BLUE], "rejected": [USER, {**RED, **NULLS}], "prompt": None},
    ),
    "a system message": (WITH_SYSTEM, {"chosen": [SYSTEM, USER, BLUE], "rejected": [SYSTEM, USER, RED]}),
    "a system column": (WITH_SYSTEM, {**PLAIN, "system": "Be brief."}),
    "a system column beside texts": (
        WITH_SYSTEM,
        {"system": "Be brief.", "prompt": "What colour?", "chosen": "Blue.", "rejected": "Red."},
    ),
    "a system column that says the same": (WITH_SYSTEM, {**WITH_SYSTEM, "system": "Be brief."}),
    "an empty system column": (PLAIN, {**PLAIN, "system": ""}),
}


@pytest.mark.parametrize("case", SAME)
def test_what_data_sets_write_is_what_it_says(case):
    plain, written = SAME[case]
    assert texts(written, "chat") == texts(plain, "chat")


OTHERS = {
    "Orca": (
        {"system": "", "question": "What colour?", "chosen": "It is blue.", "rejected": "It is red."},
        "no prompt, but question",
    ),
    "messages beside texts": (
        {"messages": [USER], "chosen": "It is blue.", "rejected": "It is red."},
        "no prompt, but messages",
    ),
    "Nectar": (
        {"prompt": HH, "answers": [{"answer": "Blue.", "rank": 1.0}]},
        "no chosen .*the record has answers, prompt",
    ),
    "PKU": (
        {"prompt": "x", "response_0": "a", "response_1": "b", "better_response_id": 1},
        "no chosen .*has better_resp",
    ),
    "another text": (
        {"prompt": "y", "chosen": [USER, BLUE], "rejected": [USER, RED]},
        "prompt is a string, .* repeat it",
    ),
    "two systems": ({**WITH_SYSTEM, "system": "Be long."}, "system differs from the system message"),
    "tools": (
        {"chosen": [USER, {**BLUE, "tool_calls": [1]}], "rejected": [USER, RED]},
        r"chosen\[1\] .* but tool_calls",
    ),
    "ShareGPT": ({"chosen": [{"from": "gpt", "value": "a"}], "rejected": [RED]}, r"chosen\[0\] .* but from, value"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_forms_are_refused_with_what_the_record_has(case):
    record, words = OTHERS[case]
    with pytest.raises(ValueError, match=rf"^data\.train\[0\]: {words}"):
        load([record], "chat", chat_tokenizer())


def test_a_system_prompt_without_a_chat_template_is_refused():
    with pytest.raises(ValueError, match=r"a system prompt needs a chat template \(set data\.template=chat, or leave"):
        load([{"system": "Be brief.", "prompt": "x", "chosen": "a", "rejected": "b"}])


def test_margin_id_and_metadata():
    record = {"id": 7, "prompt": "x", "chosen": "a", "rejected": "b", "margin": 2, "source": "s"}
    (pair,) = load([record]).examples
    assert (pair.margin, pair.group.prompt.id, pair.group.prompt.metadata) == (2.0, "7", {"source": "s"})
    assert load([{"prompt": "x", "chosen": "a", "rejected": "b"}]).examples[0].margin == 0.0


def test_prompts_are_cut_on_the_left_and_outputs_on_the_right():
    loaded = load([{"prompt": "abcdef", "chosen": "123456", "rejected": "12"}], prompt=4, output=3)
    group = loaded.examples[0].group
    assert group.prompt.token_ids == list(b"cdef") and (loaded.cut_prompts, loaded.cut_outputs) == (1, 1)
    assert [output.token_ids for output in group.outputs] == [list(b"123"), [*b"12", END]]
    assert [output.ended for output in group.outputs] == [False, True]


def test_compressed_files(tmp_path):
    line = json.dumps({"prompt": "x", "chosen": "a", "rejected": "b"}) + "\n"
    plain, packed = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    plain.write_text(line * 2)
    packed.write_bytes(gzip.compress((line * 2).encode()))
    pairs = load([plain, packed]).examples
    assert len(pairs) == 4
    broken = tmp_path / "c.jsonl.gz"
    for content in (packed.read_bytes()[:-9], line.encode()):
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=r"data.train: cannot read .*c.jsonl.gz"):
            load(broken)


BAD = {
    "no rejected": ({"prompt": "x", "chosen": "a"}, "no rejected"),
    "null": ({"prompt": "x", "chosen": "a", "rejected": None}, "rejected is null"),
    "number": ({"prompt": "x", "chosen": "a", "rejected": 3}, "rejected is a number"),
    "mixed": ({"prompt": "x", "chosen": "a", "rejected": [RED]}, "rejected is a list"),
    "prompt of another kind": ({"prompt": "x", "chosen": [BLUE], "rejected": [RED]}, "prompt is a string"),
    "equal": ({"prompt": "x", "chosen": "a", "rejected": "a"}, "the same"),
    "nothing in common": ({"chosen": "a b", "rejected": "c d"}, "no common beginning"),
    "no word in common": ({"chosen": "abc", "rejected": "abd"}, "no common beginning"),
    "no messages in common": ({"chosen": [BLUE], "rejected": [RED]}, "no common beginning"),
    "no answer": ({"chosen": [USER], "rejected": [USER, RED]}, "chosen goes on with 0 messages"),
    "two answers": ({"prompt": [USER], "chosen": [BLUE, RED], "rejected": [RED]}, "chosen goes on with 2 messages"),
    "user answers": ({"prompt": [USER], "chosen": [USER], "rejected": [RED]}, "chosen goes on with 1 messages"),
    "no content": ({"prompt": [USER], "chosen": [{"role": "assistant"}], "rejected": [RED]}, "chosen[0] does not have"),
    "content": ({"prompt": [USER], "chosen": [{**BLUE, "content": 1}], "rejected": [RED]}, "content is a number"),
    "role": ({"prompt": [{**USER, "role": "robot"}], "chosen": [BLUE], "rejected": [RED]}, "role is 'robot'"),
    "margin": ({"prompt": "x", "chosen": "a", "rejected": "b", "margin": "1"}, "margin is a string"),
    "empty prompt": ({"prompt": "", "chosen": "a", "rejected": "b"}, "prompt is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named(case, tmp_path):
    record, words = BAD[case]
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": "x", "chosen": "a", "rejected": "b"}) + "\n\n" + json.dumps(record) + "\n")
    template = "chat" if isinstance(record["chosen"], list) else None
    with pytest.raises(ValueError) as caught:
        load(file, template, chat_tokenizer())
    assert str(caught.value).startswith(f"{file}:3: ") and words in str(caught.value)


def test_messages_without_a_chat_template_are_refused():
    with pytest.raises(ValueError, match=r"data.train\[0\]: messages need a chat template"):
        load([{"prompt": [USER], "chosen": [BLUE], "rejected": [RED]}])


SIDES = VALUES | st.sampled_from([[USER, BLUE], [USER, RED], [BLUE], HH, HH + " a", "\n\nHuman: a", "\n\nAssistant:"])


@given(st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "margin", "id", "system", "messages"]), SIDES))
def test_any_record_is_read_or_refused_with_its_place(record):
    try:
        (pair,) = load([record], "chat", chat_tokenizer(), prompt=500).examples
    except ValueError as error:
        assert str(error).startswith("data.train[0]: ")
    else:
        assert all(output.token_ids[-1] == END or not output.ended for output in pair.group.outputs)


def test_no_conversation_is_on_both_sides():
    records = [{"prompt": f"p{i % 7}", "chosen": "a", "rejected": f"b{i}"} for i in range(21)]
    records += [
        {
            "chosen": f"\n\nHuman: q\n\nAssistant: {i}\n\nHuman: r\n\nAssistant: a",
            "rejected": f"\n\nHuman: q\n\nAssistant:{i}.",
        }
        for i in range(5)
    ]
    pairs = load(records, forks="cut").examples
    train, held_out = split_conversations(pairs, 3, seed=1)
    assert len(train) + len(held_out) == 26
    assert not {p.conversation for p in train} & {p.conversation for p in held_out}
    assert len({p.conversation for p in held_out}) == 3 and {p.conversation for p in pairs[21:]} == {"q"}
    assert split_conversations(pairs[::-1], 3, seed=1)[1] == held_out[::-1]
    assert split_conversations(pairs, 0.25, seed=2)[1] != held_out


def test_metrics_by_hand():
    """Gaps 0 (a tie counts half), log 4 (p = 0.8), -log 4, and 3 log 3 (p = 27/28)."""
    gaps = [0.0, math.log(4), -math.log(4), 3 * math.log(3)]
    record = preference_metrics(np.array([[1 + gap, 1.0] for gap in gaps]))
    assert record["eval/accuracy"] == 2.5 / 4 and record["eval/pairs"] == 4
    assert record["eval/accuracy_ci_low"] < 0.3 < 0.85 < record["eval/accuracy_ci_high"]
    assert record["eval/log_loss"] == pytest.approx(-np.mean(np.log([0.5, 0.8, 0.2, 27 / 28])))
    assert record["eval/chosen_reward"] == pytest.approx(1 + sum(gaps) / 4) and record["eval/rejected_reward"] == 1.0
    bins = record["eval/reliability"]
    assert [(b["pairs"], b["accuracy"]) for b in bins] == [(1, 0.5), (2, 0.5), (1, 1.0)]
    assert [b["confidence"] for b in bins] == pytest.approx([0.5, 0.8, 27 / 28])
    assert record["eval/calibration_error"] == pytest.approx((0 + 2 * 0.3 + 1 / 28) / 4)


def test_prompts_and_demonstrations_of_pairs(tmp_path):
    """What refuses to be a pair is left out, and so is a prompt that comes again."""
    turn = "\n\nHuman: hi\n\nAssistant:"
    lines = [
        {"chosen": f"{turn} yes", "rejected": f"{turn} no"},
        {"chosen": f"{turn} sure", "rejected": f"{turn} no"},
        {"chosen": "a", "rejected": "b"},
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(prompts(path)) == [{"prompt": turn, "reference": "yes"}, {"prompt": "2+2?", "reference": "4"}]
    assert list(demonstrations(path)) == [
        {"prompt": turn, "completion": " yes"},
        {"prompt": "2+2?", "completion": " 4"},
    ]
    messages = [{"role": "user", "content": "hi"}]
    answers = {name: [*messages, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    path.write_text(json.dumps(answers) + "\n")
    assert list(prompts(path)) == [{"messages": messages, "reference": "chosen"}]
