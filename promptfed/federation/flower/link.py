"""SuperLink, the gate before it, and the app that runs on it: the server's half of Flower, as child processes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from promptfed.errors import RunError
from promptfed.federation.flower import processes
from promptfed.federation.flower.certificates import make_loopback_certificate
from promptfed.federation.flower.settings import Listen
from promptfed.ports import free_port

SEPARATOR = "\x1e"  # as in promptfed_relay.commands
CONNECTION = "promptfed"  # what Flower's configuration file calls this SuperLink


class Link:
    """One SuperLink and its gate. Nothing outlives it: SuperLink keeps its state in memory, the engine has its own.

    SuperLink listens at a loopback port of its own. All its APIs share it, and the one that starts runs and registers
    keys asks nobody who they are: so clients only reach the gate, which lets the Fleet API through.
    """

    def __init__(self, listen: Listen, folder: Path) -> None:
        self._listen, self._folder = listen, folder
        self._port = free_port()
        self._superlink: asyncio.subprocess.Process | None = None
        self._gate: asyncio.subprocess.Process | None = None
        self._ca: Path | None = None

    async def start(self) -> None:
        """Start both. The gate opens when the clients' keys are registered. Raises RunError when they don't come up."""
        (self._folder / "flwr").mkdir(parents=True, exist_ok=True)
        args: list[str | Path] = [
            processes.command("flower-superlink"),
            "--host",
            "127.0.0.1",
            "--port",
            f"{self._port}",
        ]
        connection = [f'[superlink]\ndefault = "{CONNECTION}"\n', f"[superlink.{CONNECTION}]"]
        connection.append(f'address = "127.0.0.1:{self._port}"')
        if self._listen.insecure:
            args.append("--insecure")
            connection.append("insecure = true")
        else:
            inner = make_loopback_certificate(self._folder / "loopback")
            self._ca = inner.ca.resolve()
            args += ["--ssl-ca-certfile", self._ca, "--ssl-certfile", inner.certificate.resolve()]
            args += ["--ssl-keyfile", inner.private_key.resolve(), "--enable-supernode-auth"]
            connection.append(f"root-certificates = {json.dumps(str(self._ca))}")
        (self._folder / "flwr" / "config.toml").write_text("\n".join(connection) + "\n", encoding="utf-8")
        self._superlink = await processes.start(args, self._folder, "superlink.log")
        await processes.until_listening(self._superlink, self._port, "flower-superlink")
        await self._register()
        await self._open_gate()

    async def submit(self, engine: Path) -> int:
        """Submit the app, whose relay will connect to the unix socket ``engine``; returns the run's id."""
        config = f"engine={json.dumps(str(engine))}"
        (out,) = await self._flwr(["run", str(processes.APP), CONNECTION, "--run-config", config, "--format", "json"])
        return int(_json(out)["run-id"])

    async def traffic(self, run: int) -> tuple[int, int]:
        """Bytes that Flower counts for a run: from the nodes, to the nodes."""
        (out,) = await self._flwr(["list", CONNECTION, "--run-id", str(run), "--format", "json"])
        counts = _json(out)["runs"][0]["network-traffic"]
        return int(counts["inbound-bytes"]), int(counts["outbound-bytes"])

    async def died(self) -> None:
        """Return when one of the processes has ended."""
        running = [asyncio.create_task(p.wait()) for p in (self._superlink, self._gate) if p is not None]
        try:
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in running:
                task.cancel()

    async def stop(self) -> None:
        """Stop both processes."""
        await asyncio.gather(processes.stop(self._gate), processes.stop(self._superlink))

    async def _register(self) -> None:
        keys = [str(key.resolve()) for _, key in sorted(self._listen.clients.items())]
        if keys:
            await self._flwr(*(["supernode", "register", key, CONNECTION] for key in keys))

    async def _open_gate(self) -> None:
        certificate, key = self._listen.certificate, self._listen.private_key
        options = {
            "host": self._listen.host,
            "port": self._listen.port,
            "certificate": str(certificate.resolve()) if certificate else None,
            "private_key": str(key.resolve()) if key else None,
            "superlink_port": self._port,
            "superlink_ca": str(self._ca) if self._ca else None,
        }
        await processes.until_free(self._listen.host, self._listen.port)
        self._gate = await processes.start(processes.module("gate", json.dumps(options)), self._folder, "gate.log")
        if self._listen.local:
            await processes.until_listening(self._gate, self._listen.port, f"the gate at {self._listen.address}")

    async def _flwr(self, *commands: list[str]) -> list[str]:
        """What Flower's own command line prints. Raises RunError with its last line when a command fails."""
        process = await asyncio.create_subprocess_exec(
            *map(str, processes.module("commands", json.dumps(commands))),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=processes.environment(self._folder),
        )
        try:
            out, err = await process.communicate()
        finally:
            await processes.stop(process)
        if process.returncode:
            lines = err.decode(errors="replace").strip().splitlines() or ["no message"]
            raise RunError(f"flwr {' '.join(commands[0][:2])} failed: {lines[-1]}")
        return out.decode().split(SEPARATOR)[:-1]


def _json(text: str) -> dict[str, Any]:
    """The JSON object in what a command printed, among other lines. Raises RunError when there is none."""
    try:
        found: dict[str, Any] = json.loads(text[text.index("{") :])
    except ValueError:
        raise RunError("flwr printed something unexpected; is this the tested version of Flower?") from None
    return found
