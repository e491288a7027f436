"""Whole runs in which domain models are of several kinds, learn from one another, and are taught by the FM."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import promptfed
from clients.client import Client
from clients.data import ClientData, Labelled
from clients.distillation import from_others, lessons_of
from promptfed.app import estimate, read_inputs
from promptfed.config import load_config
from promptfed.errors import ConfigError, DataError, RunError, UnknownNameError
from promptfed.fm.scripted import ScriptedFM
from promptfed.messages import Distil, Lessons
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.template import PromptTemplate
from tests.support import CHEERFUL, GLOOMY, CountingFM, WordEncoder, public_texts, sentences, wait_for, write_rows

CANARY = "zyzzyva"
SHARED = ["dm_fedavg", "dm_fedprox", "dm_fedadam", "dm_ensemble"]
KINDS = {"site1": "tfidf_logistic", "site2": "mlp"}


def write_texts(path: Path, rows: list[str]) -> Path:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("data")
    for part, n in (("train", 40), ("test", 20)):
        write_rows(home / f"{part}.csv", {f"site{c}": sentences(n, 10 * c + (part == "test"), 2) for c in range(3)})
    write_texts(home / "public.csv", ["text", *public_texts()])
    more = [f"site{c},{text} {CANARY}" for c in range(3) for text in sentences(20, 100 + c, 2).texts]
    write_texts(home / "more.csv", ["client,text", *more])
    return {
        "data": {
            **{part: str(home / f"{part}.csv") for part in ("train", "test", "public")},
            "unlabelled": str(home / "more.csv"),
            "max_labels": 12,
        },
        "task": {"instruction": "Is the review negative or positive?"},
        "domain_model": {"by_client": KINDS},
        "budget": {"max_fm_calls": 400},
        "distillation": {"max_fm_calls": 150, "min_confidence": 0.0},
        "evaluation": {"baselines": SHARED},
    }


def run(config: dict[str, Any], out: Path | None = None, fm: Any = None) -> promptfed.Result:
    return promptfed.run(config, out=out, fm=fm or ScriptedFM(), encoder=WordEncoder())


@pytest.fixture(scope="module")
def finished(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> promptfed.Result:
    return run(config, tmp_path_factory.mktemp("runs") / "a")


def test_every_way_to_learn_is_measured_and_booked(finished: promptfed.Result) -> None:
    accuracy, ledger = finished.summary["metrics"]["accuracy"], finished.summary["ledger"]

    assert {"dm_local", "dm_distilled", "fm_dm", *SHARED} <= accuracy.keys()
    assert all(set(accuracy[arm]["by_client"]) == {"site0", "site1", "site2"} for arm in accuracy)
    assert 0 < ledger["transfer"]["fm_calls"] <= 150
    assert ledger["tuning"]["fm_calls"] <= 400
    events = [json.loads(line) for line in (finished.folder / "events.jsonl").read_text().splitlines()]  # type: ignore[operator]
    (told,) = [e for e in events if e["kind"] == "distilled"]
    assert told["n_lessons"].keys() == {"site0", "site1", "site2"}
    assert all(n > 20 for n in told["n_lessons"].values())


def test_the_report_knows_all_that_was_sent_and_measured(finished: promptfed.Result) -> None:
    report = (finished.folder / "report.html").read_text(encoding="utf-8")  # type: ignore[operator]

    assert "No client text crossed to the server" in report
    assert "does not know" not in report
    assert "no description" not in report
    assert "own, taught by FM" in report


def test_a_cascade_is_told_in_the_report(config: dict[str, Any], tmp_path: Path) -> None:
    plain = {**config, "evaluation": {"baselines": []}, "distillation": {}, "cascade": {"target_risk": 0.45}}

    done = run(plain, tmp_path / "cascade")

    report = (tmp_path / "cascade" / "report.html").read_text(encoding="utf-8")
    assert set(done.summary["cascade"]["share_by_stage"]) == {"dm", "fm_single_dm", "fm_dm"}
    assert sum(done.summary["cascade"]["share_by_stage"].values()) == pytest.approx(1.0, abs=1e-3)
    assert "where 45.0% were allowed" in report
    assert "does not know" not in report


def test_a_method_that_teaches_has_the_taught_models_measured_too(config: dict[str, Any]) -> None:
    plain = {**config, "method": {"name": "co_tune"}, "domain_model": {}, "evaluation": {"baselines": []}}
    del plain["distillation"]

    accuracy = run({**plain, "budget": {"max_fm_calls": 600}}).summary["metrics"]["accuracy"]

    assert {"dm_local", "dm_distilled", "fm_dm"} <= accuracy.keys()
    assert accuracy["dm_distilled"]["mean"] != accuracy["dm_local"]["mean"]


def test_no_unlabelled_text_leaves_its_client(finished: promptfed.Result) -> None:
    folder = finished.folder
    assert folder is not None
    for path in folder.rglob("*"):
        if path.is_file() and "clients" not in path.relative_to(folder).parts:
            assert CANARY.encode() not in path.read_bytes(), path.name
    for path in (folder / "clients").glob("journal-*.jsonl"):
        assert CANARY.encode() not in path.read_bytes(), path.name


def test_a_client_s_answers_are_unchanged_by_the_kinds_of_others(config: dict[str, Any]) -> None:
    alone = run({**config, "domain_model": {}, "evaluation": {"baselines": []}, "distillation": {}})
    among = run({**config, "evaluation": {"baselines": []}, "distillation": {}})

    local = [r.summary["metrics"]["accuracy"]["dm_local"]["by_client"]["site0"] for r in (alone, among)]
    assert local[0] == local[1]


def test_a_resumed_run_ends_in_the_same_bytes_and_asks_nothing_again(
    finished: promptfed.Result, tmp_path: Path
) -> None:
    folder = tmp_path / "b"
    shutil.copytree(finished.folder, folder)  # type: ignore[arg-type]
    for file in sorted((folder / "checkpoint" / "tuning").iterdir())[-6:]:
        file.unlink()  # as if it had been killed while the domain models were taught, or soon after
    fm = CountingFM(ScriptedFM())

    again = promptfed.resume(folder, fm=fm, encoder=WordEncoder())

    assert fm.n_calls == 0
    assert again.prompt == finished.prompt
    for name in ("prompt.json", "clients/site0/stacker.json", "clients/site1/calibration.json"):
        assert (folder / name).read_bytes() == (finished.folder / name).read_bytes()  # type: ignore[operator]


def test_a_client_without_a_label_is_taught_and_measured_beside_the_others(
    config: dict[str, Any], tmp_path: Path
) -> None:
    train, test, more = tmp_path / "train.csv", tmp_path / "test.csv", tmp_path / "more.csv"
    write_rows(train, {f"site{c}": sentences(40, 10 * c, 2) for c in range(2)})
    write_rows(test, {f"site{c}": sentences(40, 10 * c + 1, 2) for c in range(3)})
    write_texts(more, ["client,text", *[f"site2,{text}" for text in sentences(60, 20, 2).texts]])
    data = {**config["data"], "train": str(train), "test": str(test), "unlabelled": str(more), "max_labels": None}
    baselines = ["dm_ensemble", "dm_fedavg", "local_only"]
    no_label = {**config, "data": data, "domain_model": {}, "evaluation": {"baselines": baselines}}

    done = run({**no_label, "cascade": {"target_risk": 0.3}}, tmp_path / "run")

    accuracy = done.summary["metrics"]["accuracy"]
    site2 = {arm: measured["by_client"]["site2"]["value"] for arm, measured in accuracy.items() if arm != "local_only"}
    assert site2["dm_local"] == pytest.approx(0.5, abs=0.1)
    assert min(site2[arm] for arm in ("dm_distilled", "dm_fedavg", "dm_ensemble", "fm", "fm_dm", "cascade")) > 0.65
    assert set(accuracy["local_only"]["by_client"]) == {"site0", "site1"}


def test_without_any_label_a_given_prompt_teaches(config: dict[str, Any], tmp_path: Path) -> None:
    good, bad = (f"Text: It was {' and '.join(words[:2])}.\nLabel:" for words in (CHEERFUL, GLOOMY))
    manual = f"{good} positive\n\n{bad} negative\n\nText: {{text}}\nLabel:"
    given = {"name": "manual_few_shot", "options": {"prompt": manual}}
    data = {**config["data"], "max_labels": 0}
    no_label = {**config, "data": data, "method": given, "evaluation": {"baselines": []}}

    accuracy = run(no_label, tmp_path / "run").summary["metrics"]["accuracy"]

    assert accuracy["dm_local"]["mean"] == pytest.approx(0.5, abs=0.1)
    assert accuracy["dm_distilled"]["mean"] > 0.7


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"method": {"name": "race"}}, "no client has a labelled text, and prompts are scored by those"),
        ({"method": {"name": "local_only"}}, "no client has a labelled text, and each client alone"),
        ({"method": {"name": "zero_shot"}, "evaluation": {"baselines": ["dm_fedavg"]}}, "evaluation.baselines has dm_"),
        (
            {"method": {"name": "zero_shot"}, "cascade": {"target_risk": 0.1}},
            "can't be shown to hold on the 0 labelled",
        ),
    ],
)
def test_what_needs_labels_is_refused_before_anything_is_paid_for(
    config: dict[str, Any], more: dict[str, Any], says: str
) -> None:
    data = {**config["data"], "max_labels": 0}
    fm = CountingFM(ScriptedFM())

    with pytest.raises(ConfigError, match=says):
        run({**config, "data": data, "evaluation": {"baselines": []}, **more}, fm=fm)

    assert fm.n_calls == 0


def test_distillation_needs_texts_to_teach_from(config: dict[str, Any]) -> None:
    data = {k: v for k, v in config["data"].items() if k not in ("public", "unlabelled", "max_labels")}

    with pytest.raises(ConfigError, match="nothing to teach from"):
        run({**config, "data": data, "evaluation": {"baselines": []}})


def test_an_unlabelled_text_of_nobody_is_told_by_its_row(config: dict[str, Any], tmp_path: Path) -> None:
    more = write_texts(tmp_path / "more.csv", ["client,text", "site0,It seems fine.", ",It seems fine."])

    with pytest.raises(DataError, match=r"more\.csv, row 3: column 'client' is empty"):
        read_inputs(load_config({**config, "data": {**config["data"], "unlabelled": str(more)}}))


def test_the_first_client_may_be_the_one_without_labels_where_all_is_in_one_place(
    config: dict[str, Any], tmp_path: Path
) -> None:
    more = write_texts(tmp_path / "more.csv", ["client,text", *[f"a,{text}" for text in sentences(9, 20, 2).texts]])
    data = {**config["data"], "unlabelled": str(more)}

    done = run({**config, "data": data, "domain_model": {}, "evaluation": {"baselines": ["centralised"]}})

    assert done.summary["metrics"]["accuracy"]["centralised"]["mean"] > 0.6


def test_a_limit_on_labels_leaves_the_other_texts_without(config: dict[str, Any]) -> None:
    limited = read_inputs(load_config(config)).clients
    everything = read_inputs(load_config({**config, "data": {**config["data"], "max_labels": None}})).clients

    for few, all_ in zip(limited, everything, strict=True):
        assert (len(few.train), len(few.unlabelled)) == (12, 28 + 20)
        assert (len(all_.train), len(all_.unlabelled)) == (40, 20)
        assert few.train.texts == all_.train.texts[:12]
        assert few.unlabelled == (*all_.train.texts[12:], *all_.unlabelled)
        assert np.bincount(few.train.labels).min() >= 4  # labels as they are in all


def test_the_estimate_counts_the_teaching(config: dict[str, Any]) -> None:
    phases = estimate(load_config({**config, "fm": {"scorer": "scripted:overlap"}}))["phases"]

    assert phases["transfer"]["fm_calls"] == 150


def test_what_is_wrong_is_told_before_anything_is_paid_for(config: dict[str, Any]) -> None:
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"domain_model": {"kind": "linar"}}, UnknownNameError, "did you mean 'linear'"),
        (
            {"domain_model": {"by_client": {"nobody": "mlp"}}},
            ConfigError,
            "'nobody'; the clients are site0, site1, site2",
        ),
        ({"partition": {"clients": 2}}, ConfigError, "use data.max_labels"),
    ]
    for changes, kind, message in wrong:
        fm = CountingFM(ScriptedFM())
        with pytest.raises(kind, match=message):
            run({**config, **changes}, fm=fm)
        assert fm.n_calls == 0

    without = {**config, "data": {k: v for k, v in config["data"].items() if k != "public"}}
    with pytest.raises(ConfigError, match=r"dm_ensemble.*data\.public"):
        load_config(without)


def test_lessons_of_other_labels_are_refused_by_the_client() -> None:
    with pytest.raises(RunError, match="do not fit this client's 3 labels"):
        from_others(Lessons(texts=("one",), shares=bytes(2)), 3)
    unsure = Lessons(texts=("one", "two"), shares=bytes([51, 204, 128, 127]))
    assert from_others(unsure, 2).targets.sum(axis=1) == pytest.approx([0.2, 0.2])
    assert from_others(unsure, 2, min_confidence=0.7).texts == ("one",)


def test_lessons_on_public_texts_are_flattened_by_the_temperature_and_none_where_the_fm_failed() -> None:
    lessons = Lessons(texts=("one", "failed"), shares=bytes([51, 204, 0, 0]))

    taught = from_others(lessons, 2, min_confidence=0.7, temperature=2.0)

    assert taught.texts == ("one",)
    assert taught.targets == pytest.approx(0.2 * np.array([[1 / 3, 2 / 3]]))  # the odds of 1 to 4, and their root


def test_a_client_without_labels_hears_its_fm_under_the_others_calibration() -> None:
    """All its texts are of one label, which a calibration by its own scores alone would deal out in halves."""
    words = ("bad", "good")
    prompt = PromptTemplate(text="Text: {text}\nLabel:", words=words)
    fm = ScriptedFM(rule=lambda request: (0.0, 3.0 + len(request.text) % 3))
    texts = tuple(f"It was fine{'.' * n}" for n in range(12))
    none = Labelled(texts=(), labels=np.zeros(0, dtype=np.int64))
    client = Client(
        ClientData(client_id="c", train=none, test=none, unlabelled=texts), words, CountingFM(fm), WordEncoder(), seed=1
    )
    client.fm.grant = 24
    pooled = PromptSet(labels=words, prompts=(prompt,), weights=(0.9,), bias=(0.1, -0.1))
    task = Distil(prompt=pooled, stop=12, lessons=None, temperature=1.0, min_confidence=0.6)

    heard = wait_for(lessons_of(client, task))
    alone = wait_for(lessons_of(client, replace(task, prompt=as_given(pooled))))

    assert len(heard) == 12
    assert (heard.targets.argmax(axis=1) == 1).all()
    assert set(alone.targets.argmax(axis=1)) == {0, 1}


def as_given(prompt: PromptSet) -> PromptSet:
    return replace(prompt, weights=(1.0,), bias=(0.0, 0.0))


def test_data_without_labels_has_none_to_show() -> None:
    assert CANARY not in repr(Labelled(texts=(CANARY,), labels=np.array([1])))
