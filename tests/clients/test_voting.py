"""Private votes: counted by hand without noise, with the noise that was asked for, from a secret of the client's."""

from __future__ import annotations

import stat
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from clients import voting
from clients.client import Client
from clients.data import ClientData, Labelled
from clients.host import ClientHost
from promptfed.fm.scripted import ScriptedFM
from promptfed.messages import Join, Task, TaskBody, decode_reply, encode
from promptfed.messages.methods import NearestVotes, NextWord, NoisyVotes, unpacked
from promptfed.privacy.secret import KEY_BYTES, Secret, simulated_key
from promptfed.types import FloatArray, LabelRequest
from tests.support import LABELS, CountingFM, WordEncoder, sentences, wait_for

NEAREST = NearestVotes(texts=("A dull film.", "A fine film."), noise=0.0, release=0)
WORD = NextWord(
    shown=("Judge it.",),
    written="Say whether it is",
    fields=("Text", "Label"),
    words=LABELS,
    candidates=("good", "rain", "red"),
    sampling_rate=1.0,
    n_groups=4,
    max_texts=50,
    noise=0.0,
    release=0,
)


def a_client(
    train: Labelled, key: bytes | None = bytes(KEY_BYTES), rule: Callable[..., Sequence[float]] | None = None
) -> Client:
    data = ClientData(client_id="north", train=train, test=sentences(4))
    return Client(data, LABELS, CountingFM(ScriptedFM(rule=rule)), WordEncoder(), seed=1, noise_key=key)


def labelled(*pairs: tuple[str, int]) -> Labelled:
    return Labelled(texts=tuple(t for t, _ in pairs), labels=np.array([y for _, y in pairs], dtype=np.int64))


def tell(client: Client, body: TaskBody, number: int = 1) -> bytes:
    task = Task(round=number, client_id="north", run="run", fleet="tuning", grant=50, limit=10_000, body=body)
    return wait_for(client.handle(encode(task)))


def votes_of(client: Client, body: TaskBody, number: int = 1) -> FloatArray:
    reply = decode_reply(tell(client, body, number)).body
    assert isinstance(reply, NoisyVotes)
    return unpacked(reply.votes, len(reply.votes) // 4)


def rain_or_red(request: LabelRequest) -> list[float]:
    """Says "rain" where the meta-prompt has it, else "red"; "good" never."""
    return [0.0, 2.0 if "rain" in request.text else 0.0, 1.0]


# ---------------------------------------------------------------- nearest candidates


def test_each_text_votes_under_its_label_for_the_nearest_candidate() -> None:
    client = a_client(labelled(("dull", 0), ("a dull story", 0), ("fine weather", 1), ("a dull day", 1), ("fine", 1)))

    # (negative: dull, fine), (positive: dull, fine)
    assert votes_of(client, NEAREST).tolist() == [2, 0, 1, 2]


def test_a_text_more_changes_one_number_by_one() -> None:
    texts = [("dull", 0), ("fine", 1), ("a fine film", 0)]
    for more in (("so dull", 0), ("so fine", 1)):
        change = votes_of(a_client(labelled(*texts, more)), NEAREST) - votes_of(a_client(labelled(*texts)), NEAREST)

        assert sorted(change.tolist()) == [0, 0, 0, 1]


# ---------------------------------------------------------------- next words


def test_each_group_is_one_vote_and_one_call() -> None:
    client = a_client(sentences(40), rule=rain_or_red)

    votes = votes_of(client, WORD)

    assert votes.tolist() == [0, 0, 4]
    assert client.fm.grant == 50 - 4


def test_groups_are_disjoint_and_hold_what_was_drawn() -> None:
    client = a_client(sentences(400))

    groups = voting._groups(client, replace(WORD, sampling_rate=0.25, n_groups=5))
    drawn = np.concatenate(groups)

    assert len(set(drawn.tolist())) == len(drawn)
    assert stats.binomtest(len(drawn), 400, 0.25).pvalue > 0.001
    assert all(5 <= len(g) <= 40 for g in groups)


@pytest.mark.parametrize("max_texts", [50, 3])
def test_a_text_more_changes_one_group_and_moves_one_vote_at_most(max_texts: int) -> None:
    """Whatever is in it, and also where it takes another text's place in a group that is full."""
    base = [(f"day {i} {'rain' if i % 5 == 0 else ''}", i % 2) for i in range(30)]
    n_moved = 0
    for number in range(30):
        task = replace(WORD, sampling_rate=0.5, max_texts=max_texts, release=number)
        more, less = (a_client(labelled(*texts), rule=rain_or_red) for texts in ([*base, ("rain", 1)], base))

        changed = [
            i
            for i, (a, b) in enumerate(zip(voting._groups(more, task), voting._groups(less, task), strict=True))
            if a.tolist() != b.tolist()
        ]
        moved = np.abs(votes_of(more, task) - votes_of(less, task))

        assert len(changed) <= 1
        assert sorted(moved.tolist()) in ([0, 0, 0], [0, 1, 1])
        n_moved += bool(moved.any())
    assert n_moved > 0


def test_an_empty_group_asks_too_so_that_calls_do_not_count_texts() -> None:
    client = a_client(sentences(2), rule=rain_or_red)

    assert votes_of(client, replace(WORD, n_groups=9)).sum() == 9


def test_a_text_stands_in_the_meta_prompt_on_one_line_and_not_longer_than_it_may() -> None:
    seen: list[str] = []

    def rule(request: LabelRequest) -> list[float]:
        seen.append(request.text)
        return [0.0, 0.0, 1.0]

    votes_of(a_client(labelled(("two\nlines " + "word " * 100, 1)), rule=rule), replace(WORD, n_groups=1))

    block, ending = seen[0].split("\n\n")
    assert block.startswith("Text: two lines word")
    assert block.endswith("\nLabel: positive")
    assert len(block.split()) == voting.MAX_WORDS + 3
    assert ending == "Instruction: Judge it.\nInstruction: Say whether it is"


# ---------------------------------------------------------------- noise


def spread(task: NearestVotes | NextWord, n_keys: int) -> FloatArray:
    """What ``n_keys`` clients with the same texts, but keys of their own, add to their votes."""
    train = sentences(12)
    exact = votes_of(a_client(train, rule=rain_or_red), replace(task, noise=0.0))
    keys = [simulated_key(i, "north") for i in range(n_keys)]
    return np.array([votes_of(a_client(train, key, rain_or_red), task) - exact for key in keys])


def has_the_noise_of(residuals: FloatArray, noise: float) -> bool:
    """Whether residuals may be Gaussian noise of that standard deviation, rounded (which adds a variance of 1/12), by
    a two-sided test of the variance and one of the mean, each wrong once in a thousand times."""
    flat, variance = residuals.ravel(), noise**2 + 1 / 12
    by_variance = stats.chi2.cdf((flat**2).sum() / variance, len(flat))
    by_mean = stats.norm.cdf(flat.mean() / np.sqrt(variance / len(flat)))
    return all(0.0005 < p < 0.9995 for p in (by_variance, by_mean))


@pytest.mark.parametrize("task", [replace(NEAREST, noise=2.5), replace(WORD, noise=2.5)])
def test_what_leaves_has_the_noise_that_the_task_asks_for(task: NearestVotes | NextWord) -> None:
    residuals = spread(task, 150)

    assert has_the_noise_of(residuals, 2.5)
    assert not has_the_noise_of(residuals, 2.0)
    assert not has_the_noise_of(residuals, 3.0)
    assert np.abs(np.corrcoef(residuals.T) - np.eye(residuals.shape[1])).max() < 0.3


def test_a_build_without_noise_or_with_the_same_noise_everywhere_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    for sabotaged in (lambda _self, n, *_: np.zeros(n), lambda _self, n, *_: np.full(n, 1.0)):
        monkeypatch.setattr(Secret, "normals", sabotaged)

        assert not has_the_noise_of(spread(replace(NEAREST, noise=2.5), 100), 2.5)


def test_what_leaves_are_whole_numbers() -> None:
    votes = votes_of(a_client(sentences(12)), replace(NEAREST, noise=2.5))

    assert np.array_equal(votes, np.rint(votes))


def test_the_same_task_gets_the_same_bytes_from_a_client_that_starts_again() -> None:
    task = replace(NEAREST, noise=2.5)

    assert tell(a_client(sentences(12)), task) == tell(a_client(sentences(12)), task)


def test_another_release_gets_other_noise_and_so_do_other_texts() -> None:
    client = a_client(sentences(12))
    texts = tuple(f"A {word} film." for word in ("dull", "fine", "long", "short"))
    task = replace(NEAREST, texts=texts, noise=5.0)
    exact = votes_of(client, replace(task, noise=0.0))

    first, second = (votes_of(client, replace(task, release=r)) - exact for r in (0, 1))
    one_less = a_client(labelled(*zip(client.data.train.texts[1:], client.data.train.labels[1:].tolist(), strict=True)))
    third = votes_of(one_less, task) - votes_of(one_less, replace(task, noise=0.0))

    assert first.tolist() != second.tolist()
    assert first.tolist() != third.tolist()


def test_the_seed_of_the_run_does_not_say_what_the_noise_is() -> None:
    task = replace(NEAREST, texts=tuple(f"A {i} film." for i in "abcdefgh"), noise=5.0)

    first, second = (votes_of(a_client(sentences(12), key=None), task) for _ in range(2))

    assert first.tolist() != second.tolist()


def test_a_client_on_its_own_machine_keeps_its_key_through_a_restart(tmp_path: Path) -> None:
    task = Task(
        round=2,
        client_id="north",
        run="run1",
        fleet="tuning",
        grant=0,
        limit=0,
        body=replace(NEAREST, texts=tuple(f"A {i} film." for i in "abcdefgh"), noise=5.0),
    )

    def answer(folder: Path, *, forget: bool = False) -> bytes:
        host = ClientHost("north", rows(20), rows(4), ScriptedFM(), WordEncoder(), folder)
        if not (folder / "run1").exists():
            wait_for(host.handle(encode(replace(task, round=1, body=Join(labels=LABELS, seed=7)))))
        if forget:  # as if it had been killed before the task was noted
            (folder / "run1" / "history" / "tuning.msgpack").unlink()
        return wait_for(host.handle(encode(task)))

    first = answer(tmp_path / "a")

    assert answer(tmp_path / "a", forget=True) == first
    assert answer(tmp_path / "b") != first
    assert stat.S_IMODE((tmp_path / "a" / "run1" / "noise.key").stat().st_mode) == 0o600


def rows(n: int) -> list[tuple[str, str, str]]:
    data = sentences(n)
    return [("north", t, LABELS[y]) for t, y in zip(data.texts, data.labels, strict=True)]
