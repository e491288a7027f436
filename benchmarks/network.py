"""A round over Flower: how long it takes beyond the clients' own time, where that goes, and bytes against the ledger.

    .venv-flower/bin/python benchmarks/network.py [--clients 5] [--rounds 10] [--bytes 2000] [--insecure]

Clients are in this process and answer at once; server, gate, SuperLink and SuperNodes are processes, with TLS and keys
unless --insecure. Prints JSON: seconds a round, CPU seconds a round by kind of process, and what Flower counts beside
the bytes of tasks and replies (the envelope), a message each way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from promptfed.federation.flower import processes
from promptfed.federation.flower.certificates import make_node_key, make_server_certificate
from promptfed.federation.flower.node import serve_node
from promptfed.federation.flower.settings import Listen
from promptfed.federation.flower.transport import FlowerTransport

KINDS = ("flower-superlink", "flower-superexec", "flwr-serverapp", "promptfed_relay.gate", "promptfed_relay.fleet")
OURS = "engine and clients"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--bytes", type=int, default=2000)
    parser.add_argument("--insecure", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="promptfed-rounds-") as folder:
        measured = asyncio.run(measure(Path(folder), args.clients, args.rounds, args.bytes, insecure=args.insecure))
    print(json.dumps({"secure": not args.insecure, "load": round(os.getloadavg()[0], 1), **measured}, indent=2))


async def measure(folder: Path, n_clients: int, n_rounds: int, n_bytes: int, *, insecure: bool) -> dict[str, Any]:
    ids = [f"c{i}" for i in range(n_clients)]
    listen, options = security(folder, ids, insecure=insecure)

    async def handle(_task: bytes) -> bytes:
        return b"y" * n_bytes

    start = perf_counter()
    async with FlowerTransport(listen, folder / "server") as transport:
        up_s = perf_counter() - start
        nodes = [
            asyncio.create_task(serve_node(handle, client_id=c, server=listen.address, folder=folder / c, **options[c]))
            for c in ids
        ]
        await transport.wait_for_clients(ids, 120)
        joined_s = perf_counter() - start - up_s
        counted, used, seconds = await transport.traffic(), cpu_seconds(str(folder)), []
        for _ in range(n_rounds):
            begun = perf_counter()
            replies = await transport.exchange(dict.fromkeys(ids, b"x" * n_bytes), ids, 120)
            seconds.append(perf_counter() - begun)
            if len(replies) != n_clients:
                raise RuntimeError(f"{len(replies)} of {n_clients} clients answered")
        after, counted_after = cpu_seconds(str(folder)), await transport.traffic()
        for node in nodes:
            node.cancel()
        await asyncio.gather(*nodes, return_exceptions=True)
    n_messages = n_clients * n_rounds
    envelope = {
        way: round((counted_after[i] - counted[i]) / n_messages) - n_bytes for i, way in enumerate(("up", "down"))
    }
    return {
        "clients": n_clients,
        "rounds": n_rounds,
        "bytes": n_bytes,
        "server_up_s": round(up_s, 1),
        "clients_joined_s": round(joined_s, 1),
        "median_s": round(statistics.median(seconds), 2),
        "max_s": round(max(seconds), 2),
        "round_s": [round(s, 2) for s in seconds],
        "cpu_s_a_round": {kind: round((after[kind] - used[kind]) / n_rounds, 3) for kind in after},
        "envelope_bytes_a_message": envelope,
        "counted_over_ours": {way: round((n_bytes + envelope[way]) / n_bytes, 3) for way in envelope},
    }


def security(folder: Path, ids: list[str], *, insecure: bool) -> tuple[Listen, dict[str, dict[str, Any]]]:
    """Where the server listens, and each client's options."""
    address = f"127.0.0.1:{processes.free_port()}"
    if insecure:
        return Listen(address=address, insecure=True), {c: {"insecure": True} for c in ids}
    files = make_server_certificate(folder / "tls", ["127.0.0.1"])
    keys = {c: make_node_key(folder / "keys" / c) for c in ids}
    listen = Listen(address=address, certificate=files.certificate, private_key=files.private_key, clients=keys)
    return listen, {c: {"root_certificates": files.ca, "private_key": folder / "keys" / c} for c in ids}


def cpu_seconds(folder: str) -> dict[str, float]:
    """CPU seconds so far of the processes that work in ``folder``, by kind, and of this one."""
    used = dict.fromkeys((*KINDS, OURS), 0.0)
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            environment = (process / "environ").read_bytes().decode(errors="replace")
            fields = (process / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended, or is somebody else's
            continue
        seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        kind = OURS if process.name == str(os.getpid()) else next((k for k in KINDS if k in line), None)
        if kind is not None and (kind == OURS or folder in environment):
            used[kind] += seconds
    return used


if __name__ == "__main__":
    main()
