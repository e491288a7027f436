"""What a newcomer runs: the notebook, on the real model and real text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.model
@pytest.mark.timeout(1000)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)

    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(EXAMPLES)}}).execute()

    printed = "\n".join(
        output.get("text", "") or output.get("data", {}).get("text/plain", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    assert "'fm_calls': " in printed
    assert "{text}" in printed
    assert "positive" in printed


@pytest.mark.model
def test_a_chain_of_federated_retriever_prompt_and_model_answers_from_what_it_found() -> None:
    done = subprocess.run(
        [sys.executable, "federated_rag.py"], cwd=EXAMPLES, capture_output=True, text=True, check=True, timeout=250
    )

    leave, keys, flu = (part.split("\n") for part in done.stdout.strip().split("\n  -> ")[:3])
    assert "personnel/leave: Leave: all staff have thirty days" in leave[-1]
    assert "buildings/keys" in keys[-1]
    assert "clinic/flu" in flu[-1]
    assert "Bring your card" not in done.stdout  # the clinic shows no more than the first twelve words
    answers = [line for line in done.stdout.split("\n") if line.startswith("  -> ")]
    assert len(answers) == 3
    assert "30 days" in answers[0]
    assert "porter" in answers[1]
