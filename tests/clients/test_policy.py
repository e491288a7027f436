"""A client's steps of policy gradient: what is known of a censored loss, what a task asks and leaves, what crosses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.client import Client
from clients.policy import calibrated_logits, clipped, known_advantages, loss_bounds
from promptfed.fm.base import BaseFM
from promptfed.fm.scripted import ScriptedFM
from promptfed.messages import Failed, Reply, Task, decode_reply, encode
from promptfed.messages.methods import CountNgrams, NgramCounts, Policy, PolicyStep, packed, unpacked
from promptfed.prompts.ngrams import ngrams_of
from promptfed.prompts.template import PromptTemplate
from promptfed.types import Capability, FMRequest, FMResponse, LabelRequest
from tests.support import LABELS, CountingFM, FailingFM, WordEncoder, client_data, wait_for

TEMPLATE = PromptTemplate(text="Text: {text}\nLabel:", words=LABELS)
STEP = PolicyStep(
    template=TEMPLATE,
    weight=1.0,
    vocabulary=("good", "bad", "so far"),
    n_slots=2,
    logits=packed(np.zeros((2, 3))),
    n_samples=4,
    n_texts=5,
    n_steps=2,
    learning_rate=10.0,
    max_step=3.0,
    estimator="reinforce",
    temperature=1.0,
    entropy_floor=0.2,
    seed=7,
)


def helped_by_good(request: LabelRequest) -> list[float]:
    """Right, and surer the more of the slots say "good"; the true label shows in the text as `sentences` has it."""
    cheerful = any(w in request.text for w in ("wonderful", "superb", "lovely", "brilliant", "charming", "splendid"))
    margin = request.prefix.split("\n\n")[0].split().count("good") - 0.5
    return [-margin, margin] if cheerful else [margin, -margin]


def a_client(fm: BaseFM) -> Client:
    return Client(client_data("a"), LABELS, fm, WordEncoder(), seed=1)


def sent(client: Client, body: Any, grant: int = 1000) -> tuple[Reply, bytes]:
    task = Task(round=1, client_id="a", run="run", fleet="tuning", grant=grant, limit=grant, body=body)
    data = wait_for(client.handle(encode(task)))
    return decode_reply(data), data


# ---------------------------------------------------------------- what is known of a loss


def test_an_exact_loss_is_the_cross_entropy() -> None:
    low, high = loss_bounds(np.log([[0.2, 0.8]]), np.zeros((1, 2), dtype=bool), np.array([1]))

    assert low[0] == high[0] == pytest.approx(-np.log(0.8))


def test_bounds_of_a_censored_loss_by_hand() -> None:
    """Three labels at .5, .3 and .2; the true one is the second."""
    logits, labels = np.log([[0.5, 0.3, 0.2]] * 4), np.array([1] * 4)
    censored = np.array([[False, False, True], [False, True, False], [True, True, True], [True, False, True]])

    low, high = loss_bounds(logits, censored, labels)

    # .3/.8 at best, .3 at worst; .3 of all at best, 0 at worst; all of it at best, 0 at worst; sure at best.
    np.testing.assert_allclose(low, [-np.log(0.3 / 0.8), -np.log(0.3), 0.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(high, [-np.log(0.3), np.inf, np.inf, -np.log(0.3)])


@given(
    raw=st.lists(st.floats(-8, 0), min_size=3, max_size=3),
    cut=st.lists(st.floats(0, 8), min_size=3, max_size=3),
    censored=st.lists(st.booleans(), min_size=3, max_size=3),
    label=st.integers(0, 2),
)
@settings(deadline=None)
def test_the_true_loss_lies_within_its_bounds(
    raw: list[float], cut: list[float], censored: list[bool], label: int
) -> None:
    """Whatever a censored label's log-probability is, as long as it is at most the one given."""
    low, high = loss_bounds(np.array([raw]), np.array([censored]), np.array([label]))

    true = np.array(raw) - np.where(censored, cut, 0.0)
    loss = np.logaddexp.reduce(true) - true[label]
    assert low[0] - 1e-9 <= loss <= high[0] + 1e-9


def test_advantages_by_hand() -> None:
    """Losses 1, 2 and 6: each less the mean of the other two."""
    losses = np.array([[1.0], [2.0], [6.0]])

    np.testing.assert_allclose(known_advantages(losses, losses), [1 - 4, 2 - 3.5, 6 - 1.5])


def test_of_a_censored_difference_only_what_is_certain_counts() -> None:
    """One draw at 1, one that is 3 at least, one of which nothing is known."""
    low, high = np.array([[1.0], [3.0], [0.0]]), np.array([[1.0], [np.inf], [np.inf]])

    # The second is 2 worse than the first at least; the third differs from neither for certain.
    np.testing.assert_allclose(known_advantages(low, high), [-1.0, 1.0, 0.0])


@given(
    low=st.lists(st.floats(0, 50), min_size=2, max_size=5), width=st.lists(st.floats(0, np.inf), min_size=5, max_size=5)
)
@settings(deadline=None)
def test_advantages_are_finite_and_sum_to_nothing(low: list[float], width: list[float]) -> None:
    bounds = np.array(low)[:, None]

    advantages = known_advantages(bounds, bounds + np.array(width[: len(low)])[:, None])

    assert np.isfinite(advantages).all()
    assert advantages.sum() == pytest.approx(0.0, abs=1e-9)


def test_one_draw_alone_says_nothing() -> None:
    assert known_advantages(np.array([[2.0]]), np.array([[2.0]])) == 0.0


def test_a_step_is_clipped_to_its_norm() -> None:
    np.testing.assert_allclose(clipped(np.array([[3.0, 4.0]]), 3.0), [[1.8, 2.4]])
    np.testing.assert_allclose(clipped(np.array([[0.3, 0.4]]), 3.0), [[0.3, 0.4]])


# ---------------------------------------------------------------- a step


def answers_of(*scores: tuple[float, float], censored: int | None = None) -> list[FMResponse]:
    """Answers with these label scores; text number ``censored`` has its second label censored."""
    return [
        FMResponse(logprobs=pair, censored=(False, True) if i == censored else None) for i, pair in enumerate(scores)
    ]


def test_a_prompts_own_label_bias_is_taken_off_by_hand() -> None:
    """Two texts of label 0 with margins 3 and 5, one of label 1 with 2: the midpoint of 4 and 2 becomes 0."""
    logits, _ = calibrated_logits(
        TEMPLATE, answers_of((3, 0), (5, 0), (2, 0)), np.array([0, 0, 1]), 2.0, np.array([0.5, -0.5])
    )

    # Half the margin to each label, times the weight, and half of the prior's margin.
    np.testing.assert_allclose(logits[:, 0] - logits[:, 1], [2 * 0 + 1, 2 * 2 + 1, 2 * -1 + 1])


def test_a_censored_text_has_no_part_in_the_bias() -> None:
    labels, none = np.array([0, 1, 1]), np.zeros(2)

    logits, censored = calibrated_logits(TEMPLATE, answers_of((3, 0), (1, 0), (9, 0), censored=2), labels, 1.0, none)

    np.testing.assert_allclose(logits[:, 0] - logits[:, 1], [1.0, -1.0, 7.0])
    assert censored.tolist() == [[False, False], [False, False], [False, True]]


def test_texts_of_one_label_do_not_tell_a_good_prompt_from_a_biased_one() -> None:
    one, other = (
        calibrated_logits(TEMPLATE, answers_of((a, 0), (a + 1, 0)), np.array([0, 0]), 1.0, np.zeros(2))[0]
        for a in (-3, 8)
    )

    np.testing.assert_allclose(one, other)


@pytest.mark.parametrize("estimator", ["reinforce", "gumbel"])
def test_steps_go_to_the_ngram_that_helps(estimator: str) -> None:
    fm = CountingFM(ScriptedFM(rule=helped_by_good))
    body = replace(STEP, n_steps=15, estimator=estimator)  # type: ignore[arg-type]

    answer, data = sent(a_client(fm), body)

    assert isinstance(answer.body, Policy)
    assert answer.body.n == 20
    assert unpacked(answer.body.logits, 2, 3).argmax(axis=1).tolist() == [0, 0]
    assert 0 < answer.usage.fm_calls == fm.n_calls <= 15 * 4 * 5
    assert len(data) < 2 * 3 * 4 + 400


def test_a_prompt_drawn_twice_is_asked_once() -> None:
    fm = CountingFM(ScriptedFM(rule=helped_by_good))
    sure = np.array([[40.0, 0.0, 0.0], [40.0, 0.0, 0.0]])

    sent(a_client(fm), replace(STEP, logits=packed(sure), n_steps=1))

    assert fm.n_calls == 5
    assert {r.prefix.split("\n\n")[0] for r in fm.requests if isinstance(r, LabelRequest)} == {"good good"}


def test_without_a_difference_between_prompts_nothing_moves() -> None:
    start = np.log([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])

    answer, _ = sent(a_client(ScriptedFM(rule=lambda r: [0.0, 0.0])), replace(STEP, logits=packed(start)))

    assert isinstance(answer.body, Policy)
    np.testing.assert_allclose(unpacked(answer.body.logits, 2, 3), start, atol=1e-6)
    assert answer.body.loss == pytest.approx(np.log(2), abs=1e-3)


def test_refused_texts_move_nothing_and_break_nothing() -> None:
    answer, _ = sent(a_client(FailingFM()), STEP)

    assert isinstance(answer.body, Policy)
    np.testing.assert_allclose(unpacked(answer.body.logits, 2, 3), -np.log(3), atol=1e-6)


def test_logits_of_another_shape_fail_without_a_call() -> None:
    fm = CountingFM(ScriptedFM())

    answer, _ = sent(a_client(fm), replace(STEP, n_slots=5))

    assert answer.body == Failed(reason="WireError")
    assert fm.n_calls == 0


class TopOne(BaseFM):
    """Tells the more probable label only, the other one is censored; after "bad" the true one is."""

    fm_id = "top-one@0"
    capabilities = frozenset({Capability.TOP_LOGPROBS, Capability.TEXT})

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        assert all(isinstance(r, LabelRequest) for r in requests)
        return [self._answer(r) for r in requests if isinstance(r, LabelRequest)]

    def _answer(self, request: LabelRequest) -> FMResponse:
        right, wrong = helped_by_good(replace(request, prefix="good")), (-0.7, -0.8)
        true = int(np.argmax(right))
        hidden = true if "bad" in request.prefix else 1 - true
        logp = [wrong[1] if k == hidden else wrong[0] for k in range(2)]
        logp = (np.array(logp) - np.logaddexp.reduce(logp)).tolist()
        return FMResponse(logprobs=tuple(logp), censored=tuple(k == hidden for k in range(2)))


def test_a_censored_label_speaks_against_its_prompt() -> None:
    """The loss of "bad" prompts is more than that of any other by an unknown amount, at least log(1 + e^.1) less what
    another prompt's loss may be at most, log(1 + e^-.1): by .1. It is enough to turn from "bad"."""
    answer, _ = sent(a_client(TopOne()), replace(STEP, n_steps=20, learning_rate=50.0))

    assert isinstance(answer.body, Policy)
    policy = np.exp(unpacked(answer.body.logits, 2, 3))
    assert (policy[:, 1] < 0.1).all()


# ---------------------------------------------------------------- counts


def test_counts_by_hand_and_small_ones_are_kept_at_home() -> None:
    client = a_client(FailingFM())
    texts = client.data.train.texts
    pairs = Counter(pair for text in texts for pair in ngrams_of(text, 2) if " " in pair)
    ngrams = ("seemed", "no such thing", *sorted(pairs))

    reply, _ = sent(client, CountNgrams(ngrams=ngrams))

    assert {1, 2, 3} <= set(pairs.values())
    expected = (20, 0, *(pairs[pair] if pairs[pair] >= 3 else 0 for pair in sorted(pairs)))
    assert reply.body == NgramCounts(n=20, counts=expected)
    assert reply.usage.fm_calls == 0


@pytest.mark.parametrize("ngrams", [("the film seemed good",), tuple(f"w{i}" for i in range(801))])
def test_what_would_follow_a_text_from_word_to_word_is_not_counted(ngrams: tuple[str, ...]) -> None:
    reply, _ = sent(a_client(FailingFM()), CountNgrams(ngrams=ngrams))

    assert reply.body == Failed(reason="WireError")
