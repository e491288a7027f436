"""How the better part of a pool is found: by halving, within the calls it may make."""

from __future__ import annotations

from collections import Counter

import pytest

from promptfed.fm.scripted import ScriptedFM, hash_noise
from promptfed.prompts.grammar import Draft
from promptfed.prompts.template import PromptTemplate
from promptfed.strategies.base import Steps, singles
from promptfed.strategies.pool import N_SECOND, Pool, halve
from promptfed.strategies.session import N_FINALISTS, Session
from promptfed.types import LabelRequest
from tests.support import CHEERFUL, LABELS, Bench, bench

N_TEXTS, N_CLIENTS = 40, 3


def prompts(n: int) -> list[PromptTemplate]:
    return [PromptTemplate(text=f"{i} {{text}}", words=LABELS) for i in range(n)]


def by_number(best: int, step: float, asked: Counter[str] | None = None) -> ScriptedFM:
    """A prompt tells labels apart the better, the nearer its number is to ``best``; ``asked`` counts calls."""

    def rule(request: LabelRequest) -> list[float]:
        if asked is not None:
            asked[request.prefix] += 1
        strength = 4.0 - step * abs(int(request.prefix.split()[0]) - best)
        is_good = 1.0 if any(word in request.text.lower() for word in CHEERFUL) else -1.0
        return [0.0, strength * is_good + 2.0 * hash_noise(request.prefix, request.text)]

    return ScriptedFM("by_number", rule=rule)


def scene(best: int, step: float) -> Bench:
    return bench(N_CLIENTS, N_TEXTS, fm=by_number(best, step), max_fm_calls=10**6)


def halved(made: Bench, n: int, calls: int, n_final: int = 1) -> list[int]:
    def steps() -> Steps[list[PromptTemplate]]:
        return (yield from halve(Session(made.federation()), prompts(n), calls, n_final=n_final))

    return [int(p.text.split()[0]) for p in made.drive(steps(), 10**6)]


@pytest.mark.parametrize("best", [0, 7, 15])
def test_the_best_is_found_for_less_than_half_of_all_calls(best: int) -> None:
    made = scene(best, step=0.6)
    calls = 16 * N_CLIENTS * N_TEXTS * 2 // 5

    assert abs(halved(made, 16, calls)[0] - best) <= 1
    assert 0 < made.fm.n_calls <= calls


def test_the_last_ones_come_best_first_and_as_many_as_are_wanted() -> None:
    last = halved(scene(2, step=0.9), 8, 8 * N_CLIENTS * N_TEXTS, n_final=3)

    assert last[0] == 2
    assert sorted(last) == [1, 2, 3]


def test_those_without_hope_go_at_once() -> None:
    """One prompt is far ahead: what the others would have cost is not spent."""
    far, near = scene(0, step=3.0), scene(0, step=0.0)
    calls = 8 * N_CLIENTS * N_TEXTS // 2
    halved(far, 8, calls)
    halved(near, 8, calls)

    assert far.fm.n_calls < near.fm.n_calls


def test_with_calls_for_nothing_the_order_stays() -> None:
    made = scene(5, step=0.3)

    assert halved(made, 6, 10) == [0]
    assert made.fm.n_calls == 0


def test_a_prompt_that_is_alone_costs_no_more_than_the_calls_that_are_given() -> None:
    made = scene(0, step=0.3)

    assert halved(made, 1, 2 * N_CLIENTS) == [0]
    assert made.fm.n_calls <= 2 * N_CLIENTS


def test_it_ranks_as_scoring_all_of_them_does_when_calls_are_no_matter() -> None:
    made = scene(3, step=0.5)
    federation = made.federation()

    def steps() -> Steps[list[float]]:
        session = Session(federation)
        found = yield from session.score(prompts(6), singles(prompts(6)), N_TEXTS)
        return [standing.score for standing in found]

    scores = made.drive(steps(), 10**6)

    assert halved(scene(3, step=0.5), 6, 10**5)[0] == scores.index(max(scores))


# ---------------------------------------------------------------- finalists


def numbered(n: int) -> list[Draft]:
    return [Draft(instruction=str(i), fields=("Text", str(i)), exemplars=(), words=LABELS) for i in range(n)]


def finalists(made: Bench, drafts: list[Draft], calls: int) -> list[int]:
    def steps() -> Steps[list[Draft]]:
        pool = Pool(Session(made.federation()), 2)
        yield from pool.heat(drafts)
        return (yield from pool.finalists([], calls))

    return [int(draft.instruction) for draft in made.drive(steps(), 10**6)]


def test_where_one_prompt_is_wanted_the_bad_ones_are_not_scored_to_the_end() -> None:
    calls = N_SECOND * N_CLIENTS * 20
    alone, together = Counter[str](), Counter[str]()
    one, several = (
        finalists(bench(N_CLIENTS, N_TEXTS, fm=by_number(0, 0.4, asked), max_prompts=k), numbered(N_SECOND), calls)
        for k, asked in ((1, alone), (2, together))
    )

    assert one[0] in (0, 1)
    assert len(one) == len(several) == N_FINALISTS
    assert len(set(together.values())) == 1
    assert min(alone.values()) < min(together.values()) <= max(alone.values())
    assert alone.total() < together.total()
