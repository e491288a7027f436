"""All methods on one planted landscape, to 50,000 FM calls, for those that need many.

    python benchmarks/landscape.py [--methods ...] [--seeds 1 2 3] [--calls 50000]

The foundation model here has no weights: the nearer a prompt is to what was planted, the surer it is of the right
label. There is something for every kind of prompt: a place for soft prompts, words for n-grams and instructions, words
of the task for exemplars. So it says how fast a method climbs, and nothing about language. Prints JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from methods_tables import ARMS, BASELINES, FEDERATED

from promptfed.app import run
from promptfed.fm.base import BaseFM
from promptfed.fm.scripted import hash_noise
from promptfed.prompts.soft import vectors_of
from promptfed.types import Capability, FMRequest, FMResponse, LabelRequest, SoftSpace, TextRequest

RESULTS = Path(__file__).parent / "results" / "landscape.json"
MILESTONES = (500, 1000, 2500, 5000, 10_000, 25_000)
NEED_MANY = ("fedbpt", "fedavg_bbt", "fedone_bdpl", "fedone_gs_bdpl")
GOOD = ("wonderful", "superb", "lovely", "brilliant", "charming", "splendid", "delightful", "graceful")
BAD = ("dreadful", "boring", "horrid", "clumsy", "tedious", "stale", "dismal", "shabby")
THINGS = ("film", "story", "cast", "music", "plot", "ending", "scene", "dialogue")
PLANTED = ("mood", "verdict", "critic", "feeling")
_WORD = re.compile(r"[a-z]+")


class Landscape(BaseFM):
    """Margin of the right label: 3 x quality of the prompt, against noise of two standard deviations and a bias of the
    prompt. Quality, in [0, 1], is the best of three parts: nearness of a soft prompt's mean to a planted point, share
    of the planted words before the form, share of the task's words that stand in exemplars under their own label."""

    fm_id = "landscape@1"
    capabilities = frozenset({Capability.TEXT, Capability.LABEL_LOGPROBS, Capability.PROMPT_EMBEDS})
    soft_space = SoftSpace(hidden=16, std=1.0)
    in_process = True

    def __init__(self) -> None:
        self._place = np.random.default_rng(7).normal(size=16)

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        return [self._write(r) if isinstance(r, TextRequest) else self._score(r) for r in requests]

    def _write(self, request: TextRequest) -> FMResponse:
        """A short text of the task, or a sentence with a planted word: what was asked does not matter much."""
        rng = np.random.default_rng([request.seed, *request.prompt.encode()[-40:]])
        words = [*GOOD, *BAD] if rng.random() < 0.5 else [*PLANTED, *THINGS]
        text = f" The {rng.choice(THINGS)} was {rng.choice(words)}."
        return FMResponse(text=text, prompt_tokens=len(request.prompt.split()), completion_tokens=5)

    def _score(self, request: LabelRequest) -> FMResponse:
        said = set(_WORD.findall(request.text.lower()))
        signal = len(said & set(GOOD)) - len(said & set(BAD))
        margin = (
            3.0 * self._quality(request) * signal
            + hash_noise(request.prefix)
            + hash_noise(request.prefix, request.text)
        )
        logits = np.array([margin if _is_good(label) else 0.0 for label in request.labels])
        logp = logits - np.logaddexp.reduce(logits)
        n_tokens = len(request.prefix.split()) + len(request.text.split())
        return FMResponse(logprobs=tuple(logp.tolist()), prompt_tokens=n_tokens, completion_tokens=1)

    def _quality(self, request: LabelRequest) -> float:
        *exemplars, _ = [b for b in request.prefix.lower().split("\n\n") if b] or [""]
        shown = [b for b in exemplars if "\n" in b]
        plain = set(_WORD.findall(" ".join(b for b in exemplars if "\n" not in b)))
        parts = [len(plain & set(PLANTED)) / len(PLANTED)]
        held = {w for b in shown for w in _WORD.findall(b) if w in (GOOD if _is_good(b.split()[-1]) else BAD)}
        parts.append(len(held) / 6)
        if request.soft is not None:
            away = float(((vectors_of(request.soft).mean(axis=0) - self._place) ** 2).mean())
            parts.append(float(np.exp(-away)))
        return min(max(parts), 1.0)


def _is_good(label: str) -> bool:
    return label.strip().lower() == "positive" or label.strip().lower() in GOOD


def write_data(folder: Path, n_clients: int = 5, n_train: int = 400, n_test: int = 200) -> None:
    """Made-up reviews: train.csv, test.csv, public.csv."""
    rng = np.random.default_rng(0)

    def text(label: int) -> str:
        return f"The {rng.choice(THINGS)} and the {rng.choice(THINGS)} seemed {rng.choice(GOOD if label else BAD)}."

    for part, n in (("train", n_train), ("test", n_test)):
        with (folder / f"{part}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["client", "text", "label"])
            for c in range(n_clients):
                writer.writerows([f"client{c}", text(i % 2), ("negative", "positive")[i % 2]] for i in range(n))
    with (folder / "public.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text"])
        writer.writerows([text(i % 2)] for i in range(100))
        writer.writerows([f"The {word} of the {thing}."] for word in PLANTED for thing in THINGS)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=[*FEDERATED, *BASELINES], default=NEED_MANY)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--calls", type=int, default=50_000)
    args = parser.parse_args()
    known: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    with TemporaryDirectory() as made:
        write_data(Path(made))
        for method in args.methods:
            for seed in args.seeds:
                if str(seed) in known.get(method, {}):
                    continue
                print(f"{method}, seed {seed}", file=sys.stderr, flush=True)
                config = {
                    "seed": seed,
                    "data": {part: f"{made}/{part}.csv" for part in ("train", "test", "public")},
                    "task": {"labels": ["negative", "positive"], "instruction": "Is the review good?"},
                    "method": {"name": method},
                    "budget": {
                        "max_fm_calls": args.calls,
                        "milestones": [m for m in MILESTONES if m < args.calls],
                    },
                    "evaluation": {"baselines": []},
                }
                readings = run(config, fm=Landscape()).summary["readings"]
                at = {
                    str(r["milestone"]): {arm: round(r["metrics"]["accuracy"][arm]["mean"], 4) for arm in ARMS}
                    for r in readings
                }
                known.setdefault(method, {})[str(seed)] = at
                RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    print(json.dumps(known, indent=1))


if __name__ == "__main__":
    main()
