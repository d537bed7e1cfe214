"""An LLM as a judge: a model behind an OpenAI-compatible server says which of two outputs answers a prompt better.

Each pair is asked about in both orders, because judges favour a place. Answers are kept in a file as they come, and are
not asked for again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx

from nemo_brain.core.http import BadAnswer, HTTPClient
from nemo_brain.core.together import together

PROMPT = """\
Two assistants have answered the same request. Say which answer is better: more helpful, correct, relevant and concise.
Neither the order of the answers nor their length may influence you.

[Request]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Explain your judgement briefly, then end with your verdict on a line of its own: [[A]] if answer A is better, [[B]] if
answer B is better, [[C]] for a tie."""
_VERDICT = re.compile(r"\[\[([ABC])\]\]")
_PLACES = ("{prompt}", "{first}", "{second}")


@dataclass(frozen=True)
class Judgement:
    """What a judge made of a pair: its verdicts with ours first and with ours second, A, B, C (tie) or None."""

    forth: str | None
    back: str | None

    @property
    def score(self) -> float | None:
        """1: ours is better, 0: theirs; the mean of the orders that had a verdict, None where neither had."""
        known = [
            {win: 1.0, "C": 0.5}.get(verdict, 0.0)
            for verdict, win in ((self.forth, "A"), (self.back, "B"))
            if verdict is not None
        ]
        return sum(known) / len(known) if known else None

    @property
    def contradicts(self) -> bool:
        """Whether the orders had different winners."""
        return self.forth == self.back and self.forth in ("A", "B")


@dataclass(frozen=True)
class Session:
    """What a judge said, and what it took: requests that were sent, tokens read and written by the model (of all
    answers, also of those that were known)."""

    judgements: list[Judgement]
    asked: int
    prompt_tokens: int
    completion_tokens: int

    def as_metrics(self) -> dict[str, float]:
        """Shares of pairs without a winner and with contradicting verdicts; of verdicts for the first place; counts."""
        pairs = [judgement for judgement in self.judgements if judgement.score is not None]
        verdicts = [v for judgement in self.judgements for v in (judgement.forth, judgement.back) if v is not None]
        decided = [verdict for verdict in verdicts if verdict != "C"]
        return {
            "judge/ties": sum(judgement.score == 0.5 for judgement in pairs) / max(1, len(pairs)),
            "judge/disagreement": sum(judgement.contradicts for judgement in pairs) / max(1, len(pairs)),
            "judge/first_place": decided.count("A") / len(decided) if decided else 0.5,
            "judge/without_verdict": 2 * len(self.judgements) - len(verdicts),
            "judge/asked": self.asked,
            "judge/prompt_tokens": self.prompt_tokens,
            "judge/completion_tokens": self.completion_tokens,
        }


class Judge:
    """Asks ``POST URL/v1/chat/completions`` at temperature 0.

    Args:
        url, model: the server and the model's name there.
        prompt: a text file with {prompt}, {first} and {second}, whose answers end in [[A]], [[B]] or [[C]]; None: ours.
        max_tokens: of an answer.
        concurrency: requests at a time.
        api_key_env, request_timeout_seconds, timeout_seconds: see ``HTTPClient``.

    Raises:
        ValueError: the file cannot be used, or the API key is not set; names the key.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        prompt: str | None,
        max_tokens: int,
        concurrency: int,
        api_key_env: str | None,
        request_timeout_seconds: float,
        timeout_seconds: float,
    ):
        self._http = HTTPClient(
            "judge",
            url,
            api_key_env=api_key_env,
            concurrency=concurrency,
            request_timeout_seconds=request_timeout_seconds,
            timeout_seconds=timeout_seconds,
        )
        self._model, self._max_tokens, self._concurrency = model, max_tokens, concurrency
        self._prompt = PROMPT if prompt is None else _read_prompt(prompt)

    def judge(
        self, pairs: Sequence[tuple[str, str, str]], cache: Path, on_answers: Callable[[int], None] = lambda _: None
    ) -> Session:
        """Compares.

        Args:
            pairs: prompts with our output and theirs.
            cache: a JSONL file of answers; those that are not in it are asked for, and added.
            on_answers: told how many answers have come, two for a pair.

        Raises:
            ValueError: the server gave no answer within its limits, or the file cannot be read; what came is in it.
        """
        questions = [
            question
            for prompt, ours, theirs in pairs
            for question in (self._ask(prompt, ours, theirs), self._ask(prompt, theirs, ours))
        ]
        known = _read_cache(cache)
        missing = [question for question in dict.fromkeys(questions) if self._name(question) not in known]
        on_answers(len(questions) - len(missing))
        with cache.open("a", encoding="utf-8") as file:
            asyncio.run(self._fetch(missing, known, file, on_answers))
        answers = [known[self._name(question)] for question in questions]
        judgements = [
            Judgement(forth["verdict"], back["verdict"])
            for forth, back in zip(answers[::2], answers[1::2], strict=True)
        ]
        read, written = (
            sum(answer.get(name) or 0 for answer in answers) for name in ("prompt_tokens", "completion_tokens")
        )
        return Session(judgements, len(missing), read, written)

    def _ask(self, prompt: str, first: str, second: str) -> str:
        """In one pass: an output may hold a place's name."""
        texts = dict(zip(_PLACES, (prompt, first, second), strict=True))
        return re.sub("|".join(map(re.escape, _PLACES)), lambda place: texts[place[0]], self._prompt)

    def _name(self, question: str) -> str:
        return hashlib.sha256(json.dumps([self._model, self._max_tokens, question]).encode()).hexdigest()

    async def _fetch(
        self, questions: Sequence[str], known: dict[str, dict], file: IO[str], on_answers: Callable[[int], None]
    ) -> None:
        slots = asyncio.Semaphore(self._concurrency)  # the budget of a request starts when it is sent
        async with self._http.client() as client:

            async def fetch(question: str) -> None:
                async with slots:
                    answer = await self._answer(client, question)
                known[self._name(question)] = answer
                file.write(json.dumps({"key": self._name(question), **answer}, ensure_ascii=True) + "\n")
                file.flush()
                on_answers(1)

            await together(fetch(question) for question in questions)

    async def _answer(self, client: httpx.AsyncClient, question: str) -> dict[str, Any]:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": self._max_tokens,
        }
        what = "POST /v1/chat/completions, a comparison"
        return await self._http.ask(client, "POST", "/v1/chat/completions", what, _read_answer, body)


def _read_answer(answer: Any) -> dict[str, Any]:
    """The last verdict in an answer, None where it has none: at temperature 0 it would be the same again."""
    try:
        text = answer["choices"][0]["message"]["content"] or ""
        usage = answer.get("usage") or {}
        counts = {name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
        found = _VERDICT.findall(text)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise BadAnswer(f"no choices[0].message.content in {str(answer)[:200]}") from None
    return {"verdict": found[-1] if found else None, "text": text, **counts}


def _read_prompt(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"judge.prompt: cannot read {path}: {error}") from error
    if missing := [place for place in _PLACES if place not in text]:
        raise ValueError(f"judge.prompt: {path} lacks {', '.join(missing)}: write them where the texts belong")
    return text


def _read_cache(path: Path) -> dict[str, dict]:
    """The answers by key; a line that a killed process has left is cut off."""
    if not path.exists():
        return {}
    known, kept = {}, 0
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if number == len(lines):  # behind the last line break
            break
        try:
            record = json.loads(line)
            known[record["key"]] = {**record, "verdict": record["verdict"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: no judgement ({error}): remove the line or the file") from error
        kept += len(line) + 1
    if lines[-1]:
        with path.open("rb+") as file:
            file.truncate(kept)
    return known
