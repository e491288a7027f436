"""``fed_icl``: the contract, fusing by hand, and the planted optimum through the whole federation."""

from __future__ import annotations

import numpy as np
import pytest

from promptfed.fm.scripted import ScriptedFM
from promptfed.messages import Votes, decode_reply, decode_task
from promptfed.messages.methods import Relabel
from promptfed.prompts.grammar import FIELDS, Materials, draw_exemplars
from promptfed.strategies.fed_icl import Answers, FedICL, _queries
from promptfed.types import LabelRequest
from tests.contracts.method import CANARIES, MethodContract, Wire
from tests.support import bench, pooled_accuracy, public_texts


class TestContract(MethodContract):
    def method(self) -> FedICL:
        return FedICL(texts_per_heat=6)

    def test_shots_reach_the_foundation_model_and_not_the_wire(self) -> None:
        wires: list[Wire] = []
        scene = self.scene(wrap=lambda inner: wires.append(Wire(inner)) or wires[0])

        self.run(scene)

        # A canary stands before the slot of a prompt only where a client's own text is a shot.
        shots = [r for r in scene.fm.requests if isinstance(r, LabelRequest) and any(c in r.prefix for c in CANARIES)]
        n_asked = sum(len(t.body.texts) for t in map(decode_task, wires[0].down) if isinstance(t.body, Relabel))
        assert len(shots) == n_asked > 0
        crossed = b"".join([*wires[0].up, *wires[0].down])
        assert not [canary for canary in CANARIES if canary.encode() in crossed]

    def test_the_prompt_holds_public_or_written_text_only(self) -> None:
        scene = self.scene()

        prompt, _ = self.run(scene)

        own = {text for client in scene.clients.values() for text in client.data.train.texts}
        assert not [text for text in own for p in prompt.prompts if text in p.text]

    def test_an_answer_is_a_byte_a_text_and_label(self) -> None:
        wires: list[Wire] = []
        scene = self.scene(wrap=lambda inner: wires.append(Wire(inner)) or wires[0])

        self.run(scene)

        tasks = {(t.round, t.client_id): t.body for t in map(decode_task, wires[0].down)}
        for reply in map(decode_reply, wires[0].up):
            task = tasks[reply.round, reply.client_id]
            if isinstance(task, Relabel):
                assert isinstance(reply.body, Votes)
                assert len(reply.body.shares) == 2 * len(task.texts)
                assert reply.usage.fm_calls == len(task.texts)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_planted_prompt_is_found(seed: int) -> None:
    """Planted: exemplars with the two words of a label; the bare instruction, with none, is right by chance."""
    scene = bench(3, 30, n_words=2)
    federation = scene.federation(max_fm_calls=900, seed=seed, public=public_texts(n_words=2))

    prompt = scene.drive(FedICL().run(federation), 900)

    assert pooled_accuracy(prompt, 100, seed=77) > 0.85


def test_the_clients_correct_what_the_domain_models_took_for_another_label() -> None:
    """The first answers are turned round; the clients' FM, with true shots, turns them back."""
    scene = bench(3, 40, n_words=2, fm=ScriptedFM())
    truth = {"A wonderful film.": 1, "A superb film.": 1, "A dreadful film.": 0, "A boring film.": 0}
    wrong = np.array([[0.6, 0.4] if label else [0.4, 0.6] for label in truth.values()])
    answers = Answers(list(truth), wrong)
    materials = Materials(
        instructions=("",),
        fields=FIELDS,
        exemplars=((), ()),
        words=("negative", "positive"),
        other_words=((), ()),
        loose=((), ()),
    )
    from promptfed.strategies.session import Session

    session, rng = Session(scene.federation(max_fm_calls=100)), np.random.default_rng(0)

    def steps():  # type: ignore[no-untyped-def]
        for _ in range(3):
            yield from FedICL()._relabel(session, answers, materials, 12, rng)

    scene.drive(steps(), 100)

    labels = answers.odds.argmax(axis=1)
    assert labels.tolist() == list(truth.values())
    assert answers.n_changed == 4
    assert scene.fm.n_calls == 36


# ---------------------------------------------------------------- fusing


def test_fusing_by_hand() -> None:
    """Two texts. Every reader of them says "1" with odds e^1 more than the other: its mean answer is taken off."""
    answers = Answers(["s", "t"], np.array([[0.5, 0.5], [0.5, 0.5]]))
    # Log-odds of label 1: 0 and 2 (mean 1); so s is -1, t is +1. The other column mirrors it.
    p = np.array([0.5, 1 / (1 + np.exp(-2.0))])

    answers.fuse({"a": [0, 1]}, {"a": np.column_stack([1 - p, p])})

    # One first answer of 0 and this one: the mean is half.
    np.testing.assert_allclose(answers.odds, [[0.5, -0.5], [-0.5, 0.5]], atol=1e-9)
    assert answers.agreed(1) == (("s",), ("t",))


def test_a_client_that_was_not_asked_or_did_not_answer_changes_nothing() -> None:
    answers = Answers(["s", "t"], np.array([[0.9, 0.1], [0.2, 0.8]]))
    before = answers.odds

    answers.fuse({"a": [0, 1], "b": [0]}, {"b": np.array([[0.1, 0.9]])})  # one answer alone says nothing

    np.testing.assert_array_equal(answers.odds, before)


def test_the_most_agreed_on_come_first_and_what_is_undecided_not_at_all() -> None:
    votes = np.array([[0.7, 0.3], [0.9, 0.1], [0.5, 0.5], [0.1, 0.9], [0.3, 0.7]])

    assert Answers(list("abcde"), votes).agreed(2) == (("b", "a"), ("d", "e"))


def test_no_query_is_no_context() -> None:
    answers = Answers([], np.zeros((0, 3)))

    assert answers.agreed(2) == ((), (), ())
    assert answers.deal(["a"], 10) == {}


def test_queries_go_round_the_clients() -> None:
    answers = Answers(list("abcd"), np.full((4, 2), 0.5))

    rounds = [answers.deal(["x", "y"], 4) for _ in range(2)]

    assert sorted(rounds[0]["x"] + rounds[0]["y"]) == [0, 1, 2, 3]
    # In the second round each gets what it has not seen.
    assert sorted(rounds[1]["x"]) == sorted(rounds[0]["y"])
    assert sorted(rounds[1]["y"]) == sorted(rounds[0]["x"])


def test_no_more_than_all_queries_for_all_clients_are_dealt_and_no_more_than_the_calls() -> None:
    answers = Answers(list("abc"), np.full((3, 2), 0.5))

    assert sum(map(len, answers.deal(["x", "y"], 100).values())) == 6
    assert sum(map(len, answers.deal(["x", "y"], 5).values())) <= 5
    assert answers.deal(["x", "y"], 1) == {}


# ---------------------------------------------------------------- prompts


def some(exemplars: tuple[tuple[str, ...], ...], loose: tuple[tuple[str, ...], ...]) -> Materials:
    return Materials(
        instructions=("",), fields=FIELDS, exemplars=exemplars, words=("x", "y"), other_words=((), ()), loose=loose
    )


def test_exemplars_are_drawn_by_label() -> None:
    drawn = draw_exemplars(some((("a", "b", "c"), ("d",)), ((), ())), 2, np.random.default_rng(0))

    assert sorted(label for _, label in drawn) == [0, 0, 1]
    assert len(set(drawn)) == 3


def test_queries_are_of_both_kinds_and_of_every_label() -> None:
    queries = _queries(some((("f1", "f2", "f3", "w1"), ("g1",)), (("w1", "w2", "w3"), ())), 4)

    assert queries == ["f1", "f2", "w1", "w2", "g1"]
