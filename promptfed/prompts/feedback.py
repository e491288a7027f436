"""What the FM is asked when it rewrites an instruction, and how its answers are read.

Textual feedback after TextGrad (Yuksekgonul et al., arXiv 2406.07496): the FM is shown what went wrong and writes a
critique (the "gradient"), then a better instruction (the "step"). Our wording asks for what holds in general and for no
quotation: GEPA's own template (arXiv 2507.19457, appendix) wants "niche and domain specific" facts, which here would be
a client's private text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from promptfed.prompts.template import SLOT, PromptTemplate

# Characters of a text that are shown with a mistake.
MAX_SHOWN = 300
# Words of the public texts that clients are told of, most frequent first, about 2 KB. They take no more as known: a
# server that named a dictionary would open the leak gate.
MAX_KNOWN = 300

_TAGGED = re.compile(r"<instruction>(.*?)(?:</instruction>|\Z)", flags=re.DOTALL | re.IGNORECASE)
_HEADING = re.compile(r"^(?:[\w ]{0,30}\b(?:instruction|prompt)s?\b[\w ]{0,12}|answer)\s*:\s*", flags=re.IGNORECASE)
_MARKS = " \t\"'`*#>-\u2022\u201c\u201d"
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")

Condense = Literal["summarise", "uid"]


def rewritten(template: PromptTemplate, old: str, new: str) -> PromptTemplate:
    """``template`` with the instruction ``new`` in place of ``old``, with which it begins (see `Draft.template`).

    Raises `ValueError` where it does not.
    """
    if not template.text.startswith(old):
        raise ValueError("the prompt does not begin with the instruction that is to be rewritten")
    rest = template.text[len(old) :] if old else f"\n\n{template.text}"
    return PromptTemplate(
        text=new + rest, words=template.words, synonyms=template.synonyms, separator=template.separator
    )


def critique_prompt(instruction: str, words: Sequence[str], mistakes: Sequence[tuple[str, str, str]]) -> str:
    """Ask what is wrong with ``instruction``; ``mistakes`` are (text, right answer, given answer). Here and below,
    without ``words`` answers are written."""
    # What is asked stands at the end of a text that is to be answered.
    part = slice(MAX_SHOWN) if words else slice(-MAX_SHOWN, None)
    shown = "\n\n".join(
        f"Text: {' '.join(text.split())[part]}\nRight answer: {right}\nAnswer given: {given}"
        for text, right, given in mistakes
    )
    how = f"with one of: {', '.join(words)}" if words else "in a few words"
    return (
        f"A model answers {how}.\nIts instruction is: {instruction or '(none)'}\n\n"
        f"It got these texts wrong.\n\n{shown}\n\n"
        "Say in one or two sentences what the instruction should explain better, for any text. "
        "Do not quote the texts.\n\nWhat the instruction lacks:"
    )


def rewrite_prompt(instruction: str, words: Sequence[str], critique: str, max_words: int) -> str:
    """Ask for a better instruction in the light of ``critique``."""
    return (
        f"This instruction tells a model to {_job(words)}.\n\n"
        f"Instruction: {instruction or '(none)'}\nWhat it lacks: {' '.join(critique.split())}\n\n"
        f"Write a better instruction for any text, in at most {max_words} words, without examples, names or numbers. "
        "Put it between <instruction> and </instruction>.\n\nBetter instruction:"
    )


def merge_prompt(instructions: Sequence[str], words: Sequence[str], how: Condense, max_words: int) -> str:
    """Ask for one instruction that says what ``instructions`` say: FedTextGrad's summary (arXiv 2502.19980, section 4),
    or that with uniform information density (``uid``)."""
    even = (
        " Spread the information evenly: every sentence says about as much as every other one, none is crowded and "
        "none is empty."
        if how == "uid"
        else ""
    )
    shown = "\n".join(f"- {instruction}" for instruction in instructions)
    return (
        f"These instructions all tell a model to {_job(words)}.\n\n{shown}\n\n"
        f"Combine them into one instruction of at most {max_words} words that keeps what they have to say.{even} "
        "Put it between <instruction> and </instruction>.\n\nCombined instruction:"
    )


def _job(words: Sequence[str]) -> str:
    return f"label a text with one of: {', '.join(words)}" if words else "answer a text in a few words"


def sentences(instruction: str) -> list[str]:
    """The sentences (or lines) of an instruction, without the marks of a list."""
    return [s for part in _SENTENCE.split(instruction) if (s := part.strip(_MARKS))]


def read_instruction(written: str, max_words: int) -> str:
    """The instruction in what an FM wrote, on one line; "" where there is none.

    What stands between the tags, or, since weak models leave them out, the first line that could be one. It ends with
    its last whole sentence within ``max_words``, if it has any.
    """
    tagged = _TAGGED.search(written)
    lines = [" ".join(tagged[1].split())] if tagged and tagged[1].strip() else written.splitlines()
    for line in lines:
        bare = _HEADING.sub("", re.sub(r"</?\w+>", " ", line).strip(_MARKS)).strip(_MARKS)
        if SLOT in bare or len(re.findall(r"[^\W\d_]{2,}", bare)) < 3:
            continue
        words = bare.split()[:max_words]
        whole = [i for i, word in enumerate(words, start=1) if word[-1] in ".!?"]
        return " ".join(words[: whole[-1]] if whole else words)
    return ""
