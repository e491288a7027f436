"""Entry points: names to classes, and classes to objects with their options checked."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from importlib.metadata import EntryPoints, entry_points
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

from promptfed.errors import ConfigError, UnknownNameError

METHODS = "promptfed.methods"
FMS = "promptfed.fms"
DOMAIN_MODELS = "promptfed.domain_models"


def names(group: str) -> list[str]:
    """What is registered in an entry-point group, sorted."""
    return sorted(_registered(group, tuple(sys.path)).names)


def find(group: str, what: str, name: str) -> Callable[..., Any]:
    """What is registered under ``name``. Raises `UnknownNameError`."""
    found = [e for e in _registered(group, tuple(sys.path)) if e.name == name]
    if not found:
        raise UnknownNameError(what, name, names(group))
    loaded: Callable[..., Any] = found[0].load()
    return loaded


@lru_cache
def _registered(group: str, path: tuple[str, ...]) -> EntryPoints:  # noqa: ARG001  (where packages are looked for)
    """Read once: it opens a file of every package that is installed, and hundreds of clients ask."""
    return entry_points(group=group)


def make_method(name: str, options: Mapping[str, Any] | None = None) -> Any:
    """A method by name, with options (the fields of its dataclass). Raises `UnknownNameError` and `ConfigError`."""
    made = find(METHODS, "method", name)
    known = {f.name: f for f in fields(made)} if is_dataclass(made) else {}
    for option in options or {}:
        if option not in known:
            raise UnknownNameError(f"option of method {name!r}", option, known or ["none"])
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(cast(type, made))
        return adapter.validate_python(dict(options or {})) if known else made()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"method.options.{where} = {first['input']!r}: {first['msg']}") from None
