"""How classification prompts are put together, taken apart and recombined.

A `Draft` is a prompt before it is text: an instruction, two field names, exemplars and label words. None of the
building blocks here knows a task: task words come from the person's instruction, from the labels, and from what the
foundation model writes and the clients' domain models vote for (`Materials`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from promptfed.prompts.template import SLOT, PromptTemplate

T = TypeVar("T")

FIELDS: tuple[tuple[str, str], ...] = (
    ("Text", "Label"),
    ("Text", "Answer"),
    ("Text", "Class"),
    ("Text", "Category"),
    ("Input", "Output"),
    ("Sentence", "Label"),
)
# Short sentences that a word completes, whatever the task: "It was awful.", "It is about hockey."
FRAMES: tuple[str, ...] = ("It was", "This is", "It is about")


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """One candidate. ``exemplars`` are (text, label index) in the order in which they stand in the prompt."""

    instruction: str
    fields: tuple[str, str]
    exemplars: tuple[tuple[str, int], ...]
    words: tuple[str, ...]

    def template(self) -> PromptTemplate:
        source, target = self.fields
        blocks = [self.instruction] if self.instruction else []
        blocks += [f"{source}: {text}\n{target}: {self.words[label]}" for text, label in self.exemplars]
        blocks.append(f"{source}: {SLOT}\n{target}:")
        return PromptTemplate(text="\n\n".join(blocks), words=self.words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Materials:
    """What drafts are made of. ``exemplars[k]`` are texts of label k, best first, and may be none; ``words`` are the
    given label words, ``other_words[k]`` more words for label k, best first, which may be none too."""

    instructions: tuple[str, ...]
    fields: tuple[tuple[str, str], ...]
    exemplars: tuple[tuple[str, ...], ...]
    words: tuple[str, ...]
    other_words: tuple[tuple[str, ...], ...]

    def draw_words(self, rng: np.random.Generator) -> tuple[str, ...]:
        """The given label words, or (half of the time, where every label has others) other ones."""
        if rng.random() < 0.5 or not all(self.other_words):
            return self.words
        drawn = tuple(_pick(options, rng) for options in self.other_words)
        return drawn if len(set(drawn)) == len(drawn) else self.words


def usable_exemplar(text: str, *, max_words: int) -> bool:
    """Short, on one line, without a slot: it can stand in a prompt."""
    return 2 <= len(text.split()) <= max_words and "\n" not in text and SLOT not in text


def random_draft(materials: Materials, rng: np.random.Generator, *, per_label: int = 1) -> Draft:
    """A draft with ``per_label`` exemplars of each label, in random order, all parts drawn uniformly."""
    exemplars = [
        (texts[i], label)
        for label, texts in enumerate(materials.exemplars)
        for i in rng.permutation(len(texts))[:per_label]
    ]
    return Draft(
        instruction=_pick(materials.instructions, rng),
        fields=_pick(materials.fields, rng),
        exemplars=tuple(exemplars[i] for i in rng.permutation(len(exemplars))),
        words=materials.draw_words(rng),
    )


def crossover(a: Draft, b: Draft, rng: np.random.Generator) -> Draft:
    """Each part from one of the parents; exemplars are drawn label by label, in the order of the first parent."""
    first, second = (a, b) if rng.random() < 0.5 else (b, a)
    child = Draft(
        instruction=_pick((a.instruction, b.instruction), rng),
        fields=_pick((a.fields, b.fields), rng),
        exemplars=first.exemplars,
        words=_pick((a.words, b.words), rng),
    )
    for label in sorted({label for _, label in first.exemplars}):
        theirs = [e for e in second.exemplars if e[1] == label]
        if theirs and rng.random() < 0.5:
            child = _replace_label(child, label, theirs)
    return child


def edit(draft: Draft, materials: Materials, rng: np.random.Generator) -> Draft:
    """Change one part: an exemplar (half of the time), the order, the fields, the instruction or the words."""
    choice = rng.choice(["exemplar", "order", "fields", "instruction", "words"], p=[0.5, 0.15, 0.15, 0.1, 0.1])
    if choice == "exemplar" and draft.exemplars:
        place = int(rng.integers(len(draft.exemplars)))
        label = draft.exemplars[place][1]
        fresh = [t for t in materials.exemplars[label] if (t, label) not in draft.exemplars]
        if fresh:
            changed = [*draft.exemplars]
            changed[place] = (_pick(fresh, rng), label)
            return replace(draft, exemplars=tuple(changed))
    if choice == "fields":
        return replace(draft, fields=_pick(materials.fields, rng))
    if choice == "instruction":
        return replace(draft, instruction=_pick(materials.instructions, rng))
    if choice == "words":
        return replace(draft, words=materials.draw_words(rng))
    order = rng.permutation(len(draft.exemplars))
    return replace(draft, exemplars=tuple(draft.exemplars[i] for i in order))


def similarity(a: Draft, b: Draft) -> float:
    """Share of parts that two drafts have in common, in [0, 1]: fields, words, and exemplars by overlap."""
    both, either = set(a.exemplars) & set(b.exemplars), set(a.exemplars) | set(b.exemplars)
    return ((a.fields == b.fields) + (a.words == b.words) + (len(both) / len(either) if either else 1.0)) / 3.0


def _replace_label(draft: Draft, label: int, theirs: Sequence[tuple[str, int]]) -> Draft:
    queue = list(theirs)
    kept = []
    for exemplar in draft.exemplars:
        if exemplar[1] != label:
            kept.append(exemplar)
        elif queue:
            kept.append(queue.pop(0))
    return replace(draft, exemplars=tuple(kept))


def _pick(options: Sequence[T], rng: np.random.Generator) -> T:
    return options[int(rng.integers(len(options)))]
