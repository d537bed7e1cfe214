"""A run's directory: an earlier run moves away, one writes at a time, what a checkpoint does not know is cut off."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_brain.report.run_dir import (
    LINE_FILES,
    line_file_sizes,
    locked,
    prepare_run_dir,
    read_status,
    rewind,
    write_status,
)


def test_an_earlier_run_moves_away_whole_and_foreign_files_stay(tmp_path):
    run_dir = tmp_path / "a" / "run"
    assert prepare_run_dir(run_dir) == run_dir and run_dir.is_dir()
    for k in (1, 2):
        (run_dir / "metrics.jsonl").write_text(f"run {k}")
        (run_dir / "checkpoints").mkdir()
        (run_dir / "checkpoints" / "last").write_text(f"weights {k}")
        (run_dir / "mine.txt").write_text("notes")
        prepare_run_dir(run_dir)
        assert sorted(p.name for p in run_dir.iterdir()) == ["mine.txt", "previous"]
    assert (run_dir / "previous/1/metrics.jsonl").read_text() == "run 1"
    assert (run_dir / "previous/2/checkpoints/last").read_text() == "weights 2"


def test_a_resumed_run_keeps_its_files(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("x")
    prepare_run_dir(tmp_path, resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == "x"


def test_a_directory_that_cannot_be_written_is_named_with_the_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    # Not even root may write to these.
    for path in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run"), Path("/proc/sys")):
        for use in (prepare_run_dir, lambda path: locked(path).__enter__()):
            with pytest.raises(ValueError, match=rf"run_dir={path}: cannot write there .*; set run_dir to"):
                use(path)


def test_a_locked_directory_is_refused_until_the_lock_ends(tmp_path):
    run_dir = tmp_path / "run"
    with (
        locked(run_dir),
        pytest.raises(ValueError, match=rf"run_dir={run_dir}: another run is writing there; name another directory"),
        locked(run_dir),
    ):
        pass
    with locked(run_dir):
        pass


def test_the_status_is_what_was_written_last(tmp_path):
    assert read_status(tmp_path) == {}
    for state, step in (("running", 0), ("interrupted", 3)):
        write_status(tmp_path, state, step)
        assert read_status(tmp_path) == {"state": state, "step": step}
    (tmp_path / "status.json").write_text('{"state": ')
    assert read_status(tmp_path) == {}


def test_a_rewind_cuts_exactly_what_was_written_since(tmp_path):
    """To the byte, whatever the text; files of which there was nothing become empty, other files stay."""
    (tmp_path / "metrics.jsonl").write_text("größe\n", encoding="utf-8")
    (tmp_path / "samples.jsonl").write_text("")
    (tmp_path / "config.yaml").write_text("seed: 1")
    sizes = line_file_sizes(tmp_path)
    assert sizes == {"metrics.jsonl": 8, "samples.jsonl": 0}
    for name in (*LINE_FILES, "config.yaml"):
        with (tmp_path / name).open("a", encoding="utf-8") as file:
            file.write("später\n")
    rewind(tmp_path, sizes)
    read = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert read == {
        "metrics.jsonl": "größe\n",
        "samples.jsonl": "",
        "rollouts.jsonl": "",
        "config.yaml": "seed: 1später\n",
    }
    assert line_file_sizes(tmp_path) == {**sizes, "rollouts.jsonl": 0}


def test_a_rewind_takes_missing_and_shorter_files_as_they_are(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("short\n")
    rewind(tmp_path, {"metrics.jsonl": 100, "samples.jsonl": 10})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == "short\n"
