"""What all dialects share, with numbers that can be checked by hand: shares, groups, labels among the top tokens."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptfed.fm.dialects.base import MALFORMED, Dialect, TokenUsage, among, parsed, scored
from promptfed.fm.endpoint import Endpoint, UnansweredError
from promptfed.types import FMRequest, FMResponse, LabelRequest, TextRequest

USED = FMResponse(prompt_tokens=9, completion_tokens=1)


def label(*labels: str, absolute: bool = True, text: str = " x") -> LabelRequest:
    return LabelRequest(prefix="Text:", text=text, suffix="\nLabel:", labels=labels, absolute=absolute)


def logs(**probabilities: float) -> dict[str, float]:
    """Tokens with their log-probabilities; an underscore stands for a space."""
    return {token.replace("_", " "): math.log(p) for token, p in probabilities.items()}


def probabilities(answer: FMResponse) -> list[float]:
    assert answer.error is None
    return [math.exp(logprob) for logprob in answer.logprobs or ()]


# ---------------------------------------------------------------- what a request used


def test_tokens_are_shared_out_in_equal_parts_the_first_getting_the_rest() -> None:
    usage = TokenUsage.model_validate(
        {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}, "total_tokens": 10}
    )

    parts = [(part.prompt_tokens, part.completion_tokens, part.cached_tokens) for part in usage.shares(3)]

    assert parts == [(3, 1, 1), (2, 1, 1), (2, 1, 0)]


@given(total=st.integers(-5, 10**9), n=st.integers(1, 300))
def test_shares_add_up_and_differ_by_one_at_most(total: int, n: int) -> None:
    parts = [part.prompt_tokens for part in TokenUsage(prompt_tokens=total).shares(n)]

    assert sum(parts) == max(total, 0)
    assert max(parts) - min(parts) <= 1


@pytest.mark.parametrize("details", [None, {}, {"cached_tokens": None}])
def test_a_server_that_says_nothing_of_its_cache_had_nothing_in_it(details: object) -> None:
    (part,) = TokenUsage.model_validate({"prompt_tokens": 4, "prompt_tokens_details": details}).shares(1)

    assert (part.prompt_tokens, part.cached_tokens) == (4, 0)


# ---------------------------------------------------------------- which requests go together


class Small(Dialect):
    """Three items and ten characters a request; what asks for "alone" goes alone."""

    max_items = 3
    max_characters = 10

    def alike(self, request: FMRequest) -> Hashable:
        prompt = request.prompt if isinstance(request, TextRequest) else request.text
        return None if prompt == "alone" else prompt[0]

    async def ask(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        raise AssertionError


def groups(*prompts: str) -> list[list[int]]:
    dialect = Small(Endpoint("http://127.0.0.1:9/v1", timeout_s=1.0), "m", "m@0", frozenset())
    return list(dialect.groups([TextRequest(prompt=prompt, max_tokens=1) for prompt in prompts]))


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ((), []),
        (("a1", "b1", "a2", "b2"), [[0, 2], [1, 3]]),
        (("a1", "a2", "a3", "a4"), [[0, 1, 2], [3]]),
        (("a2345", "a2345", "a"), [[0, 1], [2]]),
        (("a" * 99, "a", "a" * 99), [[0], [1], [2]]),
        (("alone", "a", "alone"), [[0], [1], [2]]),
    ],
)
def test_what_is_alike_goes_together_within_the_bounds(prompts: tuple[str, ...], expected: list[list[int]]) -> None:
    assert sorted(groups(*prompts)) == expected


def test_a_label_request_and_a_text_request_never_go_together() -> None:
    dialect = Small(Endpoint("http://127.0.0.1:9/v1", timeout_s=1.0), "m", "m@0", frozenset())

    both: list[FMRequest] = [label(" a", " b", text="a"), TextRequest(prompt="a", max_tokens=1)]

    assert list(dialect.groups(both)) == [[0], [1]]


def test_an_answer_of_another_shape_is_none_and_is_not_quoted() -> None:
    with pytest.raises(UnansweredError) as caught:
        parsed(TokenUsage, {"prompt_tokens": "canary-7f3a"})

    assert (str(caught.value), caught.value.outage, caught.value.refused) == ("ValidationError", False, False)


# ---------------------------------------------------------------- scored


def test_scores_are_normalised_over_the_labels_unless_asked_for_as_they_are() -> None:
    logprobs = [math.log(0.2), math.log(0.6)]

    relative, absolute = (scored(label(" a", " b", absolute=a), logprobs, USED) for a in (False, True))

    assert probabilities(relative) == pytest.approx([0.25, 0.75])
    assert absolute.logprobs == tuple(logprobs)
    assert (relative.prompt_tokens, relative.completion_tokens) == (9, 1)


def test_what_holds_for_all_labels_is_not_said() -> None:
    said = scored(label(" a", " b"), [-1.0, -2.0], USED, censored=[False, False], label_tokens=[1, 1])
    kept = scored(label(" a", " b"), [-1.0, -2.0], USED, censored=[False, True], label_tokens=[1, 2])

    assert (said.censored, said.label_tokens) == (None, None)
    assert (kept.censored, kept.label_tokens) == ((False, True), (1, 2))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_a_failed_item(broken: float) -> None:
    assert scored(label(" a", " b"), [-1.0, broken], USED) == MALFORMED


# ---------------------------------------------------------------- among the most probable tokens


def test_labels_that_are_all_among_them_are_exact() -> None:
    answer = among(label(" good", " bad"), logs(_bad=0.3, _good=0.6, _the=0.05), USED)

    assert probabilities(answer) == pytest.approx([0.6, 0.3])
    assert answer.censored is None
    assert (answer.prompt_tokens, answer.completion_tokens) == (9, 1)


def test_tokens_that_begin_the_same_label_are_added_up() -> None:
    answer = among(label(" good", " bad"), logs(_good=0.5, _go=0.25, _bad=0.125), USED)

    assert probabilities(answer) == pytest.approx([0.75, 0.125])


def test_a_label_that_is_missing_is_at_most_as_probable_as_the_least_token() -> None:
    answer = among(label(" good", " bad"), logs(_good=0.9, _the=0.04), USED)  # 0.06 is left over

    assert probabilities(answer) == pytest.approx([0.9, 0.04])
    assert answer.censored == (False, True)


def test_nor_more_probable_than_what_the_tokens_leave_over() -> None:
    answer = among(label(" good", " bad"), logs(_good=0.9, _the=0.08), USED)  # 0.02 is left over

    assert probabilities(answer) == pytest.approx([0.9, 0.02])


def test_where_rounding_leaves_less_than_nothing_the_bound_is_a_billionth() -> None:
    answer = among(label(" good", " bad"), {" good": 0.0001, " the": math.log(0.5)}, USED)

    assert probabilities(answer) == pytest.approx([1.0001, 1e-9])


def test_a_token_that_begins_several_labels_speaks_for_none_and_bounds_them() -> None:
    answer = among(label(" positive", " poor", " bad"), logs(_positive=0.5, _po=0.3, _x=0.01), USED)

    assert probabilities(answer) == pytest.approx([0.5, 0.3, 0.01])
    assert answer.censored == (False, True, True)


@pytest.mark.parametrize("token", ["_goods", "good", "", "_Good"])
def test_a_token_that_does_not_begin_the_label_says_nothing_of_it(token: str) -> None:
    answer = among(label(" good", " bad"), logs(_bad=0.5, **{token: 0.4}), USED)

    assert answer.censored == (True, False)
    assert probabilities(answer) == pytest.approx([0.1, 0.5])


def test_bounds_take_part_in_the_normalisation() -> None:
    answer = among(label(" good", " bad", absolute=False), logs(_good=0.6, _the=0.2), USED)

    assert probabilities(answer) == pytest.approx([0.75, 0.25])


def test_folded_tokens_are_compared_without_spaces_and_capitals() -> None:
    answer = among(label(" Good", " bad"), logs(GOOD=0.5, _good=0.2, Bad=0.1), USED, folded=True)

    assert probabilities(answer) == pytest.approx([0.7, 0.1])


def test_labels_that_differ_by_capitals_alone_are_told_apart_by_them() -> None:
    answer = among(label(" us", " US"), logs(_US=0.5, us=0.2, Us=0.1), USED, folded=True)

    assert probabilities(answer) == pytest.approx([0.2, 0.5])


def test_without_any_label_all_are_censored_alike_and_the_tokens_are_booked() -> None:
    answer = among(label(" good", " bad"), logs(_the=0.9, _x=0.05), USED)

    assert answer.error is None
    assert answer.censored == (True, True)
    assert answer.logprobs is not None
    assert answer.logprobs[0] == answer.logprobs[1]
    assert answer.prompt_tokens == 9


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf, 5.0, 1000.0])
def test_one_number_that_is_no_log_probability_spoils_the_item(broken: float) -> None:
    assert among(label(" good", " bad"), {" good": -0.5, " bad": -1.0, " x": broken}, USED) == MALFORMED


def test_no_tokens_are_no_answer() -> None:
    assert among(label(" good", " bad"), {}, USED) == MALFORMED
