"""The configuration of the reward server: what ``conf/serve_reward.yaml`` explains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from nemo_brain.config.checks import given_arguments
from nemo_brain.config.schema import key, parse


@dataclass
class ServeConfig:
    host: str = key("127.0.0.1", "0.0.0.0: every interface; then set api_key_env")
    port: int = key(8100, "0: any free one, which the log names", at_least=0, at_most=65535)
    api_key_env: str | None = key(None, "the environment variable with the key that clients send; null: no key")
    max_request_bytes: int = key(16777216, "larger requests are answered 413", at_least=1)
    max_batch: int = key(
        64,
        "items of a call of the reward that serves several requests; 1: every request its own",
        at_least=1,
    )
    batch_wait_seconds: float = key(0.005, "how long a call waits for more requests", at_least=0, below=60)
    reward: dict[str, Any] | None = key(None, "as in a run; null arguments are left out")


def check_serve(cfg: DictConfig) -> ServeConfig:
    """Validates a configuration; ValueError names the key, what is wrong with it and the remedy."""
    config = parse(ServeConfig, cfg, "conf/serve_reward.yaml")
    config.reward = given_arguments(config.reward)
    return config
