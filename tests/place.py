"""A whole federation over a network in one folder, as real processes: a server, five clients with keys, Flower, TLS.

For tests and for benchmarks; needs the extra `flower`. The clients of `Place` are `tests.party`, which has no weights;
those of `RealPlace` are promptfed's own, with real texts and models.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import promptfed
from promptfed.federation.events import read_events, timeless
from promptfed.fm.scripted import ScriptedFM
from promptfed.ports import free_port
from tests.support import WordEncoder, demo_rows, public_texts, sentences

ROOT = Path(__file__).parent.parent
SITES = tuple(f"site{i}" for i in range(5))
CANARY = "zanzibar4711"  # and the site: in every text of that site
NAMES = ("negative", "positive")
BUDGET = 600


def cli(*args: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """promptfed's command line, run to its end."""
    command = [sys.executable, "-m", "promptfed.cli", *map(str, args)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment, **more)


@dataclass
class Place:
    """Everything of one federation in one folder, as if on many machines."""

    folder: Path
    port: int = field(default_factory=free_port)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    budget: int = BUDGET
    instruction: str = "Is the review negative or positive?"

    def write_data(self) -> None:
        """A training and a test file for each site, and the public texts."""
        for i, site in enumerate(SITES):
            for part, n, seed in (("train", 30, i), ("test", 10, 50 + i)):
                data = sentences(n, seed, n_words=2)
                rows = [[f"{t} {CANARY}{site}", NAMES[y]] for t, y in zip(data.texts, data.labels, strict=True)]
                self.write_csv(f"{site}-{part}.csv", [["text", "label"], *rows])
        self.write_csv("public.csv", [["text"], *([t] for t in public_texts(n_words=2))])

    def write_csv(self, name: str, rows: list[list[str]]) -> None:
        with (self.folder / name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows)

    def prepare(self) -> None:
        """Data, keys and the server's configuration, made with promptfed's own commands."""
        self.write_data()
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
instruction = "{self.instruction}"
[budget]
max_fm_calls = {self.budget}
[evaluation]
baselines = ["zero_shot"]
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
            "task": {"labels": list(NAMES), "instruction": self.instruction},
            "budget": {"max_fm_calls": self.budget},
            "evaluation": {"baselines": ["zero_shot"]},
        }
        return promptfed.run(config, out=self.folder / "simulated", **self.models)

    @property
    def models(self) -> dict[str, Any]:
        """What the simulation asks in place of the configured models."""
        return {"fm": ScriptedFM(), "encoder": WordEncoder()}

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

    def start_server(self, run: str, *changes: str) -> None:
        """Begin ``run`` with keys of the configuration changed, or go on with it."""
        begun = (self.folder / run / "config.toml").exists()
        changed = [arg for change in changes for arg in ("--set", change)]
        args = ["resume", run] if begun else ["server", "server.toml", "--out", run, *changed]
        self._start("server", f"{run}-server.log", "-m", "promptfed.cli", *args)

    def begin(self, run: str, **more: Any) -> None:
        """Start the server and every client."""
        self.start_server(run)
        for site in SITES:
            self.start_client(site, run, **more.get(site, {}))

    def undisturbed(self, run: str, timeout_s: float = 200) -> None:
        """A whole run."""
        try:
            self.begin(run)
            self.wait_for_end(run, timeout_s)
        finally:
            self.stop()

    def _start(self, name: str, log: str, *args: str, **variables: str) -> None:
        with (self.folder / log).open("ab") as out:
            threads = {} if name == "fm" else {"OMP_NUM_THREADS": "1"}
            environment = os.environ | {"PYTHONPATH": str(ROOT)} | threads | variables
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

    def wait_for_end(self, run: str, timeout_s: float = 200, code: int = 0) -> str:
        """Until the server ends, with exit ``code``; what it said."""
        got = self.running.pop("server").wait(timeout_s)
        said = (self.folder / f"{run}-server.log").read_text()
        assert got == code, said
        return said

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


@dataclass
class RealPlace(Place):
    """The demo's texts, `promptfed client` at every site, and one embedded FM behind `promptfed serve` with a key."""

    n_train: int = 60
    n_test: int = 20
    n_public: int = 100
    budget: int = 300
    instruction: str = "Classify the sentiment of the text."
    fm_port: int = field(default_factory=free_port)

    def write_data(self) -> None:
        for part, most in (("train", self.n_train), ("test", self.n_test)):
            of_client: dict[str, list[dict[str, str]]] = {}
            for row in demo_rows(part):
                of_client.setdefault(row["client"], []).append(row)
            for site, client in zip(SITES, sorted(of_client), strict=True):
                rows = [[row["text"], row["label"]] for row in of_client[client][:most]]
                self.write_csv(f"{site}-{part}.csv", [["text", "label"], *rows])
        self.write_csv("public.csv", [["text"], *([row["text"]] for row in demo_rows("public")[: self.n_public])])

    @property
    def models(self) -> dict[str, Any]:
        return {}

    def begin(self, run: str, **more: Any) -> None:
        self.start_fm()
        super().begin(run, **more)

    def start_fm(self, timeout_s: float = 120) -> None:
        args = ["serve", "embedded:smollm2-135m-instruct", "--port", str(self.fm_port)]
        self._start("fm", "fm.log", "-m", "promptfed.cli", *args, **KEY)
        end = time.monotonic() + timeout_s
        while "serving" not in (self.folder / "fm.log").read_text():
            assert self.running["fm"].poll() is None, (self.folder / "fm.log").read_text()
            assert time.monotonic() < end, "promptfed serve did not come up"
            time.sleep(0.2)

    def start_client(self, site: str, run: str, **more: Any) -> None:
        options = {
            "data": f"{site}-train.csv",
            "test": f"{site}-test.csv",
            "id": site,
            "server": f"127.0.0.1:{self.port}",
            "fm": f"openai:http://127.0.0.1:{self.fm_port}/v1#smollm2-135m-instruct",
            "folder": f"{run}-{site}",
            "key": f"keys/{site}",
            "root-certificates": "keys/ca.pem",
        }
        args = [part for name, value in options.items() for part in (f"--{name}", value)]
        self._start(site, f"{run}-{site}.log", "-m", "promptfed.cli", "client", *args, **KEY)

    def gather(self, run: str) -> Path:
        """A folder with every client's results of ``run``, as a simulation keeps them."""
        gathered = self.folder / f"{run}-gathered"
        (gathered / "clients").mkdir(parents=True)
        for site in SITES:
            (evaluation,) = (self.folder / f"{run}-{site}").glob("*/evaluation")
            (gathered / "clients" / site).symlink_to(evaluation.parent)
        return gathered


KEY = {"PROMPTFED_API_KEY": "for-this-place-only"}
