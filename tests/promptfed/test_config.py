"""The configuration: one check at the boundary, with words for a person."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from promptfed.config import Config, dump_toml, load_config
from promptfed.errors import ConfigError

MINIMAL: dict[str, Any] = {"data": {"train": "train.csv"}}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_the_documented_ones() -> None:
    config = load_config(MINIMAL)

    assert config.seed == 1
    assert config.method.name == "race"
    assert config.method.max_prompts == 3
    assert config.budget.max_fm_calls == 2500
    assert config.fm.scorer == "embedded:smollm2-135m-instruct"
    assert config.evaluation.baselines == ("zero_shot", "manual_few_shot")


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "run.toml", '[data]\ntrain = "sub/train.csv"\n')

    config = load_config(file)

    assert config.data.train == tmp_path.resolve() / "sub" / "train.csv"


def test_overrides_are_toml_where_they_parse_and_strings_where_not() -> None:
    config = load_config(
        MINIMAL,
        ["seed=7", "task.instruction=Say yes or no", 'evaluation.baselines=["zero_shot"]', "budget.max_usd=1.5"],
    )

    assert config.seed == 7
    assert config.task.instruction == "Say yes or no"
    assert config.evaluation.baselines == ("zero_shot",)
    assert config.budget.max_usd == 1.5


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({**MINIMAL, "budget": {"max_fm_call": 3}}, "unknown key 'budget.max_fm_call'; did you mean 'max_fm_calls'?"),
        ({**MINIMAL, "colour": 1}, "unknown key 'colour'"),
        ({**MINIMAL, "seed": -1}, "seed = -1"),
        ({**MINIMAL, "task": {"labels": ["only"]}}, "two or more"),
        ({**MINIMAL, "task": {"kind": "regression"}}, "task.kind = 'regression'"),
        ({**MINIMAL, "evaluation": {"baselines": ["magic"]}}, "magic"),
        ({**MINIMAL, "cascade": {"max_fm_calls": 5}}, "cascade.max_fm_calls does nothing without cascade.target_risk"),
        ({**MINIMAL, "distillation": {"temperature": 2.0}}, "set distillation.max_fm_calls"),
        ({}, "data.train or [[clients]]"),
        ({**MINIMAL, "clients": [{"id": "a", "train": "x.csv"}]}, "data.train or [[clients]]"),
        ({"clients": [{"id": "a", "train": "x"}, {"id": "a", "train": "y"}]}, "same id"),
        ({"clients": [{"id": "a", "train": "x", "tset": "y"}]}, "did you mean 'test'?"),
    ],
)
def test_what_is_wrong_is_named(raw: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(raw)

    assert says in str(caught.value)


def test_a_missing_file_and_a_broken_file_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="not TOML"):
        load_config(write(tmp_path / "bad.toml", "seed = = 1"))
    with pytest.raises(ConfigError, match=r"expected section\.key=value"):
        load_config(MINIMAL, ["seed"])


def test_what_is_written_reads_back_the_same(tmp_path: Path) -> None:
    config = load_config(
        {
            "seed": 3,
            "clients": [{"id": 'a "b"', "train": "/x/a.csv"}, {"id": "c", "train": "/x/c.csv", "test": "/x/t.csv"}],
            "task": {"instruction": 'Two\nlines, "quoted" \\ and\ttabbed', "verbalizer": {"pos": "good", "neg": "bad"}},
            "budget": {"max_usd": 0.5},
            "method": {"name": "aug_pe", "options": {"epsilon": float("inf"), "note": "\x0b\x7f\u2028\u00e9"}},
        }
    )

    again = load_config(write(tmp_path / "config.toml", dump_toml(config)))

    assert again == config
    assert isinstance(again, Config)


NETWORK = {"task": {"labels": ["a", "b"]}, "network": {"clients": ["north", "south"], "insecure": True}}


def test_a_network_has_clients_by_name_only_where_nobody_is_checked() -> None:
    config = load_config(NETWORK)

    assert config.network is not None
    assert config.network.clients == ("north", "south")
    for broken in ({"clients": ["north"]}, {"clients": {"north": "n.pub"}, "insecure": True}):
        with pytest.raises(ConfigError, match="maps ids to files with public keys"):
            load_config({**NETWORK, "network": broken})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"data": {"train": "x.csv"}}, "the texts are at the clients"),
        ({"partition": {"clients": 2}}, "the texts are at the clients"),
        ({"fm": {"scorer": "embedded:other"}}, "each client names its FM"),
        ({"encoder": {"name": "other"}}, "leave out .fm. and .encoder."),
        ({"task": {}}, "task.labels has to say which labels"),
        ({"task": {"labels": ["a", "a"]}}, "two or more different labels"),
        ({"evaluation": {"baselines": ["centralised"]}}, "can't be put in one place"),
    ],
)
def test_what_a_network_excludes(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config({**NETWORK, **change})


def test_keys_are_found_beside_the_configuration_and_survive_the_run_folder(tmp_path: Path) -> None:
    path = tmp_path / "server.toml"
    path.write_text(
        '[task]\nlabels = ["a", "b"]\n[network]\ncertificate = "keys/c.pem"\n'
        '[network.clients]\n"St. Mary\'s" = "keys/n.pub"\n'
    )

    config = load_config(path)
    (tmp_path / "again.toml").write_text(dump_toml(config))

    assert config.network is not None
    assert config.network.clients == {"St. Mary's": tmp_path / "keys" / "n.pub"}
    assert load_config(tmp_path / "again.toml") == config
