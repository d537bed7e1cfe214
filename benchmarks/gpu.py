"""Measures one card in some four minutes and writes the results as they come: benchmarks/results/gpu.json, the page.

python benchmarks/gpu.py                    # one card, every part that is installed
python benchmarks/gpu.py step sampling      # these parts alone; the others' results stay
python benchmarks/gpu.py --smoke            # toy sizes, on a CPU, into build/smoke: does it run?

Parts run in child processes, which import NeMo and touch the card; this one does neither, so that they can be forks. A
part that fails or takes more than its share of the time is ended, and the rest goes on in another child.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STARTING = 180.0  # seconds that a child may take before its first part: imports
SLACK = 20  # toy sizes run on machines that are busy with other things
_TRANSFORMER_ENGINE = "transformer_engine"


@dataclass(frozen=True)
class Part:
    """``function``: of gpu_parts. ``seconds``: its share, what it needs at first included (a model, kernels to be
    compiled). ``needs``: a package without which it is left out; without Transformer Engine in ``needs`` it is hidden,
    where it is installed."""

    function: str
    seconds: float
    needs: str | None = None


PARTS = {
    "output layer": Part("output_layer", 15),
    "attention": Part("attention_of_a_layer", 15),
    "drawing": Part("drawing", 10),
    "step": Part("step", 45),
    "nemo": Part("nemo", 15),
    "launches": Part("launches", 15),
    "sampling": Part("sampled", 45),
    "step, Transformer Engine": Part("step", 30, _TRANSFORMER_ENGINE),
    "nemo, Transformer Engine": Part("nemo", 10, _TRANSFORMER_ENGINE),
    "launches, Transformer Engine": Part("launches", 10, _TRANSFORMER_ENGINE),
    "attention, FlexAttention": Part("flex_attention_of_a_layer", 20),
    "vllm": Part("vllm", 90, "vllm"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(map(repr, PARTS))}; none: all")
    parser.add_argument(
        "--seconds", type=float, help="in all, after which parts are left out (240; where vLLM is installed 330)"
    )
    parser.add_argument("--smoke", action="store_true", help="toy sizes, on a CPU too")
    parser.add_argument("--results", type=Path, help="for results and page (benchmarks/results and docs; build/smoke)")
    options = parser.parse_args(arguments)
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join(map(repr, PARTS))}")
    from benchmarks import common
    from benchmarks.page import places, write_page

    facts = common.fresh(common.facts)
    if facts["card"] is None and not options.smoke:
        parser.error("torch finds no card here: --smoke tries the parts on a CPU")
    results, page = places(options.results, options.smoke)
    results.mkdir(parents=True, exist_ok=True)
    file = results / "gpu.json"
    result = json.loads(file.read_text(encoding="utf-8")) if options.parts and file.exists() else {"parts": {}}
    result |= {"facts": facts, "smoke": options.smoke}
    waiting = [part for part in PARTS if part in options.parts or not options.parts]
    slack = SLACK if options.smoke else 1
    seconds = options.seconds or 240 + 90 * (importlib.util.find_spec("vllm") is not None)
    measure(waiting, result, slack, time.monotonic() + slack * seconds, file)
    write_page(results, page)
    return 1 if any("error" in result["parts"][part] for part in waiting) else 0


def measure(waiting: list[str], result: dict, slack: float, end: float, file: Path) -> None:
    """Measures the parts into ``result["parts"]`` until ``end`` (of the monotonic clock), and keeps ``file`` up to
    date. ``slack``: what the parts' shares are multiplied with."""
    while waiting:
        name = waiting[0]
        needs = PARTS[name].needs
        if needs is not None and importlib.util.find_spec(needs) is None:
            result["parts"][name] = {"rows": [], "left_out": f"{needs} is not installed"}
            del waiting[0]
        elif time.monotonic() > end:
            result["parts"][name] = {"rows": [], "left_out": "no time was left"}
            del waiting[0]
        else:
            _, alike = next(itertools.groupby(waiting, key=lambda part: PARTS[part].needs))
            done = _child_measures(list(alike), result, slack, end, file)
            waiting = [part for part in waiting if part not in done]
        _write(file, result)


def _child_measures(parts: list[str], result: dict, slack: float, end: float, file: Path) -> list[str]:
    """One child measures as many of the parts as it can. Returns those that need not be tried again."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, parts, result["smoke"], slack, end))
    process.start()
    theirs.close()
    done: list[str] = []
    limit = time.monotonic() + STARTING
    try:
        for name in parts:
            part = result["parts"][name] = {"rows": []}
            started = time.monotonic()
            while True:
                try:
                    in_time = ours.poll(max(0.0, limit - time.monotonic()))
                    kind, content = ours.recv() if in_time else ("error", "it took more than its share of the time")
                except EOFError:
                    kind, content = "error", "the process was killed"
                if kind == "started":
                    started = time.monotonic()
                    # Between two rows a part looks at the time itself.
                    limit = started + 2 * slack * PARTS[name].seconds
                elif kind == "row":
                    part["rows"].append(content)
                    _write(file, result)
                else:
                    break
            done.append(name)
            part["seconds"] = round(time.monotonic() - started, 1)
            if kind in ("error", "left_out"):
                part[kind] = content
            print(f"{name}: {part['seconds']} s, {len(part['rows'])} rows {part.get('error', '')}", flush=True)
            if "error" in part:  # the card may be in no state to go on
                break
    finally:
        process.kill()
        process.join()
    return done


def _child(pipe: Connection, parts: list[str], smoke: bool, slack: float, end: float) -> None:
    os.environ |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(20_000 + os.getpid() % 10_000)
    try:
        if PARTS[parts[0]].needs != _TRANSFORMER_ENGINE:
            sys.modules[_TRANSFORMER_ENGINE] = None  # type: ignore[assignment]  # who imports it, finds none
        from benchmarks.run import prepare

        prepare()
        from benchmarks import gpu_parts

        bench = gpu_parts.Bench(gpu_parts.TOY if smoke else gpu_parts.CARD)
        for name in parts:
            pipe.send(("started", None))
            part = PARTS[name]
            bench.seconds = min(slack * part.seconds, end - time.monotonic())
            limit = time.monotonic() + bench.seconds
            if bench.seconds < 0:
                pipe.send(("left_out", "no time was left"))
                continue
            late = None
            for row in getattr(gpu_parts, part.function)(bench):
                pipe.send(("row", row))
                if late := time.monotonic() > limit:
                    break
            pipe.send(("left_out", "rows for which no time was left") if late else ("done", None))
    except BaseException:
        pipe.send(("error", traceback.format_exc()[-2000:]))
    pipe.close()
    os._exit(0)


def _write(file: Path, result: dict) -> None:
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
