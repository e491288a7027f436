"""A prompt: raw text with one ``{text}`` slot, and the label words that may follow it.

The slot is replaced once and nothing else is interpreted, so braces in a text are harmless. The verbalizer (``words``
and ``separator``) owns the white space before a label word; chat templates are the foundation model adapter's affair.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from promptfed.errors import ConfigError
from promptfed.types import LabelRequest

SLOT = "{text}"


def content_hash(value: object, length: int = 12) -> str:
    """SHA-256 over canonical JSON, ``length`` hex digits."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:length]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTemplate:
    """``text`` with exactly one slot; ``words[k]`` stands for label k after ``separator``."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  (read by pydantic where a message carries this)

    text: str
    words: tuple[str, ...]
    separator: str = " "

    def __post_init__(self) -> None:
        if (found := self.text.count(SLOT)) != 1:
            raise ConfigError(f"a prompt needs the slot {SLOT} exactly once; found {found} times")
        if len(self.words) < 2:
            raise ConfigError(f"a prompt needs at least two label words; got {len(self.words)}")
        if len(set(self.words)) != len(self.words) or not all(w.strip() for w in self.words):
            raise ConfigError(f"label words must be distinct and not empty; got {list(self.words)}")

    @property
    def prompt_id(self) -> str:
        return content_hash([self.text, self.words, self.separator])

    def requests(self, texts: Sequence[str]) -> list[LabelRequest]:
        """One request a text. White space that ends the prefix goes with the text, where tokenizers expect it."""
        before, after = self.text.split(SLOT)
        prefix = before.rstrip(" ")
        space = before[len(prefix) :]
        labels = tuple(self.separator + word for word in self.words)
        return [LabelRequest(prefix=prefix, text=space + text, suffix=after, labels=labels) for text in texts]
