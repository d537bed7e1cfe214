"""The section of inference servers, ``rollout.remote``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from nemo_brain.config.schema import key


@dataclass
class RemoteConfig:
    """An inference server that samples in place of the training ranks; ``rollout.remote=null``: none."""

    url: Any = key(MISSING, "http://HOST:PORT, or a list of them: each prompt goes to the one with the least to do")
    model: str = key(MISSING, "the policy's name there")
    server: str = key("vllm", "what serves", among={"vllm": "", "sglang": "", "trtllm": ""})
    logprobs: str = key(
        "model",
        "the law whose log-probs the server gives",
        among={"model": "at temperature 1", "sampled": "of the sampled law"},
    )
    api_key_env: str | None = key(None, "the environment variable with the key that is sent; null: no key")
    concurrency: int = key(64, "requests at a time to each server, by each data-parallel replica", at_least=1)
    outputs_per_request: int = key(1, "of a prompt; more than 1: vLLM only", at_least=1)
    request_timeout_seconds: float = key(600.0, "of one attempt; ended early where /health fails", above=0)
    timeout_seconds: float = key(
        1200.0,
        "of a request with its repetitions; less than trainer.hang_timeout_minutes",
        above=0,
    )
    on_mismatch: str = key(
        "redraw",
        "an output whose log-prob there is not ours",
        among={"redraw": "asked for again", "keep": "with the server's log q'"},
    )
    transfer: str = key(
        "directory",
        "how the policy's weights get there",
        among={
            "directory": "export_to and reload; without them the server keeps its first ones",
            "process_group": "to vLLM's workers over NCCL or gloo, no file between",
        },
    )
    export_to: str | None = key(None, "a directory for each new proposal, which reload names")
    reload: list[dict[str, Any]] | None = key(
        None, "how the server loads it, step by step: {path or url: ..., method: POST, json: ...} | {command: [...]}"
    )

    @property
    def urls(self) -> list[str]:
        return self.url if isinstance(self.url, list) else [self.url]

    @property
    def follows(self) -> bool:
        """Whether the servers are given the policy's weights."""
        return self.transfer == "process_group" or self.reload is not None


def check_remote(remote: RemoteConfig, name: str) -> None:
    """ValueError: the section, of this name, is none that can be asked or given weights."""
    if not remote.urls or not all(re.fullmatch(r"https?://[^/\s?#]+[^\s?#]*", str(url)) for url in remote.urls):
        raise ValueError(f"{name}.url must be an address like http://HOST:PORT, or a list of them, not {remote.url!r}")
    if (remote.export_to is None) != (remote.reload is None):
        raise ValueError(
            f"{name}.export_to (where each new proposal is written) and {name}.reload (how the server loads it) "
            "go together: set both, or neither"
        )
    if remote.outputs_per_request > 1 and remote.server != "vllm":
        raise ValueError(
            f"{name}.outputs_per_request={remote.outputs_per_request} needs {name}.server=vllm, which draws each "
            "output of a request by a seed of its own (SGLang's deterministic mode draws all alike): set it to 1"
        )
    if remote.transfer == "process_group":
        if remote.server != "vllm":
            raise ValueError(
                f"{name}.transfer=process_group needs {name}.server=vllm, whose workers take an extension of ours: set "
                f"{name}.transfer=directory for {remote.server}"
            )
        if remote.reload is not None:
            raise ValueError(
                f"{name}.transfer=process_group needs neither {name}.export_to nor {name}.reload: leave them out, or "
                f"set {name}.transfer=directory"
            )
    for number, step in enumerate(remote.reload or ()):
        _check_reload_step(f"{name}.reload[{number}]", step)


def _check_reload_step(name: str, step: dict[str, Any]) -> None:
    kinds = step.keys() & {"path", "url", "command"}
    allowed = {"command"} if kinds == {"command"} else {*kinds, "method", "json"}
    if len(kinds) != 1 or step.keys() - allowed:
        raise ValueError(
            f"{name} must be {{path or url: ..., method: POST, json: ...}} or {{command: [...]}}, not {step}"
        )
    (kind,) = kinds
    parts = step[kind] if kind == "command" else [step[kind], step.get("method", "POST")]
    if not isinstance(parts, list) or not parts or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{name}.{kind} must be {'a list of strings' if kind == 'command' else 'text'}, not {step}")
