"""The way to a server: addresses, what a failure says of what was asked, how long a server asks to be left alone."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from promptfed.errors import ConfigError
from promptfed.fm.endpoint import MAX_RETRY_AFTER_S, Endpoint, UnansweredError, parse_address
from promptfed.ports import free_port
from promptfed.types import FMResponse, LabelRequest
from tests.hosted import Faults, Hosted, Site
from tests.support import wait_for

CANARY = "canary-7f3a"


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMPTFED_API_KEY", raising=False)


def label(text: str) -> LabelRequest:
    return LabelRequest(prefix="Text:", text=text, suffix="\nLabel:", labels=(" negative", " positive"))


def failure(app: Hosted, timeout_s: float = 20.0) -> UnansweredError:
    """What becomes of a request to ``app``, which quotes it if it refuses it."""
    with Site(app) as site:
        endpoint = Endpoint(site.url, timeout_s=timeout_s)
        with pytest.raises(UnansweredError) as caught:
            wait_for(endpoint.post("/completions", {"model": "little", "prompt": [CANARY], "max_tokens": 1}))
    return caught.value


def always(kind: str, retry_after: str = "0") -> Hosted:
    return Hosted("vllm", Faults(seed=0, kinds=[kind], share=1.0, most=99, retry_after=retry_after))


# ---------------------------------------------------------------- what a failure says


@pytest.mark.parametrize("status", [401, 402, 403, 404, 408, 409, 429, 500, 502, 503, 504, 529])
def test_a_status_that_says_nothing_of_the_request_is_an_outage(status: int) -> None:
    error = failure(always(str(status)))

    assert (error.status, error.kind) == (status, f"HTTP {status}")
    assert (error.outage, error.refused, error.garbled) == (True, False, False)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_status_that_finds_fault_with_the_request_is_a_refusal(status: int) -> None:
    error = failure(always(str(status)))

    assert (error.kind, error.outage, error.refused) == (f"HTTP {status}", False, True)


@pytest.mark.parametrize("status", [302, 307])
def test_a_redirect_is_neither_and_is_not_followed(status: int) -> None:
    error = failure(always(str(status)))

    assert (error.kind, error.outage, error.refused) == (f"HTTP {status}", False, False)


@pytest.mark.parametrize(
    ("kind", "name"), [("cut", "APIConnectionError"), ("cut within", "APIConnectionError"), ("slow", "Timeout")]
)
def test_a_connection_that_is_cut_or_too_slow_is_an_outage(kind: str, name: str) -> None:
    error = failure(always(kind), timeout_s=0.3 if kind == "slow" else 20.0)

    assert name in error.kind
    assert (error.status, error.outage, error.refused, error.garbled) == (None, True, False, False)


@pytest.mark.parametrize("kind", ["truncated", "html"])
def test_an_answer_that_is_no_json_says_nothing_of_the_request(kind: str) -> None:
    error = failure(always(kind))

    assert (error.kind, error.outage, error.refused, error.garbled) == ("JSONDecodeError", True, False, True)


def test_a_server_that_is_not_there_is_an_outage() -> None:
    with pytest.raises(UnansweredError) as caught:
        wait_for(Endpoint(f"http://127.0.0.1:{free_port()}/v1", timeout_s=5.0).get("/models", 5.0))

    assert (caught.value.kind, caught.value.outage) == ("APIConnectionError", True)


@pytest.mark.parametrize("kind", ["400", "429", "500", "truncated", "html", "cut within", "307"])
def test_no_failure_repeats_what_was_asked_nor_what_was_answered(
    kind: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)

    error = failure(always(kind))

    assert CANARY not in f"{error!r} {error} {error.__cause__} {caplog.text} {capfd.readouterr()}"
    assert error.__suppress_context__


# ---------------------------------------------------------------- Retry-After


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("7", 7.0),
        ("0", 0.0),
        ("0.25", 0.25),
        ("120", 120.0),
        ("86400", MAX_RETRY_AFTER_S),
        ("1e400", MAX_RETRY_AFTER_S),
        ("inf", MAX_RETRY_AFTER_S),
        ("-1", None),
        ("-inf", None),
        ("nan", None),
        ("", None),
        ("soon", None),
        ("1, 2", None),
        ("Fri, 27 Nov 2026 08:00:00 GMT", None),
    ],
)
def test_seconds_are_what_the_server_asks_for_within_reason(said: str, seconds: float | None) -> None:
    assert failure(always("429", said)).retry_after_s == seconds


def test_an_item_carries_the_wish_to_whoever_asks_again() -> None:
    with Site(Hosted("vllm")) as site:
        fm = site.connect()
        site.app.faults = Faults(seed=0, kinds=["429"], share=1.0, most=99, retry_after="9")

        answers = wait_for(fm.complete([label("a"), label("b")]))

    assert answers == [FMResponse(error="HTTP 429", outage=True, retry_after_s=9.0)] * 2


def test_a_text_with_half_a_character_fails_alone() -> None:
    texts = ["a", "b", "half \ud83d", "c", "d"]
    with Site(Hosted("completions")) as site:
        answers = wait_for(site.connect().complete([label(text) for text in texts]))

    assert [a.error for a in answers] == [None, None, "UnicodeEncodeError", None, None]
    assert set(site.app.delivered.values()) == {1}


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("name", "url", "model"),
    [
        ("http://127.0.0.1:8700/v1#m", "http://127.0.0.1:8700/v1", "m"),
        ("https://fm.example.org/v1/#m", "https://fm.example.org/v1", "m"),
        ("http://[::1]:8700/a/b#org/model@2:x#y", "http://[::1]:8700/a/b", "org/model@2:x#y"),
        ("http://localhost/v1#my model", "http://localhost/v1", "my model"),
    ],
)
def test_an_address_is_a_base_url_and_a_model(name: str, url: str, model: str) -> None:
    assert parse_address(name) == (url, model)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "openai:URL#MODEL"),
        ("http://127.0.0.1:8700/v1", "openai:URL#MODEL"),
        ("http://a b/v1#m", "openai:URL#MODEL"),
        ("file:///v1#m", "openai:URL#MODEL"),
        ("http://127.0.0.1:0x1/v1#m", "no valid host and port"),
        ("http://127.0.0.1:70000/v1#m", "no valid host and port"),
        ("http://127.0.0.1:8700#m", "did you mean http://127.0.0.1:8700/v1"),
        ("http://me:s3cret@127.0.0.1/v1#m", "PROMPTFED_API_KEY"),
        ("http://127.0.0.1/v1?key=s3cret#m", "PROMPTFED_API_KEY"),
    ],
)
def test_what_is_none_is_refused_without_its_secret(name: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_address(name)

    assert said in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(("value", "key"), [("", None), ("  ", None), ("s3cret\n", "s3cret")])
def test_a_blank_key_is_none(value: str, key: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTFED_API_KEY", value)

    assert Endpoint("http://127.0.0.1/v1", timeout_s=1.0).key == key


def test_the_key_goes_with_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[Any] = set()

    class Listening(Hosted):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            seen.add(dict(scope["headers"]).get(b"authorization"))
            await super().__call__(scope, receive, send)

    monkeypatch.setenv("PROMPTFED_API_KEY", "s3cret")
    with Site(Listening("chat")) as site:
        wait_for(site.connect().complete([label("a")]))

    assert seen == {b"Bearer s3cret"}
