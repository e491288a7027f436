"""Names to things, through entry points, so that a plug-in package adds a method or an FM without touching this one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from promptfed.errors import ConfigError
from promptfed.fm.base import BaseFM
from promptfed.fm.cache import CachedFM
from promptfed.fm.prices import Priced, PriceFile
from promptfed.plugins import FMS, METHODS, find, make_method, names
from promptfed.strategies.base import Strategy
from promptfed.types import TaskKind

__all__ = ["FMS", "METHODS", "describe_method", "load_fm", "load_method", "model_of", "names"]


def load_method(name: str, options: Mapping[str, Any] | None = None) -> Strategy:
    """A method by name, with options (the fields of its dataclass). Raises `UnknownNameError` and `ConfigError`."""
    method: Strategy = make_method(name, options)
    return method


def describe_method(name: str) -> dict[str, Any]:
    """What a method is, as plain values: its card, what it needs of the FM, and its options with types and defaults.

    Raises `UnknownNameError`; and what its module raises, if that can't be imported.
    """
    method: Any = load_method(name)
    card = method.card
    known = fields(method) if is_dataclass(method) else ()
    schema: dict[str, Any] = TypeAdapter(type(method)).json_schema()["properties"] if known else {}
    options = [{"name": f.name, "type": _in_words(schema[f.name]), "default": getattr(method, f.name)} for f in known]
    return {
        "name": name,
        "needs": sorted(method.needs),
        "kinds": sorted(card.kinds),
        "privacy_unit": card.privacy_unit,
        "reads_text": card.reads_text,
        "paper": card.paper,
        "sends": sorted(card.sends),
        "crosses": card.crosses,
        "options": options,
    }


_TYPES = {"integer": "int", "number": "float", "string": "text", "boolean": "true or false", "null": "none"}
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def _in_words(schema: Mapping[str, Any]) -> str:
    """What may stand for an option, from its JSON schema: "int, at least 1"."""
    if "anyOf" in schema:
        return " or ".join(map(_in_words, schema["anyOf"]))
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    kind = str(schema.get("type", "any"))
    bounds = [f"{words} {schema[name]:g}" for name, words in _BOUNDS.items() if name in schema]
    return ", ".join([_TYPES.get(kind, kind), *bounds])


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
    make = find(FMS, "FM kind", kind)
    price = PriceFile.read(prices).of(name.rpartition("#")[2], prices) if prices else None
    fm: BaseFM = make(name)
    if price is not None:
        fm = Priced(fm, price)
    return CachedFM(fm, cache) if cache is not None else fm


def model_of(fm: BaseFM | str) -> BaseFM:
    """A foundation model, or the one at an address."""
    return load_fm(fm) if isinstance(fm, str) else fm
