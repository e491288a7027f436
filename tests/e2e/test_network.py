"""A federation over a network with real processes: a server and five clients with keys, over Flower and TLS."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from promptfed.config import load_config
from promptfed.errors import QuorumError
from promptfed.network import search
from promptfed.runs import compare_runs
from retrieval.documents import Document
from retrieval.index import LocalIndex
from tests.place import CANARY, SITES, Place, RealPlace, cli
from tests.support import WordEncoder, sentences

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


def test_below_the_quorum_on_the_way_is_a_pause_and_the_end_is_that_of_an_undisturbed_run(place: Place) -> None:
    place.start_server("paused", "rounds.deadline_s=15")
    for site in SITES:
        place.start_client(site, "paused", slow_s=0.5)
    place.wait_for_round("paused", 4)
    for site in SITES[:3]:
        place.kill(site)
    said = place.wait_for_end("paused", 100, code=3)
    place.stop()

    assert "promptfed resume" in " ".join(said.split())
    assert "Traceback" not in said
    place.begin("paused")
    place.wait_for_end("paused")
    place.stop()
    assert place.outcome("paused") == place.outcome("calm")
    assert place.calls("paused") == place.calls("calm")


def test_a_client_that_comes_late_takes_part_from_then_on(place: Place) -> None:
    place.start_server("late", "network.wait_s=15", "rounds.deadline_s=60")
    for site in SITES[:4]:
        place.start_client(site, "late", slow_s=0.5)
    place.wait_for_round("late", 3)
    place.start_client("site4", "late")
    place.wait_for_end("late")
    place.stop()

    asked = [e for e in place.events("late") if e.get("phase") == "tuning" and e["name"] in ("vote", "ask", "score")]
    (joined,) = (e for e in place.events("late") if e["kind"] == "joined")
    assert joined["client"] == "site4"
    assert {e["n_clients"] for e in asked if e["round"] <= joined["round"]} == {4}
    assert {e["n_clients"] for e in asked if e["round"] > joined["round"] + 1} == {5}
    summary = json.loads((place.folder / "late" / "summary.json").read_text())
    assert (summary["n_clients"], summary["absent"]) == (5, [])
    assert "site4" in summary["metrics"]["accuracy"]["fm"]["by_client"]


def test_the_clients_indices_are_searched_over_the_network(place: Place) -> None:
    """Each owner shares what its policy says; one is killed, and costs its own hits only."""
    shares = dict(zip(SITES, ("documents", "documents", "snippets", "scores", "nothing"), strict=True))
    central = LocalIndex(WordEncoder())
    for i, site in enumerate(SITES):
        texts = sentences(20, seed=90 + i, n_words=3).texts
        mine = [
            Document(doc_id=f"{site}/{n}", text=f"{t} of {CANARY}{site}") for n, t in enumerate(dict.fromkeys(texts))
        ]
        index = LocalIndex(WordEncoder())
        index.add(mine)
        index.save(place.folder / f"{site}-index")
        place.start_client(site, "asked", index=place.folder / f"{site}-index", share=shares[site])
        if shares[site] == "documents":
            central.add(mine)
    query = sentences(1, seed=90, n_words=3).texts[0]
    config = load_config(place.folder / "server.toml")

    found = search(config, [query], 30, encoder=WordEncoder(), folder=place.folder / "asking", deadline_s=60)
    place.kill("site1")
    start = time.monotonic()
    fewer = search(config, [query], 5, encoder=WordEncoder(), deadline_s=20, wait_s=25)
    took = time.monotonic() - start
    place.stop()
    with pytest.raises(QuorumError, match="0 of 5 clients came within 1 s"):
        search(config, [query], 5, encoder=WordEncoder(), wait_s=1)

    (hits,) = found.hits
    assert found.silent == ()
    assert {h.owner for h in hits} == set(SITES) - {"site4"}
    shown = [h for h in hits if shares[h.owner] == "documents"]
    distinct = {h.text: h.score for h in reversed(central.search([query], 40)[0])}
    assert [h.score for h in shown] == pytest.approx(sorted(distinct.values(), reverse=True)[: len(shown)], abs=1e-5)
    assert all(f"{CANARY}{h.owner}" in h.text for h in shown)
    assert all(h.text == "" and h.doc_id.startswith("#") for h in hits if h.owner == "site3")
    assert fewer.silent == ("site1",)
    assert took < 60  # of which it waited 25 s for the dead one, and Flower's own start is some 10 s
    assert {h.owner for h in fewer.hits[0]} <= {"site0", "site2", "site3"}
    logs = b"".join(path.read_bytes() for path in place.folder.glob("asked-*.log"))
    assert CANARY.encode() not in logs
    assert query.encode() not in logs


BAD_SERVER, BAD_CLIENT = ["server", "server.toml", "--out", "bad"], ["client", "--id", "site0", "--insecure"]
AT = ["--server", "127.0.0.1:9", "--fm", "scripted:overlap"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([*BAD_SERVER, "--set", "data.train=site0-train.csv"], "train"),
        ([*BAD_SERVER, "--set", "network.certificate=none.pem"], "no such file: {folder}/none.pem"),
        ([*BAD_SERVER, "--set", "network.private_key=keys/site0"], "no certificate and its private key"),
        ([*BAD_SERVER, "--set", "network.listen=nowhere"], "expected HOST:PORT"),
        ([*BAD_SERVER, "--set", "fm.scorer=scripted:overlap"], "fm"),
        ([*BAD_CLIENT, "--data", "none.csv", *AT], "none.csv: no such file"),
        ([*BAD_CLIENT, *AT], "this client has no text"),
        ([*BAD_CLIENT, "--data", "public.csv", *AT], "no column 'label'"),
        ([*BAD_CLIENT, "--data", "site0-train.csv", "--label-column", "y", *AT], "no column 'y'"),
        ([*BAD_CLIENT, "--data", "site0-train.csv", "--server", "9", "--fm", "scripted:overlap"], "expected HOST:PORT"),
        ([*BAD_CLIENT, "--data", "site0-train.csv", "--server", "127.0.0.1:9", "--fm", "magic:8"], "unknown FM kind"),
        ([*BAD_CLIENT, "--data", "site0-train.csv", "--key", "none", *AT], "drop one or the other"),
        ([*BAD_CLIENT, "--data", "site0-train.csv", "--share", "documents", *AT], "--share is about an index"),
        (
            [*BAD_CLIENT, "--data", "site0-train.csv", "--index", "x", "--max-centroid-epsilon", "1", *AT],
            "more than max_epsilon = 1",
        ),
        (["search", "server.toml", "x", "-k", "10001"], "expected 1 to 10,000"),
        (["search", "server.toml", "x", "--mode", "lexical"], "needs the query's text: use send='text'"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_connected(place: Place, args: list[str], says: str) -> None:
    done = cli(*args, cwd=place.folder, timeout=60)

    assert done.returncode == 2, done.stderr
    assert says.format(folder=place.folder) in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert CANARY not in done.stderr + done.stdout


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
