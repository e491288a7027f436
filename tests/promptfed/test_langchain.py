"""LangChain: its own suite for chat models, what the model is asked, and tuned prompts as templates and classifiers."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.tracers.context import collect_runs
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from pydantic import ValidationError

from promptfed.errors import CapabilityError, ConfigError, DataError, FMError, FMUnreachableError
from promptfed.fm.base import BaseFM
from promptfed.fm.scripted import ScriptedFM
from promptfed.langchain import FMChatModel, classifier, prompt_template, transcript
from promptfed.prompts.artefact import Prediction, PromptSet
from promptfed.prompts.calibration import Calibration
from promptfed.prompts.template import PromptTemplate
from promptfed.types import Capability, FMRequest, FMResponse, LabelRequest, TextRequest
from tests.support import CountingFM, FailingFM, wait_for

EXAMPLE = Path(__file__).parents[2] / "examples" / "langchain_chain.py"
CANARY = "canary-7f3a private sentence"


@pytest.fixture(autouse=True)
def no_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """LangSmith must not be called, whatever the shell of who runs this says."""
    for variable in ("LANGSMITH_TRACING", "LANGSMITH_TRACING_V2", "LANGCHAIN_TRACING", "LANGCHAIN_TRACING_V2"):
        monkeypatch.setenv(variable, "false")


class FixedFM(BaseFM):
    """Answers everything with ``answer``."""

    fm_id = "fixed:model@0"
    capabilities = frozenset({Capability.TEXT, Capability.LABEL_LOGPROBS})

    def __init__(self, answer: FMResponse) -> None:
        self._answer = answer

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        return [self._answer] * len(requests)


def chat(*phrases: str, **fields: Any) -> tuple[FMChatModel, CountingFM]:
    """A chat model over a model that says one of ``phrases``, and that model, which remembers what it was asked."""
    fm = CountingFM(ScriptedFM(phrases=phrases or ("yes",)))
    return FMChatModel(fm=fm, **fields), fm


# ---------------------------------------------------------------- LangChain's own suite


# Fixtures of pytest plug-ins that langchain-tests depends on. They are not installed, since they disturb other tests:
# pytest-socket takes the guard of conftest.py away.
@pytest.fixture
def benchmark() -> Callable[[Callable[[], Any]], Any]:
    """Run once; nothing is timed."""
    return lambda function: function()


@pytest.fixture
def snapshot() -> None:
    """For a test that skips what can't be serialised."""


@pytest.fixture
def vcr() -> None:
    """For a test that skips where nothing is recorded."""


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


class TestUnit(ChatModelUnitTests):
    chat_model_class = FMChatModel

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"fm": ScriptedFM()}

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        """Of the standard parameters those that a foundation model has; keys and timeouts are its adapter's."""
        return {"temperature": 0, "max_tokens": 100, "stop": []}


@pytest.mark.anyio
class TestIntegration(ChatModelIntegrationTests):
    """It calls no tools, reads text only, and is one model: what LangChain tests of more is skipped."""

    chat_model_class = FMChatModel
    supports_model_override = False
    supported_usage_metadata_details = {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}  # noqa: RUF012

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"fm": ScriptedFM()}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        fm = FixedFM(FMResponse(text="fine", prompt_tokens=9, completion_tokens=1, cached_tokens=8))
        model = FMChatModel(fm=fm)
        return next(model.stream("Hello")) if stream else model.invoke("Hello")


# ---------------------------------------------------------------- what the model is asked


def test_a_conversation_is_a_transcript_that_the_answer_continues() -> None:
    model, fm = chat("fine", stop=("#",))

    model.invoke([("system", "Be brief."), ("human", "Hi."), ("ai", "Hello."), ("human", "How are you?")])

    assert fm.requests == [
        TextRequest(
            prompt="System: Be brief.\nUser: Hi.\nAssistant: Hello.\nUser: How are you?\nAssistant:",
            max_tokens=256,
            stop=("#", "\nUser:"),
        )
    ]


def test_a_raw_model_reads_one_human_message_as_it_stands() -> None:
    model, fm = chat(raw=True)

    model.invoke("Text: {x} User: y\nLabel:")

    assert fm.requests == [TextRequest(prompt="Text: {x} User: y\nLabel:", max_tokens=256, stop=())]


@pytest.mark.parametrize("messages", [[], [SystemMessage(CANARY)], [HumanMessage(CANARY), HumanMessage(CANARY)]])
def test_a_raw_model_refuses_a_conversation(messages: list[Any]) -> None:
    model, fm = chat(raw=True)

    with pytest.raises(ConfigError, match="one human message; got") as raised:
        model.invoke(messages)
    assert CANARY not in str(raised.value)
    assert fm.requests == []


def test_pieces_of_a_streamed_answer_can_be_part_of_a_conversation() -> None:
    messages = [HumanMessage("a"), AIMessageChunk(["b", {"type": "text", "text": "c"}]), HumanMessage("d")]

    assert transcript(messages) == "User: a\nAssistant: bc\nUser: d\nAssistant:"


def test_the_fields_of_a_call_go_before_those_of_the_model() -> None:
    model, fm = chat(raw=True, max_tokens=5, temperature=0.5, top_p=0.9, seed=1, stop=["a"])

    model.invoke("x")
    model.invoke("x", stop=["b", "c"], max_tokens=6, temperature=0.25, top_p=0.75, seed=2)
    model.bind(seed=3).invoke("x", stop=[])

    assert fm.requests == [
        TextRequest(prompt="x", max_tokens=5, temperature=0.5, top_p=0.9, seed=1, stop=("a",)),
        TextRequest(prompt="x", max_tokens=6, temperature=0.25, top_p=0.75, seed=2, stop=("b", "c")),
        TextRequest(prompt="x", max_tokens=5, temperature=0.5, top_p=0.9, seed=3, stop=()),
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temprature": 1.0}, "option temprature of a call: Extra inputs.*may have max_tokens, temperature, top_p"),
        ({"model": "other"}, "option model of a call"),
        ({"max_tokens": 0}, "option max_tokens of a call: .*greater than or equal to 1"),
        ({"temperature": float("nan")}, "option temperature of a call"),
        ({"seed": -1}, "option seed of a call"),
        ({"stop": ["a", ""]}, r"option stop\.1 of a call"),
    ],
)
def test_an_option_of_a_call_that_it_does_not_have_is_refused(options: dict[str, Any], said: str) -> None:
    model, fm = chat()

    with pytest.raises(ConfigError, match=said):
        model.invoke("x", **options)
    assert fm.requests == []


@pytest.mark.parametrize("fields", [{"temprature": 1.0}, {"timeout": 3}, {"top_p": 0.0}, {"max_tokens": 0}, {"fm": 3}])
def test_a_field_that_it_does_not_have_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        FMChatModel(**{"fm": ScriptedFM(), **fields})


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "at least one message"),
        (
            [HumanMessage([{"type": "text", "text": CANARY}, {"type": "image", "url": "http://x"}])],
            "human .*holds image",
        ),
        (
            [HumanMessage(CANARY), AIMessage("", tool_calls=[{"name": "f", "args": {}, "id": "1"}])],
            "ai .*holds tool_call",
        ),
        ([HumanMessage(CANARY), ToolMessage(CANARY, tool_call_id="1")], "got a tool message"),
    ],
)
def test_what_is_not_text_is_refused_and_not_left_out(messages: list[Any], said: str) -> None:
    model, fm = chat()

    with pytest.raises(ConfigError, match=said) as raised:
        model.invoke(messages)
    assert CANARY not in str(raised.value)
    assert fm.requests == []


# ---------------------------------------------------------------- what it answers


def test_an_answer_tells_its_tokens_and_how_it_ended() -> None:
    answer = FMResponse(text=" a b\n", prompt_tokens=7, completion_tokens=2, cached_tokens=5, truncated=True)
    model = FMChatModel(fm=FixedFM(answer), max_tokens=2)

    got, longer = model.invoke("x"), model.invoke("x", max_tokens=3)

    assert got.content == "a b"
    assert got.usage_metadata == {
        "input_tokens": 7,
        "output_tokens": 2,
        "total_tokens": 9,
        "input_token_details": {"cache_read": 5},
    }
    about = {k: got.response_metadata[k] for k in ("model_name", "fm_id", "finish_reason", "truncated")}
    assert about == {"model_name": "model", "fm_id": "fixed:model@0", "finish_reason": "length", "truncated": True}
    assert longer.response_metadata["finish_reason"] == "stop"


@pytest.mark.parametrize("is_async", [False, True])
def test_a_failed_answer_is_an_error(is_async: bool) -> None:
    failed, outage = FailingFM(), FixedFM(FMResponse(error="HTTP 503", outage=True))

    def ask(fm: BaseFM) -> Any:
        model = FMChatModel(fm=fm)
        return wait_for(model.ainvoke(CANARY)) if is_async else model.invoke(CANARY)

    with pytest.raises(FMError, match="failing@0 gave no answer: refused") as raised:
        ask(failed)
    assert type(raised.value) is FMError
    with pytest.raises(FMUnreachableError, match="HTTP 503") as raised:
        ask(outage)
    assert CANARY not in str(raised.value)


def test_it_answers_inside_a_running_event_loop_both_ways() -> None:
    model, _ = chat("fine")

    async def both() -> tuple[AIMessage, AIMessage]:
        return model.invoke("x"), await model.ainvoke("x")

    assert [m.content for m in wait_for(both())] == ["fine", "fine"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_streamed_answer_is_the_answer_in_one_piece(streaming: bool) -> None:
    model, fm = chat("fine day", streaming=streaming)

    async def pieces() -> list[AIMessageChunk]:
        return [piece async for piece in model.astream("x y z", seed=1)]

    whole = model.invoke("x y z", seed=1)
    (piece,), (apiece,) = list(model.stream("x y z", seed=1)), wait_for(pieces())

    assert piece.content == apiece.content == whole.content == "fine day"
    assert piece.usage_metadata == apiece.usage_metadata == whole.usage_metadata
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["total_tokens"] == 5 + 2  # with User: and Assistant:
    assert len(set(fm.requests)) == 1


def test_the_cache_tells_apart_what_changes_an_answer() -> None:
    cache = InMemoryCache()
    model, fm = chat(cache=cache)
    warmer, warmer_fm = chat(cache=cache, temperature=0.5)
    raw, raw_fm = chat(cache=cache, raw=True)
    other = FMChatModel(fm=ScriptedFM("other", phrases=("no",)), cache=cache)

    model.invoke("x")
    model.invoke("x")
    model.invoke("x", seed=1)
    warmer.invoke("x")
    raw.invoke("x")

    assert [r.seed for r in fm.requests if isinstance(r, TextRequest)] == [0, 1]
    assert other.invoke("x").content == "no"
    assert warmer_fm.n_calls == raw_fm.n_calls == 1


def test_tracers_are_told_the_model_and_its_settings() -> None:
    model, _ = chat(temperature=0.5, max_tokens=9, stop=["a"])

    with collect_runs() as seen:
        model.invoke("x")
        model.invoke("x", stop=["b"], max_tokens=3)

    first, second = (run.extra["metadata"] for run in seen.traced_runs)
    named = {"ls_provider": "promptfed", "ls_model_name": "overlap", "ls_model_type": "chat", "ls_temperature": 0.5}
    assert first.items() >= {**named, "ls_max_tokens": 9, "ls_stop": ["a"]}.items()
    assert second.items() >= {**named, "ls_max_tokens": 3, "ls_stop": ["b"]}.items()


def test_a_model_is_loaded_by_its_address() -> None:
    assert FMChatModel(fm="scripted:overlap").invoke("x").response_metadata["fm_id"] == "scripted:overlap@0"
    with pytest.raises(ConfigError, match="KIND:NAME"):
        FMChatModel(fm="overlap")


def test_a_model_that_can_not_do_it_is_refused_at_once() -> None:
    with pytest.raises(CapabilityError, match="FMChatModel needs text"):
        FMChatModel(fm=ScriptedFM(capabilities=frozenset({Capability.LABEL_LOGPROBS})))
    with pytest.raises(CapabilityError, match="classifier needs label_choice"):
        classifier(SET, ScriptedFM(capabilities=frozenset({Capability.TEXT})))


# ---------------------------------------------------------------- a prompt as a template


@pytest.mark.parametrize(
    "text",
    [
        "Text: {text}\nLabel:",
        'Answer as {"label": 1}, {} or {0.x!r:>9}.\n{text}',
        "{{text}}",  # a slot in braces that are text
        "}{ {text} }}{{ {other}",
    ],
)
def test_a_template_fills_the_slot_and_interprets_nothing_else(text: str) -> None:
    template = prompt_template(PromptTemplate(text=text, words=("a", "b")))

    assert template.input_variables == ["text"]
    value = "It {text} had {braces} and }"
    assert template.invoke({"text": value}).to_messages() == [HumanMessage(text.replace("{text}", value, 1))]


def test_a_raw_model_is_asked_what_the_prompt_was_tuned_with() -> None:
    model, fm = chat(raw=True)
    prompt = PromptTemplate(text="Text: {text}\nLabel:", words=("a", "b"))

    (prompt_template(prompt) | model).invoke({"text": "x y"})

    (scored,), (asked,) = prompt.requests(["x y"]), fm.requests
    assert isinstance(asked, TextRequest)
    assert asked.prompt == scored.prefix + scored.text + scored.suffix


# ---------------------------------------------------------------- a prompt as a classifier

P = PromptTemplate(text="A: {text}\n→", words=("bad", "good"))
Q = PromptTemplate(text="B: {text}", words=("poor", "fine"), separator="")
SET = PromptSet(labels=("negative", "positive"), prompts=(P, Q), weights=(0.75, 0.25), bias=(0.5, -0.5))


def by_length(request: LabelRequest) -> list[float]:
    """The second label's logit is the text's length; another for the prompt Q."""
    return [0.0, len(request.text.strip()) * (1.0 if request.prefix.startswith("A") else 3.0)]


def test_a_batch_is_one_fm_batch_and_predicts_what_the_set_does() -> None:
    fm = CountingFM(ScriptedFM(rule=by_length))
    texts = ["", "a", "abcd"]

    got = classifier(SET, fm).batch(texts)

    assert fm.batches == [6]
    # By hand: 0.75 * 1 + 0.25 * 3 = 1.5 a character; the bias takes 1 off.
    lean = np.array([-1.0, 0.5, 5.0])
    assert [p.proba["positive"] for p in got] == pytest.approx(1 / (1 + np.exp(-lean)), abs=1e-6)
    assert [p.label for p in got] == ["negative", "positive", "positive"]
    assert got == SET.predict(texts, fm=ScriptedFM(rule=by_length))


def test_a_classifier_has_all_four_ways_to_be_asked() -> None:
    fm = CountingFM(ScriptedFM(rule=by_length))
    step = classifier(SET, fm)
    one, many = SET.predict(["a"], fm=fm), SET.predict(["a", "b"], fm=fm)
    fm.batches.clear()

    assert step.invoke("a") == one[0]
    assert wait_for(step.ainvoke("a")) == one[0]
    assert step.batch(["a", "b"]) == many
    assert wait_for(step.abatch(["a", "b"])) == many
    assert step.batch([]) == []
    assert fm.batches == [2, 2, 4, 4]


def test_a_chain_hands_its_batch_on_whole() -> None:
    fm = CountingFM(ScriptedFM(rule=by_length))
    chain = RunnableLambda(str.strip) | classifier(SET, fm) | RunnableLambda(lambda p: p.label)

    assert chain.batch([" a ", "  "]) == ["positive", "negative"]
    assert fm.batches == [4]


def test_a_clients_own_calibration_takes_the_place_of_the_pooled_one() -> None:
    fm = ScriptedFM(rule=by_length)
    own = Calibration(weights=(1.0, 0.0), bias=(2.0, 0.0))

    assert classifier(SET, fm, own).invoke("a").proba["positive"] == pytest.approx(1 / (1 + np.e))
    with pytest.raises(DataError, match="calibration is for 1 prompts"):
        classifier(SET, fm, Calibration(weights=(1.0,), bias=(0.0, 0.0))).invoke("a")


def test_a_text_that_the_model_failed_on_has_no_label() -> None:
    assert classifier(SET, FailingFM()).batch(["a", "b"]) == [Prediction(label=None, proba={})] * 2


def test_a_model_that_breaks_is_an_error_or_a_value_as_the_caller_wants() -> None:
    step = classifier(SET, FailingFM(FMError("gone")))

    with pytest.raises(FMError, match="gone"):
        step.invoke("a")
    assert [str(e) for e in step.batch(["a", "b"], return_exceptions=True)] == ["gone", "gone"]


def test_an_option_that_a_classifier_does_not_have_is_refused() -> None:
    with pytest.raises(TypeError, match="temperature"):
        classifier(SET, ScriptedFM()).invoke("a", temperature=1.0)


# ---------------------------------------------------------------- the package and the example


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "langchain_core.callbacks", None)
    spec = importlib.util.find_spec("promptfed.langchain")
    assert spec is not None
    assert spec.loader is not None

    with pytest.raises(ConfigError, match=r"pip install 'promptfed\[langchain\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.model
@pytest.mark.usefixtures("one_thread")
def test_the_example_runs_on_the_real_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE)])

    runpy.run_path(str(EXAMPLE), run_name="__main__")

    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["positive", "negative", "positive"]
    assert lines[5].strip() == "positive"
    assert "Paris" in lines[7]
    assert "'total_tokens': " in lines[8]
