"""What a conductor checks of those who joined, before anything is paid for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

import promptfed
from promptfed.app import Simulation, read_inputs
from promptfed.conduct import task_text
from promptfed.config import load_config
from promptfed.errors import CapabilityError, ConfigError
from promptfed.fm.scripted import ScriptedFM
from promptfed.messages import Joined
from promptfed.types import Capability
from tests.promptfed.test_edges import configured, rows_of
from tests.support import WordEncoder

BOTH = (Capability.LABEL_LOGPROBS, Capability.TEXT)


def joined(fm: str = "m@1", capabilities: tuple[Capability, ...] = BOTH, encoder: str = "e") -> Joined:
    return Joined(fm=fm, encoder=encoder, capabilities=capabilities, n_train=4, n_test=2, labels=("a",), n_dropped=0)


@pytest.fixture
def simulation(tmp_path: Path) -> Simulation:
    config = load_config(configured(tmp_path, rows_of(2, 20), rows_of(2, 4, 50)))
    return Simulation(config, read_inputs(config), None, fm=ScriptedFM(), encoder=WordEncoder())


def test_clients_that_ask_the_same_model_are_fine(simulation: Simulation) -> None:
    simulation.check_joined({"a": joined(), "b": joined()})


@pytest.mark.parametrize(
    ("clients", "error", "told"),
    [
        ({"a": joined(), "b": joined("other@2")}, ConfigError, "a: m@1, b: other@2"),
        ({"a": joined(), "b": joined(encoder="f")}, ConfigError, "different encoders .a: e, b: f."),
        ({"a": joined(), "b": joined(capabilities=BOTH[:1])}, CapabilityError, "race.*needs text.*client 'b'"),
    ],
)
def test_other_models_and_models_that_cannot_do_it_are_refused(
    simulation: Simulation, clients: Mapping[str, Joined], error: type[promptfed.PromptfedError], told: str
) -> None:
    with pytest.raises(error, match=told):
        simulation.check_joined(clients)


def test_words_for_a_label_that_is_not_there_are_refused(tmp_path: Path) -> None:
    task = {"labels": ["a", "b"], "verbalizer": {"c": "see"}}
    config = load_config({**configured(tmp_path, rows_of(2, 20), rows_of(2, 4, 50)), "task": task})

    with pytest.raises(ConfigError, match=r"task\.verbalizer has c; the labels are a, b"):
        task_text(config, config.task.labels)
