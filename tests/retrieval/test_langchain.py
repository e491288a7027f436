"""LangChain's own suites for vector stores and retrievers, and what they do not ask."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import VectorStore
from langchain_tests.integration_tests import RetrieversIntegrationTests, VectorStoreIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests

from promptfed.errors import ConfigError
from promptfed.federation.inprocess import InProcessTransport
from retrieval.documents import Document as Kept
from retrieval.federated import FederatedRetriever
from retrieval.index import LocalIndex
from retrieval.langchain import EmbeddingsEncoder, EncoderEmbeddings, IndexVectorStore, PromptfedRetriever
from retrieval.owner import IndexOwner, Policy
from tests.support import WordEncoder

pytestmark = pytest.mark.anyio

TEXTS = {"cars": ("an engine", "a wheel"), "law": ("a judge", "a court", "a jury")}


@pytest.fixture(autouse=True)
def no_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """LangSmith must not be called, whatever the shell of who runs this says."""
    for variable in ("LANGSMITH_TRACING", "LANGSMITH_TRACING_V2", "LANGCHAIN_TRACING", "LANGCHAIN_TRACING_V2"):
        monkeypatch.setenv(variable, "false")


def index(*names: str) -> LocalIndex:
    out = LocalIndex(WordEncoder())
    out.add(Kept(doc_id=f"{n}{i}", text=t, metadata={"n": i}) for n in names for i, t in enumerate(TEXTS[n]))
    return out


def federated() -> FederatedRetriever:
    owners = {name: IndexOwner(name, index(name), Policy(shares="documents")) for name in TEXTS}
    return FederatedRetriever(InProcessTransport(owners), list(owners), WordEncoder())


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class _StoreSuite(VectorStoreIntegrationTests):
    @property
    def has_async(self) -> bool:
        return True


class TestStore(_StoreSuite):
    @pytest.fixture
    def vectorstore(self) -> VectorStore:
        return IndexVectorStore(LocalIndex(EmbeddingsEncoder(self.get_embeddings())))


class TestGraphStore(_StoreSuite):
    @pytest.fixture
    def vectorstore(self) -> VectorStore:
        return IndexVectorStore(LocalIndex(EmbeddingsEncoder(self.get_embeddings()), kind="hnsw"))


class TestLocalRetriever(RetrieversIntegrationTests):
    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        return PromptfedRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"retriever": index("cars", "law")}

    @property
    def retriever_query_example(self) -> str:
        return "the judge of a court"


class TestFederatedRetriever(TestLocalRetriever):
    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"retriever": federated()}


class TestEmbeddings(EmbeddingsUnitTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return EncoderEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"encoder": WordEncoder()}


def test_a_store_gives_cosines_and_relevance_between_0_and_1() -> None:
    store = IndexVectorStore(index("cars", "law"))

    ((best, score), *_) = store.similarity_search_with_score("a judge", 2)
    ((same, relevance), *_) = store.similarity_search_with_relevance_scores("a judge", 2)

    assert (best.id, best.page_content, best.metadata) == ("law0", "a judge", {"n": 0})
    assert score == pytest.approx(1.0, abs=1e-5)
    assert (same.id, relevance) == ("law0", pytest.approx(1.0, abs=1e-5))
    with pytest.raises(ConfigError, match="only dense searches have scores between 0 and 1"):
        store.similarity_search_with_relevance_scores("a judge", 2, mode="lexical")


def test_a_store_searches_by_words_and_by_vector() -> None:
    store = IndexVectorStore(index("cars", "law"))

    assert store.similarity_search("wheel", 1, mode="lexical")[0].id == "cars1"
    assert store.similarity_search_by_vector((3 * WordEncoder().encode(["a wheel"])[0]).tolist(), 1)[0].id == "cars1"


def test_passages_that_are_near_one_another_are_not_both_given() -> None:
    store = IndexVectorStore.from_texts(
        ["judge judge court", "judge court court", "an engine"], EncoderEmbeddings(WordEncoder()), ids=["a", "b", "c"]
    )

    assert [d.id for d in store.max_marginal_relevance_search("judge court", 2, lambda_mult=0.3)] == ["a", "c"]
    assert {d.id for d in store.similarity_search("judge court", 2)} == {"a", "b"}


def test_a_store_of_texts_keeps_each_as_one_passage() -> None:
    long = " ".join(["word"] * 500)

    store = IndexVectorStore.from_texts([long], DeterministicFakeEmbedding(size=6), [{"a": 1}])

    (found,) = store.similarity_search("word")
    assert found.page_content == long
    assert found.metadata == {"a": 1}
    assert store.get_by_ids([str(found.id)]) == [found]


def test_deleting_all_leaves_nothing() -> None:
    store = IndexVectorStore(index("cars"))

    assert store.delete() is True

    assert store.similarity_search("engine") == []


def test_a_federated_retriever_tells_whose_a_passage_is() -> None:
    retriever = PromptfedRetriever(retriever=federated(), k=1)

    for found in (retriever.invoke("a jury"), asyncio.run(retriever.ainvoke("a jury"))):
        assert found == [
            Document(id="law2", page_content="a jury", metadata={"owner": "law", "score": found[0].metadata["score"]})
        ]


def test_a_stores_own_embeddings_come_back() -> None:
    fake = DeterministicFakeEmbedding(size=6)

    assert IndexVectorStore.from_texts(["a"], fake).embeddings is fake
    assert isinstance(IndexVectorStore(index("cars")).embeddings, EncoderEmbeddings)


def test_a_filter_that_would_not_be_kept_to_is_refused() -> None:
    store = IndexVectorStore(index("cars"))

    for search in (store.similarity_search, store.max_marginal_relevance_search):
        with pytest.raises(ConfigError, match="got 'filter'"):
            search("engine", filter={"tenant": "a"})
    with pytest.raises(ConfigError, match="got 'filter'"):
        store.similarity_search_by_vector([1.0] * 64, filter={"tenant": "a"})
    retriever = PromptfedRetriever(retriever=index("cars"))
    with pytest.raises(ConfigError, match="got 'filter'"):
        retriever.invoke("engine", filter={"tenant": "a"})
    with pytest.raises(ConfigError, match="got 'filter'"):
        asyncio.run(retriever.ainvoke("engine", filter={"tenant": "a"}))
    assert store.similarity_search("engine", k=1, mode="lexical")[0].id == "cars0"


def test_blank_texts_have_no_id() -> None:
    store = IndexVectorStore(index("cars"))

    assert store.add_texts(["", "a door"], ids=["cars0", "new"]) == ["new"]
    assert [d.id for d in store.get_by_ids(["cars0", "new"])] == ["new"]


def test_an_encoder_is_called_after_its_model() -> None:
    class Named(DeterministicFakeEmbedding):
        model: str = "small-1"

    assert EmbeddingsEncoder(Named(size=8)).encoder_id == "langchain:Named:small-1"
    assert EmbeddingsEncoder(DeterministicFakeEmbedding(size=8)).encoder_id == "langchain:DeterministicFakeEmbedding"
    assert EmbeddingsEncoder(Named(size=8), "mine").encoder_id == "mine"
