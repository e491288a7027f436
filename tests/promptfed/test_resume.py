"""Runs that are really killed, at every kind of durable write, and go on to the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import promptfed
from promptfed.config import dump_toml, load_config
from promptfed.errors import ConfigError, DataError, RunError
from promptfed.federation.events import read_events, timeless
from promptfed.fm.base import BaseFM
from promptfed.fm.scripted import ScriptedFM
from promptfed.folder import claimed
from promptfed.types import FMRequest, FMResponse
from tests.promptfed.test_app import config  # noqa: F401  (a fixture)
from tests.support import WordEncoder

KILLED = -9


def start(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.killable", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def outcome(folder: Path) -> dict[str, Any]:
    """What must not depend on kills: all that is written, but for times."""
    summary = json.loads((folder / "summary.json").read_text())
    for phase in summary["ledger"].values():
        phase.pop("wall_s")
    for reading in summary["readings"]:
        reading.pop("wall_s")
    kept = [p for p in (folder / "clients").rglob("*") if p.is_file() and p.parent.name != "history"]
    return {
        "prompt": (folder / "prompt.json").read_bytes(),
        "events": list(map(timeless, read_events(folder / "events.jsonl"))),
        "summary": summary,
        "clients": {str(p.relative_to(folder)): p.read_bytes() for p in kept},
    }


def n_calls(folder: Path) -> int:
    """Calls that reached the foundation model, over all processes."""
    return sum(map(int, (folder.parent / "calls.txt").read_text().split()))


@pytest.fixture(scope="module")
def undisturbed(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:  # noqa: F811
    """A configuration file, the folder of a run that nobody killed, and its number of durable writes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    path = folder / "config.toml"
    path.write_text(dump_toml(load_config(config)))
    done = start("run", path, folder / "run")
    assert done.returncode == 0, done.stderr
    return path, folder / "run", int(done.stdout)


@pytest.mark.parametrize(
    ("share", "where"),
    [(0.02, "half"), (0.15, "before"), (0.3, "half"), (0.45, "after"), (0.6, "half"), (0.8, "half"), (0.99, "before")],
)
def test_a_killed_run_resumes_to_the_same_bytes(
    undisturbed: tuple[Path, Path, int], tmp_path: Path, share: float, where: str
) -> None:
    path, whole, n_writes = undisturbed
    folder = tmp_path / "run"

    first = start("run", path, folder, round(share * n_writes), where)
    second = start("resume", folder, 5, where)  # killed again soon after
    third = start("resume", folder)

    assert (first.returncode, second.returncode, third.returncode) == (KILLED, KILLED, 0), third.stderr
    assert outcome(folder) == outcome(whole)


def test_no_answered_call_is_made_again(undisturbed: tuple[Path, Path, int], tmp_path: Path) -> None:
    path, whole, n_writes = undisturbed
    folder = tmp_path / "run"

    for at in (n_writes // 5, n_writes // 5, n_writes // 5):
        start("resume", folder, at, "after") if folder.exists() else start("run", path, folder, at, "after")
    assert start("resume", folder).returncode == 0

    # "after" a write nothing is lost: the answers of the last batch are in the journal.
    assert n_calls(folder) == n_calls(whole)


def test_a_run_that_ended_is_gone_through_again_for_nothing(undisturbed: tuple[Path, Path, int]) -> None:
    _, whole, _ = undisturbed
    before, calls = outcome(whole), n_calls(whole)

    assert start("resume", whole).returncode == 0

    assert outcome(whole) == before
    assert n_calls(whole) == calls


# ---------------------------------------------------------------- what can't be resumed


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not a run folder \(no config.toml\)"):
        promptfed.resume(tmp_path)


def test_two_processes_do_not_work_on_one_folder(undisturbed: tuple[Path, Path, int]) -> None:
    _, whole, _ = undisturbed
    with claimed(whole):
        done = start("resume", whole)

    assert done.returncode != 0
    assert "another process is working on" in done.stderr


def test_data_that_changed_since_is_refused_and_nothing_is_lost(
    config: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    train = tmp_path / "train.csv"
    train.write_bytes(Path(config["data"]["train"]).read_bytes())
    mine = {**config, "data": {**config["data"], "train": str(train)}, "evaluation": {"baselines": []}}
    promptfed.run(mine, out=tmp_path / "run", fm=ScriptedFM(), encoder=WordEncoder())
    before = outcome(tmp_path / "run")
    lines = train.read_text().splitlines()
    train.write_text("\n".join(lines[:-7]) + "\n")

    with pytest.raises(DataError, match=r"events.jsonl|belongs to another configuration"):
        promptfed.resume(tmp_path / "run", fm=ScriptedFM(), encoder=WordEncoder())

    assert outcome(tmp_path / "run") == before


class Breaking(BaseFM):
    """The scripted model, which writes down every batch that it answered and breaks after ``n`` of them."""

    fm_id = "scripted:overlap@0"
    capabilities = ScriptedFM().capabilities

    def __init__(self, n: int = 10**9) -> None:
        self._inner, self._n = ScriptedFM(), n
        self.batches: list[tuple[str, ...]] = []

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        if len(self.batches) >= self._n:
            raise ConnectionError
        self.batches.append(tuple(map(repr, requests)))
        return await self._inner.complete(requests)


@pytest.mark.parametrize("share", [0.1, 0.4, 0.6, 0.9])
def test_a_batch_holds_what_it_would_have_held(config: dict[str, Any], tmp_path: Path, share: float) -> None:  # noqa: F811
    """The embedded model's last digits depend on the batch, so the same bytes take the same batches."""
    uneven = {**config, "evaluation": {"baselines": ["zero_shot", "local_only"]}}
    train = Path(config["data"]["train"]).read_text().splitlines()
    few = [line for line in train if line.startswith("site2")][4:]
    (tmp_path / "train.csv").write_text("\n".join(line for line in train if line not in few) + "\n")
    uneven["data"] = {**config["data"], "train": str(tmp_path / "train.csv")}
    whole = Breaking()
    expected = promptfed.run(uneven, out=tmp_path / "whole", fm=whole, encoder=WordEncoder())
    broken, mended = Breaking(round(share * len(whole.batches))), Breaking()

    with pytest.raises(RunError):
        promptfed.run(uneven, out=tmp_path / "run", fm=broken, encoder=WordEncoder())
    result = promptfed.resume(tmp_path / "run", fm=mended, encoder=WordEncoder())

    assert result.prompt.prompt_id == expected.prompt.prompt_id
    assert sorted(broken.batches + mended.batches) == sorted(whole.batches)
    assert outcome(tmp_path / "run")["events"][1:] == outcome(tmp_path / "whole")["events"][1:]
