"""A federation over a network with real processes: a server and five clients with keys, over Flower and TLS."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

import promptfed
from promptfed.federation.events import read_events, timeless
from promptfed.federation.flower.processes import free_port
from promptfed.fm.scripted import ScriptedFM
from tests.support import WordEncoder, public_texts, sentences

pytestmark = [pytest.mark.network, pytest.mark.timeout(400)]

SITES = tuple(f"site{i}" for i in range(5))
CANARY = "zanzibar4711"
NAMES = ("negative", "positive")
BUDGET = 600


def cli(*args: object, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "promptfed.cli", *map(str, args)]
    return subprocess.run(command, check=False, capture_output=True, text=True, **more)


@dataclass
class Place:
    """Everything of one federation in one folder, as if on many machines."""

    folder: Path
    port: int = field(default_factory=free_port)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def prepare(self) -> None:
        """Data, keys and the server's configuration, made with promptfed's own commands."""
        for i, site in enumerate(SITES):
            for part, n, seed in (("train", 30, i), ("test", 10, 50 + i)):
                data = sentences(n, seed, n_words=2)
                with (self.folder / f"{site}-{part}.csv").open("w", newline="") as file:
                    rows = [[f"{t} {CANARY}", NAMES[y]] for t, y in zip(data.texts, data.labels, strict=True)]
                    csv.writer(file).writerows([["text", "label"], *rows])
        with (self.folder / "public.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["text"], *([t] for t in public_texts(n_words=2))])
        assert cli("keys", "server", "127.0.0.1", "--out", self.folder / "keys").returncode == 0
        for name in (*SITES, "stranger"):
            assert cli("keys", "client", name, "--out", self.folder / "keys").returncode == 0
        keys = "\n".join(f'{site} = "keys/{site}.pub"' for site in SITES)
        (self.folder / "server.toml").write_text(
            f"""seed = 3
[data]
public = "public.csv"
[task]
labels = ["negative", "positive"]
instruction = "Is the review negative or positive?"
[fm]
scorer = "scripted:overlap"
[budget]
max_fm_calls = {BUDGET}
[evaluation]
baselines = ["zero_shot", "local_only"]
[network]
listen = "127.0.0.1:{self.port}"
certificate = "keys/server.pem"
private_key = "keys/server.key"
wait_s = 90
[network.clients]
{keys}
"""
        )

    def simulate(self) -> promptfed.Result:
        """The same run in this process."""
        clients = [
            {"id": s, "train": str(self.folder / f"{s}-train.csv"), "test": str(self.folder / f"{s}-test.csv")}
            for s in SITES
        ]
        config = {
            "seed": 3,
            "clients": clients,
            "data": {"public": str(self.folder / "public.csv")},
            "task": {"labels": list(NAMES), "instruction": "Is the review negative or positive?"},
            "budget": {"max_fm_calls": BUDGET},
            "evaluation": {"baselines": ["zero_shot", "local_only"]},
        }
        return promptfed.run(config, out=self.folder / "simulated", fm=ScriptedFM(), encoder=WordEncoder())

    def start_client(self, site: str, run: str, **more: Any) -> None:
        options = {
            "client_id": site,
            "train": self.folder / f"{site}-train.csv",
            "test": self.folder / f"{site}-test.csv",
            "folder": self.folder / f"{run}-{site}",
            "calls": self.folder / f"{run}-{site}-calls.txt",
            "server": f"127.0.0.1:{self.port}",
            "root_certificates": self.folder / "keys" / "ca.pem",
            "private_key": self.folder / "keys" / site,
            **more,
        }
        self._start(site, f"{run}-{site}.log", "-m", "tests.party", json.dumps(options, default=str))

    def start_server(self, run: str) -> None:
        begun = (self.folder / run / "config.toml").exists()
        args = ["resume", run] if begun else ["server", "server.toml", "--out", run]
        self._start("server", f"{run}-server.log", "-m", "promptfed.cli", *args)

    def _start(self, name: str, log: str, *args: str) -> None:
        root = Path(__file__).parent.parent.parent
        with (self.folder / log).open("ab") as out:
            environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
            self.running[name] = subprocess.Popen(
                [sys.executable, *args], stdout=out, stderr=out, cwd=self.folder, env=environment
            )

    def kill(self, name: str) -> None:
        self.running[name].send_signal(signal.SIGKILL)
        self.running.pop(name).wait()

    def wait_for_round(self, run: str, number: int, timeout_s: float = 120) -> None:
        end = time.monotonic() + timeout_s
        log = self.folder / run / "events.jsonl"
        while time.monotonic() < end:
            assert self.running["server"].poll() is None, (self.folder / f"{run}-server.log").read_text()
            if log.exists() and f'"round": {number},' in log.read_text():
                return
            time.sleep(0.1)
        raise AssertionError(f"round {number} did not come: " + (self.folder / f"{run}-server.log").read_text())

    def wait_for_end(self, run: str, timeout_s: float = 200) -> None:
        code = self.running.pop("server").wait(timeout_s)
        assert code == 0, (self.folder / f"{run}-server.log").read_text()

    def stop(self) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
        self.running.clear()

    def outcome(self, run: str) -> tuple[bytes, dict[str, Any]]:
        summary = json.loads((self.folder / run / "summary.json").read_text())
        return (self.folder / run / "prompt.json").read_bytes(), summary["metrics"]

    def events(self, run: str) -> list[dict[str, Any]]:
        return list(map(timeless, read_events(self.folder / run / "events.jsonl")))

    def calls(self, run: str) -> int:
        files = self.folder.glob(f"{run}-*-calls.txt")
        return sum(int(line) for file in files for line in file.read_text().split())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A federation that has run once, undisturbed."""
    place = Place(tmp_path_factory.mktemp("network"))
    place.prepare()
    try:
        place.start_server("calm")
        for site in SITES:
            place.start_client(site, "calm")
        place.wait_for_end("calm")
        place.stop()
        yield place
    finally:
        place.stop()


def test_the_result_is_that_of_the_simulation_byte_for_byte(place: Place) -> None:
    simulated = place.simulate()

    prompt, metrics = place.outcome("calm")

    assert prompt == (place.folder / "simulated" / "prompt.json").read_bytes()
    assert metrics == simulated.summary["metrics"]


def test_what_a_client_keeps_is_with_the_client_and_no_text_is_with_the_server(place: Place) -> None:
    (own,) = (place.folder / "calm-site0").glob("*/calibration.json")
    served = [p for p in (place.folder / "calm").rglob("*") if p.is_file()]

    assert (own.parent / "evaluation" / "fm.json").exists()
    assert not (place.folder / "calm" / "clients").exists()
    assert len(served) > 20
    assert [p for p in [*served, place.folder / "calm-server.log"] if CANARY.encode() in p.read_bytes()] == []
    for log in place.folder.glob("calm-*.log"):
        assert CANARY not in log.read_text()


def test_the_books_are_those_of_the_simulation(place: Place) -> None:
    network, simulated = (
        json.loads((place.folder / run / "summary.json").read_text())["ledger"] for run in ("calm", "simulated")
    )

    for phase in ("tuning", "evaluation", "baselines"):
        assert network[phase]["fm_calls"] == simulated[phase]["fm_calls"]
        assert network[phase]["bytes_up"] == pytest.approx(simulated[phase]["bytes_up"], rel=0.01)
    # Texts that a client holds twice are asked once and booked twice.
    booked = sum(network[phase]["fm_calls"] for phase in network)
    assert 0.8 * booked < place.calls("calm") <= booked


def test_killed_slow_and_returning_partners_change_nothing(place: Place) -> None:
    place.start_server("rough")
    for site in SITES:
        place.start_client(site, "rough", slow_s=0.5 if site == "site1" else 0.0)

    place.wait_for_round("rough", 4)
    place.kill("site2")
    place.start_client("site2", "rough")
    place.wait_for_round("rough", 8)
    place.kill("server")
    time.sleep(1.0)
    place.start_server("rough")
    place.wait_for_round("rough", 12)
    place.kill("site4")
    place.kill("server")
    place.start_client("site4", "rough")
    place.start_server("rough")
    place.wait_for_end("rough")
    place.stop()

    assert place.outcome("rough") == place.outcome("calm")
    assert place.events("rough") == place.events("calm")
    assert place.calls("rough") == place.calls("calm")  # nothing was paid for twice


def test_a_client_with_a_key_that_the_server_does_not_know_is_told_and_leaves(place: Place) -> None:
    place.start_server("guarded")
    args = ["--data", "site0-train.csv", "--id", "site0", "--server", f"127.0.0.1:{place.port}"]
    security = ["--key", "keys/stranger", "--root-certificates", "keys/ca.pem", "--fm", "scripted:overlap"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent)}

    done = cli("client", *args, *security, "--folder", "stranger", cwd=place.folder, env=environment, timeout=200)

    place.stop()
    assert done.returncode == 2
    assert "refuses this client" in done.stderr
    assert "Traceback" not in done.stderr
    assert CANARY not in done.stderr + done.stdout


def test_too_few_clients_is_a_pause_that_says_who_is_missing(place: Place) -> None:
    place.start_client("site0", "few")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    args = ["server", "server.toml", "--out", "few", "--set", "network.wait_s=15"]

    done = cli(*args, cwd=place.folder, env=environment, timeout=100)

    place.stop()
    assert done.returncode == 3
    assert "missing: site1, site2, site3, site4" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
