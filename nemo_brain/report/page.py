"""The report of a run: one self-contained report.html from config.yaml, metrics.jsonl and samples.jsonl; or one page
about several runs.

    nemo-brain report RUN_DIR
    nemo-brain report RUN_DIR RUN_DIR ... out=PAGE.html

It can be written at any time, while the run goes on too, and says what is missing where files are. Charts are inline
SVG whose colours are CSS variables, so they follow the reader's light or dark theme; nothing is loaded from anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml

from nemo_brain.report.kinds.base import Report
from nemo_brain.report.kinds.choice import make_report
from nemo_brain.report.kinds.overlay import OverlayReport
from nemo_brain.report.metrics import read_metrics, read_samples
from nemo_brain.report.text import number

TABLE_ROWS = 100
TEXT_CHARACTERS = 5000


def write_report(run_dir: str | Path) -> Path:
    """Writes ``run_dir``/report.html from whatever of the run's files exists, and returns its path.

    Raises:
        ValueError: if there is no such directory, or a file of it is broken (with file and line).
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir}: no such run directory; give the run_dir of a run")
    records, samples = read_metrics(run_dir / "metrics.jsonl"), read_samples(run_dir / "samples.jsonl")
    config_path = run_dir / "config.yaml"
    config_text = config_path.read_text(encoding="utf-8") if config_path.exists() else None
    report = make_report(records, samples, _config(config_text))
    missing = [*([] if config_text else ["config.yaml: the configuration is not shown"]), *report.missing()]
    return _render(run_dir / "report.html", run_dir.resolve().name, report, missing, [run_dir], config_text)


def write_overlay(run_dirs: Sequence[str], out: str | Path) -> Path:
    """Writes one page about several runs, and returns its path.

    Raises:
        ValueError: if a directory has no metrics.jsonl, a file is broken, or ``out`` cannot be written.
    """
    runs = []
    for name in run_dirs:
        path = Path(name)
        if not (path / "metrics.jsonl").is_file():
            raise ValueError(f"{name}: no metrics.jsonl; give the run_dir of a run that has begun")
        config = path / "config.yaml"
        text = config.read_text(encoding="utf-8") if config.exists() else None
        runs.append((name, read_metrics(path / "metrics.jsonl"), _config(text)))
    report = OverlayReport(runs)
    try:
        return _render(Path(out), "Runs side by side", report, report.missing(), [Path(name) for name in run_dirs])
    except OSError as error:
        raise ValueError(f"out={out}: cannot be written ({error.strerror or error})") from error


def _render(
    path: Path,
    name: str,
    report: Report,
    missing: Sequence[str],
    run_dirs: Sequence[Path],
    config_text: str | None = None,
) -> Path:
    """Writes the page. It is replaced whole, so that one reloaded during the run is never half a page."""
    files = [directory / name for directory in run_dirs for name in ("metrics.jsonl", "samples.jsonl")]
    as_of = max((file.stat().st_mtime for file in files if file.exists()), default=None)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "clip": _clip}
    html = environment.get_template("report.html.j2").render(
        name=name,
        report=report,
        config_text=config_text,
        missing=missing,
        as_of=datetime.fromtimestamp(as_of).astimezone().strftime("%Y-%m-%d %H:%M %Z") if as_of else None,
        limit=TABLE_ROWS,
    )
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text(html, encoding="utf-8", errors="replace")
    os.replace(draft, path)
    return path


def _clip(text: str | None) -> str:
    text = text or ""
    return (
        text if len(text) <= TEXT_CHARACTERS else f"{text[:TEXT_CHARACTERS]} … ({len(text) - TEXT_CHARACTERS:,} more)"
    )


def _config(text: str | None) -> dict[str, Any]:
    try:
        config = yaml.safe_load(text or "")
    except yaml.YAMLError:  # shown as it stands; only the names taken from it are missing
        config = None
    return config if isinstance(config, dict) else {}
