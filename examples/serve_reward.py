"""Serves a reward over HTTP.

    python examples/serve_reward.py reward.model=/path/to/reward_model                      # conf/serve_reward.yaml
    python examples/serve_reward.py reward._target_=nemo_brain.rewards.function.FunctionReward \
        reward.model=null +reward.function=my_reward.py:short +reward.words=8
"""

from __future__ import annotations

import sys
import traceback

import hydra


@hydra.main(version_base="1.3", config_path="../conf", config_name="serve_reward")
def main(cfg) -> None:
    from nemo_brain.rewards.server import serve

    try:
        serve(cfg)
    except ValueError as error:
        # Ours name the key and the remedy, and need no traceback. Those of libraries keep theirs.
        *_, last = traceback.walk_tb(error.__traceback__)
        if not last[0].f_globals["__name__"].startswith("nemo_brain."):
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("stopped by Ctrl-C before it served", file=sys.stderr)
        sys.exit(130)
