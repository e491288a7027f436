"""The ledger: sums by phase and by client."""

from __future__ import annotations

import pytest

from promptfed.ledger import PHASES, Account, Ledger
from promptfed.types import FMResponse

ANSWER = FMResponse(
    logprobs=(-1.0, -0.5), prompt_tokens=10, completion_tokens=1, cached_tokens=4, usd=0.25, truncated=True
)


def test_an_answer_by_hand() -> None:
    account = Account()

    account.add_answer(ANSWER)
    account.add_answer(FMResponse(error="refused", prompt_tokens=3))
    account.add_answer(FMResponse(logprobs=(-1.0, -0.5), censored=(True, False)))

    assert account == Account(
        fm_calls=3,
        prompt_tokens=13,
        completion_tokens=1,
        cached_tokens=4,
        failed_calls=1,
        truncated_calls=1,
        censored_calls=1,
        usd=0.25,
    )


def test_accounts_are_by_phase_and_client() -> None:
    ledger = Ledger()
    ledger.account("a").add_answer(ANSWER)
    with ledger.during("evaluation"):
        ledger.account("a").bytes_up += 7
        ledger.account("b").add_answer(ANSWER)
    ledger.account("b").add_answer(ANSWER)

    assert ledger.total("tuning").fm_calls == 2
    assert ledger.total("evaluation").fm_calls == 1
    assert ledger.total("evaluation").bytes_up == 7
    assert ledger.total("baselines") == Account()
    by_client = ledger.as_dict()["evaluation"]["by_client"]
    assert list(by_client) == ["a", "b"]
    assert by_client["a"]["fm_calls"] == 0


def test_phases_nest_and_are_left_even_by_an_error() -> None:
    ledger = Ledger()

    def break_off() -> None:
        with ledger.during("baselines"):
            with ledger.during("evaluation"):
                assert ledger.phase == "evaluation"
            assert ledger.phase == "baselines"
            raise KeyError

    with pytest.raises(KeyError):
        break_off()

    assert ledger.phase == "tuning"


def test_the_dictionary_has_every_phase_and_its_time() -> None:
    ledger = Ledger()
    ledger.add_seconds(1.5)
    ledger.add_seconds(2.0)

    book = ledger.as_dict()

    assert tuple(book) == tuple(phase for phase in PHASES if phase != "transfer")  # where nothing was spent on it
    assert book["tuning"]["wall_s"] == 3.5
    assert book["evaluation"]["wall_s"] == 0.0
    assert book["baselines"]["by_client"] == {}
    assert set(book["tuning"]) == {*Account.__dataclass_fields__, "wall_s", "by_client"}
