"""All methods on equal terms: one run a method and seed, read at several numbers of FM calls.

    python benchmarks/methods.py trials [--methods ...]                # options, chosen on a part of train
    python benchmarks/methods.py run [--data ...] [--methods ...] [--seeds 1 2 3] [--calls 2500]
    python benchmarks/methods.py table                                  # reads benchmarks/results/methods, no model
    python benchmarks/methods.py --quick                                # three minutes, for CI

Every method has the same FM, split, exemplar pool, label words, share of calls and calibration on offer, returns its
three best prompts, and had the same number of trials of its options. A run is kept in its folder under ``--work`` and
goes on where it was stopped; what is measured of it is written to benchmarks/results/methods, so that the tables can be
made again. `table` prints JSON and writes docs/methods.md's table and picture.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import records
from methods_tables import (
    ARMS,
    BASELINES,
    CALLS,
    DATA,
    FEDERATED,
    MILESTONES,
    PERSONAL,
    write_tables,
)

from promptfed.config import FM, Config
from promptfed.config import Encoder as Encoding
from promptfed.errors import DataError
from promptfed.federation.events import read_events
from promptfed.fm.base import BaseFM
from promptfed.registry import load_fm
from promptfed.runs import read_summary
from promptfed.types import Encoder
from retrieval.encoder import SentenceEncoder

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "methods"
PAGE = ROOT / "docs" / "methods" / "benchmark.md"
N_VALID = 300
TUNED_ON = "sentiment5"
# The hand-written prompt of topics6, as that of sentiment5 is: the labels, and an exemplar of two of them.
MANUAL_TOPICS = (
    "Classify the topic of the text as cars, computers, medicine, politics, space or sports.\n\n"
    "Text: our team won the game last night\nTopic: sports\n\n"
    "Text: my printer does not work\nTopic: computers\n\n"
    "Text: {text}\nTopic:"
)
# Other settings of each method's options than its defaults, tried on a part of train: three trials a method in all.
TRIALS: dict[str, tuple[dict[str, Any], ...]] = {
    "race": ({"first_texts": 15}, {"first_texts": 40}),
    "fedpob": ({"kind": "duelling"}, {"n_arms": 40, "exploration": 2.0}),
    "fed_gepa": ({"n_texts": 15}, {"start_share": 0.35}),
    "fed_icl": ({"n_shots": 1, "max_exemplars": 1}, {"relabel_share": 0.2}),
    "aug_pe": ({"n_rounds": 1}, {"n_winners": 4}),
    "dp_opt_vote": ({"vote_share": 0.15}, {"n_instructions": 2, "n_words": 5}),
    "fedone_bdpl": ({"learning_rate": 8.0}, {"n_slots": 3, "n_ngrams": 20}),
    "fedone_gs_bdpl": ({"temperature": 0.5}, {"n_slots": 3, "n_ngrams": 20}),
    "fedbpt": ({"sigma": 0.5}, {"n_texts": 10}),
    "fedavg_bbt": ({"sigma": 0.5}, {"n_texts": 10}),
    "fedtextgrad": ({"merge": "structured"}, {"n_examples": 3, "n_reflecting": 2}),
}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["trials", "run", "table"], default="table")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data", nargs="+", choices=DATA, default=[*DATA])
    parser.add_argument("--methods", nargs="+", default=[*FEDERATED, *BASELINES])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--calls", type=int, default=CALLS)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "methods")
    args = parser.parse_args()
    if args.quick:
        print(json.dumps(quick(args.work / "quick"), indent=2))
    elif args.what == "trials":
        for method in args.methods:
            trial(method, args.work / "trials")
    elif args.what == "run":
        for seed in args.seeds:
            for data in args.data:
                for method in args.methods:
                    measure(data, method, seed, args.calls, args.work)
    else:
        print(json.dumps(write_tables(RESULTS, PAGE), indent=2))


# ------------------------------------------------------------------------------------------------ running


def configured(
    data: str, method: str, seed: int, calls: int, options: dict[str, Any] | None = None, **changes: Any
) -> Config:
    """The configuration of one run. ``options`` of the method in place of those that the trials chose."""
    options = chosen_options(data, method) if options is None else options
    # A tenth of 500 calls is too few for race alone at a client.
    least = 1000 if (data, method) == ("topics6", "local_only") else 0
    milestones = [m for m in (*MILESTONES, CALLS) if least <= m < calls]
    overrides = {
        "seed": seed,
        "method.name": method,
        "budget.max_fm_calls": calls,
        "budget.milestones": milestones,
        "evaluation.baselines": [],
        **{f"method.options.{name}": value for name, value in options.items()},
        **changes,
    }
    return records.configured(data, overrides)


def measure(data: str, method: str, seed: int, calls: int, work: Path) -> None:
    """Run, unless the record is there; a run that was stopped goes on."""
    record = RESULTS / data / f"{method}-{seed}.json"
    if record.is_file() and json.loads(record.read_text())["max_fm_calls"] >= calls:
        return
    folder = work / f"{data}-{method}-{seed}-{calls}"
    print(f"running {folder.name}", file=sys.stderr, flush=True)
    records.kept(folder, configured(data, method, seed, calls), models)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(recorded(folder, data, method, seed)) + "\n")


@cache
def models() -> tuple[BaseFM, Encoder]:
    """The foundation model and the encoder of all runs, loaded once."""
    return load_fm(FM().scorer), SentenceEncoder(Encoding().name)


def recorded(folder: Path, data: str, method: str, seed: int) -> dict[str, Any]:
    """What is kept of a run: what was spent by each milestone, and by arm and client which texts were answered rightly
    (bits, texts sorted by hash, in hexadecimal)."""
    summary = read_summary(folder)
    names = [r["milestone"] for r in summary["readings"]]
    arms = [f"{arm}@{m}" for m in names for arm in (*ARMS, *PERSONAL)]
    return {
        "data": data,
        "method": method,
        "seed": seed,
        "options": chosen_options(data, method),
        "max_fm_calls": summary["max_fm_calls"],
        "commit": records.commit(),
        "machine": records.machine(),
        "fm": summary["fm"],
        "readings": summary["readings"],
        "n_clients": summary["n_clients"],
        "bytes_up_a_round": _round_bytes(folder),
        "seconds": {phase: ledger["wall_s"] for phase, ledger in summary["ledger"].items()},
        "right": {arm: packed for arm in arms if (packed := _packed(folder, arm))},
    }


def _round_bytes(folder: Path) -> dict[str, int]:
    """By kind of round of tuning: the most that a client sent up in one, on average over the clients asked."""
    most: dict[str, int] = {}
    for event in read_events(folder / "events.jsonl"):
        if event["kind"] == "round" and event["phase"] == "tuning":
            sent = -(-event["bytes_up"] // max(event["n_clients"], 1))
            most[event["name"]] = max(most.get(event["name"], 0), sent)
    return most


def _packed(folder: Path, arm: str) -> dict[str, Any] | None:
    try:
        return records.packed(folder, arm)
    except DataError:  # a method that has no such arm
        return None


# ------------------------------------------------------------------------------------------------ trials


def trial(method: str, work: Path) -> None:
    """Try each setting of a method's options once, on a part of `TUNED_ON`'s train, and keep the best by the mean over
    arms on `N_VALID` other texts of it. The choice holds for every data set."""
    settings = [{}, *TRIALS.get(method, ())]
    if len(settings) == 1:
        return
    folder = _split_train(work)
    scores = []
    for i, options in enumerate(settings):
        to = work / f"{TUNED_ON}-{method}-{i}"
        changes: dict[str, Any] = {f"data.{part}": str(folder / f"{part}.csv") for part in ("train", "test")}
        print(f"trying {to.name} {options}", file=sys.stderr, flush=True)
        records.kept(to, configured(TUNED_ON, method, 0, 1000, options, **changes, **{"budget.milestones": []}), models)
        accuracy = read_summary(to)["metrics"]["accuracy"]
        scores.append(float(np.mean([accuracy[arm]["mean"] for arm in ("fm", "fm_pooled", "fm_single")])))
    best = int(np.argmax(scores))
    path = RESULTS / "options.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    tried = [{"options": s, "accuracy": round(a, 4)} for s, a in zip(settings, scores, strict=True)]
    known[method] = {"chosen": settings[best], "tried": tried}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def chosen_options(data: str, method: str) -> dict[str, Any]:
    """What the trials chose; the defaults where there were none."""
    if (data, method) == ("topics6", "manual_few_shot"):
        return {"prompt": MANUAL_TOPICS}
    path = RESULTS / "options.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    options: dict[str, Any] = known.get(method, {}).get("chosen", {})
    return options


def _split_train(work: Path) -> Path:
    """Train once more in two: `N_VALID` texts (test.csv) to choose options by, the rest to tune on."""
    folder = work / TUNED_ON
    if not (folder / "test.csv").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        rows = _rows(records.DEMO.parent / "train.csv.gz")
        held = np.random.default_rng(0).permutation(len(rows)) < N_VALID
        for name, wanted in (("train", False), ("test", True)):
            with (folder / f"{name}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(row for row, is_held in zip(rows, held, strict=True) if is_held == wanted)
    return folder


# ------------------------------------------------------------------------------------------------ quick


def quick(work: Path) -> dict[str, Any]:
    """A few methods with small budgets on a part of sentiment5: that all of it runs, not who is ahead."""
    shutil.rmtree(work, ignore_errors=True)
    (work / "results" / "sentiment5").mkdir(parents=True)
    for part, n in (("train", 40), ("test", 16)):
        rows = _rows(records.DEMO.parent / f"{part}.csv.gz")
        with (work / f"{part}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            for client in sorted({row["client"] for row in rows}):
                writer.writerows([row for row in rows if row["client"] == client][:n])
    changes: dict[str, Any] = {f"data.{part}": str(work / f"{part}.csv") for part in ("train", "test")}
    changes |= {"budget.milestones": [420]}
    for method in ("race", "fedpob", "fedone_bdpl", "fedbpt", "zero_shot"):
        records.kept(work / method, configured("sentiment5", method, 1, 450, **changes), models)
        record = recorded(work / method, "sentiment5", method, 1)
        (work / "results" / "sentiment5" / f"{method}-1.json").write_text(json.dumps(record) + "\n")
    return write_tables(work / "results", work / "benchmark.md")


# ------------------------------------------------------------------------------------------------ helpers


def _rows(path: Path) -> list[dict[str, str]]:
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    return list(csv.DictReader(text.splitlines(keepends=True)))


if __name__ == "__main__":
    main()
