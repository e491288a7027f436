"""Indices in LangChain: a `LocalIndex` as a vector store, and any retriever of promptfed as one of LangChain.

    from retrieval.langchain import IndexVectorStore, PromptfedRetriever

    store = IndexVectorStore(LocalIndex.open(Path("runs/index"), SentenceEncoder()))
    retriever = PromptfedRetriever(retriever=FederatedRetriever(transport, owners, encoder), k=4)

LangChain hands queries and passages to the callbacks of a call. Where LangSmith tracing is on (the environment variable
``LANGSMITH_TRACING``) they leave this machine: leave it off where texts must not travel.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
from pydantic import ConfigDict

from promptfed.errors import ConfigError
from promptfed.types import Encoder, FloatArray, Hit, Retriever
from retrieval.documents import Document as Kept
from retrieval.index import LocalIndex

try:
    from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
    from langchain_core.documents import Document
    from langchain_core.embeddings import Embeddings
    from langchain_core.retrievers import BaseRetriever
    from langchain_core.runnables import run_in_executor
    from langchain_core.vectorstores import VectorStore
except ImportError:
    raise ConfigError("retrieval.langchain needs a package more: pip install 'promptfed[langchain]'") from None


class EncoderEmbeddings(Embeddings):
    """An encoder of promptfed as LangChain's embeddings."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        out: list[list[float]] = self.encoder.encode(texts).tolist()
        return out

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]


class EmbeddingsEncoder:
    """LangChain's embeddings as an encoder of promptfed. ``name`` is what an index knows them by: the same name has to
    mean the same vectors. Without one it is that of their class and, where they say it, of their model."""

    def __init__(self, embeddings: Embeddings, name: str | None = None) -> None:
        self.embeddings = embeddings
        models = [getattr(embeddings, attribute, None) for attribute in ("model_name", "model")]
        of = next((f":{model}" for model in models if isinstance(model, str)), "")
        self.encoder_id = name or f"langchain:{type(embeddings).__name__}{of}"

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """Unit vectors, shape (n, dimension)."""
        if not texts:
            return self.encode([""])[:0]  # for its dimension
        vectors = np.array(self.embeddings.embed_documents(list(texts)), dtype=np.float64)
        return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))


class IndexVectorStore(VectorStore):
    """A `LocalIndex`. Its documents are cut into passages unless it was made with ``passage_words=None``; a search
    gives passages, which have their document's id and metadata. Only `LocalIndex.save` writes to the disk."""

    def __init__(self, index: LocalIndex) -> None:
        self.index = index

    @property
    def embeddings(self) -> Embeddings:
        encoder = self.index.encoder
        return encoder.embeddings if isinstance(encoder, EmbeddingsEncoder) else EncoderEmbeddings(encoder)

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> list[str]:
        """Add texts, or replace those with their ids; a text without one gets a random id. Returns the ids of those
        that are there now: a text without a word is not, and replaces one by nothing."""
        given = list(texts)
        names = [name or str(uuid.uuid4()) for name in (ids or [None] * len(given))]
        metas = metadatas or [{}] * len(given)
        self.index.add(
            Kept(doc_id=name, text=text, metadata=meta) for name, text, meta in zip(names, given, metas, strict=True)
        )
        return [name for name in names if name in self.index]

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool | None:  # noqa: ARG002
        """Delete these documents; without ``ids`` all of them. Ids that are not there are passed over."""
        self.index.delete(self.index.doc_ids if ids is None else ids)
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        return [_whole(self.index.document(doc_id)) for doc_id in ids if doc_id in self.index]

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        return [document for document, _ in self.similarity_search_with_score(query, k, **kwargs)]

    def similarity_search_with_score(self, query: str, k: int = 4, **kwargs: Any) -> list[tuple[Document, float]]:
        """The score is the cosine, or with ``mode`` lexical or hybrid that of this mode: higher is better."""
        _known(kwargs, "mode")
        (hits,) = self.index.search([query], k, kwargs.get("mode", "dense"))
        return [(_passage(hit), hit.score) for hit in hits]

    def _similarity_search_with_relevance_scores(
        self, query: str, k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        if kwargs.get("mode", "dense") != "dense":
            raise ConfigError("only dense searches have scores between 0 and 1: use similarity_search_with_score")
        return super()._similarity_search_with_relevance_scores(query, k, **kwargs)

    def similarity_search_by_vector(self, embedding: list[float], k: int = 4, **kwargs: Any) -> list[Document]:
        _known(kwargs)
        vector = np.array([embedding], dtype=np.float64)
        scores, rows = self.index.search_vectors(vector / max(float(np.linalg.norm(vector)), 1e-12), k)
        pairs = zip(scores[0].tolist(), rows[0].tolist(), strict=True)
        return [_passage(self.index.hit(row, score)) for score, row in pairs if row >= 0]

    def max_marginal_relevance_search(
        self,
        query: str,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        **kwargs: Any,
    ) -> list[Document]:
        """Passages near the query and not near one another (Carbonell & Goldstein, SIGIR 1998)."""
        _known(kwargs)
        from langchain_core.vectorstores.utils import maximal_marginal_relevance

        (hits,) = self.index.search([query], fetch_k)
        vectors = self.index.encoder.encode([query, *(hit.text for hit in hits)])
        chosen = maximal_marginal_relevance(vectors[0], vectors[1:].tolist(), lambda_mult=lambda_mult, k=k)
        return [_passage(hits[i]) for i in chosen]

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return _between_0_and_1

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> Self:
        """A new store; ``kwargs`` are those of `LocalIndex`. A text is one passage unless they say otherwise."""
        encoder = embedding.encoder if isinstance(embedding, EncoderEmbeddings) else EmbeddingsEncoder(embedding)
        store = cls(LocalIndex(encoder, **{"passage_words": None, **kwargs}))
        store.add_texts(texts, metadatas, ids=ids)
        return store


class PromptfedRetriever(BaseRetriever):
    """A retriever of promptfed: a `LocalIndex`, or a `retrieval.federated.FederatedRetriever`.

    The metadata of what it gives has ``score`` and, from another's index, ``owner``.
    """

    retriever: Retriever
    k: int = 4

    model_config = ConfigDict(arbitrary_types_allowed=True)

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,  # noqa: ARG002
        **kwargs: Any,
    ) -> list[Document]:
        _known(kwargs, "k")
        (hits,) = self.retriever.search([query], kwargs.get("k", self.k))
        return [_passage(hit, with_score=True) for hit in hits]

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,  # noqa: ARG002
        **kwargs: Any,
    ) -> list[Document]:
        _known(kwargs, "k")
        k = kwargs.get("k", self.k)
        search = getattr(self.retriever, "asearch", None)
        (hits,) = await search([query], k) if search else await run_in_executor(None, self.retriever.search, [query], k)
        return [_passage(hit, with_score=True) for hit in hits]


def _whole(document: Kept) -> Document:
    return Document(id=document.doc_id, page_content=document.text, metadata=dict(document.metadata))


def _passage(hit: Hit, *, with_score: bool = False) -> Document:
    more = {"score": hit.score, **({"owner": hit.owner} if hit.owner else {})} if with_score else {}
    return Document(id=hit.doc_id, page_content=hit.text, metadata={**hit.metadata, **more})


def _known(options: Mapping[str, Any], *known: str) -> None:
    """Raises `ConfigError` for another option: one that is passed over, such as a filter, would let out what it was to
    keep back."""
    if unknown := [name for name in options if name not in known]:
        takes = f"the options {', '.join(known)}" if known else "no options"
        raise ConfigError(f"this search takes {takes} beside LangChain's own; got {unknown[0]!r}")


def _between_0_and_1(cosine: float) -> float:
    return (1.0 + cosine) / 2.0
