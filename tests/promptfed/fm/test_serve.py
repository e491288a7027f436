"""The server over real sockets: what clients see, who is let in, and what is never said."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
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
from typing import Any

import httpx2
import openai
import pytest
import uvicorn

from promptfed.errors import ConfigError, FMError
from promptfed.fm import serve as serving_module
from promptfed.fm.base import BaseFM
from promptfed.fm.openai import OpenAIFM
from promptfed.fm.scripted import ScriptedFM
from promptfed.fm.serve import build_app, serve
from promptfed.types import Capability, FMRequest, FMResponse, LabelRequest, SoftSpace, TextRequest
from tests.support import CountingFM, FailingFM, wait_for

CANARY = "canary-7f3a private sentence"
LABELS = [" good", " not good at all"]


@contextlib.contextmanager
def running(app: Any) -> Iterator[str]:
    """An application behind a real server on a free loopback port; gives the base URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, lifespan="off", ws="none", log_config=None, log_level="warning", access_log=False)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join(timeout=20)


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PROMPTFED_API_KEY", "OPENAI_API_KEY", "SOME_KEY"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(build_app(ScriptedFM())) as url:
        yield url


def post(url: str, body: Any, key: str | None = None) -> httpx2.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx2.post(f"{url}/completions", content=content, headers=headers, trust_env=False, timeout=20)


def get(url: str, key: str | None = None) -> httpx2.Response:
    return httpx2.get(url, headers={"Authorization": f"Bearer {key}"} if key else {}, trust_env=False, timeout=20)


def scored(*texts: str, **more: Any) -> dict[str, Any]:
    own = {"prefix": "Text:", "suffix": "\nLabel:", "labels": LABELS}
    return {"model": "overlap", "prompt": texts, "promptfed": own, **more}


# ---------------------------------------------------------------- what it offers


def test_the_model_card_names_the_weights_and_what_they_can_do(url: str) -> None:
    (card,) = get(f"{url}/models").json()["data"]

    assert card["id"] == "overlap"
    assert card["promptfed"] == {"fm_id": "scripted:overlap@0", "capabilities": ["label_logprobs", "text"]}


def test_where_soft_prompts_live_reaches_the_client() -> None:
    space = SoftSpace(hidden=2, std=0.25)
    with running(build_app(ScriptedFM(soft_space=space))) as url:
        served = OpenAIFM(f"{url}#overlap")
    with running(build_app(ScriptedFM())) as url:
        other = OpenAIFM(f"{url}#overlap")

    assert (served.soft_space, other.soft_space) == (space, None)
    assert Capability.PROMPT_EMBEDS in served.capabilities


def test_labels_are_scored_as_in_this_process(url: str) -> None:
    answer = post(url, scored(" one", " two")).json()

    requests = [LabelRequest(prefix="Text:", text=t, suffix="\nLabel:", labels=tuple(LABELS)) for t in (" one", " two")]
    expected = wait_for(ScriptedFM().complete(requests))
    assert [tuple(c["promptfed"]["logprobs"]) for c in answer["choices"]] == [a.logprobs for a in expected]
    assert answer["system_fingerprint"] == "scripted:overlap@0"


def test_an_ordinary_client_reads_labels_and_texts(url: str) -> None:
    with openai.OpenAI(base_url=url, api_key="any") as client:
        scores = client.completions.create(
            model="overlap", prompt="A film.", logprobs=2, extra_body={"promptfed": {"labels": LABELS}}
        ).choices[0]
        text = client.completions.create(model="overlap", prompt="Write:", max_tokens=5, seed=1)

    assert scores.logprobs is not None
    assert scores.logprobs.top_logprobs is not None
    assert set(scores.logprobs.top_logprobs[0]) == set(LABELS)
    assert scores.text == max(LABELS, key=scores.logprobs.top_logprobs[0].__getitem__)
    (expected,) = wait_for(ScriptedFM().complete([TextRequest(prompt="Write:", max_tokens=5, seed=1)]))
    assert text.choices[0].text == expected.text
    assert text.usage is not None
    assert text.usage.completion_tokens == expected.completion_tokens


def test_one_request_is_one_batch_with_its_prefix() -> None:
    fm = CountingFM(ScriptedFM())
    with running(build_app(fm)) as url:
        post(url, scored(" one", " two", " three"))

    assert fm.batches == [3]
    assert {r.prefix for r in fm.requests if isinstance(r, LabelRequest)} == {"Text:"}


def test_requests_that_wait_share_a_batch_only_where_that_is_chosen() -> None:
    class SlowFM(CountingFM):
        async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
            answers = await super().complete(requests)
            await asyncio.sleep(0.3)
            return answers

    async def one_and_then_three(url: str) -> None:
        async with httpx2.AsyncClient(trust_env=False, timeout=20) as client:
            first = asyncio.create_task(client.post(f"{url}/completions", json=scored(" first")))
            await asyncio.sleep(0.1)
            await asyncio.gather(first, *(client.post(f"{url}/completions", json=scored(t)) for t in "abc"))

    batches = {}
    for join in (False, True):
        fm = SlowFM(ScriptedFM())
        with running(build_app(fm, join=join)) as url:
            wait_for(one_and_then_three(url))
        batches[join] = fm.batches

    assert batches == {False: [1, 1, 1, 1], True: [1, 3]}


def test_items_that_fail_are_told_one_by_one() -> None:
    class HalfFM(ScriptedFM):
        async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
            answers = await super().complete(requests)
            return [FMResponse(error="too long") if i % 2 else a for i, a in enumerate(answers)]

    with running(build_app(HalfFM())) as url:
        answer = post(url, scored(" a", " b", " c", " d"))

    assert answer.status_code == 200
    assert [c["promptfed"]["error"] for c in answer.json()["choices"]] == [None, "too long", None, "too long"]
    assert [c["finish_reason"] for c in answer.json()["choices"]] == ["stop", "error", "stop", "error"]


# ---------------------------------------------------------------- the key


def test_the_key_is_asked_for_on_v1_and_nowhere_else() -> None:
    with running(build_app(ScriptedFM(), key="s3cret")) as url:
        refused = [post(url, scored(" a"), k) for k in (None, "wrong", "s3cret2", "s3cre", "ключ".encode().hex())]
        refused += [get(f"{url}/models"), get(f"{url}/models", "wrong")]
        welcome = [post(url, scored(" a"), "s3cret"), get(f"{url}/models", "s3cret"), get(f"{url[:-3]}/health")]

    assert {r.status_code for r in refused} == {401}
    assert {r.json()["error"]["code"] for r in refused} == {"invalid_api_key"}
    assert not any("s3cret" in r.text for r in refused)
    assert [r.status_code for r in welcome] == [200, 200, 200]


def must_not_load() -> BaseFM:
    raise AssertionError("loaded before the address and the key were checked")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "example.org"])
def test_other_machines_need_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match=r"other machines.*PROMPTFED_API_KEY"):
        serve(must_not_load, host=host, port=0)


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_key_that_was_named_must_be_there(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is not None:
        monkeypatch.setenv("SOME_KEY", value)

    with pytest.raises(ConfigError, match="SOME_KEY"):
        serve(must_not_load, port=0, api_key_env="SOME_KEY")


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        with pytest.raises(ConfigError, match=f"127.0.0.1 port {port}"):
            serve(must_not_load, port=port)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    spec = importlib.util.find_spec("promptfed.fm.serve")
    assert spec is not None
    assert spec.loader is not None

    with pytest.raises(ConfigError, match=r"pip install 'promptfed\[serve\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


# ---------------------------------------------------------------- bad requests


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{" + CANARY.encode(), 400, "JSON"),
        (b"\xff\xfe", 400, "JSON"),
        (b"[]", 400, "object"),
        ({"model": "overlap"}, 400, "prompt: Field required"),
        ({"model": "gpt", "prompt": CANARY}, 404, "overlap"),
        ({"model": "overlap", "prompt": {CANARY: CANARY}}, 400, "prompt"),
        ({"model": "overlap", "prompt": [CANARY, 3]}, 400, "prompt"),
        ({"model": "overlap", "prompt": CANARY, "logit_bias": {CANARY: 1}}, 400, "logit_bias"),
        ({"model": "overlap", "prompt": CANARY, CANARY: 1}, 400, "not permitted"),
        ({"model": "overlap", "prompt": CANARY, "stream": CANARY}, 400, "stream"),
        ({"model": "overlap", "prompt": CANARY, "promptfed": {"labels": CANARY}}, 400, "promptfed.labels"),
        ({"model": "overlap", "prompt": CANARY, "logprobs": 2}, 400, "send promptfed.labels"),
    ],
    ids=str,
)
def test_a_bad_request_is_told_what_is_wrong_and_hears_none_of_its_text(
    url: str, body: Any, status: int, said: str
) -> None:
    answer = post(url, body)

    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert said in answer.json()["error"]["message"]
    assert "canary" not in answer.text


def test_unknown_places_and_methods_answer_in_openais_way(url: str) -> None:
    assert get(f"{url}/nothing").json()["error"]["message"] == "Not Found"
    assert get(f"{url}/completions").status_code == 405


def test_a_body_may_not_be_endless(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_module, "MAX_BODY_BYTES", 1000)

    assert post(url, scored("x" * 100)).status_code == 200
    assert post(url, scored("x" * 2000)).status_code == 413


def test_what_the_model_can_not_do_is_refused() -> None:
    with running(build_app(ScriptedFM("w", capabilities=frozenset({Capability.TEXT})))) as url:
        answer = post(url, {**scored(" a"), "model": "w"})

    assert answer.status_code == 400
    assert "label_logprobs" in answer.json()["error"]["message"]


# ---------------------------------------------------------------- what is never said


@pytest.mark.parametrize("error", [FMError(CANARY), RuntimeError(CANARY), KeyError(CANARY)], ids=type)
def test_a_model_that_breaks_names_the_kind_of_error_only(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with running(build_app(FailingFM(error))) as url:
        answer = post(url, {**scored(CANARY), "model": "failing@0"})

    assert answer.status_code == 500
    assert type(error).__name__ in answer.json()["error"]["message"]
    assert type(error).__name__ in caplog.text
    assert "canary" not in answer.text + caplog.text


def test_requests_leave_no_text_in_the_logs(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    assert post(url, scored(CANARY)).status_code == 200
    assert post(url, {"model": "overlap", "prompt": CANARY}).status_code == 200

    assert "canary" not in caplog.text


def test_a_client_that_hangs_up_half_way_is_no_event(url: str, caplog: pytest.LogCaptureFixture) -> None:
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n" + CANARY.encode())

    assert post(url, scored(" a")).status_code == 200
    assert caplog.text == ""


# ---------------------------------------------------------------- the process


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_the_command_says_when_it_is_ready_and_ends_cleanly(stop: signal.Signals) -> None:
    command = [sys.executable, "-m", "promptfed.cli", "serve", "scripted:overlap", "--port", "0"]
    env = {**os.environ, "PROMPTFED_API_KEY": "s3cret"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        ready = process.stdout.readline()
        url = ready.split(" as openai:")[1].split("#")[0]
        statuses = [post(url, scored(CANARY), key).status_code for key in ("s3cret", None)]
        process.send_signal(stop)
        out, err = process.communicate(timeout=20)

    assert ready.startswith("serving scripted:overlap@0 as openai:http://127.0.0.1:")
    assert "with an API key" in ready
    assert "s3cret" not in ready
    assert statuses == [200, 401]
    assert (process.returncode, out, err) == (0, "", "")
