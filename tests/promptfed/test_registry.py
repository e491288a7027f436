"""Names to things."""

from __future__ import annotations

import pytest

from promptfed.errors import ConfigError, UnknownNameError
from promptfed.fm.scripted import ScriptedFM
from promptfed.registry import METHODS, load_fm, load_method, names
from promptfed.strategies.race import Race


def test_methods_and_fms_load_by_name() -> None:
    assert isinstance(load_method("race"), Race)
    assert isinstance(load_fm("scripted:overlap"), ScriptedFM)
    assert "race" in names(METHODS)


def test_an_unknown_name_says_what_is_known_and_what_was_meant() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown method 'rase'.*did you mean 'race'\?"):
        load_method("rase")
    with pytest.raises(UnknownNameError, match="unknown FM kind 'vvllm'"):
        load_fm("vvllm:x")


def test_an_address_without_a_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="KIND:NAME"):
        load_fm("smollm2")
