"""Names to things, through entry points, so that a plug-in package adds a method or an FM without touching this one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

from promptfed.errors import ConfigError, UnknownNameError
from promptfed.fm.base import BaseFM
from promptfed.fm.cache import CachedFM
from promptfed.fm.prices import Priced, PriceFile
from promptfed.strategies.base import Strategy
from promptfed.types import TaskKind

METHODS = "promptfed.methods"
FMS = "promptfed.fms"


def names(group: str) -> list[str]:
    """What is registered in an entry-point group, sorted."""
    return sorted(entry_points(group=group).names)


def load_method(name: str, options: Mapping[str, Any] | None = None) -> Strategy:
    """A method by name, with options (the fields of its dataclass). Raises `UnknownNameError` and `ConfigError`."""
    made = _load(METHODS, "method", name)
    known = {f.name: f for f in fields(made)} if is_dataclass(made) else {}
    for option in options or {}:
        if option not in known:
            raise UnknownNameError(f"option of method {name!r}", option, known or ["none"])
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(cast(type, made))
        method: Strategy = adapter.validate_python(dict(options or {})) if known else made()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"method.options.{where} = {first['input']!r}: {first['msg']}") from None
    return method


def methods_for(kind: TaskKind) -> list[str]:
    """The methods that can do tasks of ``kind``; one that can't be loaded here is left out."""
    out = []
    for name in names(METHODS):
        with suppress(ImportError, AttributeError):
            if kind in load_method(name).card.kinds:
                out.append(name)
    return out


def load_fm(address: str, *, prices: Path | None = None, cache: Path | None = None) -> BaseFM:
    """A foundation model by address, ``KIND:NAME``, such as ``embedded:smollm2-135m-instruct``.

    ``prices`` is a file with what its tokens cost (`promptfed.fm.prices`), ``cache`` one to remember its answers in
    (`promptfed.fm.cache`).
    """
    kind, colon, name = address.partition(":")
    if not colon or not name:
        raise ConfigError(f"an FM is KIND:NAME, such as embedded:smollm2-135m-instruct; got {address!r}")
    make = _load(FMS, "FM kind", kind)
    price = PriceFile.read(prices).of(name.rpartition("#")[2], prices) if prices else None
    fm: BaseFM = make(name)
    if price is not None:
        fm = Priced(fm, price)
    return CachedFM(fm, cache) if cache is not None else fm


def model_of(fm: BaseFM | str) -> BaseFM:
    """A foundation model, or the one at an address."""
    return load_fm(fm) if isinstance(fm, str) else fm


def _load(group: str, what: str, name: str) -> Callable[..., Any]:
    found = [e for e in entry_points(group=group) if e.name == name]
    if not found:
        raise UnknownNameError(what, name, names(group))
    loaded: Callable[..., Any] = found[0].load()
    return loaded
