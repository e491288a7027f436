"""The dialect of ``/chat/completions``: labels by the most probable first tokens, by a JSON schema, or out of words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from promptfed.fm.base import BaseFM
from promptfed.fm.dialects.chat import CHOICE_TOKENS
from promptfed.types import FMRequest, FMResponse, LabelRequest, TextRequest
from tests.hosted import Hosted, LittleModel, Mood, Site
from tests.support import wait_for

MODEL = LittleModel()
TEXT = " The film seemed lovely."
PROMPT = f"Text:{TEXT}\nLabel:"


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMPTFED_API_KEY", raising=False)


def label(*labels: str, text: str = TEXT, absolute: bool = True) -> LabelRequest:
    return LabelRequest(prefix="Text:", text=text, suffix="\nLabel:", labels=labels, absolute=absolute)


def ask(fm: BaseFM, *requests: FMRequest) -> list[FMResponse]:
    return wait_for(fm.complete(requests))


def is_asked(body: dict[str, Any]) -> bool:
    """Whether it is no probe."""
    return "messages" in body and not body["messages"][-1]["content"].startswith("The sky is")


class Odd(Hosted):
    """Changes the one choice of answers to what is no probe."""

    def __init__(self, mood: Mood, change: Callable[[dict[str, Any]], Any]) -> None:
        super().__init__(mood)
        self._change = change

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        status, answer = super().answer(path, body)
        if status == 200 and is_asked(body):
            self._change(answer["choices"][0])
        return status, answer


def says(mood: Mood, content: str | None, *labels: str) -> FMResponse:
    """The answer to a request about ``labels`` at a server that says ``content``."""
    with Site(Odd(mood, lambda choice: choice["message"].update(content=content))) as site:
        (answer,) = ask(site.connect(), label(*labels))
    return answer


def probabilities(answer: FMResponse) -> list[float]:
    return [round(math.exp(logprob), 9) for logprob in answer.logprobs or ()]


# ---------------------------------------------------------------- the most probable tokens


@pytest.mark.parametrize(("mood", "limit"), [("chat", "max_tokens"), ("chat-new", "max_completion_tokens")])
def test_labels_are_scored_by_the_first_token_whatever_its_capitals(mood: Mood, limit: str) -> None:
    with Site(Hosted(mood)) as site:
        (answer,) = ask(site.connect(), label(" negative", " positive"))
        sent = [body for body in site.app.bodies if is_asked(body)]

    assert answer.logprobs == (MODEL.logprob(PROMPT, " negative"), MODEL.logprob(PROMPT, " positive"))
    assert answer.censored is None
    told = "Answer with one of these and nothing else: negative, positive"
    assert sent == [
        {
            "model": "little",
            "messages": [{"role": "system", "content": told}, {"role": "user", "content": PROMPT}],
            limit: 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 20,
        }
    ]
    assert answer.prompt_tokens > 0


def tops(*pairs: tuple[str, float]) -> dict[str, Any]:
    tokens = [{"token": token, "logprob": math.log(p) if p > 0 else p} for token, p in pairs]
    return {"content": [{"token": pairs[0][0], "top_logprobs": tokens}]}


def test_spellings_of_one_label_are_added_up_and_one_that_is_missing_is_bounded() -> None:
    told = tops(("Positive", 0.5), ("positive", 0.25), (" positive", 0.125), ("The", 0.0625))
    with Site(Odd("chat", lambda choice: choice.update(logprobs=told))) as site:
        (answer,) = ask(site.connect(), label(" negative", " positive"))

    assert probabilities(answer) == [0.0625, 0.875]
    assert answer.censored == (True, False)


def test_a_token_told_twice_counts_once() -> None:
    told = tops(("Positive", 0.5), ("Negative", 0.25), ("Positive", 0.5))
    with Site(Odd("chat", lambda choice: choice.update(logprobs=told))) as site:
        (answer,) = ask(site.connect(), label(" negative", " positive"))

    assert probabilities(answer) == [0.25, 0.5]


@pytest.mark.parametrize(
    "told",
    [
        None,
        {"content": None},
        {"content": []},
        {"content": [{"token": "x"}]},
        tops(("Positive", math.nan)),
        tops(("Positive", 0.5), ("Negative", -math.inf)),
    ],
    ids=["null", "no content", "empty", "no top", "NaN", "inf"],
)
def test_log_probabilities_that_are_not_there_are_a_failed_item(told: Any) -> None:
    with Site(Odd("chat", lambda choice: choice.update(logprobs=told))) as site:
        (answer,) = ask(site.connect(), label(" negative", " positive"))

    assert answer == FMResponse(error="malformed answer")


# ---------------------------------------------------------------- a choice


@pytest.mark.parametrize("mood", ["schema", "words"])
def test_a_label_that_is_chosen_gets_nine_tenths_and_all_others_share_the_rest(mood: Mood) -> None:
    with Site(Hosted(mood)) as site:
        (answer,) = ask(site.connect(), label(" negative", " positive", " stale"))
        (sent,) = (body for body in site.app.bodies if is_asked(body))

    assert probabilities(answer) == [0.05, 0.9, 0.05]
    assert answer.censored == (True, False, True)
    assert sent["max_tokens"] == CHOICE_TOKENS
    assert "temperature" not in sent
    assert ("response_format" in sent) == (mood == "schema")


def test_the_schema_lets_one_of_the_labels_through() -> None:
    with Site(Hosted("schema")) as site:
        ask(site.connect(), label(" negative", " very positive"))
        (sent,) = (body["response_format"] for body in site.app.bodies if is_asked(body))

    assert sent["json_schema"]["schema"]["properties"] == {
        "label": {"type": "string", "enum": ["negative", "very positive"]}
    }
    assert sent["json_schema"]["strict"] is True


@pytest.mark.parametrize(
    "content",
    ['{"label": "positive"}', '{\n  "label": "positive", "why": "x"}', '{"label": "positive", "label": "positive"}'],
)
def test_a_label_in_json_is_found(content: str) -> None:
    assert probabilities(says("schema", content, " negative", " positive")) == [0.1, 0.9]


@pytest.mark.parametrize(
    "content",
    [None, "", "positive", "[]", '"positive"', '{"label": "Positive"}', '{"label": ["positive"]}', '{"label": null}'],
)
def test_what_is_no_label_in_json_is_a_failed_item(content: str | None) -> None:
    answer = says("schema", content, " negative", " positive")

    assert (answer.logprobs, answer.outage) == (None, False)
    assert answer.error == "the answer names no label, or several"


@pytest.mark.parametrize(
    ("content", "labels", "chosen"),
    [
        ("positive", (" negative", " positive"), 1),
        ("  **Positive**.\n", (" negative", " positive"), 1),
        ("I'd say it is POSITIVE, yes: positive!", (" negative", " positive"), 1),
        ("not good", (" good", " not good"), 1),
        ("good", (" good", " not good"), 0),
        ("US", (" us", " US"), 1),
        ("us", (" us", " US"), 0),
        ("C++", (" C", " C++"), 1),
        ("größer", (" groß", " größer"), 1),
    ],
)
def test_a_label_in_words_is_found(content: str, labels: tuple[str, ...], chosen: int) -> None:
    answer = says("words", content, *labels)

    assert [round(p, 9) for p in probabilities(answer)] == [0.9 if k == chosen else 0.1 for k in range(len(labels))]


@pytest.mark.parametrize(
    ("content", "labels"),
    [
        (None, (" negative", " positive")),
        ("", (" negative", " positive")),
        ("positively", (" negative", " positive")),
        ("positive, not negative", (" negative", " positive")),
        ("Us", (" us", " US")),
        ("I can't tell.", (" negative", " positive")),
    ],
)
def test_words_that_name_no_label_or_several_are_a_failed_item(content: str | None, labels: tuple[str, ...]) -> None:
    answer = says("words", content, *labels)

    assert (answer.logprobs, answer.error) == (None, "the answer names no label, or several")
    assert answer.prompt_tokens > 0  # it was paid for


# ---------------------------------------------------------------- texts


def test_texts_are_the_models_and_a_stop_is_sent_where_there_is_one() -> None:
    requests = [
        TextRequest(prompt="clearly positive:\n-", max_tokens=9, temperature=0.8, top_p=0.9, seed=4),
        TextRequest(prompt="clearly negative:\n-", max_tokens=7, stop=()),
    ]
    with Site(Hosted("chat-new")) as site:
        answers = ask(site.connect(), *requests)
        sent = {body["messages"][0]["content"]: body for body in site.app.bodies if is_asked(body)}

    assert [a.text for a in answers] == [MODEL.write(r.prompt, r.seed) for r in requests]
    one, two = (sent[r.prompt] for r in requests)
    assert (one["max_completion_tokens"], one["temperature"], one["top_p"], one["seed"]) == (9, 0.8, 0.9, 4)
    assert one["stop"] == ["\n"]
    assert "stop" not in two


@pytest.mark.parametrize("mood", ["chat", "words"])
def test_a_text_that_is_missing_is_a_failed_item(mood: Mood) -> None:
    with Site(Odd(mood, lambda choice: choice["message"].update(content=None))) as site:
        (answer,) = ask(site.connect(), TextRequest(prompt="Go on:", max_tokens=4))

    assert answer == FMResponse(error="malformed answer")


def test_every_item_is_a_request_of_its_own_and_the_order_is_kept() -> None:
    texts = [f" It was {word}." for word in ("lovely", "stale", "superb", "horrid") * 5]
    with Site(Hosted("chat")) as site:
        answers = ask(site.connect(), *(label(" negative", " positive", text=text) for text in texts))
        n_asked = sum(is_asked(body) for body in site.app.bodies)

    likely = [a.logprobs is not None and a.logprobs[1] > a.logprobs[0] for a in answers]
    assert likely == [True, False] * 10
    assert n_asked == 20


def test_what_a_request_asks_is_json_whatever_its_text_holds() -> None:
    text = ' "quoted" {braces}\n\t\x00 \U0001f600'
    with Site(Hosted("words")) as site:
        ask(site.connect(), label(" negative", " positive", text=text))
        (sent,) = (body for body in site.app.bodies if is_asked(body))

    assert sent["messages"][1]["content"] == f"Text:{text}\nLabel:"
    assert json.dumps(sent)
