"""A vLLM server of its CPU build in a process of its own, from the environment that ``make test-engines`` installs."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
WORKER = ROOT / "nemo_brain" / "sampling" / "vllm_worker"
ENVIRONMENT = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_SERVER_DEV_MODE": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(WORKER),
}
OPTIONS = "--generation-config vllm --dtype float32 --max-model-len 256 --enforce-eager --block-size 32"
OPTIONS += " --no-enable-chunked-prefill --host 127.0.0.1 --served-model-name policy"
# Steps of rollout.remote.reload.
LOAD = "{path: /collective_rpc, json: {method: nemo_brain_load, kwargs: {path: '{path}'}}}"
RESET = "{path: '/reset_prefix_cache?reset_running_requests=true'}"


class VLLM:
    """A server process; ``start`` starts another one at its address."""

    def __init__(self, python: str | Path, model: Path, log: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.log, self.url = log, f"http://127.0.0.1:{port}"
        module = [str(python), "-m", "vllm.entrypoints.openai.api_server"]
        options = [*OPTIONS.split(), "--worker-extension-cls", "nemo_brain_vllm.Weights"]
        self._command = [*module, *options, "--model", str(model), "--port", str(port)]
        self.processes: list[subprocess.Popen] = []
        self.start()

    def start(self) -> None:
        with self.log.open("a") as log:
            self.processes.append(
                subprocess.Popen(
                    self._command, env=os.environ | ENVIRONMENT, stdout=log, stderr=log, start_new_session=True
                )
            )

    def wait(self, seconds: float = 600) -> None:
        ended = time.monotonic() + seconds
        while time.monotonic() < ended:
            if self.processes[-1].poll() is not None:
                break
            with contextlib.suppress(httpx.RequestError):
                if httpx.get(f"{self.url}/health").is_success:
                    return
            time.sleep(1)
        raise RuntimeError(f"vLLM does not start: {self.log.read_text()[-3000:]}")

    def terminate(self) -> None:
        """SIGTERM, after which vLLM waits for its connections."""
        self.processes[-1].send_signal(signal.SIGTERM)

    def stop(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def version(self) -> str:
        return httpx.get(f"{self.url}/weight_info").json()["weight_version"].partition(":")[0]
