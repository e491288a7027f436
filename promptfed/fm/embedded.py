"""The embedded foundation model: a small language model in this process, on the CPU.

Label requests that share a prompt share its keys and values; texts are sorted by length and packed into batches of a
bounded number of tokens, so memory is bounded and the batches depend on what was asked, not on who asked first.
Log-probabilities are bfloat16 results where the CPU has it (else float32, and slower): they move in the third digit
with the batch they are computed in.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer

from promptfed.fm.base import BaseFM
from promptfed.fm.packed import PackedLlama, Prefix, Tree
from promptfed.fm.weights import find_weights
from promptfed.types import Capability, FMRequest, FMResponse, LabelRequest, TextRequest

BATCH_TOKENS = 768
# Rows of the whole vocabulary at once (400 KB each in float32 and its exponentials).
VOCABULARY_ROWS = 64
# Beyond this a text is cut (and counted as truncated): attention of one long text must not need gigabytes.
MAX_TOKENS = 2048
# Tokens that sampling looks at: the nucleus of a peaked distribution is far smaller.
NUCLEUS_LIMIT = 256


class EmbeddedFM(BaseFM):
    """``embedded:NAME``. NAME is a packaged model, a Llama-family folder, or ``owner/model`` on a hub."""

    def __init__(self, name: str) -> None:
        folder, digest = find_weights(name)
        self._name = f"embedded:{name.rsplit('/', 1)[-1]}@{digest}"
        self._model = PackedLlama(folder)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._max_tokens = min(MAX_TOKENS, self._model.context)
        self._lock = threading.Lock()
        self._encode = lru_cache(maxsize=50_000)(self._encode_uncached)

    @property
    def fm_id(self) -> str:
        return self._name

    @property
    def capabilities(self) -> frozenset[Capability]:
        return frozenset({Capability.TEXT, Capability.LABEL_LOGPROBS})

    @property
    def in_process(self) -> bool:
        return True

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        """Compute in a worker thread, so that the event loop (progress, deadlines) goes on."""
        return await asyncio.to_thread(self._complete, list(requests))

    def _complete(self, requests: list[FMRequest]) -> list[FMResponse]:
        answers: list[FMResponse | None] = [None] * len(requests)
        scoring: dict[str, list[int]] = defaultdict(list)
        writing: dict[tuple[str, int], list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            if isinstance(request, LabelRequest):
                scoring[request.prefix].append(i)
            else:
                writing[request.prompt, self._kept(request)].append(i)
        with self._lock:
            for prefix in sorted(scoring):
                self._score(prefix, scoring[prefix], requests, answers)
            for prompt, n_kept in sorted(writing):
                self._write(prompt, n_kept, writing[prompt, n_kept], requests, answers)
        return [a if a is not None else FMResponse(error="not answered") for a in answers]

    def _encode_uncached(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _body(self, request: LabelRequest, room: int) -> tuple[tuple[int, ...], bool]:
        """Tokens of text and suffix, cut in the text to ``room`` tokens; whether it was cut."""
        # A token is rarely more than 20 bytes: a text of megabytes need not be tokenised whole.
        whole = self._encode(request.text[: room * 20] + request.suffix)
        if len(whole) <= room and len(request.text) <= room * 20:
            return whole, False
        suffix = self._encode(request.suffix)
        return self._encode(request.text[: room * 20])[: max(room - len(suffix), 0)] + suffix, True

    def _kept(self, request: TextRequest) -> int:
        """Tokens of the prompt, from its end, that leave room for ``max_tokens``, or at least for half the context."""
        room = min(request.max_tokens, self._max_tokens // 2)
        return min(len(self._encode(request.prompt)), self._max_tokens - room)

    def _score(
        self, prefix: str, items: list[int], requests: list[FMRequest], answers: list[FMResponse | None]
    ) -> None:
        head = self._encode(prefix)
        # A stem is all tokens of a label but the last. The stems of a text's labels are branches behind it; labels that
        # share a stem share the branch, and labels of one token share the empty one.
        trees: list[tuple[Tree, int]] = []
        labels: dict[int, list[tuple[int, ...]]] = {}
        stems: dict[int, dict[tuple[int, ...], list[int]]] = {}
        cut: dict[int, tuple[int, bool]] = {}
        for i in items:
            request = requests[i]
            assert isinstance(request, LabelRequest)
            labels[i] = [self._encode(label) for label in request.labels]
            longest = max(map(len, labels[i]))
            room = max(self._max_tokens - len(head) - longest, 0)
            body, truncated = self._body(request, room)
            cut[i] = (len(head) + len(body), truncated)
            if not 0 < len(body) <= room or not all(labels[i]):
                answers[i] = FMResponse(error="nothing to score: the prompt leaves no room, or a label is empty")
                continue
            stems[i] = defaultdict(list)
            for k, label in enumerate(labels[i]):
                stems[i][label[:-1]].append(k)
            trees += [(Tree(body, tuple(part)), i) for part in _batches(list(stems[i]), len, BATCH_TOKENS - len(body))]
        trees.sort(key=lambda t: (len(t[0].tokens), t))
        shared: Prefix = self._model.prefill(head) if trees else []
        scores = {i: np.zeros(len(labels[i])) for i in stems}
        for batch in _batches(trees, lambda t: len(t[0].tokens)):
            states = self._model.hidden([tree for tree, _ in batch], shared).float()
            places: list[tuple[int, int]] = []  # item, label
            rows: list[int] = []
            tokens: list[int] = []
            at = 0
            for tree, i in batch:
                body_end, at = at, at + 1
                for stem in tree.branches:
                    path = [body_end, *range(at, at + len(stem))]
                    at += len(stem)
                    # A stem that all labels share cancels, and so does the normaliser.
                    n = 1 if len(stems[i]) == 1 else len(path)
                    for k in stems[i][stem]:
                        places += [(i, k)] * n
                        rows += path[-n:]
                        tokens += labels[i][k][-n:]
            logits = (states[rows] * self._model.head[tokens].float()).sum(dim=-1).double()
            if any(len(stems[i]) > 1 for _, i in batch):
                logits -= self._normaliser(states)[rows]
            for (i, k), logit in zip(places, logits.tolist(), strict=True):
                scores[i][k] += logit
        for n_answer, (i, logits) in enumerate(sorted(scores.items())):
            n_prompt, truncated = cut[i]
            logp = logits - np.logaddexp.reduce(logits)
            answers[i] = FMResponse(
                logprobs=tuple(logp.tolist()),
                label_tokens=sizes if max(sizes := tuple(map(len, labels[i]))) > 1 else None,
                prompt_tokens=n_prompt,
                completion_tokens=1,
                cached_tokens=len(head) if n_answer else 0,
                truncated=truncated,
            )

    def _write(
        self, prompt: str, n_kept: int, items: list[int], requests: list[FMRequest], answers: list[FMResponse | None]
    ) -> None:
        whole = self._encode(prompt)
        tokens = whole[-n_kept:] or (0,)
        room = self._max_tokens - len(tokens)
        shared: Prefix = self._model.prefill(tokens[:-1])
        written: dict[int, list[int]] = {i: [] for i in items}
        rng = {i: np.random.default_rng(r.seed) for i in items if isinstance(r := requests[i], TextRequest)}
        live = list(items)
        while live:
            # The few written tokens are computed again at each step: cheaper than it sounds, and nothing to manage.
            states = self._model.hidden([Tree((tokens[-1], *written[i])) for i in live], shared)
            logits = (states.float() @ self._head.T).double().numpy()
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
                        prompt_tokens=len(tokens),
                        completion_tokens=len(written[i]),
                        cached_tokens=len(tokens) - 1 if i != items[0] else 0,
                        truncated=len(tokens) < len(whole),
                    )
                else:
                    going.append(i)
            live = going

    def _normaliser(self, states: torch.Tensor) -> torch.Tensor:
        """log of the sum over the vocabulary, (n,) of states (n, hidden)."""
        parts = (states[at : at + VOCABULARY_ROWS] for at in range(0, len(states), VOCABULARY_ROWS))
        return torch.cat([(part @ self._head.T).logsumexp(dim=-1).double() for part in parts])

    @cached_property
    def _head(self) -> torch.Tensor:
        """The whole output projection in float32 (113 MB): made when the full vocabulary is first needed."""
        head: torch.Tensor = self._model.head.float()
        return head

    @cached_property
    def _stop_tokens(self) -> set[int]:
        ends = (self._tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|im_end|>", "</s>"))
        return {t for t in ends if t is not None}


T = TypeVar("T")
FloatRow = np.ndarray[tuple[int], np.dtype[np.float64]]


def _batches(items: Sequence[T], size: Callable[[T], int], limit: int = BATCH_TOKENS) -> list[list[T]]:
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
