"""The network guard of conftest.py works: else every other test could reach out unseen."""

from __future__ import annotations

import socket

import pytest


def test_an_outside_address_is_refused_before_a_packet_leaves() -> None:
    with socket.socket() as outside, pytest.raises(AssertionError, match="network"):
        outside.connect(("192.0.2.1", 80))


def test_an_outside_name_is_not_resolved() -> None:
    with pytest.raises(AssertionError, match="network"):
        socket.create_connection(("example.org", 80))


def test_loopback_connects() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        client.connect(server.getsockname())

        assert client.getpeername() == server.getsockname()
