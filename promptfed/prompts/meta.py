"""Meta-prompts: texts with their labels, after which the FM goes on writing the instruction that they were labelled by.

As the forward and backward templates of deep language networks (Sordoni et al., NeurIPS 2023, arXiv 2306.12509), from
which DP-OPT takes its own, but without chat turns: a model that only continues text can follow it.
"""

from __future__ import annotations

from collections.abc import Sequence

from promptfed.types import LabelRequest

ENDING = "The instruction that the texts above were labelled by:"


def next_word_request(
    examples: Sequence[tuple[str, str]], fields: tuple[str, str], written: str, candidates: Sequence[str]
) -> LabelRequest:
    """Which of ``candidates`` comes after ``written``, given (text, label word) pairs; without any, what the FM would
    write of itself."""
    source, target = fields
    blocks = [f"{source}: {' '.join(text.split())}\n{target}: {word}" for text, word in examples]
    ending = f"{ENDING} {written}".rstrip()
    return LabelRequest(
        prefix="", text="\n\n".join([*blocks, ending]), suffix="", labels=tuple(f" {word}" for word in candidates)
    )
