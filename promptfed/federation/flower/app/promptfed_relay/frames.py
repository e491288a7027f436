"""Frames: how promptfed's processes talk to the relays. Standard library only.

A frame is a kind, a few fields (JSON) and a body of bytes that nobody on the way looks into.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from dataclasses import dataclass, field
from typing import Any

_SIZES = struct.Struct("!IQ")
MAX_HEADER = 16 * 1024 * 1024
MAX_BODY = 1024 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Frame:
    """One message between two processes of this machine, or the content of one Flower message."""

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    body: bytes = b""


def pack(frame: Frame) -> bytes:
    """The frame as bytes."""
    header = json.dumps([frame.kind, frame.fields]).encode()
    return _SIZES.pack(len(header), len(frame.body)) + header + frame.body


def send(peer: socket.socket, frame: Frame) -> None:
    """Write one frame. Raises OSError when the peer is gone."""
    peer.sendall(pack(frame))


def receive(peer: socket.socket) -> Frame | None:
    """Read one frame; None when the peer has gone. Raises ValueError for what is no frame."""
    sizes = _read(peer, _SIZES.size)
    if sizes is None:
        return None
    n_header, n_body = _check(sizes)
    header, body = _read(peer, n_header), _read(peer, n_body)
    return None if header is None or body is None else _frame(header, body)


async def read(reader: asyncio.StreamReader) -> Frame | None:
    """Read one frame; None when the peer has gone. Raises ValueError for what is no frame."""
    try:
        n_header, n_body = _check(await reader.readexactly(_SIZES.size))
        return _frame(await reader.readexactly(n_header), await reader.readexactly(n_body))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def _check(sizes: bytes) -> tuple[int, int]:
    n_header, n_body = _SIZES.unpack(sizes)
    if n_header > MAX_HEADER or n_body > MAX_BODY:
        raise ValueError(f"a frame of {n_header} and {n_body} bytes is over the limit")
    return n_header, n_body


def _frame(header: bytes, body: bytes) -> Frame:
    kind, fields = json.loads(header)
    if not isinstance(kind, str) or not isinstance(fields, dict):
        raise ValueError("not a frame")
    return Frame(kind, fields, body)


def _read(peer: socket.socket, n: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < n:
        try:
            part = peer.recv(min(n - len(parts), 1 << 20))
        except ConnectionError:
            return None
        if not part:
            return None
        parts += part
    return bytes(parts)
