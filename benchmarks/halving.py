"""Whether halving finds the best of a pool: 64 prompts scored exhaustively once, then replayed.

    python benchmarks/halving.py table [--data sentiment5]     # asks the FM: 64 prompts x 600 texts; resumes
    python benchmarks/halving.py replay [--seeds 40]           # needs no model: reads benchmarks/results

`replay` runs the real halving, sessions and clients on the recorded answers, each seed with another order of the texts,
and prints JSON: how far the prompt that it ends with is from the best one (mean score over all texts), and the share of
the calls that it made.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from clients.client import Client
from clients.data import ClientData, Labelled, scoring_order
from promptfed.app import Simulation, read_inputs
from promptfed.config import load_config
from promptfed.federation.events import EventLog
from promptfed.federation.inprocess import InProcessTransport
from promptfed.federation.server import Server
from promptfed.fm.base import BaseFM, run_sync
from promptfed.folder import claimed
from promptfed.ledger import Ledger
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.grammar import random_draft
from promptfed.prompts.template import PromptTemplate
from promptfed.strategies.base import Card, Federation, Steps, singles
from promptfed.strategies.pool import halve
from promptfed.strategies.proposal import WRITE_SHARE, gather
from promptfed.strategies.session import Session
from promptfed.types import Capability, FloatArray, FMRequest, FMResponse, LabelRequest

DEMO = Path(__file__).parent.parent / "examples" / "sentiment5" / "demo.toml"
RESULTS = Path(__file__).parent / "results"
N_PROMPTS, N_TEXTS, CHUNK = 64, 120, 20
SHARE, WITHIN = 0.4, 0.005


class Exhaustive:
    """64 drafts of the shared pool, each scored on the first 120 texts of every client."""

    name: ClassVar[str] = "exhaustive"
    needs: ClassVar[frozenset[Capability]] = frozenset({Capability.LABEL_LOGPROBS, Capability.TEXT})
    card: ClassVar[Card] = Card(paper="", sends=frozenset({"write", "weigh", "vote", "ask"}), crosses="")

    def __init__(self) -> None:
        self.prompts: list[PromptTemplate] = []

    def run(self, federation: Federation) -> Steps[PromptSet]:
        session, rng = Session(federation), federation.rng(64)
        materials = yield from gather(session, rng)
        drafts = dict.fromkeys(random_draft(materials, rng) for _ in range(40 * N_PROMPTS))
        self.prompts = list(dict.fromkeys(draft.template() for draft in drafts))[:N_PROMPTS]
        for stop in range(CHUNK, N_TEXTS + 1, CHUNK):
            yield from session.ask(self.prompts, stop)
        return (yield from session.calibrate(self.prompts[:1], N_TEXTS))


def make_table(work: Path) -> None:
    """Ask the FM, and keep label scores and labels, without any text."""
    # Writing takes its share first; a budget that falls short would leave a client's last texts out.
    budget = int(5 * N_PROMPTS * N_TEXTS / (1 - WRITE_SHARE)) + 100
    config = load_config(DEMO, [f"budget.max_fm_calls={budget}", "evaluation.baselines=[]"])
    work.mkdir(parents=True, exist_ok=True)
    simulation, method = Simulation(config, read_inputs(config), work), Exhaustive()
    with claimed(work):
        federation = run_sync(_driven(simulation, method))
    tables = {c: client.scores for c, client in federation.items()}
    found = {c: s.get(method.prompts, N_TEXTS) for c, s in tables.items()}
    np.savez_compressed(
        RESULTS / "pool64.npz",
        prompts=np.array([p.text for p in method.prompts]),
        **{f"scores {c}": scores.swapaxes(0, 1).astype(np.float16) for c, (scores, _, _) in found.items()},
        **{f"labels {c}": labels.astype(np.int8) for c, (_, labels, _) in found.items()},
    )


async def _driven(simulation: Simulation, method: Exhaustive) -> dict[str, Client]:
    clients = simulation._clients(simulation.inputs.clients, "tuning")
    server, restore = simulation._open("tuning", clients)
    n_train = {c: len(client.data.train) for c, client in sorted(clients.items())}
    federation = simulation._federation(n_train, None)
    await server.drive(method.run(federation), "tuning", federation.max_fm_calls)
    await restore()  # of a run that was gone through again, the clients know nothing yet
    return clients


class RecordedFM(BaseFM):
    """Answers from the table: a text is its number."""

    fm_id = "recorded@0"
    capabilities = frozenset({Capability.LABEL_LOGPROBS})

    def __init__(self, table: FloatArray) -> None:
        self._table = table  # (n_prompts, n_texts, n_labels)

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        return [
            FMResponse(logprobs=tuple(self._table[int(r.prefix.split()[0]), int(r.text)].tolist()))
            for r in requests
            if isinstance(r, LabelRequest)
        ]


def replay(seeds: Sequence[int], share: float = SHARE) -> dict[str, Any]:
    """Halve the recorded pool once a seed, and compare with the best by all texts."""
    table = np.load(RESULTS / "pool64.npz")
    names = sorted(key.removeprefix("labels ") for key in table if key.startswith("labels "))
    labels = {c: table[f"labels {c}"].astype(np.int64) for c in names}
    starts = dict(zip(names, np.cumsum([0, *(len(labels[c]) for c in names)]), strict=False))
    scores = np.concatenate([table[f"scores {c}"].astype(np.float64) for c in names], axis=1)
    prompts = [PromptTemplate(text=f"{i} {{text}}", words=("negative", "positive")) for i in range(scores.shape[0])]
    runs = []
    for seed in seeds:
        rng = np.random.default_rng([seed, 40])
        clients = {}
        for c in names:
            order = scoring_order(labels[c], rng)
            train = Labelled(texts=tuple(str(starts[c] + i) for i in order), labels=labels[c][order])
            data = ClientData(client_id=c, train=train, test=train)
            clients[c] = Client(data, ("negative", "positive"), RecordedFM(scores), NoEncoder(), seed=seed)
        whole = sum(len(y) for y in labels.values()) * len(prompts)
        federation = Federation(
            clients={c: len(labels[c]) for c in names},
            labels=("negative", "positive"),
            words=("negative", "positive"),
            instruction="",
            public=(),
            max_fm_calls=2 * whole,
            max_prompts=1,
            seed=seed,
        )
        runs.append(run_sync(_replayed(clients, federation, prompts, int(share * whole), whole)))
    near = float(np.mean([r["behind"] <= WITHIN for r in runs]))
    return {
        "n_prompts": len(prompts),
        "n_texts": scores.shape[1],
        "within_half_a_point": near,
        "share_of_calls": float(np.mean([r["share"] for r in runs])),
        "most_calls": max(r["share"] for r in runs),
        "runs": runs,
    }


async def _replayed(
    clients: dict[str, Client], federation: Federation, prompts: Sequence[PromptTemplate], calls: int, whole: int
) -> dict[str, float]:
    server = Server(InProcessTransport(clients), Ledger(), EventLog())

    def steps() -> Steps[dict[str, float]]:
        session = Session(federation)
        (chosen,) = yield from halve(session, prompts, calls)
        spent = session.spent
        truth = yield from session.score(prompts, singles(prompts), max(federation.clients.values()))
        best = max(s.score for s in truth)
        return {"behind": best - truth[prompts.index(chosen)].score, "share": spent / whole, "best": best}

    return await server.drive(steps(), "tuning", federation.max_fm_calls)


class NoEncoder:
    """Nobody votes here."""

    encoder_id = "none"

    def encode(self, texts: Sequence[str]) -> FloatArray:
        return np.ones((len(texts), 1))


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["table", "replay"])
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--share", type=float, default=SHARE)
    parser.add_argument("--work", type=Path, default=Path("runs/halving"))
    args = parser.parse_args()
    if args.what == "table":
        make_table(args.work)
    else:
        print(json.dumps(replay(range(args.seeds), args.share), indent=1))


if __name__ == "__main__":
    main()
