"""Where methods with private votes begin, and how what they found is offered.

`proposal.gather` has the clients' domain models vote for words and texts, and those models are fitted on private texts.
A method whose votes are private must not begin there: here the FM alone says which words and texts stand for which
label (`gather_openly`). Prompts of what was found are then tried out as in successive halving (`campaign`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, islice

import numpy as np

from promptfed.errors import ConfigError, WireError
from promptfed.messages.methods import NoisyVotes, unpacked
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.grammar import FRAMES, Draft, Materials, draft_like, likely_fields, usable_exemplar
from promptfed.strategies import proposal
from promptfed.strategies.base import Federation, Replies, Steps
from promptfed.strategies.exchanges import picked
from promptfed.strategies.pool import Pool, by_sets, concluded, distinct
from promptfed.strategies.proposal import EXEMPLAR_WORDS, FLUENCY, clean_texts, writing_requests
from promptfed.strategies.session import N_FINALISTS, Session
from promptfed.types import FloatArray

# Words of public and written text that the FM is asked about, and how many of them a label keeps. Those in more than a
# twentieth of the texts (and more than a few texts) hold sentences together and tell no label.
MAX_VOCABULARY, N_WORDS = 240, 16
TOO_COMMON, A_FEW = 0.05, 5
# Share of the search that goes into first heats, their texts over all clients, and drafts that go on to more texts.
FIRST_SHARE, FIRST_TEXTS, N_SECOND = 0.6, 25, 8
# What no release of these methods speaks for.
NOT_COVERED = "scores and calibration (ask, score, newton, stack), which are exact sums; usage counts; the FM provider"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """For each label, best first: ``framed`` words that the FM expects with it ("It was awful."), and texts that it
    wrote for it; and ``public`` texts, which nobody has labelled."""

    framed: tuple[tuple[str, ...], ...]
    written: tuple[tuple[str, ...], ...]
    public: tuple[str, ...]


def gather_openly(session: Session, rng: np.random.Generator, max_calls: int) -> Steps[Candidates]:
    """Let the FM write short texts of each label, and say which words of them and of the public texts it expects with
    which label: by how much more likely the label makes a word, and how likely it is (`proposal.FLUENCY`)."""
    federation = session.federation
    n_labels = len(federation.words)
    public = [t for t in federation.public if usable_exemplar(t, max_words=EXEMPLAR_WORDS)]
    openings = [
        f"Very short texts, all of them clearly {word}:\n- {frame}" for word in federation.words for frame in FRAMES
    ]
    requests = writing_requests(federation, public, rng, max_calls - len(openings))
    per_label = len(requests) // n_labels
    answers = yield from session.write(requests)
    written = [answers[k * per_label : (k + 1) * per_label] for k in range(n_labels)]

    corpus = [*federation.public, *answers]
    counts = Counter(word for text in corpus for word in set(re.findall(r"[a-z]{3,}", text.lower())))
    telling = [word for word, n in counts.items() if n <= max(A_FEW, TOO_COMMON * len(corpus))]
    common = sorted(telling, key=lambda word: (-counts[word], word))[:MAX_VOCABULARY]
    vocabulary = list(dict.fromkeys([*federation.words, *common]))
    logp, n_tokens = yield from session.weigh(openings, [f"{word}." for word in vocabulary])
    by_frame = logp.reshape(n_labels, len(FRAMES), len(vocabulary))
    by_label = by_frame.mean(axis=1)
    usual = by_label.mean(axis=0)
    worth = by_label - usual + FLUENCY * usual
    # Labels are read off one place: a word of several tokens (and a full stop is one) would cost as many passes.
    short = {word for word, n in zip(vocabulary, n_tokens, strict=True) if n <= 2 or word in federation.words}
    return Candidates(
        framed=tuple(
            tuple(
                f"{FRAMES[int(by_frame[k, :, i].argmax())]} {vocabulary[i]}."
                for i in np.argsort(-worth[k], kind="stable")
                if by_label[:, i].argmax() == k and vocabulary[i] in short
            )[:N_WORDS]
            for k in range(n_labels)
        ),
        written=tuple(tuple(clean_texts(mine, federation.words)) for mine in written),
        public=tuple(public),
    )


def cost_of_gathering(federation: Federation, max_calls: int) -> int:
    """FM calls of `gather_openly`."""
    n_labels = len(federation.words)
    n_weigh = n_labels * len(FRAMES)
    return n_weigh + n_labels * max(1, (max_calls - n_weigh) // n_labels)


def framed_word(text: str) -> str:
    """The word of a framed text."""
    return text.split()[-1].rstrip(".")


def materials_of(
    federation: Federation,
    exemplars: Sequence[Sequence[str]],
    other_words: Sequence[Sequence[str]] = (),
    instructions: Sequence[str] = (),
) -> Materials:
    """Materials with the person's instruction, and the field names that it asks for more often than others."""
    return Materials(
        instructions=(federation.instruction, *instructions),
        fields=likely_fields(federation.instruction),
        exemplars=tuple(map(tuple, exemplars)),
        words=federation.words,
        other_words=tuple(map(tuple, other_words)) or ((),) * len(federation.labels),
    )


def gather_alone(session: Session, rng: np.random.Generator) -> Steps[Materials]:
    """`gather` without the domain models: what the FM alone takes for exemplars and words of each label."""
    federation = session.federation
    n_write = int(session.milestone * proposal.WRITE_SHARE) * (1 if federation.public else 2)
    found = yield from gather_openly(session, rng, n_write)
    n_words = proposal.words_a_label(len(federation.labels))
    exemplars = [
        [*framed, *written][: proposal.N_EXEMPLARS] for framed, written in zip(found.framed, found.written, strict=True)
    ]
    words = [
        [word for text in framed if (word := framed_word(text)) not in federation.words][:n_words]
        for framed in found.framed
    ]
    return materials_of(federation, exemplars, words)


def drafts_of(materials: Materials, rng: np.random.Generator) -> Iterator[Draft]:
    """The person's instruction alone, then random drafts without end."""
    return (draft_like(i, materials, rng) for i in count())


def campaign(
    session: Session, pool: Pool, known: Sequence[Draft], drafts: Iterator[Draft]
) -> Steps[tuple[list[Draft], PromptSet]]:
    """Spend what the search has left up to the next milestone: new ``drafts`` on few texts, then the good ones of the
    pool with those that are ``known`` on more; and read the run. The finalists, best first, and the prompt."""
    per_draft = sum(min(pool.stop, n) for n in session.federation.clients.values())
    n_new = max(1, int(FIRST_SHARE * session.search_left) // per_draft)
    drawn = [draft for draft in distinct(list(islice(drafts, 4 * n_new))) if draft not in pool]
    yield from pool.heat(drawn[:n_new])
    survivors = distinct([*known, *pool.diverse(N_SECOND)])[:N_SECOND]
    templates = [draft.template() for draft in survivors]
    if (stop := session.reach(templates, session.search_left)) > pool.stop:
        survivors = yield from by_sets(session, survivors, stop)
    finalists = survivors[: max(N_FINALISTS, session.federation.max_prompts)]
    return finalists, (yield from concluded(session, finalists))


def texts_of_a_heat(session: Session, method: str, spent: int) -> int:
    """Texts a client of a first heat: fewer with a small budget, so that there is a choice at all. ``spent``: calls of
    the first search that go into writing and voting. Raises `ConfigError` where not even two drafts could be tried."""
    n_clients = len(session.federation.clients)
    left = int(FIRST_SHARE * (session.search_left - spent))
    if left < 2 * n_clients:
        key = "budget.max_fm_calls" if session.milestone == session.federation.max_fm_calls else "budget.milestones"
        raise ConfigError(
            f"{key} = {session.milestone} is too small for {method}: {spent} calls go into writing and voting, and of "
            f"the rest of the search not two prompts could be tried on a text of each of {n_clients} clients"
        )
    stop = max(1, round(FIRST_TEXTS / n_clients))
    while stop > 1 and left // (n_clients * stop) < N_SECOND:
        stop -= 1
    return stop


def sum_votes(replies: Replies, n: int) -> FloatArray:
    """Noised votes on ``n`` candidates, summed over those that sent as many."""
    sized = picked(replies, NoisyVotes, lambda b: len(b.votes) == 4 * n)
    total = np.zeros(n)
    for body in sized.values():
        with suppress(WireError):  # a number that is not finite: a broken client costs only its part
            total += unpacked(body.votes, n)
    return total
