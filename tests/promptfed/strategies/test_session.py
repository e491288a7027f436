"""The standard client tasks as steps: what is sent, what is granted, and what comes of the replies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from promptfed.errors import PromptfedError, RunError
from promptfed.messages import (
    Ask,
    Failed,
    MomentSums,
    Newton,
    NewtonPart,
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
from promptfed.prompts.calibration import Calibration, batch_calibration, fit, moments, sums
from promptfed.prompts.template import PromptTemplate
from promptfed.strategies.base import Federation, Reading, Round, Steps, singles
from promptfed.strategies.session import Session
from promptfed.types import FloatArray, IntArray, TextRequest
from tests.support import finish, flat_newton, replies, reply

P = tuple(PromptTemplate(text=f"{name} {{text}}", words=("bad", "good")) for name in "PQR")


def federation(max_fm_calls: int = 1000, **clients: int) -> Federation:
    return Federation(
        clients=clients or {"a": 10, "b": 4},
        labels=("negative", "positive"),
        words=("bad", "good"),
        instruction="",
        public=(),
        max_fm_calls=max_fm_calls,
        max_prompts=2,
        seed=7,
    )


def flat_moments(n: int, n_prompts: int) -> MomentSums:
    """Moments of n texts whose centred scores are (+1, -1) half of the time and (-1, +1) the other half."""
    return MomentSums(n=n, total=(0.0,) * 2 * n_prompts, squares=(2.0 * n,) * n_prompts)


def even_scores(round_: Round) -> Mapping[str, Reply]:
    """Clients for which every prompt is as good as any other."""
    bodies: dict[str, ReplyBody] = {}
    for client, body in round_.tasks.items():
        if isinstance(body, Ask):
            bodies[client] = flat_moments(4, len(body.prompts))
        elif isinstance(body, Score):
            zero = (0.0,) * len(body.sets) if body.differences else ()
            bodies[client] = Scored(n=4, total=(2.0,) * len(body.sets), diff=zero, diff_sq=zero)
    return replies(bodies)


# ---------------------------------------------------------------- randomness


def test_streams_are_repeatable_and_apart() -> None:
    f = federation()

    def draw(*stream: int, of: Federation = f) -> float:
        return float(of.rng(*stream).random())

    assert draw(1) == draw(1)
    assert len({draw(1), draw(2), draw(1, 2), draw(2, 1)}) == 4


# ---------------------------------------------------------------- write and weigh


def test_write_deals_requests_in_contiguous_runs_and_collects_them_in_order() -> None:
    requests = [TextRequest(prompt=f"p{i}", max_tokens=5) for i in range(5)]

    def answer(round_: Round) -> Mapping[str, Reply]:
        bodies: dict[str, ReplyBody] = {}
        for client, body in round_.tasks.items():
            assert isinstance(body, Write)
            bodies[client] = Written(texts=tuple(r.prompt.upper() for r in body.requests))
        return replies(bodies)

    session = Session(federation())
    (sent,), written = finish(session.write(requests), answer)

    assert written == ["P0", "P1", "P2", "P3", "P4"]
    assert dict(sent.grants) == {"a": 3, "b": 2}
    assert session.left == 995


def test_what_a_client_did_not_write_is_asked_of_the_others_once() -> None:
    requests = [TextRequest(prompt=f"p{i}", max_tokens=5) for i in range(5)]

    def answer(round_: Round) -> Mapping[str, Reply]:
        (task,) = [t for c, t in round_.tasks.items() if c == "a"]
        assert isinstance(task, Write)
        return replies({"a": Written(texts=tuple(r.prompt.upper() for r in task.requests))})

    session = Session(federation())
    (_, again), written = finish(session.write(requests), answer)

    assert dict(again.grants) == {"a": 2}
    assert written == ["P0", "P1", "P2", "P3", "P4"]
    assert session.left == 1000 - 5 - 2  # b's two are open


def test_what_nobody_wrote_is_empty() -> None:
    requests = [TextRequest(prompt=f"p{i}", max_tokens=5) for i in range(3)]

    _, written = finish(Session(federation()).write(requests), lambda _: replies({"a": Written(texts=("one", "two"))}))

    assert written == ["one", "two", ""]


def test_fewer_requests_than_clients_leave_some_clients_out() -> None:
    (sent,), written = finish(
        Session(federation()).write([TextRequest(prompt="p", max_tokens=5)]),
        lambda _: replies({"a": Written(texts=("x",))}),
    )

    assert set(sent.tasks) == {"a"}
    assert written == ["x"]


def test_weigh_puts_rows_where_their_opening_stands() -> None:
    def answer(round_: Round) -> Mapping[str, Reply]:
        bodies: dict[str, ReplyBody] = {}
        for client, body in round_.tasks.items():
            assert isinstance(body, Weigh)
            bodies[client] = Weighed(
                logprobs=tuple((-float(r.text), -0.5) for r in body.requests),
                n_tokens=tuple((1, int(r.text)) for r in body.requests),
            )
        return replies(bodies)

    (sent,), (got, n_tokens) = finish(Session(federation()).weigh(["1", "2", "3"], ["x", "y"]), answer)

    assert got.tolist() == [[-1.0, -0.5], [-2.0, -0.5], [-3.0, -0.5]]
    assert n_tokens.tolist() == [1, 3]  # the most that any client says
    assert dict(sent.grants) == {"a": 2, "b": 1}
    body = sent.tasks["a"]
    assert isinstance(body, Weigh)
    assert body.requests[0].labels == (" x", " y")


def test_an_opening_that_was_not_answered_is_uniform() -> None:
    _, (got, n_tokens) = finish(
        Session(federation()).weigh(["1", "2"], ["w", "x", "y", "z"]),
        lambda _: replies(
            {
                "a": Weighed(logprobs=((),), n_tokens=((),)),
                "b": Weighed(logprobs=((-1.0, -2.0, -3.0, -4.0),), n_tokens=((),)),
            }
        ),
    )

    assert got[0] == pytest.approx(np.full(4, -np.log(4)))
    assert got[1].tolist() == [-1.0, -2.0, -3.0, -4.0]
    assert n_tokens.tolist() == [1, 1, 1, 1]  # nobody said


def test_an_opening_asked_twice_is_answered_twice() -> None:
    _, (got, n_tokens) = finish(
        Session(federation(a=10)).weigh(["same", "same"], ["x", "y"]),
        lambda _: replies({"a": Weighed(logprobs=((-0.1, -2.4), (-0.1, -2.4)), n_tokens=((), (3, 1)))}),
    )

    assert got.tolist() == [[-0.1, -2.4], [-0.1, -2.4]]
    assert n_tokens.tolist() == [3, 1]


# ---------------------------------------------------------------- vote


def test_votes_are_averaged_over_clients() -> None:
    def votes(*shares: int) -> Votes:
        return Votes(n_labels=2, shares=bytes(shares))

    session = Session(federation())
    (sent,), got = finish(
        session.vote(["one", "two"]), lambda _: replies({"a": votes(255, 0, 51, 204), "b": votes(0, 255, 51, 204)})
    )

    assert got == pytest.approx(np.array([[0.5, 0.5], [0.2, 0.8]]))
    assert sent.tasks == {"a": Vote(texts=("one", "two")), "b": Vote(texts=("one", "two"))}
    assert session.left == 1000


def test_no_vote_at_all_is_a_run_error() -> None:
    with pytest.raises(RunError, match="voted"):
        finish(Session(federation()).vote(["one"]), lambda _: replies({"a": Failed(reason="ValueError")}))


# ---------------------------------------------------------------- ask and score: what is granted


def test_a_client_is_granted_no_more_calls_than_it_has_texts() -> None:
    session = Session(federation())

    assert session.cost(P[:2], 6) == 2 * 6 + 2 * 4
    rounds, _ = finish(session.score(P[:2], singles(P[:2]), 6), even_scores)

    assert dict(rounds[0].grants) == {"a": 12, "b": 8}
    assert session.left == 980


def test_texts_that_were_scored_are_not_paid_for_again() -> None:
    session = Session(federation())
    finish(session.score(P[:2], singles(P[:2]), 3), even_scores)

    rounds, _ = finish(session.score(P, singles(P), 5), even_scores)

    # P and Q: a has 3 of 5, b 3 of its 4; R: a 5, b 4.
    assert dict(rounds[0].grants) == {"a": 2 + 2 + 5, "b": 1 + 1 + 4}
    assert session.cost(P, 5) == 0
    assert session.left == 1000 - 12 - 15


def test_scoring_itself_is_free() -> None:
    rounds, _ = finish(Session(federation()).score(P[:1], singles(P[:1]), 3), even_scores)

    assert [r.name for r in rounds] == ["ask", "score"]
    assert sum(rounds[1].grants.values()) == 0


def test_a_client_that_missed_a_round_is_granted_the_calls_that_it_still_needs() -> None:
    session = Session(federation())
    finish(
        session.ask(P[:1], 3), lambda _: replies({"a": flat_moments(3, 1)})
    )  # b did not answer: it has scored nothing

    rounds, _ = finish(session.ask(P[:1], 4), even_scores)

    # With less than 4, b would have to refuse: its Budgeted model makes no call in part.
    assert rounds[0].grants["b"] == 4
    assert rounds[0].grants["a"] == 1


def test_a_client_that_missed_the_question_may_ask_it_with_the_sets_to_score_and_no_second_grant() -> None:
    session = Session(federation(max_fm_calls=8))

    rounds, _ = finish(
        session.score(P[:1], singles(P[:1]), 4),
        lambda r: replies({"a": flat_moments(4, 1)}) if r.name == "ask" else even_scores(r),
    )

    assert [dict(r.again) for r in rounds] == [{}, {"b": 4}]
    assert sum(rounds[1].grants.values()) == 0
    assert (session.left, session.cost(P[:1], 4)) == (0, 0)


def test_who_did_not_catch_up_in_full_is_granted_the_calls_that_it_still_needs() -> None:
    session = Session(federation())

    def answer(round_: Round) -> Mapping[str, Reply]:
        if round_.name == "ask":
            return replies({"a": flat_moments(4, 1)})
        zero = (0.0,)
        return replies({c: Scored(n=n, total=(n / 2,), diff=zero, diff_sq=zero) for c, n in (("a", 4), ("b", 1))})

    finish(session.score(P[:1], singles(P[:1]), 4), answer)

    assert session.cost(P[:1], 4) == 4


def test_what_was_granted_and_not_answered_stays_reserved() -> None:
    session = Session(federation())

    finish(session.ask(P[:1], 4), lambda _: replies({"a": flat_moments(4, 1)}))

    assert session.left == 1000 - 8


def test_what_a_client_turns_out_not_to_have_spent_may_be_granted_again() -> None:
    session = Session(federation())
    finish(session.ask(P[:1], 4), lambda _: replies({"a": flat_moments(4, 1)}))  # b's grant of 4 is open

    steps = session.ask(P[:1], None)
    next(steps)
    with pytest.raises(StopIteration):  # b answers a task that costs nothing, and says that it made one call meanwhile
        steps.send({"b": reply(flat_moments(1, 1), "b", fm_calls=1)})

    assert session.left == 1000 - 4 - 1


# ---------------------------------------------------------------- ask and score: what comes of the replies


def test_standings_by_hand() -> None:
    # Two sets over 4 + 6 texts: totals 3 + 5 = 8 and 2 + 5 = 7; differences sum to -1, their squares to 0.5.
    parts: dict[str, ReplyBody] = {
        "a": Scored(n=4, total=(3.0, 2.0), diff=(0.0, -1.0), diff_sq=(0.0, 0.3)),
        "b": Scored(n=6, total=(5.0, 5.0), diff=(0.0, 0.0), diff_sq=(0.0, 0.2)),
    }

    _, standings = finish(
        Session(federation()).score(P[:2], singles(P[:2]), 10),
        lambda r: even_scores(r) if r.name == "ask" else replies(parts),
    )

    first, second = standings
    assert (first.n, first.score, first.diff, first.diff_se) == (10, 0.8, 0.0, 0.0)
    assert (second.score, second.diff) == (pytest.approx(0.7), pytest.approx(-0.1))
    # mean square 0.05, minus 0.1 squared = 0.04; the mean of 10 texts has variance 0.004
    assert second.diff_se == pytest.approx(0.004**0.5)


def test_a_pooled_calibration_goes_with_each_prompt() -> None:
    # a: scores (+1, -1) on each of 4 texts; b: (0, 0) on 4 texts. Mean (1/2, -1/2), mean square 1/2, variance 1/4.
    asked: dict[str, ReplyBody] = {
        "a": MomentSums(n=4, total=(4.0, -4.0), squares=(8.0,)),
        "b": MomentSums(n=4, total=(0.0, 0.0), squares=(0.0,)),
    }

    rounds, _ = finish(
        Session(federation()).score(P[:1], singles(P[:1]), 4),
        lambda r: replies(asked) if r.name == "ask" else even_scores(r),
    )

    body = rounds[1].tasks["a"]
    assert isinstance(body, Score)
    assert body.weights == pytest.approx((1.5 / 0.5,))
    assert body.bias == pytest.approx((-1.5, 1.5))
    assert (body.prompts, body.sets, body.stop) == (P[:1], ((0,),), 4)


def test_no_scored_text_is_a_run_error() -> None:
    with pytest.raises(RunError, match="text"):
        finish(Session(federation()).ask(P[:1], 3), lambda _: replies({"a": flat_moments(0, 1)}))


def test_a_reply_to_another_question_is_left_out() -> None:
    _, (n, _, _) = finish(
        Session(federation()).ask(P[:1], 3), lambda _: replies({"a": flat_moments(3, 1), "b": Written(texts=())})
    )

    assert n == 3


@pytest.mark.parametrize(
    "short", [MomentSums(n=3, total=(0.0,), squares=(1.0,)), MomentSums(n=3, total=(0.0,) * 6, squares=(1.0,) * 3)]
)
def test_a_reply_of_the_wrong_size_never_ends_the_run_with_a_bare_error(short: MomentSums) -> None:
    """One client must not be able to stop everybody: left out, or an error of ours that says so."""
    try:
        _, (n, _, _) = finish(
            Session(federation()).ask(P[:1], 3), lambda _: replies({"a": flat_moments(3, 1), "b": short})
        )
    except PromptfedError:
        return
    assert n == 3


# ---------------------------------------------------------------- calibrate


def some_scores(n: int, seed: int) -> tuple[FloatArray, IntArray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=n)
    raw = rng.normal(size=(n, 2, 2)) + np.eye(2)[labels][:, None]
    return raw - np.logaddexp.reduce(raw, axis=2, keepdims=True), labels


def test_federated_calibration_equals_the_fit_on_all_texts() -> None:
    data = {"a": some_scores(10, 1), "b": some_scores(4, 2)}

    def answer(round_: Round) -> Mapping[str, Reply]:
        bodies: dict[str, ReplyBody] = {}
        for client, body in round_.tasks.items():
            scores, labels = data[client]
            if isinstance(body, Ask):
                total, squares = moments(scores)
                bodies[client] = MomentSums(n=len(scores), total=tuple(total.ravel()), squares=tuple(squares))
            elif isinstance(body, Newton):
                part = sums(scores, labels, Calibration(weights=body.weights, bias=body.bias))
                bodies[client] = NewtonPart.of(part)
        return replies(bodies)

    rounds, prompt = finish(Session(federation()).calibrate(P[:2], 10, steps=4), answer)

    everything = np.concatenate([data["a"][0], data["b"][0]])
    labels = np.concatenate([data["a"][1], data["b"][1]])
    central = fit(everything, labels, towards=batch_calibration(everything), strength=4.0, steps=4)
    assert prompt.weights == pytest.approx(central.weights)
    assert prompt.bias == pytest.approx(central.bias)
    assert prompt.prompts == P[:2]
    assert prompt.labels == ("negative", "positive")
    assert [r.name for r in rounds] == ["ask"] + ["newton"] * 4
    assert sum(sum(r.grants.values()) for r in rounds[1:]) == 0


def test_weights_of_words_are_learned_over_all_clients() -> None:
    """Label words "bad", "poor" | "good": three sources; the fit on all texts in one place is the same."""
    prompt = PromptTemplate(text="{text}", words=("bad", "good"), synonyms=(("poor",), ()))
    rng = np.random.default_rng(3)
    data = {}
    for client, n in (("a", 12), ("b", 6)):
        labels = np.arange(n) % 2
        words = rng.normal(size=(n, 3))
        words[:, 0] += np.where(labels == 0, 2.0, -2.0)  # "bad" tells, "poor" does not
        data[client] = (words, labels)

    def answer(round_: Round) -> Mapping[str, Reply]:
        bodies: dict[str, ReplyBody] = {}
        for client, body in round_.tasks.items():
            words, labels = data[client]
            if isinstance(body, Ask):
                total, squares = moments(prompt.merged(words)[:, None])
                bodies[client] = MomentSums(n=len(words), total=tuple(total.ravel()), squares=tuple(squares))
            elif isinstance(body, Newton):
                assert body.words
                at = Calibration(weights=body.weights, bias=body.bias)
                part = sums(prompt.word_sources(words), labels, at)
                bodies[client] = NewtonPart.of(part)
        return replies(bodies)

    rounds, (learned,) = finish(Session(federation(max_fm_calls=0)).verbalize([prompt], steps=3), answer)

    words, labels = (np.concatenate([data["a"][i], data["b"][i]]) for i in (0, 1))
    pooled = batch_calibration(prompt.merged(words)[:, None])
    w = pooled.weights[0]
    start = Calibration(weights=(w / 2, w / 2, w), bias=pooled.bias)
    central = fit(prompt.word_sources(words), labels, towards=start, strength=2.0, steps=3)
    assert learned.readout == pytest.approx(central.weights, rel=1e-4)  # the wire has 16 bits of curvature
    assert learned.readout[0] > 2 * learned.readout[1]
    assert (learned.text, learned.words) == (prompt.text, prompt.words)
    assert [r.name for r in rounds] == ["ask", "words", "words", "words"]


def test_calibration_without_stop_costs_nothing() -> None:
    session = Session(federation(max_fm_calls=0))

    def answer(round_: Round) -> Mapping[str, Reply]:
        if round_.name == "ask":
            return replies({"a": flat_moments(5, 1)})
        part = flat_newton(5, 3)
        return replies({"a": part})

    rounds, prompt = finish(session.calibrate(P[:1]), answer)

    assert session.left == 0
    assert all(sum(r.grants.values()) == 0 for r in rounds)
    # No pull from the labels: the prior stays, weight 1.5 / sd with sd 1 and no lean.
    assert prompt.weights == pytest.approx((1.5,))
    assert prompt.bias == pytest.approx((0.0, 0.0))


# ---------------------------------------------------------------- anytime


def fitted_scores(round_: Round) -> Mapping[str, Reply]:
    """As `even_scores`, and a calibration that stays where it starts."""
    bodies: dict[str, ReplyBody] = {c: r.body for c, r in even_scores(round_).items()}
    for client, body in round_.tasks.items():
        if isinstance(body, Newton):
            size = len(body.weights) + len(body.bias)
            bodies[client] = flat_newton(4, size)
    return replies(bodies)


def a_search(
    readings: list[Reading], cost: int = 30, max_fm_calls: int = 100, milestones: tuple[int, ...] = ()
) -> Steps[PromptSet]:
    """A method that scores one more prompt a round, on as many texts as ``cost`` calls pay for."""

    def run(given: Federation) -> Steps[PromptSet]:
        session, best = Session(given), [P[0]]
        while (yield from session.affords(cost, best)):
            prompt = PromptTemplate(text=f"{session.spent} {{text}}", words=("bad", "good"))
            yield from session.score([prompt], [(0,)], cost // len(given.clients))
            best = [prompt, *best]
        return (yield from session.conclude(best))

    return run(replace(federation(max_fm_calls, a=100, b=100), milestones=milestones, read=readings.append))


def test_a_search_stops_where_the_rest_is_held_back_and_is_read_there() -> None:
    readings: list[Reading] = []

    rounds, prompt = finish(a_search(readings, max_fm_calls=100), fitted_scores)

    granted = [n for r in rounds if (n := sum(r.grants.values()))]
    # A third round of 30 would pass 60. What is left takes the new prompt to text 16 and both others there from 15.
    assert granted == [30, 30, 2 * (16 + 1 + 1)]
    assert [(r.milestone, r.prompt) for r in readings] == [(100, prompt)]
    assert readings[0].fm_calls == 96


def test_milestones_are_read_on_the_way_each_within_its_calls() -> None:
    readings: list[Reading] = []

    _, prompt = finish(a_search(readings, max_fm_calls=400, milestones=(100, 200)), fitted_scores)

    assert [r.milestone for r in readings] == [100, 200, 400]
    assert all(r.fm_calls <= r.milestone for r in readings)
    assert readings[-1].prompt == prompt


def test_a_milestone_that_one_round_would_skip_is_read_with_what_there_is() -> None:
    readings: list[Reading] = []

    finish(a_search(readings, cost=150, max_fm_calls=400, milestones=(50, 100)), fitted_scores)

    assert [r.milestone for r in readings] == [50, 100, 400]
    assert [p.text for p in readings[0].prompt.prompts] == [P[0].text]


def test_a_reading_is_calibrated_on_texts_that_all_its_prompts_were_scored_on() -> None:
    readings: list[Reading] = []

    rounds, _ = finish(a_search(readings, max_fm_calls=100), fitted_scores)

    newton = [r for r in rounds if r.name == "newton"]
    assert {body.stop for r in newton for body in r.tasks.values() if isinstance(body, Newton)} == {readings[0].stop}


def test_the_set_is_chosen_by_its_score_less_its_penalty() -> None:
    def answer(round_: Round) -> Mapping[str, Reply]:
        bodies: dict[str, ReplyBody] = {}
        for client, body in round_.tasks.items():
            if isinstance(body, Score):
                totals = tuple({(0, 1): 3.6, (0, 2): 3.5, (1, 2): 3.4}.get(s, 1.0) for s in body.sets)
                bodies[client] = Scored(n=4, total=totals, diff=(), diff_sq=())
            elif isinstance(body, Ask):
                bodies[client] = flat_moments(4, len(body.prompts))
        return replies(bodies)

    session = Session(federation(a=4))
    _, plain = finish(session.rank_sets(P, 4), answer)
    _, apart = finish(session.rank_sets(P, 4, lambda s: 0.1 if s == (0, 1) else 0.0), answer)

    assert [set(s) for s in plain] == [{0, 1}, {0, 2}, {1, 2}]
    assert set(apart[0]) == {0, 2}


# ---------------------------------------------------------------- prompts dealt to single clients


def test_clients_score_prompts_of_their_own_under_a_calibration_of_all_that_had_them() -> None:
    """Client a has had P on its texts [0, 2) when b gets it on [0, 4): b calibrates on the moments of six texts."""
    session = Session(federation())
    moments_of = {"a": MomentSums(n=2, total=(2.0, -2.0), squares=(4.0,))}
    moments_of["b"] = MomentSums(n=4, total=(-4.0, 4.0), squares=(8.0,))

    def answer(round_: Round) -> Mapping[str, Reply]:
        n = {c: body.stop for c, body in round_.tasks.items() if isinstance(body, Ask | Score)}
        scored = {c: Scored(n=k or 0, total=(1.5,), diff=(0.0,), diff_sq=(0.0,)) for c, k in n.items()}
        return replies({c: moments_of[c] if round_.name == "ask" else scored[c] for c in round_.tasks})

    first, of_a = finish(session.score_each({"a": ([P[0]], 2)}), answer)
    second, of_b = finish(session.score_each({"b": ([P[0]], 4)}), answer)

    assert of_a["a"].total == of_b["b"].total == (1.5,)
    assert [dict(r.grants) for r in (*first, *second)] == [{"a": 2}, {}, {"b": 4}, {}]
    body = second[1].tasks["b"]
    assert isinstance(body, Score)
    # All six texts have squares of 1; their mean is (2 - 4) / 6, so the variance is 1 - 1/9, and bias = -weight * mean.
    weight = 1.5 / np.sqrt(8 / 9)
    np.testing.assert_allclose(body.weights, [weight])
    np.testing.assert_allclose(body.bias, [weight / 3, -weight / 3])
    assert session.spent == 6
    assert session.cost([P[0]], 4, ["a", "b"]) == 2


def test_who_does_not_answer_for_all_the_texts_is_missing() -> None:
    session = Session(federation())

    def answer(round_: Round) -> Mapping[str, Reply]:
        if round_.name == "ask":
            return replies({"a": flat_moments(3, 1), "b": Failed(reason="Lost")})
        return replies({"a": Scored(n=2, total=(1.0,), diff=(0.0,), diff_sq=(0.0,))})

    rounds, scored = finish(session.score_each({"a": ([P[0]], 3), "b": ([P[1]], 3)}), answer)

    assert scored == {}
    assert list(rounds[1].tasks) == ["a"]
