"""docs/benchmarks.md, what was found, and docs/benchmarks_tables.md, the figures behind it with their spread."""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks import gpu_tables
from benchmarks.common import ROOT

_HEAD = """# Benchmarks

What was found; [the tables](benchmarks_tables.md) have the figures, how they were measured, when and on what. All
of it on two cores of a CPU, with fp32 and one thread per process unless the text says otherwise.
[benchmarks/README.md](../benchmarks/README.md) explains how to measure again.
"""
_TABLES_HEAD = """# Benchmark tables

Written by `python benchmarks/run.py`, which [benchmarks/README.md](../benchmarks/README.md) explains; the numbers are
in `benchmarks/results/`. Cases of one table ran interleaved (A B A B ...) in one process with one thread unless the
text says otherwise. Times are medians, in parentheses the quartiles and the number of repeats. A ratio is that of the
medians, in parentheses the quartiles of the rounds' own ratios.
"""
_FINDINGS = ROOT / "benchmarks" / "findings"
_ORDER = ("step", "layouts", "trl", "logprobs", "sampling", "engines", "guards", "checkpoints", "scaling", "calculated")


def places(results: Path | None, smoke: bool) -> tuple[Path, Path]:
    """Where results go, and the page of them: the project's own, or both in one directory, as a smoke run's always."""
    if results is None and not smoke:
        return ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"
    directory = results or ROOT / "build" / "smoke"
    return directory, directory / "benchmarks.md"


def write_page(results: Path, page: Path) -> None:
    """Rewrites ``page``, and beside it the page of its tables, from the JSON files in ``results``.

    Tables that were never measured are left out, but for the one of a card, whose targets stand there all the same.
    """
    found = {name: _read(results / f"{name}.json") for name in _ORDER if (results / f"{name}.json").exists()}
    found["gpu"] = gpu_tables.section(results)
    behind = tables_page(page)
    lines, tables = [_HEAD], [_TABLES_HEAD]
    for name, result in found.items():
        lines += _finding(name, result, behind.name)
        tables += _section(name, result, results)
    targets = [(name, target) for name, result in found.items() for target in result.get("targets", [])]
    if targets:
        lines += ["## Targets\n", *_target_table(targets), ""]
    page.parent.mkdir(parents=True, exist_ok=True)
    for path, text in ((page, lines), (behind, tables)):
        path.write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")


def tables_page(page: Path) -> Path:
    """Where the tables behind ``page`` stand."""
    return page.with_stem(f"{page.stem}_tables")


def met(target: dict) -> bool:
    """Whether the median keeps the target."""
    value = target["value"]["median"] if isinstance(target["value"], dict) else target["value"]
    return value <= target["at_most"] if "at_most" in target else value >= target["at_least"]


def _target_table(targets: list[tuple[str, dict]]) -> list[str]:
    rows = []
    for name, target in targets:
        unit = target.get("unit", "ratio")
        bound = f"at most {_format(target['at_most'], unit)}" if "at_most" in target else ""
        bound = bound or f"at least {_format(target['at_least'], unit)}"
        rows.append([name, target["what"], _format(target["value"], unit), bound, "yes" if met(target) else "**no**"])
    return _table(["table", "figure", "measured", "target", "met"], rows)


def _finding(name: str, result: dict, tables: str) -> list[str]:
    """A table's findings, in a person's words, and where it is."""
    findings = _FINDINGS / f"{name}.md"
    text = [findings.read_text(encoding="utf-8")] if findings.exists() and not result["smoke"] else []
    anchor = re.sub(r"[^a-z0-9 -]", "", result["title"].lower()).replace(" ", "-")
    shown = [line for part in result["parts"] if part.get("on_page") for line in (*_part(part), "")]
    return [f"## {result['title']}\n", *text, *shown, f"[Tables]({tables}#{anchor})\n"]


def _section(name: str, result: dict, results: Path) -> list[str]:
    lines = [f"## {result['title']}\n"]
    command = result.get("command", f"python benchmarks/run.py {name}") + (" --smoke" if result["smoke"] else "")
    if (facts := result["facts"]) is None:
        lines.append(f"`{command}`: **not measured yet**.\n")
    else:
        versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
        card = f"{facts['card']}; " if facts.get("card") else ""
        lines.append(
            f"`{command}`: {facts['date']}, {card}{facts['cpu']}, {facts['memory_gib']} GiB, "
            f"{facts['threads']} thread, load {facts['load_average']} before; Python {facts['python']}, {versions}; "
            f"commit {facts['commit']}; {result['measured_in_seconds']} s.\n"
        )
    if result["smoke"]:
        lines.append("**A smoke run: toy sizes, no meaning.**\n")
    lines.append(result["method"])
    for part in result["parts"]:
        if part.get("title"):
            lines.append(f"### {part['title']}\n")
        lines += [*_part(part), ""]
    profile = results / f"{name}.profile.json"
    if profile.exists():
        lines += _profiles(name, _read(profile))
    return lines


def _part(part: dict) -> list[str]:
    rows = [[_format(row.get(key), unit) for key, _, unit in part["columns"]] for row in part["rows"]]
    text = [f"{part['text'].strip()}\n"] if part.get("text") else []
    return [*text, *_table([label for _, label, _ in part["columns"]], rows)]


def _profiles(name: str, profiled: dict) -> list[str]:
    lines = [f"### Profile\n\n`python benchmarks/run.py {name} --profile`, {profiled['facts']['date']}; self time.\n"]
    for profile in profiled["profiles"]:
        rows = [
            [f"`{item['operation']}`", f"{item['share']:.1%}", f"{item['milliseconds']:.1f}", str(item["calls"])]
            for item in profile["operations"]
        ]
        lines += [f"{profile['title']}:\n", *_table(["operation", "share", "milliseconds", "calls"], rows), ""]
    return lines


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _format(value: object, unit: str) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        middle, low, high = (_format(value[key], unit) for key in ("median", "low", "high"))
        if value["repeats"] == 1:
            return f"{middle} (1)"
        return f"{middle} ({low} to {high}; {value['repeats']})"
    if unit == "bytes":
        return f"{value / 2**20:,.0f} MiB"
    if unit == "percent":
        return f"{value:.2%}" if value < 0.1 else f"{value:.0%}"
    if unit == "count":
        return f"{value:,}"
    if unit == "text" or isinstance(value, str):
        return f"({', '.join(map(str, value))})" if isinstance(value, list | tuple) else str(value)
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
