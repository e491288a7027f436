"""``aug_pe``: exemplars by private votes, and what is said of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import dp_accounting as dpa
import numpy as np
import pytest

import promptfed
from promptfed.errors import ConfigError
from promptfed.fm.scripted import ScriptedFM
from promptfed.messages import decode_reply, decode_task
from promptfed.messages.methods import NearestVotes, NoisyVotes
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.template import PromptTemplate
from promptfed.registry import load_method
from promptfed.strategies.aug_pe import AugPE, ranked, words_of
from promptfed.strategies.open_pool import sum_votes
from tests.contracts.method import MethodContract, Wire
from tests.promptfed.test_edges import configured, rows_of
from tests.support import CHEERFUL, GLOOMY, LABELS, Bench, WordEncoder, bench, pooled_accuracy, public_texts, replies

PHRASES = tuple(f"It is {word}." for word in (*CHEERFUL[:2], *GLOOMY[:2]))


class TestContract(MethodContract):
    budget: ClassVar[int] = 400

    def method(self) -> AugPE:
        return AugPE()


def a_run(method: AugPE, seed: int = 1, wires: list[Wire] | None = None) -> tuple[Bench, PromptSet]:
    """Three clients with two words a label."""

    def wrap(inner: Any) -> Any:
        wire = Wire(inner)
        if wires is not None:
            wires.append(wire)
        return wire

    scene = bench(3, 40, n_words=2, fm=ScriptedFM(phrases=PHRASES), wrap=wrap)
    federation = scene.federation(max_fm_calls=500, seed=seed, public=public_texts(n_words=2))
    return scene, scene.drive(method.run(federation), 500)


def events(scene: Bench, kind: str) -> list[dict[str, Any]]:
    return [e for e in scene.events.events if e["kind"] == kind]


@pytest.mark.parametrize("seed", [1, 2])
def test_the_tuned_prompt_beats_the_instruction(seed: int) -> None:
    """Planted: a prompt is good if it shows both words of a label, which no text but the voted exemplars does."""
    start = PromptSet(
        labels=LABELS,
        prompts=(PromptTemplate(text="Is the review negative or positive?\n\nText: {text}\nLabel:", words=LABELS),),
        weights=(1.0,),
        bias=(0.0, 0.0),
    )

    scene, prompt = a_run(AugPE(), seed)

    (materials,) = events(scene, "materials")
    for label, words, others in (("negative", GLOOMY, CHEERFUL), ("positive", CHEERFUL, GLOOMY)):
        best = materials["exemplars"][label][0]
        assert any(word in best.lower() for word in words[:2]), best
        assert not any(word in best.lower() for word in others)
    assert pooled_accuracy(start, 100, seed=77) < 0.6
    assert pooled_accuracy(prompt, 100, seed=77) > 0.75


def test_what_is_said_is_what_crossed() -> None:
    """The release, by the closed form of the Gaussian and by counting; and the noise that clients were asked for."""
    wires: list[Wire] = []
    scene, _ = a_run(AugPE(epsilon=4.0, n_rounds=5), wires=wires)

    (release,) = events(scene, "release")
    tasks = [t.body for t in map(decode_task, wires[0].down) if isinstance(t.body, NearestVotes)]
    sent = [r.body for r in map(decode_reply, wires[0].up) if isinstance(r.body, NoisyVotes)]

    assert (release["unit"], release["delta"], release["sampling_rate"]) == ("record", 1e-5, 1.0)
    assert release["noise_multiplier"] == pytest.approx(2.42, abs=0.005)  # for five rounds at (4, 1e-5)
    assert {task.noise for task in tasks} == {release["noise_multiplier"]}
    assert sorted({task.release for task in tasks}) == list(range(release["n_compositions"])) == list(range(5))
    exact = dpa.get_epsilon_gaussian(release["noise_multiplier"] / math.sqrt(5), 1e-5)
    assert release["epsilon"] == pytest.approx(exact, abs=0.01)
    assert release["epsilon"] <= 4.0
    assert 3 * release["n_outputs"] == sum(len(body.votes) // 4 for body in sent)


def test_without_noise_nothing_is_claimed() -> None:
    scene, _ = a_run(AugPE(epsilon=math.inf))

    assert events(scene, "release") == []


def test_a_run_tells_its_releases_and_that_they_were_simulated(tmp_path: Path) -> None:
    config = configured(tmp_path, rows_of(3, 20), rows_of(3, 6, 50))
    config["method"] = {"name": "aug_pe", "options": {"epsilon": 6.0, "n_rounds": 2}, "max_prompts": 1}
    config["budget"] = {"max_fm_calls": 450}
    config["evaluation"] = {"baselines": ["local_only"]}

    result = promptfed.run(config, out=tmp_path / "run", fm=ScriptedFM(), encoder=WordEncoder())

    assert result.folder is not None
    told = json.loads((result.folder / "summary.json").read_text())["privacy"]["releases"]
    assert [(r["phase"], r["unit"], r["simulated"]) for r in told] == [
        ("tuning", "record", True),
        ("local_only", "record", True),
    ]
    assert all(5.9 < r["epsilon"] <= 6.0 for r in told)
    page = (result.folder / "report.html").read_text()
    assert "What was released under differential privacy" in page
    assert "how many of its texts are nearest to it" in page
    assert not list(result.folder.rglob("noise.key"))

    again = promptfed.resume(result.folder, fm=ScriptedFM(), encoder=WordEncoder())

    assert again.summary["privacy"]["releases"] == told
    assert again.prompt.prompt_id == result.prompt.prompt_id


# ---------------------------------------------------------------- parts


def test_a_text_is_worth_its_share_less_that_of_another_label() -> None:
    votes = np.array([[6.0, 3.0, 1.0, -2.0], [1.0, 8.0, 1.0, 0.0]])

    # negative: .6 - .1, .3 - .8, .1 - .1, 0; positive: .1 - .6, .8 - .3, 0, 0
    assert ranked(["dull", "film", "it", "so"], votes, 2) == [["dull"], ["film"]]


def test_ranks_go_from_most_to_least() -> None:
    votes = np.array([[2.0, 5.0, 3.0, 0.0], [0.0, 0.0, 0.0, 9.0]])

    assert ranked(["a", "b", "c", "d"], votes, 2) == [["b", "c"], ["d"]]


def test_words_whose_framed_texts_won_join_the_label() -> None:
    framed = [["It was bad.", "This is dull."], ["It was positive.", "This is fine."]]
    winners = [["This is dull.", "A film.", "It was bad."], ["It was positive.", "All is fine."]]

    assert words_of(winners, framed, LABELS) == [("dull", "bad"), ()]


def test_a_client_that_sends_too_little_or_no_numbers_costs_its_part_only() -> None:
    good = NoisyVotes(votes=np.array([1.0, -2.0], dtype="<f4").tobytes())
    short = NoisyVotes(votes=b"\0" * 4)
    no_numbers = NoisyVotes(votes=np.array([np.nan, 1.0], dtype="<f4").tobytes())

    summed = sum_votes(replies({"a": good, "b": short, "c": good, "d": no_numbers}), 2)

    assert summed.tolist() == [2.0, -4.0]


@pytest.mark.parametrize("options", [{"epsilon": 0}, {"delta": 1.5}, {"n_rounds": 0}, {"epsilon": math.nan}])
def test_options_out_of_range_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"method.options.{next(iter(options))}"):
        load_method("aug_pe", options)


def test_an_epsilon_without_end_is_an_option() -> None:
    assert load_method("aug_pe", {"epsilon": math.inf}) == AugPE(epsilon=math.inf)
