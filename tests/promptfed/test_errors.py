"""The exception tree: exit codes, and messages that help."""

from __future__ import annotations

import pytest

from promptfed import errors


@pytest.mark.parametrize("name", ["ConfigError", "DataError", "UnknownNameError", "CapabilityError"])
def test_what_the_caller_can_mend_exits_with_2(name: str) -> None:
    kind = getattr(errors, name)

    assert issubclass(kind, errors.UserError)
    assert kind.exit_code == 2


@pytest.mark.parametrize("name", ["FMError", "FMUnreachableError", "BudgetError", "QuorumError", "WireError"])
def test_what_broke_off_a_run_exits_with_3(name: str) -> None:
    kind = getattr(errors, name)

    assert issubclass(kind, errors.RunError)
    assert kind.exit_code == 3


def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    assert str(errors.UnknownNameError("method", "rase", ["race", "fedbpt"])) == (
        "unknown method 'rase'; known: fedbpt, race; did you mean 'race'?"
    )
    assert str(errors.UnknownNameError("arm", "xyz", ["fm"])) == "unknown arm 'xyz'; known: fm"
