"""Names to things, through entry points, so that a plug-in package adds a method or an FM without touching this one."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from promptfed.errors import ConfigError, UnknownNameError
from promptfed.fm.base import BaseFM
from promptfed.strategies.base import Strategy

METHODS = "promptfed.methods"
FMS = "promptfed.fms"


def names(group: str) -> list[str]:
    """What is registered in an entry-point group, sorted."""
    return sorted(entry_points(group=group).names)


def load_method(name: str) -> Strategy:
    """A method by name. Raises `UnknownNameError`."""
    method: Strategy = _load(METHODS, "method", name)()
    return method


def load_fm(address: str) -> BaseFM:
    """A foundation model by address, ``KIND:NAME``, such as ``embedded:smollm2-135m-instruct``."""
    kind, colon, name = address.partition(":")
    if not colon or not name:
        raise ConfigError(f"an FM is KIND:NAME, such as embedded:smollm2-135m-instruct; got {address!r}")
    fm: BaseFM = _load(FMS, "FM kind", kind)(name)
    return fm


def _load(group: str, what: str, name: str) -> Callable[..., Any]:
    found = [e for e in entry_points(group=group) if e.name == name]
    if not found:
        raise UnknownNameError(what, name, names(group))
    loaded: Callable[..., Any] = found[0].load()
    return loaded
