"""Federated search: the same as one central index where all are asked, and no worse than its owners are alive."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptfed.errors import CapabilityError, ConfigError
from promptfed.federation.inprocess import InProcessTransport
from promptfed.messages import Failed, Reply, decode_reply, decode_task, encode
from promptfed.messages.retrieval import Describe, Fetch, Found, Search, Shown
from promptfed.privacy.secret import Secret, simulated_key
from promptfed.types import FloatArray, Hit
from retrieval.documents import Document
from retrieval.federated import FederatedRetriever
from retrieval.index import LocalIndex
from retrieval.merging import ReadAgain, by_rank, cori
from retrieval.owner import IndexOwner, Policy
from retrieval.routing import LearnedRouter, shares_of
from tests.support import WordEncoder

# Each owner has topics of its own.
TOPICS = {"cars": "engine wheel road driver fuel", "law": "court judge verdict jury appeal", "sea": "ship wave harbour"}


class OtherEncoder(WordEncoder):
    """Words in other places, and more of them."""

    encoder_id = "words-100"

    def __init__(self) -> None:
        super().__init__(100)


class Wire(InProcessTransport):
    """Keeps the bytes of all that crosses."""

    def __init__(self, clients: Mapping[str, Any]) -> None:
        super().__init__(clients)
        self.down: list[tuple[str, bytes]] = []
        self.up: list[tuple[str, bytes]] = []

    async def exchange(self, tasks: Mapping[str, bytes], awaited: Any, deadline_s: float | None) -> dict[str, bytes]:
        self.down += tasks.items()
        replies = await super().exchange(tasks, awaited, deadline_s)
        self.up += replies.items()
        return replies

    def asked(self, kind: type) -> list[str]:
        return [owner for owner, data in self.down if isinstance(decode_task(data).body, kind)]


def documents(owner: str, n: int = 20) -> list[Document]:
    words, rng = TOPICS[owner].split(), np.random.default_rng(len(owner))
    return [
        Document(doc_id=f"{owner}{i}", text=f"{' '.join(rng.choice(words, 4))} tag{chr(97 + i)} {owner}")
        for i in range(n)
    ]


def owners(policy: Policy | None = None, **policies: Policy) -> dict[str, IndexOwner]:
    out = {}
    for name in TOPICS:
        index = LocalIndex(WordEncoder())
        index.add(documents(name))
        secret = Secret(simulated_key(0, name))
        out[name] = IndexOwner(
            name, index, policies.get(name, policy or Policy(shares="documents", epsilon=float("inf"))), secret=secret
        )
    return out


def retriever(parties: Mapping[str, Any], **options: Any) -> tuple[FederatedRetriever, Wire]:
    wire = Wire(parties)
    return FederatedRetriever(wire, list(parties), options.pop("encoder", WordEncoder()), **options), wire


def central() -> LocalIndex:
    index = LocalIndex(WordEncoder())
    index.add([document for name in TOPICS for document in documents(name)])
    return index


QUERIES = ["the judge of the court", "a ship in the harbour tagd", "fuel for the engine", "road, wheel and driver tagh"]


@pytest.mark.parametrize("send", ["text", "vector"])
def test_all_asked_with_one_encoder_find_what_one_central_index_finds(send: Any) -> None:
    it, _ = retriever(owners(), send=send)

    answers = it.ask(QUERIES, 5)

    for mine, its in zip(answers.hits, central().search(QUERIES, 5), strict=True):
        assert [h.score for h in mine] == pytest.approx([h.score for h in its], abs=1e-5)
        sure = {h.doc_id for h in its if h.score > its[-1].score + 1e-5}  # ties at the end may go either way
        assert sure <= {h.doc_id for h in mine}
        assert all(h.owner == h.doc_id.rstrip("0123456789") for h in mine)
    assert answers.asked == [tuple(sorted(TOPICS))] * 4
    assert answers.silent == ()


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_deal_of_documents_finds_the_same(data: st.DataObject) -> None:
    """Texts that are all different, in any deal among owners: the scores are those of one index."""
    words = data.draw(st.lists(st.text("abcdef", min_size=1, max_size=3), min_size=1, max_size=25, unique=True))
    n_owners, k = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    whose = data.draw(st.lists(st.integers(0, n_owners - 1), min_size=len(words), max_size=len(words)))
    all_of_them = LocalIndex(WordEncoder())
    indices = [LocalIndex(WordEncoder()) for _ in range(n_owners)]
    for word, owner in zip(words, whose, strict=True):
        for index in (all_of_them, indices[owner]):
            index.add([Document(doc_id=word, text=word)])
    parties = {f"o{i}": IndexOwner(f"o{i}", index, Policy(shares="documents")) for i, index in enumerate(indices)}
    queries = data.draw(st.lists(st.sampled_from(words), min_size=1, max_size=3))

    found = retriever(parties)[0].search(queries, k)

    for mine, its in zip(found, all_of_them.search(queries, k), strict=True):
        assert [h.score for h in mine] == pytest.approx([h.score for h in its], abs=1e-5)


def test_a_query_goes_to_the_likeliest_owners_alone() -> None:
    it, wire = retriever(owners(), n_ask=1)

    answers = it.ask(QUERIES, 3)

    assert answers.asked == [("law",), ("sea",), ("cars",), ("cars",)]
    assert answers.hits[0][0].owner == "law"
    sent = {owner: decode_task(data).body for owner, data in wire.down if isinstance(decode_task(data).body, Search)}
    assert {owner: len(body.vectors) // (4 * 64) for owner, body in sent.items()} == {"law": 1, "sea": 1, "cars": 2}


def test_with_a_coverage_a_clear_query_asks_fewer_than_a_vague_one() -> None:
    it, _ = retriever(owners(Policy(shares="documents", epsilon=float("inf"))), coverage=0.9)

    answers = it.ask(["judge court jury verdict", "tagc"], 1)

    assert answers.asked[0] == ("law",)
    assert len(answers.asked[1]) > 1


def test_owners_are_asked_what_they_are_like_once() -> None:
    it, wire = retriever(owners(), n_ask=1)

    it.search(QUERIES, 2)
    it.search(QUERIES, 2)

    assert sorted(wire.asked(Describe)) == sorted(TOPICS)


def test_an_owner_without_a_centroid_is_as_likely_as_the_average() -> None:
    it, _ = retriever(owners(law=Policy(epsilon=None)))

    names, weights = asyncio.run(it.route(WordEncoder().encode(["judge court", "engine fuel"])))

    assert names == ("cars", "law", "sea")
    assert weights[:, 1] == pytest.approx([1 / 3, 1 / 3])
    assert weights.sum(axis=1) == pytest.approx([1, 1])
    assert weights[1].argmax() == 0


def test_a_router_learns_from_what_was_found() -> None:
    parties = owners()
    everybody, _ = retriever(parties)
    asked = [d.text for name in TOPICS for d in documents(name, 10)]
    vectors = WordEncoder().encode(asked)
    names = asyncio.run(everybody.route(vectors))[0]
    hits = everybody.search(asked, 3)
    scores = np.array([[h.score for h in mine] for mine in hits])
    shares = shares_of(scores, [[names.index(h.owner) for h in mine] for mine in hits], 3)
    centroids = {name: centroid(everybody, name) for name in names}

    it, _ = retriever(parties, router=LearnedRouter().fit(vectors, centroids, shares), n_ask=1)

    assert it.ask(["the jury hears a judge"], 1).asked == [("law",)]


def centroid(it: FederatedRetriever, name: str) -> FloatArray:
    return np.frombuffer(asyncio.run(it.described())[name].centroid, dtype="<f4").astype(np.float64)


# ---------------------------------------------------------------- policies


def test_only_what_is_among_the_best_is_shown_and_to_the_policy() -> None:
    parties = owners(law=Policy(shares="scores"), sea=Policy(shares="snippets", snippet_words=5))
    it, wire = retriever(parties, merge=by_rank)

    (hits,) = it.search(["judge ship engine tagd"], 12)

    by_owner = {name: [h for h in hits if h.owner == name] for name in TOPICS}
    assert all(by_owner.values())
    assert all(h.text == "" and h.doc_id.startswith("#") for h in by_owner["law"])
    assert all(len(h.text.split()) == 5 for h in by_owner["sea"])
    assert {h.text for h in by_owner["cars"]} <= {d.text for d in documents("cars")}
    up = b"".join(data for _, data in wire.up)
    shown = sum(d.text.encode() in up for d in documents("cars"))
    assert shown <= len(by_owner["cars"]) + 2  # the two that are spare
    for name in ("law", "sea"):
        assert not any(d.text.encode() in up for d in documents(name))
    assert b"law1" not in up


@pytest.mark.parametrize("send", ["text", "vector"])
def test_a_query_leaves_in_the_form_that_the_asker_says(send: Any) -> None:
    it, wire = retriever(owners(), send=send)

    it.search(["canary-7391 engine"], 2)

    down = b"".join(data for _, data in wire.down)
    assert (b"canary-7391" in down) == (send == "text")
    assert (WordEncoder().encode(["canary-7391 engine"]).astype("<f4").tobytes() in down) == (send == "vector")
    assert b"canary-7391" not in b"".join(data for _, data in wire.up)


def test_owners_that_could_not_read_the_query_are_named_before_it_is_sent() -> None:
    it, wire = retriever(owners(law=Policy(accepts=("text",))))

    answers = it.ask(["engine"], 1)

    assert answers.unfit == {"law": "takes text only"}
    assert answers.hits[0][0].owner == "cars"
    assert "law" not in wire.asked(Search)
    nobody, wire = retriever(owners(Policy(accepts=("text",))))
    with pytest.raises(CapabilityError, match=r"none of 3 owners can use: .* takes text only.* Use send='text'"):
        nobody.search(["engine"], 1)
    assert wire.asked(Search) == []


def test_owners_with_another_encoder_need_the_text() -> None:
    parties = two_encoders()

    assert retriever(parties)[0].ask(["judge"], 1).unfit == {"law": "has encoder 'words-100'"}
    assert retriever(parties, send="text")[0].search(["judge"], 1)[0][0].owner == "law"


def two_encoders() -> dict[str, IndexOwner]:
    parties = owners()
    other = LocalIndex(OtherEncoder())
    other.add(documents("law"))
    return {**parties, "law": IndexOwner("law", other, Policy(shares="documents"))}


def test_with_two_encoders_ranks_take_turns() -> None:
    it, _ = retriever(two_encoders(), send="text", merge=by_rank)

    (hits,) = it.search(["judge court jury tage law"], 6)

    assert {h.owner for h in hits[:3]} == {h.owner for h in hits[3:]} == set(TOPICS)
    assert next(h for h in hits if h.owner == "law").doc_id == "law4"


@pytest.mark.parametrize("merge", [cori, by_rank])
def test_with_two_encoders_reading_again_with_ones_own_finds_what_a_central_index_finds(merge: Any) -> None:
    it, _ = retriever(two_encoders(), send="text", merge=merge, cross_encoder=ReadAgain(WordEncoder()))
    queries = ["judge court jury tage law", "ship wave harbour tagc sea"]

    found = it.search(queries, 3)

    for mine, its in zip(found, central().search(queries, 3), strict=True):
        assert mine[0].doc_id == its[0].doc_id
        assert mine[0].score == pytest.approx(its[0].score, abs=1e-5)


# ---------------------------------------------------------------- doubles, reading again


def test_a_text_that_two_owners_have_is_found_once() -> None:
    parties = owners()
    parties["sea"].index.add([Document(doc_id="copy", text=documents("cars")[3].text.upper())])
    it, _ = retriever(parties)

    (hits,) = it.search([documents("cars")[3].text], 5)

    assert hits[0].doc_id == "cars3"
    assert "copy" not in {h.doc_id for h in hits}
    assert len(hits) == 5


def test_many_doubles_leave_as_many_hits_as_there_are() -> None:
    parties = {}
    for name in "abcdefgh":
        index = LocalIndex(WordEncoder())
        index.add([Document(doc_id=f"{name}{i}", text=f"engine part{i}") for i in range(6)])
        parties[name] = IndexOwner(name, index, Policy(shares="documents"))
    it, _ = retriever(parties)

    (hits,) = it.search(["engine"], 5)

    assert len({h.text for h in hits}) == len(hits) == 5


def test_a_cross_encoder_reads_the_best_again() -> None:
    class Shortest:
        def scores(self, query: str, passages: Sequence[str]) -> list[float]:
            assert query == "engine"
            return [-float(len(p)) for p in passages]

    it, _ = retriever(owners(sea=Policy(shares="scores")), cross_encoder=Shortest())

    (hits,) = it.search(["engine"], 4)

    lengths = [len(h.text) for h in hits]
    assert lengths == sorted(lengths)
    assert hits[0].score == -lengths[0]


# ---------------------------------------------------------------- owners that fail


class Slow:
    """Answers tasks of a kind after ``seconds``."""

    def __init__(self, inner: IndexOwner, seconds: float, kind: type = Search) -> None:
        self._inner, self._seconds, self._kind = inner, seconds, kind

    async def handle(self, data: bytes) -> bytes:
        if isinstance(decode_task(data).body, self._kind):
            await asyncio.sleep(self._seconds)
        return await self._inner.handle(data)


class Saying:
    """Answers with a body of its own, or what it makes of the task, to tasks of a kind."""

    def __init__(self, inner: IndexOwner, kind: type, body: Any) -> None:
        self._inner, self._kind, self._body = inner, kind, body

    async def handle(self, data: bytes) -> bytes:
        reply = decode_reply(await self._inner.handle(data))
        if isinstance(decode_task(data).body, self._kind):
            if isinstance(self._body, Exception):
                raise self._body
            if isinstance(self._body, bytes):
                return self._body
            body = self._body(decode_task(data).body) if callable(self._body) else self._body
            reply = Reply(round=reply.round, client_id=reply.client_id, usage=reply.usage, body=body)
        return encode(reply)


def check_without(name: str, queries: Sequence[str], k: int, hits: Sequence[Sequence[Hit]]) -> None:
    """These are what the other owners have. (Of equal scores, either may come first.)"""
    index = LocalIndex(WordEncoder())
    index.add([document for other in TOPICS if other != name for document in documents(other)])
    for mine, its in zip(hits, index.search(queries, k), strict=True):
        assert [h.score for h in mine] == pytest.approx([h.score for h in its], abs=1e-5)
        assert name not in {h.owner for h in mine}


def test_a_slow_owner_costs_its_own_hits_only_and_no_more_than_the_deadline() -> None:
    parties = owners()
    it, _ = retriever({**parties, "law": Slow(parties["law"], 30)}, deadline_s=1.0)
    start = time.monotonic()

    answers = it.ask(["judge engine tagf"], 3)

    assert time.monotonic() - start < 5
    check_without("law", ["judge engine tagf"], 3, answers.hits)
    assert answers.silent == ("law",)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (Describe, RuntimeError("canary")),
        (Describe, b"garbage"),
        (Search, Failed(reason="RuntimeError")),
        (Search, RuntimeError("canary")),
        (Search, Found.of(np.ones((3, 3)), np.ones((3, 3), dtype=np.int64))),  # for three queries
        (Search, Shown(doc_ids=(), places=(), texts=())),
        (Fetch, Shown(doc_ids=("a",), places=(0,), texts=("b",))),
        (Fetch, RuntimeError("canary")),
    ],
)
def test_an_owner_that_fails_or_talks_nonsense_costs_its_own_hits_only(kind: type, body: Any) -> None:
    parties = owners()
    it, _ = retriever({**parties, "law": Saying(parties["law"], kind, body)}, deadline_s=5.0)

    answers = it.ask(["judge engine tagf", "ship"], 3)

    check_without("law", ["judge engine tagf", "ship"], 3, answers.hits)
    assert answers.silent == ("law",)


def test_an_owner_that_is_slow_to_show_costs_its_own_hits_only() -> None:
    parties = owners()
    it, _ = retriever({**parties, "law": Slow(parties["law"], 30, Fetch)}, deadline_s=2.0)

    answers = it.ask(["judge engine tagf"], 8)

    check_without("law", ["judge engine tagf"], 8, answers.hits)
    assert answers.silent == ("law",)


def test_an_owner_that_says_all_it_has_is_perfect_takes_no_more_than_its_own_place() -> None:
    """Scores above 1 count as 1, infinite ones are none, and a passage is a hit once."""
    parties = owners(law=Policy(shares="scores"))
    for scores in (np.full((1, 4), 99.0), np.full((1, 4), np.inf)):
        numbers = np.array([[7, 7, 7, 8]])
        said = {"scores": scores.astype("<f4").tobytes(), "passages": numbers.astype("<i8").tobytes()}
        broken = object.__new__(Found)
        for name, value in {"n": 1, "kind": "found", **said}.items():
            object.__setattr__(broken, name, value)
        it, _ = retriever({**parties, "law": Saying(parties["law"], Search, broken)}, deadline_s=5.0)

        (hits,) = it.search(["engine"], 4)

        mine = [h for h in hits if h.owner == "law"]
        assert [(h.doc_id, h.score) for h in mine] == ([] if np.isinf(scores).any() else [("#7", 1.0), ("#8", 1.0)])
        assert {h.owner for h in hits} > {"cars"} if mine else {"cars"}


def test_a_router_that_has_learned_goes_on_without_an_owner() -> None:
    parties = owners()
    vectors = WordEncoder().encode([d.text for name in TOPICS for d in documents(name)])
    everybody, _ = retriever(parties)
    names = asyncio.run(everybody.route(vectors))[0]
    whose = np.repeat(np.eye(3)[[names.index(name) for name in TOPICS]], 20, axis=0)
    router = LearnedRouter().fit(vectors, {name: centroid(everybody, name) for name in names}, whose)
    it, _ = retriever({**parties, "law": Saying(parties["law"], Describe, RuntimeError())}, router=router, n_ask=1)

    answers = it.ask(["ship wave"], 1)

    assert answers.hits[0][0].owner == "sea"
    assert answers.silent == ("law",)


def test_a_slow_encoder_of_the_asker_does_not_take_the_owners_time() -> None:
    class Loading(WordEncoder):
        def encode(self, texts: Sequence[str]) -> FloatArray:
            time.sleep(1.0)
            return super().encode(texts)

    it, _ = retriever(owners(), encoder=Loading(), deadline_s=0.9)

    assert it.ask(["judge"], 1).silent == ()


def test_owners_that_were_all_silent_are_waited_for_again() -> None:
    parties: dict[str, Any] = {name: Slow(owner, 30) for name, owner in owners().items()}
    it, wire = retriever(parties, deadline_s=0.3)

    async def several() -> list[bool]:
        for _ in range(3):
            await it.asearch(["judge"], 1)
        wire._clients.update(owners())
        for task in wire._busy.values():
            task.cancel()
        return [bool((await it.asearch(["judge"], 1))[0]) for _ in range(2)]

    assert asyncio.run(several())[-1]


def test_threads_may_search_at_the_same_time() -> None:
    it, _ = retriever(owners())

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda query: it.search([query], 1)[0][0].owner, ["judge", "ship", "engine"] * 4))

    assert found == ["law", "sea", "cars"] * 4


def test_passages_that_begin_alike_are_not_doubles() -> None:
    parties = {}
    for name in "ab":
        index = LocalIndex(WordEncoder())
        index.add([Document(doc_id=f"{name}{i}", text=f"dear sir or madam, part{chr(97 + i)}") for i in range(3)])
        parties[name] = IndexOwner(name, index, Policy(shares="snippets", snippet_words=4))

    assert len(retriever(parties)[0].search(["madam"], 6)[0]) == 6


def test_three_of_ten_dead_or_slow_owners_leave_the_rest_ranked_right() -> None:
    rng = np.random.default_rng(3)
    names = [f"o{i}" for i in range(10)]
    alive = LocalIndex(WordEncoder())
    parties: dict[str, Any] = {}
    for name in names:
        index = LocalIndex(WordEncoder())
        mine = [Document(doc_id=f"{name}-{i}", text=" ".join(rng.choice(list("abcdefghij"), 6))) for i in range(30)]
        index.add(mine)
        parties[name] = IndexOwner(name, index, Policy(shares="documents", epsilon=float("inf")))
        if name not in ("o2", "o5", "o7"):
            alive.add(mine)
    parties["o2"] = Slow(parties["o2"], 30)
    parties["o5"] = Saying(parties["o5"], Search, RuntimeError())
    parties["o7"] = Saying(parties["o7"], Describe, RuntimeError())
    it, _ = retriever(parties, deadline_s=1.0)
    queries = ["a b c", "d e f", "g h"]
    start = time.monotonic()

    answers = it.ask(queries, 10)

    assert time.monotonic() - start < 5
    for mine, its in zip(answers.hits, alive.search(queries, 30), strict=True):
        distinct = list(dict.fromkeys((round(h.score, 4), h.text) for h in its))
        assert [round(h.score, 4) for h in mine] == pytest.approx([score for score, _ in distinct][:10], abs=2e-4)
    assert answers.silent == ("o2", "o5", "o7")


def test_an_owner_that_comes_back_is_asked_again() -> None:
    parties = owners()
    wire = Wire({**parties, "law": Saying(parties["law"], Describe, RuntimeError())})
    it = FederatedRetriever(wire, list(parties), WordEncoder(), deadline_s=5.0)
    assert it.ask(["judge"], 1).silent == ("law",)

    wire._clients["law"] = parties["law"]

    assert it.ask(["judge"], 1).silent == ()
    assert it.search(["judge"], 1)[0][0].owner == "law"


def test_an_owner_that_was_silent_holds_up_the_next_search_no_more() -> None:
    """It is waited for at the second, the fourth, the eighth search that it is silent."""
    parties = owners()
    it, wire = retriever({**parties, "law": Slow(parties["law"], 30)}, deadline_s=0.6)
    took = []

    async def several() -> None:
        for _ in range(6):
            start = time.monotonic()
            await it.asearch(["judge"], 1)
            took.append(time.monotonic() - start > 0.3)

    asyncio.run(several())

    assert took == [True, True, False, True, False, False]
    assert wire.asked(Search).count("law") == 6


def test_nobody_there_is_no_hit_and_no_hang() -> None:
    it, _ = retriever({name: Saying(o, Describe, RuntimeError()) for name, o in owners().items()}, deadline_s=1.0)

    answers = it.ask(["judge"], 3)

    assert answers.hits == [[]]
    assert answers.silent == tuple(sorted(TOPICS))


def test_routing_by_noise_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """20 documents of a topic add up to more than the noise at epsilon 8, and to less than that at 0.5."""
    hidden = Policy(shares="documents", epsilon=0.5)

    it, _ = retriever(owners(Policy(shares="documents", epsilon=8.0), law=hidden, sea=hidden), n_ask=1)
    it.search(QUERIES, 5)
    it.search(QUERIES, 5)

    (said,) = [record.getMessage() for record in caplog.records if "noise" in record.getMessage()]
    assert said.startswith("the centroids of 2 of 3 owners (law, sea) are mostly noise")


def test_who_asks_everybody_need_not_hear_of_noise(caplog: pytest.LogCaptureFixture) -> None:
    it, _ = retriever(owners(Policy(shares="documents", epsilon=0.5)))

    it.search(QUERIES, 5)

    assert not caplog.records


def test_a_centroid_that_is_none_leaves_its_owner_in() -> None:
    """Numbers that are not finite, or too few of them."""
    parties = owners()
    for centroid_ in (np.full(64, np.nan), np.ones(3)):
        said = parties["law"].release() if not parties["law"].spent[0] else asyncio.run(described(parties["law"]))
        broken = type(said)(
            encoder=said.encoder,
            shares=said.shares,
            accepts=said.accepts,
            centroid=centroid_.astype("<f4").tobytes(),
        )
        it, _ = retriever({**parties, "law": Saying(parties["law"], Describe, broken)})

        assert it.search(["judge court"], 1)[0][0].owner == "law"


async def described(owner: IndexOwner) -> Any:
    return owner.answer(Describe(asker="x"))


def test_who_shares_nothing_is_sent_no_query() -> None:
    it, wire = retriever(owners(law=Policy(shares="nothing")), n_ask=2, send="text")

    answers = it.ask(["the judge of the court"], 2)

    assert set(wire.asked(Search)) == {"cars", "sea"}
    assert answers.asked == [("cars", "sea")]
    assert answers.unfit == {"law": "shares nothing with this asker"}


def test_where_nobody_shares_nothing_is_found() -> None:
    it, wire = retriever(owners(Policy(shares="nothing")))

    answers = it.ask(QUERIES, 2)

    assert wire.asked(Search) == []
    assert (answers.hits, answers.silent) == ([[]] * 4, ())
    assert sorted(answers.unfit) == sorted(TOPICS)


def test_no_queries_and_impossible_ones() -> None:
    it, wire = retriever(owners())

    assert it.search([], 3) == []
    assert wire.down == []
    with pytest.raises(ConfigError, match="k = 0"):
        it.search(["engine"], 0)
    with pytest.raises(ConfigError, match="use send='text'"):
        retriever(owners(), mode="hybrid")
    with pytest.raises(ConfigError, match="k = 10001"):
        it.search(["engine"], 10_001)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n_ask": 0}, "n_ask = 0"),
        ({"coverage": 0.0}, "coverage = 0"),
        ({"coverage": float("nan")}, "coverage = nan"),
        ({"coverage": 1.5}, "coverage = 1.5"),
        ({"max_per_owner": 0}, "max_per_owner = 0"),
        ({"mode": "lexcial", "send": "text"}, "unknown mode 'lexcial'; known: dense, lexical, hybrid"),
        ({"send": "vectors"}, "unknown send 'vectors'; known: text, vector"),
    ],
)
def test_options_that_can_not_be_are_refused(options: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        retriever(owners(), **options)


@pytest.mark.parametrize("more", [{}, {"cross_encoder": ReadAgain(WordEncoder())}])
def test_as_many_hits_may_be_wanted_as_an_owner_may_be_asked_for(more: Any) -> None:
    answers = retriever(owners(), **more)[0].ask(["engine"], 10_000)

    assert len(answers.hits[0]) == 3 * 20
    assert answers.silent == ()


def test_an_owner_that_lies_about_its_scores_has_no_more_than_its_share() -> None:
    parties = owners()
    lies = Found.of(np.ones((1, 6)), np.arange(6)[None])
    lying = Saying(parties["law"], Search, lies)

    def shown(task: Fetch) -> Shown:
        names = tuple(f"lie {number}" for number in task.passages)
        return Shown(doc_ids=names, places=(0,) * len(names), texts=names)

    liar = Saying(lying, Fetch, shown)

    (all_places,) = retriever({**parties, "law": liar}, deadline_s=5.0)[0].search(["engine wheel"], 4)
    (hits,) = retriever({**parties, "law": liar}, deadline_s=5.0, max_per_owner=1)[0].search(["engine wheel"], 4)

    assert [h.owner for h in all_places] == ["law"] * 4
    assert sorted(h.owner for h in hits) == ["cars", "law", "sea"]


def test_cosines_of_different_encoders_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    it, _ = retriever(two_encoders(), send="text")
    it.search(["judge"], 1)
    it.search(["judge"], 1)

    assert caplog.text.count("different encoders (words-100, words-64)") == 1
    retriever(two_encoders(), send="text", cross_encoder=ReadAgain(WordEncoder()))[0].search(["judge"], 1)
    retriever(owners())[0].search(["judge"], 1)
    assert caplog.text.count("different encoders") == 1


@pytest.mark.parametrize("send", ["text", "vector"])
def test_half_a_character_may_be_asked_for(send: Any) -> None:
    assert retriever(owners(), send=send)[0].search(["engine \udce9"], 1)[0][0].owner == "cars"


@pytest.mark.parametrize("mode", ["lexical", "hybrid"])
def test_owners_search_by_words_if_they_get_the_text(mode: Any) -> None:
    it, _ = retriever(owners(), send="text", mode=mode, merge=by_rank)

    assert it.search(["tagh law"], 1)[0][0].doc_id in ("law7", "cars7", "sea7")


def test_searches_at_the_same_time_do_not_mix() -> None:
    it, _ = retriever(owners())

    async def both() -> tuple[Any, Any]:
        return await asyncio.gather(it.asearch(["judge"], 1), it.asearch(["ship"], 1))

    one, other = asyncio.run(both())

    assert (one[0][0].owner, other[0][0].owner) == ("law", "sea")


def test_with_a_share_for_each_owner_no_more_of_it_is_shown_than_may_be_wanted() -> None:
    it, wire = retriever(owners(), max_per_owner=1)

    (hits,) = it.search(["engine judge ship"], 10)

    assert sorted(h.owner for h in hits) == sorted(TOPICS)
    shown = [decode_reply(data).body for _, data in wire.up]
    assert sum(body.n for body in shown if isinstance(body, Shown)) <= 3 * len(TOPICS)


def test_owners_that_nobody_had_the_time_to_ask_are_silent() -> None:
    class Slow:
        def probabilities(self, queries: FloatArray, centroids: Mapping[str, FloatArray]) -> FloatArray:
            time.sleep(0.4)
            return np.full((len(queries), len(centroids)), 1 / len(centroids))

    answers = retriever(owners(), router=Slow(), deadline_s=0.3)[0].ask(["engine"], 1)

    assert answers.hits == [[]]
    assert answers.silent == tuple(sorted(TOPICS))
