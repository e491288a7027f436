"""A whole run through the SDK, on the scripted FM and a tiny encoder."""

from __future__ import annotations

import asyncio
import csv
import json
from pathlib import Path
from typing import Any

import pytest

import promptfed
from promptfed.errors import BudgetError, CapabilityError, ConfigError, DataError, UnknownNameError
from promptfed.federation.events import read_events
from promptfed.federation.inprocess import InProcessTransport
from promptfed.fm.scripted import ScriptedFM
from promptfed.folder import claimed
from promptfed.messages import decode_task
from promptfed.runs import compare_runs
from promptfed.types import Capability
from tests.support import CountingFM, WordEncoder, public_texts, sentences

ALL = ["zero_shot", "manual_few_shot", "local_only", "dm_fedavg", "centralised"]
ARMS = {
    "fm",
    "fm_pooled",
    "fm_single",
    "fm_personal",
    "fm_dm",
    "dm_local",
    "zero_shot",
    "manual_few_shot",
    "manual_few_shot_calibrated",
    "local_only",
    "dm_fedavg",
    "centralised",
}


def write_csv(path: Path, header: list[str], rows: list[list[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three clients with thirty training and twenty held-out texts each, and a public pool."""
    folder = tmp_path_factory.mktemp("data")
    names = ("negative", "positive")
    for split, n, seed in (("train", 30, 0), ("test", 20, 50)):
        rows = []
        for c in range(3):
            data = sentences(n, seed + c)
            rows += [[f"site{c}", t, names[y]] for t, y in zip(data.texts, data.labels, strict=True)]
        write_csv(folder / f"{split}.csv", ["client", "text", "label"], rows)
    write_csv(folder / "public.csv", ["text"], [[t] for t in public_texts()])
    return {
        "data": {k: str(folder / f"{k}.csv") for k in ("train", "test", "public")},
        "task": {"instruction": "Is the review negative or positive?"},
        "budget": {"max_fm_calls": 600},
        "evaluation": {"baselines": ALL},
    }


def run(config: dict[str, Any], out: Path | None = None, fm: Any = None) -> promptfed.Result:
    return promptfed.run(config, out=out, fm=fm or ScriptedFM(), encoder=WordEncoder())


@pytest.fixture(scope="module")
def finished(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> promptfed.Result:
    return run(config, tmp_path_factory.mktemp("runs") / "a")


def test_a_run_writes_everything_it_promises(finished: promptfed.Result) -> None:
    folder = finished.folder
    assert folder is not None
    for name in ("config.toml", "events.jsonl", "summary.json", "prompt.json", "report.html"):
        assert (folder / name).stat().st_size > 0, name
    for client in ("site0", "site1", "site2"):
        for name in ("calibration.json", "personal.json", "stacker.json", "domain_model.npz"):
            assert (folder / "clients" / client / name).is_file(), name
    assert list((folder / "checkpoint" / "tuning").glob("*.msgpack"))


def test_the_summary_has_every_arm_and_account(finished: promptfed.Result) -> None:
    summary = json.loads((finished.folder / "summary.json").read_text())  # type: ignore[operator]

    assert summary["schema_version"] == 1
    assert summary["n_clients"] == 3
    assert summary["primary_metric"] == "accuracy"
    assert summary["privacy"]["releases"] == []
    assert set(summary["metrics"]) == {"accuracy", "macro_f1", "ece", "brier", "nll"}
    for metric in summary["metrics"].values():
        assert set(metric) == ARMS
        for arm in metric.values():
            assert arm["ci95"][0] <= arm["mean"] <= arm["ci95"][1]
            assert {c: v["n"] for c, v in arm["by_client"].items()} == dict.fromkeys(("site0", "site1", "site2"), 20)
    assert set(summary["calls_per_prediction"]) == ARMS
    assert summary["calls_per_prediction"]["dm_local"] == 0
    assert summary["calls_per_prediction"]["fm"] == len(finished.prompt.prompts)
    assert summary["personal"].keys() == {"global", "cluster", "own", "mixed"}
    assert sum(summary["personal"].values()) == 3
    tuning = summary["ledger"]["tuning"]
    assert 0 < tuning["fm_calls"] <= 600
    assert tuning["fm_calls"] == sum(a["fm_calls"] for a in tuning["by_client"].values())
    assert tuning["bytes_up"] == sum(a["bytes_up"] for a in tuning["by_client"].values()) > 0


def test_the_events_add_up_to_the_ledger(finished: promptfed.Result) -> None:
    events = read_events(finished.folder / "events.jsonl")  # type: ignore[operator]
    rounds = [e for e in events if e["kind"] == "round"]

    assert [e["seq"] for e in events] == list(range(len(events)))
    for phase in ("tuning", "evaluation", "baselines"):
        ledger = finished.summary["ledger"][phase]
        mine = [e for e in rounds if e["phase"] == phase]
        assert sum(e["fm_calls"] for e in mine) == ledger["fm_calls"]
        assert sum(e["bytes_up"] for e in mine) == ledger["bytes_up"]


def test_tuning_beats_zero_shot_on_a_task_that_exemplars_help(finished: promptfed.Result) -> None:
    assert finished.score("fm") > finished.score("zero_shot") + 0.1


def test_a_run_with_milestones_is_measured_at_each_and_reports_it(config: dict[str, Any], tmp_path: Path) -> None:
    budget = {"max_fm_calls": 600, "milestones": [200, 400]}

    result = run({**config, "budget": budget, "evaluation": {"baselines": []}}, tmp_path / "read")

    readings = result.summary["readings"]
    assert [r["milestone"] for r in readings] == [200, 400, 600]
    assert all(r["fm_calls"] <= r["milestone"] for r in readings)
    assert [r["bytes_up"] for r in readings] == sorted(r["bytes_up"] for r in readings)
    arms = {"fm", "fm_personal", "fm_pooled", "fm_single", "fm_single_pooled"}
    assert all(set(r["metrics"]["accuracy"]) == arms for r in readings)
    # The last reading is the run's own result.
    for arm in ("fm", "fm_pooled"):
        assert readings[-1]["metrics"]["accuracy"][arm]["mean"] == result.score(arm)
    assert "What fewer FM calls would have come to" in (tmp_path / "read" / "report.html").read_text()
    assert set(result.summary["metrics"]["accuracy"]) == (arms - {"fm_single_pooled"}) | {"fm_dm", "dm_local"}


@pytest.mark.parametrize("milestones", [[400, 200], [0, 200], [600], [200, 200]])
def test_milestones_ascend_within_the_budget(config: dict[str, Any], milestones: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"milestones.*ascending numbers of calls below max_fm_calls = 600"):
        run({**config, "budget": {"max_fm_calls": 600, "milestones": milestones}})


def test_an_option_that_a_method_lacks_is_told_before_anything_is_paid(config: dict[str, Any]) -> None:
    with pytest.raises(UnknownNameError, match=r"option of method 'race' 'speed'"):
        run({**config, "method": {"name": "race", "options": {"speed": 3}}})


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_prompt(
    config: dict[str, Any], finished: promptfed.Result, tmp_path: Path
) -> None:
    again = run(config, tmp_path / "again")
    other = run({**config, "seed": 2, "evaluation": {"baselines": []}})

    assert (tmp_path / "again" / "prompt.json").read_bytes() == (finished.folder / "prompt.json").read_bytes()  # type: ignore[operator]
    assert again.summary["metrics"] == finished.summary["metrics"]
    assert other.prompt.prompt_id != again.prompt.prompt_id


def test_the_artefact_alone_predicts(finished: promptfed.Result) -> None:
    prompt = promptfed.Prompt.load(finished.folder / "prompt.json")  # type: ignore[operator]

    answers = prompt.predict(["The plot seemed superb.", "The cast seemed dreadful."], fm=ScriptedFM())

    assert prompt == finished.prompt
    assert all(abs(sum(a.proba.values()) - 1) < 1e-9 for a in answers)
    assert [a.label for a in answers] == [max(a.proba, key=a.proba.__getitem__) for a in answers]


def test_two_arms_of_a_run_compare_in_pairs(finished: promptfed.Result) -> None:
    assert finished.folder is not None

    result = compare_runs([finished.folder], [finished.folder], "fm", "zero_shot")

    assert result.n_texts == 60
    assert result.mean_a == pytest.approx(finished.score("fm"), abs=1e-6)
    assert result.difference == pytest.approx(finished.score("fm") - finished.score("zero_shot"), abs=2e-6)
    with pytest.raises(DataError, match="no per-text results of arm 'nothing'"):
        compare_runs([finished.folder], [finished.folder], "nothing")


def test_a_run_works_inside_a_running_event_loop(config: dict[str, Any]) -> None:
    async def notebook() -> promptfed.Result:
        return run({**config, "evaluation": {"baselines": []}})

    assert asyncio.run(notebook()).score("fm") > 0.5


def test_without_held_out_texts_a_run_tunes_and_measures_nothing(config: dict[str, Any]) -> None:
    data = {k: v for k, v in config["data"].items() if k != "test"}

    result = run({**config, "data": data})

    assert result.summary["metrics"] == {}
    assert result.prompt.prompts


def test_clients_may_bring_a_file_each_and_columns_may_be_called_otherwise(tmp_path: Path) -> None:
    words = ("good", "bad")  # label names in the data; the verbalizer says what the FM is shown
    files = []
    for c in range(2):
        data = sentences(24, seed=c)
        rows = [[t, words[y]] for t, y in zip(data.texts, data.labels, strict=True)]
        train = write_csv(tmp_path / f"{c}.csv", ["body", "mark"], rows[:16])
        test = write_csv(tmp_path / f"{c}-test.csv", ["body", "mark"], rows[16:])
        files.append({"id": f"site{c}", "train": str(train), "test": str(test)})

    result = run(
        {
            "clients": files,
            "data": {"text_column": "body", "label_column": "mark"},
            "task": {"labels": ["good", "bad"], "verbalizer": {"good": "gloomy", "bad": "cheerful"}},
            "budget": {"max_fm_calls": 200},
            "evaluation": {"baselines": ["zero_shot"]},
        }
    )

    assert result.prompt.labels == ("good", "bad")
    assert {c: v["n"] for c, v in result.summary["metrics"]["accuracy"]["fm"]["by_client"].items()} == {
        "site0": 8,
        "site1": 8,
    }


def test_an_existing_folder_is_refused_and_only_run_folders_are_replaced(
    config: dict[str, Any], finished: promptfed.Result, tmp_path: Path
) -> None:
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter1.txt").write_text("years of work")

    with pytest.raises(ConfigError, match="--force"):
        promptfed.run(config, out=finished.folder)
    with pytest.raises(ConfigError, match="not a run folder"):
        promptfed.run(config, out=precious, force=True)

    assert (precious / "chapter1.txt").read_text() == "years of work"


def test_a_missing_capability_fails_before_the_first_call(config: dict[str, Any]) -> None:
    text_only = ScriptedFM(capabilities=frozenset({Capability.TEXT}))

    with pytest.raises(CapabilityError, match=r"race.*label_choice.*embedded:NAME"):
        run(config, fm=text_only)


def test_a_budget_too_small_for_one_round_says_how_much_it_takes(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"max_fm_calls = 20 is too small.*give at least \d+"):
        run({**config, "budget": {"max_fm_calls": 20}})


def test_a_token_limit_stops_before_it_is_passed(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"over budget\.max_tokens = 3000"):
        run({**config, "budget": {"max_fm_calls": 600, "max_tokens": 3000}}, tmp_path / "o")

    rounds = [e for e in read_events(tmp_path / "o" / "events.jsonl") if e["kind"] == "round"]
    assert 0 < rounds[-1]["tokens"] <= 3000


def test_a_test_label_or_client_that_train_lacks_is_named(config: dict[str, Any], tmp_path: Path) -> None:
    strange_label = write_csv(tmp_path / "l.csv", ["client", "text", "label"], [["site0", "secret text", "mixed"]])
    strange_client = write_csv(tmp_path / "c.csv", ["client", "text", "label"], [["siteX", "secret text", "positive"]])

    for path, says in ((strange_label, "mixed"), (strange_client, "siteX")):
        with pytest.raises(DataError, match=says) as caught:
            run({**config, "data": {**config["data"], "test": str(path)}})
        assert "secret" not in str(caught.value)


def test_data_of_one_label_needs_to_be_told_of_the_others(config: dict[str, Any], tmp_path: Path) -> None:
    rows = [[f"site{i % 3}", f"The film was wonderful {i}.", "positive"] for i in range(90)]
    one = {**config, "data": {"train": str(write_csv(tmp_path / "one.csv", ["client", "text", "label"], rows))}}
    named = {**one, "task": {"labels": ["negative", "positive"]}, "evaluation": {"baselines": []}}

    with pytest.raises(DataError, match=r"one label only \('positive'\); give the others in task\.labels"):
        run({**one, "task": {}}, tmp_path / "a")

    assert run(named, tmp_path / "b").prompt.labels == ("negative", "positive")


def test_a_share_too_small_for_each_client_alone_is_told_before_anything_is_paid(
    config: dict[str, Any], tmp_path: Path
) -> None:
    fm = ScriptedFM()
    small = {**config, "budget": {"max_fm_calls": 150}, "evaluation": {"baselines": ["local_only"]}}

    with pytest.raises(ConfigError, match=r"has local_only, .* = 50 is too small .*leave the baseline out"):
        run(small, tmp_path / "a", fm)

    assert not (tmp_path / "a").exists()


def test_force_keeps_the_old_run_if_the_new_one_could_not_begin(config: dict[str, Any], tmp_path: Path) -> None:
    quick = {**config, "evaluation": {"baselines": []}}
    run(quick, tmp_path / "a")
    before = (tmp_path / "a" / "prompt.json").read_bytes()

    with pytest.raises(ConfigError, match="too small"):
        promptfed.run(
            {**quick, "budget": {"max_fm_calls": 5}},
            out=tmp_path / "a",
            force=True,
            fm=ScriptedFM(),
            encoder=WordEncoder(),
        )

    assert (tmp_path / "a" / "prompt.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_force_does_not_touch_a_run_that_another_process_works_on(config: dict[str, Any], tmp_path: Path) -> None:
    quick = {**config, "evaluation": {"baselines": []}}
    run(quick, tmp_path / "a")

    with claimed(tmp_path / "a"), pytest.raises(ConfigError, match="another process is working on"):
        promptfed.run(quick, out=tmp_path / "a", force=True, fm=ScriptedFM(), encoder=WordEncoder())

    assert (tmp_path / "a" / "prompt.json").is_file()


# ---------------------------------------------------------------- baselines as methods


def method_run(config: dict[str, Any], name: str, out: Path | None = None, **changes: Any) -> promptfed.Result:
    method = {"name": name, **changes.pop("method", {})}
    return run({**config, "evaluation": {"baselines": []}, "method": method, **changes}, out)


@pytest.mark.parametrize("name", ["zero_shot", "manual_few_shot"])
def test_a_given_prompt_is_a_method_on_the_same_books(config: dict[str, Any], tmp_path: Path, name: str) -> None:
    result = method_run(config, name, tmp_path / "a", budget={"max_fm_calls": 60, "milestones": [30]})

    summary = result.summary
    assert (summary["method"], summary["ledger"]["tuning"]["fm_calls"]) == (name, 60)
    assert [r["fm_calls"] for r in summary["readings"]] == [30, 60]
    assert all({"fm", "fm_personal"} <= set(r["metrics"]["accuracy"]) for r in summary["readings"])
    assert summary["personal"]["global"] == 3  # one prompt: nothing to choose from
    assert name in (tmp_path / "a" / "report.html").read_text()


def test_each_client_alone_as_a_method_is_the_baseline_of_that_name(
    config: dict[str, Any], finished: promptfed.Result, tmp_path: Path
) -> None:
    result = method_run(config, "local_only", tmp_path / "a", budget={"max_fm_calls": 600, "milestones": [450]})

    accuracy = result.summary["metrics"]["accuracy"]
    single = method_run(config, "local_only")
    assert single.summary["metrics"]["accuracy"]["fm"] == finished.summary["metrics"]["accuracy"]["local_only"]
    first, last = (r["metrics"]["accuracy"] for r in result.summary["readings"])
    assert {"fm", "fm_single", "fm_personal"} <= set(first)
    assert last["fm"] == accuracy["fm"] == accuracy["fm_personal"]
    kept = [promptfed.Prompt.load(tmp_path / "a" / "clients" / f"site{c}" / "prompt.json") for c in range(3)]
    assert len({prompt.prompt_id for prompt in kept}) == 3
    assert result.prompt == kept[0]  # all have as many texts: the first stands for all
    assert [r["fm_calls"] <= r["milestone"] for r in result.summary["readings"]] == [True, True]


def test_all_texts_in_one_place_as_a_method_is_the_baseline_of_that_name(
    config: dict[str, Any], finished: promptfed.Result, tmp_path: Path
) -> None:
    result = method_run(config, "centralised", tmp_path / "a")
    read = method_run(config, "centralised", budget={"max_fm_calls": 600, "milestones": [300]})

    accuracy = result.summary["metrics"]["accuracy"]
    assert accuracy["fm"] == finished.summary["metrics"]["accuracy"]["centralised"]
    assert {"fm", "fm_personal"} <= set(read.summary["readings"][0]["metrics"]["accuracy"])
    assert set(result.summary["ledger"]["tuning"]["by_client"]) == {"all clients", "site0", "site1", "site2"}
    assert "put all texts in one place" in (tmp_path / "a" / "report.html").read_text()
    again = promptfed.resume(tmp_path / "a", fm=ScriptedFM(), encoder=WordEncoder())
    assert again.summary["metrics"] == result.summary["metrics"]


def test_a_method_around_another_takes_its_name_and_options(config: dict[str, Any]) -> None:
    by_hand = {"inner": "manual_few_shot", "inner_options": {"prompt": "Mine: {text} ="}}

    result = method_run(config, "local_only", method={"options": by_hand}, budget={"max_fm_calls": 30})

    assert [p.text for p in result.prompt.prompts] == ["Mine: {text} ="]


def test_a_baseline_that_is_the_method_or_lacks_its_prompt_is_refused_at_once(config: dict[str, Any]) -> None:
    both = {**config, "method": {"name": "centralised"}, "evaluation": {"baselines": ["centralised"]}}
    numbers = {**config, "task": {"labels": ["negative", "positive", "neither"]}}
    fm = CountingFM(ScriptedFM())

    with pytest.raises(ConfigError, match="which is the method here"):
        run(both)
    with pytest.raises(ConfigError, match=r"no hand-written prompt for the labels negative, positive, neither"):
        run({**numbers, "evaluation": {"baselines": ["manual_few_shot"]}}, fm=fm)
    assert fm.n_calls == 0


class Missing(InProcessTransport):
    """On which site001 misses every round of one name."""

    name = ""

    async def exchange(self, tasks: Any, awaited: Any, deadline_s: Any) -> dict[str, bytes]:
        arm = getattr(decode_task(next(iter(tasks.values()))).body, "arm", "")
        reached = {c: t for c, t in tasks.items() if not (c == "site1" and arm == self.name)}
        return await super().exchange(reached, [c for c in awaited if c in reached], deadline_s)


@pytest.mark.parametrize("arm", ["fm", "dm_local", "zero_shot", "local_only"])
def test_a_client_that_misses_the_measuring_of_an_arm_is_left_out_of_its_comparison(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: str
) -> None:
    monkeypatch.setattr(Missing, "name", arm)
    monkeypatch.setattr("promptfed.app.InProcessTransport", Missing)

    summary = run(config, tmp_path / "a").summary

    assert set(summary["metrics"]["accuracy"][arm]["by_client"]) == {"site0", "site2"}
    texts = {a: c["n_texts"] for a, c in summary["comparisons"].items()}
    assert texts == {a: 40 if arm in (a, "fm") or (a == "local_only" and arm == "fm") else 60 for a in ARMS - {"fm"}}
    assert (tmp_path / "a" / "report.html").is_file()
