"""Writes the data of examples/pipeline.sh, from the package descriptions on this machine: nothing is downloaded.

    python examples/pipeline_data.py DIRECTORY COUNT

What people wrote as a synopsis of a package is to be imitated (demonstrations.jsonl), and preferred (preferences.jsonl)
to the synopsis of another package or to the beginning of the package's own description. COUNT: of the training prompts,
half of which become demonstrations and half preferences; an eighth as many are held out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(directory: str, count: int) -> None:
    from nemo_brain.data.package_synopses import package_synopses

    train, held_out = package_synopses("train", count), package_synopses("validation", count // 8)
    half = len(train) // 2
    for name, records in {
        "demonstrations": [{"prompt": r["prompt"], "completion": r["reference"]} for r in train[:half]],
        "preferences": _pairs(train[half:]),
        "prompts": [{"prompt": r["prompt"], "reference": r["reference"]} for r in train],
        "held_out": [{"prompt": r["prompt"], "reference": r["reference"]} for r in held_out],
    }.items():
        path = Path(directory, f"{name}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        print(f"{path}: {len(records)} lines")


def _pairs(records: list[dict]) -> list[dict]:
    pairs = []
    for index, record in enumerate(records):
        beginning = " ".join(record["description"].split()[:10])
        rejected = beginning if index % 2 else records[index - 1]["reference"]
        if rejected != record["reference"]:
            pairs.append({"prompt": record["prompt"], "chosen": record["reference"], "rejected": rejected})
    return pairs


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
