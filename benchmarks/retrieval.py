"""Federated retrieval measured: what routing loses, what merging loses, and what it costs beside bare faiss.

    python benchmarks/retrieval.py routing [--data FILE] [--seeds 5]
    python benchmarks/retrieval.py merging [--data FILE]
    python benchmarks/retrieval.py speed

Each prints JSON and writes it to benchmarks/results/retrieval/. ``--data`` is newsgroups' docs.csv.gz (client, id,
title, body): a query is a title, and what it should find is the body that it belongs to. Vectors are kept in
runs/retrieval/.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import gzip
import hashlib
import importlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Python looks in a script's own folder first, where `retrieval` is this file and not the package. The package's folder
# goes before it; and if it was another script that asked for the package, it gets that in this file's place.
sys.path.insert(0, str(Path(__file__).parent.parent))
if __name__ == "retrieval":
    del sys.modules[__name__]
    importlib.import_module(__name__)

import numpy as np

from promptfed.federation.inprocess import InProcessTransport
from promptfed.privacy.secret import Secret, simulated_key
from promptfed.types import Encoder, FloatArray, Hit, SearchMode
from retrieval.documents import Document
from retrieval.encoder import SentenceEncoder
from retrieval.federated import FederatedRetriever
from retrieval.index import LocalIndex
from retrieval.merging import Merge, ReadAgain, by_rank, by_score, cori
from retrieval.owner import IndexOwner, Policy
from retrieval.routing import CentroidRouter, LearnedRouter, Router, coverage_for, shares_of
from retrieval.static_encoder import StaticEncoder

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "retrieval"
K = 10
N_ASK = 5
N_BOOTSTRAP = 10_000


class KeptEncoder:
    """An encoder whose vectors are kept in a file."""

    def __init__(self, inner: Encoder, path: Path) -> None:
        self._inner, self._path = inner, path
        self.encoder_id = inner.encoder_id
        self._known: dict[str, FloatArray] = {}
        if path.exists():
            with np.load(path) as kept:
                self._known = dict(zip(kept["keys"].tolist(), kept["vectors"].astype(np.float64), strict=True))

    def fits(self, text: str) -> bool:
        return bool(getattr(self._inner, "fits", lambda _: True)(text))

    def encode(self, texts: Sequence[str]) -> FloatArray:
        keys = [hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._known}
        if missing:
            # Vectors that were kept once are those of 32 bits, so that a second run has the same.
            new = self._inner.encode(list(missing.values())).astype(np.float32).astype(np.float64)
            self._known.update(zip(missing, new, strict=True))
            if len(missing) > 100:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                vectors = np.array(list(self._known.values()), dtype=np.float32)
                np.savez(self._path, keys=np.array(list(self._known)), vectors=vectors)
        if not keys:
            return self._inner.encode([])
        return np.array([self._known[key] for key in keys])


def newsgroups(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def indices(rows: Sequence[dict[str, str]], encoders: dict[str, Encoder]) -> dict[str, LocalIndex]:
    """One index a client."""
    out = {}
    for client, encoder in encoders.items():
        out[client] = LocalIndex(encoder)
        out[client].add(Document(doc_id=r["id"], text=r["body"]) for r in rows if r["client"] == client)
    return out


def federation(parts: dict[str, LocalIndex], policy: Policy, seed: int = 0) -> InProcessTransport:
    """Owners with that policy, whose noise is of ``seed``."""
    return InProcessTransport(
        {name: IndexOwner(name, i, policy, secret=Secret(simulated_key(seed, name))) for name, i in parts.items()}
    )


def places(hits: Sequence[Sequence[Hit]], wanted: Sequence[str]) -> np.ndarray[Any, Any]:
    """Where each query's document is among the hits, 0 the first; K where it is not."""
    out = np.full(len(wanted), K)
    for i, (mine, doc_id) in enumerate(zip(hits, wanted, strict=True)):
        names = list(dict.fromkeys(hit.doc_id for hit in mine))[:K]
        if doc_id in names:
            out[i] = names.index(doc_id)
    return out


def ratio(a: FloatArray, b: FloatArray, seed: int = 0) -> dict[str, float]:
    """mean(a) / mean(b) over the same queries, with a 95% bootstrap interval over these."""
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(a), np.full(len(a), 1 / len(a)), size=N_BOOTSTRAP)
    low, high = np.quantile((draws @ a) / (draws @ b), [0.025, 0.975])
    return {"ratio": float(a.mean() / b.mean()), "low": float(low), "high": float(high)}


def routing(args: argparse.Namespace) -> dict[str, Any]:
    """Recall@10 of the right body when 5 of 20 clients are asked, over that when all are, by the noise of centroids.

    The queries are halved: on one half, all asked, the learned router learns who finds what, and the coverage with
    which 5 clients are asked on average is chosen; the other half measures, and the other way round.
    """
    rows = newsgroups(args.data)
    encoder = KeptEncoder(SentenceEncoder(), ROOT / "runs" / "retrieval" / "minilm.npz")
    clients = sorted({r["client"] for r in rows})
    parts = indices(rows, dict.fromkeys(clients, encoder))
    queries, wanted = [r["title"] for r in rows], [r["id"] for r in rows]
    everybody = FederatedRetriever(federation(parts, Policy(epsilon=math.inf)), clients, encoder, deadline_s=600)
    hits = everybody.search(queries, 2 * K)
    all_found = (places(hits, wanted) < K).astype(np.float64)
    vectors = encoder.encode(queries)
    scores = np.full((len(hits), 2 * K), -np.inf)
    for row, mine in zip(scores, hits, strict=True):
        row[: len(mine)] = [hit.score for hit in mine]
    shares = shares_of(scores, [[clients.index(h.owner) for h in mine] for mine in hits], len(clients))
    halves = np.random.default_rng(0).permutation(len(rows)) % 2
    out = []
    for epsilon in (math.inf, 8.0, 4.0, 1.0):
        policy = Policy(epsilon=epsilon, max_epsilon=epsilon)
        for name in ("centroids", "learned"):
            found: dict[str, list[FloatArray]] = {"fixed": [], "on average": []}
            asked: dict[str, list[float]] = {"fixed": [], "on average": []}
            for seed in range(args.seeds if math.isfinite(epsilon) else 1):
                transport = federation(parts, policy, seed)
                told = FederatedRetriever(transport, clients, encoder, deadline_s=600)
                said = asyncio.run(told.described())
                centroids = {c: np.frombuffer(said[c].centroid, dtype="<f4").astype(np.float64) for c in clients}
                one_seed = {way: np.zeros(len(rows)) for way in found}
                n_asked = dict.fromkeys(found, 0)
                for half in (0, 1):
                    learn, measure = np.flatnonzero(halves != half), np.flatnonzero(halves == half)
                    router: Router = CentroidRouter()
                    if name == "learned":
                        router = LearnedRouter().fit(vectors[learn], centroids, shares[learn])
                    coverage = coverage_for(router.probabilities(vectors[learn], centroids), N_ASK)
                    for way, how in (("fixed", {"n_ask": N_ASK}), ("on average", {"coverage": coverage})):
                        some = FederatedRetriever(transport, clients, encoder, router=router, deadline_s=600, **how)
                        answers = some.ask([queries[i] for i in measure], 2 * K)
                        one_seed[way][measure] = places(answers.hits, [wanted[i] for i in measure]) < K
                        n_asked[way] += sum(map(len, answers.asked))
                for way in found:
                    found[way].append(one_seed[way])
                    asked[way].append(n_asked[way] / len(rows))
            for way, each in found.items():
                mean = np.mean(each, axis=0)
                out.append(
                    {
                        "epsilon": epsilon if math.isfinite(epsilon) else None,
                        "router": name,
                        "clients_asked": way,
                        "mean_asked": float(np.mean(asked[way])),
                        "recall_at_10": float(mean.mean()),
                        **ratio(mean, all_found),
                    }
                )
                print(json.dumps(out[-1]), file=sys.stderr, flush=True)
    return {"n_queries": len(rows), "n_clients": len(clients), "all_asked": float(all_found.mean()), "rows": out}


def merging(args: argparse.Namespace) -> dict[str, Any]:
    """All asked: with one encoder, the hits of one central index; with two, the nDCG@10 of it that each merge keeps.

    Every other client has the static encoder, and the asker the transformer. The one body that a title belongs to is
    what is relevant, so nDCG@10 is 1 / log2(2 + place).
    """
    rows = newsgroups(args.data)
    minilm = KeptEncoder(SentenceEncoder(), ROOT / "runs" / "retrieval" / "minilm.npz")
    static = StaticEncoder()
    clients = sorted({r["client"] for r in rows})
    queries, wanted = [r["title"] for r in rows], [r["id"] for r in rows]
    central = LocalIndex(minilm)
    central.add(Document(doc_id=r["id"], text=r["body"]) for r in rows)
    central_hits = central.search(queries, 2 * K)

    def gain(hits: Sequence[Sequence[Hit]]) -> FloatArray:
        place = places(hits, wanted)
        return np.where(place < K, 1 / np.log2(2.0 + place), 0.0)

    policy = Policy(shares="documents", epsilon=math.inf)
    one = federation(indices(rows, dict.fromkeys(clients, minilm)), policy)
    same = FederatedRetriever(one, clients, minilm, deadline_s=600).search(queries, K)
    pairs = list(zip(same, central_hits, strict=True))
    gaps = [abs(a.score - b.score) for mine, its in pairs for a, b in zip(mine, its, strict=False)]
    out: dict[str, Any] = {
        "n_queries": len(rows),
        "central_ndcg_at_10": float(gain(central_hits).mean()),
        "one_encoder": {
            "same_documents_in_the_same_order": float(
                np.mean([[h.doc_id for h in mine] == [h.doc_id for h in its[: len(mine)]] for mine, its in pairs])
            ),
            "largest_difference_of_a_score": max(gaps),
        },
        "two_encoders": {},
    }
    mixed: dict[str, Encoder] = {c: minilm if i % 2 else static for i, c in enumerate(clients)}
    two = federation(indices(rows, mixed), policy)
    base = gain(central_hits)
    ways: list[tuple[Merge, SearchMode, int]] = [
        (merge, mode, n_read)
        for merge in (by_score, cori, by_rank)
        for mode in ("dense", "hybrid")
        for n_read in (0, 3 * K, 10 * K, len(clients) * K, 2 * len(clients) * K)
        if mode == "dense" or merge is by_rank  # scores of a hybrid search are ranks already
    ]
    for merge, mode, n_read in ways:
        more: dict[str, Any] = {"cross_encoder": ReadAgain(minilm), "n_read": n_read} if n_read else {}
        it = FederatedRetriever(two, clients, minilm, send="text", mode=mode, merge=merge, deadline_s=3600, **more)
        name = f"{merge.__name__}, {mode}" + (f", {n_read} read again" if n_read else "")  # type: ignore[attr-defined]
        out["two_encoders"][name] = ratio(gain(it.search(queries, K)), base)
        print(name, out["two_encoders"][name], file=sys.stderr, flush=True)
    return out


class Vectors:
    """An encoder of numbers: a text is the number of a row, and one that is no number, by which an index knows its
    encoder, the first."""

    encoder_id = "rows"

    def __init__(self, table: np.ndarray[Any, Any]) -> None:
        self._table = table

    def encode(self, texts: Sequence[str]) -> FloatArray:
        return self._table[[int(text) if text.isdigit() else 0 for text in texts]].astype(np.float64)


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """A batch of 256 queries to all owners, texts included, over bare faiss on the same vectors in one index."""
    import faiss

    out = {}
    for n_owners, n_each in ((20, 5_000), (100, 10_000)):
        rng = np.random.default_rng(n_owners)
        table = rng.normal(size=(n_owners * n_each + 256, 384)).astype(np.float32)
        table /= np.linalg.norm(table, axis=1, keepdims=True)
        encoder, parts = Vectors(table), {}
        for o in range(n_owners):
            name = f"owner{o:03d}"
            parts[name] = LocalIndex(encoder, passage_words=None)
            parts[name].add(Document(doc_id=str(i), text=str(i)) for i in range(o * n_each, (o + 1) * n_each))
        queries = [str(n_owners * n_each + i) for i in range(256)]
        it = FederatedRetriever(
            federation(parts, Policy(shares="documents", epsilon=None)), list(parts), encoder, deadline_s=600
        )
        bare = faiss.IndexFlatIP(384)
        bare.add(table[: n_owners * n_each])
        times: dict[str, list[float]] = {"bare": [], "federated": []}
        same = 0
        for _ in range(args.repeats + 1):
            start = time.perf_counter()
            _, ids = bare.search(table[n_owners * n_each :], K)
            middle = time.perf_counter()
            hits = it.search(queries, K)
            times["bare"].append(middle - start)
            times["federated"].append(time.perf_counter() - middle)
            same = sum([int(h.doc_id) for h in mine] == row for mine, row in zip(hits, ids.tolist(), strict=True))
        seconds = {name: statistics.median(each[1:]) for name, each in times.items()}
        out[f"{n_owners} x {n_each}"] = {
            **{f"{name}_s": value for name, value in seconds.items()},
            "ratio": seconds["federated"] / seconds["bare"],
            "queries_with_the_same_hits": same,
        }
        print(json.dumps(out), file=sys.stderr, flush=True)
    return {"batch": 256, "k": K, "repeats": args.repeats, "n_cpus": os.cpu_count(), "sizes": out}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("routing", "merging", "speed"))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "newsgroups" / "docs.csv.gz")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    result = {"routing": routing, "merging": merging, "speed": speed}[args.what](args)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{args.what}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
