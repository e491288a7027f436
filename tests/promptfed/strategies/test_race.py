"""``race``: within its budget, repeatable, and better than what it starts from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptfed.errors import ConfigError
from promptfed.messages import (
    Ask,
    MomentSums,
    Newton,
    Reply,
    ReplyBody,
    Score,
    Scored,
    Vote,
    Votes,
    Weigh,
    Weighed,
    Write,
    Written,
)
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.grammar import FIELDS, Draft, Materials, draft_like
from promptfed.prompts.template import PromptTemplate
from promptfed.strategies.base import Federation, Round
from promptfed.strategies.pool import distinct
from promptfed.strategies.proposal import clean_texts
from promptfed.strategies.race import ENOUGH_TEXTS, Race, fresh, spare_calls
from promptfed.strategies.session import Session
from tests.contracts.method import MethodContract
from tests.support import (
    CHEERFUL,
    GLOOMY,
    LABELS,
    bench,
    finish,
    flat_newton,
    pooled_accuracy,
    public_texts,
    replies,
)


def a_federation(n_clients: int, max_fm_calls: int, n_texts: int = 500, **changes: Any) -> Federation:
    values: dict[str, Any] = {
        "clients": {f"c{i:03d}": n_texts for i in range(n_clients)},
        "labels": LABELS,
        "words": LABELS,
        "instruction": "Negative or positive?",
        "public": public_texts(),
        "max_fm_calls": max_fm_calls,
        "max_prompts": 2,
        "seed": 3,
        **changes,
    }
    return Federation(**values)


def fake_clients(n_texts: int = 500) -> Any:
    """Clients that answer from a hash of what they were asked: no data and no model, but the right shapes."""

    def share(*parts: object) -> float:
        return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:8], 16) / 2**32

    def body_for(client: str, body: Any) -> ReplyBody:
        if isinstance(body, Write):
            return Written(texts=tuple(f"It seems {CHEERFUL[r.seed % 6]}." for r in body.requests))
        if isinstance(body, Weigh):
            n = len(body.requests)
            return Weighed(logprobs=tuple((-1.0,) * len(r.labels) for r in body.requests), n_tokens=((),) * n)
        if isinstance(body, Vote):
            cheerful = [any(w in t.lower() for w in CHEERFUL) for t in body.texts]
            gloomy = [any(w in t.lower() for w in GLOOMY) for t in body.texts]
            good = [128 + 100 * c - 100 * g for c, g in zip(cheerful, gloomy, strict=True)]
            return Votes(n_labels=2, shares=bytes(b for g in good for b in (255 - g, g)))
        if isinstance(body, Ask):
            n = min(body.stop or n_texts, n_texts)
            return MomentSums(n=n, total=(0.0,) * 2 * len(body.prompts), squares=(2.0 * n,) * len(body.prompts))
        if isinstance(body, Score):
            n = min(body.stop, n_texts)
            total = [n * share(*(body.prompts[i].prompt_id for i in s)) for s in body.sets]
            diff = [t - total[0] for t in total] if body.differences else []
            return Scored(n=n, total=tuple(total), diff=tuple(diff), diff_sq=tuple(abs(d) for d in diff))
        assert isinstance(body, Newton)
        size = len(body.weights) + len(body.bias)
        return flat_newton(5, size)

    def answer(round_: Round) -> Mapping[str, Reply]:
        return replies({client: body_for(client, body) for client, body in round_.tasks.items()})

    return answer


def granted(rounds: list[Round]) -> int:
    return sum(sum(r.grants.values()) for r in rounds)


class TestContract(MethodContract):
    def method(self) -> Race:
        return Race()


# ---------------------------------------------------------------- budget


@given(n_clients=st.integers(1, 60), max_fm_calls=st.integers(1, 6000), n_texts=st.sampled_from([1, 8, 60, 500]))
@settings(deadline=None, max_examples=40)
def test_grants_never_pass_the_budget(n_clients: int, max_fm_calls: int, n_texts: int) -> None:
    federation = a_federation(n_clients, max_fm_calls, n_texts)

    try:
        rounds, prompt = finish(Race().run(federation), fake_clients(n_texts))
    except ConfigError:  # refused up front: see the tests below
        return

    assert granted(rounds) <= max_fm_calls
    assert 1 <= len(prompt.prompts) <= federation.max_prompts


@pytest.mark.parametrize("n_clients", [1, 2, 3, 5, 7, 10, 15, 25, 30, 60, 100])
def test_the_budget_that_a_refusal_asks_for_is_enough(n_clients: int) -> None:
    with pytest.raises(ConfigError, match="at least") as refused:
        finish(Race().run(a_federation(n_clients, 10)), fake_clients())
    needed = int(re.findall(r"at least (\d+)", str(refused.value))[0])

    rounds, _ = finish(Race().run(a_federation(n_clients, needed)), fake_clients())

    assert granted(rounds) <= needed


def test_a_budget_below_what_a_refusal_asks_for_is_refused_before_any_round() -> None:
    with pytest.raises(ConfigError, match=r"max_fm_calls = 50 .* 5 clients"):
        next(Race().run(a_federation(5, 50)))


@given(n_clients=st.integers(1, 4), max_fm_calls=st.integers(300, 700), n_train=st.integers(1, 25))
@settings(deadline=None, max_examples=8)
def test_real_clients_never_make_more_calls_than_the_budget(n_clients: int, max_fm_calls: int, n_train: int) -> None:
    scene = bench(n_clients, n_train, max_prompts=1, max_fm_calls=max_fm_calls)

    prompt = scene.drive(Race().run(scene.federation()), max_fm_calls)

    assert scene.fm.n_calls <= max_fm_calls
    assert scene.ledger.total("tuning").fm_calls == scene.fm.n_calls
    assert len(prompt.prompts) == 1
    assert not any(e["failures"] for e in scene.events.events if e["kind"] == "round")


def test_the_budget_is_used_and_not_left_lying() -> None:
    rounds, _ = finish(Race().run(a_federation(5, 2500)), fake_clients())

    assert 0.97 * 2500 <= granted(rounds) <= 2500


# ---------------------------------------------------------------- determinism


def tuned(seed: int) -> PromptSet:
    scene = bench(2, 16)
    return scene.drive(Race().run(scene.federation(seed=seed, max_fm_calls=400)), 400)


def test_the_same_seed_gives_the_same_prompt_and_another_seed_another() -> None:
    first, second, other = tuned(1), tuned(1), tuned(2)

    assert first.prompt_id == second.prompt_id
    assert first == second
    assert other.prompt_id != first.prompt_id


def test_a_method_is_a_pure_function_of_the_replies() -> None:
    """Nothing but the replies moves it: fed the same ones, it sends the same tasks again."""
    first, prompt = finish(Race().run(a_federation(3, 900)), fake_clients())
    again, same = finish(Race().run(a_federation(3, 900)), fake_clients())

    assert [(r.name, r.tasks, r.grants) for r in first] == [(r.name, r.tasks, r.grants) for r in again]
    assert prompt == same


# ---------------------------------------------------------------- quality


def test_the_tuned_prompt_beats_the_first_draft() -> None:
    """Planted: exemplars with the two words of a label, of which a prompt shows one; the bare instruction none."""
    first = PromptSet(
        labels=LABELS,
        prompts=(PromptTemplate(text="Is the review negative or positive?\n\nText: {text}\nLabel:", words=LABELS),),
        weights=(1.0,),
        bias=(0.0, 0.0),
    )
    tuned = list[PromptSet]()
    for seed in range(1, 5):
        scene = bench(3, 30, n_words=2)
        federation = scene.federation(max_fm_calls=900, seed=seed, public=public_texts(n_words=2))
        tuned.append(scene.drive(Race().run(federation), 900))

    assert pooled_accuracy(first, 100, seed=77) < 0.6
    assert np.mean([pooled_accuracy(prompt, 100, seed=77) for prompt in tuned]) > 0.85


def test_the_log_tells_a_rising_best_score_and_rising_calls() -> None:
    scene = bench(3, 40)

    scene.drive(Race().run(scene.federation(max_fm_calls=900)), 900)

    heats = [e for e in scene.events.events if e["kind"] == "heat"]
    assert len(heats) >= 3
    assert all(0.0 <= h["best_score"] <= 1.0 for h in heats)
    calls = [h["fm_calls"] for h in heats]
    assert calls == sorted(calls)
    assert calls[-1] <= 900
    # On the texts of the first heats, more candidates can only raise the best score.
    same_texts = [h["best_score"] for h in heats if h["n_texts"] == heats[0]["n_texts"]]
    assert same_texts == sorted(same_texts)


# ---------------------------------------------------------------- parts


def test_the_first_draft_is_the_persons_instruction_alone() -> None:
    rounds, _ = finish(Race().run(a_federation(3, 900)), fake_clients())
    first_ask = next(r for r in rounds if r.name == "ask")
    body = first_ask.tasks["c000"]

    assert isinstance(body, Ask)
    assert body.prompts[0].text == "Negative or positive?\n\nText: {text}\nLabel:"
    assert body.prompts[0].words == LABELS
    assert len({p.prompt_id for p in body.prompts}) == len(body.prompts)


def test_it_works_without_public_text_and_without_an_instruction() -> None:
    rounds, prompt = finish(Race().run(a_federation(2, 800, public=(), instruction="")), fake_clients())

    assert granted(rounds) <= 800
    assert all(p.text.count("{text}") == 1 for p in prompt.prompts)


def test_a_model_that_writes_nothing_leaves_a_usable_prompt() -> None:
    answer = fake_clients()

    def mute(round_: Round) -> Mapping[str, Reply]:
        if round_.name == "write":
            return replies({c: Written(texts=("",) * round_.grants[c]) for c in round_.tasks})
        return dict(answer(round_))

    rounds, prompt = finish(Race().run(a_federation(2, 800, public=())), mute)

    assert granted(rounds) <= 800
    assert prompt.prompts


def test_clean_texts_by_hand() -> None:
    written = [
        ' "A fine day."',
        "A fine day.",  # the same, once quotes are off
        "no full stop",
        "This is positive.",  # names a label
        "One word more than six words are.",
        "Two lines\nof text.",
        "Why {text}?",
        "Well done!",
        "",
    ]

    assert clean_texts(written, LABELS) == ["A fine day.", "Well done!"]


def test_distinct_keeps_the_first_of_equals() -> None:
    materials = Materials(instructions=("",), fields=FIELDS[:1], exemplars=((), ()), words=LABELS, other_words=((), ()))
    drafts = [draft_like(i, materials, np.random.default_rng(i)) for i in range(4)]

    assert len(distinct(drafts)) == 1


# ---------------------------------------------------------------- with and without exemplars

MATERIALS = Materials(
    instructions=("Negative or positive?", "Sad or not?", "Which is it?"),
    fields=FIELDS,
    exemplars=(("So sad.", "It was awful."), ("What fun.", "It was lovely.")),
    words=LABELS,
    other_words=(("bad",), ("good",)),
)


class Leaders:
    """A pool whose best are ``n_bare`` drafts without exemplars and the rest with."""

    def __init__(self, n_bare: int, n: int = 4) -> None:
        shown = (("So sad.", 0), ("What fun.", 1))
        self.drafts = [
            Draft(instruction="", fields=("Text", str(i)), exemplars=() if i < n_bare else shown, words=LABELS)
            for i in range(n)
        ]

    def __len__(self) -> int:
        return len(self.drafts)

    def __contains__(self, draft: Draft) -> bool:
        return draft in self.drafts

    def best(self, n: int) -> list[Draft]:
        return self.drafts[:n]


def drawn(leaders: Leaders, n: int = 60, seed: int = 5) -> list[Draft]:
    return fresh(leaders, MATERIALS, np.random.default_rng(seed), n)  # type: ignore[arg-type]


def share_of_bare(leaders: Leaders) -> float:
    """Of ten drafts (there are not many without exemplars), on average over 40 seeds."""
    return float(np.mean([not d.exemplars for seed in range(40) for d in drawn(leaders, 10, seed)]))


def test_the_first_draft_of_all_is_the_instruction_alone_and_a_third_of_the_others_are_without_exemplars() -> None:
    alone = draft_like(0, MATERIALS, np.random.default_rng(5))

    assert drawn(Leaders(0, n=0))[0] == replace(alone, readout=MATERIALS.readout())
    assert share_of_bare(Leaders(0, n=0)) == pytest.approx(1 / 3, abs=0.1)


@pytest.mark.parametrize("n_bare", [0, 2, 4])
def test_later_drafts_are_without_exemplars_as_often_as_the_leaders_are_but_never_all_or_none(n_bare: int) -> None:
    assert share_of_bare(Leaders(n_bare)) == pytest.approx(np.clip(n_bare / 4, 0.25, 0.75), abs=0.1)


def test_no_two_drafts_read_alike_and_all_are_read_off_every_word() -> None:
    drafts = drawn(Leaders(2))

    assert len({(d.instruction, d.fields, d.exemplars, d.words) for d in drafts}) == len(drafts)
    assert {d.readout for d in drafts} == {(("negative", "bad"), ("positive", "good"))}
    assert all(d.words == LABELS for d in drafts if not d.exemplars)
    assert {d.words for d in drafts if d.exemplars} > {LABELS}
    # All that there are, and no endless search for more: 6 pairs of fields with 3 instructions.
    assert len([d for d in drawn(Leaders(4), 200) if not d.exemplars]) <= 18


# ---------------------------------------------------------------- later milestones


def standing_of(n_clients: int, n_texts: int, budget: int, asked: int) -> tuple[Session, list[PromptTemplate]]:
    """A session in which four finalists have been asked about the first ``asked`` texts of every client."""
    session = Session(a_federation(n_clients, budget, n_texts))
    finalists = [PromptTemplate(text=f"{i}\n\nText: {{text}}\nLabel:", words=LABELS) for i in range(4)]
    session._note_scored(finalists, asked, list(session.federation.clients))
    return session, finalists


@pytest.mark.parametrize(
    ("n_texts", "budget", "asked", "spare"),
    [
        (120, 500, 10, 0),  # they are still to be asked about 30 texts a client: 4 x 5 x 30 = 600
        (120, 1500, 30, 650),  # 4 x 5 x 10 = 200 first, then half of 1,300
        (120, 1500, 40, 750),
        (120, 2500, 100, 2100),  # they can use no more than 4 x 5 x 20 = 400
        (30, 500, 30, 500),
    ],
)
def test_the_search_gets_half_of_what_finalists_do_not_need_and_all_that_they_cannot_use(
    n_texts: int, budget: int, asked: int, spare: int
) -> None:
    assert ENOUGH_TEXTS == 5 * 40

    assert spare_calls(*standing_of(5, n_texts, budget, asked)) == spare


def test_a_short_way_to_the_next_milestone_goes_into_the_finalists_alone() -> None:
    rounds, _ = finish(Race().run(a_federation(5, 1000, 120, milestones=(500,))), fake_clients(120))

    asked = [r.tasks["c000"] for r in rounds if r.name == "ask" and any(r.grants.values())]
    last = asked[-1]
    assert isinstance(last, Ask)
    assert len(last.prompts) == 4
    assert last.stop is not None
    assert last.stop >= 30
    assert 0.97 * 1000 <= granted(rounds) <= 1000


def test_a_long_way_to_the_next_milestone_is_searched_and_used_up_where_the_finalists_have_all_texts() -> None:
    rounds, _ = finish(Race().run(a_federation(5, 5000, 60, milestones=(500, 1000, 2500))), fake_clients(60))

    prompts = {p.prompt_id for r in rounds if r.name == "ask" for p in r.tasks["c000"].prompts}  # type: ignore[union-attr]
    assert len(prompts) > 60
    assert 0.8 * 5000 <= granted(rounds) <= 5000


def test_without_votes_the_fm_alone_says_what_stands_for_a_label() -> None:
    scene = bench(n_words=2)

    prompt = scene.drive(Race(domain_votes=False).run(scene.federation(max_fm_calls=600)), 600)

    rounds = [event["name"] for event in scene.events.events if event["kind"] == "round"]
    assert "vote" not in rounds
    assert "weigh" in rounds
    assert len(prompt.prompts) == 2
