"""How prompts are put together, taken apart and recombined.

A `Draft` is a prompt before it is text: an instruction, two field names, exemplars and label words. None of the
building blocks here knows a task: task words come from the person's instruction, from the labels, and from what the
foundation model writes and the clients' domain models vote for (`Materials`). A prompt that generates has no label
words, and its exemplars are pairs of a text and its answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from promptfed.prompts.template import SLOT, PromptTemplate

T = TypeVar("T")

MAX_PAIRS = 4
FIELDS: tuple[tuple[str, str], ...] = (
    ("Text", "Label"),
    ("Text", "Answer"),
    ("Text", "Class"),
    ("Text", "Category"),
    ("Input", "Output"),
    ("Sentence", "Label"),
)
# What a field may be called when the person's instruction names it: "Classify the sentiment of ..." gives "Sentiment".
SOURCES: tuple[str, ...] = ("Text", "Input", "Sentence")
# Short sentences that a word completes, whatever the task: "It was awful.", "It is about hockey."
FRAMES: tuple[str, ...] = ("It was", "This is", "It is about")


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """One candidate. ``exemplars`` are (text, label index) in the order in which they stand in the prompt; ``words``
    are shown in them, and ``readout[k]``, if there are any, are further words that the score of label k is read off.
    Without label words, ``pairs`` of (text, answer) stand where exemplars do."""

    instruction: str
    fields: tuple[str, str]
    exemplars: tuple[tuple[str, int], ...]
    words: tuple[str, ...]
    readout: tuple[tuple[str, ...], ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()

    def template(self) -> PromptTemplate:
        source, target = self.fields
        blocks = [self.instruction] if self.instruction else []
        shown = [*((text, self.words[label]) for text, label in self.exemplars), *self.pairs]
        blocks += [f"{source}: {text}\n{target}: {answer}" for text, answer in shown]
        blocks.append(f"{source}: {SLOT}\n{target}:")
        synonyms = tuple(tuple(w for w in mine if w not in self.words) for mine in self.readout)
        return PromptTemplate(text="\n\n".join(blocks), words=self.words, synonyms=synonyms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Materials:
    """What drafts are made of. ``exemplars[k]`` are texts of label k, best first, and may be none; ``words`` are the
    given label words, ``other_words[k]`` more words for label k, best first, which may be none too. No word stands for
    two labels. ``loose[k]`` are whole public or written texts of label k, best first: some of them are exemplars.
    ``pairs`` of (text, answer), best first, are for prompts that generate. ``contrasts`` are pairs of exemplars (text,
    label) whose labels are easily taken for one another."""

    instructions: tuple[str, ...]
    fields: tuple[tuple[str, str], ...]
    exemplars: tuple[tuple[str, ...], ...]
    words: tuple[str, ...]
    other_words: tuple[tuple[str, ...], ...]
    pairs: tuple[tuple[str, str], ...] = ()
    loose: tuple[tuple[str, ...], ...] = ()
    contrasts: tuple[tuple[tuple[str, int], tuple[str, int]], ...] = ()

    def readout(self) -> tuple[tuple[str, ...], ...]:
        """All words of each label; () where no label has more than the given one."""
        every = tuple((word, *more) for word, more in zip(self.words, self.other_words, strict=True))
        return every if any(self.other_words) else ()

    def draw_readout(self, rng: np.random.Generator) -> tuple[tuple[str, ...], ...]:
        """All words of each label, which mostly tell more than one; now and then none but those that are shown."""
        return every if (every := self.readout()) and rng.random() < 0.75 else ()

    def draw_words(self, rng: np.random.Generator) -> tuple[str, ...]:
        """The given label words, or (half of the time, where every label has others) other ones."""
        if rng.random() < 0.5 or not all(self.other_words):
            return self.words
        return tuple(_pick(options, rng) for options in self.other_words)

    def draw_pairs(self, rng: np.random.Generator) -> tuple[tuple[str, str], ...]:
        """Up to `MAX_PAIRS` of the pairs, in random order: more show better what is asked for, but cost tokens."""
        if not self.pairs:
            return ()
        n = int(rng.integers(1, min(MAX_PAIRS, len(self.pairs)) + 1))
        return tuple(self.pairs[i] for i in rng.permutation(len(self.pairs))[:n])


def named_fields(instruction: str) -> tuple[tuple[str, str], ...]:
    """Pairs of field names whose second is what ``instruction`` asks for: the first noun after "the" that does not
    name the input. () where there is none, as in an instruction of another language."""
    nouns = [noun.capitalize() for noun in re.findall(r"\bthe (\w+)", instruction, flags=re.IGNORECASE)]
    asked = next((noun for noun in nouns if noun not in SOURCES), None)
    return tuple((source, asked) for source in SOURCES) if asked else ()


def likely_fields(instruction: str) -> tuple[tuple[str, str], ...]:
    """Field names to draw from: what the person asks for, and more often than any other name, since it is the best one
    can know without a call."""
    return (*named_fields(instruction) * 3, *FIELDS)


def bare_draft(instruction: str, words: tuple[str, ...]) -> Draft:
    """The instruction and an empty form, whose second field is what it asks for."""
    return Draft(instruction=instruction, fields=likely_fields(instruction)[0], exemplars=(), words=words)


def usable_exemplar(text: str, *, max_words: int) -> bool:
    """Short, on one line, without a slot: it can stand in a prompt."""
    return 2 <= len(text.split()) <= max_words and "\n" not in text and SLOT not in text


def random_draft(materials: Materials, rng: np.random.Generator) -> Draft:
    """A draft with one exemplar of each label that has any, in random order, all parts drawn uniformly. Where there are
    contrasts, half of the drafts have one of them, side by side."""
    exemplars = [(_pick(texts, rng), label) for label, texts in enumerate(materials.exemplars) if texts]
    draft = Draft(
        instruction=_pick(materials.instructions, rng),
        fields=_pick(materials.fields, rng),
        exemplars=tuple(exemplars[i] for i in rng.permutation(len(exemplars))),
        words=materials.draw_words(rng),
        readout=materials.draw_readout(rng),
        pairs=materials.draw_pairs(rng),
    )
    if materials.contrasts and rng.random() < 0.5:
        return replace(draft, exemplars=_with_contrast(draft.exemplars, _pick(materials.contrasts, rng), rng))
    return draft


def _with_contrast(
    shown: tuple[tuple[str, int], ...], contrast: tuple[tuple[str, int], tuple[str, int]], rng: np.random.Generator
) -> tuple[tuple[str, int], ...]:
    """``shown`` with ``contrast`` in place of its exemplars of these labels, in random order."""
    others = [exemplar for exemplar in shown if exemplar[1] not in {label for _, label in contrast}]
    place = int(rng.integers(len(others) + 1))
    pair = [contrast[i] for i in rng.permutation(2)]
    return (*others[:place], *pair, *others[place:])


def draw_exemplars(materials: Materials, n: int, rng: np.random.Generator) -> tuple[tuple[str, int], ...]:
    """``n`` different exemplars of each label (as far as there are), in random order."""
    chosen = [(texts[i], k) for k, texts in enumerate(materials.exemplars) for i in rng.permutation(len(texts))[:n]]
    return tuple(chosen[i] for i in rng.permutation(len(chosen)))


def draft_like(i: int, materials: Materials, rng: np.random.Generator) -> Draft:
    """Seed draft number i: the first is the person's instruction alone, the others have one exemplar a label."""
    if i == 0:
        return Draft(
            instruction=materials.instructions[0], fields=materials.fields[0], exemplars=(), words=materials.words
        )
    return random_draft(materials, rng)


def crossover(a: Draft, b: Draft, rng: np.random.Generator) -> Draft:
    """Each part from one of the parents; exemplars are drawn label by label, in the order of the first parent."""
    first, second = (a, b) if rng.random() < 0.5 else (b, a)
    child = Draft(
        instruction=_pick((a.instruction, b.instruction), rng),
        fields=_pick((a.fields, b.fields), rng),
        exemplars=first.exemplars,
        words=_pick((a.words, b.words), rng),
        readout=_pick((a.readout, b.readout), rng),
        pairs=_mixed(first.pairs, second.pairs, rng),
    )
    for label in sorted({label for _, label in first.exemplars}):
        theirs = [e for e in second.exemplars if e[1] == label]
        if theirs and rng.random() < 0.5:
            child = _replace_label(child, label, theirs)
    return child


def edit(draft: Draft, materials: Materials, rng: np.random.Generator) -> Draft:
    """Change one part: an exemplar (half of the time), the order, the fields, the instruction or the words."""
    choice = rng.choice(["exemplar", "order", "fields", "instruction", "words"], p=[0.5, 0.15, 0.15, 0.1, 0.1])
    if choice == "exemplar" and materials.pairs:
        return replace(draft, pairs=_edited(draft.pairs, materials.pairs, rng))
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
        return replace(draft, words=materials.draw_words(rng), readout=materials.draw_readout(rng))
    order = rng.permutation(len(draft.exemplars or draft.pairs))
    if draft.pairs:
        return replace(draft, pairs=tuple(draft.pairs[i] for i in order))
    return replace(draft, exemplars=tuple(draft.exemplars[i] for i in order))


def similarity(a: Draft, b: Draft) -> float:
    """How alike two drafts answer, in [0, 1]: label words count for half, as prompts with other label words make other
    mistakes; fields and overlapping exemplars count for a quarter each."""
    mine, theirs = {*a.exemplars, *a.pairs}, {*b.exemplars, *b.pairs}
    both, either = mine & theirs, mine | theirs
    overlap = len(both) / len(either) if either else 1.0
    return 0.5 * (a.words == b.words) + 0.25 * (a.fields == b.fields) + 0.25 * overlap


def _replace_label(draft: Draft, label: int, theirs: Sequence[tuple[str, int]]) -> Draft:
    queue = list(theirs)
    kept = []
    for exemplar in draft.exemplars:
        if exemplar[1] != label:
            kept.append(exemplar)
        elif queue:
            kept.append(queue.pop(0))
    return replace(draft, exemplars=tuple(kept))


def _mixed(
    first: tuple[tuple[str, str], ...], second: tuple[tuple[str, str], ...], rng: np.random.Generator
) -> tuple[tuple[str, str], ...]:
    """Pairs place by place from one of two parents, none of them twice; as many as the first has, or fewer."""
    chosen = (_pick((mine, *second[i : i + 1]), rng) for i, mine in enumerate(first))
    return tuple(dict.fromkeys(chosen))


def _edited(
    pairs: tuple[tuple[str, str], ...], known: tuple[tuple[str, str], ...], rng: np.random.Generator
) -> tuple[tuple[str, str], ...]:
    """Another pair at one place, one more at the end, or one fewer."""
    fresh = [pair for pair in known if pair not in pairs]
    place = int(rng.integers(len(pairs) + 1))
    if not fresh or (pairs and rng.random() < 0.25):
        return (*pairs[:place], *pairs[place + 1 :])
    changed = (*pairs[:place], _pick(fresh, rng), *pairs[place + 1 :])
    return changed[:MAX_PAIRS]


def _pick(options: Sequence[T], rng: np.random.Generator) -> T:
    return options[int(rng.integers(len(options)))]
