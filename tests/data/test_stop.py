"""What ends an output: the set of end tokens by file and by key, strings, and what a given text is ended with."""

from __future__ import annotations

import warnings

import pytest
from chat_tokenizers import TOKENIZERS, chat_tokenizer, chatml, llama
from hypothesis import given
from hypothesis import strategies as st

from nemo_brain.core.groups import Output
from nemo_brain.data.stop import Stop, choose_stop, closing_token, named_token_ids
from nemo_brain.data.tokenizers import byte_tokenizer, decode, encode

BYTES = byte_tokenizer()


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ([], (256,)),
        ([{}, {}], (256,)),
        ([{"eos_token_id": None}, {"eos_token_id": 257}], (256, 257)),
        ([{"eos_token_id": 257}, {"eos_token_id": [258, 257, 256]}], (256, 257, 258)),
    ],
)
def test_every_file_may_name_end_tokens(files, ids):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<turn>"], special_tokens=True)
    assert named_token_ids(tokenizer, *files) == ids


@pytest.mark.parametrize(
    ("token", "what"), [(65, "'A', a token of ordinary text"), (-1, "no token"), (999, "no token")]
)
def test_a_default_that_is_no_end_token_of_this_tokenizer_is_left_out(token, what):
    with pytest.warns(UserWarning, match=f"eos_token_id={token} in .* is {what}"):
        assert named_token_ids(BYTES, {"eos_token_id": [token, 257]}) == (256, 257)


@pytest.mark.parametrize("named", ["2", [1, "2"], {"a": 1}, 2.0, True])
def test_what_is_no_token_id_is_refused(named):
    with pytest.raises(ValueError, match="neither a token id nor a list"):
        named_token_ids(BYTES, {"eos_token_id": named})


def test_without_an_end_token_the_remedy_is_named():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no token ends an output.*rollout\.stop_token_ids"):
        choose_stop(tokenizer, [], None, vocab_size=258, key="rollout.stop_token_ids")
    with pytest.raises(ValueError, match=r"no token ends an output.*generation_config\.json"):
        choose_stop(tokenizer, [258], None, vocab_size=258)  # the model cannot emit it
    assert choose_stop(tokenizer, [], None, token_ids=[9], vocab_size=258).end == 9
    assert choose_stop(tokenizer, [], None, strings=["."], vocab_size=258) == Stop((), (".",), None)


def test_the_key_takes_the_place_of_the_files():
    assert choose_stop(BYTES, [256, 7], None, token_ids=[9, 8, 9], vocab_size=258) == Stop((9, 8), (), 9)
    assert choose_stop(BYTES, [256, 7], None, token_ids=[9, 256], vocab_size=258).end == 256
    assert choose_stop(BYTES, [256], None, token_ids=[], vocab_size=258) == Stop((), (), None)
    with pytest.raises(ValueError, match=r"rollout\.stop_token_ids: 258 is no token of a vocabulary of 258"):
        choose_stop(BYTES, [256], None, token_ids=[258], vocab_size=258, key="rollout.stop_token_ids")


@pytest.mark.parametrize(("name", "closing"), [("chatml", "<|im_end|>"), ("llama", "</s>"), ("phi", "</s>")])
def test_the_token_behind_an_answer_is_found_in_the_template(name, closing):
    assert closing_token(TOKENIZERS[name]) == TOKENIZERS[name].convert_tokens_to_ids(closing)


def test_a_template_may_close_with_no_token():
    assert closing_token(chat_tokenizer()) is None


def test_a_text_is_ended_as_the_template_closes_a_turn():
    """As in Llama 3: the tokenizer's end token ends a document, another one a turn."""
    tokenizer = chatml()
    turn = tokenizer.eos_token_id
    tokenizer.eos_token = "<|im_start|>"
    named = named_token_ids(tokenizer, {"eos_token_id": [turn]})
    stop = choose_stop(tokenizer, named, "chat", vocab_size=len(tokenizer))
    assert stop.end == turn and stop.given(tokenizer, "hello") == [*encode(tokenizer, "hello"), turn]
    assert choose_stop(tokenizer, named, None, vocab_size=len(tokenizer)).end == tokenizer.eos_token_id


def test_a_turn_that_is_closed_with_a_token_that_ends_nothing_is_named():
    tokenizer = chatml()
    turn = tokenizer.eos_token_id
    tokenizer.eos_token = "<|im_start|>"
    with pytest.warns(
        UserWarning, match=rf"'<\|im_end\|>' \({turn}\), which ends no output.*add {turn} to eos_token_id"
    ):
        stop = choose_stop(tokenizer, named_token_ids(tokenizer), "chat", vocab_size=len(tokenizer))
    assert stop.end == tokenizer.eos_token_id
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose_stop(tokenizer, named_token_ids(tokenizer), None, vocab_size=len(tokenizer))
        choose_stop(chatml(), named_token_ids(chatml()), "chat", vocab_size=len(tokenizer))


def test_an_outputs_text_is_what_stands_before_its_end():
    stop = Stop((256, 7), ("END", "\n\n"))

    def output(text: str, *ends: int) -> Output:
        return stop.output(BYTES, [*text.encode(), *ends])

    assert (output("a b", 256).text, output("a b", 256).ended) == ("a b", True)
    assert (output("a b", 7).text, output("a b", 7).ended) == ("a b", True)
    assert (output("a b").text, output("a b").ended) == ("a b", False)
    assert (output("a bEND").text, output("a bEND").ended) == ("a b", True)
    assert (output("a\n\n").text, output("a\n\n").ended) == ("a", True)
    assert output("a bEND").token_ids == list(b"a bEND"), "all that was sampled counts"
    assert output("", 256).text == ""


@given(st.sampled_from(sorted(TOKENIZERS)), st.data())
def test_a_row_of_tokens_ends_where_its_text_first_holds_a_string(name, data):
    """Also where it is completed inside a token, or spelled by tokens that split characters."""
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=12))
    whole = decode(tokenizer, ids)
    start = data.draw(st.integers(0, len(whole)))
    string = whole[start : start + data.draw(st.integers(1, 4))] or "he"
    stop = Stop((), (string,))
    for length in range(1, len(ids) + 1):
        text = decode(tokenizer, ids[:length])
        assert stop.ended(tokenizer, ids[:length]) == (string in text)
        if string in text:
            output = stop.output(tokenizer, ids[:length])
            assert output.ended and output.text == text[: text.index(string)]
            break


def test_nothing_that_ends_a_text_is_an_error_for_texts_alone():
    with pytest.raises(ValueError, match=r"rollout\.stop_token_ids=\[\]"):
        Stop(()).given(llama(), "hello")
