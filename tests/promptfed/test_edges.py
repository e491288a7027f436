"""Inputs at the edge of what makes sense, which must succeed, say so in the report, and leak nothing."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import promptfed
from promptfed.errors import RunError
from promptfed.fm.base import BaseFM
from promptfed.fm.embedded import EmbeddedFM
from promptfed.fm.scripted import ScriptedFM
from promptfed.types import FMRequest, FMResponse, LabelRequest
from tests.support import WordEncoder, public_texts, sentences

NAMES = ("negative", "positive")


def rows_of(n_clients: int, n: int, seed: int = 0) -> list[list[str]]:
    out = []
    for c in range(n_clients):
        data = sentences(n, seed + c, n_words=2)
        out += [[f"site{c:03d}", t, NAMES[y]] for t, y in zip(data.texts, data.labels, strict=True)]
    return out


def configured(
    folder: Path, train: Sequence[Sequence[str]], test: Sequence[Sequence[str]], **more: Any
) -> dict[str, Any]:
    for name, rows in (("train", train), ("test", test), ("public", [["", t, ""] for t in public_texts(n_words=2)])):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["client", "text", "label"], *rows])
    return {
        "data": {k: str(folder / f"{k}.csv") for k in ("train", "test", "public")},
        "task": {"labels": list(NAMES), "instruction": "Is the review negative or positive?"},
        "budget": {"max_fm_calls": 600},
        "evaluation": {"baselines": []},
        **more,
    }


def run(config: dict[str, Any], out: Path, fm: BaseFM | None = None) -> promptfed.Result:
    return promptfed.run(config, out=out, fm=fm or ScriptedFM(), encoder=WordEncoder())


def test_one_client(tmp_path: Path) -> None:
    result = run(configured(tmp_path, rows_of(1, 60), rows_of(1, 20, 50)), tmp_path / "run")

    assert result.summary["n_clients"] == 1
    assert result.score() > 0.7


def test_a_client_with_two_rows_stays_near_the_pooled_calibration(tmp_path: Path) -> None:
    train = [*rows_of(3, 30), ["tiny", "The film seemed wonderful.", "positive"], ["tiny", "A stale cast.", "negative"]]

    result = run(configured(tmp_path, train, rows_of(3, 10, 50)), tmp_path / "run")

    own = json.loads((tmp_path / "run" / "clients" / "tiny" / "calibration.json").read_text())
    assert own["weights"] == pytest.approx(result.prompt.weights, rel=0.5)
    assert own["bias"] == pytest.approx(result.prompt.bias, abs=0.5)


def test_two_hundred_clients(tmp_path: Path) -> None:
    config = configured(tmp_path, rows_of(200, 6), rows_of(20, 2, 500), budget={"max_fm_calls": 2500})

    result = run(config, tmp_path / "run")

    assert result.summary["n_clients"] == 200
    assert result.summary["ledger"]["tuning"]["fm_calls"] <= 2500
    assert "200 clients tuned" in (tmp_path / "run" / "report.html").read_text()


def test_a_client_of_one_label_and_one_without_held_out_texts(tmp_path: Path) -> None:
    cheerful = [["site002", t, y] for _, t, y in rows_of(1, 40, 7) if y == "positive"]

    result = run(configured(tmp_path, [*rows_of(2, 30), *cheerful], rows_of(2, 10, 50)), tmp_path / "run")

    assert set(result.summary["metrics"]["accuracy"]["fm"]["by_client"]) == {"site000", "site001"}


def test_empty_texts_are_dropped_and_counted_in_the_report(tmp_path: Path) -> None:
    train = [*rows_of(2, 30), ["site000", "", "positive"], ["site001", "   ", "negative"]]

    result = run(configured(tmp_path, train, [*rows_of(2, 10, 50), ["site001", "", "positive"]]), tmp_path / "run")

    assert result.summary["n_dropped_texts"] == 3
    assert "Texts dropped when the data were read: 3." in (tmp_path / "run" / "report.html").read_text()


def test_a_text_of_100_kilobytes_is_cut_to_the_models_context_and_counted_in_the_report(tmp_path: Path) -> None:
    long = ["site000", "A wonderful film and a stale story. " * 2900, "positive"]
    config = configured(tmp_path, rows_of(2, 20), [*rows_of(2, 2, 50), long], budget={"max_fm_calls": 150})

    result = run(config, tmp_path / "run", EmbeddedFM("smollm2-135m-instruct"))

    assert result.summary["metrics"]["accuracy"]["fm"]["by_client"]["site000"]["n"] == 3
    n_prompts = len(result.prompt.prompts)
    assert result.summary["ledger"]["evaluation"]["truncated_calls"] == n_prompts
    report = (tmp_path / "run" / "report.html").read_text()
    assert f"cut short because the text was too long: {n_prompts}." in report


# ---------------------------------------------------------------- foundation models that misbehave


class Odd(BaseFM):
    """The scripted model; ``spoil`` says what becomes of the answer to the i-th text it ever saw."""

    fm_id = "odd@0"
    capabilities = ScriptedFM().capabilities

    def __init__(self, spoil: Any) -> None:
        self._inner, self._spoil = ScriptedFM(), spoil

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        answers = await self._inner.complete(requests)
        return [self._spoil(r, a) if isinstance(r, LabelRequest) else a for r, a in zip(requests, answers, strict=True)]


def is_odd(request: LabelRequest) -> bool:
    return sum(request.text.encode()) % 2 == 1


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> promptfed.Result:
    folder = tmp_path_factory.mktemp("undisturbed")
    return run(configured(folder, rows_of(3, 30), rows_of(3, 10, 50)), folder / "run")


@pytest.mark.parametrize(
    "bad",
    [
        lambda _n: FMResponse(error="refused"),
        lambda n: FMResponse(logprobs=(float("nan"),) * n),
        lambda n: FMResponse(logprobs=(float("-inf"), *(0.0,) * (n - 1))),
    ],
    ids=["refused", "nan", "infinite"],
)
def test_half_of_the_items_refused_is_a_worse_run_and_not_a_wrong_one(
    tmp_path: Path, bad: Callable[[int], FMResponse], undisturbed: promptfed.Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("promptfed.app.Retrying", lambda fm: fm)
    config = configured(tmp_path, rows_of(3, 30), rows_of(3, 10, 50))
    fm = Odd(lambda r, a: bad(len(r.labels)) if is_odd(r) else a)

    result = run(config, tmp_path / "run", fm)

    assert 0.4 < result.score() < undisturbed.score()
    assert result.summary["metrics"]["accuracy"]["fm"]["by_client"]["site000"]["n"] == 10
    tuning = result.summary["ledger"]["tuning"]
    assert 0.3 < tuning["failed_calls"] / tuning["fm_calls"] < 0.7
    assert "FM calls that failed: " in (tmp_path / "run" / "report.html").read_text()


def test_a_model_that_fails_altogether_is_a_pause_with_words(tmp_path: Path) -> None:
    def down(_request: LabelRequest, _answer: FMResponse) -> FMResponse:
        raise ConnectionError("connection refused by fm.example.org")

    config = configured(tmp_path, rows_of(3, 30), rows_of(3, 10, 50))
    with pytest.raises(RunError, match=r"ConnectionError.*promptfed resume"):
        run(config, tmp_path / "run", Odd(down))

    # Mended, the run goes on from where it was.
    result = promptfed.resume(tmp_path / "run", fm=Odd(lambda _request, answer: answer), encoder=WordEncoder())
    assert result.score() > 0.6


@pytest.mark.parametrize("n_answered", [0, 300], ids=["from the start", "on the way"])
def test_a_model_that_can_not_be_reached_is_a_pause_and_not_a_run_of_refused_texts(
    tmp_path: Path, n_answered: int, undisturbed: promptfed.Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("promptfed.app.Retrying", lambda fm: fm)
    count = itertools.count()
    gone = FMResponse(error="APIConnectionError", outage=True)
    config = configured(tmp_path, rows_of(3, 30), rows_of(3, 10, 50))

    with pytest.raises(RunError, match=r"FMUnreachableError.*promptfed resume"):
        run(config, tmp_path / "run", Odd(lambda _request, answer: answer if next(count) < n_answered else gone))

    back = Odd(lambda _request, answer: answer)
    result = promptfed.resume(tmp_path / "run", fm=back, encoder=WordEncoder())
    assert result.score() == undisturbed.score()
    assert result.prompt.prompt_id == undisturbed.prompt.prompt_id


# ---------------------------------------------------------------- nothing leaks

CANARY = "zanzibar-canary-7731"


@pytest.mark.parametrize("baselines", [[], ["zero_shot", "manual_few_shot", "local_only", "dm_fedavg", "centralised"]])
def test_a_canary_in_one_clients_texts_stays_in_its_folder(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], baselines: list[str]
) -> None:
    train = [*rows_of(2, 30), *([f"site{c:03d}", f"The {CANARY} seemed wonderful.", "positive"] for c in (0, 0, 0))]
    test = [*rows_of(2, 10, 50), ["site000", f"A {CANARY} that seemed stale.", "negative"]]

    result = run(configured(tmp_path, train, test, evaluation={"baselines": baselines}), tmp_path / "run")

    mine = tmp_path / "run" / "clients" / "site000"
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file() and mine not in path.parents:
            assert CANARY.encode() not in path.read_bytes(), path
    assert CANARY not in json.dumps(result.summary)
    out, err = capfd.readouterr()
    assert CANARY not in out + err


def test_a_canary_is_not_in_an_error_either(tmp_path: Path) -> None:
    def quoting(request: LabelRequest, _answer: FMResponse) -> FMResponse:
        raise ValueError(f"could not read {request.text!r}")

    train = [*rows_of(2, 30), *(["site000", f"The {CANARY} seemed wonderful.", "positive"] for _ in range(30))]
    with pytest.raises(RunError) as caught:
        run(configured(tmp_path, train, rows_of(2, 10, 50)), tmp_path / "run", Odd(quoting))

    assert CANARY not in str(caught.value)
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path


def test_label_proportions_of_the_scene_are_what_the_tests_above_think() -> None:
    assert np.mean([y == "positive" for _, _, y in rows_of(1, 40)]) == 0.5
