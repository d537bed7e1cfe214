"""The report of a run: one self-contained report.html from config.yaml, metrics.jsonl and samples.jsonl.

    nemo-brain report RUN_DIR

It can be written at any time, while the run goes on too, and says what is missing where files are. Charts are inline
SVG whose colours are CSS variables, so they follow the reader's light or dark theme; nothing is loaded from anywhere.
"""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml

from nemo_brain.report.kinds.choice import make_report
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
    files = [path for name in ("metrics.jsonl", "samples.jsonl") if (path := run_dir / name).exists()]
    as_of = max((path.stat().st_mtime for path in files), default=None)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "clip": _clip}
    html = environment.get_template("report.html.j2").render(
        name=run_dir.resolve().name,
        report=report,
        config_text=config_text,
        missing=[*([] if config_text else ["config.yaml: the configuration is not shown"]), *report.missing()],
        as_of=datetime.fromtimestamp(as_of).astimezone().strftime("%Y-%m-%d %H:%M %Z") if as_of else None,
        limit=TABLE_ROWS,
    )
    path = run_dir / "report.html"
    # Replaced whole, so that a page reloaded during the run is never half a page.
    draft = run_dir / "report.html.tmp"
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
