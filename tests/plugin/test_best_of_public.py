"""A method in a package of its own: it keeps the contract, and pip installs it beside promptfed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contracts.method import MethodContract
from tests.plugin.best_of_public import BestOfPublic
from tests.support import bench, pooled_accuracy, public_texts

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

RUN = """
import json, sys
import promptfed
from promptfed.fm.scripted import ScriptedFM
from tests.support import WordEncoder

result = promptfed.run(json.loads(sys.argv[1]), fm=ScriptedFM(), encoder=WordEncoder())
summary = result.summary
print(json.dumps([summary["method"], summary["ledger"]["tuning"]["fm_calls"], len(result.prompt.prompts)]))
"""


class TestContract(MethodContract):
    def method(self) -> BestOfPublic:
        return BestOfPublic()


def test_it_finds_exemplars_that_show_the_labels() -> None:
    """Planted as for race: two words a label, of which the bare instruction shows none."""
    scene = bench(3, 30, n_words=2)
    federation = scene.federation(max_fm_calls=900, public=public_texts(n_words=2))

    prompt = scene.drive(BestOfPublic().run(federation), 900)

    assert pooled_accuracy(prompt, 100, seed=77) > 0.85


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that sees the package, installed in a folder of its own. No network."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(HERE, folder / "source", ignore=shutil.ignore_patterns("test_*", "__*"))
    install = [
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--quiet",
        "--disable-pip-version-check",
        "--target",
    ]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "pip", *install, str(folder / "site"), str(folder / "source")],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {**os.environ, "PYTHONPATH": f"{folder / 'site'}{os.pathsep}{ROOT}", "COLUMNS": "140"}


def python(environment: dict[str, str], *args: str) -> str:
    done = subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, timeout=200, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_installed_method_is_listed_with_its_options(installed: dict[str, str]) -> None:
    listed = python(installed, "-m", "promptfed.cli", "methods", "--json")
    shown = json.loads(python(installed, "-m", "promptfed.cli", "methods", "best_of_public", "--json"))

    assert {"race", "best_of_public"} <= {row["name"] for row in json.loads(listed)}
    assert shown["options"] == [
        {"name": "n_drafts", "type": "int", "default": 6},
        {"name": "n_texts", "type": "int", "default": 5},
        {"name": "reserve", "type": "float", "default": 0.4},
    ]


def test_the_installed_method_runs_by_its_name(installed: dict[str, str], tmp_path: Path) -> None:
    scene = bench(2, 12, 6)
    rows = [
        (part, client.client_id, text, ("negative", "positive")[label])
        for client in scene.clients.values()
        for part, labelled in (("train", client.data.train), ("test", client.data.test))
        for text, label in zip(labelled.texts, labelled.labels, strict=True)
    ]
    for part in ("train", "test"):
        lines = [f"{c},{t},{y}" for p, c, t, y in rows if p == part]
        (tmp_path / f"{part}.csv").write_text("\n".join(["client,text,label", *lines]) + "\n")
    (tmp_path / "public.csv").write_text("\n".join(["text", *public_texts()]) + "\n")
    config = {
        "data": {part: str(tmp_path / f"{part}.csv") for part in ("train", "test", "public")},
        "method": {"name": "best_of_public", "max_prompts": 2, "options": {"n_drafts": 3}},
        "budget": {"max_fm_calls": 150},
        "evaluation": {"baselines": []},
    }

    method, calls, n_prompts = json.loads(python(installed, "-c", RUN, json.dumps(config)))

    assert method == "best_of_public"
    assert 0 < calls <= 150
    assert n_prompts == 2
