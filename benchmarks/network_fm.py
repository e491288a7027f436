"""A federation over Flower with the real FM behind `promptfed serve`, against the same run in one process.

    .venv-flower/bin/python -m benchmarks.network_fm [--calls 500] [--texts 200] [--work runs/network_fm]

Five sites with the demo's texts, `promptfed client` at each. The FM's answers move in their last digits with the batch
they are computed in, so the two runs may choose different prompts. Prints JSON: accuracy on held-out texts, paired.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

from promptfed.runs import compare_runs, read_summary
from tests.place import RealPlace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=500, help="budget of tuning")
    parser.add_argument("--texts", type=int, default=200, help="held-out texts a client, at most")
    parser.add_argument("--work", type=Path, default=Path("runs/network_fm"))
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    place = RealPlace(args.work.resolve(), n_train=400, n_test=args.texts, n_public=1000, budget=args.calls)
    place.prepare()
    start = perf_counter()
    place.undisturbed("real", 3600)
    network_s, start = perf_counter() - start, perf_counter()
    simulated = place.simulate()
    simulated_s = perf_counter() - start
    runs = [place.gather("real")], [place.folder / "simulated"]
    summary = read_summary(place.folder / "real")
    print(
        json.dumps(
            {
                "machine": platform.platform(),
                "fm": summary["fm"],
                "calls": args.calls,
                "same_prompts": summary["prompt_id"] == simulated.prompt.prompt_id,
                "network_s": round(network_s, 1),
                "simulated_s": round(simulated_s, 1),
                "paired": {arm: asdict(compare_runs(*runs, arm)) for arm in ("fm", "fm_pooled", "fm_single", "fm_dm")},
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
