"""The benchmark of a card: its parts run at toy sizes on a CPU, none takes others along, and its page says what was
measured and what was not. No time is asserted."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from benchmarks import gpu, gpu_parts, gpu_tables, page
from nemo_brain.model import attention


@pytest.mark.slow
def test_every_part_runs_at_toy_sizes_and_its_figures_are_no_targets(tmp_path):
    assert gpu.main(["--smoke", "--results", str(tmp_path)]) == 0
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert parts.keys() == gpu.PARTS.keys()
    for name, part in parts.items():
        assert part["rows"] or part["left_out"] == f"{gpu.PARTS[name].needs} is not installed"
        keys = {key for key, *_ in gpu_tables.COLUMNS[gpu_tables.table_of(name)]}
        assert all(keys - {"share"} <= row.keys() | {"longest"} for row in part["rows"]), name
    text = (tmp_path / "benchmarks_tables.md").read_text()
    assert "A smoke run" in text and "| yes |" not in text and "**no**" not in text


def _by_flex_attention() -> None:
    layout = torch.tensor([[5, 3, 9, 0], [20, 4, 1, 2], [0, 6, 2, 0]], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(heads, int(layout.sum()), 16, generator=generator) for heads in (4, 2, 2))
    mask = gpu_parts.block_mask(layout, torch.device("cpu"))
    found = gpu_parts.flex_attention(q[None], k[None], v[None], block_mask=mask, enable_gqa=True)[0]
    torch.testing.assert_close(found, attention.packed_attention(q, k, v, layout), atol=1e-5, rtol=0)


def test_flex_attentions_mask_is_a_packed_rows():
    run_ranks(_by_flex_attention, 1)  # it compiles, with threads that forked ranks would miss


def test_without_a_card_nothing_is_measured(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--results", str(tmp_path)])
    assert "torch finds no card here" in capsys.readouterr().err and not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        gpu.main(["steps"])
    assert "there is no part 'steps'" in capsys.readouterr().err


def _one_row(bench):
    yield {"case": "before"}


def _fails(bench):
    yield {"case": "before"}
    raise RuntimeError("out of memory")


def _hangs(bench):
    yield {"case": "before"}
    time.sleep(600)


def _is_slow(bench):
    for case in ("before", "after"):
        time.sleep(0.4)
        yield {"case": case}


def test_a_part_that_fails_hangs_or_is_late_keeps_its_rows_and_takes_no_other_along(tmp_path, monkeypatch):
    functions = {"fails": _fails, "hangs": _hangs, "slow": _is_slow, "after": _one_row, "elsewhere": _one_row}
    parts = {name: gpu.Part(name, 0.3, "json" if name == "elsewhere" else None) for name in functions}
    for name, function in functions.items():
        monkeypatch.setattr(gpu_parts, name, function, raising=False)
    monkeypatch.setattr(gpu, "PARTS", parts | {"absent": gpu.Part("absent", 1, "no_such_package")})
    result = {"parts": {}, "smoke": True}
    gpu.measure(list(gpu.PARTS), result, 1, time.monotonic() + 600, tmp_path / "gpu.json")
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [found[name]["rows"] for name in functions] == [[{"case": "before"}]] * len(functions)
    assert "out of memory" in found["fails"]["error"]
    assert found["hangs"]["error"] == "it took more than its share of the time"
    assert found["slow"]["left_out"] == "rows for which no time was left"
    assert found["absent"] == {"rows": [], "left_out": "no_such_package is not installed"}
    assert not {"error", "left_out"} & (found["after"].keys() | found["elsewhere"].keys())


def test_parts_for_which_no_time_is_left_are_left_out(tmp_path):
    result = {"parts": {}, "smoke": True}
    gpu.measure(["step", "nemo"], result, 1, time.monotonic() - 1, tmp_path / "gpu.json")
    assert [part["left_out"] for part in result["parts"].values()] == ["no time was left"] * 2


def _written(folder: Path, parts: dict) -> list[dict]:
    facts = {"card": "NVIDIA H100 80GB HBM3, 79 GiB, CUDA 13.0", "date": "2026-11-27", "versions": {"torch": "2.11.0"}}
    result = {"parts": {name: {"rows": rows} for name, rows in parts.items()}, "smoke": False, "facts": facts}
    (folder / "gpu.json").write_text(json.dumps(result))
    return gpu_tables.section(folder)["parts"]


def test_what_was_measured_stands_beside_its_target(tmp_path):
    one = {"median": 0.5, "low": 0.5, "high": 0.5, "repeats": 1}
    shape = {"engine": "none", "layout": "shared_prefix", "seconds": one, "ratio": one}
    steps = [
        {**shape, "shape": "8 x (400, 50, 8)", "flops": 1e14, "seconds": {**one, "median": 0.1}},
        {**shape, "shape": "64 x (400, 50, 8)", "flops": 0.46 * 989e12},
    ]
    drawn = [{"case": "ours", "rows": 256, "seconds": {**one, "median": 4e-4}}]
    targets, *tables = _written(tmp_path, {"step": steps, "drawing": drawn})
    assert "NVIDIA H100 80GB HBM3" in targets["text"] and "torch 2.11.0" in targets["text"]
    rows = {row["figure"]: (row["measured"], row["met"]) for row in targets["rows"]}
    assert rows.pop("step, 8 x (400, 50, 8), shared prefix") == ("0.100 s", "yes")
    assert rows.pop("step, 64 x (400, 50, 8): of the card's FLOP/s") == ("46%", "yes")
    assert rows.pop("shared / separate, 8 x (400, 50, 8)") == ("0.50", "**no**")
    assert rows.pop("drawing 256 rows") == ("0.40 ms", "**no**")
    assert set(rows.values()) == {("", "")}, "nothing else was measured"
    assert [table["title"] for table in tables] == ["Drawing from 128,256 tokens", "Training step"]
    assert tables[1]["rows"][1]["share"] == pytest.approx(0.46)


def test_nothing_measured_leaves_the_column_empty(tmp_path):
    page.write_page(tmp_path, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "Not measured in this version" in text and "| 88 TFLOP/s | at least 350 TFLOP/s |  |  |" in text
