"""The main job, measured: sentiment5 over seeds against every baseline, and the unchanged code on topics6.

    python benchmarks/main_job.py [--seeds 1 2 3] [--topics6 DIR [--only-topics6]] [--work DIR] [--test other-test.csv]

Prints JSON: one entry a row of the claim, with what was asked, what was measured and whether it holds. Each run is kept
in its own folder and not run again, so a measurement that was stopped goes on where it was. Accuracy is the mean over
clients; seeds are averaged per text, then texts are resampled within clients.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from evaluators.compare import Comparison, compare, mean_interval
from promptfed.app import run
from promptfed.config import load_config
from promptfed.runs import compare_runs, correctness, read_summary

DEMO = Path(__file__).parent.parent / "examples" / "sentiment5" / "demo.toml"
ALL = '["zero_shot", "manual_few_shot", "local_only", "dm_fedavg", "centralised"]'
MAX_CALLS, MAX_TUNING_S, MAX_BYTES_UP = 2500, 120.0, 64 * 1024


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--topics6", type=Path, help="folder with train.csv and test.csv; left out without it")
    parser.add_argument("--only-topics6", action="store_true", help="leave sentiment5 out")
    parser.add_argument("--work", type=Path, default=Path("runs/main_job"))
    parser.add_argument("--test", type=Path, help="other held-out texts of sentiment5")
    args = parser.parse_args()

    overrides = [f"evaluation.baselines={ALL}"] + ([f'data.test="{args.test.resolve()}"'] if args.test else [])
    rows = []
    if not args.only_topics6:
        sentiment = [_kept(args.work / f"sentiment5-{s}", DEMO, [f"seed={s}", *overrides]) for s in args.seeds]
        rows += sentiment_rows(sentiment)
    if args.topics6:
        config = {
            "data": {k: str((args.topics6 / f"{k}.csv").resolve()) for k in ("train", "test")},
            "partition": {"clients": 10, "alpha": 0.5},
            "task": {"instruction": "Classify the topic of the text."},
            "evaluation": {"baselines": ["zero_shot", "local_only"]},
        }
        topics = [_kept(args.work / f"topics6-{s}", config, [f"seed={s}"]) for s in args.seeds]
        rows += topics_rows(topics)
    machine = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
    }
    print(json.dumps({"seeds": args.seeds, "machine": machine, "rows": rows}, indent=2))


def sentiment_rows(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """The rows of the claim that sentiment5 decides."""

    def versus(a: str, b: str) -> Comparison:
        return compare_runs(runs, runs, a, b)

    fm, single, pooled, both = (_mean(runs, arm) for arm in ("fm", "fm_single", "fm_pooled", "fm_dm"))
    over_raw, over_calibrated = versus("fm", "manual_few_shot"), versus("fm", "manual_few_shot_calibrated")
    pooled_over_raw = versus("fm_pooled", "manual_few_shot")
    over_fm, over_dm = versus("fm_dm", "fm"), versus("fm_dm", "dm_local")
    over_local, over_central = versus("fm", "local_only"), versus("fm", "centralised")
    summaries = [read_summary(run) for run in runs]
    ledgers = [s["ledger"]["tuning"] for s in summaries]
    calls = max(ledger["fm_calls"] for ledger in ledgers)
    seconds = [ledger["wall_s"] for ledger in ledgers]
    bytes_up = max(account["bytes_up"] for ledger in ledgers for account in ledger["by_client"].values())
    arms = {arm: _mean(runs, arm) for arm in summaries[0]["metrics"]["accuracy"]}
    return [
        _row("fm", ">= 0.860 (aim 0.880)", fm, fm["mean"] >= 0.860),
        _row("fm over raw manual_few_shot", ">= 3 points", _points(over_raw), over_raw.difference >= 0.03),
        _row(
            "fm over calibrated manual_few_shot",
            ">= 3 points",
            _points(over_calibrated),
            over_calibrated.difference >= 0.03,
        ),
        _row("fm_single", ">= 0.850", single, single["mean"] >= 0.850),
        _row("fm_pooled", ">= 0.845", pooled, pooled["mean"] >= 0.845),
        _row("fm_pooled over raw manual_few_shot", "> 0", _points(pooled_over_raw), pooled_over_raw.difference > 0),
        _row("fm_dm", ">= 0.890 (aim 0.905)", both, both["mean"] >= 0.890),
        _row("fm_dm over fm", "p < 0.05", _points(over_fm), over_fm.difference > 0 and over_fm.p_value < 0.05),
        _row("fm_dm over dm_local", "p < 0.05", _points(over_dm), over_dm.difference > 0 and over_dm.p_value < 0.05),
        _row("FM calls of tuning", f"<= {MAX_CALLS}", calls, calls <= MAX_CALLS),
        _row("fm over local_only", "lower bound > 0", _points(over_local), over_local.ci95[0] > 0),
        _row("fm against centralised", "lower bound > -2 points", _points(over_central), over_central.ci95[0] > -0.02),
        _row("wall time of tuning, s", f"<= {MAX_TUNING_S:g}", seconds, max(seconds) <= MAX_TUNING_S),
        _row("bytes up, the largest client", f"<= {MAX_BYTES_UP}", bytes_up, bytes_up <= MAX_BYTES_UP),
        _row("all arms", "", arms, None),
    ]


def topics_rows(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """The rows that topics6 decides."""
    over_zero, over_local = _over(runs, "zero_shot"), _over(runs, "local_only")
    return [
        _row("topics6: fm over zero_shot", "lower bound > 0", _points(over_zero), over_zero.ci95[0] > 0),
        _row("topics6: fm over local_only", "lower bound > 0", _points(over_local), over_local.ci95[0] > 0),
        _row("topics6: accuracy by seed", "", [_means(run) for run in runs], None),
    ]


def _over(runs: Sequence[Path], arm: str) -> Comparison:
    """fm against ``arm``. Seeds partition topics6 differently: a client of one seed is a stratum of its own."""
    a = {f"{run.name}/{c}": v for run in runs for c, v in correctness([run], "fm").items()}
    b = {f"{run.name}/{c}": v for run in runs for c, v in correctness([run], arm).items()}
    return compare(a, b)


def _kept(folder: Path, config: Any, overrides: list[str]) -> Path:
    """Run into ``folder`` unless a finished run is there."""
    if not (folder / "summary.json").is_file():
        if folder.exists():
            shutil.rmtree(folder)
        print(f"running {folder.name}", file=sys.stderr, flush=True)
        run(load_config(config, overrides), out=folder)
    return folder


def _mean(runs: Sequence[Path], arm: str) -> dict[str, Any]:
    mean, ci95 = mean_interval(correctness(runs, arm))
    return {"mean": round(mean, 4), "ci95": [round(x, 4) for x in ci95], "by_seed": [_means(r)[arm] for r in runs]}


def _means(run_folder: Path) -> dict[str, float]:
    return {arm: round(v["mean"], 4) for arm, v in read_summary(run_folder)["metrics"]["accuracy"].items()}


def _points(c: Comparison) -> dict[str, Any]:
    return {
        "points": round(100 * c.difference, 2),
        "ci95": [round(100 * x, 2) for x in c.ci95],
        "p": c.p_value,
        "n_texts": c.n_texts,
    }


def _row(what: str, asked: str, measured: Any, holds: bool | None) -> dict[str, Any]:
    return {"what": what, "asked": asked, "measured": measured, "holds": None if holds is None else bool(holds)}


if __name__ == "__main__":
    main()
