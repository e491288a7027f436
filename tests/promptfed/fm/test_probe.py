"""Finding out what a server can: by asking it, not by its name, and not by what went wrong on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from promptfed.errors import CapabilityError, ConfigError, FMError, FMUnreachableError, UnknownNameError
from promptfed.fm import probe
from promptfed.fm.openai import OpenAIFM
from promptfed.types import Capability
from tests.hosted import NAME, Faults, Hosted, Mood, Site

TEXT, TOP, CHOICE = Capability.TEXT, Capability.TOP_LOGPROBS, Capability.LABEL_CHOICE
EXACT = {TEXT, Capability.LABEL_LOGPROBS, Capability.PROMPT_LOGPROBS}
KINDS: list[tuple[Mood, str, set[Capability]]] = [
    ("vllm", "vllm:little@", EXACT),
    ("completions", "completions-top5:little@fp-1", {TEXT, TOP}),
    ("chat", "chat-top20:little@little", {TEXT, TOP}),
    ("chat-new", "chat-top20:little@little", {TEXT, TOP}),
    ("schema", "chat-schema:little@little", {TEXT, CHOICE}),
    ("words", "chat-words:little@little", {TEXT, CHOICE}),
]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMPTFED_API_KEY", raising=False)
    monkeypatch.setattr(probe, "WAITS_S", (0.01, 0.01))


class Odd(Hosted):
    """``change(path, body, answer)`` may change the answer, or give a status and another one."""

    def __init__(self, mood: Mood, change: Callable[[str, dict[str, Any], Any], tuple[int, Any] | None]) -> None:
        super().__init__(mood)
        self._change = change

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        status, answer = super().answer(path, body)
        return self._change(path, body, answer) or (status, answer)


def found(app: Hosted) -> OpenAIFM:
    with Site(app) as site:
        return site.connect()


# ---------------------------------------------------------------- every kind


@pytest.mark.parametrize(("mood", "fm_id", "capabilities"), KINDS)
def test_a_server_is_what_it_does(mood: Mood, fm_id: str, capabilities: set[Capability]) -> None:
    app = Hosted(mood)

    fm = found(app)

    assert fm.fm_id.startswith(fm_id)
    assert fm.capabilities == capabilities
    assert not fm.in_process
    assert len(app.bodies) <= 6
    assert all(body.get("max_tokens", 0) + body.get("max_completion_tokens", 0) <= 64 for body in app.bodies)


@pytest.mark.parametrize(("mood", "fm_id", "capabilities"), KINDS)
@pytest.mark.parametrize("kind", ["429", "500", "truncated"])
def test_what_goes_wrong_twice_does_not_make_it_another(
    mood: Mood, fm_id: str, capabilities: set[Capability], kind: str
) -> None:
    app = Hosted(mood, Faults(seed=0, kinds=[kind], share=1.0, most=2))

    fm = found(app)

    assert fm.fm_id.startswith(fm_id)
    assert fm.capabilities == capabilities
    assert app.met[kind] >= 2 * 3


@pytest.mark.parametrize("kind", ["429", "502", "503"])
def test_a_server_that_is_busy_for_longer_is_said_to_be(kind: str) -> None:
    with pytest.raises(FMUnreachableError, match=rf"no OpenAI-compatible server answers at .*\(HTTP {kind}\)"):
        found(Hosted("vllm", Faults(seed=0, kinds=[kind], share=1.0, most=99)))


@pytest.mark.parametrize("path", ["/completions", "/chat/completions"])
def test_one_that_is_busy_with_a_path_only_is_not_taken_for_one_without_it(path: str) -> None:
    def busy(asked: str, _body: dict[str, Any], _answer: Any) -> tuple[int, Any] | None:
        return (503, {}) if asked == path else None

    with pytest.raises(FMUnreachableError, match=rf"answers /models but not {path} \(HTTP 503\)"):
        found(Odd("vllm" if path == "/completions" else "chat", busy))


def test_a_busy_server_is_left_alone_for_as_long_as_it_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    with Site(Hosted("words", Faults(seed=0, kinds=["429"], share=1.0, most=1, retry_after="7"))) as site:
        monkeypatch.setattr(probe, "asyncio", SimpleNamespace(sleep=sleep))  # not the server's
        site.connect()

    assert set(waits) == {7.0}


# ---------------------------------------------------------------- what it is called


def test_a_chat_is_known_by_the_model_that_its_answers_name() -> None:
    def dated(_path: str, _body: dict[str, Any], answer: Any) -> None:
        answer["model"] = "little-2026-11-01"

    def unnamed(_path: str, _body: dict[str, Any], answer: Any) -> None:
        answer.pop("model", None)

    assert found(Odd("words", dated)).fm_id == "chat-words:little@little-2026-11-01"
    assert found(Odd("words", unnamed)).fm_id == "chat-words:little@unknown"


def test_ways_to_score_labels_are_not_the_same_model() -> None:
    """What one gave must not be mixed with what the other gives, in a run that goes on or in a cache."""
    ids = {found(Hosted(mood)).fm_id for mood, _, _ in KINDS if mood != "chat-new"}

    assert len(ids) == 5


def listed(*cards: dict[str, Any]) -> Callable[[str, dict[str, Any], Any], tuple[int, Any] | None]:
    return lambda path, _body, _answer: (200, {"data": list(cards)}) if path == "/models" else None


def test_a_vllm_server_is_known_by_all_that_it_says_of_its_model() -> None:
    cards: list[dict[str, Any]] = [
        {"id": NAME},
        {"id": NAME, "root": "/models/a"},
        {"id": NAME, "root": "/models/a", "max_model_len": 4096},
    ]

    ids = {found(Odd("vllm", listed(card))).fm_id for card in cards}

    assert len(ids) == 3


def test_the_digest_in_a_second_name_is_the_models() -> None:
    with Site(Odd("vllm", listed({"id": NAME}, {"id": f"{NAME}@abc123"}))) as site:
        fm = site.connect()
        site.app.fingerprint = "fp-2"  # another version of the server, with the same weights
        scores = fm.score_labels("Text: {text}\nLabel:", ["fine"], ["negative", "positive"])

    assert fm.fm_id == "vllm:little@abc123"
    assert not scores.mask.any()


def test_a_server_without_prompt_log_probabilities_scores_single_tokens_all_the_same() -> None:
    def refuses(_path: str, body: dict[str, Any], _answer: Any) -> tuple[int, Any] | None:
        return (400, {}) if "prompt_logprobs" in body else None

    assert found(Odd("vllm", refuses)).capabilities == {TEXT, Capability.LABEL_LOGPROBS}


@pytest.mark.parametrize("field", ["return_token_ids", "logprob_token_ids"])
def test_a_vllm_server_of_an_old_version_is_asked_as_any_other(field: str) -> None:
    def ignores(path: str, body: dict[str, Any], answer: Any) -> None:
        if field in body:
            for choice in answer["choices"]:
                choice["prompt_token_ids"] = choice["logprobs"] = None

    assert found(Odd("vllm", ignores)).fm_id == "completions-top20:little@fp-1"


# ---------------------------------------------------------------- servers that are none


@pytest.mark.parametrize("status", [404, 405])
def test_a_server_that_keeps_no_list_of_models_is_asked_all_the_same(status: int) -> None:
    fm = found(Odd("chat", lambda path, _body, _answer: (status, {}) if path == "/models" else None))

    assert fm.fm_id == "chat-top20:little@little"


def test_a_model_that_is_not_listed_is_refused_with_those_that_are() -> None:
    with Site(Hosted("vllm")) as site, pytest.raises(UnknownNameError, match=r"'litle'.*did you mean 'little'"):
        OpenAIFM(f"{site.url}#litle")


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_asked_for_later_is_named(status: int) -> None:
    def locked(path: str, _body: dict[str, Any], _answer: Any) -> tuple[int, Any] | None:
        return (status, {}) if path != "/models" else None

    with pytest.raises(ConfigError, match=rf"refuses this API key \(HTTP {status}\); set PROMPTFED_API_KEY"):
        found(Odd("chat", locked))


def test_a_server_that_sends_elsewhere_is_not_followed() -> None:
    def moved(path: str, _body: dict[str, Any], _answer: Any) -> tuple[int, Any] | None:
        return (308, {}) if path != "/models" else None

    with pytest.raises(FMError, match="sends on to another address"):
        found(Odd("chat", moved))


@pytest.mark.parametrize("status", [400, 404, 405, 422, 500, 501])
def test_a_server_that_answers_nothing_is_said_to_write_nothing(status: int) -> None:
    def nothing(path: str, _body: dict[str, Any], _answer: Any) -> tuple[int, Any] | None:
        return (status, {}) if path != "/models" else None

    with pytest.raises(CapabilityError, match=r"little at .* answers neither /completions nor /chat/completions"):
        found(Odd("chat", nothing))


@pytest.mark.parametrize(
    "said",
    [None, [], 3, {}, {"choices": None}, {"choices": []}, {"choices": [3]}, {"choices": {"a": 1}}, {"choices": [{}]}],
    ids=repr,
)
def test_answers_that_are_none_are_no_capability(said: Any) -> None:
    def rubbish(path: str, _body: dict[str, Any], _answer: Any) -> tuple[int, Any] | None:
        return (200, said) if path == "/chat/completions" else None

    with pytest.raises(CapabilityError, match="answers neither"):
        found(Odd("chat", rubbish))


@pytest.mark.parametrize(
    "told",
    [None, 3, {}, {"content": None}, {"content": [{"top_logprobs": None}]}, {"content": [{"top_logprobs": []}]}],
    ids=repr,
)
def test_log_probabilities_that_are_none_are_no_capability(told: Any) -> None:
    def rubbish(path: str, body: dict[str, Any], answer: Any) -> None:
        if "logprobs" in body:
            answer["choices"][0]["logprobs"] = told

    assert found(Odd("chat", rubbish)).capabilities == {TEXT, CHOICE}


def test_one_token_alone_is_not_enough_to_tell_labels_apart() -> None:
    def one(_path: str, _body: dict[str, Any], answer: Any) -> None:
        for choice in answer.get("choices", ()):
            choice["logprobs"] = {"top_logprobs": [{" a": math.log(0.5)}]}

    with pytest.raises(CapabilityError, match="answers neither"):
        found(Odd("completions", one))


def test_what_is_asked_holds_nobodys_text() -> None:
    asked = set()
    for mood, _, _ in KINDS:
        app = Hosted(mood)
        found(app)
        asked |= {str(body.get("prompt") or body["messages"]) for body in app.bodies}

    assert asked == {
        "['The sky is']",
        "[' blue', ' not blue']",
        "[{'role': 'user', 'content': 'The sky is blue. Is it? Answer yes or no.'}]",
    }
