"""The site can be built: links lead somewhere, nothing is loaded from elsewhere, and messages are the program's own."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from doc_blocks import blocks
from toy_runs import ROOT

TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"


def build(source: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)


def checkout(directory: Path) -> Path:
    """What the site is built from, with links to the rest of the checkout."""
    directory.mkdir()
    for path in ROOT.iterdir():
        if path.name == "docs":
            shutil.copytree(path, directory / "docs", ignore=shutil.ignore_patterns("__pycache__"))
        elif path.suffix == ".md" or path.name == "mkdocs.yml":
            shutil.copy(path, directory)
        elif not path.name.startswith(".") or path.name == ".ci":
            (directory / path.name).symlink_to(path)
    return directory


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("site")
    result = build(ROOT, target)
    assert result.returncode == 0 and "WARNING" not in result.stderr, result.stderr
    return target


def test_the_site_is_built_without_a_warning(site):
    assert {"index.html", "tutorial.html", "contributing.html", "reference.html"} <= {p.name for p in site.iterdir()}


def test_a_page_loads_nothing_from_elsewhere(site):
    for page in site.glob("*.html"):
        loaded = re.findall(r'<(?:script|img|link|iframe)[^>]+(?:src|href)="(https?:[^"]+)"', page.read_text())
        assert not loaded, page


def test_the_reference_has_what_it_names(site):
    text = (site / "reference.html").read_text()
    for name in ("nemo_brain.objectives.Objective.log_alpha", "nemo_brain.report.evaluate.evaluate"):
        assert f'id="{name}"' in text, name


@pytest.mark.parametrize(
    "link, message",
    [
        ("[x](absent.md)", "links to absent.md"),
        ("[x](../tests/absent.py)", "there is no tests/absent.py"),
        ("[x](data.md#absent)", "does not contain an anchor '#absent'"),
    ],
)
def test_a_link_that_leads_nowhere_is_found(link, message, tmp_path):
    source = checkout(tmp_path / "checkout")
    with (source / "docs" / "running.md").open("a") as page:
        page.write(f"\n{link}\n")
    result = build(source, tmp_path / "site")
    assert result.returncode != 0 and message in result.stderr


def strings() -> set[str]:
    """The texts in the package's code, those of f-strings between their values."""
    found = set()
    for path in (ROOT / "nemo_brain").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def quoted(page: str) -> list[str]:
    """The messages in a page's boxes and in tables' first cells, without what differs."""
    boxes = [block.text for block in blocks(TROUBLESHOOTING) if block.language == "text"]
    cells = re.findall(r"^\| `([^`]*\.\.\.[^`]*|[a-z ]{20,})` \|", page, re.MULTILINE)
    parts = [part.strip() for text in [*boxes, *cells] for part in text.replace("...", "\n").splitlines()]
    return [part for part in parts if part]


def test_the_messages_of_troubleshooting_are_the_programs():
    known = strings()
    parts = quoted(TROUBLESHOOTING.read_text())
    assert len(parts) > 20
    for part in parts:
        assert any(part in text for text in known), part
    assert not any("was written by a walk" in text for text in known)
