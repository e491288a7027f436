"""The ClientApp, for those who run Flower's own SuperNodes: hands a message to the client's daemon, and its reply back.

Flower starts a process for every message, which takes seconds; `fleet` takes less.
"""

from __future__ import annotations

import socket

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from .frames import Frame, receive, send
from .records import from_content, to_content


def relay(message: Message, context: Context) -> Message:
    """Ask the daemon whose unix socket the node's configuration names (`daemon`). It never raises: Flower would send
    the text of the exception to the server."""
    answer = Frame("reply", {"status": "failed"})
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as daemon:
            daemon.connect(str(context.node_config["daemon"]))
            send(daemon, from_content(message.content))
            answer = receive(daemon) or answer
    except (OSError, ValueError, KeyError):
        pass
    return Message(to_content(answer), reply_to=message)


app = ClientApp()
app.query("promptfed")(relay)
