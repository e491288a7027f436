"""Every exception promptfed raises on purpose.

PromptfedError
├── UserError              the caller can mend it: exit code 2
│   ├── ConfigError        a key, a type or a combination in the configuration
│   ├── DataError          a file, a column or a row of the caller's data
│   ├── UnknownNameError   a method, model or arm that is not registered
│   └── CapabilityError    the foundation model lacks what the method needs
└── RunError               the run could not go on: exit code 3
    ├── FMError            the foundation model failed
    │   └── FMUnreachableError  it gave no answer at all; the run goes on when it is back
    ├── BudgetError        a call would have passed the budget
    │   └── SpendingLimitError  it could have cost more money than is left
    ├── QuorumError        too few clients answered a round; the run waits to be resumed
    └── WireError          a message that does not decode to what it should be

Messages name what was got, what was expected and how to mend it. They never carry a client's text:
row numbers, column names, counts and hashes are enough to find the place.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class PromptfedError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 3


class UserError(PromptfedError):
    """Something that the person who called can mend."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration value is missing, unknown or contradictory."""


class DataError(UserError):
    """A data file can't be used as it is."""


class CapabilityError(UserError):
    """The foundation model lacks a capability that was asked for."""


class UnknownNameError(UserError):
    """A name that nothing is registered under."""

    def __init__(self, what: str, got: str, known: Iterable[str]) -> None:
        names = sorted(known)
        close = get_close_matches(got, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        super().__init__(f"unknown {what} {got!r}; known: {', '.join(names)}{hint}")


class RunError(PromptfedError):
    """The run could not go on."""


class FMError(RunError):
    """The foundation model gave no usable answer."""


class FMUnreachableError(FMError):
    """The foundation model could not be reached, or answered nothing in time."""


class BudgetError(RunError):
    """A call would have passed the budget. It was not made."""


class SpendingLimitError(BudgetError):
    """A call could have cost more money than is left. It was not made."""


class QuorumError(RunError):
    """Too few clients answered a round. Nothing of it was used: the run goes on with it when it is resumed."""


class WireError(RunError):
    """A message does not decode to the message it should be."""
