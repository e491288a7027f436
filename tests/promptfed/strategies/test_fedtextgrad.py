"""``fedtextgrad``: the contract, merge forms by hand, the vote, and the gate in the whole federation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from promptfed.errors import ConfigError
from promptfed.fm.base import BaseFM
from promptfed.messages import Reply, Write, Written, decode_reply, decode_task
from promptfed.messages.methods import Reflect, Reflected
from promptfed.prompts.feedback import merge_prompt
from promptfed.registry import load_method
from promptfed.strategies.base import Round
from promptfed.strategies.fedtextgrad import FedTextGrad, concatenated, ranked_rules
from promptfed.strategies.reflecting import first_draft, next_in_turn, public_words
from tests.answering import ADVICE as GIVE_IT
from tests.answering import AdvisedFM, AnswersContract
from tests.contracts.method import CANARIES, MethodContract, Wire
from tests.promptfed.strategies.test_race import a_federation, fake_clients
from tests.support import bench, finish, reply
from tests.writing import ADVICE, TellTale, advising


class TestContract(MethodContract):
    def method(self) -> FedTextGrad:
        return FedTextGrad()

    def fm(self) -> BaseFM:
        return advising(phrases=tuple(f"{start} {ADVICE}" for start in ("Read it all.", "Be fair.", "Take care.", "")))


class TestGeneration(AnswersContract):
    def method(self) -> FedTextGrad:
        return FedTextGrad()

    def fm(self) -> BaseFM:
        return AdvisedFM(tuple(f"{start} {GIVE_IT}" for start in ("Read it all.", "Be fair.", "Take care.", "")))


class TestContractWithATellTale(MethodContract):
    """The model writes what it was shown: the contract's canaries have to stay at home all the same."""

    def method(self) -> FedTextGrad:
        return FedTextGrad(merge="structured")

    def fm(self) -> BaseFM:
        return TellTale(lambda text: f"Watch out for {text}")

    test_it_sends_what_its_card_says = None  # nothing passes the gate, so no merge is written


# ---------------------------------------------------------------- quality


@pytest.mark.parametrize("merge", ["concat", "summarise", "uid", "structured"])
def test_the_planted_advice_is_found_and_scores_better(merge: Any) -> None:
    scene = bench(3, 40, fm=advising(), max_fm_calls=900, max_prompts=1)

    prompt = scene.drive(FedTextGrad(merge=merge).run(scene.federation()), 900)

    heats = [e for e in scene.events.events if e["kind"] == "heat"]
    assert ADVICE.rstrip(".") in prompt.prompts[0].text
    assert heats[-1]["best_score"] > heats[0]["best_score"] + 0.1


def test_a_model_that_writes_nothing_of_use_leaves_the_start() -> None:
    scene = bench(3, 40, fm=advising(phrases=("", "No.", "{text} is it")), max_fm_calls=600, max_prompts=1)

    prompt = scene.drive(FedTextGrad().run(scene.federation()), 600)

    assert prompt.prompts[0].text == "Is the review negative or positive?\n\nText: {text}\nReview:"


# ---------------------------------------------------------------- the vote


def with_reflections(given: Mapping[str, str], score: Callable[[str], float]) -> Any:
    """Clients that reflect as they are told, and score by the prompt's text."""
    others = fake_clients()

    def answer(round_: Round) -> Mapping[str, Reply]:
        if round_.name == "reflect":
            return {c: reply(Reflected(instruction=given.get(c, ""), n_stopped=0), c) for c in round_.tasks}
        if round_.name == "write":
            return {c: reply(Written(texts=("Merged it is now.",)), c) for c in round_.tasks}
        replies = dict(others(round_))
        for c, task in round_.tasks.items():
            if round_.name == "score":
                n = replies[c].body.n
                total = [n * max(score(task.prompts[i].text) for i in s) for s in task.sets]
                diff = tuple(t - total[0] for t in total)
                diff = diff if task.differences else ()
                body = replace(replies[c].body, total=tuple(total), diff=diff, diff_sq=tuple(d * d / n for d in diff))
                replies[c] = replace(replies[c], body=body)
        return replies

    return answer


GIVEN = {"c000": "First of all read it.", "c001": "Second thing is care.", "c002": "First of all read it."}


def starts(rounds: list[Round]) -> list[str]:
    """The instruction that each round of reflection began with."""
    return [task.instruction for r in rounds if r.name == "reflect" for task in list(r.tasks.values())[:1]]


def test_a_merge_that_is_worse_is_not_taken() -> None:
    federation = a_federation(3, 900, max_prompts=1)
    answer = with_reflections(GIVEN, lambda text: 0.8 if text.startswith("Negative or") else 0.7)

    rounds, prompt = finish(FedTextGrad(patience=3).run(federation), answer)

    assert starts(rounds) == ["Negative or positive?"] * 3
    assert prompt.prompts[0].text.startswith("Negative or positive?")


def test_a_merge_that_is_equal_is_not_taken_either() -> None:
    rounds, _ = finish(FedTextGrad(patience=2).run(a_federation(3, 900)), with_reflections(GIVEN, lambda _: 0.8))

    assert starts(rounds) == ["Negative or positive?"] * 2


def test_a_merge_that_is_better_is_taken_and_so_is_a_single_instruction_that_is_better_still() -> None:
    federation = a_federation(3, 900, max_prompts=1)
    merge_wins = with_reflections(GIVEN, lambda text: 0.9 if text.startswith("Merged") else 0.7)
    single_wins = with_reflections(GIVEN, lambda text: {"M": 0.8, "F": 0.9}.get(text[0], 0.7))

    of_merge, _ = finish(FedTextGrad(patience=2).run(federation), merge_wins)
    of_single, prompt = finish(FedTextGrad(patience=2).run(federation), single_wins)

    assert starts(of_merge)[:2] == ["Negative or positive?", "Merged it is now."]
    assert starts(of_single)[:2] == ["Negative or positive?", "First of all read it."]  # two clients gave it
    assert prompt.prompts[0].text.startswith("First of all read it.")


def test_one_instruction_needs_no_merge_and_a_clients_words_are_read_like_a_models() -> None:
    given = {"c001": '<instruction>"Second thing is care."</instruction> And {text}'}
    answer = with_reflections(given, lambda text: 0.9 if text.startswith("Second") else 0.7)

    rounds, _ = finish(FedTextGrad(patience=1).run(a_federation(3, 900)), answer)

    assert "write" not in [r.name for r in rounds]
    assert starts(rounds)[:2] == ["Negative or positive?", "Second thing is care."]


def test_the_merge_is_written_by_two_clients_from_what_crossed_and_nothing_else() -> None:
    rounds, _ = finish(FedTextGrad(patience=1).run(a_federation(3, 900)), with_reflections(GIVEN, lambda _: 0.5))

    (written,) = [r for r in rounds if r.name == "write"]
    expected = merge_prompt(["First of all read it.", "Second thing is care."], ("negative", "positive"), "uid", 60)
    assert written.grants == {"c000": 1, "c001": 1}
    assert all(isinstance(t, Write) and t.requests[0].prompt == expected for t in written.tasks.values())


def test_votes_are_on_texts_that_no_reflection_has_read() -> None:
    rounds, _ = finish(FedTextGrad(patience=1).run(a_federation(5, 900)), with_reflections({}, lambda _: 0.5))

    reflects = [t for r in rounds if r.name == "reflect" for t in r.tasks.values() if isinstance(t, Reflect)]
    assert {t.start for t in reflects} == {5}  # 25 texts of five clients
    assert len(reflects) == 3
    assert all(r.grants[c] == 4 + 2 + 4 for r in rounds if r.name == "reflect" for c in r.tasks)


# ---------------------------------------------------------------- merge forms


def test_concat_takes_whole_instructions_as_long_as_they_fit() -> None:
    parts = ["Read it all", "One two three four five six.", "Be fair!"]

    assert concatenated(parts, 20) == "Read it all. One two three four five six. Be fair!"
    assert concatenated(parts, 6) == "Read it all. Be fair!"
    assert concatenated(["Much too long this is."], 2) == "Much too long this is."


def test_rules_are_ordered_by_how_many_clients_gave_them_and_told_apart_by_their_words() -> None:
    given = {
        "a": "Judge the tone. Ignore the first name of the author.",
        "b": "Look for irony! Judge the tone!",
        "c": "- look for irony\n- Ignore the name of the author. Look for irony.",
    }

    rules = ranked_rules(given)

    assert [(r.text, r.clients) for r in rules] == [
        ("Judge the tone.", ("a", "b")),
        ("Ignore the first name of the author.", ("a", "c")),  # 6 of 7 words are shared
        ("Look for irony!", ("b", "c")),
    ]


# ---------------------------------------------------------------- parts


def test_clients_take_turns() -> None:
    turns, rng = Counter[str](), np.random.default_rng(1)

    drawn = [next_in_turn(["a", "b", "c", "d", "e"], turns, 3, rng) for _ in range(5)]

    assert set(turns.values()) == {3}
    assert all(len(set(d)) == 3 for d in drawn)
    assert next_in_turn(["a", "b"], Counter(), 3, rng) == ["a", "b"]


def test_public_words_are_those_of_several_public_texts_most_frequent_first() -> None:
    federation = a_federation(1, 900, public=("The cast and the plot 7", "the cast", "the x"))

    assert public_words(federation) == ("the", "cast")


def test_where_answers_are_written_a_search_begins_with_what_a_short_answer_is() -> None:
    written = first_draft(a_federation(3, 900, labels=(), words=(), instruction="Who is it?")).template()
    labelled = first_draft(a_federation(3, 900)).template()

    assert written.words == ()
    assert written.text.startswith("Who is it?\n\nText: ")
    assert (written.text.count("\nAnswer: "), written.text.count("\nAnswer:")) == (4, 5)
    assert labelled.text == "Negative or positive?\n\nText: {text}\nLabel:"


def test_options_are_checked() -> None:
    assert load_method("fedtextgrad", {"merge": "concat"}) == FedTextGrad(merge="concat")
    with pytest.raises(ConfigError, match="merge"):
        load_method("fedtextgrad", {"merge": "vote"})


# ---------------------------------------------------------------- the gate in the whole federation

TALES: dict[str, Callable[[str], str]] = {
    "the text": lambda text: text,
    "shouted": lambda text: text.upper(),
    "its words turned round": lambda text: " ".join(reversed(text.split())),
    "the canary": lambda text: f"Always look for {next((c for c in CANARIES if c in text), 'it')} there.",
    "the canary spelled": lambda text: "Always look for " + " ".join(next((c for c in CANARIES if c in text), "it")),
    "the first words": lambda text: "Consider also " + " ".join(text.split()[:5]),
}


@pytest.mark.parametrize("tale", TALES)
def test_nothing_that_a_tell_tale_writes_gets_out(tale: str) -> None:
    model, wires = TellTale(TALES[tale]), list[Wire]()
    scene = bench(3, 20, fm=model, max_fm_calls=500, wrap=lambda inner: wires.append(Wire(inner)) or wires[0])
    for canary, client in zip(CANARIES, scene.clients.values(), strict=True):
        train = client.data.train
        client.data = replace(client.data, train=replace(train, texts=tuple(f"{t} {canary}" for t in train.texts)))
        client.scores.data = client.data.train

    scene.drive(FedTextGrad(n_steps=2).run(scene.federation()), 500)

    assert model.told
    reflected = [decode_reply(r).body for r in wires[0].up if isinstance(decode_reply(r).body, Reflected)]
    assert sum(body.n_stopped for body in reflected) > 0
    assert {body.instruction for body in reflected} == {""}
    crossed = b"".join([*wires[0].up, *wires[0].down]).lower()
    assert not [text for text in model.told if text.lower().encode() in crossed]
    assert not [canary for canary in CANARIES if canary.encode() in crossed]
    logged = repr(scene.events.events).lower()
    assert not [canary for canary in CANARIES if canary in logged]
    assert all(decode_task(t).body.kind != "write" for t in wires[0].down)


def test_a_tell_tale_of_the_same_scene_would_be_believed_without_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above is worth something: what it stops would have crossed."""
    monkeypatch.setattr("clients.gate.LeakGate.passes", lambda _self, _text: True)
    model, wires = TellTale(TALES["the text"]), list[Wire]()
    scene = bench(3, 20, fm=model, max_fm_calls=500, wrap=lambda inner: wires.append(Wire(inner)) or wires[0])

    scene.drive(FedTextGrad().run(scene.federation()), 500)

    crossed = b"".join(wires[0].up)
    assert [text for text in model.told if text.encode() in crossed]
