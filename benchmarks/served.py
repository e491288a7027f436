"""A tuned prompt on the embedded engine and on a server of the same weights: the same answers, the same accuracy?

    promptfed serve smollm2-135m-instruct --port 8700 &
    python benchmarks/served.py runs/demo openai:http://127.0.0.1:8700/v1#smollm2-135m-instruct

Every test text of the run is scored by every prompt of its set, embedded, at the server, and replayed from the journal
of the server's answers. Prints JSON: how far label log-probabilities are apart on average, on which share of texts the
most probable label is the same (of single prompts, and of the set as it predicts), and the accuracies with their paired
difference, its 95% interval by resampling texts (seed 0).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from promptfed.app import read_inputs
from promptfed.fm.journal import RecordingFM, ReplayFM
from promptfed.folder import config_of
from promptfed.prompts.artefact import PromptSet
from promptfed.registry import load_fm


def main() -> None:
    """Score, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("address")
    args = parser.parse_args()
    tuned = PromptSet.load(args.run)
    inputs = read_inputs(config_of(args.run))
    texts = [text for client in inputs.clients for text in client.test.texts]
    truth = np.concatenate([client.test.labels for client in inputs.clients])
    embedded, server = load_fm(f"embedded:{args.address.rpartition('#')[2]}"), load_fm(args.address)
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "journal.jsonl"
        models = {"embedded": embedded, "server": RecordingFM(server, journal)}
        scores = {name: [model.score_labels(p, texts) for p in tuned.prompts] for name, model in models.items()}
        replay = ReplayFM(journal, server.fm_id)
        scores["replay"] = [replay.score_labels(p, texts) for p in tuned.prompts]
    said = {name: np.array(_labels(tuned, per_prompt)) for name, per_prompt in scores.items()}
    right = {name: labels == truth for name, labels in said.items()}
    apart = right["server"].astype(float) - right["embedded"]
    means = np.random.default_rng(0).choice(apart, (2000, len(apart))).mean(axis=1)
    result = {
        "fm": {"embedded": embedded.fm_id, "server": server.fm_id},
        "n_texts": len(texts),
        "n_prompts": len(tuned.prompts),
        "failed": {name: int(sum(s.mask[:, 0].sum() for s in per_prompt)) for name, per_prompt in scores.items()},
        "server_against_embedded": _compared(scores["server"], scores["embedded"], said["server"], said["embedded"]),
        "replay_against_server": _compared(scores["replay"], scores["server"], said["replay"], said["server"]),
        "accuracy": {name: round(float(r.mean()), 4) for name, r in right.items()},
        "difference_points": round(100 * float(apart.mean()), 2),
        "difference_ci95": [round(100 * float(q), 2) for q in np.quantile(means, [0.025, 0.975])],
    }
    json.dump(result, sys.stdout, indent=2)
    print()


def _labels(tuned: PromptSet, per_prompt: list[Any]) -> list[int]:
    """What the set predicts from scores that are there."""
    return [tuned.labels.index(p.label) if p.label is not None else -1 for p in tuned.predict_from(per_prompt)]


def _compared(a: list[Any], b: list[Any], said_a: np.ndarray, said_b: np.ndarray) -> dict[str, Any]:
    return {
        "mean_abs_log_probability": round(float(np.mean([np.abs(x - y).mean() for x, y in zip(a, b, strict=True)])), 4),
        "same_label_by_prompt": [
            round(float((x.argmax(1) == y.argmax(1)).mean()), 4) for x, y in zip(a, b, strict=True)
        ],
        "same_label_of_the_set": round(float((said_a == said_b).mean()), 4),
    }


if __name__ == "__main__":
    main()
