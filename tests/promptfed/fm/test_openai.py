"""The client against real servers: the same answers as in this process, and what becomes of all that can fail."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from promptfed.errors import CapabilityError, ConfigError, FMError, UnknownNameError
from promptfed.fm.base import BaseFM
from promptfed.fm.decorators import Retrying
from promptfed.fm.dialects.served import ServedDialect
from promptfed.fm.embedded import EmbeddedFM
from promptfed.fm.openai import OpenAIFM
from promptfed.fm.scripted import ScriptedFM
from promptfed.fm.serve import build_app
from promptfed.ports import free_port
from promptfed.registry import load_fm
from promptfed.types import Capability, FMRequest, FMResponse, LabelRequest, TextRequest
from tests.promptfed.fm.test_serve import running
from tests.support import CountingFM, wait_for

CANARY = "canary-7f3a private sentence"
DATA = {"object": "model", "promptfed": {"fm_id": "x:m@1", "capabilities": ["text", "label_logprobs"]}}
CARD = {"object": "list", "data": [{"id": "m", **DATA}]}


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PROMPTFED_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(variable, raising=False)


def label(text: str, prefix: str = "Text:", labels: tuple[str, ...] = (" good", " very bad")) -> LabelRequest:
    return LabelRequest(prefix=prefix, text=text, suffix="\nLabel:", labels=labels)


def ask(fm: BaseFM, *requests: FMRequest) -> list[FMResponse]:
    return wait_for(fm.complete(requests))


def choice(**fields: Any) -> dict[str, Any]:
    return {"index": 0, "text": "", "promptfed": fields}


def answered(*choices: Any, fingerprint: str = "x:m@1") -> bytes:
    return json.dumps({"system_fingerprint": fingerprint, "choices": choices}).encode()


def other_server(answer: bytes | Response, models: Any = CARD) -> Starlette:
    """A server with a good model card whose every completion is ``answer``."""

    async def completions(_: Request) -> Response:
        return answer if isinstance(answer, Response) else Response(answer, media_type="application/json")

    async def card(_: Request) -> Response:
        return models if isinstance(models, Response) else JSONResponse(models)

    return Starlette(routes=[Route("/v1/models", card), Route("/v1/completions", completions, methods=["POST"])])


# ---------------------------------------------------------------- the same answers


def test_it_is_the_model_that_it_asks() -> None:
    with running(build_app(ScriptedFM("w", capabilities=frozenset({Capability.TEXT})))) as url:
        fm = load_fm(f"openai:{url}#w")

    assert isinstance(fm, OpenAIFM)
    assert fm.fm_id == "scripted:w@0"
    assert fm.capabilities == {Capability.TEXT}


def test_answers_are_those_of_this_process_in_the_order_asked() -> None:
    requests: list[FMRequest] = [
        label(" one"),
        TextRequest(prompt="Write:", max_tokens=4, temperature=1.0, seed=3),
        label(" two", prefix="Other:", labels=(" a", " b", " c d e")),
        TextRequest(prompt="Write:", max_tokens=4, temperature=1.0, seed=8),
        label(" three"),
        label(" Übergröße \U0001f600\n\t\x00"),
        TextRequest(prompt="Go on:", max_tokens=9, top_p=0.5, stop=("\n", "END")),
    ]
    with running(build_app(ScriptedFM())) as url:
        answers = ask(OpenAIFM(f"{url}#overlap"), *requests)

    assert answers == ask(ScriptedFM(), *requests)


@pytest.mark.usefixtures("one_thread")
def test_labels_of_several_tokens_cut_texts_and_counts_are_those_of_the_engine(tiny_llama: Path) -> None:
    engine = EmbeddedFM(str(tiny_llama))
    requests: list[FMRequest] = [
        label("one", prefix="a", labels=("x", "yz", "abc")),
        label("three", prefix="a", labels=("x", "yz", "abc")),
        label("t" * 500, prefix="b", labels=("x", "y")),
        label("t", prefix="b", labels=("x", "y")),
        *(TextRequest(prompt="prompt", max_tokens=5, temperature=1.0, seed=s, stop=("q",)) for s in range(3)),
        TextRequest(prompt="p" * 500, max_tokens=3, stop=()),
    ]
    with running(build_app(engine)) as url:
        fm = OpenAIFM(f"{url}#{tiny_llama.name}")
        served, here = ask(fm, *requests), ask(engine, *requests)

    assert fm.fm_id == engine.fm_id
    assert served == here
    assert served[0].label_tokens == (1, 2, 3)
    assert [a.truncated for a in served] == [False, False, True, False, False, False, False, True]


@pytest.mark.usefixtures("one_thread")
def test_an_item_that_fails_at_the_server_fails_alone(tiny_llama: Path) -> None:
    engine = EmbeddedFM(str(tiny_llama))
    with running(build_app(engine)) as url:
        fine, failed = ask(OpenAIFM(f"{url}#{tiny_llama.name}"), label("text", ""), label("text", "p" * 500))

    assert fine.logprobs is not None
    assert failed == FMResponse(error="the server could not answer this item")


def test_blocking_calls_work_in_any_loop_and_leave_nothing_open() -> None:
    with running(build_app(ScriptedFM())) as url:
        fm = OpenAIFM(f"{url}#overlap")
        prompt, labels = "Text: {text}\nLabel:", ["good", "bad"]
        expected = ScriptedFM().score_labels(prompt, ["one", "two"], labels).tolist()

        async def notebook() -> Any:
            blocking = fm.score_labels(prompt, ["one", "two"], labels)
            awaited = await fm.ascore_labels(prompt, ["one", "two"], labels)
            return [blocking.tolist(), awaited.tolist()]

        got = [fm.score_labels(prompt, ["one", "two"], labels).tolist() for _ in range(2)]
        got += asyncio.run(notebook())
        gc.collect()  # a connection that was left open would warn here

    assert got == [expected] * 4


def test_a_model_built_inside_a_running_loop_works() -> None:
    async def notebook(url: str) -> str:
        return OpenAIFM(f"{url}#overlap").fm_id

    with running(build_app(ScriptedFM())) as url:
        assert asyncio.run(notebook(url)) == "scripted:overlap@0"


# ---------------------------------------------------------------- how it asks


def batches_at_server(*requests: FMRequest) -> list[int]:
    inner = CountingFM(ScriptedFM())
    with running(build_app(inner)) as url:
        answers = ask(OpenAIFM(f"{url}#overlap"), *requests)
    assert not any(a.error for a in answers)
    return sorted(inner.batches)


def test_items_of_one_prompt_share_a_request() -> None:
    assert batches_at_server(*(label(f" {i}", prefix=p) for i in range(150) for p in ("a", "b"))) == [22, 22, 128, 128]


def test_seeds_of_one_prompt_share_a_request() -> None:
    writing = [TextRequest(prompt=p, max_tokens=4, seed=s) for s in range(70) for p in ("a", "b")]

    assert batches_at_server(*writing) == [6, 6, 64, 64]


def test_long_texts_go_in_smaller_requests() -> None:
    assert batches_at_server(*(label(n * "x") for n in (60_000, 6000, 60_000, 100_000, 5, 5))) == [1, 1, 1, 1, 2]


def test_no_request_no_call() -> None:
    assert batches_at_server() == []


def test_few_requests_are_on_their_way_at_once_whoever_asks() -> None:
    class Watching(ScriptedFM):
        now = most = 0

        async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0.02)
            self.now -= 1
            return await super().complete(requests)

    async def many(fm: BaseFM) -> None:
        await asyncio.gather(*(fm.complete([label(" x", prefix=str(i))]) for i in range(12)))

    inner = Watching()
    with running(build_app(inner)) as url:
        asyncio.run(many(OpenAIFM(f"{url}#overlap")))

    assert inner.most == ServedDialect.max_requests


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("m", "openai:URL#MODEL"),
        ("http://127.0.0.1/v1#", "openai:URL#MODEL"),
        ("127.0.0.1:8700/v1#m", "openai:URL#MODEL"),
        ("ftp://127.0.0.1/v1#m", "openai:URL#MODEL"),
        ("http://127.0.0.1:8700#m", "did you mean http://127.0.0.1:8700/v1"),
        ("http://127.0.0.1:8700/#m", "did you mean http://127.0.0.1:8700/v1"),
        ("http:///v1#m", "base URL"),
        ("http://127.0.0.1:99999/v1#m", "no valid host and port"),
        ("http://[::1/v1#m", "no valid host and port"),
        ("http://me:s3cret@127.0.0.1/v1#m", "PROMPTFED_API_KEY"),
        ("http://s3cret@127.0.0.1/v1#m", "PROMPTFED_API_KEY"),
        ("http://127.0.0.1/v1?key=s3cret#m", "PROMPTFED_API_KEY"),
    ],
)
def test_a_bad_address_says_what_is_wrong_and_repeats_no_secret(address: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_fm(f"openai:{address}")

    assert said in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_model_name_may_hold_anything_before_the_url() -> None:
    with running(build_app(ScriptedFM("org/model@2:x"))) as url:
        assert OpenAIFM(f"{url}/#org/model@2:x").fm_id == "scripted:org/model@2:x@0"


def test_a_model_that_is_not_served_is_named_with_those_that_are() -> None:
    with running(build_app(ScriptedFM())) as url, pytest.raises(UnknownNameError, match=r"'overlab'.*'overlap'\?"):
        OpenAIFM(f"{url}#overlab")


def test_a_server_that_writes_nothing_is_refused() -> None:
    models = {"data": [{"id": "m", "object": "model"}]}
    with (
        running(other_server(b"", models)) as url,
        pytest.raises(CapabilityError, match="answers neither /completions"),
    ):
        OpenAIFM(f"{url}#m")


# ---------------------------------------------------------------- the key


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTFED_API_KEY", "s3cret\n")

    with running(build_app(ScriptedFM(), key="s3cret")) as url:
        (answer,) = ask(OpenAIFM(f"{url}#overlap"), label(" x"))

    assert answer.logprobs is not None


def test_a_key_for_another_provider_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret")

    with running(build_app(ScriptedFM(), key="s3cret")) as url, pytest.raises(ConfigError, match="asks for an API key"):
        OpenAIFM(f"{url}#overlap")


@pytest.mark.parametrize(("key", "said"), [(None, "asks for an API key"), ("wr0ng", "refuses this API key")])
def test_a_missing_or_wrong_key_is_told_at_once(
    key: str | None, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    if key:
        monkeypatch.setenv("PROMPTFED_API_KEY", key)

    with running(build_app(ScriptedFM(), key="s3cret")) as url, pytest.raises(ConfigError, match=said) as caught:
        OpenAIFM(f"{url}#overlap")

    assert "PROMPTFED_API_KEY" in str(caught.value)
    assert "wr0ng" not in str(caught.value) + caplog.text


def test_a_key_that_no_header_can_hold_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTFED_API_KEY", "s3\ncret-é")

    with running(build_app(ScriptedFM())) as url, pytest.raises(FMError) as caught:
        OpenAIFM(f"{url}#overlap")

    assert "cret" not in str(caught.value)


# ---------------------------------------------------------------- servers that fail


def test_a_server_that_is_down_is_told_with_the_way_to_start_one() -> None:
    port = free_port()

    with pytest.raises(FMError, match=f"http://127.0.0.1:{port}/v1 .*promptfed serve m"):
        OpenAIFM(f"http://127.0.0.1:{port}/v1#m")


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A raw socket that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener


def test_a_server_that_never_answers_is_given_up_at_once(silent: socket.socket) -> None:
    start = time.monotonic()

    with pytest.raises(FMError, match="Timeout"):
        OpenAIFM(f"http://127.0.0.1:{silent.getsockname()[1]}/v1#m", timeout_s=0.3)

    assert time.monotonic() - start < 5


def test_a_server_that_begins_to_hang_is_a_failed_item_in_time(silent: socket.socket) -> None:
    def answer_once() -> None:
        connection, _ = silent.accept()
        with connection:
            connection.recv(65536)
            body = json.dumps(CARD).encode()
            head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)

    thread = threading.Thread(target=answer_once)
    thread.start()
    fm = OpenAIFM(f"http://127.0.0.1:{silent.getsockname()[1]}/v1#m", timeout_s=0.5)
    thread.join()
    start = time.monotonic()

    answers = ask(fm, label(" a"), label(" b"))

    assert time.monotonic() - start < 5
    assert {a.error for a in answers} <= {"TimeoutError", "APITimeoutError"}
    assert all(a.outage for a in answers)


def test_a_server_that_goes_away_is_an_outage() -> None:
    with running(build_app(ScriptedFM())) as url:
        fm = OpenAIFM(f"{url}#overlap")

    assert ask(fm, label(" a")) == [FMResponse(error="APIConnectionError", outage=True)]


@pytest.mark.parametrize(
    ("status", "outage"),
    [(302, False), (400, False), (413, False), (401, True), (429, True), (500, True), (503, True)],
)
def test_an_http_status_is_a_failed_item_that_names_it(status: int, outage: bool) -> None:
    with running(other_server(Response(CANARY, status_code=status))) as url:
        assert ask(OpenAIFM(f"{url}#m"), label(" a")) == [FMResponse(error=f"HTTP {status}", outage=outage)]


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"{", b"[]", b"null", b'{"choices": []}', answered(), answered(choice(), choice()), answered(3)],
    ids=repr,
)
def test_an_answer_that_is_none_is_a_failed_item(body: bytes) -> None:
    with running(other_server(body)) as url:
        (answer,) = ask(OpenAIFM(f"{url}#m"), label(" a"))

    assert answer.error in ("ValidationError", "ValueError", "JSONDecodeError")


GOOD = {"logprobs": [-0.5, -1.0], "prompt_tokens": 3}


@pytest.mark.parametrize(
    "spoilt",
    [
        {"logprobs": [float("nan"), -1.0]},
        {"logprobs": [float("-inf"), -1.0]},
        {"logprobs": [-1.0]},
        {"logprobs": None},
        {"logprobs": ["a", "b"]},
        {"label_tokens": [1]},
        {"text": "x"},
        {"prompt_tokens": -1},
        {"usd": float("nan")},
    ],
    ids=str,
)
def test_an_item_that_is_not_whole_fails_alone(spoilt: dict[str, Any]) -> None:
    with running(other_server(answered(choice(**{**GOOD, **spoilt}), choice(**GOOD)))) as url:
        failed, fine = ask(OpenAIFM(f"{url}#m"), label(" a"), label(" b"))

    assert failed == FMResponse(error="malformed answer")
    assert fine == FMResponse(logprobs=(-0.5, -1.0), prompt_tokens=3)


def test_a_text_that_is_missing_is_a_failed_item() -> None:
    with running(other_server(answered(choice(**GOOD)))) as url:
        assert ask(OpenAIFM(f"{url}#m"), TextRequest(prompt="p", max_tokens=1))[0].error == "malformed answer"


def test_another_model_behind_the_address_ends_the_run() -> None:
    with running(other_server(answered(choice(**GOOD), fingerprint="x:m@2"))) as url:
        fm = OpenAIFM(f"{url}#m")

        with pytest.raises(FMError, match="no longer x:m@1"):
            ask(fm, label(" a"))


def test_half_of_the_items_failing_is_mended_by_retrying() -> None:
    class Flaky(ScriptedFM):
        async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
            answers = await super().complete(requests)
            return [FMResponse(error="busy") if i % 2 else a for i, a in enumerate(answers)]

    requests = [label(f" {i}") for i in range(8)]
    with running(build_app(Flaky())) as url:
        fm = OpenAIFM(f"{url}#overlap")
        once, retried = ask(fm, *requests), ask(Retrying(fm, attempts=4, wait_s=0.0), *requests)

    assert [a.error is not None for a in once] == [False, True] * 4
    assert retried == ask(ScriptedFM(), *requests)


def test_texts_follow_no_redirect() -> None:
    reached = CountingFM(ScriptedFM("m"))
    with (
        running(build_app(reached)) as elsewhere,
        running(other_server(RedirectResponse(f"{elsewhere}/completions"))) as url,
    ):
        assert ask(OpenAIFM(f"{url}#m"), label(" a")) == [FMResponse(error="HTTP 307")]

    assert reached.n_calls == 0


def test_loopback_takes_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(variable, f"http://127.0.0.1:{free_port()}")

    with running(build_app(ScriptedFM())) as url:
        assert ask(OpenAIFM(f"{url}#overlap"), label(" a"))[0].error is None


# ---------------------------------------------------------------- what is never said


@pytest.mark.parametrize(
    "answer",
    [
        JSONResponse({"error": {"message": f"bad: {CANARY}", "param": CANARY}}, status_code=400),
        Response(CANARY, status_code=500),
        Response(CANARY),
        Response(answered(choice(error=CANARY))),
        Response(answered(choice(logprobs=CANARY))),
        Response(answered(choice(**GOOD))),
    ],
    ids=["400", "500", "no JSON", "item error", "item rubbish", "fine"],
)
def test_no_text_is_in_errors_or_logs_whatever_the_server_says(
    answer: Response, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    with running(other_server(answer)) as url:
        (got,) = ask(OpenAIFM(f"{url}#m"), label(CANARY, prefix=CANARY))

    out, err = capfd.readouterr()
    assert "canary" not in f"{got}{caplog.text}{out}{err}"


def test_a_text_that_is_no_utf8_is_a_failed_item(caplog: pytest.LogCaptureFixture) -> None:
    with running(build_app(ScriptedFM())) as url:
        (got,) = ask(OpenAIFM(f"{url}#overlap"), label(CANARY + "\ud800"))

    assert got.error is not None
    assert "canary" not in got.error + caplog.text


# ---------------------------------------------------------------- the real model


@pytest.mark.model
@pytest.mark.usefixtures("one_thread")
def test_the_embedded_model_answers_the_same_through_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "promptfed.cli", "serve", "embedded:smollm2-135m-instruct", "--port", "0"]
    requests: list[FMRequest] = [
        *(label(f" {t}", labels=(" negative", " positive")) for t in ("A warm film.", "Never again.", "ok " * 30)),
        *(label(f" {t}", prefix="Review:", labels=(" good", " not good at all")) for t in ("Excellent.", "It broke.")),
        *(TextRequest(prompt="Once upon a time", max_tokens=6, temperature=0.0, seed=s) for s in (1, 2)),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split(" as ")[1].split(",")[0]
        fm = load_fm(address)
        served = ask(fm, *requests)
        process.send_signal(signal.SIGTERM)
    engine = EmbeddedFM("smollm2-135m-instruct")
    here = ask(engine, *requests)

    assert fm.fm_id == engine.fm_id
    for a, b in zip(served, here, strict=True):
        assert a.error is None
        assert (a.text, a.label_tokens, a.prompt_tokens) == (b.text, b.label_tokens, b.prompt_tokens)
        assert (a.completion_tokens, a.cached_tokens, a.truncated) == (b.completion_tokens, b.cached_tokens, False)
        # bfloat16 moves with the batch, and with the number of threads.
        assert (a.logprobs or ()) == pytest.approx(b.logprobs or (), abs=0.1)
