"""Bytes over Flower with real processes: one SuperLink, five nodes with keys, and what may befall them.

Run as a module it is one of these processes: `node OPTIONS` answers tasks, `engine OPTIONS` sends some.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

pytest.importorskip("flwr")

from promptfed.errors import ConfigError, QuorumError, RunError
from promptfed.federation.flower import processes
from promptfed.federation.flower.answers import PROTOCOL
from promptfed.federation.flower.app.promptfed_relay.frames import Frame, pack, read
from promptfed.federation.flower.certificates import ServerFiles, make_node_key, make_server_certificate
from promptfed.federation.flower.node import serve_node
from promptfed.federation.flower.settings import Attached, Listen, client_keys
from promptfed.federation.flower.stock import serve_socket
from promptfed.federation.flower.transport import FlowerTransport
from promptfed.ports import free_port

pytestmark = pytest.mark.network

T = TypeVar("T")
CLIENTS = [f"c{i}" for i in range(5)]
SPARE = "spare"  # registered, but nobody's node
SECRET = "the text of a patient"
COME_S = 60.0
ENVELOPE = 1200  # bytes that Flower counts beside ours, a message, at most


async def answer(client: str, task: bytes) -> bytes:
    """What a client of these tests makes of a task: `slow SECONDS`, `fail`, or anything."""
    words = task.split()
    if words[0] == b"slow":
        await asyncio.sleep(float(words[1]))
    if words[0] == b"fail":
        raise ValueError(SECRET)
    return b"%s %d %s" % (client.encode(), os.getpid(), task)


class Process:
    """This module as a process of its own."""

    def __init__(self, kind: str, **options: Any) -> None:
        command = [sys.executable, "-m", __name__, kind, json.dumps(options, default=str)]
        self.popen = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def line(self) -> str:
        """The next line that it prints."""
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().strip()

    def kill(self) -> None:
        """SIGKILL, as a crash is."""
        self.popen.kill()
        self._reap()

    def stop(self) -> None:
        """SIGTERM, and SIGKILL if that takes long."""
        self.popen.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(15)
        self.kill()

    def _reap(self) -> None:
        self.popen.wait(10)
        if self.popen.stdout is not None:
            self.popen.stdout.close()

    @property
    def children(self) -> list[int]:
        """Its child processes."""
        pid = self.popen.pid
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Loop:
    """An event loop in a thread: what a module's tests share lives in it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 120) -> T:
        """Run it there and wait."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def close(self) -> None:
        """Stop the loop and its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Federation:
    """A server with TLS and keys in this process, and the clients' nodes in theirs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.loop = folder, Loop()
        self.files: ServerFiles = make_server_certificate(folder / "tls", ["127.0.0.1", "localhost"])
        keys = {c: make_node_key(folder / "keys" / c) for c in [*CLIENTS, SPARE]}
        self.address = f"127.0.0.1:{free_port()}"
        listen = Listen(
            address=self.address,
            certificate=self.files.certificate,
            private_key=self.files.private_key,
            clients=keys,
        )
        self.nodes: dict[str, Process] = {}
        self.transport = self.loop.run(self._start(listen))

    async def _start(self, listen: Listen) -> FlowerTransport:
        return await FlowerTransport(listen, self.folder / "server").__aenter__()

    def options(self, client: str) -> dict[str, Any]:
        """What `serve_node` takes."""
        return {
            "client_id": client,
            "server": self.address,
            "folder": self.folder / client,
            "root_certificates": self.files.ca,
            "private_key": self.folder / "keys" / client,
        }

    def start_node(self, client: str) -> None:
        self.nodes[client] = Process("node", **self.options(client))

    def wait(self) -> None:
        """Until all clients are there."""
        self.loop.run(self.transport.wait_for_clients(CLIENTS, COME_S))

    def exchange(self, task: bytes | Callable[[str], bytes], deadline_s: float = 60) -> dict[str, bytes]:
        """One exchange with all clients."""
        tasks = {c: task if isinstance(task, bytes) else task(c) for c in CLIENTS}
        return self.loop.run(self.transport.exchange(tasks, CLIENTS, deadline_s))

    def begin(self, task: bytes | Callable[[str], bytes], deadline_s: float = 60) -> Callable[[], dict[str, bytes]]:
        """One exchange in the background; what is returned waits for it."""
        out: list[dict[str, bytes]] = []
        thread = threading.Thread(target=lambda: out.append(self.exchange(task, deadline_s)), daemon=True)
        thread.start()

        def result() -> dict[str, bytes]:
            thread.join()
            return out[0]

        return result

    def close(self) -> None:
        for node in self.nodes.values():
            node.stop()
        self.loop.run(self.transport.__aexit__())
        self.loop.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    federation = Federation(tmp_path_factory.mktemp("flower"))
    try:
        for client in CLIENTS:
            federation.start_node(client)
        federation.wait()
        yield federation
    finally:
        federation.close()


@pytest.fixture
def federation(running: Federation) -> Federation:
    """The shared one, with all its clients there whatever the test before did to them."""
    running.wait()
    return running


def texts(replies: dict[str, bytes]) -> dict[str, bytes]:
    """The task that each reply repeats, by the client that says it is its sender."""
    return {r.split(b" ", 2)[0].decode(): r.split(b" ", 2)[2] for r in replies.values()}


def test_a_round_of_five_clients_takes_under_five_seconds(federation: Federation) -> None:
    seconds = []
    for n in range(5):
        begun = time.monotonic()
        replies = federation.exchange(lambda c, n=n: b"%s %d" % (c.encode(), n))  # type: ignore[misc]
        seconds.append(time.monotonic() - begun)

        assert texts(replies) == {c: b"%s %d" % (c.encode(), n) for c in CLIENTS}
    assert sorted(seconds)[2] < 5


def test_what_flower_counts_is_our_bytes_and_an_envelope(federation: Federation) -> None:
    def ours() -> tuple[int, int, int]:
        return federation.transport.bytes_up, federation.transport.bytes_down, federation.transport.messages_up

    up, down = federation.loop.run(federation.transport.traffic())
    our_up, our_down, n = ours()
    federation.exchange(b"x" * 40_000)

    more_up, more_down = (
        b - a for a, b in zip((up, down), federation.loop.run(federation.transport.traffic()), strict=True)
    )
    our_more_up, our_more_down, sent = (b - a for a, b in zip((our_up, our_down, n), ours(), strict=True))
    assert sent == len(CLIENTS)
    assert 0 <= more_up - our_more_up <= ENVELOPE * sent <= 0.05 * our_more_up
    assert 0 <= more_down - our_more_down <= ENVELOPE * sent <= 0.05 * our_more_down


def test_a_late_reply_is_dropped_and_the_others_are_returned_in_time(federation: Federation) -> None:
    begun = time.monotonic()
    replies = federation.exchange(lambda c: b"slow 6" if c == "c1" else b"first", deadline_s=3)

    assert set(replies) == set(CLIENTS) - {"c1"}
    assert time.monotonic() - begun < 5
    assert texts(federation.exchange(b"second")) == dict.fromkeys(CLIENTS, b"second")


def test_who_is_not_awaited_does_not_hold_up_the_round(federation: Federation) -> None:
    tasks = {c: b"slow 30" if c == "c2" else b"quick" for c in CLIENTS}
    begun = time.monotonic()
    replies = federation.loop.run(federation.transport.exchange(tasks, [c for c in CLIENTS if c != "c2"], None))

    assert set(replies) == set(CLIENTS) - {"c2"}
    assert time.monotonic() - begun < 15
    federation.nodes["c2"].stop()  # it would be busy for the tests after this one
    federation.start_node("c2")


def test_a_task_that_raises_is_missing_and_none_of_its_text_leaves(federation: Federation) -> None:
    begun = time.monotonic()
    replies = federation.exchange(lambda c: b"fail" if c == "c3" else b"fine")

    assert set(replies) == set(CLIENTS) - {"c3"}
    assert time.monotonic() - begun < 30, "it was waited for"
    for path in (federation.folder / "server").rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_a_killed_supernode_comes_back_and_its_task_is_done(federation: Federation) -> None:
    result = federation.begin(lambda c: b"slow 3" if c == "c0" else b"quick")
    time.sleep(1.5)
    for child in federation.nodes["c0"].children:
        os.kill(child, signal.SIGKILL)

    assert set(result()) == set(CLIENTS)


def test_a_killed_client_that_is_started_again_gets_its_task_again(federation: Federation) -> None:
    before = federation.nodes["c4"]
    result = federation.begin(lambda c: b"slow 3" if c == "c4" else b"quick")
    time.sleep(1.5)
    before.kill()
    federation.start_node("c4")

    replies = result()
    assert set(replies) == set(CLIENTS)
    assert int(replies["c4"].split()[1]) == federation.nodes["c4"].popen.pid


def test_a_killed_superlink_is_started_again_within_the_exchange(federation: Federation) -> None:
    result = federation.begin(lambda c: b"slow 3" if c == "c0" else b"quick", deadline_s=110)
    time.sleep(1.5)
    upkeep = federation.transport._upkeep
    assert upkeep is not None
    assert upkeep.link is not None
    assert upkeep.link._superlink is not None
    os.kill(upkeep.link._superlink.pid, signal.SIGKILL)

    assert set(result()) == set(CLIENTS)


def test_an_unknown_key_is_refused_with_a_message(federation: Federation, tmp_path: Path) -> None:
    make_node_key(tmp_path / "key")
    options = federation.options("c0") | {"private_key": tmp_path / "key", "folder": tmp_path, "patience_s": 0}

    with pytest.raises(ConfigError, match="refuses this client"):
        federation.loop.run(serve_node(lambda task: answer("c0", task), **options))


def test_a_server_of_another_authority_is_refused_with_a_message(federation: Federation, tmp_path: Path) -> None:
    other = make_server_certificate(tmp_path / "other", ["127.0.0.1"])
    options = federation.options("c0") | {"root_certificates": other.ca, "folder": tmp_path}

    with pytest.raises(ConfigError, match="not vouched for"):
        federation.loop.run(serve_node(lambda task: answer("c0", task), **options))


def test_a_client_can_not_pose_as_another(federation: Federation) -> None:
    impostor = Process("node", **federation.options(SPARE) | {"client_id": "c1"})
    try:
        assert impostor.line() == "connected"
        time.sleep(2)
        replies = federation.exchange(b"who?")
    finally:
        impostor.stop()

    assert int(replies["c1"].split()[1]) == federation.nodes["c1"].popen.pid
    assert SPARE not in federation.transport.clients


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/control/start-run"),
        ("POST", "/v1/control/register-node"),
        ("POST", "/v1/runtime/acquire-task"),
        ("POST", "/v1/fleet/../control/start-run"),
        ("GET", "/v1/fleet/pull-messages"),
        ("GET", "/docs"),
    ],
)
def test_clients_reach_the_fleet_api_and_nothing_else(federation: Federation, method: str, path: str) -> None:
    host, port = federation.address.split(":")
    tls = ssl.create_default_context(cafile=str(federation.files.ca))
    connection = http.client.HTTPSConnection(host, int(port), context=tls, timeout=10)
    try:
        connection.request(method, path, body=b"")
        assert connection.getresponse().status == 404
    finally:
        connection.close()


def test_missing_clients_are_named(federation: Federation) -> None:
    with pytest.raises(QuorumError, match=r"5 of 2 .*|missing: nobody"):
        federation.loop.run(federation.transport.wait_for_clients(["c0", "nobody"], 0.5))


def test_a_killed_engine_is_started_again_and_its_clients_come_back(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    nodes = [Process("node", client_id=c, server=address, folder=tmp_path / c, insecure=True) for c in ("a", "b")]
    engines = [Process("engine", address=address, folder=tmp_path / "server", clients=["a", "b"])]
    try:
        assert engines[0].line() == "a b"
        engines[0].kill()
        engines.append(Process("engine", address=address, folder=tmp_path / "server", clients=["a", "b"]))
        assert engines[1].line() == "a b"
    finally:
        for process in [*nodes, *engines]:
            process.stop()


def test_flowers_own_supernode_and_a_superlink_of_others(tmp_path: Path) -> None:
    """The plain commands of docs/deploy.md: nothing of Flower is started by promptfed."""
    link, node = free_port(), free_port()
    environment = processes.environment(tmp_path)
    (tmp_path / "flwr").mkdir()
    (tmp_path / "flwr" / "config.toml").write_text(f'[superlink.x]\naddress = "127.0.0.1:{link}"\ninsecure = true\n')

    async def scenario() -> dict[str, bytes]:
        async with FlowerTransport(Attached(insecure=True), tmp_path / "server") as transport:
            daemon = asyncio.create_task(
                serve_socket(lambda task: answer("a", task), client_id="a", folder=tmp_path / "a")
            )
            commands = [
                f"flower-superlink --insecure --port {link}",
                f"flower-supernode --insecure --superlink 127.0.0.1:{link} --port {node}"
                f" --node-config daemon='\"{processes.socket_path(tmp_path / 'a', 'daemon.sock')}\"'",
                f"until flwr run {processes.APP} x --run-config engine='\"{transport.socket}\"'; do sleep 1; done",
            ]
            shells = [
                await asyncio.create_subprocess_shell(f"exec {c}" if i < 2 else c, env=environment)
                for i, c in enumerate(commands)
            ]
            try:
                await transport.wait_for_clients(1, 90)
                return await transport.exchange({"a": b"hello"}, ["a"], 60)
            finally:
                for shell in shells:
                    await processes.stop(shell)
                daemon.cancel()
                await asyncio.gather(daemon, return_exceptions=True)

    assert texts(asyncio.run(scenario())) == {"a": b"hello"}


def test_a_node_that_says_who_it_is_when_it_has_just_gone_is_not_turned_away(tmp_path: Path) -> None:
    public = make_node_key(tmp_path / "key")
    (pem,) = client_keys({"a": public})
    hello = json.dumps({"client": "a", "protocol": PROTOCOL}).encode()

    async def scenario() -> tuple[list[str], set[str]]:
        async with FlowerTransport(Attached(clients={"a": public}), tmp_path / "server") as transport:
            reader, writer = await asyncio.open_unix_connection(transport.socket)

            async def online(*seen: tuple[int, bool, str, str]) -> None:
                writer.write(pack(Frame("nodes", {"nodes": seen})))
                await writer.drain()

            async def greeted() -> Frame:
                frame = await read(reader)
                assert frame is not None
                return frame

            await online((7, True, "noon", pem))
            first = await greeted()
            await online((7, False, "noon", pem))
            writer.write(pack(Frame("reply", {"ticket": first.fields["ticket"], "status": "ok"}, hello)))
            await online((7, True, "one", pem))
            second = await greeted()
            writer.write(pack(Frame("reply", {"ticket": second.fields["ticket"], "status": "ok"}, hello)))
            await transport.wait_for_clients(["a"], 5)
            writer.close()
            return [first.fields["what"], second.fields["what"]], transport.clients

    assert asyncio.run(scenario()) == (["hello", "hello"], {"a"})


def test_an_address_that_is_taken_is_an_error_with_the_reason(federation: Federation, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with FlowerTransport(Listen(address=federation.address, insecure=True), tmp_path):
            pass

    with pytest.raises(RunError, match="can't listen at"):
        asyncio.run(scenario())


def test_files_that_do_not_fit_are_errors_that_name_them(tmp_path: Path) -> None:
    files, public = make_server_certificate(tmp_path / "tls", ["localhost"]), make_node_key(tmp_path / "key")
    other = make_server_certificate(tmp_path / "other", ["localhost"])
    server = {"address": "localhost:9000", "certificate": files.certificate, "private_key": files.private_key}
    node = {"client_id": "a", "server": "localhost:9000", "folder": tmp_path, "private_key": tmp_path / "key"}

    for error, options in (
        ("no certificate and its private key", server | {"private_key": other.private_key, "clients": {"a": public}}),
        ("no such file", server | {"clients": {"a": tmp_path / "none.pub"}}),
        ("needs a certificate", server),
        ("drop one or the other", server | {"insecure": True}),
        ("expected HOST:PORT", server | {"address": "localhost", "clients": {"a": public}}),
    ):
        with pytest.raises(ConfigError, match=error):
            Listen(**options)
    for error, keys in (("same key", {"a": public, "b": public}), ("no public key", {"a": files.ca})):
        with pytest.raises(ConfigError, match=error):
            FlowerTransport(Listen(**server, clients=keys), tmp_path)
    for error, options in (
        ("needs its private key", {"private_key": None}),
        ("holds no private key", {"private_key": public}),
        ("holds no certificates", {"root_certificates": public}),
        ("expected HOST:PORT", {"server": "localhost:x"}),
        ("drop one or the other", {"insecure": True}),
    ):
        with pytest.raises(ConfigError, match=error):
            asyncio.run(serve_node(lambda task: answer("a", task), **node | options))


async def _engine(options: dict[str, Any]) -> None:
    """Exchange one task with every client, say who answered, and wait."""
    clients = options["clients"]
    async with FlowerTransport(Listen(address=options["address"], insecure=True), Path(options["folder"])) as transport:
        await transport.wait_for_clients(clients, 90)
        replies = await transport.exchange(dict.fromkeys(clients, b"task"), clients, 60)
        print(" ".join(sorted(texts(replies))), flush=True)  # noqa: T201
        await asyncio.sleep(600)


async def _node(options: dict[str, Any]) -> None:
    """Serve until SIGTERM; say when SuperLink has let us in."""
    paths = {k: Path(options[k]) for k in ("folder", "root_certificates", "private_key") if k in options}
    client = str(options["client_id"])

    async def say() -> None:
        begun = time.time()
        mark = paths["folder"] / "node"
        while not (mark.exists() and mark.stat().st_mtime >= begun):
            await asyncio.sleep(0.1)
        print("connected", flush=True)  # noqa: T201

    saying = asyncio.create_task(say())
    await serve_node(lambda task: answer(client, task), **options | paths)
    saying.cancel()


if __name__ == "__main__":
    kind, given = sys.argv[1], json.loads(sys.argv[2])
    if kind == "engine":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    asyncio.run(_engine(given) if kind == "engine" else _node(given))
