"""The harness adapter on a language model of a few words, whose every number can be worked out by hand."""

from __future__ import annotations

import csv
import importlib
import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from typer.testing import CliRunner

from clients.data import read_rows
from evaluators.lm_eval import PromptfedLM, PromptSetLM, evaluate_prompt
from promptfed.cli import app
from promptfed.errors import CapabilityError, ConfigError, DataError, FMError, UnknownNameError
from promptfed.fm.base import BaseFM
from promptfed.fm.scripted import ScriptedFM
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.calibration import Calibration
from promptfed.prompts.template import PromptTemplate
from promptfed.types import Capability, FMRequest, FMResponse, LabelRequest, TextRequest
from tests.support import CountingFM, FailingFM, demo_rows

EXAMPLE = Path(__file__).parents[2] / "examples" / "lm_eval"
TASK = "sentiment5_sample"
END = "<|endoftext|>"
LABELS = ("negative", "positive")

# What follows a token, by the token alone. Nothing else is in the vocabulary.
NEXT = {
    END: {"sun": 0.25, "rain": 0.75},
    "sun": {" set": 0.4, " sets": 0.35, " rises": 0.25},
    " set": {" late": 0.8, " sail": 0.2},
    " sets": {" late": 1.0},
    " rises": {" late": 1.0},
    " late": {"\n": 0.6, END: 0.4},
    " sail": {END: 1.0},
    "\n": {"rain": 1.0},
    "rain": {" falls": 0.6, END: 0.4},
    " falls": {" late": 0.5, END: 0.5},
}


def tokens(text: str) -> list[str]:
    """``text`` in the longest tokens there are."""
    out = []
    while text:
        out.append(max((t for t in NEXT if text.startswith(t)), key=len))
        text = text[len(out[-1]) :]
    return out


class WordsFM(BaseFM):
    """The language model of `NEXT`; it can read 8 tokens."""

    fm_id = "words@0"
    capabilities = frozenset({Capability.TEXT, Capability.PROMPT_LOGPROBS})

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        return [self._scored(r) if isinstance(r, LabelRequest) else self._written(r) for r in requests]

    def _scored(self, request: LabelRequest) -> FMResponse:
        assert request.absolute
        before = tokens(request.prefix + request.text + request.suffix)
        logprobs = []
        for label in request.labels:
            path = [before[-1], *tokens(label)]
            steps = itertools.pairwise(path)
            logprobs.append(sum(math.log(NEXT[last].get(token, 1e-9)) for last, token in steps))
        return FMResponse(logprobs=tuple(logprobs), truncated=len(before) > 8)

    def _written(self, request: TextRequest) -> FMResponse:
        path = tokens(request.prompt)[-1:]
        while len(path) <= request.max_tokens and path[1:][-1:] != [END]:
            path.append(max(NEXT[path[-1]], key=NEXT[path[-1]].__getitem__))
        text = "".join(t for t in path[1:] if t != END)
        for stop in request.stop:
            text = text.split(stop)[0]
        return FMResponse(text=text, completion_tokens=len(path) - 1)


@pytest.fixture
def fm() -> CountingFM:
    return CountingFM(WordsFM())


def pairs(*args: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type="loglikelihood", doc={}, arguments=a, idx=0) for a in args]


def texts_asked(fm: CountingFM) -> list[tuple[str, int]]:
    """Context and number of tokens of the greedy texts that were asked for."""
    return [(r.prompt, r.max_tokens) for r in fm.requests if isinstance(r, TextRequest)]


# ------------------------------------------------------------------------------------------------ log-probabilities


def test_continuations_of_one_context_are_one_request(fm: CountingFM) -> None:
    got = PromptfedLM(fm).loglikelihood(pairs(("sun", " set"), ("rain", " falls"), ("sun", " rises late")))

    assert [logp for logp, _ in got] == pytest.approx([math.log(0.4), math.log(0.6), math.log(0.25)])
    asked = [(r.text, r.labels) for r in fm.requests if isinstance(r, LabelRequest)]
    assert asked == [("sun", (" set", " rises late")), ("rain", (" falls",))]


def test_a_probability_of_more_than_half_is_greedy_without_another_question(fm: CountingFM) -> None:
    assert PromptfedLM(fm).loglikelihood(pairs(("rain", " falls"))) == [(pytest.approx(math.log(0.6)), True)]
    assert texts_asked(fm) == []


@pytest.mark.parametrize(
    ("context", "continuation", "is_greedy", "n_texts"),
    [
        ("sun", " set", True, 1),  # 0.4, and the most probable of three
        ("sun", " sets", False, 2),  # begins with what greedy decoding writes, " set", and does not go on with " late"
        ("sun", " rises", False, 1),
        ("sun", " set late", True, 2),  # 0.4 x 0.8
        ("sun", " set sail", False, 2),  # 0.4 x 0.2: left at the second token
        ("sun", " set late\n", True, 3),
        ("rain", " falls late", True, 2),  # 0.6 x 0.5: at a tie, what the model writes
        ("rain", " falls late\nrain", True, 4),
    ],
)
def test_greedy_is_what_greedy_decoding_writes(
    context: str, continuation: str, is_greedy: bool, n_texts: int, fm: CountingFM
) -> None:
    got = PromptfedLM(fm).loglikelihood(pairs((context, continuation)))

    assert [greedy for _, greedy in got] == [is_greedy]
    assert texts_asked(fm) == [(context, n + 1) for n in range(n_texts)]


def test_a_text_that_only_begins_with_the_continuation_is_not_greedy() -> None:
    class Plural(WordsFM):
        def _written(self, request: TextRequest) -> FMResponse:
            return FMResponse(text=" sets", completion_tokens=1)

    assert PromptfedLM(Plural()).loglikelihood(pairs(("sun", " set"), ("sun", " sets"))) == [
        (pytest.approx(math.log(0.4)), False),
        (pytest.approx(math.log(0.35)), True),
    ]


def test_one_text_a_context_decides_for_all_its_continuations(fm: CountingFM) -> None:
    got = PromptfedLM(fm).loglikelihood(pairs(("sun", " rises"), ("sun", " set"), ("sun", " rises late")))

    assert [greedy for _, greedy in got] == [False, True, False]
    assert texts_asked(fm) == [("sun", 1)]


def test_a_text_that_ended_is_not_asked_for_again() -> None:
    class Short(WordsFM):
        def _written(self, request: TextRequest) -> FMResponse:
            return FMResponse(text=" set", completion_tokens=min(request.max_tokens, 2))  # the second one ends it

    fm = CountingFM(Short())

    assert PromptfedLM(fm).loglikelihood(pairs(("sun", " set sail")))[0][1] is False
    assert texts_asked(fm) == [("sun", 1), ("sun", 2), ("sun", 3)]


def test_half_a_character_is_no_contradiction() -> None:
    class Bytes(WordsFM):
        def _scored(self, request: LabelRequest) -> FMResponse:
            return FMResponse(logprobs=(-3.0,))

        def _written(self, request: TextRequest) -> FMResponse:
            return FMResponse(text=(" \ufffd", " é")[request.max_tokens - 1], completion_tokens=request.max_tokens)

    assert PromptfedLM(Bytes()).loglikelihood(pairs(("sun", " é"))) == [(-3.0, True)]


def test_white_space_at_the_end_of_a_context_goes_with_the_continuation(fm: CountingFM) -> None:
    got = PromptfedLM(fm).loglikelihood(pairs(("sun ", "rises")))

    assert got == [(pytest.approx(math.log(0.25)), False)]


def test_an_empty_context_is_the_end_of_text(fm: CountingFM) -> None:
    got = PromptfedLM(fm).loglikelihood(pairs(("", "sun"), ("", "rain")))

    assert got == [(pytest.approx(math.log(0.25)), False), (pytest.approx(math.log(0.75)), True)]


def test_no_requests_are_no_questions(fm: CountingFM) -> None:
    assert PromptfedLM(fm).loglikelihood([]) == []


# --------------------------------------------------------------------------------------------------- whole texts


def test_rolling_scores_a_text_after_the_end_of_text(fm: CountingFM) -> None:
    got = PromptfedLM(fm).loglikelihood_rolling(pairs(("sun set late",), ("rain",), ("",)))

    assert got == pytest.approx([math.log(0.25 * 0.4 * 0.8), math.log(0.75), 0.0])
    assert fm.n_calls == 1  # one context


def test_rolling_scores_each_piece_of_a_long_text_after_the_one_before(fm: CountingFM) -> None:
    # 24 characters, more than 22: pieces of at most 11 that end before a space.
    got = PromptfedLM(fm, rolling_window=22).loglikelihood_rolling(
        pairs(
            ("sun set late\nrain falls",),
        )
    )

    asked = [(r.text, r.labels) for r in fm.requests if isinstance(r, LabelRequest)]
    assert asked == [(END, ("sun set",)), ("sun set", (" late\nrain",)), (" late\nrain", (" falls",))]
    assert got == [pytest.approx(math.log(0.25 * 0.4 * 0.8 * 0.6 * 1.0 * 0.6))]


def test_a_text_without_spaces_is_cut_where_the_piece_is_full() -> None:
    class Counted(WordsFM):
        def _scored(self, request: LabelRequest) -> FMResponse:
            return FMResponse(logprobs=(-float(len(request.labels[0])),))

    fm = CountingFM(Counted())

    assert PromptfedLM(fm, rolling_window=6).loglikelihood_rolling(pairs(("abcdefgh",))) == [-8.0]
    assert [r.labels for r in fm.requests if isinstance(r, LabelRequest)] == [("abc",), ("def",), ("gh",)]


def test_a_window_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="rolling_window is 1 "):
        PromptfedLM(WordsFM(), rolling_window=1)


# ------------------------------------------------------------------------------------------------------- writing


def test_generation_options_are_those_of_a_text_request(fm: CountingFM) -> None:
    options = {"until": ["\n", "."], "max_gen_toks": 2, "do_sample": True, "temperature": 0.7, "top_p": 0.9}

    got = PromptfedLM(fm).generate_until(pairs(("sun", options), ("rain", {"until": "\n", "do_sample": False})))

    assert got == [" set late", " falls late"]
    assert fm.requests == [
        TextRequest(prompt="sun", max_tokens=2, temperature=0.7, top_p=0.9, seed=0, stop=("\n", ".")),
        TextRequest(prompt="rain", max_tokens=256, temperature=0.0, top_p=1.0, seed=0, stop=("\n",)),
    ]


def test_samples_of_one_context_have_seeds_of_their_own(fm: CountingFM) -> None:
    options = {"until": [], "max_gen_toks": 1, "do_sample": True}

    PromptfedLM(fm).generate_until(pairs(("sun", options), ("sun", options), ("rain", options)))

    asked = [(r.prompt, r.seed, r.temperature) for r in fm.requests if isinstance(r, TextRequest)]
    assert asked == [("sun", 0, 1.0), ("sun", 1, 1.0), ("rain", 0, 1.0)]


def test_an_option_that_no_request_has_is_named() -> None:
    with pytest.raises(ConfigError, match="generation_kwargs has top_k; promptfed can do do_sample, "):
        PromptfedLM(WordsFM()).generate_until(pairs(("sun", {"until": ["\n"], "top_k": 5})))


# ------------------------------------------------------------------------------------------------------ failures


class Refusing(FailingFM):
    capabilities = WordsFM.capabilities


@pytest.mark.parametrize(
    ("ask", "args"),
    [
        (PromptfedLM.loglikelihood, ("my secret", " set")),
        (PromptfedLM.loglikelihood_rolling, ("my secret",)),
        (PromptfedLM.generate_until, ("my secret", {"until": []})),
    ],
)
def test_failed_answers_are_counted_and_not_quoted(ask: Any, args: tuple[Any, ...]) -> None:
    with pytest.raises(FMError) as caught:
        ask(PromptfedLM(Refusing()), pairs(args))

    assert str(caught.value) == "1 of 1 requests failed at failing@0 (refused)"


def test_an_impossible_continuation_is_a_failure() -> None:
    class Never(WordsFM):
        def _scored(self, request: LabelRequest) -> FMResponse:
            return FMResponse(logprobs=(-math.inf,))

    with pytest.raises(FMError, match=r"1 of 1 requests failed at words@0 \(a log-probability is not finite\)"):
        PromptfedLM(Never()).loglikelihood(pairs(("sun", " set")))


def test_a_context_that_was_cut_is_a_failure() -> None:
    with pytest.raises(FMError, match="1 of 2 contexts are longer than words@0 can read"):
        PromptfedLM(WordsFM()).loglikelihood(pairs(("sun", " set"), ("rain" * 9, " falls")))


def test_a_model_without_log_probabilities_is_refused() -> None:
    with pytest.raises(CapabilityError, match="loglikelihood of lm-eval needs prompt_logprobs from the FM; scripted"):
        PromptfedLM("scripted:overlap").loglikelihood(pairs(("sun", " set")))


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "evaluators.lm_eval")
    monkeypatch.setitem(sys.modules, "lm_eval.api.instance", None)

    with pytest.raises(ConfigError, match=r"pip install 'promptfed\[lm-eval\]'"):
        importlib.import_module("evaluators.lm_eval")


# --------------------------------------------------------------------------------------------------- prompt sets


def prompt_set(labels: tuple[str, str] = LABELS, bias: tuple[float, float] = (0.4, -0.4)) -> PromptSet:
    """Two prompts with weights and a bias."""
    template = (
        "A happy, good day and I love it\nLabel: positive\n\nI hate this bad pain\nLabel: negative\n\n{text}\nLabel:"
    )
    prompts = (
        PromptTemplate(text=template, words=LABELS),
        PromptTemplate(text="Negative or positive?\n" + template, words=LABELS),
    )
    return PromptSet(labels=labels, prompts=prompts, weights=(0.9, 0.3), bias=bias)


def test_choices_have_the_log_probabilities_of_the_prompt_set() -> None:
    fm = CountingFM(ScriptedFM())
    text = "a {braced} good film "
    (said,) = prompt_set().predict([text], fm=ScriptedFM())

    got = PromptSetLM(prompt_set(), fm).loglikelihood(pairs((text, " negative"), (text, " positive")))

    assert [math.exp(logp) for logp, _ in got] == pytest.approx([said.proba["negative"], said.proba["positive"]])
    assert sum(math.exp(logp) for logp, _ in got) == pytest.approx(1.0)
    assert [greedy for _, greedy in got] == [said.label == "negative", said.label == "positive"]
    assert fm.n_calls == 2  # one a prompt


def test_a_label_that_is_out_of_the_question_has_no_probability() -> None:
    lm = PromptSetLM(prompt_set(bias=(2000.0, 0.0)), ScriptedFM())

    assert lm.loglikelihood(pairs(("a film", " negative"), ("a film", " positive"))) == [
        (0.0, True),
        (-math.inf, False),
    ]


def test_a_choice_that_is_no_label_is_refused_without_a_word_of_it() -> None:
    with pytest.raises(ConfigError) as caught:
        PromptSetLM(prompt_set(), ScriptedFM()).loglikelihood(pairs(("my secret", " positive"), ("my secret", " dire")))

    assert str(caught.value) == (
        "1 of 2 choices of the task are no labels of the prompt set; expected doc_to_choice to be negative, positive"
    )


def test_texts_that_the_model_failed_on_are_counted() -> None:
    with pytest.raises(FMError, match="2 of 2 texts failed at failing@0"):
        PromptSetLM(prompt_set(), FailingFM()).loglikelihood(pairs(("a", " positive"), ("b", " positive")))


def test_a_prompt_set_neither_writes_nor_scores_texts() -> None:
    lm = PromptSetLM(prompt_set(), ScriptedFM())

    with pytest.raises(ConfigError, match="PromptfedLM"):
        lm.generate_until([])
    with pytest.raises(ConfigError, match="PromptfedLM"):
        lm.loglikelihood_rolling([])


# -------------------------------------------------------------------------------------------------- whole tasks


def promptfed_eval(prompt: PromptSet, data: Path, fm: str, folder: Path) -> dict[str, float]:
    """The metrics of ``promptfed eval``."""
    prompt.save(folder / "prompt.json")
    command = ["eval", str(folder / "prompt.json"), str(data), "--fm", fm, "--json"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    return {name: m["value"] for name, m in json.loads(result.stdout)["metrics"].items()}


def measured(result: dict[str, Any]) -> dict[str, float]:
    metrics = result["results"][TASK]
    return {"accuracy": metrics["acc,none"], "brier": metrics["brier_score,none"]}


def task_folder(folder: Path, rows: list[tuple[str, str]], **changes: str) -> Path:
    """A folder with the example's task on other rows, with some lines of its YAML changed."""
    (folder / "rows.py").write_text((EXAMPLE / "rows.py").read_text())
    with (folder / "test.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    lines = (EXAMPLE / f"{TASK}.yaml").read_text().splitlines()
    kept = [line for line in lines if line.split(":")[0] not in changes]
    (folder / "task.yaml").write_text("\n".join([*kept, *(f"{k}: {v}" for k, v in changes.items())]))
    return folder


def test_the_harness_measures_what_promptfed_eval_does(tmp_path: Path) -> None:
    result = evaluate_prompt(prompt_set(), "scripted:overlap", EXAMPLE, TASK)
    own = promptfed_eval(prompt_set(), EXAMPLE / "test.csv", "scripted:overlap", tmp_path)

    assert measured(result) == pytest.approx({k: own[k] for k in ("accuracy", "brier")}, abs=1e-12)
    assert 0.5 < own["accuracy"] < 1
    assert result["n-samples"][TASK] == {"original": 100, "effective": 100}


@pytest.mark.model
def test_the_harness_measures_the_embedded_model_as_promptfed_eval_does(tmp_path: Path) -> None:
    address = "embedded:smollm2-135m-instruct"
    folder = task_folder(tmp_path, [(row["text"], row["label"]) for row in demo_rows("test")[:20]])

    result = evaluate_prompt(prompt_set(), address, folder, TASK)
    own = promptfed_eval(prompt_set(), folder / "test.csv", address, tmp_path)

    assert measured(result) == pytest.approx({k: own[k] for k in ("accuracy", "brier")}, abs=1e-12)
    assert 0 < own["accuracy"] < 1


def test_the_result_holds_no_text() -> None:
    written = json.dumps(evaluate_prompt(prompt_set(), "scripted:overlap", EXAMPLE, TASK, limit=3))

    rows = (EXAMPLE / "test.csv").read_text(encoding="utf-8").splitlines()[1:4]
    assert not any(row.rsplit(",", 1)[0].strip('"') in written for row in rows)
    assert json.loads(written)["n-samples"][TASK] == {"original": 100, "effective": 3}


def test_the_calibration_of_a_client_is_used(tmp_path: Path) -> None:
    folder = task_folder(tmp_path, [("a", "positive"), ("b", "positive"), ("c", "positive"), ("d", "negative")])
    sure = Calibration(weights=(0.0, 0.0), bias=(0.0, 50.0))

    result = evaluate_prompt(prompt_set(), ScriptedFM(), folder, TASK, calibration=sure)

    assert measured(result) == pytest.approx({"accuracy": 0.75, "brier": 2 / 4})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"doc_to_choice": "[bad, good]"},
            DataError,
            f"2 rows of {TASK} have a target that is not among their choices",
        ),
        ({"doc_to_choice": "[negative, positive, mixed]"}, ConfigError, "2 of 6 choices of the task are no labels"),
        ({"description": "What is it?"}, ConfigError, f"{TASK} puts a description or examples before the text"),
        ({"num_fewshot": "1", "fewshot_split": "test"}, ConfigError, f"{TASK} puts a description or examples before"),
        ({"output_type": "loglikelihood"}, ConfigError, f"{TASK} has output_type loglikelihood"),
    ],
)
def test_a_task_that_a_prompt_set_cannot_do_is_refused(
    changes: dict[str, str], error: type[Exception], message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = task_folder(tmp_path, [("my secret", "positive"), ("another", "negative")], **changes)

    with pytest.raises(error, match=message) as caught:
        evaluate_prompt(prompt_set(), ScriptedFM(), folder, TASK)

    assert "secret" not in str(caught.value) + caplog.text


def test_targets_may_be_places_among_the_choices(tmp_path: Path) -> None:
    folder = task_folder(tmp_path, [("a", "positive"), ("b", "negative")], doc_to_target="'{{1}}'")

    result = evaluate_prompt(prompt_set(bias=(0.0, 50.0)), ScriptedFM(), folder, TASK)

    assert measured(result)["accuracy"] == 1.0


def test_a_task_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=f"'sentiment'.*{TASK}"):
        evaluate_prompt(prompt_set(), ScriptedFM(), EXAMPLE, "sentiment")
    with pytest.raises(ConfigError, match="has no task"):
        evaluate_prompt(prompt_set(), ScriptedFM(), tmp_path, TASK)


def test_the_example_is_a_part_of_the_demo() -> None:
    demo = {(row["text"], row["label"]) for row in demo_rows("test")}
    rows = read_rows(EXAMPLE / "test.csv", client_column="", text_column="text", label_column="label", client="all")

    assert {(text, label) for _, text, label in rows} < demo
    assert np.unique([label for _, _, label in rows], return_counts=True)[1].tolist() == [50, 50]
