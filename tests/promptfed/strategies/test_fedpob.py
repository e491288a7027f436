"""``fedpob``: the contract in both kinds, what is made of the scores, and the planted optimum."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from promptfed.errors import RunError
from promptfed.messages import Ask, Failed, Scored, decode_reply, decode_task
from promptfed.messages.methods import Embed, Embedded, packed
from promptfed.prompts.template import PromptTemplate
from promptfed.strategies.base import Round
from promptfed.strategies.fedpob import DuelBook, FedPOB, ScoreBook, embedded, features
from promptfed.strategies.session import Session
from tests.answering import TASK, AnsweringFM, AnswersContract, fresh_f1
from tests.contracts.method import MethodContract, Wire
from tests.support import LABELS, bench, finish, pooled_accuracy, public_texts, replies

PROMPTS = [PromptTemplate(text=f"{name}: {{text}}", words=LABELS) for name in ("A", "B", "C")]


class TestContract(MethodContract):
    def method(self) -> FedPOB:
        return FedPOB(texts_per_pull=24, n_arms=12)


class TestDuelling(MethodContract):
    def method(self) -> FedPOB:
        return FedPOB(kind="duelling", texts_per_pull=24, n_arms=12)


class TestGeneration(AnswersContract):
    def method(self) -> FedPOB:
        return FedPOB(texts_per_pull=24, n_arms=12)

    def fm(self) -> AnsweringFM:
        return AnsweringFM()


class TestDuellingGeneration(TestGeneration):
    def method(self) -> FedPOB:
        return FedPOB(kind="duelling", texts_per_pull=24, n_arms=12)


# ---------------------------------------------------------------- quality


@pytest.mark.parametrize("kind", ["linucb", "duelling"])
def test_the_planted_prompt_is_found(kind: Literal["linucb", "duelling"]) -> None:
    """Planted: exemplars with the two words of a label; the bare instruction, with none, is right by chance."""
    found = list[float]()
    for seed in (1, 2, 3):
        scene = bench(3, 30, n_words=2)
        federation = scene.federation(max_fm_calls=900, seed=seed, public=public_texts(n_words=2))
        prompt = scene.drive(FedPOB(kind=kind).run(federation), 900)
        found.append(pooled_accuracy(prompt, 200, seed=77))

    assert min(found) > 0.75
    assert np.mean(found) > 0.82


@pytest.mark.parametrize("kind", ["linucb", "duelling"])
def test_where_answers_are_written_the_arms_that_show_most_are_found(kind: Literal["linucb", "duelling"]) -> None:
    """Planted: exemplars of public texts, of which an arm shows none to four, two on the whole."""
    found = list[float]()
    for seed in (1, 2):
        scene = bench(3, 40, fm=AnsweringFM(), max_prompts=1, **TASK)
        prompt = scene.drive(FedPOB(kind=kind, n_arms=30).run(scene.federation(max_fm_calls=900, seed=seed)), 900)
        found.append(fresh_f1(prompt, AnsweringFM()))

    assert min(found) > 0.93


# ---------------------------------------------------------------- dealing


def dealt(**changes: object) -> list[dict[str, Ask]]:
    """What each round of the search asked of whom (those of the end ask all clients for several prompts)."""
    wires: list[Wire] = []
    made = bench(3, 20, wrap=lambda inner: wires.append(Wire(inner)) or wires[0])
    made.drive(FedPOB(n_arms=6, **changes).run(made.federation(max_fm_calls=400)), 400)  # type: ignore[arg-type]
    rounds: dict[int, dict[str, Ask]] = {}
    for task in map(decode_task, wires[0].down):
        if isinstance(task.body, Ask):
            rounds.setdefault(task.round, {})[task.client_id] = task.body
    return list(rounds.values())


def test_an_arm_that_is_dealt_again_goes_to_further_texts() -> None:
    reached: dict[tuple[str, str], int] = {}
    n_again = 0
    for asks in dealt(texts_per_pull=9):
        for client, ask in asks.items():
            if len(ask.prompts) == 1:  # a pull
                key = (client, ask.prompts[0].prompt_id)
                assert ask.stop is not None
                assert ask.stop == min(reached.get(key, 0) + 3, 20)
                n_again += key in reached
                reached[key] = ask.stop

    assert n_again > 3


def test_groups_of_one_round_are_dealt_different_arms() -> None:
    rounds = [
        asks
        for asks in dealt(clients_per_arm=1, clients_per_round=3, texts_per_pull=9)
        if all(len(a.prompts) == 1 for a in asks.values())
    ]

    n_arms = [len({ask.prompts[0].prompt_id for ask in asks.values()}) for asks in rounds if len(asks) == 3]

    assert np.mean(n_arms) > 2


# ---------------------------------------------------------------- features


def test_features_by_hand() -> None:
    """Centred: (1, 0), (-1, 0), (0, 0); the mean square is 2/3."""
    x = features(np.array([[3.0, 5.0], [1.0, 5.0], [2.0, 5.0]]))

    np.testing.assert_allclose(x[:, 0], [np.sqrt(1.5), -np.sqrt(1.5), 0.0])
    np.testing.assert_allclose(x[:, 1], 0.0)
    np.testing.assert_array_equal(x[:, 2:], np.eye(3))


def test_equal_embeddings_are_no_division_by_zero() -> None:
    assert np.isfinite(features(np.ones((4, 2)))).all()


def test_vectors_come_from_the_first_client_that_gives_any() -> None:
    scene = bench(3)
    good = np.arange(6.0).reshape(3, 2)

    def answer(round_: Round) -> dict[str, object]:
        bodies = {
            "client0": Failed(reason="Lost"),
            "client1": Embedded(vectors=b"short"),
            "client2": Embedded(vectors=packed(good)),
        }
        return replies({c: bodies[c] for c in round_.tasks})  # type: ignore[return-value]

    rounds, vectors = finish(embedded(Session(scene.federation()), PROMPTS, 2, seed=1), answer)  # type: ignore[arg-type]

    np.testing.assert_array_equal(vectors, good)
    assert len(rounds) == 1


def test_no_vectors_at_all_is_an_error() -> None:
    def answer(round_: Round) -> dict[str, object]:
        return replies({c: Failed(reason="Lost") for c in round_.tasks})  # type: ignore[return-value]

    with pytest.raises(RunError, match="embedded"):
        finish(embedded(Session(bench(4).federation()), PROMPTS, 2, seed=1), answer)  # type: ignore[arg-type]


def test_a_client_projects_the_vectors_of_its_encoder() -> None:
    """Likeness stays: of three texts the two that share words are nearer, in 40 numbers as in 64."""
    scene = bench(1)
    wires: list[Wire] = []
    scene = bench(1, wrap=lambda inner: wires.append(Wire(inner)) or wires[0])
    texts = [PromptTemplate(text=f"{t} {{text}}", words=LABELS) for t in ("a good day", "a good night", "xyzzy plugh")]

    x = scene.drive(embedded(Session(scene.federation()), texts, 40, seed=3), 10)
    again = scene.drive(embedded(Session(scene.federation()), texts, 40, seed=3), 10)

    assert x.shape == (3, 40)
    np.testing.assert_array_equal(x, again)
    near, far = np.linalg.norm(x[0] - x[1]), np.linalg.norm(x[0] - x[2])
    assert near < far
    task, reply = decode_task(wires[0].down[0]).body, decode_reply(wires[0].up[0]).body
    assert isinstance(task, Embed)
    assert isinstance(reply, Embedded)
    assert len(reply.vectors) == 3 * 40 * 4


# ---------------------------------------------------------------- what is made of scores


def scored(*totals: float, n: int = 20) -> Scored:
    diff = tuple(t - totals[0] for t in totals)
    return Scored(n=n, total=totals, diff=diff, diff_sq=tuple(d * d for d in diff))


def test_scores_are_means_of_the_new_texts() -> None:
    """Totals of 4 on five texts and of 9 on ten: the second five gave 5."""
    book = ScoreBook(features(np.eye(3)), FedPOB())

    book.enter("a", [1], 5, scored(4.0))
    book.enter("a", [1], 10, scored(9.0, n=10))
    book.enter("a", [1], 10, scored(9.0, n=10))

    assert book._seen == [(1, "a", 0, 5, 0.8), (1, "a", 5, 10, 1.0)]


def test_hard_texts_are_not_held_against_an_arm() -> None:
    """Arm 0 leads by a little on the first texts; the further ones, that it alone met, are harder by more than that."""
    book = ScoreBook(features(np.zeros((3, 2))), FedPOB())

    for client in "abcd":
        book.enter(client, [0], 10, scored(8.2))
        book.enter(client, [1], 10, scored(7.6))
        book.enter(client, [2], 10, scored(7.6))
        book.enter(client, [0], 20, scored(8.2 + 6.8))

    worth = book.worth()
    assert worth.argmax() == 0
    plain_means = [(8.2 + 6.8) / 20, 0.76]
    assert plain_means[0] < plain_means[1]


def test_a_little_evidence_is_shrunk_towards_the_embedding_and_the_mean() -> None:
    """Arms 0 and 1 have one embedding, 2 and 3 another; 0 and 2 are pulled: 1 is thought better than 3 as 0 is than 2,
    but by less."""
    book = ScoreBook(features(np.array([[1.0], [1.0], [-1.0], [-1.0]])), FedPOB())

    for client in "abcd":
        book.enter(client, [0], 10, scored(8.5))
        book.enter(client, [2], 10, scored(7.5))

    worth = book.worth()
    assert worth[0] > worth[1] > worth[3] > worth[2]
    assert 0 < worth[1] - worth[3] < worth[0] - worth[2] < 0.1


def test_the_next_arm_is_one_that_is_neither_known_nor_pending() -> None:
    book = ScoreBook(features(np.zeros((3, 2))), FedPOB())
    for client in "abcd":
        book.enter(client, [2], 10, scored(8.0))
    book.open()

    chosen = [book.choose(np.ones(3, dtype=bool)) for _ in range(2)]

    assert chosen == [[0], [1]]
    assert book.choose(np.array([False, False, True])) == [2]


def test_duels_keep_who_won_and_no_more() -> None:
    book = DuelBook(features(np.eye(4)), FedPOB(kind="duelling"))

    book.enter("a", [2, 1], 5, scored(4.0, 3.0))  # 2 beats 1
    book.enter("b", [0, 1], 5, scored(3.0, 3.0))  # a tie
    book.enter("b", [0, 3], 5, scored(3.0, 4.0))  # 3 beats 0
    book.enter("a", [1, 2], 9, scored(6.0, 7.0, n=9))  # 2 beats 1 again, on more texts

    assert book._duels == {("a", 1, 2): (9, 0.0), ("b", 0, 1): (5, 0.5), ("b", 0, 3): (5, 0.0)}


def test_the_winner_of_duels_leads_and_meets_the_least_known() -> None:
    book = DuelBook(features(np.zeros((3, 2))), FedPOB(kind="duelling"))
    for client in "abcd":
        book.enter(client, [1, 0], 10, scored(8.0, 7.0))
    book.open()

    assert book.worth().argmax() == 1
    assert book.choose(np.ones(3, dtype=bool)) == [1, 2]
