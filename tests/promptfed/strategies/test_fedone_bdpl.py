"""``fedone_bdpl`` and its Gumbel variant: the contract, a planted optimum, what crosses the wire, who is asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptfed.errors import ConfigError
from promptfed.fm.scripted import ScriptedFM
from promptfed.messages import Failed, Reply, decode_reply, decode_task, encode
from promptfed.messages.methods import CountNgrams, NgramCounts, Policy, PolicyStep, packed, unpacked
from promptfed.prompts.artefact import PromptSet
from promptfed.registry import load_method
from promptfed.strategies.base import Round
from promptfed.strategies.fedone_bdpl import FedOneBDPL, SlotPolicy
from promptfed.strategies.fedone_gs_bdpl import FedOneGSBDPL
from promptfed.strategies.session import Session
from promptfed.types import LabelRequest
from tests.contracts.method import MethodContract, Wire
from tests.promptfed.strategies.test_race import a_federation, fake_clients, granted
from tests.support import CHEERFUL, Bench, bench, finish, replies


class TestContract(MethodContract):
    def method(self) -> FedOneBDPL:
        return FedOneBDPL()


class TestContractOfTheGumbelVariant(MethodContract):
    def method(self) -> FedOneGSBDPL:
        return FedOneGSBDPL()


def events(scene: Bench, kind: str) -> list[dict[str, Any]]:
    return [e for e in scene.events.events if e["kind"] == kind]


# ---------------------------------------------------------------- quality

FIRST, SECOND = "film", "story"


def planted(request: LabelRequest) -> list[float]:
    """Right and hardly sure of it; surer with `FIRST` in the first slot, and with `SECOND` in the second."""
    slots = request.prefix.split("\n\n")[0]
    margin = 0.2 + 0.8 * slots.startswith(FIRST) + 0.8 * slots.endswith(SECOND)
    return [-margin, margin] if any(word in request.text for word in CHEERFUL) else [margin, -margin]


@pytest.mark.parametrize("estimator", [FedOneBDPL, FedOneGSBDPL])
@pytest.mark.parametrize("options", [{}, {"clients_per_round": 3, "momentum": 0.5}])
def test_the_federation_finds_the_planted_ngrams(estimator: type[FedOneBDPL], options: dict[str, Any]) -> None:
    method = estimator(n_slots=2, n_ngrams=8, template="zero_shot", **options)
    scene = bench(3, 30, fm=ScriptedFM(rule=planted), max_prompts=1)

    prompt = scene.drive(method.run(scene.federation(max_fm_calls=3000)), 3000)

    (vocabulary,) = (e["ngrams"] for e in events(scene, "vocabulary"))
    assert {FIRST, SECOND} < set(vocabulary)
    assert prompt.prompts[0].text.startswith(f"{FIRST} {SECOND}\n\nIs the review")
    steps = events(scene, "policy")
    assert np.mean([s["loss"] for s in steps[-5:]]) < np.mean([s["loss"] for s in steps[:5]])
    assert steps[-1]["entropy"] < steps[0]["entropy"]


def test_the_template_alone_is_kept_where_ngrams_only_harm() -> None:
    def harmed(request: LabelRequest) -> list[float]:
        margin = 2.0 if request.prefix.startswith("Is the review") else -0.1
        return [-margin, margin] if any(word in request.text for word in CHEERFUL) else [margin, -margin]

    scene = bench(3, 30, fm=ScriptedFM(rule=harmed), max_prompts=1)

    prompt = scene.drive(FedOneBDPL(template="zero_shot").run(scene.federation(max_fm_calls=600)), 600)

    assert prompt.prompts[0].text.startswith("Is the review")


def test_a_few_shot_template_has_an_exemplar_a_label_and_the_slots_before_it() -> None:
    wire, prompt = recorded(n_slots=3)

    (template,) = {t.body.template for t in map(decode_task, wire.down) if isinstance(t.body, PolicyStep)}
    assert template.text.count("\n\n") == 3  # instruction, two exemplars, and the text to be labelled
    slots = prompt.prompts[0].text.split("\n\n")[0]
    assert prompt.prompts[0].text in (template.text, f"{slots}\n\n{template.text}")


# ---------------------------------------------------------------- what crosses


def recorded(**options: Any) -> tuple[Wire, PromptSet]:
    wires: list[Wire] = []
    scene = bench(3, 30, wrap=lambda inner: wires.append(Wire(inner)) or wires[0])  # type: ignore[func-returns-value]
    prompt = scene.drive(FedOneBDPL(**options).run(scene.federation(max_fm_calls=600)), 600)
    return wires[0], prompt


def test_the_uplink_of_a_round_is_four_bytes_a_logit_and_little_more() -> None:
    wire, _ = recorded(n_slots=4, n_ngrams=20)

    policies = [(decode_reply(data), len(data)) for data in wire.up]
    sizes = [size for reply, size in policies if isinstance(reply.body, Policy)]
    assert sizes
    assert all(4 * 4 * 20 <= size <= 4 * 4 * 20 + 250 for size in sizes)


def test_one_client_a_round_and_each_in_its_turn() -> None:
    wire, _ = recorded()

    asked = [t.client_id for t in map(decode_task, wire.down) if isinstance(t.body, PolicyStep)]
    assert len(asked) >= 6
    assert all(len(set(asked[i : i + 3])) == 3 for i in range(0, len(asked) - 2, 3))


def test_clients_are_told_public_ngrams_only_and_count_them() -> None:
    wire, _ = recorded()

    (ngrams,) = {t.body.ngrams for t in map(decode_task, wire.down) if isinstance(t.body, CountNgrams)}
    assert "seemed" not in ngrams  # it stands in every client's texts, and in no public one
    counts = [r.body for r in map(decode_reply, wire.up) if isinstance(r.body, NgramCounts)]
    assert len(counts) == 3
    assert all(c == 0 or c >= 3 for body in counts for c in body.counts)


# ---------------------------------------------------------------- the server's side


def a_policy(**changes: Any) -> SlotPolicy:
    values: dict[str, Any] = {"vocabulary": ("a", "b"), "n_slots": 1, "entropy_floor": 0.1, **changes}
    return SlotPolicy(**values)


def of(*logits: float) -> Policy:
    return Policy(n=1, logits=packed(np.array([logits])), loss=0.5)


def probabilities(policy: SlotPolicy) -> list[float]:
    return [float(p) for p in np.exp(policy.logits[0])]


def test_one_client_overwrites_the_policy() -> None:
    policy = a_policy()

    policy.update([of(np.log(0.7), np.log(0.3))], [40], 0.0)

    assert probabilities(policy) == pytest.approx([0.7, 0.3])


def test_several_clients_are_averaged_by_their_numbers_of_texts() -> None:
    """Logits (0, 2) and (0, -2) with 30 and 10 texts: (0, 1)."""
    policy = a_policy()

    policy.update([of(0.0, 2.0), of(0.0, -2.0)], [30, 10], 0.0)

    assert policy.logits[0, 1] - policy.logits[0, 0] == pytest.approx(1.0, abs=1e-5)


def test_momentum_makes_a_share_of_the_last_move_again() -> None:
    """From a difference of 0 to 1; then the client stays at 1, and half of the move is made once more."""
    policy = a_policy()

    policy.update([of(0.0, 1.0)], [1], 0.5)
    policy.update([of(0.0, 1.0)], [1], 0.5)

    assert policy.logits[0, 1] - policy.logits[0, 0] == pytest.approx(1.5, abs=1e-5)


@given(logits=st.lists(st.floats(-3e38, 3e38), min_size=2, max_size=2), momentum=st.floats(0, 0.99))
@settings(deadline=None)
def test_no_client_makes_the_policy_break(logits: list[float], momentum: float) -> None:
    policy = a_policy()

    for _ in range(3):
        policy.update([of(*logits)], [1], momentum)

    assert np.isfinite(unpacked(packed(policy.logits), 1, 2)).all()
    assert min(probabilities(policy)) > 0.01  # an entropy of a tenth of log 2 has .013 and .987


def test_a_reply_of_another_size_or_not_finite_is_left_out() -> None:
    policy = a_policy()

    assert policy.fits(of(0.0, 1.0))
    assert not policy.fits(of(0.0, 1.0, 2.0))
    assert not policy.fits(of(0.0, float("nan")))


def test_a_client_that_owes_an_answer_is_passed_over() -> None:
    federation = a_federation(3, 900)
    session, policy, rng = Session(federation), a_policy(), np.random.default_rng(0)
    task = CountNgrams(ngrams=())
    finish(session.exchange("policy_step", {"c001": task}, {"c001": 5}, optional=True), lambda _: {})

    turns = [c for _ in range(6) for c in policy.next_clients(session, 1, rng)]

    assert sorted(turns) == ["c000"] * 3 + ["c002"] * 3
    assert sorted(policy.next_clients(session, 9, rng)) == ["c000", "c002"]
    assert session.left == 895


class FailsSteps(Wire):
    """One client's `policy_step`s are lost; it answers all else."""

    async def exchange(self, tasks: Mapping[str, bytes], awaited: Any, deadline_s: Any) -> dict[str, bytes]:
        told = await super().exchange(tasks, awaited, deadline_s)
        for client in ["client1"] if "client1" in told else []:
            task = decode_task(tasks[client])
            if isinstance(task.body, PolicyStep):
                usage = decode_reply(told[client]).usage
                told[client] = encode(
                    Reply(round=task.round, client_id=client, usage=usage, body=Failed(reason="Lost"))
                )
        return told


def test_a_round_that_nobody_answers_does_not_stop_the_run() -> None:
    scene = bench(3, 30, wrap=FailsSteps)

    prompt = scene.drive(FedOneBDPL().run(scene.federation(max_fm_calls=900)), 900)

    steps = [e for e in events(scene, "round") if e["name"] == "policy_step"]
    assert [e["failures"] for e in steps].count({"client1": "Lost"}) == 1
    assert len(steps) > 10
    assert prompt.prompts


# ---------------------------------------------------------------- budget and options


def fake(n_texts: int = 500) -> Any:
    """Clients without data or model: `fake_clients`, which know this method's tasks too."""
    others = fake_clients(n_texts)

    def answer(round_: Round) -> Mapping[str, Reply]:
        bodies: dict[str, Any] = {}
        for client, body in round_.tasks.items():
            if isinstance(body, CountNgrams):
                bodies[client] = NgramCounts(n=n_texts, counts=(min(n_texts, 3),) * len(body.ngrams))
            elif isinstance(body, PolicyStep):
                bodies[client] = Policy(n=n_texts, logits=body.logits, loss=0.7)
        return replies(bodies) if bodies else dict(others(round_))

    return answer


@given(n_clients=st.integers(1, 40), max_fm_calls=st.integers(1, 3000), n_texts=st.sampled_from([1, 8, 500]))
@settings(deadline=None, max_examples=20)
def test_grants_never_pass_the_budget(n_clients: int, max_fm_calls: int, n_texts: int) -> None:
    federation = a_federation(n_clients, max_fm_calls, n_texts)

    try:
        rounds, prompt = finish(FedOneBDPL().run(federation), fake(n_texts))
    except ConfigError as refused:
        needed = int(str(refused).rsplit("at least ", 1)[1])
        assert needed > max_fm_calls
        rounds, prompt = finish(FedOneBDPL().run(a_federation(n_clients, needed, n_texts)), fake(n_texts))
        assert granted(rounds) <= needed
    else:
        assert granted(rounds) <= max_fm_calls
    assert any(r.name == "policy_step" for r in rounds)
    assert 1 <= len(prompt.prompts) <= 2


def test_it_works_without_public_text_and_without_an_instruction() -> None:
    rounds, prompt = finish(FedOneBDPL().run(a_federation(2, 800, public=(), instruction="")), fake())

    assert granted(rounds) <= 800
    assert prompt.prompts


def test_options_are_checked_by_name_and_range() -> None:
    method = load_method("fedone_gs_bdpl", {"n_slots": 3, "temperature": 0.5})

    assert method == FedOneGSBDPL(n_slots=3, temperature=0.5)
    with pytest.raises(ConfigError, match="clients_per_round"):
        load_method("fedone_bdpl", {"clients_per_round": 0})
    with pytest.raises(ConfigError, match="template"):
        load_method("fedone_bdpl", {"template": "many_shot"})
