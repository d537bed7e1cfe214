"""Verifiers by their rules: regular expressions, numbers, boxed answers, JSON schemas, penalties."""

from __future__ import annotations

import json
import re
import time
from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from nemo_brain.config.checks import given_arguments
from nemo_brain.core.groups import Prompt
from nemo_brain.rewards.build import make_reward
from nemo_brain.rewards.protocol import RewardError, check_prompts, compute_rewards
from nemo_brain.rewards.verifiers.extract import last_block, last_boxed
from nemo_brain.rewards.verifiers.number import last_number
from nemo_brain.rewards.verifiers.penalties import RepetitionPenalty

PAGE = Path(__file__).resolve().parents[2] / "docs" / "rewards.md"
ROOM = "nemo_brain.rewards.verifiers"
REGEX, NUMBER, BOXED = (
    f"{ROOM}.pattern.RegexReward",
    f"{ROOM}.number.LastNumberReward",
    f"{ROOM}.boxed.BoxedAnswerReward",
)
SCHEMA = f"{ROOM}.json_schema.JSONSchemaReward"
LENGTH, REPETITION = f"{ROOM}.penalties.LengthPenalty", f"{ROOM}.penalties.RepetitionPenalty"


def make(target: str, **arguments):
    return make_reward(OmegaConf.create({"_target_": target, **arguments}))


def score(reward, outputs: list[str], reference: str | None = None, **record) -> list[float]:
    count = len(outputs)
    return compute_rewards(reward, ["p"] * count, outputs, references=[reference] * count, metadata=[record] * count)


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        (REGEX, {"pattern": "(a"}, r"reward\.pattern='\(a' is no regular expression: missing \)"),
        (REGEX, {"pattern": 3}, r"reward\.pattern=3 is no regular expression"),
        (REGEX, {"pattern": "a", "match": "match"}, r"reward\.match must be fullmatch or search, not 'match'"),
        (REGEX, {"pattern": "a", "timeout_seconds": 0}, r"reward\.timeout_seconds must be a number above 0, not 0"),
        (NUMBER, {"tolerance": -1}, r"reward\.tolerance must be a number of at least 0, not -1"),
        (NUMBER, {"tolerance": "1"}, r"reward\.tolerance must be a number of at least 0, not '1'"),
        (NUMBER, {"tolerance": float("nan")}, r"reward\.tolerance must be a number of at least 0, not nan"),
        (BOXED, {"timeout_seconds": float("inf")}, r"reward\.timeout_seconds must be a number above 0, not inf"),
        (BOXED, {"workers": 0}, r"reward\.workers must be an integer of at least 1, not 0"),
        (SCHEMA, {"schema": "nowhere.json"}, r"reward\.schema=nowhere\.json: .*No such file.*name a file"),
        (SCHEMA, {"fenced": "yes"}, r"reward\.fenced must be true or false, not 'yes'"),
        (LENGTH, {"max_length": 5, "buffer": 6}, r"reward\.buffer \(6\) must be at most reward\.max_length \(5\)"),
        (LENGTH, {"max_length": 5.5, "buffer": 1}, r"reward\.max_length must be an integer of at least 1, not 5\.5"),
        (LENGTH, {"max_length": 5, "buffer": 1, "unit": "tokens"}, r"reward\.unit must be words or characters"),
        (REPETITION, {"ngram": 0}, r"reward\.ngram must be an integer of at least 1, not 0"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(target, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(target, **arguments)


@pytest.mark.parametrize(
    ("target", "reference", "record", "message"),
    [
        (NUMBER, None, {}, r"no reference \(write the number"),
        (NUMBER, "none", {}, r"a reference without a number, 'none' \(write the number"),
        (NUMBER, "1 is near #### unknown", {}, r"a reference without a number"),
        (BOXED, None, {}, r"no reference \(write the answer"),
        (BOXED, " ", {}, r"no reference \(write the answer"),
        (SCHEMA, None, {}, r"no schema \(write one into the record's 'schema'"),
        (SCHEMA, None, {"schema": {"type": "strng"}}, r"'schema': no JSON schema: 'strng' is not valid"),
    ],
)
def test_a_prompt_that_lacks_something_is_named_before_a_run_and_its_output_in_one(target, reference, record, message):
    reward = make_reward(
        {"_target_": "nemo_brain.rewards.weighted.WeightedReward", "rewards": [{"weight": 1.0, "_target_": target}]}
    )
    whole = f"WeightedReward cannot score outputs to the prompt 'train:7': reward\\.rewards\\[0\\]: {message}"
    with pytest.raises(ValueError, match=whole):
        check_prompts(reward, [Prompt("train:7", "p", [1], reference, record)])
    with pytest.raises(
        RewardError, match=f"reward\\.rewards\\[0\\]: .* failed with {message}.* on output 0: 'o'"
    ) as caught:
        score(reward, ["o"], reference, **record)
    assert caught.value.index == 0


def test_rewards_that_look_at_no_prompt_are_not_asked():
    check_prompts(make(REGEX, pattern="a"), [Prompt("a", "p", [1])])
    check_prompts(lambda *_, **__: [], [Prompt("a", "p", [1])])


def test_the_examples_of_the_page_can_be_made_and_all_verifiers_stand_in_its_table():
    section = PAGE.read_text().partition("## Verifiers")[2].partition("\n## ")[0]
    examples = re.findall(r"(?s)```yaml\n(reward:\n.*?)```", section)
    assert len(examples) == 5
    for example in examples:
        reward = yaml.safe_load(example)["reward"]
        make_reward(given_arguments(reward))
    for name in (REGEX, NUMBER, BOXED, SCHEMA, LENGTH, REPETITION, f"{ROOM}.code.CodeReward"):
        assert f"| `{name.removeprefix(ROOM + '.')}` |" in section


# Regular expressions


def test_a_pattern_matches_all_of_an_output_or_a_part():
    outputs = ["yes", "yes.", "YES", "no\nyes", ""]
    assert score(make(REGEX, pattern="yes"), outputs) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert score(make(REGEX, pattern="(?i)yes", match="search"), outputs) == [1.0, 1.0, 1.0, 1.0, 0.0]


def test_a_pattern_that_backtracks_for_ever_is_given_up_with_a_warning():
    reward = make(REGEX, pattern=r"(?:(a+)+\1)+b", timeout_seconds=0.2)
    started = time.monotonic()
    with pytest.warns(UserWarning, match=r"an output of 40 characters took longer than reward\.timeout_seconds=0\.2"):
        assert score(reward, ["a" * 40, "aab"]) == [0.0, 1.0]
    assert time.monotonic() - started < 5


# Numbers


@pytest.mark.parametrize(
    ("output", "number"),
    [
        ("The answer is 42.", 42),
        ("1 and then -1,234.5 dollars", Fraction("-1234.5")),
        ("10-3 = 7", 7),
        ("from 10-3", 3),
        ("x=-.5", Fraction("-0.5")),
        ("\u22127", -7),
        ("-$5", -5),
        ("$5.00", 5),
        ("1.5E-3 kg", Fraction("0.0015")),
        ("1e5", 100_000),
        ("12,345,678", 12_345_678),
        ("1,23", 23),  # no separator of thousands
        ("1,2345", 2345),
        ("007", 7),
    ],
)
def test_the_last_number_is_read(output, number):
    assert [Fraction(value) for value in last_number(output)] == [number]
    assert score(make(NUMBER), [output, f"{output} 8.5"], str(float(number))) == [1.0, 0.0]


def test_a_percentage_is_both_of_what_it_is_written_for():
    reward = make(NUMBER)
    assert score(reward, ["50%", r"50\%", "50 %", "0.5", "50", "5"], "50%") == [1.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    assert score(reward, ["50%", "0.5", "50"], "50") == [1.0, 0.0, 1.0]


def test_references_of_gsm8k_and_outputs_without_a_number():
    reference = "He has 3 + 4 = <<3+4=7>>7 apples, and 1,000 more.\n#### 1,007"
    assert score(make(NUMBER), ["#### 1007", "1,007.0 apples", "none", "", "7"], reference) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_numbers_differ_by_no_more_than_the_tolerance_allows():
    reward = make(NUMBER, tolerance=0.01)
    assert score(reward, ["3.14", "3.112", "3.11", "-3.14"], "3.14159") == [1.0, 1.0, 0.0, 0.0]
    assert score(reward, ["0", "1e-9"], "0") == [1.0, 0.0]
    assert score(reward, ["1e999999999", "9" * 10_000, "1e-999999999"], "5") == [0.0, 0.0, 0.0]


@given(st.integers(-(10**30), 10**30), st.integers(0, 6), st.text(st.characters(codec="ascii", categories=["L", "Zs"])))
@settings(deadline=None)
def test_every_number_is_found_however_it_is_written(digits, places, text):
    number = Fraction(digits, 10**places)
    plain = f"{'-' if digits < 0 else ''}{abs(digits) // 10**places}" + (
        f".{abs(digits) % 10**places:0{places}}" if places else ""
    )
    whole, dot, rest = plain.partition(".")
    grouped = f"{int(whole):,}" if int(whole) or not whole.startswith("-") else whole
    for written in (plain, grouped + dot + rest, f"{plain}e0"):
        assert [Fraction(value) for value in last_number(f"{text} 17 = {written}.")] == [number]


# Boxed answers


def test_the_last_boxed_answer_whose_braces_are_closed():
    assert last_boxed(r"\boxed{1} then \boxed{\frac{1}{2}} and \boxed{3") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{\{1, 2\}}") == r"\{1, 2\}"
    assert last_boxed(r"\fbox{7}") == "7"
    assert last_boxed(r"\boxed {a \boxed{b} c}") == "b"
    assert last_boxed("42") is last_boxed(r"\boxed{") is None


@given(st.recursive(st.sampled_from(["1", "x", r"\{", ""]), lambda inner: inner.map("{{{}}}".format), max_leaves=30))
@settings(deadline=None)
def test_nested_braces_are_found_whole(content):
    assert last_boxed(rf"so \boxed{{{content}}}.") == content.strip()


@pytest.fixture(scope="module")
def boxed():
    pytest.importorskip("math_verify")
    return make(BOXED, timeout_seconds=10.0)


@pytest.mark.parametrize(
    ("reference", "equal", "other"),
    [
        (r"\frac{1}{2}", [r"\frac{1}{2}", "0.5", "1/2", r"\dfrac12"], ["2", "0.51", ""]),
        (r"We get $\boxed{2\sqrt{2}}$.", [r"\sqrt{8}"], [r"\sqrt{2}"]),
        ("x^2+2x+1", ["(x+1)^2"], ["(x-1)^2"]),
        (r"\{1,2\}", [r"\{2, 1\}"], [r"\{1\}"]),
        (r"\text{(B)}", ["B"], ["A"]),
        ("unparsable ~~ text", ["unparsable ~~ text"], ["~~"]),
    ],
)
def test_boxed_answers_are_compared_as_mathematics(boxed, reference, equal, other):
    outputs = [rf"Thus \boxed{{{answer}}}" for answer in (*equal, *other)]
    assert score(boxed, outputs, reference) == [1.0] * len(equal) + [0.0] * len(other)
    assert score(boxed, equal[:1], reference) == [0.0]  # not in a box


def test_a_comparison_without_end_is_given_up_and_the_next_one_works():
    pytest.importorskip("math_verify")
    reward = make(BOXED, timeout_seconds=3.0, workers=1)
    assert score(reward, [r"\boxed{4/2}"], "2") == [1.0]  # the library has been imported
    started = time.monotonic()
    outputs = [r"\boxed{10^{10^{10}}}", r"\boxed{6/3}", r"\boxed{(((}"]
    assert score(reward, outputs, "2") == [0.0, 1.0, 0.0]
    assert time.monotonic() - started < 30


# JSON

PERSON = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


def test_json_is_valid_by_the_schema_of_a_file_or_of_the_prompt(tmp_path):
    outputs = ['{"age": 3}', '{"age": "3"}', "{}", '{"age": 3} ok', "", '{"age": NaN}', "[" * 100_000]
    expected = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    (tmp_path / "schema.json").write_text(json.dumps(PERSON))
    assert score(make(SCHEMA, schema=f"{tmp_path}/schema.json"), outputs) == expected
    assert score(make(SCHEMA), outputs, schema=PERSON) == expected
    assert score(make(SCHEMA, field="form"), outputs, form=PERSON) == expected


def test_json_may_stand_in_the_last_fence():
    outputs = ['```json\n{"age": 1}\n```\nor\n```\n{"age": "1"}\n```', 'So:\n```json\n{"age": 1}\n```\n', '{"age": 1}']
    assert score(make(SCHEMA, fenced=True), outputs, schema=PERSON) == [0.0, 1.0, 0.0]


def test_a_schema_in_a_file_must_be_one(tmp_path):
    (tmp_path / "schema.json").write_text('{"type": 3}')
    with pytest.raises(ValueError, match=r"reward\.schema=.*schema\.json: no JSON schema: 3 is not valid"):
        make(SCHEMA, schema=f"{tmp_path}/schema.json")


def test_a_schema_looks_nothing_up_elsewhere():
    with pytest.raises(RewardError, match="Unresolvable"):
        score(make(SCHEMA), ["1"], schema={"$ref": "http://127.0.0.1:9/schema.json"})


def test_the_last_fence_of_a_label():
    text = "```python\n1\n```\n```js\n2\n```\n```\n3\n```\n```py\n4"
    assert last_block(text, ("python",)) == "3\n"
    assert last_block("```js\n2\n```", ("python",)) is last_block("", ("python",)) is None


# Penalties


def test_the_length_penalty_falls_over_the_buffer():
    outputs = [" ".join("w" * count) for count in (0, 6, 8, 10, 30)]
    assert score(make(LENGTH, max_length=10, buffer=4), outputs) == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert score(make(LENGTH, max_length=10, buffer=4, unit="characters"), ["é" * 7, "é" * 11]) == [-0.25, -1.0]


def test_the_repetition_penalty_is_the_share_of_repeated_ngrams():
    outputs = ["a b c d", "a b a b a b", "A a a", "a", ""]
    assert score(make(REPETITION, ngram=2), outputs) == [0.0, 2 / 5 - 1, 1 / 2 - 1, 0.0, 0.0]


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 5))
@settings(deadline=None)
def test_the_repetition_penalty_is_from_minus_one_to_zero_and_saying_it_twice_costs_more(words, ngram):
    once, twice = score(RepetitionPenalty(ngram), [" ".join(words), " ".join(words * 2)])
    assert -1 < once <= 0 and twice <= once
