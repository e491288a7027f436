"""What a client chooses for itself: the tuned set on ties, and what is better where it is better."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from clients.data import ClientData, Labelled
from clients.personal import FOLDS, better, choose, cross_picked, halfway, p_value
from clients.scores import ScoreStore
from promptfed.federation import grouping
from promptfed.federation.evaluation import offers
from promptfed.fm.scripted import ScriptedFM
from promptfed.messages import Adopt, Adopted, Choice, Offer, Score, Scored, Task, decode_reply, encode
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.calibration import cross_fitted_proba
from promptfed.prompts.template import PromptTemplate
from promptfed.strategies.base import Reading
from promptfed.strategies.session import Session
from promptfed.types import FloatArray, LabelRequest
from tests.support import LABELS, Bench, bench, wait_for


def prompts(*names: str) -> tuple[PromptTemplate, ...]:
    return tuple(PromptTemplate(text=f"{name}: {{text}}", words=LABELS) for name in names)


def prompt_set(of: tuple[PromptTemplate, ...], weights: tuple[float, ...] = ()) -> PromptSet:
    return PromptSet(labels=LABELS, prompts=of, weights=weights or (1.0,) * len(of), bias=(0.0, 0.0))


A, B, C, D = prompts("a", "b", "c", "d")

# ---------------------------------------------------------------- parts, by hand


def test_the_p_value_is_that_of_the_paired_t_test() -> None:
    gains = np.array([0.3, -0.1, 0.2, 0.25, 0.0])

    assert p_value(gains) == pytest.approx(stats.ttest_1samp(gains, 0.0, alternative="greater").pvalue)
    assert p_value(np.zeros(5)) == p_value(np.full(5, -0.1)) == p_value(np.full(5, 1e-12)) == 1.0
    assert p_value(np.full(5, 0.1)) == pytest.approx(0.0)


def test_the_largest_clear_gain_is_chosen_and_the_tuned_set_if_none_is_clear() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 60)
    tuned = np.full(60, 0.5)

    assert better(tuned, {"cluster": tuned + 0.2 + noise, "own": tuned + 0.3 + noise}) == "own"
    assert better(tuned, {"cluster": tuned + 0.2 + noise, "own": tuned + 2 * noise - noise.mean()}) == "cluster"
    assert better(tuned, {"cluster": tuned, "own": tuned - 0.1}) == "global"
    assert better(tuned, {}) == "global"


def test_one_of_three_options_has_to_be_clear_at_a_third_of_the_level() -> None:
    """A gain with p = 0.03 wins alone and not among three (Holm: 0.09)."""
    x = np.linspace(-1, 1, 40)
    gain = x + stats.t.isf(0.03, 39) * x.std(ddof=1) / np.sqrt(40)
    tuned = np.zeros(40)

    assert p_value(gain) == pytest.approx(0.03)
    assert better(tuned, {"own": gain}) == "own"
    assert better(tuned, {"own": gain, "cluster": -gain, "mixed": tuned}) == "global"


def test_a_set_is_picked_for_a_fold_by_the_texts_of_the_others() -> None:
    by_set = np.zeros((10, 2))
    by_set[:, 0] = 0.1
    by_set[[0, 5], 1] = 1.0  # both in fold 0: set 1 is better for everybody but for those two

    assert cross_picked(by_set).tolist() == [0, 1, 1, 1, 1] * 2


def test_mixed_prompts_are_half_of_each() -> None:
    first, second = prompt_set((A, B), (0.6, 0.4)), prompt_set((B, C), (1.0, 2.0))

    whole, cut = halfway(first, second, 3), halfway(first, second, 2)

    assert whole.prompts == (C, B, A)  # 0 + 1, 0.2 + 0.5, 0.3 + 0
    assert whole.weights == pytest.approx((1.0, 0.7, 0.3))
    assert cut.prompts == (C, B)
    assert cut.weights == pytest.approx((2.0 / 1.7, 1.4 / 1.7))
    assert halfway(first, prompt_set((B, A)), 2) == first
    assert halfway(prompt_set((A,)), prompt_set((B,)), 1) == prompt_set((A,))


# ---------------------------------------------------------------- no false choice


def false_choices(n_texts: int, spread: float, n_runs: int = 1500) -> float:
    """Share of clients that leave the tuned set though all sets are equally good: four prompts whose scores are alike
    but for noise of their own; the tuned set is the first."""
    rng = np.random.default_rng([n_texts, int(100 * spread)])
    left = 0
    for _ in range(n_runs):
        text = rng.normal(0.75, 0.2, size=(n_texts, 1))
        single = text + rng.normal(0, spread, size=(n_texts, 4))
        sets = np.stack([single.mean(axis=1, where=[k != i for k in range(4)]) for i in range(4)], axis=1)
        by_set = np.hstack([sets, single])
        picks = cross_picked(by_set)
        own = by_set[np.arange(n_texts), picks]
        first_half = np.arange(n_texts) * 2 < n_texts
        of_first, of_second = (int(by_set[half].mean(axis=0).argmax()) for half in (first_half, ~first_half))
        options: dict[Choice, FloatArray] = {
            "cluster": np.where(first_half, by_set[:, of_second], by_set[:, of_first]),
            "own": own,
            "mixed": (own + by_set[:, 0]) / 2,
        }
        left += better(by_set[:, 0], options) != "global"
    return left / n_runs


@pytest.mark.parametrize(("n_texts", "spread"), [(20, 0.1), (50, 0.1), (50, 0.3), (200, 0.1)])
def test_identical_clients_stay_with_the_tuned_set(n_texts: int, spread: float) -> None:
    # 5%, and three standard errors of a share of 1,500.
    assert false_choices(n_texts, spread) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1500)


@pytest.mark.parametrize("structure", [grouping.STRUCTURE, -1.0])
def test_groups_that_noise_makes_are_few_and_fool_nobody(monkeypatch: pytest.MonkeyPatch, structure: float) -> None:
    """Six clients alike, 150 times; at -1, groups are taken whatever they are."""
    monkeypatch.setattr(grouping, "STRUCTURE", structure)
    rng, left, grouped, half = np.random.default_rng(5), 0, 0, 20
    for _ in range(150):
        scores = {f"c{i}": rng.normal(0.75, 0.2, size=(2 * half, 5)) for i in range(6)}
        nought = (0.0,) * 5
        halves = [
            {c: Scored(n=half, total=tuple(s[at].sum(axis=0)), diff=nought, diff_sq=nought) for c, s in scores.items()}
            for at in (slice(half), slice(half, None))
        ]
        for c, (_, by_first, by_second) in grouping.best_alike(halves).items():
            grouped += 1
            held = np.concatenate([scores[c][:half, by_second], scores[c][half:, by_first]])
            left += better(scores[c][:, 0], {"cluster": held}) != "global"

    assert (grouped > 800) if structure < 0 else (grouped < 0.05 * 900)
    assert left <= 0.05 * grouped + 3 * np.sqrt(0.05 * 0.95 * grouped)


def test_choosing_and_testing_on_the_same_texts_would_be_wrong_far_more_often() -> None:
    rng = np.random.default_rng(1)
    left = 0
    for _ in range(400):
        by_set = rng.normal(0.75, 0.2, size=(50, 8))
        left += better(by_set[:, 0], {"own": by_set[:, by_set.mean(axis=0).argmax()]}) != "global"

    assert left / 400 > 0.2


# ---------------------------------------------------------------- planted: two groups with opposite words


def opposite(request: LabelRequest) -> list[float]:
    """Prompts a and c know group 1 ("zig" is positive), b and d group 2, where it is the other way round."""
    knows_first = request.prefix[0] in "ac"
    sign = 1 if "zig" in request.text else -1
    shade = (len(request.text) * (3 + "abcd".index(request.prefix[0]))) % 7 / 10  # not every text is alike
    strength = (2.0 - shade) * (1 if knows_first else -1) * sign
    return [-strength / 2, strength / 2]


def group_data(name: str, flipped: bool, n: int, seed: int) -> ClientData:
    rng = np.random.default_rng([seed, 11])
    labels = np.arange(n) % 2
    said = [("zig" if y != flipped else "zag") if rng.random() < 0.9 else rng.choice(["zig", "zag"]) for y in labels]
    texts = tuple(f"{word}{'.' * int(rng.integers(9))} {seed} {i}" for i, word in enumerate(said))
    made = Labelled(texts=texts, labels=labels.astype(np.int64))
    return ClientData(client_id=name, train=made, test=Labelled(texts=texts[:0], labels=labels[:0]))


def two_groups(n_flipped: int, n: int = 40) -> tuple[Bench, Reading]:
    """Six clients of which the last ``n_flipped`` read the words the other way round, all finalists scored."""
    scene = bench(6, n, fm=ScriptedFM(rule=opposite))
    for c, client in enumerate(scene.clients.values()):
        client.data = group_data(client.client_id, c >= 6 - n_flipped, n, c)
        client.scores.data = client.data.train
        client.scores.log_prior = np.zeros(2)
        wait_for(client.scores.ask(scene.fm, (A, B, C, D), n))
    tuned = scene.drive(Session(scene.federation(max_fm_calls=0)).calibrate((A, C)), 0)
    finalists = (A, C, B, D)
    return scene, Reading(milestone=1, fm_calls=0, prompt=tuned, single=prompt_set((A,)), stop=n, finalists=finalists)


def chosen(scene: Bench, offered: dict[str, Offer], tuned: PromptSet) -> dict[str, Any]:
    return {c: choose(client.scores, tuned, offered[c]) for c, client in scene.clients.items()}


def test_a_group_with_other_words_chooses_other_prompts() -> None:
    scene, reading = two_groups(n_flipped=2)
    calls = scene.fm.n_calls

    offered = scene.drive(offers(scene.federation(max_fm_calls=0), reading), 0)
    got = chosen(scene, offered, reading.prompt)

    assert scene.fm.n_calls == calls
    for c in range(4):  # perhaps not all of them: the tuned set's calibration has heard the other two as well
        assert set(got[f"client{c}"].prompt.prompts) <= {A, C}
    for c in (4, 5):
        assert got[f"client{c}"].choice in ("cluster", "own")
        assert set(got[f"client{c}"].prompt.prompts) <= {B, D}
    # The two groups were found: what is best for the last two is a set of b and d.
    sets = [tuple(reading.finalists[i] for i in s) for s in offered["client0"].score.sets]
    assert [set(sets[offered[f"client{c}"].alike[0]]) <= {A, C} for c in range(6)] == [True] * 4 + [False] * 2
    assert {offered[f"client{c}"].alike for c in range(4)} == {offered["client0"].alike}


def test_what_is_chosen_is_better_on_fresh_texts() -> None:
    scene, reading = two_groups(n_flipped=2)
    offered = scene.drive(offers(scene.federation(max_fm_calls=0), reading), 0)

    for c, client in enumerate(scene.clients.values()):
        mine = choose(client.scores, reading.prompt, offered[client.client_id]).prompt
        fresh = group_data("x", c >= 4, 60, seed=100 + c).train
        right = {}
        for name, used in (("global", reading.prompt), ("mine", mine)):
            own = client.arms.calibrate(used)
            answers = used.predict(fresh.texts, fm=scene.fm, calibration=own)
            said = [LABELS.index(answer.label or "") for answer in answers]
            right[name] = np.mean(said == fresh.labels)
        assert right["mine"] >= right["global"] + (0.3 if c >= 4 else 0.0)


def test_identical_clients_are_one_group_and_keep_the_tuned_set() -> None:
    scene, reading = two_groups(n_flipped=0)

    offered = scene.drive(offers(scene.federation(max_fm_calls=0), reading), 0)

    assert {c.choice for c in chosen(scene, offered, reading.prompt).values()} == {"global"}


def test_adopting_makes_no_call_keeps_the_choice_at_the_client_and_tells_which(tmp_path: Path) -> None:
    scene, reading = two_groups(n_flipped=2)
    offered = scene.drive(offers(scene.federation(max_fm_calls=0), reading), 0)
    client = scene.clients["client5"]
    client.folder = tmp_path
    task = Task(
        round=1,
        client_id="client5",
        run="run",
        fleet="tuning",
        grant=0,
        limit=0,
        body=Adopt(prompt=reading.prompt, stack=(1.0, 0.5), offer=offered["client5"]),
    )
    calls = scene.fm.n_calls

    reply = decode_reply(wait_for(client.handle(encode(task)))).body

    kept = PromptSet.load(tmp_path / "personal.json")
    assert scene.fm.n_calls == calls
    assert isinstance(reply, Adopted)
    assert reply.choice in ("cluster", "own")
    assert set(kept.prompts) <= {B, D}
    own = client.arms.calibrate(choose(client.scores, reading.prompt, offered["client5"]).prompt)
    assert kept.weights == pytest.approx(own.weights)


# ---------------------------------------------------------------- little to choose by


def test_few_texts_or_none_leave_the_tuned_set() -> None:
    score = Score(prompts=(A, B), sets=((0,), (1,)), stop=9, weights=(1.0, 1.0), bias=(0.0,) * 4)
    store = ScoreStore(group_data("x", False, 9, 1).train, 2)

    assert choose(store, prompt_set((A,)), Offer(score=score)).choice == "global"  # nothing was scored
    wait_for(store.ask(ScriptedFM(rule=opposite), (A, B), 9))
    assert choose(store, prompt_set((B,)), Offer(score=score)).choice == "global"  # nine texts


def test_one_prompt_leaves_nothing_to_choose_and_no_round_is_sent() -> None:
    scene, reading = two_groups(0)
    assert list(offers(scene.federation(), replace(reading, finalists=(A,)))) == []


def test_folds_are_those_of_the_calibration() -> None:
    """A text's score must not rest on a fit that saw its label, nor its set on a choice that saw its score."""
    assert inspect.signature(cross_fitted_proba).parameters["folds"].default == FOLDS
