"""Serves a reward over HTTP.

    python examples/serve_reward.py reward.model=/path/to/reward_model                      # conf/serve_reward.yaml
    python examples/serve_reward.py reward._target_=nemo_brain.rewards.function.FunctionReward \
        reward.model=null +reward.function=my_reward.py:short +reward.words=8

The same as ``nemo-brain serve-reward``.
"""

import sys

from nemo_brain.cli.main import main

if __name__ == "__main__":
    main(["serve-reward", *sys.argv[1:]])
