"""One OpenAI-compatible inference server of ``rollout.remote``: what it serves, which weights it has, new ones for it.

Errors are ValueErrors that name the server and what was asked of it; the API key never appears in them.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from nemo_brain.config.remote import RemoteConfig
from nemo_brain.core.http import PASSING, BadAnswer, HTTPClient, excerpt
from nemo_brain.core.together import within

_INCOMPLETE = "incomplete"  # the version of weights that have not come in full
_RESET = "/reset_prefix_cache?reset_running_requests=true"
_LOOKS = 4  # at a name, between which the server has answered something else
_PROBE_SECONDS = 10  # for answers that take no computing; a server that is late with them is not yet lost


@dataclass(frozen=True)
class Named:
    """A server's weights by the name that it was told. life: another one whenever it is given ours and has others, as
    after a start."""

    version: str
    life: str


class Server(HTTPClient):
    """The server at one of ``rollout.remote.url``.

    Args:
        config: that section.
        url: its address.
        context: so many tokens a prompt and its output may have together.

    Raises:
        ValueError: the environment variable of the API key is not set.
    """

    def __init__(self, config: RemoteConfig, url: str, context: int):
        super().__init__(
            "rollout.remote",
            url.rstrip("/").removesuffix("/v1"),
            api_key_env=config.api_key_env,
            concurrency=config.concurrency,
            request_timeout_seconds=config.request_timeout_seconds,
            timeout_seconds=config.timeout_seconds,
        )
        self.config = config
        self.waiting: str | None = None  # for a transfer of the weights: of "all", or of those that "changed"
        self._doubted = False  # it is, though it names the right ones
        self._life = ""  # to be told with these weights
        self._context = context

    async def failure(self, client: httpx.AsyncClient) -> str | None:
        """Why ``/health`` says that the server is gone; None: it does not, or the server has no ``/health``."""
        try:
            response = await client.get(self.url + "/health", headers=self._headers(), timeout=_PROBE_SECONDS)
        except (httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout):
            return None  # it may have much to do
        except httpx.RequestError as error:
            return f"{type(error).__name__}: {error}"
        return f"HTTP {response.status_code}" if response.status_code >= 500 else None

    async def bring(
        self,
        client: httpx.AsyncClient,
        directory: Path | None,
        version: str | None,
        earlier: str | None = None,
        *,
        reload: bool,
        doubt: bool,
    ) -> None:
        """Sees to it that the server has the weights of this version, and serves them; where they come by a process
        group, it is ``waiting`` for them afterwards.

        Args:
            directory: with these weights; None: there is none, or the server has them from its start.
            version: their name, which a server that can keep one is told.
            earlier: the name of those before.
            reload: whatever the server says.
            doubt: also if the server cannot say which version it has.

        Raises:
            ValueError: a step of ``rollout.remote.reload`` failed, the server does not come back, or serves another
                model or one of too short a context. These are looked at before anything is changed on it.
        """
        await self._check(client)
        if self.config.transfer == "process_group" and version is not None:
            await self._see_whether_to_wait(client, version, earlier, reload)
        if directory is None:
            return
        found = await self.named(client)
        if reload or (doubt if found is None else found.version != version):
            await self._reload(client, directory)
            await self._check(client)
            if found is not None:
                ours = found.version in (version, earlier)
                await self._tell(client, Named(str(version), found.life if ours else _new_life()))

    async def _see_whether_to_wait(
        self, client: httpx.AsyncClient, version: str, earlier: str | None, reload: bool
    ) -> None:
        found = await self.named(client)
        if found is None:
            raise self.error(
                "the version of its weights",
                "it keeps none (GET /weight_info), so that a restart would not be seen: start vLLM with "
                "VLLM_SERVER_DEV_MODE=1, or set rollout.remote.transfer=directory",
            )
        if reload or found.version != version:
            # Versions of one run differ by the number of steps alone.
            ours = found.version.rpartition("-")[0] == version.rpartition("-")[0]
            self.waiting = "changed" if ours and not (reload and found.version == version) else "all"
            self._doubted = self._doubted or found.version == version
            self._life = found.life if found.version in (version, earlier) else _new_life()
        elif not self._doubted:  # another replica has given it the weights
            self.waiting = None

    async def named(self, client: httpx.AsyncClient) -> Named | None:
        """``named_now``, as soon as the server answers. ValueError: it does not."""
        for _ in range(_LOOKS):
            try:
                return await self.named_now(client)
            except httpx.HTTPError as error:
                problem = f"{type(error).__name__}: {error}"
                await self._check(client)
        raise self.error("the version of its weights", problem)

    async def named_now(self, client: httpx.AsyncClient) -> Named | None:
        """What the server says that it has, as vLLM and SGLang keep it until they end; None: it keeps no name.

        Raises:
            httpx.HTTPError: it does not answer.
        """
        path = "/model_info" if self.config.server == "sglang" else "/weight_info"
        response = await client.get(self.url + path, headers=self._headers(), timeout=_PROBE_SECONDS)
        if response.is_server_error or response.status_code in PASSING:
            response.raise_for_status()
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if response.is_success:
                version, _, life = str(response.json()["weight_version"]).partition(":")
                return Named(version, life)
        return None

    async def workers(self, client: httpx.AsyncClient) -> list[dict[str, Any]]:
        """What each of its workers says of itself. ValueError: they are not started as they have to be."""
        name = "its workers (nemo_brain_worker)"
        try:
            workers = (await self._call(client, name, _rpc("nemo_brain_worker"))).json()["results"]
            engines = max(worker["engines"] for worker in workers)
        except (ValueError, KeyError, TypeError) as error:
            raise self.error(
                name,
                f"{error}: rollout.remote.transfer=process_group needs vLLM with VLLM_SERVER_DEV_MODE=1 and "
                "--worker-extension-cls nemo_brain_vllm.Weights (docs/remote_sampling.md)",
            ) from None
        if engines > 1:
            raise self.error(
                name,
                f"{engines} data-parallel engines behind one address cannot all be given weights: start each as a "
                "server of its own and list them in rollout.remote.url",
            )
        return workers

    async def receive(self, client: httpx.AsyncClient, arguments: dict[str, Any]) -> None:
        """Has its workers join a process group and take the weights that come: see ``nemo_brain_vllm``.

        Raises:
            ValueError: they have not arrived.
        """
        try:
            await self._call(client, "its weights (nemo_brain_receive)", _rpc("nemo_brain_receive", **arguments))
        except ValueError:
            with contextlib.suppress(ValueError):  # it is gone
                await self._tell(client, Named(_INCOMPLETE, _new_life()))
            raise

    async def received(self, client: httpx.AsyncClient, version: str) -> None:
        """What there is to do once the weights have come. ValueError: it cannot be done."""
        await self._call(client, "its prefix cache", {"path": _RESET})
        await self._check(client)
        await self._tell(client, Named(version, self._life))
        self.waiting, self._doubted = None, False

    async def _tell(self, client: httpx.AsyncClient, named: Named) -> None:
        name = f"{named.version}:{named.life}"
        body: dict[str, Any] = {"new_version": name}
        if self.config.server == "sglang":  # which otherwise ends all requests that are running
            body["abort_all_requests"] = False
        step = {"path": "/update_weight_version", "json": body}
        await self._call(client, "the version of its weights", step)

    async def _check(self, client: httpx.AsyncClient) -> None:
        """Returns once the server answers and serves the model; ValueError if it serves none like it."""

        def read(answer: Any) -> dict[str, int | None]:
            try:
                return {model["id"]: model.get("max_model_len") for model in answer["data"]}
            except (KeyError, TypeError, AttributeError):
                raise BadAnswer(f"no list of models: {str(answer)[:200]}") from None

        lengths = await self.ask(client, "GET", "/v1/models", "its models (GET /v1/models)", read)
        name = self.config.model
        if name not in lengths:
            raise self.error("its models", f"rollout.remote.model={name} is not served; served: {', '.join(lengths)}")
        length = lengths[name]
        if isinstance(length, int) and length < self._context:
            raise self.error(
                "its models",
                f"the context of {name} there is {length} tokens, and data.max_prompt_tokens + rollout.max_new_tokens "
                f"are {self._context}: start it with a longer one (vLLM: --max-model-len)",
            )

    async def _reload(self, client: httpx.AsyncClient, directory: Path) -> None:
        """Carries out the steps of ``rollout.remote.reload`` in order. A step that fails is not repeated.

        Raises:
            ValueError: a step failed, with its output.
        """
        for number, step in enumerate(self.config.reload or ()):
            step = _filled_in(step, str(directory))
            name = f"rollout.remote.reload[{number}]"
            if "command" in step:
                await self._run(name, step["command"])
            else:
                await self._call(client, name, step)

    async def _call(self, client: httpx.AsyncClient, name: str, step: dict) -> httpx.Response:
        url = step["url"] if "url" in step else self.url + "/" + step["path"].lstrip("/")
        method = step.get("method", "POST")
        # The key is the inference server's: another host is not told.
        ours = httpx.URL(url).netloc == httpx.URL(self.url).netloc
        request = client.request(method, url, json=step.get("json"), headers=self._headers() if ours else {})
        try:
            response = await within(self.config.timeout_seconds, request)
        except TimeoutError:
            problem = f"no answer within rollout.remote.timeout_seconds={self.config.timeout_seconds:g}"
            raise self.error(name, f"{method} {url}: {problem}") from None
        except httpx.RequestError as error:
            raise self.error(name, f"{method} {url}: {type(error).__name__}: {error}") from None
        if not response.is_success or _refuses(response):
            raise self.error(name, f"{method} {url}: HTTP {response.status_code}: {excerpt(response)}")
        return response

    async def _run(self, name: str, command: list[str]) -> None:
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=asyncio.subprocess.STDOUT
            )
        except OSError as error:
            raise self.error(name, f"{command}: {error}") from None
        try:
            output, _ = await within(self.config.timeout_seconds, process.communicate())
        except TimeoutError:
            problem = f"not done within rollout.remote.timeout_seconds={self.config.timeout_seconds:g}"
            raise self.error(name, f"{command}: {problem}") from None
        finally:
            if process.returncode is None:
                process.kill()
        if process.returncode:
            last = output.decode(errors="replace").strip()[-500:]
            raise self.error(name, f"{command}: exit status {process.returncode}: {last}")


def _new_life() -> str:
    return uuid.uuid4().hex[:8]


def _rpc(method: str, **arguments: Any) -> dict[str, Any]:
    """A step that calls a method of all workers."""
    return {"path": "/collective_rpc", "json": {"method": method, "kwargs": arguments}}


def _refuses(response: httpx.Response) -> bool:
    """Whether HTTP 200 is no success: ``{"success": false}`` (SGLang; vLLM's reset while requests are running), or an
    error in place of a result."""
    if not response.headers.get("content-type", "").startswith("application/json") or not response.content:
        return False
    try:
        answer = response.json()
    except ValueError:
        return True
    return isinstance(answer, dict) and (answer.get("success") is False or bool(answer.get("error")))


def _filled_in(value: Any, path: str) -> Any:
    """``{path}`` in every string replaced; other braces stay as they are."""
    if isinstance(value, str):
        return value.replace("{path}", path)
    if isinstance(value, dict):
        return {name: _filled_in(item, path) for name, item in value.items()}
    if isinstance(value, list):
        return [_filled_in(item, path) for item in value]
    return value
