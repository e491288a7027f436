"""Public texts labelled with the client's own shots: what the FM is asked, and what leaves."""

from __future__ import annotations

import numpy as np

from clients.client import Client
from clients.data import ClientData, Labelled
from clients.relabelling import MAX_SHOT_WORDS, draw_shots
from promptfed.fm.base import BaseFM
from promptfed.fm.scripted import ScriptedFM
from promptfed.messages import Failed, Reply, Task, Votes, decode_reply, encode
from promptfed.messages.methods import Relabel
from promptfed.types import LabelRequest
from tests.support import LABELS, CountingFM, FailingFM, WordEncoder, client_data, wait_for


def a_task(**changes: object) -> Relabel:
    values: dict[str, object] = {
        "texts": ("A superb plot.", "A stale plot."),
        "context": (("A stale plot.", 0), ("A lovely day.", 1)),
        "instruction": "Good or bad?",
        "fields": ("Text", "Sentiment"),
        "words": LABELS,
        "n_shots": 2,
        "seed": 5,
        **changes,
    }
    return Relabel(**values)  # type: ignore[arg-type]


def handled(fm: BaseFM, body: Relabel, grant: int) -> Reply:
    client = Client(client_data("a", 20), LABELS, fm, WordEncoder(), seed=1)
    task = Task(round=1, client_id="a", run="r", fleet="tuning", grant=grant, limit=grant, body=body)
    return decode_reply(wait_for(client.handle(encode(task))))


def test_one_call_a_text_with_own_shots_and_the_context() -> None:
    fm = CountingFM(ScriptedFM())

    reply = handled(fm, a_task(), 2)

    asked = [r for r in fm.requests if isinstance(r, LabelRequest)]
    assert reply.usage.fm_calls == len(asked) == 2
    blocks = asked[0].prefix.split("\n\n")
    own = client_data("a", 20).train.texts
    assert blocks[0] == "Good or bad?"
    assert sum(any(text in block for text in own) for block in blocks) == 4
    assert "Text: A lovely day.\nSentiment: positive" in blocks
    assert "Text: A stale plot.\nSentiment: negative" in blocks


def test_a_text_is_not_shown_its_own_label() -> None:
    fm = CountingFM(ScriptedFM())

    handled(fm, a_task(), 2)

    (asked,) = [r for r in fm.requests if isinstance(r, LabelRequest) and "stale" in r.text]
    assert "A stale plot." not in asked.prefix
    assert "A lovely day." in asked.prefix


def test_what_leaves_is_one_byte_a_text_and_label() -> None:
    reply = handled(ScriptedFM(), a_task(), 2)

    assert isinstance(reply.body, Votes)
    shares = np.frombuffer(reply.body.shares, dtype=np.uint8).reshape(2, 2)
    assert np.abs(shares.sum(axis=1).astype(int) - 255).max() <= 1
    assert shares[0].argmax() == 1
    assert shares[1].argmax() == 0


def test_an_fm_that_fails_leaves_a_uniform_answer() -> None:
    reply = handled(FailingFM(), a_task(), 2)

    assert isinstance(reply.body, Votes)
    assert set(reply.body.shares) == {128}


def test_a_task_without_a_grant_makes_no_call_and_fails() -> None:
    fm = CountingFM(ScriptedFM())

    reply = handled(fm, a_task(), 0)

    assert fm.n_calls == 0
    assert reply.body.kind == "failed"


def test_words_of_the_server_s_choice_are_refused() -> None:
    """With a vocabulary for labels it could have the FM spell a shot out, word by word."""
    fm = CountingFM(ScriptedFM())

    reply = handled(fm, a_task(words=("the", "plot", "film")), 2)

    assert (fm.n_calls, reply.body) == (0, Failed(reason="WireError"))


def test_shots_are_drawn_by_label_on_one_line_and_cut() -> None:
    texts = ("one\ntwo", "w " * 100, "has {text} in it", "four", "five")
    data = Labelled(texts=texts, labels=np.array([0, 0, 0, 2, 2]))

    shots = draw_shots(data, 2, np.random.default_rng(0))

    assert sorted(label for _, label in shots) == [0, 0, 2, 2]
    assert ("one two", 0) in shots
    assert (" ".join(["w"] * MAX_SHOT_WORDS), 0) in shots
    assert draw_shots(data, 0, np.random.default_rng(0)) == []


def test_a_client_without_a_label_has_no_shot_of_it() -> None:
    only = Labelled(texts=("fine", "good"), labels=np.array([1, 1]))
    client = Client(ClientData(client_id="a", train=only, test=only), LABELS, ScriptedFM(), WordEncoder(), seed=1)
    task = Task(round=1, client_id="a", run="r", fleet="tuning", grant=2, limit=2, body=a_task(context=()))

    reply = decode_reply(wait_for(client.handle(encode(task))))

    assert isinstance(reply.body, Votes)


def test_the_same_seed_draws_the_same_shots_and_another_client_others() -> None:
    fms = [CountingFM(ScriptedFM()) for _ in range(3)]
    for fm, seed in zip(fms, (5, 5, 6), strict=True):
        handled(fm, a_task(seed=seed), 2)

    first, again, other = ([r.prefix for r in fm.requests if isinstance(r, LabelRequest)] for fm in fms)
    assert first == again
    assert first != other
