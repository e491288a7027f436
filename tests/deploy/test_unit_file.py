"""deploy/promptfed-fm.service: systemd accepts it, and its own commands start, await and end a server."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from tests.deploy.test_nginx import free_port

pytestmark = pytest.mark.nginx

UNIT = Path(__file__).parents[2] / "deploy" / "promptfed-fm.service"


def options() -> dict[str, list[str]]:
    """Each option of the unit with its values, in order."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in UNIT.read_text().splitlines():
        if line and line[0] not in "#[":
            name, value = line.split("=", 1)
            found[name].append(value)
    return found


def one(name: str) -> str:
    (value,) = options()[name]
    return value


@dataclass(frozen=True)
class Service:
    """The unit's server as a process, and the command that waits for it, both at a port of this test's."""

    process: subprocess.Popen[str]
    wait: list[str]
    environment: dict[str, str]
    url: str

    def wait_for_start(self) -> int:
        return subprocess.run(self.wait, check=False, env=self.environment, timeout=60).returncode


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """What systemd would start, as it would start it: the unit's environment, an environment file, no shell."""
    home, port = str(tmp_path), str(free_port())
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(UNIT.parents[1])}
    for line in options()["Environment"]:
        environment |= dict(pair.split("=", 1) for pair in shlex.split(line.replace("/var/lib/promptfed-fm", home)))
    environment |= {"MODEL": "scripted:overlap", "PROMPTFED_API_KEY": "s3cret"}
    program, *words = one("ExecStart").replace("8700", port).split()
    assert program == "/opt/promptfed-fm/bin/promptfed"
    command = [word.replace("${MODEL}", environment["MODEL"]) for word in words if word != "$SERVE_OPTIONS"]
    assert len(command) == len(words) - 1
    with subprocess.Popen(
        [sys.executable, "-m", "promptfed.cli", *command],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait = shlex.split(one("ExecStartPost").replace("8700", port))
        try:
            yield Service(process, wait, environment | {"MAINPID": str(process.pid)}, f"http://127.0.0.1:{port}")
        finally:
            process.kill()


def test_a_start_ends_when_the_model_answers_and_a_stop_is_clean(service: Service) -> None:
    started = service.wait_for_start()
    models = [
        httpx2.get(f"{service.url}/v1/models", headers=headers, trust_env=False).status_code
        for headers in ({}, {"Authorization": "Bearer s3cret"})
    ]
    service.process.send_signal(signal.Signals[one("KillSignal")])
    _, errors = service.process.communicate(timeout=int(one("TimeoutStopSec")))

    assert started == 0
    assert models == [401, 200]
    assert (service.process.returncode, errors) == (0, "")


def test_a_start_ends_when_the_server_has_died(service: Service) -> None:
    service.process.kill()
    service.process.wait()

    assert service.wait_for_start() == 1


def test_what_a_restart_does_not_mend_is_not_restarted(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "promptfed.cli", "serve", "no-such-kind:x", "--port", str(free_port())]
    environment = os.environ | {"PYTHONPATH": str(UNIT.parents[1])}

    tried = subprocess.run(command, check=False, capture_output=True, env=environment, cwd=tmp_path)

    assert one("Restart") == "on-failure"
    assert one("RestartPreventExitStatus") == str(tried.returncode)


def test_the_server_is_kept_on_loopback_and_its_caches_in_its_own_folder() -> None:
    found = options()
    environment = " ".join(found["Environment"]).split()
    state = f"/var/lib/{one('StateDirectory')}"

    assert "--host 127.0.0.1 --port 8700" in one("ExecStart")
    assert (found["IPAddressDeny"], found["IPAddressAllow"]) == (["any"], ["localhost"])
    assert {f"HOME={state}", f"XDG_CACHE_HOME={state}/cache"} <= set(environment)
    assert one("WorkingDirectory") == state
    assert (one("User"), one("StateDirectoryMode"), one("LimitCORE")) == ("promptfed-fm", "0700", "0")
    assert not any("KEY=" in line for line in environment)


def test_systemd_accepts_every_line_and_finds_little_exposed(tmp_path: Path) -> None:
    tool = shutil.which("systemd-analyze")
    assert tool, "this test needs systemd-analyze (Debian: apt-get install systemd)"
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/promptfed-fm/bin/promptfed", sys.executable))

    verified = subprocess.run([tool, "verify", "--man=no", str(unit)], check=False, capture_output=True, text=True)
    # From 0 (nothing) to 100; a service without any protection has 96.
    rated = subprocess.run(
        [tool, "security", "--offline=true", "--threshold=20", "--no-pager", str(unit)],
        check=False,
        capture_output=True,
    )

    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")
    assert rated.returncode == 0
