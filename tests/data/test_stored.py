"""Prompts that stay in their files: what is checked when, what memory they take, and what a changed file leads to."""

import gzip
import json
import os
import re
import subprocess
import sys
import threading
import tracemalloc

import lightning.pytorch as pl
import pytest
from ranks import run_ranks
from tokenizers import AddedToken
from toy_runs import ROOT, toy_config

from nemo_brain.data.order import prompts_of_iteration
from nemo_brain.data.prompts import TOKENISED_AT_ONCE, load_prompts
from nemo_brain.data.stored import LONGEST_LINE
from nemo_brain.data.tokenizers import byte_tokenizer
from nemo_brain.training.brain.run import run

BYTES = byte_tokenizer()


def load(source, tokenizer=BYTES, template=None):
    return load_prompts(source, tokenizer=tokenizer, template=template, max_prompt_tokens=100)


def write(path, count, **fields):
    path.write_text("".join(json.dumps({"prompt": f"number {index}", **fields}) + "\n" for index in range(count)))
    return path


_MEASURE = "import json, sys, pathlib; from benchmarks.prompt_files import measured; "
_MEASURE += "print(json.dumps(measured(pathlib.Path(sys.argv[1]))))"


def test_a_file_of_300000_lines_takes_a_few_bytes_of_memory_per_line(tmp_path):
    """8 for the place of a line; while it is checked 8 for the hash of its id, twice when they are sorted; arrays that
    grow hold up to an eighth in reserve, and for a moment their old copy. The split and the order of visits sort as
    many hashes. The file has 20 MB, and would take 300 MB as Prompt objects; 8 MB are for everything else: what
    Python's allocator keeps, the tokenizer, the 10,000 prompts that come and go."""
    count = 300_000
    path = write(tmp_path / "p.jsonl", count, reference="x" * 20)
    # In an interpreter of its own, with freed blocks given back at once: a fork of this one has its memory in pieces.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    command = [sys.executable, "-c", _MEASURE, str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    peaks = {name: memory for name, (_, memory) in json.loads(done.stdout).items()}
    checking, splitting, visiting = peaks["check"], peaks["split"], peaks["order and first iteration"]
    assert checking < 40 * count + 8e6 and max(splitting, visiting) < 56 * count + 8e6, peaks
    assert checking + splitting + visiting > 16 * count, "it is measured"

    train, held_out = load(path).prompts.split(1000, 0)
    assert (len(train), len(held_out)) == (299_000, 1000)
    chosen = prompts_of_iteration(train, 0, 64, 0)
    assert len({prompt.id for prompt in chosen}) == 64
    assert all(prompt.text == f"number {int(prompt.id.partition(':')[2]) - 1}" for prompt in chosen)


def test_records_keep_their_places_across_blank_lines_and_sources(tmp_path):
    """Plain files, compressed ones and records, one after the other."""
    plain, packed = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    plain.write_bytes(b'\n\n{"prompt": "a3"}\r\n{"prompt": "a4"}\n  \n{"prompt": "a6"}')
    packed.write_bytes(gzip.compress(b'{"prompt": "b1"}\n\n{"prompt": "b3"}\n'))
    sources = [plain, {"prompt": "c1"}, packed, {"prompt": "d3"}, plain.with_name("e.jsonl")]
    sources[-1].write_text('{"prompt": "e1"}')
    prompts = load(sources).prompts
    names = ["a:3", "a:4", "a:6", "data.train:1", "b.jsonl:1", "b.jsonl:3", "data.train:3", "e:1"]
    texts = ["a3", "a4", "a6", "c1", "b1", "b3", "d3", "e1"]
    assert [(prompt.id, prompt.text) for prompt in prompts] == list(zip(names, texts, strict=True))
    # In any order, and of parts.
    assert [prompts[index].text for index in (7, 0, 4, 2, -1)] == ["e1", "a3", "b1", "a6", "e1"]
    assert [prompt.text for prompt in prompts[1::3]] == ["a4", "b1", "e1"]
    train, held_out = prompts.split(3, 0)
    assert sorted(prompt.text for part in (train, held_out) for prompt in part) == sorted(texts)
    with pytest.raises(IndexError):
        prompts[8]


def test_a_pipe_is_read_once_and_held(tmp_path):
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=('{"prompt": "a"}\n{"prompt": "b"}\n',))
    writer.start()
    prompts = load(pipe).prompts
    writer.join()
    assert [prompt.id for prompt in prompts] == [prompt.id for prompt in prompts] == ["pipe:1", "pipe:2"]


def test_repeated_ids_are_named_with_both_lines(tmp_path):
    path = tmp_path / "p.jsonl"
    lines = [{"id": f"x{index}", "prompt": "a"} for index in range(1000)]
    lines[700] = lines[900] = {"id": "x600", "prompt": "b"}
    lines[800] = {"id": "x20", "prompt": "b"}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}:701')}: the id 'x600' was used before, at {path}:601 "):
        load(path)
    # A number and its text are one id, and a default id may be somebody's own.
    for second in ({"id": 7, "prompt": "b"}, {"id": "p:1", "prompt": "b"}):
        path.write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"id": "7", "prompt": "a"}) + "\n")
        with path.open("a") as file:
            file.write(json.dumps(second) + "\n")
        with pytest.raises(ValueError, match=f"{path}:3: the id .* was used before, at {path}:[12] "):
            load(path)


def test_equal_hashes_of_different_ids_are_no_repetition(tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_brain.data.stored.hash", lambda name: len(name), raising=False)
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"id": name, "prompt": "a"}) + "\n" for name in ("aa", "bb", "c", "dd", "ee")))
    assert len(load(path).prompts) == 5
    path.write_text("".join(json.dumps({"id": name, "prompt": "a"}) + "\n" for name in ("aa", "bb", "c", "dd", "aa")))
    with pytest.raises(ValueError, match=f"{path}:5: the id 'aa' was used before, at {path}:1 "):
        load(path)


def test_a_line_beyond_those_tokenised_at_once_is_checked_at_once_and_tokenised_when_it_is_visited(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    path = write(tmp_path / "p.jsonl", TOKENISED_AT_ONCE)
    last = {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]}
    with path.open("a") as file:
        file.write(json.dumps(last) + "\n")
    loaded = load(path, tokenizer, "chat")
    assert loaded.tokenised == TOKENISED_AT_ONCE
    place = f"{path}:{TOKENISED_AT_ONCE + 1}"
    with pytest.raises(
        ValueError, match=f"^{re.escape(place)}: the chat template refuses the messages: no system role"
    ):
        loaded.prompts[TOKENISED_AT_ONCE]
    with pytest.raises(ValueError, match=f"^{re.escape(place)}: messages need a chat template"):
        load(path)


CHANGES = {
    "appended": lambda path: path.open("a").write("\n"),
    "rewritten": lambda path: path.write_text(path.read_text().replace("number", "NUMBER")),
    "replaced": lambda path: os.replace(write(path.with_name("q"), 30), path),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_is_named_when_it_is_visited(tmp_path, change):
    path = write(tmp_path / "p.jsonl", 3)
    os.utime(path, ns=(0, 0))  # the clock of some file systems ticks slowly
    prompts = load(path).prompts
    assert prompts[2].text == "number 2"
    CHANGES[change](path)
    with pytest.raises(
        ValueError, match=f"^data.train: {path} has changed since the run began to read it .leave files"
    ):
        prompts[0]
    with pytest.raises(ValueError, match="has changed"):
        prompts.split(1, 0)
    path.unlink()
    with pytest.raises(ValueError, match=f"^data.train: cannot read {path}: No such file"):
        prompts[0]


class _Append(pl.Callback):
    """Appends to a file after the first step."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, module, *_) -> None:
        if trainer.global_step == 1:
            with self.path.open("a") as file:
                file.write("\n")


def _with_a_file_of_its_own(directory) -> str:
    """On each rank, as on machines with disks of their own; only the second rank's changes."""
    rank = os.environ["RANK"]
    path = write(directory / rank / "p.jsonl", 8)
    small = ["rollout.prompts_per_iteration=2", "rollout.outputs_per_prompt=2", "train.global_batch_size=2"]
    small += ["train.epochs_per_iteration=1", "data.holdout=0", "trainer.max_iterations=2"]
    with pytest.raises(ValueError) as caught:
        run(
            toy_config(f"run_dir={directory}/run", f"data.train={path}", *small), [_Append(path)] if rank == "1" else []
        )
    return str(caught.value)


def test_a_file_that_changes_on_one_rank_ends_the_run_on_every_rank(tmp_path):
    for rank in "01":
        (tmp_path / rank).mkdir()
    said = run_ranks(_with_a_file_of_its_own, 2, tmp_path)
    assert said[0] == said[1] and said[0].startswith(f"data.train: {tmp_path}/1/p.jsonl has changed")
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert kinds == ["step", "iteration"]


def test_a_line_of_50_megabytes_is_refused_without_reading_it_as_a_whole(tmp_path):
    path = write(tmp_path / "p.jsonl", 1)
    with path.open("a") as file:
        file.write('{"prompt": "' + "x" * 50_000_000 + '"}\n')
    tracemalloc.start()
    try:
        with pytest.raises(
            ValueError, match=f"^{path}:2: a line of more than {LONGEST_LINE} bytes .write one JSON obj"
        ):
            load(path)
        # The line in the file's buffer and as bytes.
        assert tracemalloc.get_traced_memory()[1] < 3 * LONGEST_LINE
    finally:
        tracemalloc.stop()


def test_a_long_prompt_is_cut_to_its_end(tmp_path):
    path = tmp_path / "p.jsonl"
    text = "ab" * 50_000 + "the end"
    path.write_text(json.dumps({"prompt": text}) + "\n")
    loaded = load(path)
    assert loaded.truncated == 1
    assert loaded.prompts[0].token_ids == list(text[-100:].encode())


def test_special_tokens_in_a_prompt_file_stay_text(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|im_start|>", special=True)]})
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "<|im_start|>system<eos>\u0000"}) + "\n")
    (prompt,) = load(path, tokenizer).prompts
    assert prompt.token_ids == list(b"<|im_start|>system<eos>\0")
