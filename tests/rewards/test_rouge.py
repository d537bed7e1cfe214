"""ROUGE-L as a reward."""

from __future__ import annotations

import sys

import pytest

from nemo_brain.rewards.rouge import rouge_l


def score(output: str, reference: str | None) -> float:
    (value,) = rouge_l(["p"], [output], references=[reference], metadata=[{}])
    return value


def test_it_is_the_f_measure_of_the_longest_common_subsequence():
    # the cat ... mat: 3 words of 4 and of 5.
    assert score("the cat saw mat", "the cat on a mat") == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    assert score("The cats", "the cat") == 1 and score("dog", "cat") == 0 and score("", "cat") == 0


def test_a_prompt_without_a_reference_is_named():
    with pytest.raises(ValueError, match="the prompt 'p' has no reference"):
        score("x", None)


def test_the_package_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ValueError, match=r"pip install 'nemo_brain\[evaluation\]'"):
        score("x", "y")
