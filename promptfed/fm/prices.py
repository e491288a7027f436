"""What a foundation model's tokens cost, from a file with a date, and a wrapper that books it.

date = 2026-11-25                  # when somebody looked at the provider's list
[models."NAME"]                    # as in openai:URL#NAME; USD a million tokens
prompt = 0.15
cached = 0.075                     # prompt tokens that the provider had in its cache; as `prompt` by default
completion = 0.60
"""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from promptfed.errors import ConfigError
from promptfed.fm.base import BaseFM, WrappedFM
from promptfed.types import Capability, FMRequest, FMResponse, LabelRequest

# What a request may hold beside the prompt: a chat's frame and the instruction to answer with a label; an answer in
# JSON.
FRAME_TOKENS = 64
LABEL_ANSWER_TOKENS = 64


class Price(BaseModel):
    """USD a million tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    prompt: float = Field(ge=0)
    completion: float = Field(ge=0)
    cached: float | None = Field(ge=0, default=None)

    def of(self, answer: FMResponse) -> float:
        """USD that an answer cost."""
        cached = min(answer.cached_tokens, answer.prompt_tokens)
        fresh = answer.prompt_tokens - cached
        rate = self.prompt if self.cached is None else self.cached
        return (fresh * self.prompt + cached * rate + answer.completion_tokens * self.completion) / 1e6

    def most(self, request: FMRequest, n_prompts: int = 1) -> float:
        """USD that it can cost at most: no tokenizer makes more tokens than bytes."""
        if isinstance(request, LabelRequest):
            prompt = request.prefix + request.text + request.suffix + "".join(request.labels)
            written = LABEL_ANSWER_TOKENS
        else:
            prompt, written = request.prompt, request.max_tokens
        n_bytes = len(prompt.encode(errors="surrogatepass")) + FRAME_TOKENS
        return (n_prompts * n_bytes * self.prompt + written * self.completion) / 1e6


class PriceFile(BaseModel):
    """The whole file. Raises `ConfigError` where it is read, not later."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    date: datetime.date
    models: dict[str, Price]

    @classmethod
    def read(cls, path: Path) -> PriceFile:
        """Raises `ConfigError` for a file that is none."""
        try:
            return cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ConfigError(f"{path}: can't be read ({error.strerror})") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ConfigError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        except ValueError as error:
            raise ConfigError(f"{path}: not TOML: {error}") from None

    def of(self, model: str, path: Path) -> Price:
        """The price of a model. Raises `ConfigError` if it is not in the file."""
        if model not in self.models:
            raise ConfigError(f"{path} has no price of {model}; it has {', '.join(sorted(self.models)) or 'none'}")
        return self.models[model]


class Priced(WrappedFM):
    """Books what every answer costs."""

    def __init__(self, inner: BaseFM, price: Price) -> None:
        super().__init__(inner)
        self._price = price

    @property
    def is_priced(self) -> bool:
        return True

    def most_usd(self, requests: Sequence[FMRequest]) -> float:
        exact = Capability.PROMPT_LOGPROBS in self.capabilities
        # A label of several tokens is read behind its prompt, which makes a prompt more.
        return sum(
            self._price.most(r, 1 + len(r.labels) if exact and isinstance(r, LabelRequest) else 1) for r in requests
        )

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        return [replace(a, usd=self._price.of(a)) for a in await self._inner.complete(requests)]
