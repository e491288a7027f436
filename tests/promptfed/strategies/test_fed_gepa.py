"""``fed_gepa``: the contract, the planted optimum, and the parts of its search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from promptfed.fm.base import BaseFM
from promptfed.messages import Ask, Reply, decode_reply, decode_task
from promptfed.messages.methods import Reflect, Reflected, Wins, Won
from promptfed.strategies.base import Round
from promptfed.strategies.fed_gepa import FedGEPA
from promptfed.strategies.reflecting import first_draft
from tests.answering import TASK, AdvisedFM, AnswersContract
from tests.contracts.method import CANARIES, MethodContract, Wire
from tests.promptfed.strategies.test_race import a_federation, fake_clients, granted
from tests.support import bench, finish, pooled_accuracy, public_texts, replies
from tests.writing import ADVICE, TellTale, advising


class TestContract(MethodContract):
    budget = 300

    def method(self) -> FedGEPA:
        return FedGEPA()

    def fm(self) -> BaseFM:
        return advising()


class TestGeneration(AnswersContract):
    budget = 300

    def method(self) -> FedGEPA:
        return FedGEPA()

    def fm(self) -> BaseFM:
        return AdvisedFM()


def fake_reflections(instruction: str = "") -> object:
    """As in the tests of ``race``; the first prompt wins three texts, the others one each."""
    others = fake_clients()

    def answer(round_: Round) -> Mapping[str, Reply]:
        if round_.name == "reflect":
            return replies({c: Reflected(instruction=instruction, n_stopped=0) for c in round_.tasks})
        if round_.name == "wins":
            n = {c: len(task.prompts) for c, task in round_.tasks.items() if isinstance(task, Wins)}
            return replies(
                {
                    c: Won(n=task.stop, shares=(min(3.0, task.stop - 1.0), *(0.0,) * (n[c] - 1)))
                    for c, task in round_.tasks.items()
                    if isinstance(task, Wins)
                }
            )
        return dict(others(round_))

    return answer


# ---------------------------------------------------------------- quality


@pytest.mark.parametrize("seed", [1, 3])
def test_the_planted_advice_is_found_and_scores_better(seed: int) -> None:
    scene = bench(3, 40, fm=advising(), max_fm_calls=900, max_prompts=1)

    prompt = scene.drive(FedGEPA().run(scene.federation(seed=seed)), 900)

    heats = [e for e in scene.events.events if e["kind"] == "heat"]
    assert ADVICE.rstrip(".") in prompt.prompts[0].text
    assert heats[-1]["best_score"] > heats[0]["best_score"] + 0.1


def test_the_pool_begins_with_the_persons_instruction_and_what_a_short_answer_is() -> None:
    rounds, _ = finish(FedGEPA().run(federation := a_federation(3, 900)), fake_reflections())  # type: ignore[arg-type]
    wires: list[Wire] = []
    scene = bench(3, 20, fm=AdvisedFM(), wrap=lambda inner: wires.append(Wire(inner)) or wires[0], **TASK)
    scene.drive(FedGEPA().run(scene.federation(max_fm_calls=300)), 300)

    written = next(body for task in wires[0].down if isinstance(body := decode_task(task).body, Ask))
    labelled = next(task for r in rounds for task in r.tasks.values() if isinstance(task, Ask))

    assert written.prompts[0] == first_draft(scene.federation()).template()
    assert labelled.prompts[0] == first_draft(federation).template()


def test_with_a_model_that_gives_no_advice_exemplars_carry_it() -> None:
    """Planted as for ``race``: exemplars with the words of a label."""
    scene = bench(3, 30, n_words=2)
    federation = scene.federation(max_fm_calls=900, public=public_texts(n_words=2))

    prompt = scene.drive(FedGEPA().run(federation), 900)

    assert pooled_accuracy(prompt, 100, seed=77) > 0.85


# ---------------------------------------------------------------- parts


def test_parents_are_drawn_by_their_wins() -> None:
    rounds, _ = finish(FedGEPA().run(a_federation(3, 900)), fake_reflections())

    wins = [task for r in rounds if r.name == "wins" for task in r.tasks.values() if isinstance(task, Wins)]
    reflects = [task for r in rounds if r.name == "reflect" for task in r.tasks.values() if isinstance(task, Reflect)]
    assert wins
    assert {task.template for task in reflects} <= {task.prompts[0] for task in wins}  # who wins all is drawn always
    assert reflects


def test_reflections_are_granted_what_they_may_cost_and_go_to_clients_in_turn() -> None:
    rounds, _ = finish(FedGEPA(merge_every=1000).run(a_federation(3, 1500)), fake_reflections("A better one it is."))

    reflects = [r for r in rounds if r.name == "reflect"]
    assert all(len(r.tasks) == 2 for r in reflects)
    assert {c for r in reflects[:2] for c in r.tasks} == {"c000", "c001", "c002"}
    assert {g for r in reflects for g in r.grants.values()} == {3 + 2 + 3}
    assert granted(rounds) <= 1500


def test_a_model_that_brings_nothing_is_asked_less_and_less() -> None:
    rounds, _ = finish(FedGEPA(merge_every=1000).run(a_federation(3, 2500)), fake_reflections())

    names = [r.name for r in rounds]
    assert 4 <= names.count("reflect") < names.count("wins") + 20
    assert names.count("reflect") < len([r for r in rounds if len(r.tasks) == 2 and r.name == "score"])


def test_wins_beyond_a_clients_texts_are_not_believed() -> None:
    others = fake_reflections()

    def greedy(round_: Round) -> Mapping[str, Reply]:
        answered = dict(others(round_))  # type: ignore[operator]
        if round_.name == "wins":
            last = len(round_.tasks["c000"].prompts) - 1  # type: ignore[union-attr]
            body = Won(n=10**6, shares=(*(0.0,) * last, 1e6))
            answered["c000"] = replace(answered["c000"], body=body)
        return answered

    honest, _ = finish(FedGEPA().run(a_federation(3, 900)), others)  # type: ignore[arg-type]
    robbed, _ = finish(FedGEPA().run(a_federation(3, 900)), greedy)

    first = [next(t for r in rounds if r.name == "reflect" for t in r.tasks.values()) for rounds in (honest, robbed)]
    assert first[0] == first[1]


# ---------------------------------------------------------------- the gate in the whole federation


def test_nothing_that_a_tell_tale_writes_gets_out() -> None:
    model, wires = TellTale(lambda text: f"Always look for {text}"), list[Wire]()
    scene = bench(3, 20, fm=model, max_fm_calls=400, wrap=lambda inner: wires.append(Wire(inner)) or wires[0])
    for canary, client in zip(CANARIES, scene.clients.values(), strict=True):
        train = client.data.train
        client.data = replace(client.data, train=replace(train, texts=tuple(f"{t} {canary}" for t in train.texts)))
        client.scores.data = client.data.train

    scene.drive(FedGEPA().run(scene.federation()), 400)

    reflected = [body for r in wires[0].up if isinstance(body := decode_reply(r).body, Reflected)]
    crossed = b"".join([*wires[0].up, *wires[0].down]).lower()
    assert sum(body.n_stopped for body in reflected) > 0
    assert not [canary for canary in CANARIES if canary.encode() in crossed]
    assert {body.instruction for body in reflected} == {""}
