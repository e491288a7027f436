"""The embedded foundation model: a small language model in this process.

Label requests that share a prompt share its keys and values; texts are sorted by length and packed into batches of a
bounded number of tokens, so memory is bounded and the batches depend on what was asked, not on who asked first.
Batches are computed side by side, each on one core: cores that share one batch wait for each other a hundred times.
Log-probabilities are bfloat16 results where the machine has it (else float32, and slower): they move in the third digit
with the batch they are computed in.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer

from promptfed.errors import ConfigError
from promptfed.fm.base import BaseFM
from promptfed.fm.embeddings import soft_space_of
from promptfed.fm.packed import PackedLlama, Tree, reason_against
from promptfed.fm.weights import find_weights
from promptfed.prompts.soft import check_soft
from promptfed.types import (
    Capability,
    FloatArray,
    FMRequest,
    FMResponse,
    LabelRequest,
    SoftPrompt,
    SoftSpace,
    TextRequest,
)

# A CPU is fastest with so many tokens at a time; a GPU waits for the next call to it unless there are many.
BATCH_TOKENS = 768
GPU_BATCH_TOKENS = 16_384
# Rows of the whole vocabulary at once (400 KB each in float32 and its exponentials).
VOCABULARY_ROWS = 64
# Beyond this a text is cut (and counted as truncated): attention of one long text must not need gigabytes.
MAX_TOKENS = 2048
# Tokens that sampling looks at: the nucleus of a peaked distribution is far smaller.
NUCLEUS_LIMIT = 256

if TYPE_CHECKING:
    from promptfed.fm.generic import GenericLM

Tokens = tuple[int, ...]


@dataclass
class _Head:
    """What stands before the texts of one prompt, computed when the first of its batches needs it and dropped after
    the last."""

    soft: SoftPrompt | None
    tokens: Tokens
    n: int  # all that stands there, soft vectors and the tokenizer's own leading tokens included
    n_batches: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    computed: list[Any] | None = None


@dataclass
class _Item:
    """One label request. A stem is all tokens of a label but the last: the stems of a text's labels are branches behind
    it; labels that share a stem share the branch, and labels of one token share the empty one."""

    labels: list[Tokens]
    absolute: bool
    n_prompt: int
    truncated: bool
    stems: dict[Tokens, list[int]]
    scores: FloatArray


class EmbeddedFM(BaseFM):
    """``embedded:NAME``. NAME is a packaged model, a causal language model's folder, or ``owner/model`` on a hub."""

    def __init__(self, name: str) -> None:
        folder, digest = find_weights(name)
        self._name = f"embedded:{name.rsplit('/', 1)[-1]}@{digest}"
        self._config = json.loads((folder / "config.json").read_text())
        self._model = self._load(folder)
        self._tokenizer = _tokenizer(folder)
        self._max_tokens = min(MAX_TOKENS, self._model.context)
        self._lock = threading.Lock()
        self._encode = lru_cache(maxsize=50_000)(self._encode_uncached)
        on_gpu = self._model.embedding.is_cuda
        self._batch_tokens = GPU_BATCH_TOKENS if on_gpu else BATCH_TOKENS
        self._pool = _one_thread_each(1 if on_gpu else torch.get_num_threads())

    def _load(self, folder: Path) -> PackedLlama | GenericLM:
        if not reason_against(self._config):
            return PackedLlama(folder)
        from promptfed.fm.generic import GenericLM  # brings transformers: a second that most starts need not take

        return GenericLM(folder)

    @property
    def fm_id(self) -> str:
        return self._name

    @property
    def capabilities(self) -> frozenset[Capability]:
        return frozenset(
            {Capability.TEXT, Capability.LABEL_LOGPROBS, Capability.PROMPT_LOGPROBS, Capability.PROMPT_EMBEDS}
        )

    @cached_property
    def soft_space(self) -> SoftSpace:
        return soft_space_of(self._model.embedding)

    @property
    def in_process(self) -> bool:
        return True

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        """Compute in worker threads, so that the event loop (progress, deadlines) goes on.

        Raises `ConfigError` for a soft prompt that is not one of this model, before anything is computed.
        """
        for soft in {request.soft for request in requests if request.soft is not None}:
            check_soft(soft, self._model.hidden_size)
        return await asyncio.to_thread(self._complete, list(requests))

    def token_embeddings(self, text: str) -> FloatArray:
        """The input embeddings of a text's tokens, (n, hidden): where a search for a soft prompt may start."""
        embedded: FloatArray = self._model.embed(self._encode(text)).double().cpu().numpy()
        return embedded

    def _complete(self, requests: list[FMRequest]) -> list[FMResponse]:
        answers: list[FMResponse | None] = [None] * len(requests)
        scoring: dict[tuple[bytes, Tokens], list[int]] = defaultdict(list)
        writing: dict[tuple[bytes, str, int], list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            soft = request.soft.data if request.soft else b""
            if isinstance(request, LabelRequest):
                scoring[soft, self._prefix(request)].append(i)
            else:
                writing[soft, request.prompt, self._kept(request)].append(i)
        with self._lock:
            self._score([scoring[key] for key in sorted(scoring)], requests, answers)
            for key in sorted(writing):
                self._write(key[2], writing[key], requests, answers)
        return [a if a is not None else FMResponse(error="not answered") for a in answers]

    def _encode_uncached(self, text: str) -> Tokens:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _leading(self) -> Tokens:
        """Tokens that the tokenizer itself puts in front of a text, such as one that begins a sequence."""
        plain, marked = self._encode("a"), tuple(self._tokenizer.encode("a", add_special_tokens=True).ids)
        n = next((n for n in range(len(marked)) if marked[n : n + len(plain)] == plain), 0)
        return marked[:n]

    def _prefix(self, request: LabelRequest) -> Tokens:
        """Tokens that are computed once for all texts: the prefix, but for its last token where no text follows it."""
        tokens = self._encode(request.prefix)
        return tokens if request.text or request.suffix else tokens[:-1]

    def _body(self, request: LabelRequest, room: int) -> tuple[Tokens, bool]:
        """Tokens of text and suffix, cut in the text to ``room`` tokens; whether it was cut. Without either it is the
        last token of the prefix."""
        if not request.text and not request.suffix:
            return self._encode(request.prefix)[-1:], False
        # A token is rarely more than 20 bytes: a text of megabytes need not be tokenised whole.
        whole = self._encode(request.text[: room * 20] + request.suffix)
        if len(whole) <= room and len(request.text) <= room * 20:
            return whole, False
        suffix = self._encode(request.suffix)
        return self._encode(request.text[: room * 20])[: max(room - len(suffix), 0)] + suffix, True

    def _kept(self, request: TextRequest) -> int:
        """Tokens of the prompt, from its end, that leave room for ``max_tokens``, or at least for half the context."""
        room = min(request.max_tokens, self._max_tokens // 2)
        taken = len(self._leading) + (request.soft.n if request.soft else 0)
        return min(len(self._encode(request.prompt)), max(self._max_tokens - room - taken, 1))

    def _prefill(self, soft: SoftPrompt | None, tokens: Tokens) -> list[Any]:
        """What the model keeps of the leading tokens, the soft prompt and ``tokens``."""
        if soft is None:
            return self._model.prefill(self._leading + tokens)
        vectors = torch.from_numpy(check_soft(soft, self._model.hidden_size))
        before, after = self._model.embed(self._leading), self._model.embed(tokens)
        return self._model.prefill(torch.cat([before, vectors.to(before), after]))

    def _score(self, groups: list[list[int]], requests: list[FMRequest], answers: list[FMResponse | None]) -> None:
        items: dict[int, _Item] = {}
        jobs: list[tuple[_Head, list[tuple[Tree, int]]]] = []
        heads: dict[int, _Head] = {}
        for group in groups:
            first = requests[group[0]]
            assert isinstance(first, LabelRequest)
            tokens = self._prefix(first)
            head = _Head(first.soft, tokens, len(self._leading) + (first.soft.n if first.soft else 0) + len(tokens))
            trees: list[tuple[Tree, int]] = []
            for i in group:
                request = requests[i]
                assert isinstance(request, LabelRequest)
                labels = [self._encode(label) for label in request.labels]
                room = max(self._max_tokens - head.n - max(map(len, labels)), 0)
                body, truncated = self._body(request, room)
                if not 0 < len(body) <= room or not all(labels):
                    answers[i] = FMResponse(error="nothing to score: the prompt leaves no room, or a label is empty")
                    continue
                stems: dict[Tokens, list[int]] = defaultdict(list)
                for k, label in enumerate(labels):
                    stems[label[:-1]].append(k)
                items[i] = _Item(labels, request.absolute, head.n + len(body), truncated, stems, np.zeros(len(labels)))
                heads[i] = head
                trees += [(Tree(body, tuple(p)), i) for p in _batches(list(stems), len, self._batch_tokens - len(body))]
            trees.sort(key=lambda t: (len(t[0].tokens), t[0].shape, t))
            # One prompt alone is spread evenly over the workers.
            n_parts = self._pool[1] if len(groups) == 1 else 1
            batches = _parts(trees, lambda t: len(t[0].tokens), self._batch_tokens, n_parts)
            head.n_batches = len(batches)
            jobs += [(head, batch) for batch in batches]

        if len(groups) == 1 and jobs:  # all cores on the prompt that all of them wait for
            jobs[0][0].computed = self._prefill(jobs[0][0].soft, jobs[0][0].tokens)

        def compute(job: tuple[_Head, list[tuple[Tree, int]]]) -> list[tuple[int, int, float]]:
            return self._batch(*job, items)

        for scores in self._pool[0].map(compute, jobs):
            for i, k, logit in scores:
                items[i].scores[k] += logit
        paid: set[int] = set()
        for i, item in sorted(items.items()):
            head = heads[i]
            logp = item.scores if item.absolute else item.scores - np.logaddexp.reduce(item.scores)
            answers[i] = FMResponse(
                logprobs=tuple(logp.tolist()),
                label_tokens=sizes if max(sizes := tuple(map(len, item.labels))) > 1 else None,
                prompt_tokens=item.n_prompt,
                completion_tokens=1,
                cached_tokens=head.n if id(head) in paid else 0,
                truncated=item.truncated,
            )
            paid.add(id(head))

    def _batch(
        self, head: _Head, batch: list[tuple[Tree, int]], items: dict[int, _Item]
    ) -> list[tuple[int, int, float]]:
        """What this batch adds to scores: item, label, number."""
        with head.lock:
            if head.computed is None:
                head.computed = self._prefill(head.soft, head.tokens)
            shared = head.computed
            head.n_batches -= 1
            if not head.n_batches:
                head.computed = None
        states = self._model.hidden([tree for tree, _ in batch], shared)
        places: list[tuple[int, int]] = []  # item, label
        rows: list[int] = []
        tokens: list[int] = []
        whole: dict[int, None] = {}  # rows whose normaliser is needed
        at = 0
        for tree, i in batch:
            item = items[i]
            body_end, at = at, at + 1
            for stem in tree.branches:
                path = [body_end, *range(at, at + len(stem))]
                at += len(stem)
                # Among labels, a stem that all share cancels, and so does the normaliser.
                summed = item.absolute or len(item.stems) > 1
                n = len(path) if summed else 1
                if summed:
                    whole.update(dict.fromkeys(path))
                for k in item.stems[stem]:
                    places += [(i, k)] * n
                    rows += path[-n:]
                    tokens += item.labels[k][-n:]
        logits = self._model.logits_of(states, rows, tokens).double().tolist()
        normaliser = dict(zip(whole, self._normaliser(states, list(whole)), strict=True))
        return [(i, k, x - normaliser.get(row, 0.0)) for (i, k), row, x in zip(places, rows, logits, strict=True)]

    def _write(
        self, n_kept: int, items: list[int], requests: list[FMRequest], answers: list[FMResponse | None]
    ) -> None:
        first = requests[items[0]]
        assert isinstance(first, TextRequest)
        whole = self._encode(first.prompt)
        tokens = whole[-n_kept:] if n_kept else ()
        before = len(self._leading) + (first.soft.n if first.soft else 0)
        tokens = tokens or (0,)
        n_prompt = before + len(tokens)
        room = self._max_tokens - n_prompt
        if room < 1:
            for i in items:
                answers[i] = FMResponse(error="nothing to write: the soft prompt leaves no room")
            return
        shared = self._prefill(first.soft, tokens[:-1])
        written: dict[int, list[int]] = {i: [] for i in items}
        rng = {i: np.random.default_rng(r.seed) for i in items if isinstance(r := requests[i], TextRequest)}
        live = list(items)
        while live:
            # The few written tokens are computed again at each step: cheaper than it sounds, and nothing to manage.
            states = self._model.hidden([Tree((tokens[-1], *written[i])) for i in live], shared)
            logits = self._model.logits(states).double().cpu().numpy()
            going = []
            for i, row in zip(live, logits, strict=True):
                request = requests[i]
                assert isinstance(request, TextRequest)
                written[i].append(_draw(row, request, rng[i]))
                text = self._tokenizer.decode(written[i])
                done = len(written[i]) >= min(request.max_tokens, room) or any(s in text for s in request.stop)
                if done or written[i][-1] in self._stop_tokens:
                    answers[i] = FMResponse(
                        text=_cut(text, request.stop),
                        prompt_tokens=n_prompt,
                        completion_tokens=len(written[i]),
                        cached_tokens=n_prompt - 1 if i != items[0] else 0,
                        truncated=len(tokens) < len(whole),
                    )
                else:
                    going.append(i)
            live = going

    def _normaliser(self, states: torch.Tensor, rows: list[int]) -> list[float]:
        """log of the sum over the vocabulary, of each of ``rows`` of ``states``."""
        parts = (rows[at : at + VOCABULARY_ROWS] for at in range(0, len(rows), VOCABULARY_ROWS))
        return [x for part in parts for x in self._model.logits(states[part]).logsumexp(dim=-1).double().tolist()]

    @cached_property
    def _stop_tokens(self) -> set[int]:
        known = (self._tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|im_end|>", "</s>"))
        own = self._config.get("eos_token_id")
        return {t for t in (*known, *(own if isinstance(own, list) else [own])) if t is not None}


T = TypeVar("T")
FloatRow = np.ndarray[tuple[int], np.dtype[np.float64]]


def _batches(items: Sequence[T], size: Callable[[T], int], limit: int) -> list[list[T]]:
    """Consecutive runs whose sizes sum to at most ``limit`` (one item at least)."""
    out: list[list[T]] = []
    room = 0
    for item in items:
        if not out or size(item) > room:
            out.append([])
            room = limit
        out[-1].append(item)
        room -= size(item)
    return out


def _parts(items: Sequence[T], size: Callable[[T], int], limit: int, multiple: int) -> list[list[T]]:
    """Consecutive runs of nearly the same size, each at most ``limit`` and one item; where there is enough to go
    round, a ``multiple`` of them."""
    total = sum(map(size, items))
    n = multiple * -(-total // (limit * multiple))
    out: list[list[T]] = [[] for _ in range(n)]
    at = 0
    for item in items:
        out[at * n // total].append(item)
        at += size(item)
    return [part for part in out if part]


def _one_thread_each(n: int) -> tuple[ThreadPoolExecutor, int]:
    """``n`` threads whose torch computes on one thread each, and their number. The setting is a thread's own, but also
    what threads that start later get: so all start here, and then it is set back."""
    before = torch.get_num_threads()
    started = threading.Barrier(n)
    pool = ThreadPoolExecutor(n, "promptfed-fm", initializer=torch.set_num_threads, initargs=(1,))
    list(pool.map(lambda _: started.wait(), range(n)))
    torch.set_num_threads(before)
    return pool, n


def _tokenizer(folder: Path) -> Tokenizer:
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(
            f"{folder.name} holds no tokenizer.json; make one with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _draw(logits: FloatRow, request: TextRequest, rng: np.random.Generator) -> int:
    """The next token: greedy, or one draw from the nucleus (Holtzman et al., ICLR 2020)."""
    if request.temperature <= 0:
        return int(logits.argmax())
    limit = min(NUCLEUS_LIMIT, len(logits) - 1)
    top = np.argpartition(-logits, limit)[:limit]
    top = top[np.lexsort((top, -logits[top]))]
    z = logits[top] / request.temperature
    mass = np.exp(z - z.max())
    mass = np.cumsum(mass / mass.sum())
    n_keep = int(np.searchsorted(mass, request.top_p)) + 1
    chosen = int(np.searchsorted(mass[:n_keep], rng.random() * mass[:n_keep][-1], side="right"))
    return int(top[min(chosen, n_keep - 1)])


def _cut(text: str, stops: Sequence[str]) -> str:
    return text[: min((text.index(s) for s in stops if s in text), default=len(text))]
