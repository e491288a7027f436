"""What `benchmarks/methods.py` measured, as tables, rows of the claim and a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import records as records_of

from evaluators.compare import Comparison, compare, mean_interval
from promptfed.registry import load_method
from promptfed.types import FloatArray

DATA = ("sentiment5", "topics6")
# Dealt out to clients by a Dirichlet distribution: differently in each seed, and some clients get a handful of texts.
DEALT_OUT = "topics6"
BELOW = "<!-- What is below is written by benchmarks/methods.py table. -->"
CALLS, MILESTONES = 2500, (500, 1000)
LONG = 5000
FLAGSHIP = "race"
FEDERATED = (
    "race",
    "fedpob",
    "fed_gepa",
    "fed_icl",
    "aug_pe",
    "dp_opt_vote",
    "fedone_bdpl",
    "fedone_gs_bdpl",
    "fedbpt",
    "fedavg_bbt",
    "fedtextgrad",
)
BASELINES = ("zero_shot", "manual_few_shot", "local_only", "centralised")
# Set of three and its best prompt alone, under the clients' own calibration and under the pooled one.
ARMS = ("fm", "fm_pooled", "fm_single", "fm_single_pooled")
PERSONAL = ("fm_personal",)

PerText = dict[str, FloatArray]


def records(results: Path, data: str) -> list[dict[str, Any]]:
    """All that was measured on one data set."""
    return [json.loads(path.read_text()) for path in sorted((results / data).glob("*.json"))]


def right(found: Sequence[Mapping[str, Any]], arm: str) -> PerText:
    """1 where an arm was right, by client, (n_seeds, n_texts). Where seeds deal texts out differently (topics6), a
    client of one seed is a stratum of its own."""
    return records_of.right(found, arm, apart=found[0]["data"] == DEALT_OUT)


def paired(
    found: Sequence[Mapping[str, Any]], a: tuple[str, str], b: tuple[str, str], over: str = "clients"
) -> Comparison | None:
    """(method, arm) ``a`` against ``b`` on the seeds that both were run with: the mean ``over`` clients, or over texts
    (then a client with three of them no longer weighs as much as one with a hundred)."""
    have = [{r["seed"]: r for r in found if r["method"] == method and arm in r["right"]} for method, arm in (a, b)]
    seeds = sorted(have[0].keys() & have[1].keys())
    if not seeds:
        return None
    x, y = (right([of[s] for s in seeds], arm) for of, (_, arm) in zip(have, (a, b), strict=True))
    if over == "texts":
        x, y = ({"": np.concatenate([side[c] for c in sorted(side)], axis=1)} for side in (x, y))
    return compare(x, y)


def write_tables(results: Path, page: Path) -> dict[str, Any]:
    """The rows of the claim; and below `BELOW` in ``page`` the tables, with a picture beside it."""
    out: dict[str, Any] = {}
    above = page.read_text(encoding="utf-8").partition(BELOW)[0] if page.is_file() else ""
    parts = [above + BELOW, f"\n![Accuracy against FM calls]({page.stem}.png)"]
    for data in DATA:
        found = records(results, data)
        if found:
            out[data] = {
                "methods": list(_method_rows(found)),
                "race": list(_race_rows(found)),
                "race_over_texts": list(_race_rows(found, over="texts")) if data == DEALT_OUT else [],
                "reach": _reach(found),
                "worst_fifth": _worst_fifth(found),
            }
            parts += [f"\n## {data}\n", *_markdown(out[data])]
    many = results.parent / "landscape.json"
    if many.is_file():
        parts += ["\n## A planted landscape, to 50,000 calls\n", *_landscape(json.loads(many.read_text()))]
    page.write_text("\n".join(parts) + "\n", encoding="utf-8")
    draw({data: rows["methods"] for data, rows in out.items()}, page.with_suffix(".png"))
    return out


def _markdown(rows: Mapping[str, Any]) -> Iterator[str]:
    heads = ["set, own cal.", "set, pooled", "single, own cal.", "single, pooled", "personal"]
    yield "| method | calls | seeds | " + " | ".join(heads) + " | set less zero-shot | tokens | up, kB | s |"
    yield "|---" * (len(heads) + 7) + "|"
    for row in rows["methods"]:
        name = row["method"] + (" (weak FM)" if row["weak_fm"] else "")
        cells = [_cell(row.get(arm)) for arm in (*ARMS, *PERSONAL)]
        over = _difference(row["over_zero_shot"]) if "over_zero_shot" in row else ""
        spent = [over, f"{row['tokens'] / 1000:.0f}k", f"{row['bytes_up'] / 1000:.0f}", f"{row['wall_s']:.0f}"]
        yield f"| {name} | {row['calls']:,} | {row['seeds']} | " + " | ".join([*cells, *spent]) + " |"
    yield "\nrace less the other method, points with 95% intervals (paired by text, seeds averaged):\n"
    yield from _pairs(rows["race"], heads[:4])
    if rows["race_over_texts"]:
        yield "\nThe same with every text, not every client, counting alike:\n"
        yield from _pairs(rows["race_over_texts"], heads[:4])


def _pairs(rows: Sequence[Mapping[str, Any]], heads: Sequence[str]) -> Iterator[str]:
    yield "| method | calls | " + " | ".join(heads) + " |"
    yield "|---" * (len(heads) + 2) + "|"
    pairs: dict[tuple[str, int], dict[str, str]] = {(r["method"], r["calls"]): {} for r in rows}
    for r in rows:
        pairs[r["method"], r["calls"]][r["arm"]] = _difference(r)
    for (method, calls), arms in pairs.items():
        yield f"| {method} | {calls:,} | " + " | ".join(arms.get(arm, "") for arm in ARMS) + " |"


def _landscape(known: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> Iterator[str]:
    yield (
        "`benchmarks/landscape.py`: a scripted model that is the surer of the right label the nearer a prompt is to "
        "what was planted. Accuracy of the set / of its best prompt alone, under the clients' own calibration.\n"
    )
    calls = sorted({int(c) for seeds in known.values() for read in seeds.values() for c in read})
    yield "| method | seeds | " + " | ".join(f"{c:,}" for c in calls) + " |"
    yield "|---" * (len(calls) + 2) + "|"
    for method, seeds in known.items():
        cells = []
        for c in calls:
            read = [at[str(c)] for at in seeds.values() if str(c) in at]
            cells.append(
                " / ".join(f"{np.mean([r[arm] for r in read]):.3f}" for arm in ("fm", "fm_single")) if read else ""
            )
        yield f"| {method} | {len(seeds)} | " + " | ".join(cells) + " |"


def _cell(value: Mapping[str, Any] | None) -> str:
    return "" if value is None else f"{value['mean']:.3f} ({value['ci95'][0]:.3f} to {value['ci95'][1]:.3f})"


def _difference(of: Mapping[str, Any]) -> str:
    low, high = of["ci95"]
    return f"{of['points']:+.1f} ({low:+.1f} to {high:+.1f})"


def draw(rows: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Accuracy against FM calls, a panel a data set, a line a method."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, max(len(rows), 1), figsize=(6.2 * max(len(rows), 1), 4.6), squeeze=False)
    colours = dict(zip((*FEDERATED, *BASELINES), plt.get_cmap("tab20").colors, strict=False)) | {FLAGSHIP: "black"}
    known: dict[str, Any] = {}
    for axis, (data, mine) in zip(axes[0], rows.items(), strict=True):
        for method in dict.fromkeys(row["method"] for row in mine):
            line = [(row["calls"], row["fm"]["mean"]) for row in mine if row["method"] == method and "fm" in row]
            is_race, is_base = method == FLAGSHIP, method in BASELINES
            style = {
                "lw": 3.0 if is_race else 1.4,
                "ls": ":" if is_base else "-",
                "marker": "o",
                "ms": 5 if is_race else 3,
            }
            (known[method],) = axis.plot(*zip(*line, strict=True), color=colours[method], **style)
        axis.set(xscale="log", title=data, xlabel="FM calls, all clients together", ylabel="accuracy on held-out texts")
        axis.set_xticks(
            sorted({row["calls"] for row in mine}), [f"{c:,}" for c in sorted({row["calls"] for row in mine})]
        )
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    lines = {method: known[method] for method in colours if method in known}
    axes[0][-1].legend(lines.values(), lines, fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    figure.suptitle("The set of three prompts, calibrated by each client", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _reach(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the best published method has with 5,000 calls, and with how many race has as much."""

    def mean(method: str, milestone: int) -> float | None:
        having = [r for r in found if r["method"] == method and f"fm@{milestone}" in r["right"]]
        return mean_interval(right(having, f"fm@{milestone}"))[0] if having else None

    best = max(((a, m) for m in FEDERATED[1:] if (a := mean(m, LONG)) is not None), default=None)
    if best is None:
        return {}
    enough = [m for m in (*MILESTONES, CALLS, LONG) if (a := mean(FLAGSHIP, m)) is not None and a >= best[0]]
    return {"best_at_5000": best[1], "accuracy": round(best[0], 4), "race_needs": min(enough, default=None)}


def _worst_fifth(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean accuracy of the worst fifth of all clients of all seeds, by arm; and race's personal prompts less global
    and local-only ones there, with intervals from resampling texts within clients."""
    sides = {"personal": (FLAGSHIP, f"fm_personal@{CALLS}"), "global": (FLAGSHIP, f"fm@{CALLS}")}
    sides["local_only"] = ("local_only", f"fm@{CALLS}")
    values: dict[str, PerText] = {}
    for name, (method, arm) in sides.items():
        having = [r for r in found if r["method"] == method and arm in r["right"]]
        if not having:
            return {}
        values[name] = right(having, arm)
    clients = sorted(set.intersection(*(set(v) for v in values.values())))
    n = max(1, round(len(clients) / 5))
    rng = np.random.default_rng(0)

    def worst(by_client: Mapping[str, FloatArray]) -> float:
        return float(np.sort([by_client[c].mean() for c in clients])[:n].mean())

    draws: dict[str, list[float]] = {"global": [], "local_only": []}
    for _ in range(2000):
        rows = {c: rng.integers(values["global"][c].shape[1], size=values["global"][c].shape[1]) for c in clients}
        drawn = {name: worst({c: v[c][:, rows[c]] for c in clients}) for name, v in values.items()}
        for other in draws:
            draws[other].append(drawn["personal"] - drawn[other])
    return {
        "clients": len(clients),
        "mean": {name: round(worst(v), 4) for name, v in values.items()},
        **{
            f"personal less {other}": {
                "points": round(100 * (worst(values["personal"]) - worst(values[other])), 2),
                "ci95": [round(100 * float(x), 2) for x in np.quantile(d, [0.025, 0.975])],
            }
            for other, d in draws.items()
        },
    }


def _method_rows(found: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for method in [m for m in (*FEDERATED, *BASELINES) if any(r["method"] == m for r in found)]:
        mine = [r for r in found if r["method"] == method]
        for milestone in sorted({m["milestone"] for r in mine for m in r["readings"]}):
            read = [m for r in mine for m in r["readings"] if m["milestone"] == milestone]
            row: dict[str, Any] = {"method": method, "calls": milestone, "seeds": len(read)}
            row["weak_fm"] = load_method(method).card.reads_text
            for arm in (*ARMS, *PERSONAL):
                having = [r for r in mine if f"{arm}@{milestone}" in r["right"]]
                if having:
                    mean, ci95 = mean_interval(right(having, f"{arm}@{milestone}"))
                    row[arm] = {"mean": round(mean, 4), "ci95": [round(x, 4) for x in ci95]}
            over = paired(found, (method, f"fm@{milestone}"), ("zero_shot", f"fm@{milestone}"))
            if over is not None and method != "zero_shot":
                row["over_zero_shot"] = _points(over)
            row["bytes_up_a_round"] = _most([r.get("bytes_up_a_round", {}) for r in mine])
            for what in ("fm_calls", "tokens", "bytes_up", "bytes_down", "wall_s"):
                row[what] = float(np.mean([m[what] for m in read]))
            yield row


def _race_rows(found: Sequence[Mapping[str, Any]], over: str = "clients") -> Iterator[dict[str, Any]]:
    """race against every other federated method, arm by arm and milestone by milestone."""
    read = sorted({m["milestone"] for r in found for m in r["readings"]})
    for method in FEDERATED[1:]:
        for milestone in read:
            for arm in ARMS:
                versus = paired(found, (FLAGSHIP, f"{arm}@{milestone}"), (method, f"{arm}@{milestone}"), over)
                if versus is not None:
                    yield {
                        "method": method,
                        "calls": milestone,
                        "arm": arm,
                        **_points(versus),
                        "above": versus.ci95[0] > -0.01,
                    }


def _points(c: Comparison) -> dict[str, Any]:
    return {"points": round(100 * c.difference, 2), "ci95": [round(100 * x, 2) for x in c.ci95], "p": c.p_value}


def _most(each: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {name: max(e.get(name, 0) for e in each) for name in sorted({name for e in each for name in e})}
