"""Scores one-line synopses of longer texts: meaning by sentence embeddings, less what a short synopsis must not do.

reward = cosine(synopsis, description) - charges, in [-1, 1]. Copying the description would win on the cosine alone,
so verbatim runs, length, repetition and form are charged. It needs no reference: people's synopses are scored alike.
"""

from __future__ import annotations

import re
from difflib import SequenceMatcher

import torch

from nemo_brain.rewards.minilm import MiniLM

EMPTY_REWARD = -1.0
WORDS = (3, 10)  # the length without a charge; nearly all of Debian's synopses have it
LONG_CHARGE = 0.05  # per further word
SHORT_CHARGE = 0.2  # per missing word: a name alone is close to its description and says nothing
FREE_RUN = 3  # words that may stand in the description in the same order; most human synopses stay within
RUN_CHARGE = 0.1  # per further word of the longest verbatim run
REPEAT_CHARGE = 0.1  # per repeated word of four letters or more
LINES_CHARGE = 0.2  # a second line or sentence
PREAMBLE_CHARGE = 0.1  # words about the answer or the package instead of the software
DANGLING_CHARGE = 0.2  # the last word announces another one: a phrase cut short

WORD = re.compile(r"[^\W_]+(?:['+#.-]*[^\W_]+|[+#]+)*")
SECOND_SENTENCE = re.compile(r"\n|[.!?;]\s+\S")
PREAMBLE = re.compile(
    r"^\W*(here(['’]s| is| are)\b|sure\b|in (short|summary)\b"
    r"|(\w+[ -]){0,3}(summary|synopsis|description|title|answer)\s*:"
    r"|(this|the) (\w+ )?(package|software|program|module|library|tool|project)\b|it (is|provides|allows)\b)",
    re.IGNORECASE,
)
DANGLING = re.compile(
    r"\b(an?|the|this|that|these|its|and|or|but|of|for|to|in|on|at|by|with|from|into|as|is|are|was|be|which|who|can)\W*$",
    re.IGNORECASE,
)


class SynopsisReward:
    """A reward over (description, synopsis) pairs; follows the reward protocol.

    Args:
        model: directory of a sentence encoder; null for the installed MiniLM wheel.
        device: where the encoder runs.
        batch_size: texts per encoder batch.
    """

    def __init__(self, model: str | None = None, device: str = "cpu", batch_size: int = 64):
        self.encoder = MiniLM(model, device, batch_size)
        self.embeddings: dict[str, torch.Tensor] = {}  # of descriptions: they recur for every output and iteration

    def __call__(
        self, prompts: list[str], outputs: list[str], *, references: list[str | None], metadata: list[dict]
    ) -> list[float]:
        """One reward per output. ``metadata[i]["description"]`` is the text that output i summarizes.

        Raises:
            ValueError: a record without a description.
        """
        missing = [i for i, record in enumerate(metadata) if not record.get("description")]
        if missing:
            raise ValueError(
                f"reward: the record of prompt {prompts[missing[0]][:80]!r} has no 'description'; SynopsisReward "
                "compares outputs with that field (data: nemo_brain.data.package_synopses.package_synopses provides it)"
            )
        descriptions = [record["description"] for record in metadata]
        self._remember(descriptions)
        synopses = [output.strip() for output in outputs]
        kept = [i for i, synopsis in enumerate(synopses) if WORD.search(synopsis)]
        rewards = [EMPTY_REWARD] * len(outputs)
        for i, vector_H in zip(kept, self.encoder.encode([synopses[i] for i in kept]), strict=True):
            similarity = float(vector_H @ self.embeddings[descriptions[i]])
            rewards[i] = max(-1.0, min(1.0, similarity - charges(synopses[i], descriptions[i])))
        return rewards

    def _remember(self, descriptions: list[str]) -> None:
        new = list(dict.fromkeys(d for d in descriptions if d not in self.embeddings))
        self.embeddings.update(zip(new, self.encoder.encode(new), strict=True))


def words(text: str) -> list[str]:
    """The text's words in lower case, without punctuation; ``C++``, ``x.509`` and ``read-only`` are one word each."""
    return [word.lower() for word in WORD.findall(text)]


def charges(synopsis: str, description: str) -> float:
    """What is taken off the similarity for length, copying, repetition and form; at least 0."""
    said, source = words(synopsis), words(description)
    run = SequenceMatcher(None, said, source, autojunk=False).find_longest_match().size
    long = [word for word in said if len(word) >= 4]
    return (
        SHORT_CHARGE * max(WORDS[0] - len(said), 0)
        + LONG_CHARGE * max(len(said) - WORDS[1], 0)
        + RUN_CHARGE * max(run - FREE_RUN, 0)
        + REPEAT_CHARGE * (len(long) - len(set(long)))
        + LINES_CHARGE * bool(SECOND_SENTENCE.search(synopsis))
        + PREAMBLE_CHARGE * bool(PREAMBLE.search(synopsis))
        + DANGLING_CHARGE * bool(DANGLING.search(synopsis))
    )
