"""``fedbpt``, and what it shares with ``fedavg_bbt``: within its budget, on the wire, and to the planted optimum."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pytest

import promptfed
from promptfed.errors import CapabilityError, ConfigError, RunError
from promptfed.fm.base import BaseFM
from promptfed.fm.scripted import ScriptedFM
from promptfed.messages import Reply, decode_reply, decode_task, encode
from promptfed.messages.methods import CovarianceForm, Evolved, packed, unpacked
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.soft import Projection
from promptfed.registry import load_method
from promptfed.strategies.fedavg_bbt import FedAvgBBT
from promptfed.strategies.fedbpt import FedBPT
from promptfed.strategies.soft_search import SoftSearch
from promptfed.types import Capability
from tests.contracts.method import MethodContract, Wire
from tests.planted import SPACE, Planted
from tests.support import LABELS, Bench, WordEncoder, bench, sentences

SMALL: dict[str, Any] = {"dimension": 6, "n_vectors": 1, "population": 4, "n_texts": 4}


def planted(method: SoftSearch, seed: int = 1) -> Planted:
    """The optimum of the space that ``method`` searches in a run with ``seed``."""
    made = Projection.into(
        SPACE,
        seed=seed,
        dimension=method.dimension,
        n_vectors=method.n_vectors,
        scale=method.scale,
        sigma=method.sigma,
    )
    return Planted(made, seed)


class SoftContract(MethodContract):
    budget: ClassVar[int] = 750  # a round for a third of it

    def fm(self) -> BaseFM:
        method = self.method()
        assert isinstance(method, SoftSearch)
        return planted(method).fm()


class TestFedBPT(SoftContract):
    def method(self) -> FedBPT:
        return FedBPT(**SMALL | {"n_texts": 2})


class TestFedBPTAsInThePaper(SoftContract):
    def method(self) -> FedBPT:
        small = SMALL | {"n_texts": 2}
        return FedBPT(**small, form="full", cross_evaluate=False, calibrated=False, mask_rate=0.5, shots=0)


class TestFedAvgBBT(SoftContract):
    def method(self) -> FedAvgBBT:
        return FedAvgBBT(**SMALL | {"n_texts": 2})


# ---------------------------------------------------------------- quality


def tuned(method: SoftSearch, max_fm_calls: int, seed: int = 1, **about: Any) -> tuple[Planted, Bench, PromptSet]:
    best = planted(method, seed)
    scene = bench(5, 60, fm=best.fm(), n_words=2, soft_space=SPACE, max_fm_calls=max_fm_calls, seed=seed, **about)
    prompt = scene.drive(method.run(scene.federation()), max_fm_calls)
    return best, scene, prompt


def accuracy(prompt: PromptSet, fm: BaseFM) -> float:
    fresh = sentences(200, seed=77, n_words=2)
    said = [p.label for p in prompt.predict(fresh.texts, fm=fm)]
    return float(np.mean([LABELS[y] == label for y, label in zip(fresh.labels, said, strict=True)]))


@pytest.mark.parametrize(
    ("method", "seed"),
    [(FedBPT(**SMALL, shots=0), 1), (FedBPT(**SMALL, shots=0, form="full"), 2), (FedAvgBBT(**SMALL, shots=0), 3)],
    ids=["separable", "full", "fedavg"],
)
def test_the_planted_optimum_is_found_through_the_federation(method: SoftSearch, seed: int) -> None:
    best, scene, prompt = tuned(method, 2000, seed, max_prompts=1)

    (found,) = prompt.prompts
    assert found.soft is not None
    assert best.distance(found.soft) < 0.8  # of 2 at the start
    bare = PromptSet(labels=LABELS, prompts=(replace(found, soft=None, readout=()),), weights=(1.0,), bias=(0.0, 0.0))
    assert accuracy(bare, best.fm()) < 0.85
    assert accuracy(prompt, best.fm()) > 0.95
    assert scene.fm.n_calls <= 2000


def test_where_soft_prompts_do_harm_the_text_prompt_alone_is_kept() -> None:
    def rule(request: Any) -> list[float]:
        plain = best.rule(replace(request, soft=None))
        return [0.0, 0.0] if request.soft else [4 * x for x in plain]

    method = FedBPT(**SMALL, shots=0)
    best = planted(method)
    scene = bench(3, 30, fm=ScriptedFM(rule=rule, soft_space=SPACE), soft_space=SPACE, max_prompts=1)

    prompt = scene.drive(method.run(scene.federation()), 1000)

    assert prompt.prompts[0].soft is None


def test_scores_of_all_clients_rank_a_liars_mean_where_it_belongs() -> None:
    """One client says that its mean, far from everything, has no loss at all."""

    class Liar(Wire):
        async def exchange(self, tasks: Mapping[str, bytes], awaited: Any, deadline_s: Any) -> dict[str, bytes]:
            replies = await super().exchange(tasks, awaited, deadline_s)
            told = decode_reply(replies["client0"]) if "client0" in replies else None
            if told is not None and isinstance(told.body, Evolved):
                far = packed(-3.0 * best.z)
                replies["client0"] = encode(replace(told, body=replace(told.body, mean=far, fitness=-1e9)))
            return replies

    method = FedBPT(**SMALL, shots=0)
    best = planted(method)

    _, _, prompt = tuned(method, 1500, wrap=lambda inner: Liar(inner), max_prompts=1)

    assert prompt.prompts[0].soft is not None
    assert best.distance(prompt.prompts[0].soft) < 0.9


# ---------------------------------------------------------------- the wire


def by_round(wire: Wire) -> tuple[list[dict[str, int]], list[int]]:
    """Bytes up of each client from one round of evolution to the next, and the bytes of each `evolve` task."""
    up: list[dict[str, int]] = []
    replies = [(decode_reply(data), len(data)) for data in wire.up]
    evolving = sorted({r.round for r, _ in replies if isinstance(r.body, Evolved)})
    for start, end in pairwise(evolving):
        sent: dict[str, int] = defaultdict(int)
        for reply, size in replies:
            if start <= reply.round < end:
                sent[reply.client_id] += size
        up.append(sent)
    return up, [len(data) for data in wire.down if decode_task(data).body.kind == "evolve"]


@pytest.mark.parametrize("form", ["separable", "low_rank"])
def test_what_a_round_sends_with_500_dimensions(form: CovarianceForm) -> None:
    wires: list[Wire] = []
    method = FedBPT(dimension=500, n_vectors=2, population=4, n_texts=2, n_iterations=1, form=form, shots=0)
    scene = bench(
        3, 20, fm=planted(method).fm(), soft_space=SPACE, wrap=lambda inner: wires.append(Wire(inner)) or wires[0]
    )

    scene.drive(method.run(scene.federation(max_fm_calls=450)), 450)

    up, down = by_round(wires[0])
    assert len(up) >= 2
    assert max(size for sent in up for size in sent.values()) <= 4096
    assert max(size for sent in up for size in sent.values()) > 2000  # the mean is in it
    assert 4000 < max(down) <= 8192


def test_a_vector_that_does_not_fit_is_left_out_and_no_mean_at_all_ends_the_run() -> None:
    class Broken(Wire):
        async def exchange(self, tasks: Mapping[str, bytes], awaited: Any, deadline_s: Any) -> dict[str, bytes]:
            replies = await super().exchange(tasks, awaited, deadline_s)
            for client in bad & replies.keys():
                told: Reply = decode_reply(replies[client])
                if isinstance(told.body, Evolved):
                    spoilt = {
                        "client0": replace(told.body, mean=told.body.mean[:-4]),
                        "client1": replace(told.body, mean=packed(np.full(6, 3e38))),
                        "client2": replace(told.body, sigmas=()),
                    }[client]
                    replies[client] = encode(replace(told, body=spoilt))
            return replies

    def run() -> PromptSet:
        method = FedBPT(**SMALL, shots=0)
        scene = bench(3, 20, fm=planted(method).fm(), soft_space=SPACE, wrap=lambda inner: Broken(inner))
        return scene.drive(method.run(scene.federation(max_fm_calls=1000)), 1000)

    bad = {"client0", "client1"}
    assert run().prompts
    bad = {"client0", "client1", "client2"}
    with pytest.raises(RunError, match="no client came back from 3 rounds"):
        run()


def test_it_starts_each_round_where_the_server_is() -> None:
    wires: list[Wire] = []
    method = FedBPT(**SMALL, shots=0)
    scene = bench(
        3, 30, fm=planted(method).fm(), soft_space=SPACE, wrap=lambda inner: wires.append(Wire(inner)) or wires[0]
    )

    scene.drive(method.run(scene.federation()), 1000)

    tasks = [t.body for t in map(decode_task, wires[0].down) if t.body.kind == "evolve"]
    means = [unpacked(t.mean, 6).tolist() for t in tasks]  # type: ignore[union-attr]
    assert means[0] == [0.0] * 6
    assert len({tuple(m) for m in means}) >= 3
    assert len({t.seed for t in tasks}) == len({tuple(m) for m in means})  # type: ignore[union-attr]


# ---------------------------------------------------------------- before the first call


@pytest.fixture
def config(tmp_path: Any) -> dict[str, Any]:
    lines = ["client,text,label"]
    for c in range(2):
        mine = sentences(20, seed=c)
        lines += [f'c{c},"{t}",{LABELS[y]}' for t, y in zip(mine.texts, mine.labels, strict=True)]
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n")
    return {
        "data": {"train": str(tmp_path / "train.csv")},
        "task": {"kind": "classification", "labels": list(LABELS), "instruction": "Negative or positive?"},
        "fm": {"scorer": "scripted:none"},
        "method": {"name": "fedbpt", "options": {"dimension": 6, "n_vectors": 1}},
        "budget": {"max_fm_calls": 700},
        "evaluation": {"baselines": []},
    }


def test_a_model_that_takes_no_soft_prompts_is_refused_before_the_first_call(config: dict[str, Any]) -> None:
    with pytest.raises(CapabilityError, match=r"'fedbpt' needs prompt_embeds .* or choose a method that tunes text"):
        promptfed.run(config, fm=ScriptedFM(), encoder=WordEncoder())


def test_one_that_does_not_say_where_they_live_too() -> None:
    silent = ScriptedFM(capabilities=frozenset({*Capability}))
    scene = bench(2, 20, fm=silent)

    with pytest.raises(ConfigError, match="'fedavg_bbt' tunes soft prompts, and the foundation model does not say"):
        scene.drive(FedAvgBBT(**SMALL).run(scene.federation()), 1000)
    assert scene.fm.n_calls == 0


def test_a_run_by_configuration_writes_a_prompt_that_can_be_read(config: dict[str, Any], tmp_path: Any) -> None:
    method = FedBPT(dimension=6, n_vectors=1)

    result = promptfed.run(config, out=tmp_path / "o", fm=planted(method).fm(), encoder=WordEncoder())

    assert PromptSet.load(tmp_path / "o") == result.prompt
    assert result.summary["method"] == "fedbpt"


@pytest.mark.parametrize("shots", [0, 1])
@pytest.mark.parametrize("n_clients", [1, 3, 10])
def test_the_budget_that_a_refusal_asks_for_is_enough(n_clients: int, shots: int) -> None:
    method = FedBPT(dimension=6, n_vectors=1, shots=shots)
    scene = bench(n_clients, 40, fm=planted(method).fm(), soft_space=SPACE)
    with pytest.raises(ConfigError, match=r"max_fm_calls = 20 is too small.*give at least \d+") as refused:
        scene.drive(method.run(scene.federation(max_fm_calls=20)), 20)
    needed = int(str(refused.value).split("at least ")[1].split(",")[0])

    scene.drive(method.run(scene.federation(max_fm_calls=needed)), needed)

    assert any(e["kind"] == "evolution" for e in scene.events.events)
    assert scene.fm.n_calls <= needed


def test_options_are_checked() -> None:
    assert load_method("fedbpt", {"form": "low_rank", "rank": 3}).name == "fedbpt"
    assert Capability.TEXT not in load_method("fedavg_bbt", {"shots": 0}).needs
    for name, value in (("form", "round"), ("shots", 2), ("mask_rate", 1.0), ("population", 3), ("dimension", 1)):
        with pytest.raises(ConfigError, match=f"method.options.{name} = "):
            load_method("fedbpt", {name: value})
