"""Starting and stopping the processes that Flower is made of."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from promptfed.errors import ConfigError, RunError

APP = Path(__file__).parent / "app"
STOP_S = 8.0
PASSED_ON = ("HOME", "LANG", "LC_", "LD_LIBRARY_PATH", "SSL_CERT_", "SYSTEMROOT", "TMPDIR", "TZ", "VIRTUAL_ENV")


def check_flower() -> None:
    """Raises ConfigError when Flower's commands are not beside this interpreter."""
    if not command("flower-superlink").exists():
        raise ConfigError("a federation over a network needs Flower: make .venv-flower/setup.done (docs/deploy.md)")


def command(name: str) -> Path:
    """One of Flower's commands, as installed beside this interpreter."""
    return Path(sys.executable).parent / name


def environment(folder: Path) -> dict[str, str]:
    """What Flower's processes get: its files under ``folder``, no telemetry, no search for updates, no installing, and
    of our own variables only what names the machine: no key of a model's provider."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)} | {
        "PATH": path,
        "PYTHONPATH": str(APP),
        "FLWR_HOME": str(folder / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    }


async def start(
    args: Sequence[str | Path], folder: Path, log: str, pass_fds: Sequence[int] = ()
) -> asyncio.subprocess.Process:
    """Start a process whose output is appended to ``folder/log``. It is asked to stop when this process dies."""
    with (folder / log).open("ab") as out:
        return await asyncio.create_subprocess_exec(
            *[sys.executable, "-I", "-S", str(APP / "promptfed_relay" / "tied.py"), str(os.getpid())],
            *map(str, args),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=environment(folder),
            pass_fds=pass_fds,
        )


def module(name: str, options: str) -> list[str | Path]:
    """The command line of a relay's module, whose options are one JSON text."""
    return [sys.executable, "-m", f"promptfed_relay.{name}", options]


async def stop(process: asyncio.subprocess.Process | None) -> None:
    """Ask a process to end, and kill it if it does not within a few seconds."""
    if process is None or process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_S)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def until_listening(process: asyncio.subprocess.Process, port: int, what: str, timeout_s: float = 60) -> None:
    """Wait until something accepts connections at the loopback ``port``. Raises RunError if the process ends before."""
    end = asyncio.get_running_loop().time() + timeout_s
    while asyncio.get_running_loop().time() < end:
        if process.returncode is not None:
            raise RunError(f"{what} ended with code {process.returncode} at its start; its log is in the run's folder")
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        await asyncio.sleep(0.1)
    raise RunError(f"{what} did not come up within {timeout_s:g} s; its log is in the run's folder")


async def until_free(host: str, port: int, timeout_s: float = 10) -> None:
    """Wait until one can listen there: what listened for a process that was killed may need a moment to end. Raises
    RunError with the system's reason."""
    end = asyncio.get_running_loop().time() + timeout_s
    while True:
        try:
            with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
                return
        except OSError as error:
            if asyncio.get_running_loop().time() >= end:
                raise RunError(f"can't listen at {host}:{port}: {error.strerror or type(error).__name__}") from None
        await asyncio.sleep(0.2)


def socket_path(folder: Path, name: str) -> Path:
    """Where a unix socket goes: into ``folder``, or, if that path is too long for one, into a private temporary one."""
    path = folder.resolve() / name
    return path if len(os.fsencode(path)) < 100 else Path(tempfile.mkdtemp(prefix="promptfed-")) / name
