"""vLLM's dialect against a look-alike: exact labels of one and of several tokens, and that nothing is asked twice."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import pytest

from promptfed.errors import FMError
from promptfed.fm.base import BaseFM
from promptfed.fm.decorators import Retrying
from promptfed.fm.dialects import vllm
from promptfed.prompts.soft import soft_prompt
from promptfed.types import FMRequest, FMResponse, LabelRequest, TextRequest
from tests.hosted import Hosted, LittleModel, Site
from tests.support import wait_for

MODEL = LittleModel()
PREFIX = "Is it negative or positive?\n\nText:"


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMPTFED_API_KEY", raising=False)


def label(
    text: str, *labels: str, absolute: bool = True, prefix: str = PREFIX, suffix: str = "\nLabel:"
) -> LabelRequest:
    return LabelRequest(prefix=prefix, text=text, suffix=suffix, labels=labels, absolute=absolute)


def ask(fm: BaseFM, *requests: FMRequest) -> list[FMResponse]:
    return wait_for(fm.complete(requests))


class Odd(Hosted):
    """A vLLM look-alike whose answers are changed by ``change(body, answer)``, which may return a status instead."""

    def __init__(self, change: Callable[[dict[str, Any], Any], int | None]) -> None:
        super().__init__("vllm")
        self._change = change

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        status, answer = super().answer(path, body)
        other = self._change(body, answer) if "cache_salt" in body else None  # probes are answered as they should be
        return (other, {"error": {"message": "no"}}) if other else (status, answer)


def kinds(site: Site) -> list[str]:
    """What was asked for, request by request, without probes."""
    fields = ("return_token_ids", "logprob_token_ids", "prompt_logprobs", "seed")
    return [next(f for f in fields if f in body) for body in site.app.bodies if "cache_salt" in body]


# ---------------------------------------------------------------- exact log-probabilities


@pytest.fixture(scope="module")
def site() -> Any:
    with Site(Hosted("vllm")) as site:
        yield site


def test_labels_of_one_token_have_the_models_own_log_probabilities(site: Site) -> None:
    prompt = f"{PREFIX} The film seemed lovely.\nLabel:"

    (answer,) = ask(site.connect(), label(" The film seemed lovely.", " negative", " positive"))

    assert answer.logprobs == (MODEL.logprob(prompt, " negative"), MODEL.logprob(prompt, " positive"))
    assert (answer.censored, answer.label_tokens) == (None, None)
    assert answer.prompt_tokens == 18  # Is it negative or positive ? \n \n Text : The film seemed lovely . \n Label :
    assert answer.completion_tokens == 1


def test_labels_are_normalised_over_each_other_unless_asked_for_as_they_are(site: Site) -> None:
    (absolute, relative) = ask(
        site.connect(), label(" dull", " stale", " the"), label(" dull", " stale", " the", absolute=False)
    )

    assert sum(map(math.exp, absolute.logprobs or ())) < 0.9
    assert sum(map(math.exp, relative.logprobs or ())) == pytest.approx(1.0)
    differences = {round(a - r, 9) for a, r in zip(absolute.logprobs or (), relative.logprobs or (), strict=True)}
    assert len(differences) == 1


def test_labels_of_several_tokens_are_summed_over_their_tokens(site: Site) -> None:
    (answer,) = ask(site.connect(), label("It was", " lovely.", " stale", prefix="", suffix=""))

    lovely = MODEL.logprob("It was", " lovely") + MODEL.logprob("It was lovely", ".")
    assert answer.logprobs == pytest.approx((lovely, MODEL.logprob("It was", " stale")))
    assert answer.label_tokens == (2, 1)
    assert answer.prompt_tokens == 2 + 4  # "It was" once, and once with " lovely." behind it
    assert answer.completion_tokens == 2


def test_more_label_words_than_one_request_may_name_go_in_several(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = (" film", " stale", " story.", " the", " lovely.", " and", " plot.")
    fm = site.connect()
    (at_once,) = ask(fm, label("It was", *labels))
    monkeypatch.setattr(vllm, "MAX_TOKEN_IDS", 3)
    monkeypatch.setattr(vllm, "MAX_PROMPTS", 2)
    n_before = len(site.app.bodies)

    (in_parts,) = ask(fm, label("It was", *labels))

    assert in_parts.logprobs == at_once.logprobs
    assert len(site.app.bodies) - n_before == 2 + 2  # four labels of one token, three of several


def test_an_empty_label_is_a_failed_item_and_asks_nothing(site: Site) -> None:
    fm = site.connect()
    n_before = len(site.app.bodies)

    (answer,) = ask(fm, label("It was", " good", ""))

    assert answer == FMResponse(error="nothing to score: a label is empty")
    assert len(site.app.bodies) == n_before


def test_texts_are_the_models_and_seeds_part_requests_only_where_they_matter(site: Site) -> None:
    fm = site.connect()
    n_before = len(site.app.bodies)
    drawn = [TextRequest(prompt="clearly positive:\n-", max_tokens=9, temperature=0.8, seed=s) for s in (1, 2)]
    greedy = [TextRequest(prompt=f"clearly negative {s}:\n-", max_tokens=9, seed=s) for s in (0, 0)]

    answers = ask(fm, *drawn, *greedy)

    assert [a.text for a in answers[:2]] == [MODEL.write("clearly positive:\n-", s) for s in (1, 2)]
    assert len(site.app.bodies) - n_before == 3
    assert all(a.prompt_tokens > 0 for a in answers)


def test_a_soft_prompt_needs_the_weights_here(site: Site) -> None:
    soft = soft_prompt([[0.0, 1.0]])

    with pytest.raises(FMError, match="takes no soft prompts"):
        ask(site.connect(), TextRequest(prompt="x", max_tokens=3, soft=soft))


# ---------------------------------------------------------------- the salt


def test_each_client_has_a_salt_of_its_own_and_keeps_it() -> None:
    requests: list[FMRequest] = [label("It was", " lovely.", " stale"), TextRequest(prompt="Go on:", max_tokens=4)]
    salts: list[set[str]] = []
    with Site(Hosted("vllm")) as site:
        for _ in range(2):
            n_before = len(site.app.bodies)
            fm = site.connect()
            for _ in range(2):
                ask(fm, *requests)
            asked = [body for body in site.app.bodies[n_before:] if body["prompt"] != ["The sky is"]]
            salts.append({str(body.get("cache_salt")) for body in asked if body["prompt"] != [" blue", " not blue"]})

    assert [len(mine) for mine in salts] == [1, 1]
    (first,), (second,) = salts
    assert first != second
    assert min(len(first), len(second)) >= 43  # 256 bits


# ---------------------------------------------------------------- nothing is asked twice


def test_label_words_are_turned_into_tokens_once_however_many_ask_at_once() -> None:
    async def many(fm: BaseFM) -> None:
        await asyncio.gather(*(fm.complete([label(" x", " good", " bad", prefix=str(i))]) for i in range(6)))

    with Site(Hosted("vllm")) as site:
        fm = site.connect()
        asyncio.run(many(fm))
        asyncio.run(many(fm))  # in a loop of its own
        ask(fm, label(" x", " good", " fine"))

    lookups = [body["prompt"] for body in site.app.bodies if "return_token_ids" in body and "cache_salt" in body]
    assert lookups == [[" good", " bad"], [" fine"]]


@pytest.mark.parametrize("broken", ["prompt_logprobs", "logprob_token_ids"])
def test_when_one_part_of_an_answer_fails_only_that_is_asked_again(broken: str) -> None:
    requests = [label("It was", " lovely.", " stale"), label("This is", " lovely.", " stale")]
    left = [1]

    def fail_once(body: dict[str, Any], _: Any) -> int | None:
        return 503 if broken in body and left and left.pop() else None

    with Site(Hosted("vllm")) as site:
        expected = ask(site.connect(), *requests)
    with Site(Odd(fail_once)) as site:
        answers = ask(Retrying(site.connect(), wait_s=0.0), *requests)

    assert answers == expected
    assert sorted(kinds(site)) == sorted(["return_token_ids", "logprob_token_ids", "prompt_logprobs", broken])
    assert set(site.app.delivered.values()) == {1}


def test_a_prompt_that_is_too_long_fails_alone_and_the_others_are_paid_once() -> None:
    def too_long(body: dict[str, Any], _: Any) -> int | None:
        return 400 if any("long" in prompt for prompt in body["prompt"]) else None

    texts = ["a", "b", "c", "long", "d", "e"]
    with Site(Odd(too_long)) as site:
        answers = ask(site.connect(), *(label(text, " lovely.", " stale") for text in texts))

    assert [a.error for a in answers] == [None, None, None, "HTTP 400", None, None]
    assert not answers[3].outage
    assert set(site.app.delivered.values()) == {1}


# ---------------------------------------------------------------- answers that are not whole


def spoil(first: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any], Any], None]:
    """Changes the first choice of what is no look-up."""

    def change(body: dict[str, Any], answer: Any) -> None:
        if "return_token_ids" not in body:
            first(answer["choices"][0])

    return change


@pytest.mark.parametrize(
    "first",
    [
        lambda choice: choice["logprobs"]["top_logprobs"][0].clear(),
        lambda choice: choice.update(logprobs=None),
        lambda choice: choice["logprobs"].update(top_logprobs=[None]),
        lambda choice: choice["logprobs"]["top_logprobs"][0].update(
            dict.fromkeys(choice["logprobs"]["top_logprobs"][0], math.nan)
        ),
    ],
    ids=["no token", "no logprobs", "null", "NaN"],
)
def test_an_item_whose_label_is_left_out_fails_alone(first: Callable[[dict[str, Any]], None]) -> None:
    with Site(Odd(spoil(first))) as site:
        failed, fine = ask(site.connect(), label("a", " stale", " the"), label("b", " stale", " the"))

    assert failed == FMResponse(error="malformed answer")
    assert fine.error is None


@pytest.mark.parametrize(
    "first",
    [
        lambda choice: choice.update(prompt_logprobs=None),
        lambda choice: choice.update(prompt_logprobs=[None]),
        lambda choice: choice["prompt_logprobs"].pop(),
        lambda choice: choice["prompt_logprobs"].append({"1": {"logprob": -1.0}}),
        lambda choice: next(iter(choice["prompt_logprobs"][-1].values())).update(logprob=math.inf),
    ],
    ids=["none", "too few", "cut", "other tokens", "inf"],
)
def test_a_prompt_that_does_not_end_in_the_labels_tokens_is_no_answer(first: Callable[[dict[str, Any]], None]) -> None:
    with Site(Odd(spoil(first))) as site:
        failed, fine = ask(site.connect(), label("a", " lovely.", " stale."), label("b", " lovely.", " stale."))

    assert failed == FMResponse(error="malformed answer")
    assert fine.error is None


def test_a_label_word_without_tokens_fails_the_items_that_need_it() -> None:
    def none(body: dict[str, Any], answer: Any) -> None:
        if body["prompt"] == [" odd", " stale"]:
            answer["choices"][0]["prompt_token_ids"] = []

    with Site(Odd(none)) as site:
        failed, fine = ask(site.connect(), label("a", " odd", " stale"), label("a", " lovely", " stale"))

    assert (failed.error, failed.outage) == ("ValueError", False)
    assert fine.error is None


def test_another_fingerprint_ends_the_run() -> None:
    with Site(Hosted("vllm")) as site:
        fm = site.connect()
        ask(fm, label("a", " stale", " the"))
        site.app.fingerprint = "fp-2"

        with pytest.raises(FMError, match="no longer that of vllm:little@"):
            ask(fm, label("b", " stale", " the"))
