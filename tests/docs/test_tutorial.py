"""The tutorial's own commands, in its order, on a small random model in the place of the real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from doc_blocks import blocks
from models import SMOLLM2, chat_llama
from toy_runs import ROOT

from nemo_brain.report.metrics import read_metrics

PAGE = ROOT / "docs" / "tutorial.md"
# The program nemo-brain, for a reader who has only this model.
PROGRAM = """import sys
from nemo_brain.cli.main import main
main([argument.replace({real!r}, {model!r}) for argument in sys.argv[1:]])
"""


def run(script: str, directory: Path) -> str:
    environment = {**os.environ, "PATH": f"{directory / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-e"], input=script, cwd=directory / "work", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_its_commands_work_one_after_the_other(tmp_path, warm_python):
    model = chat_llama(tmp_path / "model")
    for name in ("bin", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "program.py").write_text(PROGRAM.format(real=SMOLLM2, model=str(model)))
    program = tmp_path / "bin" / "nemo-brain"
    program.write_text(f'#!/bin/sh\nexec {warm_python} {tmp_path / "program.py"} "$@"\n')
    program.chmod(0o755)
    printed = ""
    for block in blocks(PAGE):
        if block.not_run is None and block.language == "bash":
            printed += run(block.text, tmp_path)
        elif block.language == "python":
            run(f"{sys.executable} - <<'END'\n{block.text}END\n", tmp_path)
    work = tmp_path / "work"
    assert len((work / "prompts.jsonl").read_text().splitlines()) == 48
    records = read_metrics(work / "runs" / "evaluation" / "metrics.jsonl")
    assert [record["candidate"] for record in records] == ["runs/sft/model", "runs/brain/model"]
    assert "win-rate over start" in printed
    assert json.loads((work / "runs" / "brain" / "status.json").read_text()) == {"state": "finished", "step": 9}
