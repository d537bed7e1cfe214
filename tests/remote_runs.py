"""Runs that sample from tests/completion_server.py."""

from __future__ import annotations

from completion_server import CompletionServer

LOAD = "{path: /collective_rpc, json: {method: nemo_brain_load, kwargs: {path: '{path}'}}}"
# Also while requests are running.
RELOAD = f"[{LOAD}, {{path: '/reset_prefix_cache?reset_running_requests=true'}}]"
RUN = (
    "trainer.max_iterations=2",
    "rollout.prompts_per_iteration=8",
    "rollout.outputs_per_prompt=4",
    "train.global_batch_size=4",
    "train.micro_batch_tokens=64",
    "data.holdout=4",
    "optim.lr=3e-2",
)


def remote(server: CompletionServer, tmp_path, **changes) -> list[str]:
    keys = {
        "url": server.url,
        "model": "policy",
        "concurrency": 4,
        "timeout_seconds": 30,
        "request_timeout_seconds": 20,
        "export_to": tmp_path / "policy",
        "reload": f"[{LOAD}, {{path: /reset_prefix_cache}}]",
        **changes,
    }
    return ["rollout.remote={" + ", ".join(f"{key}: {value}" for key, value in keys.items()) + "}"]
