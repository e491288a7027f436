"""Whole federations on hosted models of every kind, on servers that fail in every way, and on servers that go away."""

from __future__ import annotations

import csv
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

import promptfed
from promptfed import app
from promptfed.errors import PromptfedError, QuorumError
from promptfed.fm import probe
from promptfed.fm.decorators import Retrying
from promptfed.fm.openai import OpenAIFM
from tests.hosted import FAULTS, NAME, Faults, Hosted, Mood, Site
from tests.support import LABELS, WordEncoder, public_texts, sentences

CANARY = "canary7f3a"
N_CLIENTS = 4


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, and hundredths of a second between tries."""
    monkeypatch.delenv("PROMPTFED_API_KEY", raising=False)
    be_patient(monkeypatch, 0.01)


def be_patient(monkeypatch: pytest.MonkeyPatch, wait_s: float) -> None:
    monkeypatch.setattr(app, "Retrying", partial(Retrying, wait_s=wait_s))
    monkeypatch.setattr(probe, "WAITS_S", (wait_s, wait_s))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Four clients whose every text holds the canary; the public pool does not."""
    folder = tmp_path_factory.mktemp("data")
    for split, n, seed in (("train", 16, 0), ("test", 10, 50)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            out = csv.writer(file)
            out.writerow(["client", "text", "label"])
            for c in range(N_CLIENTS):
                data = sentences(n, seed + c)
                out.writerows(
                    [f"site{c}", f"{CANARY} {t}", LABELS[y]] for t, y in zip(data.texts, data.labels, strict=True)
                )
    (folder / "public.csv").write_text("\n".join(["text", *public_texts()]) + "\n")
    return {
        "data": {k: str(folder / f"{k}.csv") for k in ("train", "test", "public")},
        "task": {"instruction": "Is the review negative or positive?"},
        "budget": {"max_fm_calls": 160},
        "method": {"max_prompts": 1},  # what sets of prompts come to is computed here, for seconds
        "rounds": {"quorum": 1.0},  # a client that missed a round would make it another run
        "evaluation": {"baselines": []},
    }


def run(config: dict[str, Any], site: Site, out: Path, fm: OpenAIFM | None = None) -> promptfed.Result:
    return promptfed.run({**config, "fm": {"scorer": site.address}}, out=out, fm=fm, encoder=WordEncoder())


def resume(out: Path) -> promptfed.Result:
    return promptfed.resume(out, encoder=WordEncoder())


@dataclass(frozen=True)
class Undisturbed:
    """A run that met no fault: its folder, its result, and what the server answered."""

    folder: Path
    result: promptfed.Result
    delivered: Counter[str]
    n_requests: int


@pytest.fixture(scope="module")
def undisturbed(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mood], Undisturbed]:
    @cache
    def of(mood: Mood) -> Undisturbed:
        folder = tmp_path_factory.mktemp("undisturbed") / mood
        with Site(Hosted(mood)) as site:
            result = run(config, site, folder)
        return Undisturbed(folder, result, site.app.delivered, len(site.app.bodies))

    return of


def check_same(folder: Path, site: Site, whole: Undisturbed) -> None:
    """The same prompt; and every answer that arrived whole was paid for as often as in the run without faults."""
    assert (folder / "prompt.json").read_bytes() == (whole.folder / "prompt.json").read_bytes()
    assert site.app.delivered == whole.delivered


# ---------------------------------------------------------------- every kind of server


@pytest.mark.parametrize(
    ("mood", "kind", "least"),
    [
        ("vllm", "vllm", 0.95),
        ("completions", "completions-top5", 0.95),
        ("chat", "chat-top20", 0.95),
        ("chat-new", "chat-top20", 0.95),
        ("schema", "chat-schema", 0.9),
        ("words", "chat-words", 0.9),
    ],
)
def test_a_federation_ends_on_it_with_a_prompt_that_works(
    undisturbed: Callable[[Mood], Undisturbed], mood: Mood, kind: str, least: float
) -> None:
    whole = undisturbed(mood)
    tuning = whole.result.summary["ledger"]["tuning"]

    assert whole.result.summary["fm"].startswith(f"{kind}:{NAME}@")
    assert whole.result.summary["fm_in_process"] is False
    assert whole.result.score("fm") >= least
    assert 100 < tuning["fm_calls"] <= 160
    assert tuning["prompt_tokens"] > tuning["completion_tokens"] > 0


# ---------------------------------------------------------------- servers that fail


@pytest.mark.parametrize("mood", ["vllm", "completions", "chat"])
def test_faults_of_all_kinds_change_nothing_and_no_answer_is_paid_twice(
    config: dict[str, Any], tmp_path: Path, undisturbed: Callable[[Mood], Undisturbed], mood: Mood
) -> None:
    kinds = [fault for fault in FAULTS if fault != "slow"]
    with Site(Hosted(mood, Faults(seed=3, kinds=kinds, share=0.5))) as site:
        run(config, site, tmp_path / "run")

    check_same(tmp_path / "run", site, undisturbed(mood))
    assert sum(site.app.met.values()) > 10
    assert len(site.app.met) > 5
    assert site.app.spoilt


def test_answers_that_come_too_late_are_asked_for_again(
    config: dict[str, Any], tmp_path: Path, undisturbed: Callable[[Mood], Undisturbed]
) -> None:
    with Site(Hosted("vllm", Faults(seed=3, kinds=["slow"], share=0.1, most=1))) as site:
        run(config, site, tmp_path / "run", site.connect(timeout_s=2.0))

    check_same(tmp_path / "run", site, undisturbed("vllm"))
    assert site.app.met["slow"] > 0


@pytest.mark.parametrize("mood", ["vllm", "completions"])
def test_a_storm_pauses_the_run_and_resumed_it_comes_to_the_same(
    config: dict[str, Any], tmp_path: Path, undisturbed: Callable[[Mood], Undisturbed], mood: Mood
) -> None:
    folder = tmp_path / "run"
    storm = Faults(seed=5, kinds=["429", "502", "503", "cut", "cut within"], share=0.75, most=7)
    pauses: list[PromptfedError] = []
    with Site(Hosted(mood, storm)) as site:
        try:
            run(config, site, folder)
        except PromptfedError as error:
            pauses.append(error)
        while not (folder / "summary.json").exists() and len(pauses) < 50:
            try:
                resume(folder)
            except PromptfedError as error:
                pauses.append(error)

    check_same(folder, site, undisturbed(mood))
    assert any(isinstance(pause, QuorumError) for pause in pauses)


# ---------------------------------------------------------------- servers that go away


def test_a_server_that_restarts_is_waited_for(
    config: dict[str, Any],
    tmp_path: Path,
    undisturbed: Callable[[Mood], Undisturbed],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    be_patient(monkeypatch, 0.2)  # 3 s in all
    site = Site(Hosted("chat", down_at=100))

    def restart() -> None:
        site.wait_until_down()
        time.sleep(0.3)
        site.start()

    with site:
        operator = threading.Thread(target=restart)
        operator.start()
        run(config, site, tmp_path / "run")
        operator.join()

    assert site.app.down_at is None
    check_same(tmp_path / "run", site, undisturbed("chat"))


@pytest.mark.parametrize(("mood", "down_at"), [("vllm", 40), ("completions", 110)])
def test_a_server_that_stays_away_pauses_the_run_until_it_is_back(
    config: dict[str, Any], tmp_path: Path, undisturbed: Callable[[Mood], Undisturbed], mood: Mood, down_at: int
) -> None:
    folder = tmp_path / "run"
    site = Site(Hosted(mood, down_at=down_at))
    site.start()
    with pytest.raises(QuorumError, match="promptfed resume"):
        run(config, site, folder)
    site.wait_until_down()
    with pytest.raises(PromptfedError, match="no OpenAI-compatible server answers"):
        resume(folder)
    with site:
        resume(folder)

    check_same(folder, site, undisturbed(mood))


def test_a_server_that_is_another_when_it_is_back_is_refused_before_anything_is_paid(
    config: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    site = Site(Hosted("chat", down_at=100))
    site.start()
    with pytest.raises(QuorumError):
        run(config, site, folder)
    site.wait_until_down()
    delivered = Counter(site.app.delivered)
    site.app.mood = "schema"  # the same model, without log-probabilities
    with site, pytest.raises(PromptfedError, match="came out differently"):
        resume(folder)

    assert site.app.delivered == delivered


# ---------------------------------------------------------------- what is never said


def test_texts_that_a_server_quotes_are_nowhere(
    config: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    said: list[str] = []
    folder = tmp_path / "run"
    quoting = Faults(seed=2, kinds=["400", "429", "500", "html", "choices", "truncated"], share=0.6)
    site = Site(Hosted("chat", quoting, down_at=130))
    site.start()
    with pytest.raises(PromptfedError) as caught:
        run(config, site, folder)
    site.wait_until_down()
    chain: BaseException | None = caught.value
    while chain is not None:
        said.append(f"{chain!r} {chain}")
        chain = chain.__cause__ or (None if chain.__suppress_context__ else chain.__context__)

    assert any(CANARY in str(body) for body in site.app.bodies)
    assert site.app.met.keys() == set(quoting.kinds)
    assert CANARY not in " ".join([*said, caplog.text, *capfd.readouterr()])
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert {"config.toml", "events.jsonl"} <= {path.name for path in written}
    assert not [path for path in written if CANARY.encode() in path.read_bytes()]
