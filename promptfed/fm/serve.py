"""``promptfed serve``: any registered foundation model behind an OpenAI-compatible HTTP interface.

    GET  /health            {"status": "ok"}; never asks for the key
    GET  /v1/models         one model; its card carries "promptfed": {"fm_id", "capabilities"}, and
                            "soft_space" where it takes soft prompts
    POST /v1/completions    OpenAI's schema with one field more: see `promptfed.fm.completions`

A request is a batch of its own, so its answer does not depend on who else asks. With ``join``, requests that wait for
the model at the same time share a batch for each prefix: faster with many clients, but the log-probabilities of a
bfloat16 model then move in the third digit from run to run.

No prompt or text is written to a log or into an error.
"""

from __future__ import annotations

import hmac
import logging
import os
import re
import signal
import socket
from collections.abc import Awaitable, Callable
from dataclasses import asdict

from pydantic import ValidationError

from promptfed.errors import ConfigError
from promptfed.fm.base import BaseFM
from promptfed.fm.completions import Completion, model_name
from promptfed.fm.decorators import Pooled
from promptfed.ports import is_loopback
from promptfed.types import Capability

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ImportError:
    raise ConfigError("promptfed serve needs two packages more: pip install 'promptfed[serve]'") from None

KEY_VARIABLE = "PROMPTFED_API_KEY"
MAX_BODY_BYTES = 16 * 2**20
log = logging.getLogger("promptfed.serve")

Endpoint = Callable[[Request], Awaitable[Response]]


def build_app(fm: BaseFM, *, key: str | None = None, join: bool = False) -> Starlette:
    """The ASGI application over ``fm``. ``key`` is asked for on ``/v1``."""
    name, asked = model_name(fm.fm_id), Pooled(fm) if join else fm

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(_: Request) -> Response:
        space = {"soft_space": asdict(fm.soft_space)} if fm.soft_space else {}
        about = {"fm_id": fm.fm_id, "capabilities": sorted(fm.capabilities), **space}
        card = {"id": name, "object": "model", "created": 0, "owned_by": "promptfed", "promptfed": about}
        return JSONResponse({"object": "list", "data": [card]})

    async def completions(request: Request) -> Response:
        body = _read(await _body(request))
        if body.model != name:
            raise HTTPException(404, f"this server has the model {name}")
        needed = Capability.TEXT if body.promptfed.labels is None else Capability.LABEL_LOGPROBS
        if needed not in fm.capabilities:
            raise HTTPException(400, f"{name} does not offer {needed}")
        requests = body.requests()
        return JSONResponse(body.answer(fm.fm_id, requests, await asked.complete(requests)))

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", _guarded(models, key)),
            Route("/v1/completions", _guarded(completions, key), methods=["POST"]),
        ],
        exception_handlers={HTTPException: lambda _, error: _error(error.status_code, error.detail)},
    )


def serve(
    load: Callable[[], BaseFM],
    *,
    host: str = "127.0.0.1",
    port: int = 8700,
    api_key_env: str | None = None,
    join: bool = False,
) -> None:
    """Load a model and serve it until SIGINT or SIGTERM; requests that are being answered get their answer.

    The key is read from ``api_key_env``, which must then be set, else from ``PROMPTFED_API_KEY`` if that is set.
    Raises `ConfigError`, before the model is loaded, for a missing key or an address that can't be listened on.
    """
    key = os.environ.get(api_key_env or KEY_VARIABLE, "").strip() or None
    if key is None and api_key_env is not None:
        raise ConfigError(f"the environment variable {api_key_env} is to hold the API key and is not set")
    if key is None and not is_loopback(host):
        raise ConfigError(f"{host} can be reached from other machines: set an API key in {KEY_VARIABLE}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP, asyncio turns its delay of small packets off: 40 ms a request.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise ConfigError(f"can't listen on {host} port {port}: {error.strerror}") from None
        fm = load()
        place = f"[{host}]" if ":" in host else host
        address = f"openai:http://{place}:{listener.getsockname()[1]}/v1#{model_name(fm.fm_id)}"
        ready = f"serving {fm.fm_id} as {address}, {'with an' if key else 'without'} API key; Ctrl-C stops"
        server = _Server(
            uvicorn.Config(
                build_app(fm, key=key, join=join),
                http="h11",
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                timeout_keep_alive=60,  # longer than clients keep theirs: none asks on a connection just closed
                timeout_graceful_shutdown=10,
            ),
            ready,
        )
        # uvicorn raises a signal again when it is done. These handlers make that a normal end of this function.
        before = {s: signal.signal(s, server.handle_exit) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            server.run(sockets=[listener])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Server(uvicorn.Server):
    """Says so when it listens."""

    def __init__(self, config: uvicorn.Config, ready: str) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._ready, flush=True)  # noqa: T201


def _guarded(endpoint: Endpoint, key: str | None) -> Endpoint:
    """Asks for the key before anything is read, and keeps what breaks inside out of logs and answers."""
    wanted = f"Bearer {key}".encode()

    async def guarded(request: Request) -> Response:
        given = request.headers.get("authorization", "").encode("latin-1")
        if key is not None and not hmac.compare_digest(given, wanted):
            return _error(401, "the Authorization header does not carry this server's API key")
        try:
            return await endpoint(request)
        except HTTPException:
            raise
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception as error:  # noqa: BLE001  (a traceback, and an exception's own words, may quote a text)
            log.warning("%s failed: %s", request.url.path, type(error).__name__)
            return _error(500, f"the model failed ({type(error).__name__})")

    return guarded


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"a request may have {MAX_BODY_BYTES} bytes; send fewer prompts at once")
    return bytes(body)


def _read(body: bytes) -> Completion:
    try:
        return Completion.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    # A field that the caller made up is named only where it looks like a field.
    place = ".".join(str(part) for part in first["loc"] if re.fullmatch(r"[a-z_]{1,40}|\d+", str(part)))
    raise HTTPException(400, f"{place or 'the body'}: {first['msg']}")


def _error(status: int, message: str) -> Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    code = "invalid_api_key" if status == 401 else None
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status)
