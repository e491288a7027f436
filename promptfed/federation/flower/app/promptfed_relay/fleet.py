"""promptfed's own SuperNode: a process that takes messages from SuperLink and hands them to the client's daemon.

It stands where `flower-supernode` does (same Fleet API, keys and heartbeats, through Flower's own connection), but asks
every fraction of a second instead of every three, starts no process for a message, and never fetches or runs the app
that the server submitted: a client runs no code but its own.

The daemon gets `connected` (node), `refused` or `unreachable`, then content frames, each of which it answers with one.
This process ends when the daemon closes its end, or when any call to SuperLink fails: the daemon starts it again. A
message whose way to us broke off counts as delivered at SuperLink; it is the new sign-in that makes the server send it
once more. So nothing is tried twice here.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.run import RunNotRunningException
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.fleet_http_connection import http_request_response
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from . import frames
from .frames import Frame
from .pace import Pace
from .records import from_content, to_content


class DaemonGoneError(Exception):
    """The daemon has closed its end."""


class Node:
    """One connection to SuperLink, with what it takes to answer its messages."""

    def __init__(self, connection: Any, daemon: socket.socket) -> None:
        _, self._receive, self._send, _, _, self._pull_object, self._push_object, self._confirm = connection
        self._daemon = daemon

    def serve(self) -> None:
        """Answer messages, one at a time. Raises DaemonGoneError at the end, or what Flower's connection raises."""
        pace = Pace()
        while True:
            try:
                if (received := self._receive()) is not None:
                    self._answer(*received)
                    pace.happened()
                    continue
            except (RunNotRunningException, ObjectPullError):
                pass  # the run has ended since, or the message was withdrawn: nobody waits for this reply
            if select.select([self._daemon], [], [], pace.pause())[0]:
                raise DaemonGoneError  # it says nothing unasked

    def _answer(self, head: Message, tree: Any) -> None:
        run, name = head.metadata.run_id, head.metadata.message_id
        contents = pull_objects(
            [part.object_id for part in iterate_object_tree(tree)],
            partial(self._pull_object, run),
            initial_backoff=0.02,  # the server may still be uploading
            backoff_cap=0.5,
            max_time=300,
        )
        self._confirm(run, name)
        message = cast(Message, inflate_object_from_contents(name, contents))
        message.metadata.__dict__["_message_id"] = name
        begun = time.monotonic()
        try:
            answer = self._ask(from_content(message.content))
        except ValueError:
            answer = Frame("reply", {"status": "failed"})
        reply = Message(to_content(answer), reply_to=message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute():
            parts = get_all_nested_objects(reply)
            wanted, session = self._send(reply, get_object_tree(reply), time.monotonic() - begun)
            push_objects(parts, partial(self._push_object, run, session), object_ids_to_push=wanted)

    def _ask(self, task: Frame) -> Frame:
        try:
            frames.send(self._daemon, task)
            reply = frames.receive(self._daemon)
        except OSError as error:
            raise DaemonGoneError from error
        if reply is None:
            raise DaemonGoneError
        return reply


def _leave(options: dict[str, Any], keys: tuple[Any, Any]) -> None:
    """Sign off the node that an earlier process of this client was, should it have been killed: SuperLink would take
    it for online for another minute, and refuse us until then."""
    interceptors: list[Any] = [
        RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        NodeAuthHttpInterceptor(*keys),
    ]
    server, insecure, root = options["server"], options["insecure"], options["root_certificates"]
    with (
        contextlib.suppress(httpx.HTTPError, RuntimeError),
        FleetHttpClient.from_server_address(server, insecure, root, interceptors=interceptors) as client,
    ):
        client.DeactivateNode(DeactivateNodeRequest(node_id=options["last_node"]))


def _keys(path: str | None) -> tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey] | None:
    if path is None:
        return None
    key = load_ssh_private_key(Path(path).read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not an elliptic-curve key")
    return key, key.public_key()


def _why(stop: BaseException) -> str:
    """Whether SuperLink said no, or was not there: Flower leaves the process either way, with the same code."""
    cause: BaseException | None = stop
    while cause is not None and not isinstance(cause, httpx.HTTPError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, httpx.HTTPStatusError) and cause.response.status_code < 500:
        return "refused"
    if isinstance(cause, httpx.ConnectError) and "certificate" in str(cause).lower():
        return "untrusted"
    return "unreachable"


def main() -> None:
    """Options come as JSON in the first argument; `fd` is the open socket to the daemon."""
    options = json.loads(sys.argv[1])
    daemon = socket.socket(fileno=options["fd"])
    keys, connected = _keys(options["key"]), False
    if keys is not None and options["last_node"] is not None:
        _leave(options, keys)
    try:
        with http_request_response(
            options["server"],
            options["insecure"],
            options["root_certificates"],
            keys,
            max_retries=0,
        ) as connection:
            connected = True
            frames.send(daemon, Frame("connected", {"node": connection[0]}))
            Node(connection, daemon).serve()
    except DaemonGoneError:
        return
    except SystemExit as stop:
        if not connected:
            frames.send(daemon, Frame(_why(stop)))
        raise


if __name__ == "__main__":
    main()
