"""The report page of a small real run (scripted FM, tiny encoder), and of run folders changed by hand."""

from __future__ import annotations

import csv
import json
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from promptfed.app import run
from promptfed.errors import DataError
from promptfed.fm.scripted import ScriptedFM
from promptfed.report.build import build_report, human_bytes, human_seconds, name_of, percent, points
from tests.support import WordEncoder, public_texts, sentences

CLIENTS = ("north clinic", "south <b>clinic")
FILES = ("summary.json", "events.jsonl", "prompt.json", "config.toml")
ATTACK = "<script>alert(1)</script>"

Change = Callable[[dict[str, Any], list[dict[str, Any]]], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two clients whose FM writes markup."""
    home = tmp_path_factory.mktemp("report")
    for name, n in (("train", 20), ("test", 12)):
        with (home / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["client", "text", "label"])
            for seed, client in enumerate(CLIENTS):
                data = sentences(n, seed + len(name))
                names = ["positive" if label else "negative" for label in data.labels]
                writer.writerows(zip([client] * n, data.texts, names, strict=True))
    with (home / "public.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text"], *([text] for text in public_texts())])
    config = {
        "data": {name: str(home / f"{name}.csv") for name in ("train", "test", "public")},
        "task": {"instruction": f"Is it good? {ATTACK}"},
        "budget": {"max_fm_calls": 300},
        "evaluation": {"baselines": ["zero_shot", "manual_few_shot", "dm_fedavg"]},
    }
    run(config, out=home / "run", fm=ScriptedFM(phrases=(f"{ATTACK} fine.", "a sad day.")), encoder=WordEncoder())
    return home / "run"


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    for name in FILES:
        shutil.copy(made / name, tmp_path / name)
    return tmp_path


def changed(folder: Path, change: Change) -> str:
    """The page after ``change(summary, events)``."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").split("\n") if line]
    change(summary, events)
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    lines = "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in events)
    (folder / "events.jsonl").write_text(lines, encoding="utf-8")
    return build_report(folder).read_text(encoding="utf-8")


def set_accuracy(summary: dict[str, Any], arm: str, mean: float, half: float) -> None:
    summary["metrics"]["accuracy"][arm] |= {"mean": mean, "ci95": [mean - half, mean + half]}


class Tags(HTMLParser):
    """All tags with attributes, visible text, and tags left open."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def headline(page: str) -> str:
    found = re.search(r"<h1>(.*?)</h1>", page)
    assert found
    return found.group(1)


def test_the_page_stands_alone_and_text_of_the_fm_stays_text(folder: Path) -> None:
    path = build_report(folder)

    page = path.read_text(encoding="utf-8")
    tags = Tags(page)
    names = {tag for tag, _ in tags.found}
    assert path == folder / "report.html"
    assert tags.open == []
    assert names.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "form"})
    assert not any(key.startswith("on") or key == "src" for _, attributes in tags.found for key in attributes)
    assert all((a.get("href") or "#").startswith("#") for _, a in tags.found)
    assert "url(" not in page
    assert "@import" not in page
    assert ATTACK not in page
    assert ATTACK in tags.text


def test_every_client_arm_and_prompt_is_named(folder: Path) -> None:
    tags = Tags(build_report(folder).read_text(encoding="utf-8"))

    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    prompt = json.loads((folder / "prompt.json").read_text(encoding="utf-8"))
    for client in CLIENTS:
        assert tags.text.count(client) >= 2
    for arm, measured in summary["metrics"]["accuracy"].items():
        assert arm in tags.text
        assert name_of(arm) in tags.text
        assert percent(measured["mean"]) in tags.text
    for one in prompt["prompts"]:
        assert one["text"] in tags.text
        assert all(word in tags.text for word in one["words"])
    for key in ("method", "fm", "encoder", "prompt_id", "seed", "transport"):
        assert str(summary[key]) in tags.text
    assert "This report has no description" not in tags.text


def test_it_says_what_the_run_was_and_was_not(folder: Path) -> None:
    text = Tags(build_report(folder).read_text(encoding="utf-8")).text

    assert "This run was a simulation." in text
    assert "in-process simulation" in text
    assert "No client text crossed to the server" in text
    assert "No differential privacy is claimed for this run." in text
    assert "None: every client answered every round" in text
    assert "Training and held-out scores are the same measure on different texts" in text
    ledger = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["ledger"]
    for phase, spent in ledger.items():
        assert phase in text
        assert f"{spent['prompt_tokens']:,}" in text
        assert human_bytes(spent["bytes_up"]) in text


def test_the_same_run_gives_the_same_bytes(folder: Path) -> None:
    first = build_report(folder).read_bytes()

    assert build_report(folder).read_bytes() == first


def test_pictures_are_valid_titled_and_in_the_colours_of_the_theme(folder: Path) -> None:
    page = build_report(folder).read_text(encoding="utf-8")

    pictures = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.S)]
    labels = [picture.get("aria-label") or "" for picture in pictures]
    assert len(pictures) == 2 + len(CLIENTS)  # the curve for wide and narrow windows, and a picture a client
    assert all(picture.get("role") == "img" for picture in pictures)
    assert sum(label.startswith("Tuning curve: best training score from") for label in labels) == 2
    for client in CLIENTS:
        assert any(label.startswith(f"{client}: tuned prompts") and "95% interval" in label for label in labels)
    everything = page[page.index("</style>") :]
    assert not re.search(r'(fill|stroke|style)="', everything)
    assert "prefers-color-scheme: dark" in page


def test_the_curve_is_drawn_to_scale(folder: Path) -> None:
    page = build_report(folder).read_text(encoding="utf-8")

    curve = re.search(r'<polyline points="([^"]*)"', page)
    assert curve
    x = [float(pair.split(",")[0]) for pair in curve.group(1).split()]
    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    calls = [e["fm_calls"] for e in map(json.loads, lines) if e["kind"] in ("heat", "sets")]
    # The wide picture's axis runs from x = 46 at no calls to x = 710 at the budget of 300.
    assert x == pytest.approx([46 + 664 * n / 300 for n in calls], abs=0.06)


@pytest.mark.parametrize(
    ("zero_shot", "half", "by_hand", "expected"),
    [
        (0.5, 0.01, 0.6, "Tuned prompt 80.0% against 50.0% instruction alone"),
        (0.5, 0.01, 0.9, "Tuned prompt 80.0% against 50.0% instruction alone, but hand-written reaches 90.0%"),
        (0.79, 0.02, 0.6, "No clear gain: tuned prompt 80.0% against 79.0% instruction alone"),
        (0.9, 0.01, 0.6, "No gain: tuned prompt 80.0% against 90.0% instruction alone"),
    ],
)
def test_the_headline_is_honest(folder: Path, zero_shot: float, half: float, by_hand: float, expected: str) -> None:
    def change(summary: dict[str, Any], events: list[dict[str, Any]]) -> None:
        for arm in summary["metrics"]["accuracy"]:
            set_accuracy(summary, arm, 0.4, half)
        for paired in summary["comparisons"].values():
            paired["difference"] = 0.4
        set_accuracy(summary, "fm", 0.8, half)
        set_accuracy(summary, "zero_shot", zero_shot, half)
        set_accuracy(summary, "manual_few_shot", by_hand, half)
        for arm, value in (("zero_shot", zero_shot), ("manual_few_shot", by_hand)):
            paired = {"difference": 0.8 - value, "ci95": [0.8 - value - 2 * half, 0.8 - value + 2 * half]}
            summary["comparisons"][arm] |= paired

    assert headline(changed(folder, change)) == expected


def test_failures_dropped_texts_and_bad_calls_are_shown(folder: Path) -> None:
    def change(summary: dict[str, Any], events: list[dict[str, Any]]) -> None:
        summary["n_dropped_texts"] = 7
        summary["absent"] = ["north", "south"]
        summary["ledger"]["tuning"] |= {"failed_calls": 1234, "truncated_calls": 56, "censored_calls": 9}
        first = next(e for e in events if e["kind"] == "round" and e["name"] == "score")
        first["failures"] = {CLIENTS[0]: "TimeoutError"}

    text = Tags(changed(folder, change)).text
    assert "TimeoutError" in text
    assert "FM calls that failed: 1,234; cut short because the text was too long: 56" in text
    assert "only a bound of its probability is known: 9" in text
    assert "Texts dropped when the data were read: 7" in text
    assert "Expected, but never joined: north, south." in text
    assert "None: every client" not in text


def test_an_unknown_arm_round_and_method_are_shown_but_nothing_is_claimed_of_them(folder: Path) -> None:
    def change(summary: dict[str, Any], events: list[dict[str, Any]]) -> None:
        for arms in summary["metrics"].values():
            arms["new_arm"] = arms["fm"]
        summary["method"] = "newmethod"
        summary |= {"fm": "openai:gpt@1", "fm_in_process": False}
        events[:] = [e for e in events if e["kind"] not in ("heat", "sets")]
        events.append(next(e for e in events if e["kind"] == "round") | {"name": "gossip"})

    text = Tags(changed(folder, change)).text
    assert "new_arm" in text
    assert "no description of it" in text
    assert "newmethod reported no scores" in text
    assert "No client text crossed" not in text
    assert "does not know the messages of gossip" in text
    assert "the provider of openai:gpt@1" in text


def test_a_report_of_a_network_run_claims_nothing_of_where_the_models_ran_or_of_clear_differences(folder: Path) -> None:
    def change(summary: dict[str, Any], events: list[dict[str, Any]]) -> None:
        summary |= {"transport": "Flower", "fm_in_process": None, "comparisons": {}}

    text = Tags(changed(folder, change)).text
    assert "went over a network" in text
    assert "did not leave the machine" not in text
    assert "whoever runs the FM that the client asked" in text
    assert "clear gain" not in text
    assert "can't say whether a difference between arms is clear" in text


def test_a_model_on_another_machine_is_not_taken_for_one_in_this_process(folder: Path) -> None:
    def change(summary: dict[str, Any], events: list[dict[str, Any]]) -> None:
        summary |= {"fm": "embedded:smollm2-135m-instruct@1", "fm_in_process": False}

    text = Tags(changed(folder, change)).text
    assert "did not leave the machine" not in text
    assert "the provider of embedded:smollm2-135m-instruct@1" in text


RELEASE = {
    "phase": "tuning",
    "mechanism": "Gaussian noise on votes",
    "unit": "record",
    "epsilon": 2.5,
    "delta": 1e-5,
    "noise_multiplier": 1.2,
    "n_compositions": 3,
    "sampling_rate": 1.0,
    "n_outputs": 120,
    "not_covered": "scores",
    "simulated": True,
}


def test_a_recorded_privacy_release_is_shown(folder: Path) -> None:
    def change(summary: dict[str, Any], events: list[dict[str, Any]]) -> None:
        summary["privacy"] = {"releases": [RELEASE, {**RELEASE, "phase": "local_only"}]}

    text = Tags(changed(folder, change)).text
    assert "What was released under differential privacy" in text
    assert "2.5 a record" in text
    assert "epsilon at most 5 a record, delta 2e-05" in text
    assert "Not covered: scores" in text
    assert "This noise was simulated" in text
    assert "No differential privacy" not in text
    assert "Votes under differential privacy have noise" in text


def test_noise_that_was_not_simulated_is_not_said_to_be(folder: Path) -> None:
    def change(summary: dict[str, Any], events: list[dict[str, Any]]) -> None:
        summary["privacy"] = {"releases": [{**RELEASE, "simulated": False}]}

    assert "simulated: it came" not in Tags(changed(folder, change)).text


def test_without_held_out_texts_nothing_is_promised(folder: Path) -> None:
    def change(summary: dict[str, Any], events: list[dict[str, Any]]) -> None:
        summary |= {"metrics": {}, "calls_per_prediction": {}}

    page = changed(folder, change)
    assert headline(page) == "A prompt was tuned, but nothing was measured"
    assert "No client held texts out" in page


@pytest.mark.parametrize(("n", "n_pictures"), [(1, 1), (12, 12), (200, 5)])
def test_any_number_of_clients(folder: Path, n: int, n_pictures: int) -> None:
    ids = [f"site{i:03d}" for i in range(n)]

    def change(summary: dict[str, Any], events: list[dict[str, Any]]) -> None:
        for arms in summary["metrics"].values():
            for of in arms.values():
                of["by_client"] = {c: {"value": i / n, "n": 12, "ci95": [-0.1, 1.1]} for i, c in enumerate(ids)}

    page = changed(folder, change)
    assert len(re.findall('<svg[^>]*class="chart small"', page)) == n_pictures
    assert all(c in page for c in ids)
    table = page[page.index('id="clients"') : page.index('id="arms"')]
    shown = re.findall(r'<th class="id">(site\d+)', table)
    assert shown == (ids if n == 200 else [])  # the client served worst first


def test_a_line_separator_in_text_of_the_fm_does_not_break_the_log(folder: Path) -> None:
    def change(summary: dict[str, Any], events: list[dict[str, Any]]) -> None:
        next(e for e in events if e["kind"] == "heat")["best_prompt"] = "one\u2028two\x85three {text}"

    assert "one\u2028two\x85three" in changed(folder, change)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()

    with pytest.raises(DataError, match=re.escape(name)):
        build_report(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_named(folder: Path, name: str) -> None:
    (folder / name).write_text('{"half": ', encoding="utf-8")

    with pytest.raises(DataError, match=re.escape(name)):
        build_report(folder)


def test_a_summary_without_a_part_says_which(folder: Path) -> None:
    with pytest.raises(DataError, match=r"summary\.json: .* at ledger"):
        changed(folder, lambda summary, events: summary.pop("ledger"))


def test_a_summary_of_another_prompt_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"summary\.json is about prompt 0000"):
        changed(folder, lambda summary, events: summary.update(prompt_id="0000"))


def test_numbers_as_people_read_them() -> None:
    assert [percent(0.8783), percent(1.02), percent(-0.1)] == ["87.8%", "100.0%", "0.0%"]
    assert [points(0.1227), points(-0.05)] == ["+12.3", "\N{MINUS SIGN}5.0"]
    assert [human_bytes(n) for n in (0, 555, 52149, 1_200_000)] == ["0 B", "555 B", "52.1 kB", "1.2 MB"]
    assert [human_seconds(s) for s in (43.39, 112.3, 7260)] == ["43.4 s", "1 min 52 s", "2 h 1 min"]
