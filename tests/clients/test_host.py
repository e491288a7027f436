"""A client on a machine of its own: runs, memories, restarts, and what never leaves."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from clients.data import Rows
from clients.host import ClientHost
from promptfed.errors import DataError, UnknownNameError
from promptfed.fm.base import BaseFM
from promptfed.fm.scripted import ScriptedFM
from promptfed.messages import (
    Ask,
    Distil,
    Distilled,
    Failed,
    Join,
    Joined,
    MomentSums,
    Reply,
    Task,
    TaskBody,
    decode_reply,
    encode,
)
from promptfed.messages.retrieval import Found, Search
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.template import PromptTemplate
from retrieval.documents import Document
from retrieval.index import LocalIndex
from retrieval.owner import IndexOwner, Policy
from tests.support import JOIN, LABELS, CountingFM, FailingFM, WordEncoder, sentences, wait_for

P = PromptTemplate(text="It seems wonderful.\nLabel: positive\n\nText: {text}\nLabel:", words=LABELS)
PROMPT = PromptSet(labels=LABELS, prompts=(P,), weights=(1.0,), bias=(0.0, 0.0))
ASK = Ask(prompts=(P,), stop=12)
CANARY = "zanzibar4711"


def rows(n: int, seed: int, marked: str = "") -> Rows:
    data = sentences(n, seed)
    return [("north", f"{t} {marked}".strip(), LABELS[y]) for t, y in zip(data.texts, data.labels, strict=True)]


def a_host(folder: Path, fm: BaseFM | None = None, train: Rows | None = None) -> tuple[ClientHost, CountingFM]:
    counting = CountingFM(fm or ScriptedFM())
    host = ClientHost("north", train or rows(20, 1), rows(10, 2), counting, WordEncoder(), folder)
    return host, counting


def tell(host: ClientHost, body: TaskBody, *, run: str = "run1", fleet: str = "tuning", number: int = 1) -> Reply:
    task = Task(round=number, client_id="north", run=run, fleet=fleet, grant=100, limit=1000, body=body)
    return decode_reply(wait_for(host.handle(encode(task))))


def test_it_joins_with_the_labels_of_the_run(tmp_path: Path) -> None:
    host, _ = a_host(tmp_path)

    reply = tell(host, Join(labels=("positive", "neutral", "negative"), seed=7))

    assert isinstance(reply.body, Joined)
    assert (reply.body.n_train, reply.body.n_test) == (20, 10)
    assert reply.body.labels == ("positive", "negative")  # in the run's order; no text is neutral


def test_a_host_has_the_domain_model_and_the_unlabelled_texts_that_it_was_given(tmp_path: Path) -> None:
    more = {"unlabelled": ["It seems fine.", " "], "domain_model": "tfidf_bayes"}
    host = ClientHost("north", rows(20, 1), [], ScriptedFM(), WordEncoder(), tmp_path, **more)  # type: ignore[arg-type]

    joined = tell(host, JOIN).body
    lesson = Distil(prompt=PROMPT, stop=1, lessons=None, temperature=1.0, min_confidence=0.0)
    taught = tell(host, lesson, number=2).body

    assert isinstance(joined, Joined)
    assert (joined.domain_model, joined.n_unlabelled) == ("tfidf_bayes", 1)
    assert isinstance(taught, Distilled)
    assert taught.n_lessons == 1
    with pytest.raises(UnknownNameError, match="did you mean 'linear'"):
        ClientHost("north", rows(20, 1), [], ScriptedFM(), WordEncoder(), tmp_path, domain_model="linar")


def test_labels_that_the_run_does_not_know_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    host, _ = a_host(tmp_path)

    reply = tell(host, Join(labels=("cat", "dog"), seed=7))

    assert reply.body == Failed(reason="DataError")
    assert list(tmp_path.iterdir()) == []


def test_a_task_of_a_run_that_was_never_joined_is_refused(tmp_path: Path) -> None:
    host, fm = a_host(tmp_path)

    assert tell(host, ASK).body == Failed(reason="RunError")
    assert fm.n_calls == 0


def test_fleets_have_memories_of_their_own(tmp_path: Path) -> None:
    host, fm = a_host(tmp_path)
    tell(host, JOIN)
    tell(host, ASK, number=2)
    before = fm.n_calls

    again = tell(host, ASK, number=3)
    other = tell(host, ASK, fleet="local_only", number=3)

    assert again.usage.fm_calls == 0  # it has the scores
    assert other.usage.fm_calls == 12  # it has not, although the same client has
    assert fm.n_calls > before


def test_a_host_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    host, _ = a_host(tmp_path)
    tell(host, JOIN)
    first = tell(host, ASK, number=2)

    restarted, fm = a_host(tmp_path)
    same = tell(restarted, ASK, number=2)
    more = tell(restarted, Ask(prompts=(P,), stop=14), number=3)

    assert same == first
    assert isinstance(more.body, MomentSums)
    assert more.body.n == 14
    assert (more.usage.fm_calls, fm.n_calls) == (2, 2)  # twelve it remembers


def test_a_journal_that_lost_answers_is_told_of_and_no_score_is_made_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host, _ = a_host(tmp_path)
    tell(host, JOIN)
    tell(host, ASK, number=2)
    (journal,) = tmp_path.glob("run1/journal-*.jsonl")
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:-1]))

    restarted, fm = a_host(tmp_path)
    replies = [tell(restarted, Ask(prompts=(P,), stop=14), number=n).body for n in (3, 4)]

    assert replies == [Failed(reason="DataError")] * 2
    assert fm.n_calls == 0
    assert "lacks answers that its history tells of" in caplog.text


def test_runs_are_kept_apart(tmp_path: Path) -> None:
    host, _ = a_host(tmp_path)
    tell(host, JOIN)
    tell(host, ASK, number=2)

    tell(host, JOIN, run="run2")
    second = tell(host, ASK, run="run2", number=2)
    back = tell(host, Ask(prompts=(P,), stop=13), number=3)

    assert second.usage.fm_calls == 12
    assert back.usage.fm_calls == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run1", "run2"]


def test_other_data_under_the_same_run_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    host, _ = a_host(tmp_path)
    tell(host, JOIN)

    changed, fm = a_host(tmp_path, train=rows(20, 9))
    reply = tell(changed, ASK, number=2)

    assert reply.body == Failed(reason="DataError")
    assert fm.n_calls == 0
    assert "data changed since run run1 was joined" in caplog.text


def test_another_model_under_the_same_run_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its answers would not be found in the journal, and every text would count as refused."""
    host, _ = a_host(tmp_path)
    tell(host, JOIN)
    tell(host, ASK, number=2)

    other, fm = a_host(tmp_path, ScriptedFM("another"))
    reply = tell(other, Ask(prompts=(P,), stop=14), number=3)

    assert reply.body == Failed(reason="DataError")
    assert fm.n_calls == 0
    assert "fm changed since run run1 was joined" in caplog.text


@pytest.mark.parametrize("data", [b"", b"rubbish", b"\x81\xa1a\x01"])
def test_rubbish_gets_a_failed_reply(tmp_path: Path, data: bytes) -> None:
    host, _ = a_host(tmp_path)

    reply = decode_reply(wait_for(host.handle(data)))

    assert reply == Reply(round=0, client_id="north", usage=reply.usage, body=Failed(reason="WireError"))


def test_a_task_for_somebody_else_is_refused(tmp_path: Path) -> None:
    host, _ = a_host(tmp_path)
    task = Task(round=1, client_id="south", run="run1", fleet="tuning", grant=0, limit=0, body=JOIN)

    assert decode_reply(wait_for(host.handle(encode(task)))).body == Failed(reason="WireError")


def test_rows_that_no_run_could_use_are_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no training text"):
        ClientHost("north", [("north", "  ", "positive")], [], ScriptedFM(), WordEncoder(), tmp_path)


def test_no_text_is_said_or_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    class Quoting(FailingFM):
        def __init__(self) -> None:
            super().__init__(ValueError(CANARY))

    host, _ = a_host(tmp_path, Quoting(), rows(20, 1, CANARY))

    replies = [tell(host, JOIN), tell(host, ASK, number=2)]

    assert replies[1].body == Failed(reason="ValueError")
    assert "round 2, tuning: ask failed: ValueError" in caplog.text
    assert CANARY not in caplog.text
    assert all(CANARY not in str(reply) for reply in replies)
    assert json.loads((tmp_path / "run1" / "run.json").read_text())["join"]["seed"] == 1


def test_a_search_of_its_index_belongs_to_no_run(tmp_path: Path) -> None:
    index = LocalIndex(WordEncoder())
    index.add([Document(doc_id="d", text=f"a judge {CANARY}")])
    owner = IndexOwner("north", index, Policy(shares="scores"), folder=tmp_path / "index")
    host = ClientHost("north", rows(20, 1), rows(10, 2), ScriptedFM(), WordEncoder(), tmp_path, owner)

    reply = tell(host, Search(asker="server", k=1, texts=("judge",)), run="never-joined")

    assert isinstance(reply.body, Found)
    assert reply.body.arrays[0][0, 0] > 0.5
    assert list(tmp_path.iterdir()) == []


def test_a_client_without_an_index_says_that_it_has_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    host, _ = a_host(tmp_path)

    reply = tell(host, Search(asker="server", k=1, texts=(CANARY,)))

    assert reply.body == Failed(reason="RunError")
    assert "asked of an index, and this client has none" in caplog.text
    assert CANARY not in caplog.text
