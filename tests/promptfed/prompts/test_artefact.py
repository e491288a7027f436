"""prompt.json: what is saved comes back, and a file that was changed is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from promptfed.errors import DataError
from promptfed.fm.scripted import ScriptedFM
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.calibration import Calibration
from promptfed.prompts.template import PromptTemplate
from promptfed.types import LabelRequest
from tests.support import FailingFM

P = PromptTemplate(text="A: {text}\n→", words=("bad", "good"))
Q = PromptTemplate(text="B: {text}", words=("poor", "fine"), separator="")
SET = PromptSet(labels=("negative", "positive"), prompts=(P, Q), weights=(0.75, 0.1), bias=(0.5, -1 / 3))


def changed(path: Path, **changes: Any) -> Path:
    """prompt.json with top-level fields changed by hand; `...` leaves one out."""
    SET.save(path)
    record = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in record.items() if v is not ...}), encoding="utf-8")
    return path


# ---------------------------------------------------------------- saving and loading


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    SET.save(tmp_path / "prompt.json", about={"method": "race", "seed": 3})

    assert PromptSet.load(tmp_path / "prompt.json") == SET
    assert PromptSet.load(str(tmp_path)) == SET  # a run folder
    record = json.loads((tmp_path / "prompt.json").read_text(encoding="utf-8"))
    assert record["prompt_id"] == SET.prompt_id
    assert record["about"] == {"method": "race", "seed": 3}
    assert "→" in (tmp_path / "prompt.json").read_text(encoding="utf-8")


def test_what_it_is_about_is_not_part_of_its_identity(tmp_path: Path) -> None:
    SET.save(tmp_path / "a.json", about={"seed": 1})
    SET.save(tmp_path / "b.json", about={"seed": 2})

    assert PromptSet.load(tmp_path / "a.json").prompt_id == PromptSet.load(tmp_path / "b.json").prompt_id


def test_every_part_of_the_content_is_in_the_id() -> None:
    def variant(**changes: Any) -> str:
        values = {"labels": SET.labels, "prompts": SET.prompts, "weights": SET.weights, "bias": SET.bias, **changes}
        return PromptSet(**values).prompt_id

    ids = {
        variant(),
        variant(labels=("negative", "other")),
        variant(prompts=(Q, P)),
        variant(weights=(0.1, 0.75)),
        variant(bias=(0.5, 0.0)),
    }
    assert len(ids) == 5
    assert variant() == SET.prompt_id
    assert len(SET.prompt_id) == 16


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": [0.75, 0.2]},
        {"bias": [0.5, 0.0]},
        {"labels": ["positive", "negative"]},
        {"prompt_id": "0" * 16},
        {"prompts": [{"text": "C: {text}", "words": ["bad", "good"], "separator": " "}], "weights": [0.75]},
    ],
)
def test_a_file_that_was_changed_by_hand_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = changed(tmp_path / "prompt.json", **changes)

    with pytest.raises(DataError, match=r"prompt\.json: .*changed"):
        PromptSet.load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompts": [{"text": "no slot", "words": ["a", "b"], "separator": " "}]},
        {"prompts": [{"text": "{text}", "words": ["a"], "separator": " "}]},
        {"prompts": []},
        {"weights": [1.0]},
        {"bias": [1.0]},
        {"weights": ["heavy", 1.0]},
        {"labels": ...},
        {"prompt_id": ...},
        {"schema_version": ...},
        {"schema_version": 2},
        {"prompts": None},
    ],
)
def test_a_file_that_is_no_prompt_set_is_a_data_error_with_its_name(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = changed(tmp_path / "prompt.json", **changes)

    with pytest.raises(DataError, match=r"prompt\.json"):
        PromptSet.load(path)


def test_another_version_says_which(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="schema_version 2; this promptfed reads 3"):
        PromptSet.load(changed(tmp_path / "p.json", schema_version=2))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"3", b"\xff\xfe", b'{"prompts": 1}'])
def test_rubbish_is_a_data_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "prompt.json"
    path.write_bytes(content)

    with pytest.raises(DataError, match=r"prompt\.json"):
        PromptSet.load(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: can't be read \(No such file"):
        PromptSet.load(tmp_path / "none.json")
    with pytest.raises(DataError, match=r"prompt\.json: can't be read"):
        PromptSet.load(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompts": (), "weights": ()},
        {"weights": (1.0,)},
        {"bias": (1.0,)},
        {"labels": ("a", "b", "c")},
        {"labels": ("a", "b", "c"), "bias": (0.0, 0.0, 0.0)},
    ],
)
def test_parts_that_do_not_fit_together_are_refused(changes: dict[str, Any]) -> None:
    values = {"labels": SET.labels, "prompts": SET.prompts, "weights": SET.weights, "bias": SET.bias, **changes}

    with pytest.raises(DataError, match="prompt set"):
        PromptSet(**values)


# ---------------------------------------------------------------- predicting


def three_to_one(request: LabelRequest) -> list[float]:
    """Says the second label is three times as likely where the text is bright, else the other way round."""
    return [0.0, np.log(3.0)] if "bright" in request.text else [np.log(3.0), 0.0]


def test_predictions_by_hand() -> None:
    fm = ScriptedFM(rule=three_to_one)
    plain = PromptSet(labels=SET.labels, prompts=(P,), weights=(1.0,), bias=(0.0, 0.0))

    bright, dim = plain.predict(["bright", "dim"], fm=fm)

    assert (bright.label, dim.label) == ("positive", "negative")
    assert bright.proba == pytest.approx({"negative": 0.25, "positive": 0.75})


def test_weights_and_bias_are_applied() -> None:
    # Both prompts say log 3 between the labels: 2 * log 3 + 1 * log 3 = log 27, and the bias takes log 9 off.
    pair = PromptSet(labels=SET.labels, prompts=(P, Q), weights=(2.0, 1.0), bias=(np.log(9.0), 0.0))

    (got,) = pair.predict(["bright"], fm=ScriptedFM(rule=three_to_one))

    assert got.proba["positive"] == pytest.approx(3 / 4)


def test_a_clients_own_calibration_takes_the_place_of_the_pooled_one() -> None:
    own = Calibration(weights=(0.0, 0.0), bias=(0.0, np.log(4.0)))

    (got,) = SET.predict(["dim"], fm=ScriptedFM(rule=three_to_one), calibration=own)

    assert (got.label, got.proba["positive"]) == ("positive", pytest.approx(0.8))


@pytest.mark.parametrize(
    "own", [Calibration(weights=(1.0,), bias=(0.0, 0.0)), Calibration(weights=(1.0, 1.0), bias=(0.0,))]
)
def test_a_calibration_of_another_shape_is_refused(own: Calibration) -> None:
    with pytest.raises(DataError, match="calibration"):
        SET.predict(["dim"], fm=ScriptedFM(), calibration=own)


def test_a_text_that_the_model_failed_on_has_no_label() -> None:
    predictions = SET.predict(["one", "two"], fm=FailingFM())

    assert [(p.label, p.proba) for p in predictions] == [(None, {}), (None, {})]


def test_no_text_no_prediction() -> None:
    assert SET.predict([], fm=ScriptedFM()) == []
