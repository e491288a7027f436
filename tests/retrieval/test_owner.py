"""An owner answers what its policy allows, and no more."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from promptfed.errors import ConfigError, DataError, RunError
from promptfed.messages import Failed, Join, Task, decode_reply, encode
from promptfed.messages.methods import packed, unpacked
from promptfed.messages.retrieval import Describe, Fetch, Found, Search, Shown, TaskBody
from promptfed.privacy.accounting import epsilon_of
from promptfed.privacy.secret import Secret
from promptfed.types import FloatArray
from retrieval import owner as owner_module
from retrieval.documents import Document
from retrieval.index import LocalIndex
from retrieval.owner import ASKERS, REMEMBERED, IndexOwner, Policy
from tests.support import WordEncoder

CANARY = "canary-7391 is a secret word of the first document"
TEXTS = {"first": CANARY, "second": "leave is thirty days a year", "third": "wages are paid monthly"}


def owner(policy: Policy | None = None, **options: Any) -> IndexOwner:
    index = LocalIndex(WordEncoder())
    index.add([Document(doc_id=i, text=t, metadata={"page": "canary-meta"}) for i, t in TEXTS.items()])
    return IndexOwner("north", index, policy, **options)


def asked(it: IndexOwner, body: TaskBody | Join) -> tuple[Any, bytes]:
    """The reply's body, and its bytes."""
    task = Task(round=1, client_id="north", run="retrieval", fleet="retrieval", grant=0, limit=0, body=body)
    data = asyncio.run(it.handle(encode(task)))
    return decode_reply(data).body, data


def query(text: str, k: int = 2, asker: str = "south", **more: Any) -> Search:
    return Search(asker=asker, k=k, texts=(text,), **more)


def by_vector(text: str, k: int = 2, encoder: str = "words-64") -> Search:
    return Search(asker="south", k=k, vectors=packed(WordEncoder().encode([text])), dimension=64, encoder=encoder)


@pytest.mark.parametrize("ask", [query, by_vector])
def test_a_search_gives_scores_and_numbers_and_a_fetch_shows(ask: Any) -> None:
    it = owner(Policy(shares="documents"))

    found, data = asked(it, ask("canary secret word"))
    scores, passages = found.arrays
    shown, _ = asked(it, Fetch(asker="south", passages=(int(passages[0, 0]),)))

    assert scores[0, 0] > scores[0, 1] > 0
    assert b"canary" not in data
    assert shown == Shown(doc_ids=("first",), places=(0,), texts=(CANARY,))


def test_a_snippet_is_the_beginning() -> None:
    it = owner(Policy(shares="snippets", snippet_words=3))
    found, _ = asked(it, query("canary secret"))

    shown, data = asked(it, Fetch(asker="south", passages=(int(found.arrays[1][0, 0]),)))

    assert shown.texts == ("canary-7391 is a",)
    assert b"secret" not in data
    assert b"canary-meta" not in data


def test_a_snippet_is_short_in_a_script_without_spaces_too() -> None:
    it = owner(Policy(shares="snippets", snippet_words=2))
    it.index.add([Document(doc_id="long", text="秘密" * 400)])

    found, _ = asked(it, query("秘密", k=4))
    shown, _ = asked(it, Fetch(asker="south", passages=tuple(found.arrays[1][0].tolist())))

    assert max(map(len, shown.texts)) == 48


def test_scores_come_without_a_text_or_the_name_of_a_document() -> None:
    it = owner(Policy(shares="scores"))
    found, searched = asked(it, query("canary secret"))

    shown, fetched = asked(it, Fetch(asker="south", passages=(int(found.arrays[1][0, 0]),)))

    assert found.arrays[0][0, 0] > 0.3
    assert shown == Shown(doc_ids=("",), places=(0,), texts=("",))
    assert b"canary" not in searched + fetched
    assert b"first" not in searched + fetched


def test_nothing_is_nothing() -> None:
    it = owner(Policy(shares="nothing"))

    found, _ = asked(it, query("canary secret"))
    described, _ = asked(it, Describe(asker="south"))

    assert found.n == 1
    assert found.arrays[0].size == 0
    assert described.centroid == b""


def test_an_asker_may_be_an_exception() -> None:
    it = owner(Policy(shares="nothing", askers={"south": "documents"}))

    assert asked(it, query("canary", asker="south"))[0].arrays[0].size == 2
    assert asked(it, query("canary", asker="west"))[0].arrays[0].size == 0
    assert asked(it, Describe(asker="west"))[0].shares == "nothing"


def test_what_was_not_found_for_an_asker_is_not_shown_to_it() -> None:
    it = owner(Policy(shares="documents"))
    found, _ = asked(it, query("canary secret", k=1, asker="south"))
    number = int(found.arrays[1][0, 0])

    assert asked(it, Fetch(asker="west", passages=(number,)))[0].texts == ("",)
    assert asked(it, Fetch(asker="south", passages=(0, 1, 2, number)))[0].texts == ("", "", "", CANARY)


def test_numbers_tell_nothing_of_passages() -> None:
    """Neither their order nor how many there are; and another search has others."""
    it = owner()

    one, other = (asked(it, query("canary secret", k=3))[0].arrays[1][0] for _ in range(2))

    assert not set(one.tolist()) & set(other.tolist())
    assert min(one) > 1000
    assert len(set(one.tolist())) == 3


def test_what_was_found_long_ago_is_not_shown_any_more() -> None:
    it = owner(Policy(shares="documents"))
    found, _ = asked(it, query("canary secret", k=1))
    for _ in range(REMEMBERED):
        it._numbered("south", np.array([[1]]))

    assert asked(it, Fetch(asker="south", passages=(int(found.arrays[1][0, 0]),)))[0].texts == ("",)


def test_askers_without_end_are_not_remembered_without_end() -> None:
    it = owner()

    for i in range(ASKERS + 10):
        it._numbered(f"asker{i}", np.array([[0]]))

    assert len(it._granted) == ASKERS


def test_a_document_deleted_after_it_was_found_is_not_shown() -> None:
    it = owner(Policy(shares="documents"))
    found, _ = asked(it, query("canary secret", k=1))

    it.index.delete(["first"])

    assert asked(it, Fetch(asker="south", passages=(int(found.arrays[1][0, 0]),)))[0].texts == ("",)


def test_what_another_process_deletes_is_found_no_more(tmp_path: Path) -> None:
    owner().index.save(tmp_path)
    it = IndexOwner("north", LocalIndex.open(tmp_path, WordEncoder()), Policy(shares="documents"))
    before, _ = asked(it, query("canary secret", k=1))
    (number,) = before.arrays[1][0].tolist()

    other = LocalIndex.open(tmp_path, WordEncoder())
    other.delete(["first"])
    other.add([Document(doc_id="fourth", text="a new secret")])
    other.save(tmp_path)

    assert asked(it, Fetch(asker="south", passages=(number,)))[0].texts == ("",)
    after, _ = asked(it, query("canary secret", k=1))
    shown, data = asked(it, Fetch(asker="south", passages=(int(after.arrays[1][0, 0]),)))
    assert shown.texts == ("a new secret",)
    assert b"canary" not in data


def test_what_the_owner_changed_and_did_not_save_is_not_dropped(tmp_path: Path) -> None:
    owner().index.save(tmp_path)
    it = IndexOwner("north", LocalIndex.open(tmp_path, WordEncoder()), Policy(shares="documents"))
    it.index.add([Document(doc_id="fourth", text="a new secret")])
    LocalIndex.open(tmp_path, WordEncoder()).save(tmp_path)

    asked(it, query("secret"))

    assert "fourth" in it.index


def test_an_index_whose_folder_is_gone_is_not_searched(tmp_path: Path) -> None:
    owner().index.save(tmp_path / "ix")
    it = IndexOwner("north", LocalIndex.open(tmp_path / "ix", WordEncoder()), Policy(shares="documents"))

    shutil.rmtree(tmp_path / "ix")

    assert asked(it, query("canary"))[0] == Failed(reason="DataError")


@pytest.mark.parametrize(
    ("policy", "task"),
    [
        (Policy(accepts=("vector",)), query("canary")),
        (Policy(accepts=("text",)), by_vector("canary")),
        (Policy(), by_vector("canary", encoder="another")),
        (Policy(), Search(asker="", k=1, mode="lexical", vectors=b"\0" * 256, dimension=64, encoder="words-64")),
        (Policy(), Search(asker="", k=1, vectors=b"\0" * 255, dimension=64, encoder="words-64")),
        (Policy(), Search(asker="", k=1, vectors=b"\0" * 12, dimension=3, encoder="words-64")),
    ],
)
def test_what_it_can_not_do_leaves_as_the_name_of_an_exception(policy: Policy, task: Search) -> None:
    body, data = asked(owner(policy), task)

    assert isinstance(body, Failed)
    assert body.reason in ("RunError", "ConfigError", "ValueError")
    assert b"canary" not in data


def test_other_tasks_and_garbage_are_refused() -> None:
    it = owner()

    assert asked(it, Join(labels=(), seed=0))[0] == Failed(reason="WireError")
    assert decode_reply(asyncio.run(it.handle(b"canary"))).body == Failed(reason="WireError")


def test_a_policy_bounds_the_hits() -> None:
    assert asked(owner(Policy(max_hits=1)), query("canary", k=3))[0].arrays[0].shape == (1, 1)


# ---------------------------------------------------------------- the centroid


def centroid_of(described: Any) -> np.ndarray[Any, Any]:
    return unpacked(described.centroid, 64)


def test_without_noise_the_centroid_is_the_sum_of_the_documents_vectors() -> None:
    described, _ = asked(owner(Policy(epsilon=math.inf)), Describe(asker="south"))

    assert centroid_of(described) == pytest.approx(WordEncoder().encode(list(TEXTS.values())).sum(axis=0), abs=1e-5)
    assert (described.epsilon, described.noise_multiplier) == (0.0, 0.0)


def test_noise_is_what_the_ledger_says() -> None:
    """Over many keys, noise has the standard deviation that was told, and that is what epsilon asks for."""
    true = WordEncoder().encode(list(TEXTS.values())).sum(axis=0)
    noise = []
    for i in range(60):
        it = owner(Policy(epsilon=2.0), secret=Secret(i.to_bytes(32, "big")))
        described = it.release()
        noise.append(centroid_of(described) - true)

    told = described.noise_multiplier * described.clip
    n = np.size(noise)
    assert np.std(noise) == pytest.approx(told, rel=4 / math.sqrt(2 * n))
    assert abs(np.mean(noise)) < 4 * told / math.sqrt(n)
    assert epsilon_of(described.noise_multiplier, described.delta, n_compositions=1) <= 2.0
    assert epsilon_of(described.noise_multiplier - 0.01, described.delta, n_compositions=1) > 2.0
    assert it.spent == (2.0, 1e-5)


def test_one_document_moves_the_sum_by_no_more_than_the_clip() -> None:
    """A document of many passages counts once, with the mean of their vectors."""
    long = " ".join(f"word{i}" for i in range(50))
    index = LocalIndex(WordEncoder(), passage_words=5, overlap_words=0)
    index.add([Document(doc_id="a", text="one"), Document(doc_id="b", text="two")])
    without = IndexOwner("north", index, Policy(epsilon=math.inf)).release()
    index.add([Document(doc_id="long", text=long)])
    with_it = IndexOwner("north", index, Policy(epsilon=math.inf)).release()

    assert np.linalg.norm(centroid_of(with_it) - centroid_of(without)) <= 1.0 + 1e-5


def test_asked_again_it_says_the_same_and_spends_nothing() -> None:
    it = owner(Policy(epsilon=1.0))

    first, _ = asked(it, Describe(asker="south"))
    it.index.add([Document(doc_id="new", text="something new")])
    again, _ = asked(it, Describe(asker="west"))

    assert again == first
    assert it.spent[0] == 1.0


def test_a_new_release_is_paid_for_until_nothing_is_left() -> None:
    it = owner(Policy(epsilon=1.0, max_epsilon=2.0))

    first, second = it.release(), it.release()

    assert first.centroid != second.centroid
    assert it.spent == (2.0, 2e-5)
    with pytest.raises(RunError, match="2 of max_epsilon = 2 are spent"):
        it.release()
    assert asked(it, Describe(asker="south"))[0].centroid == second.centroid
    with pytest.raises(ConfigError, match="lets no centroid out"):
        owner(Policy(epsilon=None)).release()


def test_an_owner_that_starts_again_remembers_what_it_spent(tmp_path: Path) -> None:
    first = owner(Policy(epsilon=1.0), folder=tmp_path).release()

    again = owner(Policy(epsilon=1.0), folder=tmp_path)
    described, _ = asked(again, Describe(asker="south"))

    assert described.centroid == first.centroid
    assert again.spent[0] == 1.0
    assert "canary" not in (tmp_path / "released.json").read_text()
    assert len(json.loads((tmp_path / "released.json").read_text())["releases"]) == 1


def test_what_could_not_be_written_is_not_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    it = owner(Policy(epsilon=1.0), folder=tmp_path)

    def full(path: Path, content: str) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(owner_module, "write_whole", full)
    assert asked(it, Describe(asker="south"))[0] == Failed(reason="OSError")
    assert it.spent[0] == 0.0
    monkeypatch.undo()

    assert asked(it, Describe(asker="south"))[0].centroid
    assert it.spent[0] == 1.0


def test_an_empty_index_is_told_apart_from_one_with_a_document_by_noise_alone() -> None:
    it = IndexOwner("north", LocalIndex(WordEncoder()), Policy(epsilon=1.0))

    centroid = centroid_of(asked(it, Describe(asker="south"))[0])

    assert centroid.shape == (64,)
    assert 1.0 < centroid.std() < 6.0


def test_an_index_of_another_encoder_has_no_centroid_until_another_is_released(tmp_path: Path) -> None:
    class Other(WordEncoder):
        encoder_id = "other"

    owner(Policy(epsilon=1.0), folder=tmp_path).release()
    it = IndexOwner("north", LocalIndex(Other()), Policy(epsilon=1.0, max_epsilon=2.0), folder=tmp_path)

    described, _ = asked(it, Describe(asker="south"))

    assert (described.encoder, described.centroid) == ("other", b"")
    assert it.release().encoder == "other"
    assert asked(it, Describe(asker="south"))[0].centroid


def test_what_is_prepared_is_what_is_told() -> None:
    it = owner(Policy(epsilon=1.0))
    it.prepare()
    it.prepare()

    assert it.spent[0] == 1.0
    assert asked(it, Describe(asker="south"))[0].centroid
    silent = owner(Policy(shares="nothing"))
    silent.prepare()
    assert silent.spent[0] == 0.0


def test_failures_are_told_to_the_owner_without_a_text(caplog: pytest.LogCaptureFixture) -> None:
    asked(owner(Policy(accepts=("vector",))), query("canary-7391"))

    assert "north: a task failed: queries come as text here" in caplog.text
    assert "canary" not in caplog.text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epsilon": 10.0}, "more than max_epsilon = 8"),
        ({"max_epsilon": math.nan}, "more than max_epsilon = nan"),
        ({"epsilon": 0.0}, "epsilon = 0"),
        ({"delta": 1.0}, "delta = 1"),
        ({"snippet_words": 0}, "snippet_words = 0"),
        ({"max_hits": 0}, "max_hits = 0"),
        ({"hourly_queries": 0}, "hourly_queries = 0"),
    ],
)
def test_policies_that_can_not_be_kept_are_refused(options: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Policy(**options)


def test_unknown_shares_and_forms_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown share 'all' for west"):
        Policy(askers={"west": "all"})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="expected 'text', 'vector' or both"):
        Policy(accepts=())


def test_no_vector_of_a_document_is_in_any_answer() -> None:
    """Not in float32, nor in float64."""
    it = owner(Policy(shares="documents"))
    found, one = asked(it, query("canary secret", k=3))
    _, two = asked(it, Fetch(asker="south", passages=tuple(found.arrays[1][0].tolist())))
    _, three = asked(it, Describe(asker="south"))

    for vector in WordEncoder().encode(list(TEXTS.values())):
        for form in ("<f4", "<f8", "<f2"):
            assert vector.astype(form).tobytes()[:32] not in one + two + three


def test_found_of_wrong_sizes_is_no_message() -> None:
    good = Found.of(np.ones((2, 3)), np.ones((2, 3), dtype=np.int64))

    assert good.arrays[0].shape == (2, 3)
    for broken in (
        {"scores": good.scores[:-4]},
        {"passages": b""},
        {"n": 4},
        {"scores": b"\xff" * 24},
        {"scores": np.full(6, np.inf, "<f4").tobytes()},
    ):
        with pytest.raises(RunError):
            Found(**{"n": 2, "scores": good.scores, "passages": good.passages, **broken})


def test_an_asker_has_so_many_queries_and_gets_them_back_over_an_hour() -> None:
    now = [0.0]
    it = owner(Policy(hourly_queries=4, askers={"east": "scores"}), clock=lambda: now[0])

    def answered(asker: str, n: int) -> bool:
        return isinstance(asked(it, Search(asker=asker, k=1, texts=("leave",) * n))[0], Found)

    assert answered("south", 3)
    assert not answered("south", 2)  # one is left, and stays
    assert answered("south", 1)
    assert not answered("south", 1)
    assert not answered("somebody-else", 1)  # another name is no way around it
    assert answered("east", 4)  # who has a name in the policy has its own
    now[0] = 1800.0
    assert not answered("south", 3)
    assert answered("south", 2)
    now[0] = 1e6
    assert answered("south", 4)
    assert not answered("south", 1)


def test_releases_at_two_scales_do_not_share_their_noise(tmp_path: Path) -> None:
    """Otherwise two sums, as a lost ledger leads to, would give away the sum without noise."""
    noises = []
    exact = centroid_of(owner(Policy(epsilon=math.inf)).release())
    for epsilon in (8.0, 1.0):
        made = owner(Policy(epsilon=epsilon), folder=tmp_path).release()
        noises.append((centroid_of(made) - exact) / made.noise_multiplier)
        (tmp_path / "released.json").unlink()

    assert abs(float(np.corrcoef(*noises)[0, 1])) < 0.5


def test_a_policy_that_asks_for_more_privacy_holds_back_what_was_released(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for before in (Policy(epsilon=math.inf), Policy(epsilon=8.0)):
        folder = tmp_path / f"{before.epsilon}"
        owner(before, folder=folder).release()
        it = owner(Policy(epsilon=1.0, max_epsilon=9.0), folder=folder)
        it.prepare()

        assert asked(it, Describe(asker="south"))[0].centroid == b""
        assert "the policy asks for an epsilon of 1" in caplog.text
        assert asked(owner(before, folder=folder), Describe(asker="south"))[0].centroid
        caplog.clear()
    assert it.release().epsilon == 1.0
    assert asked(it, Describe(asker="south"))[0].centroid


def test_a_delta_is_a_part_of_what_a_policy_asks_for(tmp_path: Path) -> None:
    owner(Policy(epsilon=1.0, delta=1e-5), folder=tmp_path).release()

    assert asked(owner(Policy(epsilon=1.0, delta=1e-9), folder=tmp_path), Describe(asker="south"))[0].centroid == b""


def test_an_owner_is_told_that_its_documents_have_changed_and_may_renew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = Policy(epsilon=1.0, max_epsilon=2.0)
    it = owner(policy, folder=tmp_path)
    it.prepare()
    owner(policy, folder=tmp_path).prepare(renew=True)  # nothing has changed: nothing is paid
    assert caplog.text == ""
    it.index.add([Document(doc_id="new", text="something new")])
    again = IndexOwner("north", it.index, policy, folder=tmp_path)

    again.prepare()
    assert "its documents have changed since its centroid was released" in caplog.text
    assert again.spent[0] == 1.0
    again.prepare(renew=True)
    again.prepare(renew=True)

    assert again.spent[0] == 2.0


def test_an_owner_does_not_start_with_another_encoder_of_the_same_name(tmp_path: Path) -> None:
    class Turned(WordEncoder):
        def encode(self, texts: Sequence[str]) -> FloatArray:
            return super().encode(texts)[:, ::-1]

    owner().index.save(tmp_path)

    with pytest.raises(ConfigError, match="is another than the one that this index was made with"):
        IndexOwner("north", LocalIndex.open(tmp_path, Turned())).prepare()


@pytest.mark.parametrize("releases", ["", "{}", "[1]", [], 5, [{}], {"a": 1}, [{"epsilon": "x", "delta": 0}]])
def test_a_ledger_that_can_not_be_read_is_named_and_pays_for_nothing(tmp_path: Path, releases: Any) -> None:
    owner(folder=tmp_path).release()
    path = tmp_path / "released.json"
    path.write_text(
        releases if isinstance(releases, str) else json.dumps({**json.loads(path.read_text()), "releases": releases})
    )

    for what in (lambda it: it.prepare(), lambda it: it.release(), lambda it: it.spent):
        with pytest.raises(DataError, match=r"released.json: what was released of this index can't be read"):
            what(owner(folder=tmp_path))
