"""What the round engine costs beside the foundation model: many clients in one process, on the scripted FM.

    python benchmarks/engine_scale.py [--clients 10 100 1000 10000] [--rounds 10]

Prints JSON: seconds for the rounds, milliseconds a client and round, and the memory that an idle client takes. Every
client scores one more text in every round, and tasks and replies are serialised as always.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import tracemalloc
from collections.abc import Sequence
from time import perf_counter

import numpy as np

from clients.client import Client
from clients.data import ClientData, Labelled
from promptfed.federation.events import EventLog
from promptfed.federation.inprocess import InProcessTransport
from promptfed.federation.server import Server
from promptfed.fm.base import BaseFM
from promptfed.fm.decorators import Pooled
from promptfed.fm.scripted import ScriptedFM
from promptfed.ledger import Ledger
from promptfed.messages import Ask
from promptfed.prompts.template import PromptTemplate
from promptfed.strategies.base import Round, Steps
from promptfed.types import FloatArray

LABELS = ("negative", "positive")
PROMPT = PromptTemplate(text="Text: a good day\nLabel: positive\n\nText: {text}\nLabel:", words=LABELS)


class NoEncoder:
    """Clients here have no use for vectors."""

    encoder_id = "none"

    def encode(self, texts: Sequence[str]) -> FloatArray:
        return np.zeros((len(texts), 1))


def a_client(number: int, fm: BaseFM, encoder: NoEncoder, n_texts: int) -> Client:
    texts = tuple(f"text {i} of client {number}" for i in range(n_texts))
    train = Labelled(texts=texts, labels=np.arange(n_texts) % 2)
    empty = Labelled(texts=(), labels=np.zeros(0, dtype=np.int64))
    return Client(ClientData(client_id=f"c{number:05d}", train=train, test=empty), LABELS, fm, encoder, seed=1)


def asking(clients: Sequence[str], n_rounds: int) -> Steps[None]:
    """A method that asks everybody about one more text in every round."""
    for stop in range(1, n_rounds + 1):
        yield Round(
            name="ask",
            tasks=dict.fromkeys(clients, Ask(prompts=(PROMPT,), stop=stop)),
            grants=dict.fromkeys(clients, 1),
        )


def measure(n_clients: int, n_rounds: int) -> dict[str, float]:
    fm, encoder = Pooled(ScriptedFM()), NoEncoder()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    clients = {c.client_id: c for c in (a_client(i, fm, encoder, n_rounds) for i in range(n_clients))}
    idle = (tracemalloc.get_traced_memory()[0] - before) / n_clients
    tracemalloc.stop()
    server = Server(InProcessTransport(clients), Ledger(), EventLog())
    start = perf_counter()
    asyncio.run(server.drive(asking(list(clients), n_rounds), "tuning", n_clients * n_rounds))
    seconds = perf_counter() - start
    return {
        "n_clients": n_clients,
        "n_rounds": n_rounds,
        "seconds": round(seconds, 3),
        "ms_a_client_and_round": round(1000 * seconds / (n_clients * n_rounds), 4),
        "bytes_an_idle_client": round(idle),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000, 10000])
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    rows = [measure(n, args.rounds) for n in args.clients]
    print(
        json.dumps(
            {"machine": {"platform": platform.platform(), "python": platform.python_version()}, "rows": rows}, indent=2
        )
    )


if __name__ == "__main__":
    main()
