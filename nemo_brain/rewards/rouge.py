"""ROUGE-L of an output against the prompt's reference answer, by Google's rouge-score."""

from __future__ import annotations


def rouge_l(
    prompts: list[str], outputs: list[str], *, references: list[str | None], metadata: list[dict]
) -> list[float]:
    """The F-measure in [0, 1] of the longest common subsequence of stemmed words. ValueError: there is no reference."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ValueError("ROUGE needs the package rouge-score: pip install 'nemo_brain[evaluation]'") from error

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = []
    for prompt, output, reference in zip(prompts, outputs, references, strict=True):
        if reference is None:
            raise ValueError(f"the prompt {prompt[:50]!r} has no reference, which ROUGE compares with")
        scores.append(scorer.score(reference, output)["rougeL"].fmeasure)
    return scores
