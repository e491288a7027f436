"""promptfed against a real vLLM server that `promptfed serve` started: run by make test-vllm."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import promptfed
from promptfed.errors import ConfigError
from promptfed.fm.base import run_sync
from promptfed.fm.embedded import EmbeddedFM
from promptfed.fm.journal import RecordingFM, ReplayFM
from promptfed.fm.openai import OpenAIFM
from promptfed.ports import free_port
from promptfed.prompts.soft import soft_prompt
from promptfed.prompts.template import PromptTemplate
from promptfed.types import Capability, FMRequest, FMResponse, LabelRequest, TextRequest
from tests.deploy.test_nginx import NORTH, proxy
from tests.support import demo_rows

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

NAME = "smollm2-135m-instruct"
PROMPT = PromptTemplate(
    text="Text: I loved it.\nMood: positive\n\nText: It was awful.\nMood: negative\n\nText: {text}\nMood:",
    words=("negative", "positive"),
)


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    """The address that the command says. It stops on Ctrl-C with all that it started."""
    port = free_port()
    command = [sys.executable, "-m", "promptfed.cli", "serve", NAME, "--port", str(port), "--soft-prompts"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        assert process.stdout is not None
        said = [process.stdout.readline(), process.stdout.readline()]
        assert "serving" in said[1], said
        yield said[1].split(" as ")[1].split(",")[0]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)


@pytest.fixture(scope="module")
def vllm(served: str) -> OpenAIFM:
    fm = promptfed.load_fm(served)
    assert isinstance(fm, OpenAIFM)
    return fm


@pytest.fixture(scope="module")
def embedded() -> EmbeddedFM:
    return EmbeddedFM(NAME)


@pytest.fixture(scope="module")
def reviews() -> list[str]:
    return [row["text"] for row in demo_rows("test")[::5]]


def ask(fm: promptfed.FoundationModel, *requests: FMRequest) -> list[FMResponse]:
    return run_sync(fm.complete(requests))


def scores(fm: promptfed.FoundationModel, requests: list[LabelRequest]) -> np.ndarray:
    answers = ask(fm, *requests)
    assert {a.error for a in answers} == {None}
    return np.array([a.logprobs for a in answers])


def test_it_is_known_by_its_weights_and_can_do_all(vllm: OpenAIFM, embedded: EmbeddedFM) -> None:
    assert vllm.fm_id == embedded.fm_id.replace("embedded:", "vllm:")
    assert vllm.capabilities == {
        Capability.TEXT,
        Capability.LABEL_LOGPROBS,
        Capability.PROMPT_LOGPROBS,
        Capability.PROMPT_EMBEDS,
    }


def test_labels_have_the_probabilities_of_the_embedded_engine_and_of_a_replay(
    vllm: OpenAIFM, embedded: EmbeddedFM, reviews: list[str], tmp_path: Path
) -> None:
    requests = PROMPT.requests(reviews)
    there = scores(RecordingFM(vllm, tmp_path / "journal.jsonl"), requests)
    here = scores(embedded, requests)
    again = scores(ReplayFM(tmp_path / "journal.jsonl", vllm.fm_id), requests)

    assert np.abs(there - here).mean() < 0.05
    assert (there.argmax(axis=1) == here.argmax(axis=1)).mean() >= 0.95
    assert again.tolist() == there.tolist()


def test_labels_of_several_tokens_too(vllm: OpenAIFM, embedded: EmbeddedFM, reviews: list[str]) -> None:
    prompt = replace(PROMPT, words=("not good at all", "very good", "good"))
    requests = prompt.requests(reviews[:24])

    there, here = scores(vllm, requests), scores(embedded, requests)

    assert np.abs(there - here).mean() < 0.1
    (answer,) = ask(vllm, requests[0])
    assert answer.label_tokens == (4, 2, 1)


def test_absolute_log_probabilities_are_those_over_the_vocabulary(vllm: OpenAIFM, embedded: EmbeddedFM) -> None:
    asked = LabelRequest(
        prefix="The capital of France", text=" is", suffix="", labels=(" Paris", " a city"), absolute=True
    )

    ((there,), (here,)) = (ask(fm, asked) for fm in (vllm, embedded))

    assert np.exp(np.array(there.logprobs)).sum() < 1
    assert there.logprobs == pytest.approx(here.logprobs, abs=0.15)


def test_greedy_text_is_the_same_and_stops(vllm: OpenAIFM, embedded: EmbeddedFM) -> None:
    asked = [
        TextRequest(prompt="The capital of France is", max_tokens=4, temperature=0.0, stop=(".",)),
        TextRequest(prompt="One, two, three,", max_tokens=4, temperature=0.0, stop=("\n",)),
    ]

    there, here = ask(vllm, *asked), ask(embedded, *asked)

    assert [a.text for a in there] == [a.text for a in here]
    assert there[0].text == " Paris"


def test_a_soft_prompt_made_of_a_texts_embeddings_reads_like_the_text(vllm: OpenAIFM, embedded: EmbeddedFM) -> None:
    said = "Reviews of films."
    soft = soft_prompt(embedded.token_embeddings(said))
    plain = LabelRequest(prefix=said + "\nText:", text=" I loved it.", suffix="\nLabel:", labels=(" good", " bad"))
    vectors = replace(plain, prefix="\nText:", soft=soft)

    as_text, as_vectors, here = (scores(fm, [r])[0] for fm, r in ((vllm, plain), (vllm, vectors), (embedded, vectors)))

    assert as_vectors == pytest.approx(as_text, abs=0.1)
    assert as_vectors == pytest.approx(here, abs=0.1)
    longer = replace(vectors, labels=(" very good", " bad"))
    assert scores(vllm, [longer])[0] == pytest.approx(scores(embedded, [longer])[0], abs=0.1)


def test_a_soft_prompt_of_another_width_is_not_sent(vllm: OpenAIFM) -> None:
    soft = soft_prompt(np.zeros((2, 64)))
    asked = LabelRequest(prefix="Text:", text=" a", suffix=":", labels=(" good", " bad"), soft=soft)

    with pytest.raises(ConfigError, match="vectors of 64 numbers, the model of 576"):
        ask(vllm, asked)


def test_a_text_that_is_too_long_fails_alone(vllm: OpenAIFM, reviews: list[str]) -> None:
    answers = ask(vllm, *PROMPT.requests([reviews[0], "so so " * 9000, reviews[1]]))

    assert [a.error for a in answers] == [None, "HTTP 400", None]


def test_tenants_do_not_share_what_the_server_remembers(vllm: OpenAIFM, served: str) -> None:
    long = PromptTemplate(text="A very long tale. " * 20 + "{text}\nLabel:", words=("good", "bad"))
    other = promptfed.load_fm(served)

    first, again = (ask(vllm, *long.requests([text]))[0] for text in ("one", "two"))
    (elsewhere,) = ask(other, *long.requests(["two"]))

    assert (first.cached_tokens, elsewhere.cached_tokens) == (0, 0)
    assert again.cached_tokens >= 64


def test_doctor_compares_it_with_the_embedded_engine(served: str) -> None:
    command = [sys.executable, "-m", "promptfed.cli", "doctor", "--fm", served, "--json"]
    said = subprocess.run(command, check=False, capture_output=True, text=True)

    rows = {row["check"]: row for row in json.loads(said.stdout)}

    assert rows[f"FM {served}"]["ok"]
    assert "against the same weights embedded: 0.0" in rows[f"FM {served}"]["found"]


def test_the_proxy_lets_a_client_through_to_it_and_to_nothing_else(
    served: str, vllm: OpenAIFM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = PROMPT.requests(["I loved every minute.", "Never again."])
    with proxy(tmp_path, served.removeprefix("openai:").partition("#")[0]) as nginx:
        monkeypatch.setenv("PROMPTFED_API_KEY", NORTH)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
        through = promptfed.load_fm(f"openai:{nginx.url}/v1#{NAME}")

        assert through.fm_id == vllm.fm_id
        assert scores(through, requests) == pytest.approx(scores(vllm, requests), abs=0.1)
        open_at_vllm = [("GET", "/metrics"), ("POST", "/tokenize"), ("POST", "/invocations"), ("GET", "/version")]
        assert [nginx.ask(*asked, NORTH).status for asked in open_at_vllm] == [404] * 4
        assert nginx.ask("GET", "/v1/models").status == 401


def test_a_whole_federation_runs_against_it(served: str, tmp_path: Path) -> None:
    for part in ("train", "test"):
        rows: dict[str, list[list[str]]] = {}
        for row in demo_rows(part):
            rows.setdefault(row["client"], []).append([row["client"], row["text"], row["label"]])
        with (tmp_path / f"{part}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["client", "text", "label"], *(r for most in rows.values() for r in most[:30])])
    config = {
        "data": {part: str(tmp_path / f"{part}.csv") for part in ("train", "test")},
        "task": {"instruction": "Classify the sentiment of the text."},
        "fm": {"scorer": served},
        "budget": {"max_fm_calls": 400},
    }

    result = promptfed.run(config, out=tmp_path / "run")

    tuning = result.summary["ledger"]["tuning"]
    assert result.summary["fm"].startswith(f"vllm:{NAME}@")
    assert result.score("fm") > 0.7
    assert 0 < tuning["fm_calls"] <= 400
    assert tuning["failed_calls"] == 0
