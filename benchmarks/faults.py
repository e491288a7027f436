"""Runs that are killed and runs whose partners fail, counted and compared with undisturbed ones.

    python -m benchmarks.faults [--kills 20] [--seeds 40] [--network-kills 0] [--work runs/faults]

Prints JSON. *kill and resume*: the demo's data with a small budget on the embedded FM; the process is killed (SIGKILL)
at random moments and resumed; prompt and event log must have the same bytes, times aside. *failing clients*: the
scripted FM, ten clients; in every round three of them, drawn anew, fail (no answer, lost reply, rubbish); the accuracy
of the pooled prompt on made-up held-out texts is compared in pairs with the same seeds undisturbed. *network kills* (in
the environment with Flower): five clients and a server as processes with the scripted FM; one of them, drawn at random,
is killed at a random moment and started again. Kills that were measured are kept in the work folder and not measured
again.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from promptfed.errors import QuorumError
from promptfed.federation.events import read_events, timeless
from promptfed.messages import decode_task
from promptfed.strategies.race import Race
from tests.support import DEMO, bench, demo_rows, pooled_accuracy, public_texts

FAILURES, BUDGET, TEST_TEXTS = 0.3, 1000, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--network-kills", type=int, default=0, help="needs the extra flower")
    parser.add_argument("--work", type=Path, default=Path("runs/faults"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    measured: dict[str, Any] = {}
    if args.seeds:
        measured["failing_clients"] = failing_clients(args.seeds)
    if args.kills:
        measured["kill_and_resume"] = kill_and_resume(args.kills, args.work)
    if args.network_kills:
        measured["network_kills"] = network_kills(args.network_kills, args.work / "network")
    print(json.dumps(measured, indent=2))


# ------------------------------------------------------------------------------------------------ kill and resume


def kill_and_resume(n_kills: int, work: Path) -> dict[str, Any]:
    config = small_config(work)
    whole = work / "whole"
    took_path = work / "took.txt"
    if not took_path.exists():
        shutil.rmtree(whole, ignore_errors=True)
        start = perf_counter()
        subprocess.run([*command("run", config), "--out", str(whole)], check=True, stdout=subprocess.DEVNULL)
        took_path.write_text(str(perf_counter() - start))
    took = float(took_path.read_text())
    rows = []
    for i in range(n_kills):
        folder, kept = work / f"kill{i:02d}", work / f"kill{i:02d}.json"
        if not kept.exists():
            # The first second or two is imports: there is no run to kill yet.
            after = float(np.random.default_rng([1, i]).uniform(2.0, took))
            kept.write_text(json.dumps({"killed_after_s": round(after, 2), **one_kill(config, folder, after, whole)}))
            shutil.rmtree(folder, ignore_errors=True)
        rows.append(json.loads(kept.read_text()))
    return {"undisturbed_s": round(took, 1), "same_bytes": sum(r["same"] for r in rows), "of": len(rows), "rows": rows}


def one_kill(config: Path, folder: Path, after: float, whole: Path) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    process = subprocess.Popen([*command("run", config), "--out", str(folder)], stdout=subprocess.DEVNULL)
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    begun = (folder / "config.toml").exists()
    again = command("resume", folder) if begun else [*command("run", config), "--out", str(folder), "--force"]
    done = subprocess.run(again, check=False, stdout=subprocess.DEVNULL)
    n_events = len(read_events(folder / "events.jsonl")) if done.returncode == 0 else 0
    return {"same": done.returncode == 0 and outcome(folder) == outcome(whole), "begun": begun, "n_events": n_events}


def outcome(folder: Path) -> tuple[bytes, list[dict[str, Any]]]:
    return (folder / "prompt.json").read_bytes(), list(map(timeless, read_events(folder / "events.jsonl")))


def command(verb: str, path: Path) -> list[str]:
    return [sys.executable, "-m", "promptfed.cli", verb, str(path)]


def small_config(work: Path) -> Path:
    """The demo with fewer calls and fewer held-out texts."""
    rows = demo_rows("test")
    n: dict[str, int] = {}
    with (work / "test.csv").open("w", encoding="utf-8", newline="") as file:
        out = csv.DictWriter(file, list(rows[0]))
        out.writeheader()
        for row in rows:
            n[row["client"]] = n.get(row["client"], 0) + 1
            if n[row["client"]] <= TEST_TEXTS:
                out.writerow(row)
    path = work / "config.toml"
    path.write_text(
        f"""seed = 1
[data]
train = "{(DEMO / "train.csv.gz").resolve()}"
test = "{(work / "test.csv").resolve()}"
public = "{(DEMO / "public.csv.gz").resolve()}"
[task]
labels = ["negative", "positive"]
instruction = "Classify the sentiment of the text."
[budget]
max_fm_calls = 300
[evaluation]
baselines = ["zero_shot"]
"""
    )
    return path


def network_kills(n_kills: int, work: Path) -> dict[str, Any]:
    from tests.place import SITES, Place

    shutil.rmtree(work / "keys", ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    place = Place(work.resolve())
    place.prepare()
    try:
        start = perf_counter()
        remove(place, "calm")
        place.undisturbed("calm")
        took = perf_counter() - start
        rows = []
        for i in range(n_kills):
            kept = work / f"kill{i:02d}.json"
            if not kept.exists():
                rng = np.random.default_rng([2, i])
                who, after = str(rng.choice(["server", *SITES])), float(rng.uniform(2.0, took))
                run = f"kill{i:02d}"
                remove(place, run)
                place.begin(run)
                time.sleep(after)
                if place.running[who].poll() is None:
                    place.kill(who)
                    place.start_server(run) if who == "server" else place.start_client(who, run)
                place.wait_for_end(run, 600)  # one killed while it sends a reply: Flower waits 180 s for the rest
                place.stop()
                same = place.outcome(run) == place.outcome("calm") and place.events(run) == place.events("calm")
                paid_twice = place.calls(run) - place.calls("calm")
                kept.write_text(
                    json.dumps({"killed": who, "after_s": round(after, 1), "same": same, "paid_twice": paid_twice})
                )
            rows.append(json.loads(kept.read_text()))
    finally:
        place.stop()
    return {"undisturbed_s": round(took, 1), "same_bytes": sum(r["same"] for r in rows), "of": len(rows), "rows": rows}


def remove(place: Any, run: str) -> None:
    """What an earlier measurement left of ``run``."""
    for old in place.folder.glob(f"{run}*"):
        if not old.name.endswith(".json"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()


# ------------------------------------------------------------------------------------------------ failing clients


class Failing:
    """A transport on which a share `FAILURES` of the clients, drawn anew, fails in every round."""

    def __init__(self, inner: Any, seed: int) -> None:
        self._inner, self._seed = inner, seed
        self.n_failed = self.n_asked = 0

    async def exchange(
        self,
        tasks: Mapping[str, bytes],
        awaited: Collection[str],  # noqa: ARG002  (all that are reached answer)
        deadline_s: float | None,
    ) -> dict[str, bytes]:
        number = decode_task(next(iter(tasks.values()))).round
        rng = np.random.default_rng([self._seed, number])
        clients = sorted(tasks)
        failing = rng.choice(clients, size=round(FAILURES * len(clients)), replace=False)
        fate = {c: str(rng.choice(["lost", "silent", "rubbish"])) if c in failing else "" for c in clients}
        self.n_asked += len(fate)
        self.n_failed += sum(map(bool, fate.values()))
        reached = {c: task for c, task in tasks.items() if fate[c] != "lost"}
        replies = await self._inner.exchange(reached, list(reached), deadline_s)
        return {c: r[: len(r) // 2] if fate[c] == "rubbish" else r for c, r in replies.items() if fate[c] != "silent"}


def failing_clients(n_seeds: int) -> dict[str, Any]:
    rows = []
    for seed in range(n_seeds):
        calm, _ = one_run(seed, fail=False)
        rough, share = one_run(seed, fail=True)
        rows.append({"seed": seed, "undisturbed": calm, "failing": rough, "share_failed": share})
    ended = [r for r in rows if r["failing"] is not None]
    diff = np.array([r["failing"] - r["undisturbed"] for r in ended])
    half = 1.96 * diff.std(ddof=1) / np.sqrt(len(diff)) if len(diff) > 1 else float("nan")
    return {
        "ended": len(ended),
        "of": len(rows),
        "undisturbed": round(float(np.mean([r["undisturbed"] for r in rows])), 4),
        "failing": round(float(np.mean([r["failing"] for r in ended])), 4),
        "difference_points": round(100 * float(diff.mean()), 2),
        "ci95_points": [round(100 * float(diff.mean() - half), 2), round(100 * float(diff.mean() + half), 2)],
        "rows": rows,
    }


def one_run(seed: int, *, fail: bool) -> tuple[float | None, float]:
    """Accuracy of the pooled prompt on fresh texts, and the share of tasks that failed."""
    faulty: list[Failing] = []

    def wrap(inner: Any) -> Any:
        faulty.append(Failing(inner, seed))
        return faulty[0] if fail else inner

    scene = bench(10, 40, n_words=2, seed=seed, public=public_texts(n_words=2), max_fm_calls=BUDGET, wrap=wrap)
    try:
        prompt = scene.drive(Race().run(scene.federation()), BUDGET)
    except QuorumError:
        return None, 0.0
    share = faulty[0].n_failed / max(faulty[0].n_asked, 1)
    return pooled_accuracy(prompt, 400, seed=10_000 + seed), round(share, 3)


if __name__ == "__main__":
    main()
