"""What `promptfed serve` would start on made-up machines, and what it does with a server that comes up, hangs or dies.

The process here is a few lines of Python in vLLM's place: the real one is tests/vllm's.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from promptfed.errors import ConfigError, FMError
from promptfed.fm.vllm_server import Launch, Machine, find_vllm, plan, run_server, this_machine
from promptfed.fm.weights import cache_folder, file_digest
from promptfed.ports import free_port

GIB = 2**30
LAPTOP = Machine(cores=(0, 1), memory_bytes=24 * GIB, bfloat16=True)
OLD = Machine(cores=(0, 2, 4), memory_bytes=4 * GIB, bfloat16=False)


def planned(model: Path, machine: Machine, distribution: str = "vllm", **more: object) -> Launch:
    return plan(
        str(model),
        machine,
        python=Path("py"),
        distribution=distribution,
        port=8700,
        **more,  # type: ignore[arg-type]
    )


def value(launch: Launch, flag: str, n: int = 1) -> list[str]:
    at = launch.command.index(flag)
    return list(launch.command[at + 1 : at + 1 + n])


# ---------------------------------------------------------------- the command


def test_a_model_is_served_on_this_machine_under_its_name_and_its_digest(tiny_llama: Path) -> None:
    launch = planned(tiny_llama, LAPTOP)

    name = tiny_llama.name
    digest = file_digest(tiny_llama / "model.safetensors")
    assert value(launch, "--served-model-name", 2) == [name, f"{name}@{digest}"]
    assert value(launch, "--host") == ["127.0.0.1"]
    assert launch.address == f"openai:http://127.0.0.1:8700/v1#{name}"


def test_a_cpu_gets_all_cores_short_blocks_and_an_eighth_of_the_memory(tiny_llama: Path) -> None:
    laptop, old = planned(tiny_llama, LAPTOP), planned(tiny_llama, OLD)

    assert laptop.variables["VLLM_CPU_OMP_THREADS_BIND"] == "0,1"
    assert laptop.variables["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert value(laptop, "--block-size") == ["32"]
    assert value(laptop, "--dtype") == ["bfloat16"]
    assert old.variables["VLLM_CPU_OMP_THREADS_BIND"] == "0,2,4"
    assert old.variables["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert value(old, "--dtype") == ["float32"]


@pytest.mark.parametrize(
    ("n_gpus", "gib", "split", "copies"),
    [(1, 24, "1", "1"), (4, 24, "1", "4"), (4, 12, "2", "2"), (8, 6, "4", "2"), (1, 6, "1", "1"), (3, 12, "2", "1")],
)
def test_gpus_split_what_one_does_not_hold_and_hold_copies_else(
    n_gpus: int, gib: int, split: str, copies: str, tmp_path: Path
) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(14 * GIB)  # a hole: no bytes on the disk
    machine = Machine(cores=(0,), memory_bytes=GIB, bfloat16=True, gpu_bytes=(gib * GIB,) * n_gpus)

    launch = _planned_by_size(tmp_path, machine)

    assert value(launch, "--tensor-parallel-size") == [split]
    assert value(launch, "--data-parallel-size") == [copies]
    assert "--block-size" not in launch.command


def _planned_by_size(folder: Path, machine: Machine) -> Launch:
    """`plan` without reading 14 GiB for their digest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("promptfed.fm.vllm_server.find_weights", lambda _: (folder, "0" * 12))
        return planned(folder, machine)


def test_vllm_cpu_is_started_by_its_module_and_vllm_by_its_command(tiny_llama: Path) -> None:
    assert planned(tiny_llama, LAPTOP, "vllm-cpu").command[:4] == (
        "py",
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
    )
    assert planned(tiny_llama, LAPTOP, "vllm").command[:4] == ("py", "-m", "vllm.entrypoints.cli.main", "serve")


def test_soft_prompts_are_let_in_only_when_asked_for_and_more_comes_last(tiny_llama: Path) -> None:
    plain, soft = planned(tiny_llama, LAPTOP), planned(tiny_llama, LAPTOP, soft_prompts=True, more=["--seed", "3"])

    assert "--enable-prompt-embeds" not in plain.command
    assert "--enable-prompt-embeds" in soft.command
    assert soft.command[-2:] == ("--seed", "3")


def test_the_printed_command_can_be_run_by_a_shell_and_holds_no_key(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMPTFED_API_KEY", "s3cret")
    launch = planned(tiny_llama, LAPTOP)

    words = shlex.split(launch.as_shell())

    assert words[-len(launch.command) :] == list(launch.command)
    assert "VLLM_CPU_OMP_THREADS_BIND=0,1" in words
    assert "s3cret" not in launch.as_shell()


def test_this_machine_has_cores_and_memory() -> None:
    machine = this_machine()

    assert set(machine.cores) == os.sched_getaffinity(0)
    assert machine.memory_bytes > GIB


def test_an_interpreter_without_vllm_is_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ConfigError, match=r"no vLLM in .*make vllm-cpu.*embedded:NAME"):
        find_vllm(None)
    with pytest.raises(ConfigError, match="no vLLM in nowhere/python"):
        find_vllm(Path("nowhere/python"))


# ---------------------------------------------------------------- the process

SERVER = """
import http.server, sys
print("loading", flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PROMPTFED_CACHE", str(tmp_path / "cache"))


def launch_of(code: str, port: int) -> Launch:
    command = (sys.executable, "-c", code, str(port))
    return Launch(command=command, variables={}, url=f"http://127.0.0.1:{port}/v1", name="m", digest="d")


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
            return True
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_says_when_it_serves_and_stops_with_all_it_started(number: signal.Signals) -> None:
    port = free_port()
    said: list[str] = []

    def tell(line: str) -> None:
        said.append(line)
        if line.startswith("serving"):
            assert answers(port)
            threading.Timer(0.3, os.kill, (os.getpid(), number)).start()

    before = signal.getsignal(number)
    run_server(launch_of(SERVER, port), wait_s=20, tell=tell)

    assert said[-1] == f"serving vllm:m@d as openai:http://127.0.0.1:{port}/v1#m, without API key; Ctrl-C stops"
    assert not answers(port)
    assert signal.getsignal(number) is before
    log = cache_folder() / f"vllm-{port}.log"
    assert log.read_text().startswith("loading")
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_server_that_dies_before_it_serves_is_told_with_its_last_words() -> None:
    with pytest.raises(FMError, match=r"ended with code 7 before it served(.|\n)*no such flag"):
        run_server(launch_of("print('no such flag'); raise SystemExit(7)", free_port()), wait_s=20, tell=str)


def test_a_server_that_dies_later_is_told_without_its_words() -> None:
    port = free_port()
    code = SERVER.replace("serve_forever()", "handle_request(); print('canary text'); raise SystemExit(9)")

    with pytest.raises(FMError, match="ended by itself") as caught:
        run_server(launch_of(code, port), wait_s=20, tell=str)

    assert "canary" not in str(caught.value)


def test_a_server_that_does_not_come_up_is_stopped() -> None:
    port = free_port()
    start = time.monotonic()
    with pytest.raises(FMError, match=r"does not answer after 1 s \(--wait\)"):
        run_server(launch_of("import time; time.sleep(60)", port), wait_s=1, tell=str)

    assert time.monotonic() - start < 20
    left = subprocess.run(["pgrep", "-f", f"sleep.60.* {port}$"], check=False, capture_output=True, text=True)
    assert left.stdout == ""
