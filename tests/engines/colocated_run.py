"""A training with ``rollout.engine=colocated`` and a real vLLM, on the CPU. In vLLM's environment:

    torchrun colocated_run.py PACKAGES CONFIG OVERRIDES...

PACKAGES: site-packages of the training's environment, for what vLLM's lacks; CONFIG: a file of conf/.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

packages, config, *overrides = sys.argv[1:]
sys.path.append(packages)  # after vLLM's own
sys.path.append(str(Path(__file__).resolve().parents[1]))

from nemo_brain.host import cpu  # noqa: E402

cpu.enable()

from nemo.collections.llm.gpt.model.megatron.hyena import hyena_mixer  # noqa: E402
from toy_runs import QUIET, composed  # noqa: E402

from nemo_brain.training.brain.run import run  # noqa: E402

# On a CPU vLLM looks at everything that modules hold. Where Transformer Engine is missing, this raises when looked at.
vars(hyena_mixer).pop("te", None)
logging.disable(logging.WARNING)
# Megatron-core 0.15 saves with numpy 1 alone.
run(composed(config, *QUIET, "checkpoint.at_end=false", *overrides))
