"""Meta-prompts: texts with their labels, after which the FM goes on writing an instruction that may have led to them.

As the forward and backward templates of deep language networks (Sordoni et al., NeurIPS 2023, arXiv 2306.12509), from
which DP-OPT takes its own, but without chat turns: a model that only continues text can follow it.
"""

from __future__ import annotations

from collections.abc import Sequence

from promptfed.types import LabelRequest

OPENING = "Instruction:"


def next_word_request(
    examples: Sequence[tuple[str, str]],
    fields: tuple[str, str],
    shown: Sequence[str],
    written: str,
    candidates: Sequence[str],
) -> LabelRequest:
    """Which of ``candidates`` comes after ``written`` in another instruction like those ``shown``, given (text, label
    word) pairs; without any, what the FM would write of itself."""
    source, target = fields
    blocks = [f"{source}: {' '.join(text.split())}\n{target}: {word}" for text, word in examples]
    lines = "\n".join(f"{OPENING} {text}".rstrip() for text in (*shown, written))
    return LabelRequest(
        prefix="", text="\n\n".join([*blocks, lines]), suffix="", labels=tuple(f" {word}" for word in candidates)
    )
