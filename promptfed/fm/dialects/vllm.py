"""A vLLM server: exact label log-probabilities by ``logprob_token_ids``, those of several tokens by prompt
log-probabilities, and soft prompts as ``prompt_embeds`` where the server and this machine can.

Label words are turned into tokens by the server itself (``return_token_ids``), so no tokenizer is needed here. Every
request carries this model's own random ``cache_salt``: nobody else's requests share its prefix cache, so the time an
answer takes tells nobody what was asked.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

from promptfed.errors import FMError
from promptfed.fm.dialects.base import MALFORMED, TokenUsage, scored, whole_prompt
from promptfed.fm.dialects.completions import Completion, CompletionsDialect
from promptfed.fm.embeddings import TokenEmbeddings
from promptfed.fm.endpoint import Endpoint, UnansweredError
from promptfed.types import Capability, FMRequest, FMResponse, LabelRequest, SoftPrompt

# Asks how the server turns a prompt into tokens.
SPELT: dict[str, Any] = {"add_special_tokens": False, "return_token_ids": True}
COUNTS = ("prompt_tokens", "completion_tokens", "cached_tokens")
MAX_TOKEN_IDS = 128  # that one request may name
MAX_SPELT = 16  # texts or labels behind a soft prompt that one request carries
MAX_PROMPTS = 256  # that one request carries, where each label of several tokens makes a prompt of its own


@dataclass(slots=True)
class _Begun:
    """A request that takes several to answer, of which some failed: the log-probability of each label or None, and what
    they used. They are paid for, so only what is missing is asked when the request comes again."""

    logprobs: list[float | None]
    used: FMResponse = field(default_factory=FMResponse)


class VLLMDialect(CompletionsDialect):
    """``embeddings`` are of the weights that the server has."""

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        fm_id: str,
        capabilities: frozenset[Capability],
        *,
        fingerprint: str | None = None,
        embeddings: TokenEmbeddings | None = None,
    ) -> None:
        super().__init__(endpoint, model, fm_id, capabilities, fingerprint=fingerprint)
        self._embeddings = embeddings
        self.soft_space = embeddings.space if embeddings else None
        self._salt = secrets.token_urlsafe(32)
        self._ids: dict[str, tuple[int, ...]] = {}
        self._turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()
        self._begun: dict[LabelRequest, _Begun] = {}

    async def score(self, requests: list[LabelRequest]) -> list[FMResponse]:
        labels, soft = requests[0].labels, requests[0].soft
        if not all(labels):
            return [FMResponse(error="nothing to score: a label is empty")] * len(requests)
        ids = await self._token_ids(labels)
        prompts = [whole_prompt(r) for r in requests]
        items = [self._begun.setdefault(r, _Begun([None] * len(labels))) for r in requests]

        def enter(i: int, k: int, logprob: float | None) -> None:
            if logprob is not None and math.isfinite(logprob):
                items[i].logprobs[k] = logprob

        def book(asked: Sequence[int], usage: TokenUsage) -> None:
            for i, share in zip(asked, usage.shares(len(asked)), strict=True):
                counts = {name: getattr(items[i].used, name) + getattr(share, name) for name in COUNTS}
                items[i].used = replace(items[i].used, **counts)

        async def next_tokens(wanted: list[int]) -> None:
            places = [k for k, tokens in enumerate(ids) if len(tokens) == 1 and tokens[0] in wanted]
            asked = [i for i, item in enumerate(items) if any(item.logprobs[k] is None for k in places)]
            if not asked:
                return
            completion = await self.complete(
                self.prompts([prompts[i] for i in asked], soft) | naming(wanted), len(asked)
            )
            for i, choice in zip(asked, completion.choices, strict=True):
                for k in places:
                    enter(i, k, choice.logprob_of(ids[k][0]))
            book(asked, completion.usage)

        async def continued(pairs: list[tuple[int, int]]) -> None:
            """Labels of several tokens: each behind its prompt, the log-probabilities of its tokens summed."""
            completion = await self.complete(
                self.prompts([prompts[i] + labels[k] for i, k in pairs], None) | {"prompt_logprobs": 0}, len(pairs)
            )
            for (i, k), choice in zip(pairs, completion.choices, strict=True):
                enter(i, k, _tail_sum(choice.prompt_logprobs or [], ids[k]))
            book([i for i, _ in pairs], completion.usage)

        async def spelt(pairs: list[tuple[int, int]]) -> None:
            """The same behind a soft prompt, of which vLLM tells no prompt log-probabilities: each token of a label
            behind those before it."""
            steps = [(i, k, j) for i, k in pairs for j in range(len(ids[k]))]
            wanted = sorted({ids[k][j] for _, k, j in steps})
            embedded = [self._embedded(soft, prompts[i], ids[k][:j]) for i, k, j in steps]
            completion = await self.complete({"prompt": None, "prompt_embeds": embedded} | naming(wanted), len(steps))
            told: dict[tuple[int, int], list[float | None]] = {pair: [] for pair in pairs}
            for (i, k, j), choice in zip(steps, completion.choices, strict=True):
                told[i, k].append(choice.logprob_of(ids[k][j]))
            for (i, k), logprobs in told.items():
                enter(i, k, None if None in logprobs else math.fsum(lp for lp in logprobs if lp is not None))
            book([i for i, _, _ in steps], completion.usage)

        single = sorted({tokens[0] for tokens in ids if len(tokens) == 1})
        long = [k for k, tokens in enumerate(ids) if len(tokens) > 1]
        behind, most = (spelt, MAX_SPELT) if soft else (continued, MAX_PROMPTS)
        several = [(i, k) for i, item in enumerate(items) for k in long if item.logprobs[k] is None]
        # All parts are awaited, whichever fails: what comes is paid for.
        parts = await asyncio.gather(
            *(next_tokens(single[at : at + MAX_TOKEN_IDS]) for at in range(0, len(single), MAX_TOKEN_IDS)),
            *(behind(several[at : at + most]) for at in range(0, len(several), most)),
            return_exceptions=True,
        )
        if failed := [part for part in parts if part is not None]:
            raise failed[0]
        sizes = [len(tokens) for tokens in ids]
        answers = []
        for request, item in zip(requests, items, strict=True):
            known = [lp for lp in item.logprobs if lp is not None]
            if len(known) < len(labels):
                answers.append(MALFORMED)
            else:
                self._begun.pop(request, None)
                answers.append(scored(request, known, item.used, label_tokens=sizes))
        return answers

    async def _token_ids(self, labels: Sequence[str]) -> list[tuple[int, ...]]:
        """The tokens of each label word, asked of the server once."""
        turn = self._turns.setdefault(asyncio.get_running_loop(), asyncio.Lock())
        async with turn:
            unknown = [label for label in dict.fromkeys(labels) if label not in self._ids]
            if unknown:
                completion = await self.complete({"prompt": unknown, **SPELT}, len(unknown))
                for label, choice in zip(unknown, completion.choices, strict=True):
                    if not choice.prompt_token_ids:
                        raise UnansweredError(ValueError("the tokens of a label are expected"))
                    self._ids[label] = tuple(choice.prompt_token_ids)
        return [self._ids[label] for label in labels]

    def prompts(self, prompts: list[str], soft: SoftPrompt | None) -> dict[str, Any]:
        if soft is None:
            return super().prompts(prompts, soft)
        return {"prompt": None, "prompt_embeds": [self._embedded(soft, prompt) for prompt in prompts]}

    def _embedded(self, soft: SoftPrompt | None, prompt: str, tokens: Sequence[int] = ()) -> str:
        if soft is None or self._embeddings is None:
            raise FMError(f"{self.fm_id} takes no soft prompts")  # its capabilities say so before
        return self._embeddings.encoded(soft, prompt, tokens)

    def size(self, request: FMRequest) -> int:
        # Vectors are a hundred times as long as what they stand for.
        return super().size(request) if request.soft is None else self.max_characters // MAX_SPELT

    async def complete(self, fields: dict[str, Any], n: int) -> Completion:
        return await super().complete({"cache_salt": self._salt, **fields}, n)


def naming(tokens: Sequence[int]) -> dict[str, Any]:
    """Asks for the log-probabilities of these tokens (`Choice.logprob_of`)."""
    return {"logprobs": 1, "logprob_token_ids": list(tokens), "return_tokens_as_token_ids": True}


def _tail_sum(positions: list[dict[str, dict[str, Any]] | None], tokens: tuple[int, ...]) -> float | None:
    """The log-probability of ``tokens`` at the end of a prompt; None if the prompt does not end in them."""
    tail = positions[-len(tokens) :]
    found = [(entry or {}).get(str(token), {}).get("logprob") for entry, token in zip(tail, tokens, strict=False)]
    numbers = [float(lp) for lp in found if isinstance(lp, int | float)]
    return sum(numbers) if len(numbers) == len(tokens) else None
