"""``task.kind = "generation"`` through the whole product, on a scripted model that does better when it is shown how."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import promptfed
from clients.host import ClientHost
from promptfed.app import estimate, read_inputs
from promptfed.config import load_config
from promptfed.errors import CapabilityError, ConfigError, DataError
from promptfed.federation.events import read_events, timeless
from promptfed.fm.scripted import ScriptedFM
from promptfed.messages import Join, Joined, Task, decode_reply, encode
from promptfed.messages.methods import Reflected
from promptfed.prompts.template import PromptTemplate
from promptfed.runs import compare_runs
from promptfed.strategies.base import Strategy
from promptfed.strategies.fed_gepa import FedGEPA
from promptfed.strategies.fedtextgrad import FedTextGrad
from promptfed.strategies.race import Race
from promptfed.types import Capability, FMRequest, FMResponse, TextRequest
from tests.answering import (
    ADVICE,
    TASK,
    AdvisedFM,
    AnsweringFM,
    AnswersContract,
    fresh_f1,
    public_questions,
    questions,
)
from tests.contracts.method import CANARIES, Wire
from tests.support import CountingFM, WordEncoder, bench, wait_for

EXAMPLE = Path(__file__).parents[2] / "examples" / "extraction" / "extraction.toml"
CANARY = "zyzzyva"


class TestRaceContract(AnswersContract):
    """Race keeps its contract in a generation task too."""

    def method(self) -> Race:
        return Race()

    def fm(self) -> AnsweringFM:
        return AnsweringFM()


@pytest.mark.parametrize("seed", [1, 3])
@pytest.mark.parametrize("method", [FedGEPA(), FedTextGrad()], ids=lambda method: method.name)
def test_the_planted_advice_is_found_where_answers_are_written(method: Strategy, seed: int) -> None:
    scene = bench(3, 40, fm=AdvisedFM(), max_fm_calls=900, max_prompts=1, **TASK)

    prompt = scene.drive(method.run(scene.federation(seed=seed)), 900)

    heats = [e for e in scene.events.events if e["kind"] == "heat"]
    assert ADVICE.rstrip(".") in prompt.prompts[0].text
    assert heats[-1]["best_score"] > heats[0]["best_score"] + 0.2
    assert fresh_f1(prompt, AdvisedFM()) > 0.9
    asked = [r.prompt for r in scene.fm.requests if isinstance(r, TextRequest) and r.prompt.endswith("nstruction:")]
    assert asked
    assert not [prompt for prompt in asked if "one of:" in prompt]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three clients with thirty training and twenty held-out texts each, a canary in all of them, and a public pool."""
    folder = tmp_path_factory.mktemp("data")
    for split, n, seed in (("train", 30, 0), ("test", 20, 50)):
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            out = csv.writer(file)
            out.writerow(["client", "text", "answer"])
            for c in range(3):
                data = questions(n, seed + c)
                texts = [f"{CANARY} {text}" for text in data.texts]
                out.writerows([f"site{c}", t, a] for t, a in zip(texts, data.answers, strict=True))
    (folder / "public.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in public_questions()))
    return {
        "data": {**{k: str(folder / f"{k}.csv") for k in ("train", "test", "public")}, "label_column": "answer"},
        "task": {"kind": "generation", "instruction": "Answer the question."},
        "method": {"max_prompts": 3},
        "budget": {"max_fm_calls": 700, "milestones": [350]},
        "rounds": {"quorum": 1.0},  # so that a round in which some clients' calls are cut off does not count
        "evaluation": {
            "baselines": ["zero_shot", "manual_few_shot", "local_only", "centralised"],
            "manual_prompt": "Text: Igor keeps the pink mug. What?\nAnswer: pink mug\n\nText: {text}\nAnswer:",
        },
    }


def run(config: dict[str, Any], out: Path | None = None, fm: Any = None) -> promptfed.Result:
    return promptfed.run(config, out=out, fm=fm or AnsweringFM(), encoder=WordEncoder())


@pytest.fixture(scope="module")
def finished(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> promptfed.Result:
    return run(config, tmp_path_factory.mktemp("runs") / "a")


def files(folder: Path) -> dict[str, bytes]:
    """What must be the same whenever the same is run."""
    kept = [folder / "prompt.json", *(p for p in (folder / "clients").rglob("*.json") if p.is_file())]
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept}


# ---------------------------------------------------------------- the run


def test_exemplars_are_found_and_make_the_prompt_better(finished: promptfed.Result) -> None:
    assert all("keeps the" in p.text for p in finished.prompt.prompts)
    assert (finished.prompt.labels, finished.prompt.bias) == ((), ())
    assert finished.prompt.weights == pytest.approx([1 / 3] * 3)
    assert finished.score("zero_shot") < 0.6
    assert finished.score("fm") > finished.score("zero_shot") + 0.3
    assert finished.score("fm", "exact_match") > 0.75


def test_the_summary_has_the_arms_and_metrics_of_the_task(finished: promptfed.Result) -> None:
    summary = finished.summary
    arms = {"fm", "fm_single"}
    baselines = {"zero_shot", "manual_few_shot", "local_only", "centralised"}

    assert summary["primary_metric"] == "token_f1"
    assert set(summary["metrics"]) == {"token_f1", "exact_match"}
    assert all(set(by_arm) == arms | baselines for by_arm in summary["metrics"].values())
    assert summary["labels"] == []
    assert 0 < summary["ledger"]["tuning"]["fm_calls"] <= 700
    assert set(summary["comparisons"]) == (arms | baselines) - {"fm"}
    assert summary["calls_per_prediction"]["fm"] == 3
    both = compare_runs([finished.folder], [finished.folder], "fm", "zero_shot")  # type: ignore[list-item]
    assert both.n_texts == 60
    assert both.mean_a == pytest.approx(finished.score(), abs=1e-5)


def test_a_run_that_stopped_goes_on_to_the_same_bytes(
    config: dict[str, Any], finished: promptfed.Result, tmp_path: Path
) -> None:
    class Gone(CountingFM):
        """Is cut off in the middle of tuning."""

        async def complete(self, requests: Any) -> Any:
            if self.n_calls > 300:
                raise ConnectionError
            return await super().complete(requests)

    with pytest.raises(promptfed.RunError):
        run(config, tmp_path / "a", Gone(AnsweringFM()))
    again = promptfed.resume(tmp_path / "a", fm=AnsweringFM(), encoder=WordEncoder())

    assert again.prompt == finished.prompt
    assert files(tmp_path / "a") == files(finished.folder)  # type: ignore[arg-type]


def test_no_text_and_no_answer_of_a_client_is_in_what_a_run_passes_on(finished: promptfed.Result) -> None:
    folder = finished.folder
    assert folder is not None
    own = {text for c in range(3) for text in questions(30, c).texts}
    for name in ("prompt.json", "summary.json", "events.jsonl", "report.html", "config.toml"):
        content = (folder / name).read_text(encoding="utf-8")
        assert CANARY not in content, name
        assert not [text for text in own if text in content], name
    for path in (folder / "checkpoint").rglob("*.msgpack"):
        assert CANARY.encode() not in path.read_bytes()


def test_the_report_speaks_of_answers_and_not_of_labels(finished: promptfed.Result) -> None:
    page = (finished.folder / "report.html").read_text(encoding="utf-8")  # type: ignore[operator]

    assert "Token F1" in page
    assert "the answer is the line that the FM writes next" in page
    assert "Score: token F1 (1 is best)" in page
    assert "none: answers are written" in page
    for word in ("Brier", "calibrated by", "Pooled calibration", "Label words"):
        assert word not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL), word


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"task": {"kind": "generation", "labels": ["a", "b"]}}, "leave out task.labels and task.verbalizer"),
        ({"task": {"kind": "generation", "verbalizer": {"a": "b"}}}, "leave out task.labels and task.verbalizer"),
        ({"partition": {"clients": 3}}, "has none"),
        ({"evaluation": {"baselines": ["dm_fedavg"]}}, "no small model answers"),
        ({"evaluation": {}}, 'set evaluation.baselines = ["zero_shot"]'),
    ],
)
def test_what_goes_with_labels_only_is_refused(config: dict[str, Any], change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({**config, **change})

    assert says in str(caught.value)


def test_a_network_needs_no_labels_where_answers_are_written() -> None:
    network = {"clients": ["north"], "insecure": True}
    evaluation = {"baselines": ["zero_shot"]}

    assert load_config({"task": {"kind": "generation"}, "network": network, "evaluation": evaluation}).task.labels == ()


def test_a_method_that_needs_labels_is_refused_by_name_with_those_that_do_without(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class LabelsOnly(Race):
        name = "labels_only"
        card = Race.card.__class__(paper="p", sends=frozenset(), crosses="c")

    monkeypatch.setattr("promptfed.app.load_method", lambda *_: LabelsOnly())
    fm = CountingFM(AnsweringFM())

    with pytest.raises(ConfigError, match=r"'labels_only' can't do task.kind = 'generation'; these can: ") as caught:
        run(config, fm=fm)
    assert {"fed_gepa", "fedpob", "fedtextgrad", "race"} <= set(re.findall(r"\w+", str(caught.value)))
    assert "fed_icl" not in str(caught.value)
    assert fm.n_calls == 0


def test_a_model_that_does_not_write_is_refused_and_one_that_does_nothing_else_is_not(config: dict[str, Any]) -> None:
    with pytest.raises(CapabilityError, match=r"race.* needs text"):
        run(config, fm=ScriptedFM(capabilities=frozenset({Capability.LABEL_LOGPROBS})))


def test_prompts_with_and_without_label_words_are_not_mixed_up() -> None:
    fm = ScriptedFM()
    labelled, writing = PromptTemplate(text="{text}", words=("a", "b")), PromptTemplate(text="{text}", words=())

    with pytest.raises(ConfigError, match="score_labels needs label words"):
        fm.score_labels(writing, ["x"])
    with pytest.raises(ConfigError, match="write_answers needs a prompt without"):
        fm.write_answers(labelled, ["x"])
    with pytest.raises(DataError, match="label words"):
        promptfed.Prompt(labels=(), prompts=(labelled,), weights=(1.0,), bias=())
    with pytest.raises(DataError, match="label words"):
        promptfed.Prompt(labels=("a", "b"), prompts=(writing,), weights=(1.0,), bias=(0.0, 0.0))


# ---------------------------------------------------------------- what the FM wrote from right answers


class Telling(AnsweringFM):
    """Writes instructions that quote a right answer that it was shown, and obeys those."""

    def _answer(self, request: FMRequest) -> FMResponse:
        prompt = getattr(request, "prompt", "")
        if shown := re.findall(r"^(?:Right answer|What it lacks): (.+)$", prompt, re.MULTILINE):
            return FMResponse(text=shown[0] if "Right answer" in prompt else f"Always say {shown[0]} if in doubt.")
        if said := re.match(r"Always say (\w+) if in doubt", prompt):
            return FMResponse(text=said[1])
        return super()._answer(request)


@pytest.mark.parametrize("method", [FedTextGrad(), FedGEPA()], ids=lambda method: method.name)
@pytest.mark.parametrize("is_gated", [True, False])
def test_no_right_answer_gets_out_in_an_instruction(
    method: Strategy, is_gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that stand in no text; without the gate they would have crossed."""
    if not is_gated:
        monkeypatch.setattr("clients.gate.LeakGate.passes", lambda _self, _text: True)
    wires: list[Wire] = []

    def wrap(inner: Any) -> Wire:
        wires.append(Wire(inner))
        return wires[0]

    scene = bench(3, 20, fm=Telling(), max_fm_calls=600, wrap=wrap, **TASK)
    for canary, client in zip(CANARIES, scene.clients.values(), strict=True):
        train = client.data.train
        client.data = replace(client.data, train=replace(train, answers=(canary,) * len(train)))
        client.scores.data = client.data.train

    scene.drive(method.run(scene.federation()), 600)

    reflected = [body for r in wires[0].up if isinstance(body := decode_reply(r).body, Reflected)]
    crossed = b"".join([*wires[0].up, *wires[0].down])
    leaked = [canary for canary in CANARIES if canary.encode() in crossed]
    assert (sum(body.n_stopped for body in reflected) > 0) is is_gated
    assert bool(leaked) is not is_gated
    assert {body.instruction for body in reflected} == {""} or not is_gated


# ---------------------------------------------------------------- what comes after, and elsewhere


def test_the_artefact_answers(finished: promptfed.Result) -> None:
    prompt = promptfed.Prompt.load(finished.folder)  # type: ignore[arg-type]

    (said,) = prompt.predict(["Igor keeps the pink mug in Bonn. What does Igor keep?"], fm=AnsweringFM())

    assert prompt == finished.prompt
    assert "pink mug" in str(said.answer)
    assert (said.label, said.proba) == (None, {})


def test_predict_and_eval_on_the_command_line(finished: promptfed.Result, config: dict[str, Any]) -> None:
    def cli(*args: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "promptfed.cli", *map(str, args), "--fm", "scripted:phrases"]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)

    predicted = cli("predict", finished.folder, stdin="Ada keeps it.\n\nBoris keeps it.\n")
    measured = cli("eval", finished.folder, config["data"]["test"], "--label-column", "answer", "--json")
    refused = cli("predict", finished.folder, "--client", "site0", stdin="x\n")

    lines = [json.loads(line) for line in predicted.stdout.splitlines()]
    assert predicted.returncode == 0, predicted.stderr
    assert [set(line) for line in lines] == [{"answer"}] * 3
    assert [isinstance(line["answer"], str) for line in lines] == [True, False, True]
    body = json.loads(measured.stdout)
    assert (body["n"], body["n_failed"], set(body["metrics"])) == (60, 0, {"token_f1", "exact_match"})
    assert refused.returncode == 2
    assert "leave it out" in " ".join(refused.stderr.split())


def test_a_client_elsewhere_joins_a_task_without_labels(tmp_path: Path) -> None:
    data = questions(6)
    rows = [("north", t, a) for t, a in zip(data.texts, data.answers, strict=True)]
    host = ClientHost("north", rows[:4], rows[4:], AnsweringFM(), WordEncoder(), tmp_path)
    task = Task(round=0, client_id="north", grant=0, limit=0, body=Join(labels=(), seed=1), run="r1", fleet="tuning")

    joined = decode_reply(wait_for(host.handle(encode(task)))).body

    assert isinstance(joined, Joined)
    assert (joined.n_train, joined.n_test, joined.labels) == (4, 2, ())


def test_the_example_can_be_read_and_estimated() -> None:
    config = load_config(EXAMPLE, ["fm.scorer=scripted:phrases"])
    inputs = read_inputs(config)

    phases = estimate(config)["phases"]

    assert len(inputs.clients) == 5
    assert {(len(c.train), len(c.test)) for c in inputs.clients} == {(60, 30)}
    assert inputs.task.labels == ()
    assert phases["evaluation"]["fm_calls"] == 5 * 30
    assert phases["baselines"]["fm_calls"] == 5 * 30


def test_the_events_of_a_run_are_the_same_again(
    config: dict[str, Any], finished: promptfed.Result, tmp_path: Path
) -> None:
    run(config, tmp_path / "b")

    a, b = (list(map(timeless, read_events(f / "events.jsonl"))) for f in (finished.folder, tmp_path / "b"))  # type: ignore[operator]
    assert a == b
    assert files(tmp_path / "b") == files(finished.folder)  # type: ignore[arg-type]
