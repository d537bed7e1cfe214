"""Demonstration files in every format: what is learned, after which prompt, and what is wrong with a line."""

from __future__ import annotations

import json
import string

import pytest
from chat_tokenizers import BLUE, END, RED, USER, VALUES, chat_tokenizer, own_stop
from hypothesis import given
from hypothesis import strategies as st

from nemo_brain.data.demonstrations import load_demonstrations
from nemo_brain.data.examples import split_conversations
from nemo_brain.data.tokenizers import byte_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
WHY = {"role": "user", "content": "Why?"}


def load(source, template=None, tokenizer=None, prompt=200, output=100, **options):
    tokenizer = tokenizer or byte_tokenizer()
    return load_demonstrations(
        source,
        tokenizer=tokenizer,
        stop=own_stop(tokenizer),
        template=template,
        max_prompt_tokens=prompt,
        max_output_tokens=output,
        **options,
    )


def texts(record: dict, template: str | None = None, **options) -> list[tuple[str, str]]:
    """Prompts and completions as the model sees them, without the end tokens that all completions must have."""
    tokenizer = chat_tokenizer()
    found = []
    for example in load([record], template, tokenizer, **options).examples:
        (output,) = example.group.outputs
        assert output.ended and output.token_ids[-1] == END
        found.append((tokenizer.decode(example.group.prompt.token_ids), tokenizer.decode(output.token_ids[:-1])))
        assert found[-1] == (example.group.prompt.text, output.text)
    return found


def rendered(*messages: dict) -> str:
    tokenizer = chat_tokenizer()
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)


def test_text():
    record = {"prompt": "The sky is", "completion": " blue."}
    assert texts(record) == [("The sky is", " blue.")]
    assert texts(record, "Q: {prompt}\nA:") == [("Q: The sky is\nA:", " blue.")]
    assert texts(record, "chat") == [(rendered({"role": "user", "content": "The sky is"}), " blue.")]


def test_messages_with_a_prompt_and_as_a_conversation_are_the_same():
    expected = [(rendered(SYSTEM, USER), "Blue.")]
    assert texts({"prompt": [SYSTEM, USER], "completion": [BLUE]}, "chat") == expected
    assert texts({"messages": [SYSTEM, USER, BLUE]}, "chat") == expected


def test_every_message_of_the_assistant_is_learned_after_all_that_precedes_it_or_only_the_last():
    first, second = (rendered(USER), "Blue."), (rendered(USER, BLUE, WHY), "Red.")
    assert texts({"messages": [USER, BLUE, WHY, RED]}, "chat") == [first, second]
    assert texts({"messages": [USER, BLUE, WHY, RED]}, "chat", assistant_turns="last") == [second]
    # What the assistant says in the prompt is given.
    assert texts({"prompt": [USER, BLUE, WHY], "completion": [RED]}, "chat") == [second]
    assert texts({"prompt": [USER], "completion": [BLUE, WHY, RED]}, "chat") == [first, second]


def test_text_spells_no_special_token():
    """The end token is the one that is appended, whatever the text says."""
    (example,) = load([{"prompt": "x", "completion": "a<eos>"}]).examples
    assert example.group.outputs[0].token_ids == [*b"a<eos>", END]


def test_prompts_are_cut_on_the_left_and_completions_on_the_right():
    loaded = load([{"prompt": "abcdef", "completion": "123"}, {"prompt": "a", "completion": "12"}], prompt=4, output=3)
    assert (loaded.cut_prompts, loaded.cut_outputs) == (1, 1)
    (first, second) = (example.group for example in loaded.examples)
    assert first.prompt.token_ids == list(b"cdef")
    assert [group.outputs[0].token_ids for group in (first, second)] == [list(b"123"), [*b"12", END]]
    assert [group.outputs[0].ended for group in (first, second)] == [False, True]


def test_no_conversation_is_on_both_sides():
    records = [{"messages": [{**USER, "content": f"{k % 9}"}, BLUE, WHY, RED]} for k in range(18)]
    train, held_out = split_conversations(load(records, "chat", chat_tokenizer()).examples, 3, seed=0)
    assert len(train) == 24 and len(held_out) == 12
    assert not {e.conversation for e in train} & {e.conversation for e in held_out}


NULLS = {"name": None, "tool_calls": None}
CONVERSATION = {"messages": [USER, BLUE, WHY, RED]}
SAME = {
    "UltraChat": (CONVERSATION, {**CONVERSATION, "prompt": f" {USER['content']}", "prompt_id": "7"}),
    "null columns": (CONVERSATION, {**CONVERSATION, "prompt": None, "completion": None, "system": None, "tools": None}),
    "null keys of messages": (CONVERSATION, {"messages": [{**USER, **NULLS}, BLUE, WHY, {**RED, **NULLS}]}),
    "a system column": ({"messages": [SYSTEM, USER, BLUE]}, {"messages": [USER, BLUE], "system": SYSTEM["content"]}),
    "a system column beside texts": (
        {"messages": [SYSTEM, USER, BLUE]},
        {"system": SYSTEM["content"], "prompt": USER["content"], "completion": BLUE["content"]},
    ),
    "a transcript": (
        {"prompt": [USER, BLUE, WHY], "completion": [RED]},
        {
            "prompt": "\n\nHuman: {content}\n\nAssistant: Blue.\n\nHuman: {0}\n\nAssistant:".format(
                WHY["content"], **USER
            ),
            "completion": f" {RED['content']}",
        },
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_what_data_sets_write_is_what_it_says(case):
    plain, written = SAME[case]
    assert texts(written, "chat") == texts(plain, "chat")


BAD = {
    "nothing": ({"text": "x"}, "no completion"),
    "no completion": ({"prompt": "x"}, "no completion"),
    "no prompt": ({"completion": "x"}, "no prompt"),
    "both": ({"messages": [USER, BLUE], "completion": "x"}, "both messages and prompt or completion"),
    "other columns": ({"conversations": [], "source": "x"}, "the record has conversations, source"),
    "another prompt": ({"messages": [USER, BLUE], "prompt": "y"}, "both messages and prompt or completion"),
    "two systems": ({"messages": [SYSTEM, USER, BLUE], "system": "y"}, "system differs from the system message"),
    "mixed": ({"prompt": "x", "completion": [BLUE]}, "prompt is a string, completion is a list"),
    "number": ({"prompt": "x", "completion": 3}, "completion is a number"),
    "empty completion": ({"prompt": "x", "completion": ""}, "a completion is empty"),
    "empty answer": ({"messages": [USER, {**BLUE, "content": ""}]}, "a completion is empty"),
    "empty prompt": ({"prompt": "", "completion": "x"}, "prompt is empty"),
    "empty messages": ({"messages": []}, "messages is empty"),
    "messages are text": ({"messages": "hi"}, "messages is a string"),
    "unanswered": ({"messages": [USER, BLUE, WHY]}, "the last message is the user's"),
    "user completes": ({"prompt": [USER], "completion": [USER]}, "the last message is the user's"),
    "begins": ({"messages": [BLUE]}, "the first message is the assistant's"),
    "twice": ({"messages": [USER, BLUE, RED]}, "two messages of the assistant in a row"),
    "answered before": ({"prompt": [USER, BLUE], "completion": [RED]}, "two messages of the assistant in a row"),
    "role": ({"messages": [{**USER, "role": "robot"}, BLUE]}, "messages[0].role is 'robot'"),
    "tool": ({"prompt": [USER], "completion": [{**BLUE, "tool_calls": []}]}, "completion[0] does not have role and"),
    "content": ({"messages": [USER, {**BLUE, "content": None}]}, "messages[1].content is null"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named(case, tmp_path):
    record, words = BAD[case]
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps({"prompt": "x", "completion": "a"}) + "\n\n" + json.dumps(record) + "\n")
    with pytest.raises(ValueError) as caught:
        load(file, "chat", chat_tokenizer())
    assert str(caught.value).startswith(f"{file}:3: ") and words in str(caught.value)


def test_messages_without_a_chat_template_are_refused():
    with pytest.raises(ValueError, match=r"data.train\[0\]: messages need a chat template"):
        load([{"messages": [USER, BLUE]}])


PARTS = VALUES | st.lists(st.sampled_from([SYSTEM, USER, BLUE, RED]), max_size=4) | st.text(string.printable)


@given(st.dictionaries(st.sampled_from(["prompt", "completion", "messages", "id", "system"]), PARTS))
def test_any_record_is_read_or_refused_with_its_place(record):
    try:
        examples = load([record], "chat", chat_tokenizer(), prompt=1000).examples
    except ValueError as error:
        assert str(error).startswith("data.train[0]: ")
    else:
        assert examples and all(e.group.outputs[0].token_ids[-1] == END for e in examples if e.group.outputs[0].ended)
