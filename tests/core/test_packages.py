"""Files inside installed packages."""

from __future__ import annotations

from pathlib import Path

import pytest

import nemo_brain
from nemo_brain.core.packages import package_file
from nemo_brain.data.records import read_records

INSTALLED = Path(nemo_brain.__file__).parent


def test_a_file_of_a_package_is_found_wherever_one_is():
    assert package_file("package:nemo_brain/data/prompts.jsonl") == INSTALLED / "data" / "prompts.jsonl"


def test_records_of_it_are_read_and_named_by_file_and_line():
    first = next(read_records("package:nemo_brain/data/prompts.jsonl", "data.train"))
    assert first.where == f"{INSTALLED}/data/prompts.jsonl:1" and first.default_id == "prompts:1"


@pytest.mark.parametrize(
    "path, message",
    [
        ("package:no_such/x.jsonl", r"data\.train: package:no_such: no Python package 'no_such' is installed"),
        ("package:nemo_brain", "the package nemo_brain has no file ''"),
        ("package:nemo_brain/data", "the package nemo_brain has no file 'data'"),
        ("package:../x", "no Python package '..' is installed"),
        ("package:nemo_brain/data/none.jsonl", r"has no file 'data/none\.jsonl' \(give package:NAME/PATH\)"),
    ],
)
def test_what_is_not_there_is_refused_by_name(path, message):
    with pytest.raises(ValueError, match=message):
        list(read_records(path, "data.train"))
