"""``nemo-brain COMMAND ...``, which is also ``python -m nemo_brain COMMAND ...`` and what ``examples/`` call.

A command's module is imported when the command is given: Megatron's checkpoint writer starts processes that import the
main script anew, and the heavy imports are theirs to skip.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from nemo_brain import __version__

# What does it, and what it does.
COMMANDS = {
    "train": ("nemo_brain.cli.training:brain", "train a Megatron GPT with BRAIn (conf/brain.yaml)"),
    "sft": ("nemo_brain.cli.training:sft", "fine-tune it on prompts with completions (conf/sft.yaml)"),
    "reward-model": ("nemo_brain.cli.training:reward_model", "train a reward model (conf/reward_model.yaml)"),
    "evaluate": ("nemo_brain.cli.training:evaluate", "compare models on held-out prompts (conf/evaluate.yaml)"),
    "calibrate": ("nemo_brain.cli.calibrate:main", "fit gamma on preference pairs (conf/calibrate.yaml)"),
    "convert": ("nemo_brain.cli.convert:main", "write a checkpoint as a Hugging Face directory"),
    "serve-reward": ("nemo_brain.cli.serve_reward:main", "serve a reward over HTTP (conf/serve_reward.yaml)"),
    "doctor": ("nemo_brain.cli.doctor:main", "say what this installation stands on, and what will not work"),
    "estimate": ("nemo_brain.cli.estimate:main", "say which layouts fit which cards, and how long they should take"),
    "report": ("nemo_brain.cli.report:main", "write the report of a run anew"),
}


def usage() -> str:
    lines = [f"  {name:<14} {meaning}" for name, (_, meaning) in COMMANDS.items()]
    return "\n".join(
        [
            f"nemo_brain {__version__}",
            "usage: nemo-brain COMMAND [KEY=VALUE ...]",
            "       torchrun --nproc-per-node N -m nemo_brain COMMAND [KEY=VALUE ...]",
            "",
            *lines,
            "",
            "nemo-brain COMMAND --help says more.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; ``arguments`` are the process's own unless given."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given:
        sys.exit(usage())
    name, *rest = given
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(__version__)
    elif name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        sys.exit(f"error: nemo-brain has no command {name!r}{meant}; it has {', '.join(COMMANDS)}")
    else:
        sys.argv = [f"nemo-brain {name}", *rest]  # Hydra reads it
        module, _, function = COMMANDS[name][0].partition(":")
        getattr(importlib.import_module(module), function)(rest)
