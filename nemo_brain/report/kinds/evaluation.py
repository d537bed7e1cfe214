"""The report of an evaluation: several models against the start model on the same held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from nemo_brain.report.kinds.base import Cell, Comparison, Note, Report, Row, Rows, Table, Tile
from nemo_brain.report.kinds.brain import BRAInReport, mean_reward, outputs_cell
from nemo_brain.report.text import interval, number, p_text, percent, signed, with_interval


class EvaluationReport(Report):
    """Of models, in the order in which they were named."""

    title = "Evaluation"
    expected: ClassVar = {"eval": "no model has been evaluated yet"}
    samples_title = "Held-out prompts, model by model"
    explanation = BRAInReport.explanation

    @property
    def _models(self) -> list[dict[str, Any]]:
        return [dict(record) for record in self.records if record.get("kind") == "eval"]

    def progress(self) -> str:
        planned = self.config.get("candidates") or []
        return f"{len(self._models)} of {len(planned)} models"

    def verdict(self) -> str:
        if not self._models:
            return super().verdict()
        best = max(self._models, key=lambda record: record.get("eval/reward") or float("-inf"))
        start, prompts = number(best.get("eval/start_reward")), number(best.get("eval/prompts"))
        highest = f"{best['candidate']} has the highest mean reward, {with_interval(best, 'eval/reward')}"
        return f"On {prompts} held-out prompts, {highest}; the start model has {start}."

    def tiles(self) -> list[Tile]:
        found = []
        for record in self._models:
            p = p_text(record.get("eval/p_value"))
            change = f"{signed(record.get('eval/reward_difference'))} to the start model" + (p and f", {p}")
            found.append(Tile(f"Reward of {record['candidate']}", number(record.get("eval/reward")), change))
            words = interval(record, "eval/win_rate", percent)
            found.append(Tile(f"Win-rate of {record['candidate']}", percent(record.get("eval/win_rate")), words))
            if record.get("judge/win_rate") is not None:
                words = interval(record, "judge/win_rate", percent)
                value = percent(record["judge/win_rate"])
                found.append(Tile(f"LLM judge's win-rate of {record['candidate']}", value, words))
        return found

    def tables(self) -> list[Table]:
        """Who wins over whom, by each score; of two candidates and more."""
        keys = dict.fromkeys(key for record in self._models for key in record if key.split("/")[-1] == "against")
        return [self._matrix(key.removesuffix("against")) for key in keys]

    def comparison(self) -> Comparison | None:
        starts = [sample for sample in self.samples if sample.get("kind") == "start"]
        if not starts or not self._models:
            return None
        later = {(s["id"], s["iteration"]): s for s in self.samples if s.get("kind") == "final"}
        places = range(1, 1 + len(self._models))
        rows = []
        for start in starts:
            found = [later.get((start["id"], place)) for place in places]
            cells = [
                Cell(start.get("prompt"), unfolds="reference answer", more=_reference(start)),
                outputs_cell(start),
                *(Cell() if sample is None else outputs_cell(sample) for sample in found),
            ]
            gains = [mean_reward(sample) for sample in found if sample is not None]
            rows.append(Row(cells, max([0.0, *((gain or 0.0) - (mean_reward(start) or 0.0) for gain in gains)])))
        names = [(record["candidate"], "") for record in self._models]
        return Comparison(
            "The start model and the others",
            [],
            [("Prompt", "26%"), ("Start model", ""), *names],
            rows,
            ("largest gain first", "smallest gain first"),
        )

    def _matrix(self, score: str) -> Table:
        """The win-rates of all models, the start model among them, over each other, by the reward ("") or by another
        score ("gold/NAME/")."""
        names = ["Start model", *(record["candidate"] for record in self._models)]
        rates: dict[tuple[int, int], Mapping[str, Any]] = {}
        for place, record in enumerate(self._models, start=1):
            rates[place, 0] = {key.removeprefix(score or "eval/"): value for key, value in record.items()}
            for other, found in enumerate(record.get(f"{score}against") or [], start=1):
                rates[place, other] = found

        def cell(row: int, column: int) -> str:
            if row == column:
                return "–"
            if (row, column) in rates:
                return with_interval(rates[row, column], "win_rate", percent)
            theirs = rates.get((column, row), {})
            names = {
                "win_rate": "win_rate",
                "win_rate_ci_low": "win_rate_ci_high",
                "win_rate_ci_high": "win_rate_ci_low",
            }
            ours = {name: 1 - value for name, of in names.items() if (value := theirs.get(of)) is not None}
            return with_interval(ours, "win_rate", percent)

        rows = [[name, *(cell(row, column) for column in range(len(names)))] for row, name in enumerate(names)]
        by = score.split("/")[1] if score else "the reward"
        return Table(
            f"Win-rates by {by}",
            "Of the row's model over the column's: pairs of outputs to the same prompt, ties half; 95% over prompts.",
            ["", *(f"over {name}" for name in names)],
            rows,
        )

    def summary(self) -> Rows:
        rows = []
        for record in self._models:
            p = p_text(record.get("eval/p_value"))
            prompts = number(record.get("eval/prompts"))
            before, after = number(record.get("eval/start_reward")), with_interval(record, "eval/reward")
            change = with_interval(record, "eval/reward_difference", signed)
            rows += [
                ("model", record["candidate"]),
                ("  held-out reward", f"{before} -> {after} on {prompts} prompts"),
                ("  change", change + (p and f", {p} (paired t-test)")),
                ("  win-rate over start", with_interval(record, "eval/win_rate", percent)),
                ("  KL to start model", f"{with_interval(record, 'eval/kl_to_prior')} nats"),
            ]
            for found in record.get("against") or []:
                rows.append(("  win-rate", f"{with_interval(found, 'win_rate', percent)} over {found['over']}"))
            rows += [*_gold_rows(record), *_judge_rows(record)]
        references = self._models[0].get("eval/reference_reward") if self._models else None
        if references is not None:
            rows.append(("reference answers", f"{number(references)} mean reward"))
        return rows or super().summary()


def _reference(sample: Mapping[str, Any]) -> list[tuple[str, Note | None]]:
    return [(sample["reference"], None)] if sample.get("reference") else []


def _gold_rows(record: Mapping[str, Any]) -> Rows:
    rows = []
    for name in sorted({key.split("/")[1] for key in record if key.startswith("gold/")}):
        key = f"gold/{name}"
        before, after = number(record[f"{key}/start_reward"]), with_interval(record, f"{key}/reward")
        rows += [
            (f"  {name}", f"{before} -> {after}"),
            (f"  {name}: win-rate", with_interval(record, f"{key}/win_rate", percent)),
            (f"  {name}: correlation", f"{number(record[f'{key}/correlation'])} with the reward"),
        ]
    return rows


def _judge_rows(record: Mapping[str, Any]) -> Rows:
    if record.get("judge/win_rate") is None:
        return []
    asked, read, written, without = (
        record[f"judge/{name}"] for name in ("asked", "prompt_tokens", "completion_tokens", "without_verdict")
    )
    return [
        ("  LLM judge: win-rate", with_interval(record, "judge/win_rate", percent)),
        ("  LLM judge: ties", percent(record["judge/ties"])),
        ("  LLM judge: disagreement", f"{percent(record['judge/disagreement'])} of pairs, by their order"),
        ("  LLM judge: first place", f"{percent(record['judge/first_place'])} of verdicts"),
        ("  LLM judge: cost", f"{asked} requests, {read} tokens read, {written} written; {without} without a verdict"),
    ]
