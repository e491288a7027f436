"""A round over Flower: how long it takes beyond the clients' own time, where that goes, and bytes against the ledger.

    .venv-flower/bin/python benchmarks/network.py [--clients 5] [--rounds 10] [--insecure]

Clients are in this process and answer at once; server, gate, SuperLink and SuperNodes are processes, with TLS and keys
unless --insecure. Prints JSON: seconds a round, CPU seconds a round by kind of process, and the envelope: what Flower
counts beside the bytes of tasks and replies, a message each way. It is measured on small messages; what Flower counts
for larger ones is then compared with the ledger's bytes and that envelope.
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

from promptfed.federation.flower.certificates import make_node_key, make_server_certificate
from promptfed.federation.flower.node import serve_node
from promptfed.federation.flower.settings import Listen
from promptfed.federation.flower.transport import FlowerTransport
from promptfed.ports import free_port

KINDS = ("flower-superlink", "flower-superexec", "flwr-serverapp", "promptfed_relay.gate", "promptfed_relay.fleet")
OURS = "engine and clients"
SIZES = (500, 2_000, 20_000)  # bytes of a task, and of its reply
WAYS = ("up", "down")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--insecure", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="promptfed-rounds-") as folder:
        measured = asyncio.run(measure(Path(folder), args.clients, args.rounds, insecure=args.insecure))
    print(json.dumps({"secure": not args.insecure, "load": round(os.getloadavg()[0], 1), **measured}, indent=2))


async def measure(folder: Path, n_clients: int, n_rounds: int, *, insecure: bool) -> dict[str, Any]:
    ids = [f"c{i}" for i in range(n_clients)]
    listen, options = security(folder, ids, insecure=insecure)

    async def handle(task: bytes) -> bytes:
        return task

    start = perf_counter()
    async with FlowerTransport(listen, folder / "server") as transport:
        up_s = perf_counter() - start
        nodes = [
            asyncio.create_task(serve_node(handle, client_id=c, server=listen.address, folder=folder / c, **options[c]))
            for c in ids
        ]
        await transport.wait_for_clients(ids, 120)
        joined_s = perf_counter() - start - up_s
        used = cpu_seconds(str(folder))
        counted: dict[int, tuple[float, float]] = {}
        seconds: dict[int, list[float]] = {}
        for n_bytes in SIZES:
            before = await transport.traffic()
            seconds[n_bytes] = [await timed_round(transport, ids, b"x" * n_bytes) for _ in range(n_rounds)]
            after = await transport.traffic()
            up, down = ((b - a) / (n_clients * n_rounds) for a, b in zip(before, after, strict=True))
            counted[n_bytes] = up, down
        used = {kind: s - used[kind] for kind, s in cpu_seconds(str(folder)).items()}
        for node in nodes:
            node.cancel()
        await asyncio.gather(*nodes, return_exceptions=True)
    small = SIZES[0]
    envelope = [c - small for c in counted[small]]
    return {
        "clients": n_clients,
        "rounds": n_rounds,
        "server_up_s": round(up_s, 1),
        "clients_joined_s": round(joined_s, 1),
        "round_s": {
            n_bytes: {"median": round(statistics.median(s), 2), "max": round(max(s), 2)}
            for n_bytes, s in seconds.items()
        },
        "cpu_s_a_round": {kind: round(s / n_rounds / len(SIZES), 3) for kind, s in used.items()},
        "envelope_bytes_a_message": dict(zip(WAYS, map(round, envelope), strict=True)),
        "counted_over_ledger_and_envelope": {
            n_bytes: {
                way: round(c / (n_bytes + e), 3) for way, c, e in zip(WAYS, counted[n_bytes], envelope, strict=True)
            }
            for n_bytes in SIZES[1:]
        },
    }


async def timed_round(transport: FlowerTransport, ids: list[str], task: bytes) -> float:
    begun = perf_counter()
    replies = await transport.exchange(dict.fromkeys(ids, task), ids, 120)
    if replies != dict.fromkeys(ids, task):
        raise RuntimeError(f"{len(replies)} of {len(ids)} clients answered")
    return perf_counter() - begun


def security(folder: Path, ids: list[str], *, insecure: bool) -> tuple[Listen, dict[str, dict[str, Any]]]:
    """Where the server listens, and each client's options."""
    address = f"127.0.0.1:{free_port()}"
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
