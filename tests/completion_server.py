"""An inference server for tests: a transformers model behind /v1/completions, as vLLM, SGLang or TensorRT-LLM answers.

It samples for real, request by request, from the seed that comes with the request. What vLLM 0.32 does that one would
not expect, it does too: it keeps what it has computed of a prefix until /reset_prefix_cache, also after new weights
have been loaded; reload_weights leaves a tied output layer as it was; a reload of a directory that it does not see
destroys the model, though /health says nothing of it, and the next request ends it; a module that is given some of
its weights loses the others; started again it has its first weights; new weights come to outputs that are being drawn
between two tokens, and while there are any, prefixes are only forgotten if these are reset too; it ignores fields that
it does not know; told to end, it no longer listens, and requests in flight hang. Its worker takes weights by the
extension that a real one has.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace

import torch
from listener import Listener
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from nemo_brain.data.tokenizers import byte_tokenizer
from nemo_brain.sampling.vllm_worker.nemo_brain_vllm import Weights

TOKENIZER = byte_tokenizer()
END, VOCAB = TOKENIZER.eos_token_id, len(TOKENIZER)
TINY = 5  # tokens of a vocabulary whose every output can be counted
COMMON = {"model", "prompt", "n", "max_tokens", "min_tokens", "seed", "temperature", "top_k", "top_p", "min_p"}
COMMON |= {"repetition_penalty", "presence_penalty", "frequency_penalty", "stop", "stop_token_ids", "ignore_eos"}
COMMON |= {"include_stop_str_in_output", "add_special_tokens", "skip_special_tokens", "logprobs", "echo", "stream"}
_LOADING = threading.Lock()  # transformers builds models in a state that all threads share
NEUTRAL = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "top_p": 1.0}


def save_model(path: Path, vocab_size: int, end: int, seed: int = 0, tied: bool = False) -> Path:
    """A random Llama; among many tokens the end token is made likely enough to be drawn."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=end,
        bos_token_id=None,
        initializer_range=0.5,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    if vocab_size > TINY and not tied:
        model.lm_head.weight.data[end] *= 2.5
    model.save_pretrained(path)
    return path


class CompletionServer:
    """Serves on a free port of this machine while its context lasts.

    kind: ``vllm``, ``old vllm`` (ids in logprobs only), ``sglang`` or ``trtllm`` (refuses fields it does not know).
    key: requests without it are answered 401. processed: log-probs are the sampled law's, not the model's.
    fault: called with the number of the attempt at a request and its body; returns what to do wrong, or None.
    """

    def __init__(
        self, directory: Path, kind="vllm", key="", processed=False, fault: Callable = lambda attempt, body: None
    ):
        self.kind, self.key, self.processed, self.fault = kind, key, processed, fault
        self.bodies: list[dict] = []
        self.names = ["policy"]
        self.context = 1000
        self.versions = kind in ("vllm", "sglang")  # whether it can say which weights it has
        self.silent = False  # it answers who asks for them by HTTP 503
        self.before: Callable[[dict], None] = lambda body: None  # called before a request is looked at
        self.answered = 0
        self.loads: list[Path] = []
        self.received: list[dict[str, int]] = []  # of each transfer, the bytes of each tensor
        self.during: Callable[[str], None] = lambda name: None  # called for each tensor that arrives
        self.engines = 1
        self.named: dict[str, LlamaForCausalLM] = {}  # the weights that it was told a version of
        self.running = 0
        self._left = threading.Event()
        self._connections: list[socket.socket] = []
        self._handlers: list[threading.Thread] = []
        self._first = directory
        self._port = 0
        self._attempts: Counter = Counter()
        self._lock = threading.Lock()
        self._start()

    def _start(self) -> None:
        """With its first weights, nothing kept of earlier ones."""
        self.version = "default"
        self.ended = threading.Event()
        self._cache: dict[tuple, torch.Tensor] = {}
        self.load(self._first)

    def load(self, directory: Path) -> None:
        with _LOADING:
            self.model = AutoModelForCausalLM.from_pretrained(directory).eval()
        self.end = self.model.config.eos_token_id

    def reload(self, path: Path, method: str) -> str:
        """Carries out a worker's method; returns what is wrong."""
        with self._lock:
            seen = path.is_dir()
            if method == "nemo_brain_load" and not seen:
                return f"this server sees no safetensors files in {path}"
            if not seen:
                self.model = None
                return f"Repo id must be in the form 'repo_name' or 'namespace/repo_name': '{path}'"
            head = None if self.model is None else self.model.get_output_embeddings().weight.detach().clone()
            self.loads.append(path)
            self.load(path)
            if method == "reload_weights" and self.model.config.tie_word_embeddings:
                self.model.get_output_embeddings().weight = torch.nn.Parameter(head)
        return ""

    def call(self, method: str, arguments: dict) -> tuple[int, dict]:
        """A worker's method, called by name: status and answer."""
        try:
            with self._lock if method == "nemo_brain_receive" else contextlib.nullcontext():
                result = getattr(_Worker(self), method)(**arguments)
        except Exception as error:
            return 500, {"error": {"message": f"{type(error).__name__}: {error}", "code": 500}}
        return 200, {"results": [result]}

    def __enter__(self) -> CompletionServer:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or each answer waits 40 ms for the acknowledgement of its headers

            def setup(self):
                super().setup()
                outer._connections.append(self.connection)
                outer._handlers.append(threading.current_thread())

            def do_GET(self):
                outer.get(self)

            def do_POST(self):
                outer.post(self)

            def log_message(self, *args):
                pass

        class Quiet(Listener):
            def handle_error(self, *args):
                pass  # the other end has gone

        self.http = Quiet(("127.0.0.1", self._port), Handler)
        self._port = self.http.server_port
        self.url = f"http://127.0.0.1:{self._port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        """Nothing of it runs on: a thread that is within torch when the process ends would abort it."""
        self._left.set()
        self.kill()
        for handler in self._handlers:
            handler.join(10)

    def terminate(self) -> None:
        """As after SIGTERM: new connections are refused, requests in flight get no answer."""
        self.ended.set()
        self.http.shutdown()
        self.http.server_close()

    def kill(self) -> None:
        """As after SIGKILL: besides, all connections end."""
        self.terminate()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def restart(self) -> None:
        """At the same address, after one of these."""
        self._start()
        self.__enter__()

    def replace(self) -> None:
        """Another one, just started, stands behind its address, as of a proxy: no connection ends."""
        self._start()

    def place(self, body: dict) -> int:
        """Which of all requests it is, from 1: others may have come since."""
        return 1 + next(i for i, other in enumerate(self.bodies) if other is body)

    def get(self, handler) -> None:
        models = [{"id": name, "object": "model", "max_model_len": self.context} for name in self.names]
        if self.ended.is_set():
            handler.close_connection = True
        elif handler.path == "/v1/models":
            _send(handler, 200, {"object": "list", "data": models})
        elif handler.path == "/health":
            _send(handler, 200, b"")
        elif handler.path == "/weight_info" and self.silent:
            _send(handler, 503, {})
        elif handler.path == {"vllm": "/weight_info", "sglang": "/model_info"}.get(self.kind) and self.versions:
            _send(handler, 200, {"weight_version": self.version})
        else:
            _send(handler, 404, {"detail": "Not Found"})

    def post(self, handler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])) or "null")
        if self.key and handler.headers.get("authorization") != f"Bearer {self.key}":
            _send(handler, 401, {"error": "Unauthorized", "got": handler.headers.get("authorization")})
        elif handler.path == "/v1/completions":
            self._complete(handler, body)
        elif handler.path == "/collective_rpc" and body["method"] in ("reload_weights", "nemo_brain_load"):
            (path,) = body["kwargs"].values()
            problem = self.reload(Path(path), body["method"])
            _send(handler, 500, {"error": {"message": problem}}) if problem else _send(
                handler, 200, {"results": [None]}
            )
        elif handler.path == "/collective_rpc":
            _send(handler, *self.call(body["method"], body["kwargs"]))
        elif handler.path == "/update_weight_version" and self.versions:
            assert self.kind == "vllm" or not body["abort_all_requests"], "SGLang ends all running requests otherwise"
            self.version = body["new_version"]
            self.named[self.version] = self.model
            _send(handler, 200, {"success": True, "new_version": self.version})
        elif handler.path.startswith("/reset_prefix_cache"):
            with self._lock:
                success = not self.running or handler.path.endswith("?reset_running_requests=true")
                if success:
                    self._cache.clear()
            _send(handler, 200, {"success": success})
        elif handler.path == "/update_weights_from_disk":
            problem = self.reload(Path(body["model_path"]), "nemo_brain_load")
            with self._lock:
                self._cache.clear()
            _send(handler, 400 if problem else 200, {"success": not problem, "message": problem})
        else:
            _send(handler, 404, {"detail": "Not Found"})

    def _complete(self, handler, body: dict) -> None:
        with self._lock:
            self.bodies.append(body)
            self._attempts[body["seed"]] += 1
            attempt = self._attempts[body["seed"]]
        self.before(body)
        if self.model is None:
            self.kill()
        if self.ended.is_set():
            self._left.wait(30)  # nobody answers any more
            handler.close_connection = True
            return
        fault = self.fault(attempt, body)
        if fault == "drop":
            handler.connection.close()
            handler.close_connection = True
        elif fault == "hang":
            self._left.wait(2)
            handler.close_connection = True
        elif isinstance(fault, int):
            echoed = f"fault with {handler.headers.get('authorization')}"
            _send(handler, fault, {"error": echoed}, {"Retry-After": "0"} if fault == 429 else {})
        elif fault == "no JSON":
            _send(handler, 200, b'{"choices": [')
        else:
            problem = self._refusal(body)
            if problem:
                _send(handler, 400, {"object": "error", "message": problem})
                return
            with self._lock:
                self.running += 1
            try:
                answer = self._answer(body)
            finally:
                with self._lock:
                    self.running -= 1
            if callable(fault):
                fault(answer)
            _send(handler, 200, answer)
            with self._lock:
                self.answered += 1

    def _refusal(self, body: dict) -> str:
        known = COMMON | {
            "trtllm": {"detokenize"},
            "sglang": {"return_token_ids"},
        }.get(self.kind, {"return_token_ids", "return_tokens_as_token_ids"})
        if (unknown := body.keys() - known) and self.kind == "trtllm":
            return f"Extra inputs are not permitted: {unknown}"
        if missing := COMMON - body.keys():
            return f"a default of mine would apply to {missing}"
        if body["model"] != "policy":
            return "no such model"
        if body["top_k"] != (0 if self.kind == "trtllm" else -1) or any(body[k] != v for k, v in NEUTRAL.items()):
            return "truncated sampling"
        return ""

    def _answer(self, body: dict) -> dict:
        """Samples. Of several outputs each has a seed of its own, except by SGLang."""
        seeds = [body["seed"] + (0 if self.kind == "sglang" else i) for i in range(body["n"])]
        choices = [{**self._choice(body, seed), "index": i} for i, seed in enumerate(seeds)]
        return {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": choices}

    def _choice(self, body: dict, seed: int) -> dict:
        """The end token is in the ids and log-probs."""
        ids, logprobs, reason = draw(self._logits, body, seed, self.end, self.processed)
        as_ids = self.kind in ("vllm", "old vllm") and body["return_tokens_as_token_ids"]
        tokens = [f"token_id:{token}" if as_ids else f"<{token}>" for token in ids]
        choice = {
            "text": "not to be used",
            "logprobs": {"token_logprobs": logprobs, "tokens": tokens, "top_logprobs": [], "text_offset": []},
            "finish_reason": reason,
            "stop_reason": None,
        }
        if self.kind == "trtllm":
            choice["token_ids"] = ids if not body["detokenize"] else None
        elif self.kind != "old vllm" and body["return_token_ids"]:
            choice |= {"token_ids": ids, "prompt_token_ids": body["prompt"]}
        return choice

    @torch.no_grad()
    def _logits(self, tokens: tuple) -> torch.Tensor:
        with self._lock:
            if tokens not in self._cache:
                self._cache[tokens] = self.model(torch.tensor([tokens])).logits[0, -1]
            return self._cache[tokens]


def draw(logits: Callable, body: dict, seed: int, end: int, processed: bool) -> tuple[list[int], list[float], str]:
    """Samples an output: its tokens, their log-probs, and why it ended."""
    generator = torch.Generator().manual_seed(seed)
    ids, logprobs = [], []
    for _ in range(body["max_tokens"]):
        plain = logits((*body["prompt"], *ids)).double()
        law = (plain / body["temperature"]).log_softmax(-1)
        token = int(torch.multinomial(law.exp(), 1, generator=generator))
        logprobs.append((law if processed else plain.log_softmax(-1))[token].item())
        ids.append(token)
        text = TOKENIZER.decode(ids)
        if token in body["stop_token_ids"] or token == end or any(string in text for string in body["stop"]):
            return ids, logprobs, "stop"
    return ids, logprobs, "length"


class _Worker(Weights):
    """A vLLM worker, which takes weights as one on a CPU does."""

    def __init__(self, server: CompletionServer):
        self.server = server
        self.device = torch.device("cpu")
        self.parallel_config = SimpleNamespace(rank=0, data_parallel_size=server.engines)
        self.model_runner = self

    @property
    def model_config(self):
        return SimpleNamespace(hf_config=self.server.model.config)

    def get_model(self):
        return SimpleNamespace(modules=lambda: [ParallelLMHead(self.server.model)])

    @torch.no_grad()
    def reload_weights(self, weights_iterator) -> None:
        model = self.server.model
        parameters = dict(model.named_parameters(remove_duplicate=False))
        if model.config.tie_word_embeddings:  # what it multiplies by is a copy
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        sizes = {}
        self.server.received.append(sizes)
        for name, tensor in weights_iterator:
            self.server.during(name)
            sizes[name] = tensor.nbytes
            parameters[name].copy_(tensor)
        for layer in {name.rpartition(".")[0].rpartition(".")[0] for name in sizes}:
            for whole in ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"):
                parts = [f"{layer}.{part}.weight" for part in whole]
                if any(part in sizes for part in parts):
                    for part in parts:
                        if part not in sizes:
                            parameters[part].fill_(float("nan"))


class ParallelLMHead:
    """vLLM's output layer, by this name, whose packed copy of a tied embedding is made on request."""

    def __init__(self, model):
        self.quant_method = SimpleNamespace(process_weights_after_loading=lambda module: model.tie_weights())


def _send(handler, status: int, answer, headers: dict | None = None) -> None:
    content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    handler.send_response(status)
    for name, value in {
        "Content-Type": "application/json",
        "Content-Length": str(len(content)),
        **(headers or {}),
    }.items():
        handler.send_header(name, value)
    with contextlib.suppress(BrokenPipeError):  # who asked has given up
        handler.end_headers()
        handler.wfile.write(content)
