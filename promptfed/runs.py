"""Reading what a run left behind: clients' per-text results, for comparison in pairs."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluators.answers import PRIMARY as ANSWER_PRIMARY
from evaluators.compare import Comparison, compare
from promptfed.errors import DataError
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.calibration import Calibration
from promptfed.types import FloatArray


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of a run folder. Raises `DataError`."""
    return read_record(folder / "summary.json")


def read_calibration(path: Path, prompt: PromptSet) -> Calibration:
    """A client's own calibration of ``prompt``. Raises as `read_made_for`."""
    record = read_made_for(prompt, path)
    return Calibration(weights=tuple(record["weights"]), bias=tuple(record["bias"]))


def read_made_for(prompt: PromptSet, path: Path) -> dict[str, Any]:
    """What a client keeps for ``prompt``. Raises `DataError` where it is for another."""
    record = read_record(path)
    if record.get("prompt_id") != prompt.prompt_id:
        raise DataError(f"{path} is of another prompt than {prompt.prompt_id}; copy both from one run")
    return record


def read_personal(folder: Path, client_id: str) -> PromptSet:
    """The prompts that a client chose for itself, with its own calibration, found as in `client_folder`."""
    return PromptSet.load(_at_client(folder, client_id, "personal.json"))


def client_folder(folder: Path, client_id: str) -> Path:
    """A client's folder in a run folder, or the run's folder at the client itself. Raises `DataError`."""
    return _at_client(folder, client_id, "calibration.json").parent


def _at_client(folder: Path, client_id: str, name: str) -> Path:
    if (folder / name).is_file():
        if (whose := _whose(folder)) not in (None, client_id):
            raise DataError(f"{folder} is of client {whose!r}, not of {client_id!r}")
        return folder / name
    known = sorted(p.name for p in (folder / "clients").glob("*") if p.is_dir())
    if client_id not in known:
        raise DataError(f"{folder} has no client {client_id!r}; it has {', '.join(known) or 'none'}")
    return folder / "clients" / client_id / name


def _whose(folder: Path) -> object:
    """The client whose folder this is, where it can be told: it may be a copy."""
    if (folder / "run.json").is_file():
        return read_record(folder / "run.json").get("client")
    place = folder.resolve()
    is_in_run = place.parent.name == "clients" and (place.parent.parent / "events.jsonl").is_file()
    return place.name if is_in_run else None


def read_about(prompt: Path) -> dict[str, Any]:
    """How a prompt.json, or the one in a run folder, came about: method, seed and foundation model, where it says."""
    found = read_record(prompt / "prompt.json" if prompt.is_dir() else prompt).get("about")
    return found if isinstance(found, dict) else {}


def correctness(folders: Sequence[Path], arm: str) -> dict[str, FloatArray]:
    """1 where ``arm`` was right, by client, shape (n_runs, n_texts), texts sorted by their hash; of written answers the
    token F1.

    The runs (seeds) must have been measured on the same texts.
    """
    stacked: dict[str, list[FloatArray]] = {}
    texts: dict[str, list[str]] = {}
    for folder in folders:
        files = sorted((folder / "clients").glob(f"*/evaluation/{arm}.json"))
        if not files:
            arms = sorted({p.stem for p in (folder / "clients").glob("*/evaluation/*.json")})
            raise DataError(f"{folder} has no per-text results of arm {arm!r}; it has {', '.join(arms) or 'none'}")
        for file in files:
            record = read_record(file)
            order = np.argsort(np.array(record["texts"]), kind="stable")
            client = file.parent.parent.name
            ids = [record["texts"][i] for i in order]
            if texts.setdefault(client, ids) != ids:
                raise DataError(f"{folder}: client {client!r} was measured on other texts than in the runs before it")
            if ANSWER_PRIMARY in record:
                right = np.array(record[ANSWER_PRIMARY])
            else:
                right = np.array(record["proba"]).argmax(axis=1) == np.array(record["labels"])
            stacked.setdefault(client, []).append(right[order].astype(np.float64))
    return {client: np.stack(rows) for client, rows in stacked.items()}


def compare_runs(
    a: Sequence[Path],
    b: Sequence[Path],
    arm_a: str = "fm",
    arm_b: str | None = None,
    clients: Collection[str] | None = None,
) -> Comparison:
    """Accuracy of ``arm_a`` in runs ``a`` against ``arm_b`` in runs ``b`` (of written answers the token F1), paired by
    text; seeds averaged per text.

    ``clients``: only these, where some missed the round that measured an arm.
    """
    left, right = correctness(a, arm_a), correctness(b, arm_b or arm_a)
    if clients is not None:
        left, right = ({c: v for c, v in side.items() if c in clients} for side in (left, right))
    return compare(left, right)


def read_record(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; is the folder a finished run?") from None
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: can't be read ({type(error).__name__})") from None
    return content
