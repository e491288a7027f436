"""The gate: the only thing clients reach. It ends TLS and lets the calls of a SuperNode through to SuperLink.

SuperLink serves its Fleet, Runtime and Control APIs at one port, and asks nobody who calls the last two: whoever
reaches that port may submit code to run. So it listens on loopback, and this passes on what is listed in PATHS. Who a
node is, SuperLink still checks itself, by the signature in every call's headers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import sys
from typing import Any

import h11

PATHS = frozenset(
    f"/v1/fleet/{call}".encode()
    for call in (
        "register-node",
        "activate-node",
        "deactivate-node",
        "unregister-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "push-object",
        "pull-object",
        "confirm-message-received",
    )
)
MAX_BODY = 64 * 1024 * 1024
MAX_CONNECTIONS = 1024
IDLE_S = 120.0
CHUNK = 65536
HOP = frozenset({b"connection", b"host", b"keep-alive", b"transfer-encoding", b"te", b"upgrade", b"expect"})


class Gate:
    """One listening gate; a connection to SuperLink for each of a client."""

    def __init__(self, superlink_port: int, superlink_tls: ssl.SSLContext | None) -> None:
        self._port, self._tls = superlink_port, superlink_tls
        self._open = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one client's connection until either side ends it or says something that is no HTTP."""
        self._open += 1
        inner: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        try:
            if self._open > MAX_CONNECTIONS:
                return
            outer = h11.Connection(h11.SERVER)
            while True:
                request, body = await _request(outer, reader)
                if not _is_passed(request):
                    await _refuse(outer, writer, 404)
                    return
                if inner is None or inner[0].at_eof():  # SuperLink ends connections that are idle for some seconds
                    if inner is not None:
                        inner[1].close()
                    inner = await asyncio.open_connection("127.0.0.1", self._port, ssl=self._tls)
                await self._pass(outer, writer, inner, request, body)
                outer.start_next_cycle()
        except (h11.ProtocolError, OSError, TimeoutError, asyncio.IncompleteReadError):
            return
        finally:
            self._open -= 1
            for end in (writer, inner[1] if inner else None):
                if end is not None:
                    with contextlib.suppress(OSError):
                        end.close()

    async def _pass(
        self,
        outer: h11.Connection,
        writer: asyncio.StreamWriter,
        inner: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        request: h11.Request,
        body: bytes,
    ) -> None:
        """Send the request on, written anew, and its response back."""
        link = h11.Connection(h11.CLIENT)  # the connection is kept, each request gets a state of its own
        headers = [(k, v) for k, v in request.headers if k not in HOP and k != b"content-length"]
        headers += [(b"host", b"127.0.0.1:%d" % self._port), (b"content-length", b"%d" % len(body))]
        out = link.send(h11.Request(method=b"POST", target=request.target, headers=headers)) or b""
        out += (link.send(h11.Data(data=body)) or b"") + (link.send(h11.EndOfMessage()) or b"")
        inner[1].write(out)
        await inner[1].drain()
        while True:
            event = link.next_event()
            if event is h11.NEED_DATA:
                link.receive_data(await inner[0].read(CHUNK))
            elif isinstance(event, h11.Response):
                kept = [(k, v) for k, v in event.headers if k not in HOP or k == b"transfer-encoding"]
                writer.write(outer.send(h11.Response(status_code=event.status_code, headers=kept)) or b"")
            elif isinstance(event, h11.Data):
                writer.write(outer.send(h11.Data(data=bytes(event.data))) or b"")
                await writer.drain()
            elif isinstance(event, h11.EndOfMessage):
                writer.write(outer.send(h11.EndOfMessage()) or b"")
                await writer.drain()
                return
            elif isinstance(event, h11.ConnectionClosed):
                raise ConnectionError("SuperLink closed the connection")


def _is_passed(request: h11.Request) -> bool:
    return request.method == b"POST" and request.target in PATHS


async def _request(connection: h11.Connection, reader: asyncio.StreamReader) -> tuple[h11.Request, bytes]:
    """The next request and its body. Raises OSError when the client has gone, h11's error for what is no HTTP."""
    request: h11.Request | None = None
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await asyncio.wait_for(reader.read(CHUNK), IDLE_S))
        elif isinstance(event, h11.Request):
            request = event
            if not _is_passed(request):  # its body is not waited for
                return request, b""
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > MAX_BODY:
                raise ConnectionError("a body over the limit")
        elif isinstance(event, h11.EndOfMessage) and request is not None:
            return request, bytes(body)
        else:
            raise ConnectionError("the client has gone")


async def _refuse(connection: h11.Connection, writer: asyncio.StreamWriter, status: int) -> None:
    response = h11.Response(status_code=status, headers=[(b"content-length", b"0"), (b"connection", b"close")])
    writer.write((connection.send(response) or b"") + (connection.send(h11.EndOfMessage()) or b""))
    await writer.drain()


async def run(options: dict[str, Any]) -> None:
    """Listen until the process is stopped."""
    outer_tls = inner_tls = None
    if options["certificate"]:
        outer_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        outer_tls.minimum_version = ssl.TLSVersion.TLSv1_2
        outer_tls.load_cert_chain(options["certificate"], options["private_key"])
    if options["superlink_ca"]:
        inner_tls = ssl.create_default_context(cafile=options["superlink_ca"])
    gate = Gate(options["superlink_port"], inner_tls)
    server = await asyncio.start_server(gate.serve, options["host"], options["port"], ssl=outer_tls)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(run(json.loads(sys.argv[1])))
