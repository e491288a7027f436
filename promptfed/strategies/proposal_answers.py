"""What prompts of a generation task are made of: public texts with the answers that the FM agrees with itself on.

Nobody has written answers to public texts, so the FM does: several prompts ask it, and texts on which their answers are
the same make exemplars, those whose answers stand in the text and are short first. Then the best of them are shown to
it, and it answers all the texts once more. Choosing exemplars by agreement is from Wan et al., "Universal Self-Adaptive
Prompting" (EMNLP 2023, arXiv 2305.14926); they draw several answers with one prompt, where here several prompts give
one each, greedily, and whether an answer stands in its text counts because answers are to be extracted. What the
exemplars are worth is seen on the clients' texts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from promptfed.prompts.answers import first_line, normalised, vote
from promptfed.prompts.grammar import MAX_PAIRS, Draft, Materials, usable_exemplar
from promptfed.prompts.template import SLOT
from promptfed.strategies.base import Steps
from promptfed.strategies.session import Session

# Share of the calls up to the first milestone that go into answering public texts.
ANSWER_SHARE = 0.08
# Exemplars at most, the words that a text of one may have, and the words of its answer.
N_PAIRS, TEXT_WORDS, ANSWER_WORDS = 12, 60, 8
FIELDS: tuple[tuple[str, str], ...] = (
    ("Text", "Answer"),
    ("Text", "Short answer"),
    ("Note", "Answer"),
    ("Input", "Output"),
    ("Context and question", "Answer"),
)
# What may stand behind the person's instruction.
HINTS = ("Copy the answer from the text.", "Answer in a few words.", "Give the answer alone, without a sentence.")
# What a short answer is, shown by texts about nothing in particular: a small FM asked without any writes whole
# sentences, or nothing. They may stand in prompts too, beside what comes of public texts.
SHOWN: tuple[tuple[str, str], ...] = (
    ("The train to Paris leaves from platform 4 at noon. Where does the train go?", "Paris"),
    ("Tom sold his old boat to Ms Hill for 300 dollars. Who bought the boat?", "Ms Hill"),
    ("The library is closed today; it opens again on Tuesday at nine. When does it open?", "Tuesday at nine"),
    ("Order 77 is for two red chairs, and Lee paid 45 pounds. What was ordered?", "two red chairs"),
)
# With how many prompts the FM is first asked, and with how many once more, with exemplars from public texts.
N_FIRST, N_AGAIN = 3, 2


def gather_pairs(session: Session, rng: np.random.Generator) -> Steps[Materials]:
    """Let the FM answer public texts, and keep what it agrees with itself on as exemplars."""
    federation = session.federation
    instructions = tuple(f"{federation.instruction} {hint}".strip() for hint in HINTS)
    usable = [text for text in dict.fromkeys(federation.public) if usable_exemplar(text, max_words=TEXT_WORDS)]
    n_texts = min(int(session.milestone * ANSWER_SHARE) // (N_FIRST + N_AGAIN), len(usable))
    texts = [usable[i] for i in rng.permutation(len(usable))[:n_texts]]

    forms = [
        Draft(
            instruction=instructions[i % len(HINTS)],
            fields=FIELDS[i],
            exemplars=(),
            words=(),
            pairs=(*SHOWN[i:], *SHOWN[:i]),
        )
        for i in range(N_FIRST)
    ]
    answers = yield from _answered(session, forms, texts)
    pairs = agreed(texts, answers)
    if pairs:
        shown = [pairs[i::N_AGAIN][:MAX_PAIRS] for i in range(N_AGAIN)]
        again = [
            Draft(instruction=federation.instruction, fields=FIELDS[0], exemplars=(), words=(), pairs=tuple(some))
            for some in shown
            if some
        ]
        answers += yield from _answered(session, again, texts)
        # A prompt that shows a text repeats the answer that it shows: that is no second opinion.
        own = [{text for text, _ in some} for some in shown if some]
        for said, known in zip(answers[N_FIRST:], own, strict=True):
            said[:] = ["" if text in known else answer for text, answer in zip(texts, said, strict=True)]
        pairs = agreed(texts, answers)
    federation.log("materials", {"n_written": len(texts) * len(answers), "pairs": [list(pair) for pair in pairs]})
    return Materials(
        instructions=(federation.instruction, *instructions),
        fields=FIELDS,
        exemplars=(),
        words=(),
        other_words=(),
        pairs=(*pairs, *SHOWN),
    )


def _answered(session: Session, drafts: Sequence[Draft], texts: Sequence[str]) -> Steps[list[list[str]]]:
    """What the FM answers to each text with each draft, (n_drafts, n_texts); empty where it did not."""
    prompts = [draft.template() for draft in drafts]
    written = yield from session.write([request for p in prompts for request in p.text_requests(texts)])
    lines = [first_line(text) for text in written]
    return [lines[i * len(texts) : (i + 1) * len(texts)] for i in range(len(drafts))]


def agreed(texts: Sequence[str], answers: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    """Up to `N_PAIRS` of (text, answer), best first, from ``answers`` (n_prompts, n_texts).

    An answer stands in its text, or at least two prompts gave it. Most agreement comes first, to which standing in the
    text counts as one prompt more; then shortness.
    """
    ranked = []
    for i, text in enumerate(texts):
        said = [answer for answer in (each[i] for each in answers) if usable_answer(answer)]
        answer = vote(said, [1.0] * len(said))
        if answer is None:
            continue
        n_same = sum(normalised(other) == normalised(answer) for other in said)
        stands = f" {normalised(answer)} " in f" {normalised(text)} "
        if stands or n_same > 1:
            ranked.append(((-n_same - stands, len(answer.split())), i, (text, answer)))
    return [pair for *_, pair in sorted(ranked)[:N_PAIRS]]


def usable_answer(answer: str) -> bool:
    """Short, with something in it: it can stand in a prompt."""
    return normalised(answer) != "" and len(answer.split()) <= ANSWER_WORDS and SLOT not in answer
