"""deploy/nginx.conf in a real nginx with TLS: who is let in, to what, what the model server hears, what is logged."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from promptfed.errors import ConfigError
from promptfed.fm.openai import OpenAIFM
from promptfed.fm.scripted import ScriptedFM
from promptfed.fm.serve import MAX_BODY_BYTES, build_app
from promptfed.ports import free_port
from promptfed.types import LabelRequest
from tests.promptfed.fm.test_serve import running
from tests.support import wait_for

pytestmark = pytest.mark.nginx

SITE = Path(__file__).parents[2] / "deploy" / "nginx.conf"
# Keys are 64 hex digits. An id is what is logged and counted.
NORTH, NORTH_NEW, SOUTH, UNKNOWN, WEAK = "a1" * 32, "a2" * 32, "b1" * 32, "c1" * 32, "d1d1"
KEYS = {NORTH: "north", NORTH_NEW: "north", SOUTH: "south", WEAK: "careless"}
UPSTREAM_KEY = "the-model-servers-own"
SECRET = f'set $promptfed_upstream "Bearer {UPSTREAM_KEY}";'
CANARY = "canary-7f3a"
LOGGED = {"time", "client", "method", "path", "status", "bytes_in", "bytes_out", "seconds"}
ALLOWED = [("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models")]
# One in a minute beyond the burst: what gets through does not depend on how fast this machine is.
SLOW_REFILL = {"rate=50r/s": "rate=1r/m", "rate=5r/s": "rate=1r/m"}
WARNS_OF_FILES = {"error.log error;": "error.log warn;"}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The error of an answer in OpenAI's form; fails on any other form."""
        assert self.headers["content-type"] == "application/json"
        document = json.loads(self.body)
        assert set(document) == {"error"}
        assert set(document["error"]) == {"message", "type", "param", "code"}
        return dict(document["error"])


@dataclass(frozen=True)
class Proxy:
    """A running nginx in a folder of its own."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def connect(self) -> http.client.HTTPSConnection:
        """A connection that checks the certificate and sends the path as it is given."""
        trusted = ssl.create_default_context(cafile=str(self.folder / "certificate.pem"))
        return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=30, context=trusted)

    def ask(
        self,
        method: str,
        path: str,
        key: str | None = None,
        body: bytes | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One request on a connection of its own."""
        sent = dict(headers or {})
        if key is not None:
            sent["Authorization"] = f"Bearer {key}"
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, body=body, headers=sent, encode_chunked=isinstance(body, Iterator))
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "promptfed-fm.log").read_text().splitlines()]

    def errors(self) -> str:
        return (self.folder / "promptfed-fm.error.log").read_text()


@dataclass
class Upstream:
    """Stands for the model server: answers every path and remembers what arrived."""

    requests: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)

    def app(self) -> Starlette:
        async def answer(request: Request) -> Response:
            path = request.scope["raw_path"].decode() + ("?" if request.url.query else "") + request.url.query
            self.requests.append((request.method, path, dict(request.headers), await request.body()))
            return JSONResponse({"path": path})

        methods = ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"]
        return Starlette(routes=[Route("/{path:path}", answer, methods=methods)])


def rendered(folder: Path, port: int, upstream: int, changes: Mapping[str, str]) -> str:
    """deploy/nginx.conf with the values that its head names set to this test's."""
    site = SITE.read_text()
    places = {
        "listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
        "    listen [::]:443 ssl;\n": "",
        "/etc/nginx/promptfed-fm/": f"{folder}/",
        "/var/log/nginx/": f"{folder}/",
        "server 127.0.0.1:8700;": f"server 127.0.0.1:{upstream};",
    }
    for old, new in {**places, **changes}.items():
        assert old in site
        site = site.replace(old, new)
    return site


def prepare(
    folder: Path, port: int, upstream: int, *, changes: Mapping[str, str], keys: str, upstream_key: str = ""
) -> list[str]:
    """Write everything that nginx reads; gives its command line."""
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    assert nginx, "these tests need nginx (Debian: apt-get install nginx-light)"
    (folder / "site.conf").write_text(rendered(folder, port, upstream, changes))
    (folder / "keys.map").write_text(keys)
    (folder / "upstream.conf").write_text(upstream_key)
    temporary = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in ("proxy", "fastcgi", "uwsgi", "scgi"))
    (folder / "nginx.conf").write_text(
        f"user {getpass.getuser()}; daemon off; worker_processes 1; pid {folder}/nginx.pid;"
        f"error_log {folder}/main.log; events {{}}"
        f"http {{ client_body_temp_path {folder}/body; {temporary} access_log off; include {folder}/site.conf; }}"
    )
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(folder / "private.key"), "-out", str(folder / "certificate.pem")]
    subprocess.run([*make, *names, *files], check=True, capture_output=True)
    return [nginx, "-e", str(folder / "main.log"), "-p", str(folder), "-c", str(folder / "nginx.conf")]


@contextlib.contextmanager
def proxy(
    folder: Path,
    upstream: str,
    *,
    changes: Mapping[str, str] | None = None,
    keys: Mapping[str, str] = KEYS,
    upstream_key: str = "",
) -> Iterator[Proxy]:
    """nginx before the server at the base URL ``upstream``, with ``changes`` to the file in deploy/."""
    port = free_port()
    behind = int(upstream.removesuffix("/v1").rsplit(":", 1)[1])
    lines = "".join(f"{key} {client};\n" for key, client in keys.items())
    command = prepare(folder, port, behind, changes=changes or {}, keys=lines, upstream_key=upstream_key)
    tried = subprocess.run([*command, "-t"], check=False, capture_output=True, text=True)
    assert (tried.returncode, tried.stdout) == (0, ""), tried.stderr
    with subprocess.Popen(command) as process:
        try:
            wait_until(lambda: process.poll() is not None or listens(port))
            assert process.poll() is None, (folder / "main.log").read_text()
            yield Proxy(folder, port, process)
        finally:
            process.send_signal(signal.SIGTERM)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(true: Any) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end, "waited 20 s in vain"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def upstream() -> Upstream:
    return Upstream()


@pytest.fixture(scope="module")
def recorded(upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """nginx as in deploy/ before a server that remembers what it heard; it warns of what it writes to disk."""
    folder = tmp_path_factory.mktemp("recorded")
    with (
        running(upstream.app()) as url,
        proxy(folder, url, changes=WARNS_OF_FILES, upstream_key=SECRET) as started,
    ):
        yield started


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """nginx as in deploy/ before `promptfed serve`'s application with a key of its own."""
    with (
        running(build_app(ScriptedFM(), key=UPSTREAM_KEY)) as url,
        proxy(tmp_path_factory.mktemp("real"), url, upstream_key=SECRET) as started,
    ):
        yield started


@pytest.fixture
def client_environment(real: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(real.folder / "certificate.pem"))
    monkeypatch.setenv("PROMPTFED_API_KEY", NORTH)


# ---------------------------------------------------------------- with promptfed's own client


def test_promptfeds_client_gets_the_models_own_answers(real: Proxy, client_environment: None) -> None:
    requests = [LabelRequest(prefix="Text:", text=f" {i}", suffix="\n", labels=(" a", " b")) for i in range(300)]

    fm = OpenAIFM(f"{real.url}/v1#overlap")

    assert fm.fm_id == "scripted:overlap@0"
    assert wait_for(fm.complete(requests)) == wait_for(ScriptedFM().complete(requests))


def test_promptfeds_client_is_told_that_its_key_does_not_fit(
    real: Proxy, client_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMPTFED_API_KEY", UNKNOWN)

    with pytest.raises(ConfigError, match=r"refuses this API key \(HTTP 401\)"):
        OpenAIFM(f"{real.url}/v1#overlap")


def test_the_servers_own_refusals_come_through(real: Proxy) -> None:
    refused = real.ask("POST", "/v1/completions", NORTH, b'{"model": "gpt", "prompt": "x"}')

    assert refused.status == 404
    assert refused.error["message"] == "this server has the model overlap"


# ---------------------------------------------------------------- who is let in


@pytest.mark.parametrize(("method", "path"), ALLOWED)
def test_a_key_opens_what_is_offered(recorded: Proxy, upstream: Upstream, method: str, path: str) -> None:
    answer = recorded.ask(method, path, NORTH, b"{}" if method == "POST" else None)

    assert (answer.status, json.loads(answer.body)) == (200, {"path": path})
    assert upstream.requests[-1][:2] == (method, path)


def test_health_asks_for_no_key(recorded: Proxy) -> None:
    assert recorded.ask("GET", "/health").status == 200


@pytest.mark.parametrize(
    "header",
    [
        None,
        f"Bearer {UNKNOWN}",
        f"Bearer {WEAK}",
        NORTH,
        f"Basic {NORTH}",
        "Bearer ",
        f"Bearer {NORTH[:-1]}",
        f"Bearer {NORTH}a",
        f"Bearer {NORTH.upper()}",
        f"Bearer {NORTH} {NORTH}",
        "Bearer default",
        "Bearer north",
        f"Bearer {UPSTREAM_KEY}",
    ],
    ids=[
        "none",
        "unknown",
        "weak",
        "bare",
        "basic",
        "empty",
        "short",
        "long",
        "capitals",
        "two",
        "word",
        "id",
        "upstream's",
    ],
)
@pytest.mark.parametrize(("method", "path"), ALLOWED)
def test_without_a_key_nothing_is_offered(
    recorded: Proxy, upstream: Upstream, method: str, path: str, header: str | None
) -> None:
    before = len(upstream.requests)

    answer = recorded.ask(method, path, headers={"Authorization": header} if header else {})

    assert answer.status == 401
    assert answer.error["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert len(upstream.requests) == before


def test_a_key_is_added_and_taken_away_with_a_reload(tmp_path: Path, upstream: Upstream) -> None:
    with running(upstream.app()) as url, proxy(tmp_path, url, keys={NORTH: "north"}) as started:
        first = [started.ask("GET", "/v1/models", key).status for key in (NORTH, SOUTH)]
        (tmp_path / "keys.map").write_text(f"{SOUTH} south;\n")
        started.process.send_signal(signal.SIGHUP)
        wait_until(lambda: started.ask("GET", "/v1/models", SOUTH).status == 200)
        wait_until(lambda: started.ask("GET", "/v1/models", NORTH).status == 401)

    assert first == [200, 401]


def test_a_line_that_would_let_in_everybody_is_refused_at_the_start(tmp_path: Path) -> None:
    command = prepare(tmp_path, free_port(), free_port(), changes={}, keys="default north;\n")

    tried = subprocess.run([*command, "-t"], check=False, capture_output=True, text=True)

    assert tried.returncode == 1
    assert "duplicate default map parameter" in tried.stderr


# ---------------------------------------------------------------- to what


# fmt: off
ELSEWHERE = (
    "/", "/metrics", "/tokenize", "/invocations", "/docs", "/openapi.json", "/v1", "/v1/", "/v1/embeddings",
    "/v1/models/", "/v1/models/x", "/v1/completions/render", "/v1/../metrics", "/v1/models/../../metrics",
    "/v1/completions/../models", "/v1/./models", "//metrics", "//v1/models", "/v1//models", "/%2e/metrics",
    "/v1/%2e%2e/metrics", "/v1%2fmodels", "/v1/%6dodels", "/v1/models%20", "/v1/models;x", "/v1/models?limit=1",
    "/v1/models?", "/v1/models#x", "/V1/models", "/v1/Models", "/health/", "/health/x", "/HEALTH", "/health?x=1",
    "https://127.0.0.1/metrics", "/v1\\models",
)
# fmt: on


@pytest.mark.parametrize("path", ELSEWHERE)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_nothing_else_is_there_with_a_key_either(recorded: Proxy, upstream: Upstream, method: str, path: str) -> None:
    before = len(upstream.requests)

    answer = recorded.ask(method, path, NORTH)

    assert answer.status == 404
    assert answer.error["type"] == "invalid_request_error"
    assert len(upstream.requests) == before


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/completions", "POST"),
        ("PUT", "/v1/completions", "POST"),
        ("GET", "/v1/chat/completions", "POST"),
        ("DELETE", "/v1/models", "GET"),
        ("POST", "/v1/models", "GET"),
        ("OPTIONS", "/v1/models", "GET"),
        ("TRACE", "/v1/models", "GET"),
        ("POST", "/health", "GET"),
    ],
)
def test_another_method_is_told_which_one_is_right(
    recorded: Proxy, upstream: Upstream, method: str, path: str, allowed: str
) -> None:
    before = len(upstream.requests)

    answer = recorded.ask(method, path, NORTH)

    assert answer.status == 405
    assert answer.error["message"] == "this path does not take this method"
    assert answer.headers["allow"] == allowed
    assert len(upstream.requests) == before


def test_plain_http_is_refused_and_not_redirected(recorded: Proxy, upstream: Upstream) -> None:
    before = len(upstream.requests)
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", recorded.port, timeout=20)) as connection:
        connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {NORTH}"})
        answer = connection.getresponse()
        said = json.loads(answer.read())

    assert answer.status == 400
    assert "HTTPS only" in said["error"]["message"]
    assert answer.getheader("Location") is None
    assert len(upstream.requests) == before


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
@pytest.mark.parametrize(
    ("version", "accepted"),
    [(ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True), (ssl.TLSVersion.TLSv1_3, True)],
)
def test_tls_begins_with_1_2(recorded: Proxy, version: ssl.TLSVersion, accepted: bool) -> None:
    context = ssl.create_default_context(cafile=str(recorded.folder / "certificate.pem"))
    context.minimum_version = context.maximum_version = version
    context.set_ciphers("ALL:@SECLEVEL=0")  # so that it is the server that refuses

    with socket.create_connection(("127.0.0.1", recorded.port), timeout=20) as plain:
        if accepted:
            with context.wrap_socket(plain, server_hostname="127.0.0.1") as secured:
                assert secured.version() == {"TLSv1_2": "TLSv1.2", "TLSv1_3": "TLSv1.3"}[version.name]
        else:
            with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
                context.wrap_socket(plain, server_hostname="127.0.0.1")


# ---------------------------------------------------------------- what the model server hears


def test_the_model_server_hears_the_body_and_its_own_key_and_nothing_of_the_clients(
    recorded: Proxy, upstream: Upstream
) -> None:
    wanted = {"Content-Type": "application/json", "Accept": "x/y"}
    unwanted = {"Cookie": "a=b", "X-Forwarded-For": "192.0.2.1", "X-Request-Id": "7", "X-data-parallel-rank": "1"}

    recorded.ask("POST", "/v1/completions", NORTH, b'{"n":1}', wanted | unwanted)

    _, _, headers, body = upstream.requests[-1]
    assert body == b'{"n":1}'
    assert headers == {
        "host": "promptfed_fm",
        "connection": "close",
        "content-length": "7",
        "content-type": "application/json",
        "accept": "x/y",
        "authorization": f"Bearer {UPSTREAM_KEY}",
    }


def test_a_model_server_without_a_key_gets_none(tmp_path: Path) -> None:
    upstream = Upstream()
    with running(upstream.app()) as url, proxy(tmp_path, url) as started:
        statuses = [started.ask(method, path, NORTH).status for method, path in ALLOWED]

    assert statuses == [200, 200, 200]
    assert not any("authorization" in headers for _, _, headers, _ in upstream.requests)


# ---------------------------------------------------------------- limits


def test_a_body_has_the_servers_own_limit_and_never_touches_the_disk(recorded: Proxy, upstream: Upstream) -> None:
    before = len(upstream.requests)

    largest = recorded.ask("POST", "/v1/completions", NORTH, b"x" * MAX_BODY_BYTES)
    larger = recorded.ask("POST", "/v1/completions", NORTH, b"x" * (MAX_BODY_BYTES + 1))

    assert largest.status == 200
    assert [len(body) for _, _, _, body in upstream.requests[before:]] == [MAX_BODY_BYTES]
    assert larger.status == 413
    assert larger.error["message"] == "a request may have 16 MiB; send fewer prompts at once"
    assert "temporary file" not in recorded.errors()


def test_a_body_of_unknown_size_is_refused(recorded: Proxy, upstream: Upstream) -> None:
    before = len(upstream.requests)

    answer = recorded.ask("POST", "/v1/completions", NORTH, iter([b"{", b"}"]))

    assert answer.status == 411
    assert "Content-Length" in answer.error["message"]
    assert len(upstream.requests) == before
    assert "temporary file" not in recorded.errors()


def test_each_client_has_its_own_rate_whichever_of_its_keys_it_uses(tmp_path: Path, upstream: Upstream) -> None:
    with running(upstream.app()) as url, proxy(tmp_path, url, changes=SLOW_REFILL) as started:
        north = [started.ask("GET", "/v1/models", (NORTH, NORTH_NEW)[i % 2]) for i in range(104)]
        south = started.ask("GET", "/v1/models", SOUTH)
        unknown = started.ask("GET", "/v1/models", UNKNOWN)

    # burst=100, and the one that the rate itself allows
    assert [a.status for a in north] == [200] * 101 + [429] * 3
    assert north[-1].headers["retry-after"] == "1"
    assert north[-1].error["type"] == "rate_limit_error"
    assert (south.status, unknown.status) == (200, 401)


def test_health_has_a_rate_that_no_client_shares(tmp_path: Path, upstream: Upstream) -> None:
    with running(upstream.app()) as url, proxy(tmp_path, url, changes=SLOW_REFILL) as started:
        health = [started.ask("GET", "/health").status for _ in range(23)]
        north = started.ask("GET", "/v1/models", NORTH).status

    assert health == [200] * 21 + [429] * 2
    assert north == 200


def test_each_client_has_its_own_number_of_requests_in_work(tmp_path: Path) -> None:
    n_waiting, release = 0, threading.Event()

    async def wait(_: Request) -> Response:
        nonlocal n_waiting
        n_waiting += 1
        while not release.is_set():
            await asyncio.sleep(0.01)
        return JSONResponse({})

    app = Starlette(
        routes=[Route("/v1/completions", wait, methods=["POST"]), Route("/v1/models", lambda _: Response())]
    )
    with (
        running(app) as url,
        proxy(tmp_path, url, changes={"promptfed_connections 32;": "promptfed_connections 2;"}) as started,
    ):
        first = [threading.Thread(target=started.ask, args=("POST", "/v1/completions", NORTH)) for _ in range(2)]
        for thread in first:
            thread.start()
        wait_until(lambda: n_waiting == 2)
        third = started.ask("GET", "/v1/models", NORTH_NEW)
        south = started.ask("GET", "/v1/models", SOUTH)
        release.set()
        for thread in first:
            thread.join()
        wait_until(lambda: started.ask("GET", "/v1/models", NORTH).status == 200)

    assert (third.status, third.headers["retry-after"]) == (429, "1")
    assert south.status == 200


# ---------------------------------------------------------------- answers


def test_a_big_answer_comes_whole_and_never_touches_the_disk(tmp_path: Path) -> None:
    big = b"y" * 20 * 2**20
    with (
        running(Starlette(routes=[Route("/v1/completions", lambda _: Response(big), methods=["POST"])])) as url,
        proxy(tmp_path, url, changes=WARNS_OF_FILES) as started,
        contextlib.closing(started.connect()) as connection,
    ):
        connection.request("POST", "/v1/completions", headers={"Authorization": f"Bearer {NORTH}"})
        answer = connection.getresponse()
        time.sleep(0.3)  # a client that reads slowly: what nginx would put into a file is there by now
        body = answer.read()
        errors = started.errors()

    assert body == big
    assert errors == ""


def test_a_streamed_answer_comes_as_it_is_written(tmp_path: Path) -> None:
    read = threading.Event()

    async def tokens() -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"
        while not read.is_set():
            await asyncio.sleep(0.01)
        yield b"data: 2\n\n"

    async def stream(_: Request) -> Response:
        return StreamingResponse(tokens(), media_type="text/event-stream")

    with (
        running(Starlette(routes=[Route("/v1/chat/completions", stream, methods=["POST"])])) as url,
        proxy(tmp_path, url) as started,
        contextlib.closing(started.connect()) as connection,
    ):
        connection.request("POST", "/v1/chat/completions", headers={"Authorization": f"Bearer {NORTH}"})
        answer = connection.getresponse()
        first = answer.read1()
        read.set()
        rest = answer.read()

    assert (first, rest) == (b"data: 1\n\n", b"data: 2\n\n")


def test_a_model_server_that_is_down_or_too_slow_is_told_as_such(tmp_path: Path) -> None:
    async def wait(_: Request) -> Response:
        await asyncio.sleep(3)
        return Response()

    changes = {"proxy_read_timeout 600s;": "proxy_read_timeout 1s;"}
    with running(Starlette(routes=[Route("/v1/models", wait)])) as url:
        slow_place, down_place = tmp_path / "slow", tmp_path / "down"
        slow_place.mkdir()
        down_place.mkdir()
        with proxy(slow_place, url, changes=changes) as started:
            slow = started.ask("GET", "/v1/models", NORTH)
        with proxy(down_place, f"http://127.0.0.1:{free_port()}/v1") as started:
            down = [started.ask("GET", "/v1/models", NORTH) for _ in range(2)]

    assert slow.status == 504
    assert slow.error["message"] == "the model server did not answer in time"
    assert [d.status for d in down] == [502, 502]
    assert {d.error["type"] for d in (slow, *down)} == {"server_error"}
    assert down[0].headers["retry-after"] == "5"


# ---------------------------------------------------------------- what is logged


def test_the_log_says_who_asked_what_and_how_it_ended_and_no_more(tmp_path: Path) -> None:
    body = json.dumps({"model": "overlap", "prompt": CANARY}).encode()
    with (
        running(build_app(ScriptedFM(), key=UPSTREAM_KEY)) as url,
        proxy(tmp_path, url, upstream_key=SECRET) as started,
    ):
        answered = started.ask("POST", "/v1/completions", NORTH, body, {"Referer": CANARY, "User-Agent": CANARY})
        started.ask("POST", "/v1/completions", UNKNOWN, body)
        started.ask("POST", f"/v1/completions?api_key={SOUTH}&q={CANARY}", SOUTH, body)
        started.ask("POST", "/v1/completions", SOUTH, CANARY.encode() * 2**21)
        started.ask("GET", "/health")
    entries = started.log()

    assert [(e["client"], e["method"], e["path"], e["status"]) for e in entries] == [
        ("north", "POST", "/v1/completions", 200),
        ("", "POST", "/v1/completions", 401),
        ("south", "POST", "/v1/completions", 404),
        ("south", "POST", "/v1/completions", 413),
        ("", "GET", "/health", 200),
    ]
    assert all(e.keys() == LOGGED for e in entries)
    assert all(e["seconds"] >= 0 for e in entries)
    assert entries[0]["bytes_in"] > len(body)
    assert entries[0]["bytes_out"] > len(answered.body)
    assert_nothing_leaked(tmp_path)


def test_requests_that_fail_leave_no_key_and_no_query_in_the_error_log(tmp_path: Path) -> None:
    with proxy(tmp_path, f"http://127.0.0.1:{free_port()}/v1", changes=SLOW_REFILL) as started:
        for _ in range(104):  # 502 and, in the end, 429
            started.ask("POST", "/v1/completions", NORTH, CANARY.encode())
        started.ask("POST", f"/v1/completions?api_key={NORTH}&q={CANARY}", NORTH, CANARY.encode())
        started.ask("POST", "/v1/completions", NORTH, iter([CANARY.encode()]))

    assert {e["status"] for e in started.log()} == {404, 411, 429, 502}
    assert "Connection refused" in started.errors()
    assert "limiting requests" not in started.errors()
    assert_nothing_leaked(tmp_path)


def assert_nothing_leaked(folder: Path) -> None:
    """No log of nginx holds a key, a text or an address."""
    logs = "".join(path.read_text() for path in folder.glob("*.log"))
    assert "/v1/completions" in logs
    assert [s for s in (NORTH, SOUTH, UNKNOWN, UPSTREAM_KEY, CANARY, "?", "Bearer") if s in logs] == []
