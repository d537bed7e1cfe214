"""A checkpoint whose files and index disagree, or whose tensors are not finite, is refused by file and tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from models import ONE, PP2, TP2, VIRTUAL_PP2, build, damaged_llama, llama, tensors_of, write_gguf
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nemo_brain.convert.command import main
from nemo_brain.convert.open import open_weights
from nemo_brain.convert.source import check_finite
from nemo_brain.convert.weight_files import INDEX, SINGLE, weight_files
from nemo_brain.data.tokenizers import byte_tokenizer
from nemo_brain.model.weights import load_weights

DOWN = "model.layers.3.mlp.down_proj.weight"  # the last stage's, in every layout


@pytest.fixture
def shards(tmp_path) -> Path:
    llama(tied=False).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    byte_tokenizer().save_pretrained(tmp_path / "shards")
    return tmp_path / "shards"


@pytest.fixture
def single(tmp_path) -> Path:
    llama(tied=False).save_pretrained(tmp_path / "single")
    byte_tokenizer().save_pretrained(tmp_path / "single")
    return tmp_path / "single"


def edit_index(directory: Path, **changes: str | None) -> None:
    """Moves tensors to other files in the index; None: out of it."""
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] |= changes
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file is not None}
    (directory / INDEX).write_text(json.dumps(index))


def edit_tensors(file: Path, **changes: torch.Tensor | None) -> None:
    """Replaces, adds or (None) removes tensors of a file."""
    tensors = {name: tensor for name, tensor in (load_file(file) | changes).items() if tensor is not None}
    save_file(tensors, file, {"format": "pt"})


def shard_of(directory: Path, name: str) -> Path:
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][name]


def test_a_single_file_comes_before_an_index_as_in_transformers_and_the_index_is_named(shards, tmp_path, recwarn):
    """As ``save_pretrained`` leaves it of a directory that was sharded before, or a copy of both."""
    assert {file.name for file in weight_files(shards).values()} >= {"model-00002-of-00007.safetensors"}
    assert not recwarn.list
    other = llama(tied=False)
    other.lm_head.weight.data.mul_(2)
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / SINGLE, shards)
    for stale in ("the index's files are there", "they are gone", "the index is no JSON"):
        with pytest.warns(UserWarning, match=rf"shards: {SINGLE} is read, .* and {INDEX}, .* is not: remove the one"):
            weights = open_weights(shards)
        assert torch.equal(weights.source.tensor("lm_head.weight"), other.lm_head.weight), stale
        loaded = AutoModelForCausalLM.from_pretrained(shards)
        assert torch.equal(loaded.lm_head.weight, other.lm_head.weight), stale
        for file in shards.glob("model-*"):
            file.unlink()
        if stale == "they are gone":
            (shards / INDEX).write_text("{")


def test_an_index_of_the_single_file_is_no_disagreement(single, recwarn):
    names = load_file(single / SINGLE)
    (single / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, SINGLE)}))
    assert weight_files(single) == dict.fromkeys(names, single / SINGLE)
    assert not recwarn.list


def test_an_index_and_files_that_disagree_are_refused_by_file_and_tensor(shards):
    file = shard_of(shards, DOWN)
    other = next(path for path in sorted(shards.glob("model-*")) if path != file)
    moved = load_file(file)[DOWN]

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match):
            open_weights(shards)

    edit_index(shards, **{DOWN: None})
    refused(rf"{file} also holds {DOWN}, which the index does not say: {INDEX} and the files do not belong")
    edit_index(shards, **{DOWN: other.name})
    refused(rf"{other} lacks {DOWN}, which the index says is there: {INDEX} and the files")
    edit_tensors(other, **{DOWN: moved})  # it is in both
    refused(rf"{file} also holds {DOWN}, which the index does not say")
    edit_tensors(file, **{DOWN: None})
    assert torch.equal(open_weights(shards).source.tensor(DOWN), moved)
    edit_index(shards, **{"model.layers.9.a.weight": file.name, "model.layers.9.b.weight": file.name})
    refused(rf"{file} lacks model\.layers\.9\.a\.weight, .* \(and 1 more\)")


@pytest.mark.parametrize("place", ["../elsewhere.safetensors", "/tmp/elsewhere.safetensors", "sub/../../x.safetensors"])
def test_an_index_names_no_files_outside_its_directory(shards, place):
    edit_index(shards, **{DOWN: place})
    with pytest.raises(ValueError, match=rf"has {DOWN} in {place}, outside the directory"):
        open_weights(shards)


def test_an_index_may_name_files_in_a_directory_within(shards):
    """transformers reads them too."""
    file = shard_of(shards, DOWN)
    expected = load_file(file)[DOWN]
    (shards / "part").mkdir()
    for name in load_file(file):
        edit_index(shards, **{name: f"part/{file.name}"})
    file.rename(shards / "part" / file.name)
    assert torch.equal(open_weights(shards).source.tensor(DOWN), expected)


def test_files_that_are_cut_off_or_mere_pointers_are_named(shards, single):
    file = shard_of(shards, DOWN)
    content = file.read_bytes()
    for length in (len(content) - 1, 100, 3, 0):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"{file} is damaged or cut off: .* \(copy it again\)"):
            open_weights(shards)
    file.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match=rf"{file} is damaged or cut off"):
        open_weights(shards)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
    (single / SINGLE).write_text(pointer)
    with pytest.raises(ValueError, match=rf"{single / SINGLE} is the pointer of Git LFS, .*git lfs pull"):
        open_weights(single)


def test_variants_and_shards_without_an_index_are_named(shards, single, tmp_path):
    (single / SINGLE).rename(single / "model.fp16.safetensors")
    with pytest.raises(
        ValueError, match=r"neither model\.safetensors nor .* but model\.fp16\.safetensors\. .*variant="
    ):
        open_weights(single)
    (shards / INDEX).unlink()
    with pytest.raises(ValueError, match=r"but model-00001-of-00007\.safetensors, .* Shards need their index"):
        open_weights(shards)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_one_value_that_is_not_finite_is_found_in_every_type(dtype):
    whole = torch.randn(7, 1000).to(dtype)
    assert check_finite(whole, "t", "key") is whole
    assert check_finite(torch.empty(0, dtype=dtype), "t", "key").numel() == 0
    for value in (torch.nan, torch.inf, -torch.inf):
        if dtype == torch.float8_e4m3fn and value != torch.nan:  # it has no infinity
            continue
        for place in (0, 3456, 6999):
            tensor = whole.double().flatten().clone()
            tensor[place] = value
            with pytest.raises(ValueError, match=r"^t is not finite: 1 of 7000 values .* with key=true\)$"):
                check_finite(tensor.to(dtype), "t", "key")
    assert check_finite(torch.full((3,), torch.nan, dtype=dtype), "t", None).numel() == 3
    largest = torch.full((9,), torch.finfo(dtype).max, dtype=torch.float64).to(dtype)
    assert check_finite(largest, "t", "key") is largest


def poisoned(file: Path) -> None:
    tensor = load_file(file)[DOWN]
    tensor.view(-1)[77] = torch.nan
    edit_tensors(file, **{DOWN: tensor})


def loaded(path: Path, layouts: list[tuple]) -> list[str]:
    """What loading says in each layout; on every rank, whichever of them reads the tensor."""
    said = []
    for layout in layouts:
        weights = open_weights(path)
        try:
            load_weights(build(weights.gpt_config, 130, layout), weights)
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("layouts", [[ONE], [TP2, PP2, VIRTUAL_PP2]], ids=["1 rank", "2 ranks"])
def test_a_tensor_that_is_not_finite_is_named_where_it_is_read(shards, layouts):
    file = shard_of(shards, DOWN)
    poisoned(file)
    expected = f"decoder.layers.3.mlp.linear_fc2.weight: {file}: {DOWN} is not finite: 1 of 6144 values are NaN or"
    ranks = run_ranks(loaded, max(tp * pp for tp, pp, _ in layouts), shards, layouts)
    for layout, *said in zip(layouts, *ranks, strict=True):
        found = [text for text in said if text]
        assert len(found) == layout[0], "the last stage's ranks have the last layer"
        assert all(text.startswith(expected) for text in found), found
        assert all(text.endswith("or take it as it is with model.allow_nonfinite=true)") for text in found)
    assert open_weights(shards, finite_unless=None).tensor("decoder.layers.3.mlp.linear_fc2.weight").isnan().any()


def test_convert_refuses_weights_that_are_not_finite_unless_allowed(tmp_path):
    source, name = damaged_llama(tmp_path / "source"), "model.embed_tokens.weight"
    with pytest.raises(ValueError, match=rf"{SINGLE}: {name} is not finite: .* with allow_nonfinite=true\)"):
        main([f"from={source}", f"to={tmp_path}/target"])
    assert not (tmp_path / "target").exists()
    main([f"from={source}", f"to={tmp_path}/target", "allow_nonfinite=true"])
    found, expected = tensors_of(tmp_path / "target"), tensors_of(source)
    assert found[name].isnan().sum() == 1
    assert all(torch.equal(found[key].nan_to_num(), expected[key].nan_to_num()) for key in expected)
    with pytest.raises(ValueError, match=r"^allow_nonfinite must be true or false, not '1'"):
        main([f"from={source}", f"to={tmp_path}/other", "allow_nonfinite=1"])


def test_a_gguf_file_with_a_tensor_that_is_not_finite_is_refused(tmp_path):
    file = write_gguf(tmp_path / "llama.gguf")
    clean = open_weights(file)
    tensor = next(t for t in clean.source._reader.tensors if t.name == "blk.3.ffn_down.weight")
    offset = int(tensor.data_offset)
    content = bytearray(file.read_bytes())
    content[offset : offset + 4] = np.float32(np.nan).tobytes()
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"llama\.gguf: blk\.3\.ffn_down\.weight is not finite: 1 of 6144 values"):
        open_weights(file).tensor("decoder.layers.3.mlp.linear_fc2.weight")
    assert open_weights(file, None).tensor("decoder.layers.3.mlp.linear_fc2.weight").isnan().sum() == 1
    file.write_bytes(content[: offset + 100])
    with pytest.raises(ValueError, match=r"llama\.gguf: not a readable GGUF file"):
        open_weights(file)
