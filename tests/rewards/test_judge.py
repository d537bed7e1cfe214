"""The LLM judge: both orders, ties, what it counts, what it keeps, and servers that fail."""

from __future__ import annotations

import json

import pytest
from judge_server import JudgeServer

from nemo_brain.rewards.judge import PROMPT, Judge, Judgement

PAIRS = [("p1", "aaa", "b"), ("p2", "c", "a"), ("p3", "xa", "ya"), ("p4", "aa", "{first} and {second}")]


def judge(url: str, prompt: str | None = None, **options) -> Judge:
    given = {"max_tokens": 64, "concurrency": 4, "request_timeout_seconds": 5.0, "timeout_seconds": 5.0}
    return Judge(url, "judge-1", prompt=prompt, api_key_env=options.pop("api_key_env", None), **{**given, **options})


def test_a_pair_is_asked_about_in_both_orders(tmp_path):
    server, told = JudgeServer(), []
    with server.serving() as url:
        session = judge(url).judge(PAIRS, tmp_path / "cache.jsonl", told.append)
    assert [judgement.score for judgement in session.judgements] == [1.0, 0.0, 0.5, 1.0]
    assert [(j.forth, j.back) for j in session.judgements] == [("A", "B"), ("B", "A"), ("C", "C"), ("A", "B")]
    questions = {request["messages"][0]["content"] for request in server.requests}
    first = PROMPT.replace("{prompt}", "p1").replace("{first}", "aaa").replace("{second}", "b")
    second = PROMPT.replace("{prompt}", "p1").replace("{first}", "b").replace("{second}", "aaa")
    assert {first, second} < questions and len(questions) == 8
    # An output that holds a place's name is shown as it is.
    assert any("[Answer B]\n{first} and {second}\n" in question for question in questions)
    assert all(r["temperature"] == 0 and r["model"] == "judge-1" and r["max_tokens"] == 64 for r in server.requests)
    metrics = session.as_metrics()
    assert sum(told) == 8 and metrics["judge/asked"] == 8 and metrics["judge/ties"] == 0.25
    assert metrics["judge/first_place"] == 0.5 and metrics["judge/disagreement"] == 0
    assert metrics["judge/completion_tokens"] == 32
    assert metrics["judge/prompt_tokens"] == sum(len(question.split()) for question in questions)


def test_a_judge_that_favours_the_first_place_decides_nothing_and_is_found_out(tmp_path):
    server = JudgeServer()
    server.verdict = lambda question: "[[A]]"
    with server.serving() as url:
        session = judge(url).judge(PAIRS, tmp_path / "cache.jsonl")
    assert [judgement.score for judgement in session.judgements] == [0.5] * 4
    metrics = session.as_metrics()
    assert metrics["judge/disagreement"] == 1 and metrics["judge/first_place"] == 1


@pytest.mark.parametrize(
    "forth, back, score, contradicts",
    [
        ("A", "B", 1.0, False),
        ("B", "A", 0.0, False),
        ("A", "A", 0.5, True),
        ("B", "B", 0.5, True),
        ("A", "C", 0.75, False),
        ("C", "A", 0.25, False),
        ("C", "C", 0.5, False),
        (None, "B", 1.0, False),
        ("A", None, 1.0, False),
        (None, None, None, False),
    ],
)
def test_what_two_verdicts_come_to(forth, back, score, contradicts):
    judgement = Judgement(forth, back)
    assert judgement.score == score and judgement.contradicts == contradicts


def test_answers_are_kept_and_not_asked_for_again(tmp_path):
    """Also where the judge was stopped in between: a cut last line is asked for again."""
    cache, server = tmp_path / "cache.jsonl", JudgeServer()
    with server.serving() as url:
        first = judge(url).judge(PAIRS[:2], cache)
        cache.write_bytes(cache.read_bytes()[:-20])
        again = judge(url).judge(PAIRS, cache)
        third = judge(url).judge(PAIRS, cache)
        other = judge(url, max_tokens=65).judge(PAIRS[:1], cache)
    assert (first.asked, again.asked, third.asked, other.asked) == (4, 5, 0, 2)
    assert again.judgements == third.judgements and again.judgements[:2] == first.judgements
    assert third.as_metrics()["judge/completion_tokens"] == 32
    assert all(json.loads(line)["verdict"] in "ABC" for line in cache.read_text().splitlines())


def test_equal_questions_are_asked_once(tmp_path):
    server = JudgeServer()
    with server.serving() as url:
        session = judge(url).judge([("p", "a", "b")] * 3, tmp_path / "cache.jsonl")
    assert session.asked == 2 and len(session.judgements) == 3


def test_an_answer_without_a_verdict_is_counted_and_the_last_verdict_counts(tmp_path):
    server = JudgeServer()
    server.verdict = lambda question: "I cannot say" if "p1" in question else "not [[A]] but [[B]]"
    with server.serving() as url:
        session = judge(url).judge(PAIRS[:2], tmp_path / "cache.jsonl")
    assert session.judgements[0].score is None and session.judgements[1].forth == "B"
    assert session.as_metrics()["judge/without_verdict"] == 2


@pytest.mark.parametrize("wrong", [500, 429, "no json", '{"choices": []}', '{"choices": [{"message": null}]}', "[1]"])
def test_what_fails_in_passing_is_asked_again(tmp_path, wrong):
    server = JudgeServer(lambda attempt, body: wrong if attempt <= 2 else None)
    with server.serving() as url:
        session = judge(url).judge(PAIRS[:2], tmp_path / "cache.jsonl")
    assert [judgement.score for judgement in session.judgements] == [1.0, 0.0] and len(server.requests) == 6


def test_a_server_that_fails_for_good_leaves_what_has_come(tmp_path):
    cache = tmp_path / "cache.jsonl"
    server = JudgeServer(lambda attempt, body: 404 if "p2" in body["messages"][0]["content"] else None)
    with server.serving() as url:
        with pytest.raises(ValueError, match=r"judge: http://127.*: POST /v1/chat/completions.*HTTP 404: wrong"):
            judge(url, concurrency=1).judge(PAIRS, cache)
        assert len(cache.read_text().splitlines()) == 2
        server.fault = lambda attempt, body: None
        assert judge(url).judge(PAIRS, cache).asked == 6


def test_the_key_comes_from_the_environment_and_is_not_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret-key")
    with JudgeServer(key="secret-key").serving() as url:
        assert judge(url, api_key_env="JUDGE_KEY").judge(PAIRS[:1], tmp_path / "a.jsonl").asked == 2
        monkeypatch.setenv("JUDGE_KEY", "wrong-key")
        with pytest.raises(ValueError, match=r"HTTP 401.*judge\.api_key_env") as error:
            judge(url, api_key_env="JUDGE_KEY").judge(PAIRS[:1], tmp_path / "b.jsonl")
    assert "wrong-key" not in str(error.value)
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ValueError, match=r"judge\.api_key_env: the environment variable JUDGE_KEY is not set"):
        judge("http://x", api_key_env="JUDGE_KEY")


def test_a_prompt_of_ones_own(tmp_path):
    (tmp_path / "prompt.txt").write_text("Q: {prompt}\n[Answer A]\n{first}\n\n[Answer B]\n{second}\n\nExplain.")
    with JudgeServer().serving() as url:
        session = judge(url, str(tmp_path / "prompt.txt")).judge(PAIRS[:1], tmp_path / "cache.jsonl")
    assert session.judgements[0].score == 1
    (tmp_path / "prompt.txt").write_text("{prompt} {first}")
    with pytest.raises(ValueError, match=r"judge\.prompt: .* lacks \{second\}"):
        judge("http://x", str(tmp_path / "prompt.txt"))
    with pytest.raises(ValueError, match=r"judge\.prompt: cannot read nowhere"):
        judge("http://x", "nowhere")


@pytest.mark.parametrize("line", ["{", "[]", '{"key": "x"}'])
def test_a_file_that_is_no_cache_is_named_by_line(tmp_path, line):
    (tmp_path / "cache.jsonl").write_text(f'{{"key": "x", "verdict": null}}\n{line}\n')
    with pytest.raises(ValueError, match=r"cache\.jsonl:2: no judgement"):
        judge("http://x").judge(PAIRS, tmp_path / "cache.jsonl")
