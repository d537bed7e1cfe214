"""Code that a page shows is code that works: blocks are run, composed or parsed, or say why not."""

from __future__ import annotations

import importlib.util
import inspect
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from doc_blocks import Block, blocks, commands, pages
from hydra.utils import get_object
from omegaconf import OmegaConf
from toy_runs import ROOT, composed

from nemo_brain.cli.estimate import estimate
from nemo_brain.cli.main import COMMANDS
from nemo_brain.config.brain import Config, check
from nemo_brain.config.calibrate import check_calibration
from nemo_brain.config.evaluate import check_evaluation
from nemo_brain.config.reward_model import check_reward_config
from nemo_brain.config.serve_reward import check_serve
from nemo_brain.config.sft import check_sft_config

# The commands that read a configuration, its file and what checks it.
CONFIGURED = {
    "train": ("brain", check),
    "sft": ("sft", check_sft_config),
    "reward-model": ("reward_model", check_reward_config),
    "evaluate": ("evaluate", check_evaluation),
    "calibrate": ("calibrate", check_calibration),
    "serve-reward": ("serve_reward", check_serve),
}
RUN_ELSEWHERE = {ROOT / "docs" / "tutorial.md"}  # whole, by test_tutorial.py
ALL = [block for page in pages() if page not in RUN_ELSEWHERE for block in blocks(page)]


def of(*languages: str) -> pytest.MarkDecorator:
    found = [block for block in ALL if block.language in languages and not block.not_run]
    assert found
    return pytest.mark.parametrize("block", found, ids=lambda block: block.place)


@of("json")
def test_json_can_be_read(block):
    for line in block.text.splitlines():
        json.loads(line)


@of("yaml")
def test_sections_of_a_configuration_have_its_keys(block):
    read_section(block)


@of("bash")
def test_commands_exist_and_their_overrides_fit_the_configuration(block):
    for command in commands(block.text):
        read_command(command)


@of("python")
def test_python_runs(block, tmp_path, monkeypatch):
    shutil.copy(ROOT / "examples" / "data" / "rollouts.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, block.place, "exec"), {"__name__": "block"})


def read_section(block: Block) -> None:
    """A mapping; one of whole sections also as a part of conf/brain.yaml."""
    given = yaml.safe_load(block.text)
    assert isinstance(given, dict), block.place
    if given.keys() <= vars(Config)["__dataclass_fields__"].keys():
        config = composed("brain")
        OmegaConf.set_struct(config, False)  # before a class's own key the command line asks for a +, a file does not
        check(OmegaConf.merge(config, given))
        if target := given.get("reward", {}).get("_target_"):
            arguments = {k: v for k, v in given["reward"].items() if k != "_target_" and v is not None}
            inspect.signature(get_object(target)).bind(**arguments)


def read_command(words: Sequence[str]) -> None:
    """AssertionError, or Hydra's or the configuration's error: there is no such command, or its arguments are wrong."""
    program, *rest = words
    program = Path(program).name
    if program == "torchrun":
        start = rest.index("-m")
        assert rest[start + 1] == "nemo_brain", words
        program, rest = "nemo-brain", rest[start + 2 :]
    if program == "nemo-brain":
        read_arguments(*rest)
    elif program == "make":
        assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in rest if "=" not in target), words
    elif program == "python" and rest[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in rest if word.startswith("tests/")), words
    elif program == "python" and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]) is not None, words
    else:
        script = rest[0] if program == "python" else words[0]
        assert (ROOT / script).is_file(), f"{script}: nothing in the repository; say <!-- not run: ... --> before it"


def read_arguments(command: str, *arguments: str) -> None:
    assert command in COMMANDS, command
    if command == "estimate":
        estimate(["model=llama-8b" if word.startswith("model=/") else word for word in arguments])
    if command not in CONFIGURED:
        return
    name, check_configuration = CONFIGURED[command]
    given = list(arguments)
    if "--config-name" in given:
        place = given.index("--config-name")
        _, name = given.pop(place), given.pop(place)
    check_configuration(composed(name, *(word for word in given if word != "--help")))


@pytest.mark.parametrize(
    "script, message",
    [
        ("nemo-brain train rollout.output_per_prompt=4", "output_per_prompt"),
        ("torchrun --nproc-per-node 2 -m nemo_brain sft data.train=a.jsonl train.micro_batch_tokens=0", "at least 1"),
        ("nemo-brain trian", "trian"),
        ("make tset", "tset"),
        ("pip install something", "not run"),
    ],
)
def test_a_wrong_command_is_found(script, message):
    (words,) = commands(script)
    with pytest.raises(Exception, match=message):
        read_command(words)


def test_a_wrong_section_is_found():
    with pytest.raises(ValueError, match=r"unknown configuration key rollout\.remote\.urll"):
        read_section(Block("here", "yaml", "rollout: {remote: {urll: x}}\n", None))
    with pytest.raises(TypeError, match="modle"):
        target = "{_target_: nemo_brain.rewards.huggingface.HuggingFaceReward, function: null, model: x, modle: x}"
        read_section(Block("here", "yaml", f"reward: {target}\n", None))


@pytest.mark.parametrize(
    "text, message",
    [
        ("Say\n\n    make test\n", "page.md:3: an indented block"),
        ("```\nmake test\n```\n", "page.md:1: a block of ''"),
        ("```sh\nmake test\n```\n", "page.md:1: a block of 'sh'"),
    ],
)
def test_a_block_without_a_language_is_found(text, message, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=message):
        list(blocks(page))


def test_a_block_that_is_not_run_says_why(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("1. First:\n\n    <!-- not run: needs Docker -->\n    ```bash\n    docker run x\n    ```\n")
    (block,) = blocks(page)
    assert (block.text, block.not_run) == ("docker run x\n", "needs Docker")
