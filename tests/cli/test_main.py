"""The command line: which commands there are, and what comes of a wrong one."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from nemo_brain import __version__
from nemo_brain.cli.main import COMMANDS, main


def test_every_command_is_there():
    for target, meaning in COMMANDS.values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function)) and meaning


@pytest.mark.parametrize("arguments", [["--help"], ["-h"]])
def test_help_names_every_command(arguments, capsys):
    main(arguments)
    told = capsys.readouterr().out
    assert all(f"\n  {name} " in told for name in COMMANDS) and __version__ in told


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "usage: nemo-brain COMMAND"),
        (["trian"], "no command 'trian' (did you mean train?)"),
        (["x=1"], "no command 'x=1'; it has train, sft,"),
    ],
)
def test_what_is_no_command_is_an_error_that_names_those_there_are(arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert message in str(stopped.value.code)


def test_the_version_takes_no_heavy_import():
    """Megatron's checkpoint writer starts processes that import the main script."""
    code = "import sys; sys.argv[1:] = ['--version']; from nemo_brain.cli.main import main; main(); print(*sys.modules)"
    version, modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert version == __version__
    assert not {"torch", "numpy", "hydra", "nemo"} & set(modules.split())
