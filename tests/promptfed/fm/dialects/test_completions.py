"""The dialect of ``/completions`` with the most probable tokens, against a server that tells five and refuses more."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from promptfed.errors import FMError
from promptfed.fm.base import BaseFM
from promptfed.prompts.soft import soft_prompt
from promptfed.types import FMRequest, FMResponse, LabelRequest, TextRequest
from tests.hosted import Hosted, LittleModel, Site
from tests.support import wait_for

MODEL = LittleModel()


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMPTFED_API_KEY", raising=False)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site(Hosted("completions")) as site:
        yield site


def label(
    text: str, *labels: str, absolute: bool = True, prefix: str = "Text:", suffix: str = "\nLabel:"
) -> LabelRequest:
    return LabelRequest(prefix=prefix, text=text, suffix=suffix, labels=labels, absolute=absolute)


def ask(fm: BaseFM, *requests: FMRequest) -> list[FMResponse]:
    return wait_for(fm.complete(requests))


class Odd(Hosted):
    """Changes the answers to what is no probe."""

    def __init__(self, change: Callable[[dict[str, Any]], Any]) -> None:
        super().__init__("completions")
        self._change = change

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        status, answer = super().answer(path, body)
        if status == 200 and body and body["prompt"] != ["The sky is"]:
            self._change(answer)
        return status, answer


def ranked(prompt: str) -> list[tuple[str, float]]:
    return sorted(MODEL.next(prompt).items(), key=lambda item: -item[1])


# ---------------------------------------------------------------- labels


def test_labels_among_the_five_most_probable_tokens_are_exact(site: Site) -> None:
    prompt = "Text: A fine day.\nLabel:"
    (first, p), (second, q), *_ = ranked(prompt)
    assert {first, second} == {" negative", " positive"}

    (answer,) = ask(site.connect(), label(" A fine day.", first, second))

    assert answer.logprobs == (p, q)
    assert answer.censored is None
    assert (answer.prompt_tokens, answer.completion_tokens) == (9, 1)


def test_a_label_that_is_not_among_them_is_bounded_by_the_fifth(site: Site) -> None:
    prompt = "Text: It was lovely, superb.\nLabel:"
    top = ranked(prompt)
    assert top[0][0] == " positive"
    assert top[-1][0] in (" stale", " dreadful", " boring", " horrid", " clumsy", " tedious", " negative", ".")

    (answer,) = ask(site.connect(), label(" It was lovely, superb.", " positive", " stale"))

    left_over = 1.0 - sum(math.exp(logprob) for _, logprob in top[:5])
    assert answer.logprobs == pytest.approx((top[0][1], min(top[4][1], math.log(left_over))))
    assert answer.censored == (False, True)


def test_a_label_of_several_tokens_is_known_by_its_first(site: Site) -> None:
    (answer,) = ask(site.connect(), label(" A fine day.", " positive view", " negative view"))

    prompt = "Text: A fine day.\nLabel:"
    assert answer.logprobs == (MODEL.logprob(prompt, " positive"), MODEL.logprob(prompt, " negative"))


def test_without_any_label_among_them_the_item_is_censored_alone(site: Site) -> None:
    censored, fine = ask(
        site.connect(),
        label(" It was lovely, superb.", " negative", " stale"),
        label(" It was horrid, stale.", " negative", " stale"),
    )

    assert censored.censored == (True, True)
    assert censored.logprobs is not None
    assert censored.logprobs[0] == censored.logprobs[1]
    assert fine.censored is None


def test_items_with_the_same_labels_share_a_request_whatever_their_prompts(site: Site) -> None:
    fm = site.connect()
    n_before = len(site.app.bodies)

    answers = ask(fm, *(label(f" {i}", " negative", " positive", prefix=p) for i in range(50) for p in ("a", "b")))

    assert [len(body["prompt"]) for body in site.app.bodies[n_before:]] in ([64, 36], [36, 64])
    assert not any(a.error for a in answers)


# ---------------------------------------------------------------- texts


def test_texts_are_the_models(site: Site) -> None:
    request = TextRequest(prompt="clearly positive:\n-", max_tokens=9, temperature=0.8, top_p=0.9, seed=4, stop=("\n",))

    (answer,) = ask(site.connect(), request)

    assert answer.text == MODEL.write(request.prompt, 4)
    sent = site.app.bodies[-1]
    assert {k: sent[k] for k in ("max_tokens", "temperature", "top_p", "seed", "stop")} == {
        "max_tokens": 9,
        "temperature": 0.8,
        "top_p": 0.9,
        "seed": 4,
        "stop": ["\n"],
    }


def test_a_text_that_is_missing_fails_alone() -> None:
    with Site(Odd(lambda answer: answer["choices"][0].update(text=None))) as site:
        failed, fine = ask(site.connect(), *(TextRequest(prompt=p, max_tokens=4) for p in "ab"))

    assert failed == FMResponse(error="malformed answer")
    assert fine.text == MODEL.write("b", 0)


def test_soft_prompts_are_not_sent(site: Site) -> None:
    with pytest.raises(FMError, match="completions-top5:little@fp-1 takes no soft prompts"):
        ask(site.connect(), TextRequest(prompt="x", max_tokens=3, soft=soft_prompt([[0.0]])))


# ---------------------------------------------------------------- answers that are not whole


@pytest.mark.parametrize(
    "change",
    [
        lambda answer: answer["choices"].pop(),
        lambda answer: answer["choices"].clear(),
        lambda answer: answer["choices"].append(answer["choices"][0]),
        lambda answer: answer.pop("choices"),
        lambda answer: answer["choices"][0]["logprobs"]["top_logprobs"].__setitem__(0, [" positive"]),
    ],
    ids=["one too few", "none", "one too many", "no field", "no mapping"],
)
def test_an_answer_without_an_item_each_is_none_at_all(change: Callable[[dict[str, Any]], Any]) -> None:
    with Site(Odd(change)) as site:
        answers = ask(site.connect(), *(label(text, " negative", " positive") for text in "ab"))

    assert all(a.error in ("ValueError", "ValidationError") and a.logprobs is None for a in answers)
    assert not any(a.outage for a in answers)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf, 1000.0])
def test_an_item_with_a_number_that_is_no_log_probability_fails_alone(broken: float) -> None:
    def change(answer: dict[str, Any]) -> None:
        answer["choices"][0]["logprobs"]["top_logprobs"][0][" positive"] = broken

    with Site(Odd(change)) as site:
        failed, fine = ask(site.connect(), *(label(text, " negative", " positive") for text in "ab"))

    assert failed == FMResponse(error="malformed answer")
    assert fine.error is None


# ---------------------------------------------------------------- who answers


def test_another_fingerprint_ends_the_run() -> None:
    with Site(Hosted("completions")) as site:
        fm = site.connect()
        site.app.fingerprint = "fp-2"

        with pytest.raises(FMError, match="no longer that of completions-top5:little@fp-1"):
            ask(fm, label(" a", " negative", " positive"))


def test_a_server_that_gives_no_fingerprint_is_not_held_to_one() -> None:
    with Site(Hosted("completions", fingerprint=None)) as site:
        fm = site.connect()
        site.app.fingerprint = "fp-2"

        (answer,) = ask(fm, label(" a", " negative", " positive"))

    assert fm.fm_id == "completions-top5:little@unknown"
    assert answer.error is None
