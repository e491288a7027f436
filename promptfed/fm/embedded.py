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
from collections.abc import Sequence
from functools import cached_property, lru_cache

import numpy as np
import torch
from tokenizers import Tokenizer

from promptfed.fm.base import BaseFM
from promptfed.fm.packed import PackedLlama, Prefix
from promptfed.fm.weights import find_weights
from promptfed.types import Capability, FMRequest, FMResponse, LabelRequest, TextRequest

BATCH_TOKENS = 768
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
        # A sequence is a text and a stem, all tokens of a label but the last. Labels that share a stem share the
        # sequence, and labels of one token share the empty one.
        sequences: list[tuple[tuple[int, ...], int, tuple[int, ...]]] = []
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
            sequences.extend((body + stem, i, stem) for stem in stems[i])
        sequences.sort(key=lambda s: (len(s[0]), s[0]))
        shared: Prefix = self._model.prefill(head) if sequences else []
        partial: dict[int, FloatRow] = {}
        for batch in _batches(sequences, lambda s: len(s[0])):
            n_last = [len(stem) + 1 for _, _, stem in batch]
            states = self._model.hidden([s[0] for s in batch], shared, n_last).float()
            start = 0
            for (_, i, stem), n in zip(batch, n_last, strict=True):
                rows = states[start : start + n]
                start += n
                mine = stems[i][stem]
                last = torch.tensor([labels[i][k][-1] for k in mine])
                scores = partial.setdefault(i, np.full(len(labels[i]), np.nan))
                if len(stems[i]) == 1:
                    # Stem and normaliser are the same for all labels and cancel: only the labels' rows are projected.
                    scores[mine] = (rows[-1] @ self._model.head[last].float().T).double().numpy()
                else:
                    logp = (rows @ self._head.T).log_softmax(dim=-1).double()
                    before = logp[torch.arange(n - 1), torch.tensor(stem, dtype=torch.long)].sum()
                    scores[mine] = (before + logp[-1, last]).numpy()
        for n_answer, (i, logits) in enumerate(sorted(partial.items())):
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
            states = self._model.hidden([[tokens[-1], *written[i]] for i in live], shared, [1] * len(live))
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

    @cached_property
    def _head(self) -> torch.Tensor:
        """The whole output projection in float32 (113 MB): made when the full vocabulary is first needed."""
        head: torch.Tensor = self._model.head.float()
        return head

    @cached_property
    def _stop_tokens(self) -> set[int]:
        ends = (self._tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|im_end|>", "</s>"))
        return {t for t in ends if t is not None}


FloatRow = np.ndarray[tuple[int], np.dtype[np.float64]]


def _batches(items: list, size) -> list[list]:  # type: ignore[no-untyped-def,type-arg]
    """Consecutive runs whose sizes sum to at most BATCH_TOKENS (one item at least)."""
    out: list[list] = []  # type: ignore[type-arg]
    room = 0
    for item in items:
        if not out or size(item) > room:
            out.append([])
            room = BATCH_TOKENS
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
