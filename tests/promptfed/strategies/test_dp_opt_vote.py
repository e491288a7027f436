"""``dp_opt_vote``: instructions by private votes, and what is said of them."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import dp_accounting as dpa
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant

from promptfed.fm.scripted import ScriptedFM, overlap_rule
from promptfed.messages import decode_reply, decode_task
from promptfed.messages.methods import NextWord, NoisyVotes
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.meta import OPENING
from promptfed.prompts.template import PromptTemplate
from promptfed.strategies.dp_opt_vote import DPOPTVote, elected
from promptfed.types import LabelRequest
from tests.contracts.method import CANARIES, MethodContract, Wire
from tests.support import CHEERFUL, GLOOMY, LABELS, Bench, bench, public_texts, sentences


class TestContract(MethodContract):
    budget: ClassVar[int] = 450

    def method(self) -> DPOPTVote:
        return DPOPTVote()


def planted(request: LabelRequest) -> list[float]:
    """A model that follows an instruction only if it says "crimson", and would write that word only after texts that
    are labelled (of itself, it likes "the" best)."""
    if OPENING in request.text:
        sees_texts = "Label:" in request.text
        likes = {" crimson": 3.0 if sees_texts else 0.5, " the": 1.0}
        return [likes.get(word, 0.0) for word in request.labels]
    instruction = request.prefix.split("\n\n")[0].lower()
    good = any(word in request.text for word in CHEERFUL) - any(word in request.text for word in GLOOMY)
    told = 3.0 * good if "crimson" in instruction else 0.0
    noise = overlap_rule(request)
    return [told * (1 if "positive" in label else -1) + 0.2 * n for label, n in zip(request.labels, noise, strict=True)]


PHRASES = ("Say with a crimson word which it is.", "Read it and say.")
JUDGE = "Judge the label of this."


def alone(prompt: PromptTemplate) -> PromptSet:
    return PromptSet(labels=LABELS, prompts=(prompt,), weights=(1.0,), bias=(0.0, 0.0))


def a_run(method: DPOPTVote, wires: list[Wire] | None = None, **changes: Any) -> tuple[Bench, PromptSet]:
    def wrap(inner: Any) -> Any:
        wire = Wire(inner)
        if wires is not None:
            wires.append(wire)
        return wire

    scene = bench(3, 40, n_words=2, fm=ScriptedFM(rule=planted, phrases=PHRASES), wrap=wrap)
    federation = scene.federation(max_fm_calls=500, public=public_texts(n_words=2), instruction=JUDGE, **changes)
    return scene, scene.drive(method.run(federation), 500)


def test_the_planted_word_is_written_and_found() -> None:
    start = PromptTemplate(text=f"{JUDGE}\n\nText: {{text}}\nLabel:", words=LABELS)
    fresh = sentences(100, 77, n_words=2)

    _, prompt = a_run(DPOPTVote(epsilon=20.0))

    assert "rimson" in prompt.prompts[0].text
    for tuned, right in ((prompt, (0.95, 1.0)), (alone(start), (0.4, 0.6))):
        said = [p.label for p in tuned.predict(fresh.texts, fm=ScriptedFM(rule=planted))]
        assert right[0] <= np.mean([LABELS[y] == s for y, s in zip(fresh.labels, said, strict=True)]) <= right[1]


def test_votes_are_needed_to_find_it() -> None:
    """Without votes that pass, the FM's favourite is written, and that is not the planted word."""
    wires: list[Wire] = []
    a_run(DPOPTVote(epsilon=1e-3), wires)

    written = {t.body.written for t in map(decode_task, wires[0].down) if isinstance(t.body, NextWord)}

    assert any(text.startswith("the") for text in written)


def test_what_is_said_is_what_crossed() -> None:
    wires: list[Wire] = []
    method = DPOPTVote(epsilon=6.0, n_groups=6, group_size=4)
    scene, _ = a_run(method, wires)

    (release,) = [e for e in scene.events.events if e["kind"] == "release"]
    tasks = [t.body for t in map(decode_task, wires[0].down) if isinstance(t.body, NextWord)]
    sent = [r.body for r in map(decode_reply, wires[0].up) if isinstance(r.body, NoisyVotes)]

    assert release["unit"] == "record"
    assert [task.sampling_rate for task in tasks] == pytest.approx([6 * 4 / 120] * len(tasks))
    assert release["sampling_rate"] == pytest.approx(0.2)
    assert len({task.release for task in tasks}) == release["n_compositions"] > 0
    assert 3 * release["n_outputs"] == sum(len(body.votes) // 4 for body in sent)
    # One text moves one vote: sqrt(2) times the multiplier on every count.
    assert [task.noise for task in tasks] == pytest.approx([release["noise_multiplier"] * math.sqrt(2)] * len(tasks))
    event = dpa.SelfComposedDpEvent(
        dpa.PoissonSampledDpEvent(0.2, dpa.GaussianDpEvent(release["noise_multiplier"])), release["n_compositions"]
    )
    by_hand = PLDAccountant(value_discretization_interval=1e-3).compose(event).get_epsilon(1e-5)
    assert release["epsilon"] == pytest.approx(by_hand, abs=0.01)
    assert release["epsilon"] <= 6.0


def test_no_word_comes_from_a_private_text() -> None:
    """Candidates are public before any text is read: none has a client's own word, whatever is voted."""
    wires: list[Wire] = []
    scene = TestContract().scene(wrap=lambda inner: wires.append(Wire(inner)) or wires[0])

    scene.drive(DPOPTVote(epsilon=math.inf).run(scene.federation()), 450)

    words = {w for t in map(decode_task, wires[0].down) if isinstance(t.body, NextWord) for w in t.body.candidates}
    assert words
    assert words.isdisjoint(CANARIES)
    assert not [e for e in scene.events.events if e["kind"] == "release"]


def test_words_are_planned_for_each_milestone_and_none_where_there_is_no_room() -> None:
    federation = bench(3, 40).federation(max_fm_calls=1000, milestones=(40, 340))

    ballot = DPOPTVote(epsilon=math.inf, n_groups=6, n_words=5)._ballot(federation)

    assert ballot.groups == {"client0": 2, "client1": 2, "client2": 2}
    assert ballot.cost_of_a_word == 7
    # A quarter of 40, 300 and 660 calls, at 7 a word: 1, 10 and 23 words.
    assert ballot.plan == ((), (5, 5), (5, 5, 5))


@pytest.mark.parametrize(
    ("votes", "noise", "word"),
    [
        ([1.0, 6.0, 2.0], 0.0, "b"),
        ([1.0, 6.0, 2.0], 1.0, "b"),  # over 9/3 + 1 * sqrt(2) * sqrt(2 ln 3) = 5.1
        ([1.0, 6.0, 2.0], 2.0, "a"),  # not over 7.2
        ([3.0, 3.0, 3.0], 0.0, "a"),
    ],
)
def test_a_winner_has_to_be_more_than_noise(votes: list[float], noise: float, word: str) -> None:
    assert elected(["a", "b", "c"], np.array(votes), n_groups=9, noise=noise, n_clients=2) == word
