"""What FM and domain models give each other, on sentiment5 (and, where a part begins with topics, on topics6).

    python benchmarks/transfer.py run [--parts labels32 ...] [--seeds 1 2 3 4 5]
    python benchmarks/transfer.py table            # reads benchmarks/results/transfer, no model; prints JSON

- ``labelsN`` (Setting 1): N labelled texts a client, the others unlabelled; 1,000 calls of tuning, then 1,500 in which
  the FM teaches; without any label, a prompt by hand teaches. ``labels32-shuffled``: the same, but what the FM says of
  an unlabelled or public text is what it says of another; ``labels32-random``: the domain models read random vectors;
  ``labels32-alone``: as many calls without domain models, all of them into tuning; ``labels32-turns``: by `co_tune`,
  with the same two controls.
- ``prompts`` and ``prompts-without`` (Setting 2): 500 calls, with and without the domain models' votes;
  ``topics-contrasts`` and ``topics``: 1,000 calls, with and without exemplars for labels that they confuse.
- ``turns`` (Setting 3): all labels, `co_tune` for 2,500 calls.
- ``all``: all labels, 2,500 calls of tuning, and a cascade.

A run is kept in its folder under ``--work`` and goes on where it was stopped; what is measured of it is written to
benchmarks/results/transfer, text by text in bits. Runs of one seed share the FM's answers, which changes no count.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import records

from evaluators.compare import compare
from promptfed.app import read_inputs
from promptfed.config import FM, Config
from promptfed.config import Encoder as Encoding
from promptfed.fm.base import BaseFM, WrappedFM
from promptfed.registry import load_fm
from promptfed.runs import read_summary
from promptfed.types import Encoder, FloatArray, FMRequest, FMResponse, LabelRequest
from retrieval.encoder import load_encoder

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "transfer"
FEW = {"budget.max_fm_calls": 1000, "distillation.max_fm_calls": 1500}
TURNS = {"data.max_labels": 32, "budget.max_fm_calls": 2500, "method.name": "co_tune"}
PARTS: Mapping[str, Mapping[str, Any]] = {
    "labels0": {"data.max_labels": 0, "method.name": "manual_few_shot", **FEW},
    "labels8": {"data.max_labels": 8, **FEW},
    "labels32": {"data.max_labels": 32, **FEW},
    "labels32-shuffled": {"data.max_labels": 32, **FEW},
    "labels32-random": {"data.max_labels": 32, **FEW},
    "labels32-alone": {"data.max_labels": 32, "budget.max_fm_calls": 2500, "method.options.domain_votes": False},
    "labels32-turns": TURNS,
    "labels32-turns-shuffled": TURNS,
    "labels32-turns-random": TURNS,
    "labels128": {"data.max_labels": 128, **FEW},
    "prompts": {"budget.max_fm_calls": 500},
    "prompts-without": {"budget.max_fm_calls": 500, "method.options.domain_votes": False},
    "topics": {"budget.max_fm_calls": 1000},
    "topics-contrasts": {"budget.max_fm_calls": 1000, "method.options.contrasts": True},
    "turns": {"method.name": "co_tune", "budget.max_fm_calls": 2500},
    "all": {"budget.max_fm_calls": 2500, "cascade.target_risk": 0.06, "cascade.max_fm_calls": 1300},
}
# part, arm, less arm: what is asked of the issue, and more that tells.
PAIRS = (
    *((f"labels{n}", "dm_distilled", "dm_local") for n in (0, 8, 32, 128)),
    *(("labels32", "fm_dm", less) for less in ("fm", "dm_local", "dm_distilled")),
    *(("labels32-turns", "fm_dm", less) for less in ("fm", "dm_local")),
    *((f"labels32-{control}", "dm_distilled", "dm_local") for control in ("shuffled", "random")),
    *((f"labels32{way}-{control}", "fm_dm", "fm") for way in ("", "-turns") for control in ("shuffled", "random")),
    *(("all", "fm_dm", less) for less in ("fm", "dm_local")),
    ("all", "cascade", "fm_dm"),
)
# part and less part; arm by arm, and the FM with domain models less the FM without.
AGAINST = (
    ("prompts", "prompts-without"),
    ("topics-contrasts", "topics"),
    ("turns", "all"),
    ("labels32", "labels32-alone"),
    ("labels32-turns", "labels32-alone"),
)
ARMS = ("fm", "fm_single", "fm_dm", "dm_local", "dm_distilled", "cascade")


class ShuffledTeacher(WrappedFM):
    """What it says of one of ``texts`` is what the model says of another of them."""

    def __init__(self, inner: BaseFM, texts: Sequence[str], seed: int) -> None:
        super().__init__(inner)
        order = np.random.default_rng(seed).permutation(len(texts)).tolist()
        self._other = {texts[i]: texts[j] for i, j in zip(order, [*order[1:], *order[:1]], strict=True)}

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        return await self._inner.complete([self._swapped(request) for request in requests])

    def _swapped(self, request: FMRequest) -> FMRequest:
        if not isinstance(request, LabelRequest):
            return request
        text = request.text.strip(" ")
        return replace(request, text=request.text.replace(text, self._other[text])) if text in self._other else request


class RandomEncoder:
    """Unit vectors that have nothing to do with the text, but are the same for the same text."""

    encoder_id = "random"

    def encode(self, texts: Sequence[str]) -> FloatArray:
        draws = [np.random.default_rng(zlib.crc32(text.encode())).normal(size=384) for text in texts]
        vectors = np.array(draws).reshape(-1, 384)
        return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9))


def configured(part: str, seed: int) -> Config:
    overrides = {"seed": seed, "evaluation.baselines": [], **PARTS[part]}
    return records.configured("topics6" if part.startswith("topics") else "sentiment5", overrides)


def models(part: str, config: Config, cache: Path) -> tuple[BaseFM, Encoder]:
    fm, encoder = load_fm(FM().scorer, cache=cache), load_encoder(Encoding().name)
    if part.endswith("-random"):
        return fm, RandomEncoder()
    if part.endswith("-shuffled"):
        inputs = read_inputs(config)
        taught_on = [t.strip(" ") for d in inputs.clients for t in d.unlabelled] + [
            t.strip(" ") for t in inputs.task.public
        ]
        return ShuffledTeacher(fm, [*dict.fromkeys(taught_on)], config.seed), encoder
    return fm, encoder


def measure(part: str, seed: int, work: Path) -> None:
    """Run, unless the record is there; a run that was stopped goes on."""
    record = RESULTS / f"{part}-{seed}.json"
    if record.is_file():
        return
    folder, config = work / f"{part}-{seed}", configured(part, seed)
    print(f"running {folder.name}", file=sys.stderr, flush=True)
    records.kept(folder, config, lambda: models(part, config, work / f"answers-{seed}.sqlite"))
    summary = read_summary(folder)
    arms = [arm for arm in ARMS if arm in summary["metrics"]["accuracy"]]
    kept = {
        "part": part,
        "seed": seed,
        "commit": records.commit(),
        "machine": records.machine(),
        "fm": summary["fm"],
        "accuracy": {arm: summary["metrics"]["accuracy"][arm]["mean"] for arm in arms},
        "stack": summary["stack"],
        "cascade": summary.get("cascade"),
        "calls_per_prediction": {arm: summary["calls_per_prediction"][arm] for arm in arms},
        "fm_calls": {phase: spent["fm_calls"] for phase, spent in summary["ledger"].items()},
        "right": {arm: records.packed(folder, arm) for arm in arms},
    }
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(kept) + "\n")


def table() -> dict[str, Any]:
    """Means by part and arm, and differences paired by text, seeds averaged per text first."""
    known = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    by_part = {part: [r for r in known if r["part"] == part] for part in PARTS}

    def mean(values: list[float]) -> float:
        return round(float(np.mean(values)), 4)

    out: dict[str, Any] = {
        part: {
            "seeds": [r["seed"] for r in found],
            "accuracy": {arm: mean([r["accuracy"][arm] for r in found]) for arm in found[0]["accuracy"]},
            "calls_per_prediction": {
                arm: mean([r["calls_per_prediction"][arm] for r in found]) for arm in found[0]["calls_per_prediction"]
            },
            "cascade": [r["cascade"] for r in found if r["cascade"]],
        }
        for part, found in by_part.items()
        if found
    }
    out["against"] = []
    for a, b in AGAINST:
        both = {r["seed"] for r in by_part[a]} & {r["seed"] for r in by_part[b]}
        with_, without = ([r for r in by_part[part] if r["seed"] in both] for part in (a, b))
        out["against"] += [
            {"part": a, "less": b, "arm": arm, "less_arm": other}
            | asdict(compare(_right(with_, arm), _right(without, other)))
            for arm, other in (("fm", "fm"), ("fm_single", "fm_single"), ("fm_dm", "fm_dm"), ("fm_dm", "fm"))
            if both
        ]
    out["pairs"] = [
        {"part": part, "arm": arm, "less": less, **asdict(compare(*(_right(found, name) for name in (arm, less))))}
        for part, arm, less in PAIRS
        if (found := by_part[part])
    ]
    return out


def _right(found: Sequence[Mapping[str, Any]], arm: str) -> dict[str, FloatArray]:
    return records.right(found, arm, apart=found[0]["part"].startswith("topics"))


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run", "table"], default="table")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "transfer")
    args = parser.parse_args()
    if args.what == "run":
        for seed in args.seeds:
            for part in args.parts:
                measure(part, seed, args.work)
    else:
        print(json.dumps(table(), indent=2))


if __name__ == "__main__":
    main()
