"""A federation over a network with real processes: a server and five clients with keys, over Flower and TLS."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from promptfed.runs import compare_runs
from tests.place import CANARY, SITES, Place, RealPlace, cli

pytestmark = [pytest.mark.network, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A federation that has run once, undisturbed."""
    place = Place(tmp_path_factory.mktemp("network"))
    place.prepare()
    place.undisturbed("calm")
    try:
        yield place
    finally:
        place.stop()


def test_the_result_is_that_of_the_simulation_byte_for_byte(place: Place) -> None:
    simulated = place.simulate()

    prompt, metrics = place.outcome("calm")

    assert prompt == (place.folder / "simulated" / "prompt.json").read_bytes()
    assert metrics == simulated.summary["metrics"]
    summary = json.loads((place.folder / "calm" / "summary.json").read_text())
    assert (summary["n_clients"], summary["absent"]) == (len(SITES), [])
    assert summary["encoder"] == simulated.summary["encoder"]


def test_what_a_client_keeps_is_with_the_client_and_no_text_is_with_the_server(place: Place) -> None:
    (own,) = (place.folder / "calm-site0").glob("*/calibration.json")
    served = [p for p in (place.folder / "calm").rglob("*") if p.is_file()]

    assert (own.parent / "evaluation" / "fm.json").exists()
    assert not (place.folder / "calm" / "clients").exists()
    assert len(served) > 20
    assert [p for p in [*served, place.folder / "calm-server.log"] if CANARY.encode() in p.read_bytes()] == []
    for site in SITES:
        others = [p for p in place.folder.glob("calm-*/**/*") if p.is_file() and f"calm-{site}" not in str(p)]
        logs = list(place.folder.glob("calm-*.log"))
        assert len(others) > 50
        assert [p for p in [*others, *logs] if f"{CANARY}{site}".encode() in p.read_bytes()] == []


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
    place.begin("rough", site1={"slow_s": 0.5})

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


def test_a_run_that_has_ended_is_gone_through_again_without_clients(place: Place) -> None:
    before = place.outcome("calm"), place.events("calm")

    done = cli("resume", "calm", cwd=place.folder, timeout=60)

    assert done.returncode == 0, done.stderr
    assert (place.outcome("calm"), place.events("calm")) == before


@pytest.mark.parametrize(
    ("key", "told"),
    [("stranger", "refuses this client"), ("site1", "knows this key, but not as 'site0'")],
    ids=["unknown", "another's"],
)
def test_a_client_with_a_key_that_is_not_its_own_is_told_and_leaves(place: Place, key: str, told: str) -> None:
    place.start_server(f"guarded-{key}")
    args = ["--data", "site0-train.csv", "--id", "site0", "--server", f"127.0.0.1:{place.port}"]
    security = ["--key", f"keys/{key}", "--root-certificates", "keys/ca.pem", "--fm", "scripted:overlap"]

    done = cli("client", *args, *security, "--folder", f"not-{key}", cwd=place.folder, timeout=200)

    place.stop()
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert CANARY not in done.stderr + done.stdout


def test_too_few_clients_is_a_pause_that_says_who_is_missing(place: Place) -> None:
    place.start_client("site0", "few")
    args = ["server", "server.toml", "--out", "few", "--set", "network.wait_s=15"]

    done = cli(*args, cwd=place.folder, timeout=100)

    place.stop()
    assert done.returncode == 3
    assert "missing: site1, site2, site3, site4" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


@pytest.mark.timeout(900)
def test_with_real_models_the_result_is_that_of_the_simulation_within_a_few_texts(tmp_path: Path) -> None:
    """The FM's last digits depend on the batch. `benchmarks/network_fm.py` measures more calls and texts."""
    place = RealPlace(tmp_path)
    place.prepare()
    place.undisturbed("real", 600)

    simulated = place.simulate()

    network = json.loads((place.folder / "real" / "summary.json").read_text())
    assert network["fm"] == simulated.summary["fm"]
    assert network["ledger"]["tuning"]["fm_calls"] == simulated.summary["ledger"]["tuning"]["fm_calls"]
    assert simulated.score() > 0.7
    paired = compare_runs([place.gather("real")], [place.folder / "simulated"])
    assert paired.n_texts == 100
    assert abs(paired.difference) <= 0.03
    logs = [p.read_text() for p in place.folder.glob("*.log")]
    with (place.folder / "site0-train.csv").open(encoding="utf-8", newline="") as file:
        middles = [row["text"][10:40] for row in csv.DictReader(file) if len(row["text"]) >= 40]
    assert len(middles) > 20
    assert [log for log in logs if any(part in log for part in [*middles, "for-this-place-only"])] == []
