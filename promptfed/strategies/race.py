"""``race``: propose many prompts, score them everywhere under calibration, halve, recombine, keep a diverse few.

promptfed's own method. Elimination on paired scores is successive halving (Jamieson & Talwalkar, AISTATS 2016, arXiv
1502.07943) with bounded sums from every client in place of one loss; the set is chosen by the score of the combined
answers (ensemble selection, Caruana et al., ICML 2004), which costs no FM call since clients keep the label scores that
they paid for. In order:

1. *Write*: the FM writes short texts of each label, in the style of the public pool where there is one.
2. *Vote*: the clients' domain models say which words and texts stand for which label; the FM says which are natural.
3. *Race*: drafts are scored on the clients' first few texts, the better part goes on to more texts, and survivors are
   recombined and edited between the heats.
4. *Choose*: finalists are scored on all the texts that the budget still pays for; the label words of the best set of
   ``max_prompts`` are weighed over all clients, and so are its prompts.

A candidate's score is 1 - Brier/2 under a calibration that was cross-fitted at the client, because that, and not raw
accuracy, is what the tuned prompt is worth after each client has calibrated it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from promptfed.errors import ConfigError
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.grammar import (
    FIELDS,
    FRAMES,
    Draft,
    Materials,
    crossover,
    edit,
    named_fields,
    random_draft,
    similarity,
    usable_exemplar,
)
from promptfed.strategies.base import Federation, Session, Standing, Steps, singles
from promptfed.types import Capability, FloatArray, TextRequest

# Shares of max_fm_calls. The last heat gets what is left, two fifths: the texts that choose the set calibrate it too.
WRITE_SHARE, FIRST_SHARE, VARY_SHARE, SECOND_SHARE = 0.03, 0.26, 0.10, 0.22
# Texts, over all clients, that decide the first heat: about 25 tell a hopeless prompt from a fair one.
# With a small budget fewer texts, so that there is a choice at all.
FIRST_TEXTS, LEAST_TEXTS = 25, 8
N_SECOND, N_THIRD = 10, 4
# What the domain models vote on at most, how many words a label keeps to be framed, and how many as label words.
MAX_CORPUS, MAX_VOCABULARY, N_SHORTLIST, N_WORDS = 600, 1200, 40, 3
# Exemplars a label, framed words first, whole texts (public or written, of a few words) only where those are too few.
# Not many: heats on 25 texts tell good drafts from fair ones badly, so what may be drawn has to be good on the whole.
N_EXEMPLARS, EXEMPLAR_WORDS = 6, 6
# Share of a label's clearest vote that a text needs: without it, common words ("This is what.") win by fluency alone.
CLEAR = 0.5
# Log-odds of a vote that one nat of the FM's log-probability, or one word less, makes up for.
FLUENCY, SHORTNESS = 0.5, -0.5
# Score that a draft gives up for being like one that is kept already: about two standard deviations between drafts.
DIVERSITY = 0.04
# Score that a set gives up for being of drafts that are all alike: they make the same mistakes, which a choice by score
# on the few texts at hand sees too late.
LIKENESS = 0.04
# Public texts shown to the FM as examples of form (not of label) when it writes.
N_STYLE = 4


class Race:
    """The flagship method."""

    name = "race"
    needs = frozenset({Capability.LABEL_CHOICE, Capability.TEXT})

    def run(self, federation: Federation) -> Steps[PromptSet]:
        session = Session(federation)
        rng = federation.rng(1)
        budget, n_clients = federation.max_fm_calls, len(federation.clients)
        first_stop, least = (max(1, round(n / n_clients)) for n in (FIRST_TEXTS, LEAST_TEXTS))
        while first_stop > least and int(budget * FIRST_SHARE) // (n_clients * first_stop) < N_SECOND:
            first_stop -= 1
        n_first = int(budget * FIRST_SHARE) // (n_clients * first_stop)
        if n_first < 3:
            needed = int(np.ceil(3 * n_clients * least / FIRST_SHARE))
            raise ConfigError(
                f"budget.max_fm_calls = {budget} is too small for one round of race with {n_clients} clients; "
                f"give at least {needed}"
            )

        materials = yield from gather(session, rng, int(budget * WRITE_SHARE))
        drafts = distinct([draft_like(i, materials, rng) for i in range(n_first)])
        pool = _Pool()
        yield from self._heat(session, pool, drafts, first_stop)

        n_vary = int(budget * VARY_SHARE) // (n_clients * first_stop)
        for part in (n_vary - n_vary // 2, n_vary // 2):
            children = vary(pool.best(max(3, n_first // 4)), materials, rng, part, known=pool)
            yield from self._heat(session, pool, children, first_stop)

        survivors = pool.diverse(N_SECOND)
        stop = session.reach([d.template() for d in survivors], min(int(budget * SECOND_SHARE), session.left))
        pool = _Pool()  # standings on other numbers of texts don't compare
        yield from self._heat(session, pool, survivors, stop)
        finalists = members((yield from rank_sets(session, survivors, stop)), N_THIRD)

        stop = max(stop, session.reach([d.template() for d in finalists], session.left))
        best, *_ = yield from rank_sets(session, finalists, stop)
        prompts = yield from session.verbalize([draft.template() for draft in best])
        return (yield from session.calibrate(prompts))

    def _heat(self, session: Session, pool: _Pool, drafts: Sequence[Draft], stop: int) -> Steps[None]:
        """Score ``drafts`` on texts [0, stop) of every client and add them to the pool."""
        if not drafts:
            return
        prompts = [draft.template() for draft in drafts]
        standings = yield from session.score(prompts, singles(prompts), stop)
        for draft, standing in zip(drafts, standings, strict=True):
            pool.add(draft, standing)
        leader, best = pool.leader()
        federation = session.federation
        federation.log(
            "heat",
            {
                "fm_calls": federation.max_fm_calls - session.left,
                "n_candidates": len(drafts),
                "n_texts": best.n,
                "best_score": best.score,
                "best_prompt": leader.template().text,
                "best_words": list(leader.words),
            },
        )


class _Pool:
    """Candidates with their standings. Ties go to the one that came first."""

    def __init__(self) -> None:
        self._entries: dict[Draft, Standing] = {}

    def __contains__(self, draft: Draft) -> bool:
        return draft in self._entries

    def add(self, draft: Draft, standing: Standing) -> None:
        self._entries[draft] = standing

    def best(self, n: int) -> list[Draft]:
        return sorted(self._entries, key=lambda d: -self._entries[d].score)[:n]

    def diverse(self, n: int) -> list[Draft]:
        """``n`` good drafts that are not alike: each costs up to `DIVERSITY` for what it shares with one before it."""
        kept: list[Draft] = []
        left = self.best(len(self._entries))
        while left and len(kept) < n:
            best = max(
                left,
                key=lambda d: self._entries[d].score - DIVERSITY * max((similarity(d, k) for k in kept), default=0.0),
            )
            left.remove(best)
            kept.append(best)
        return kept

    def leader(self) -> tuple[Draft, Standing]:
        draft = self.best(1)[0]
        return draft, self._entries[draft]


# ------------------------------------------------------------------------------------------------ proposing


def gather(session: Session, rng: np.random.Generator, max_calls: int) -> Steps[Materials]:
    """Let the FM write and the domain models vote, and sort what came out into `Materials`."""
    federation = session.federation
    public = [t for t in federation.public if usable_exemplar(t, max_words=EXEMPLAR_WORDS)]
    if not federation.public:
        max_calls *= 2  # what the FM writes is then all there is to choose words from
    written = yield from session.write(writing_requests(federation, public, rng, max_calls - len(FRAMES)))

    by_label = yield from indicative_words(session, [*federation.public, *written])
    shortlist = list(dict.fromkeys([*federation.words, *(word for mine in by_label for word in mine)]))

    # "It was awful." for every frame and word: voted for by the domain models, and natural to the FM.
    framed = {word: [f"{frame} {word}." for frame in FRAMES] for word in shortlist}
    loose = clean_texts([*written, *public], federation.words)
    texts = [*(text for word in shortlist for text in framed[word]), *loose]
    fluency, n_tokens = np.zeros((len(FRAMES), 0)), np.zeros(0, dtype=np.int64)
    if shortlist:
        fluency, n_tokens = yield from session.weigh(FRAMES, [f"{word}." for word in shortlist])
    # Labels are read off one place: a word of several tokens (and a full stop is one) would cost as many passes.
    short = {word for word, n in zip(shortlist, n_tokens, strict=True) if n <= 2}
    votes = (yield from session.vote(texts)) if texts else np.zeros((0, len(federation.labels)))
    n_framed = fluency.size
    natural = np.concatenate([FLUENCY * fluency.T.ravel(), [SHORTNESS * len(text.split()) for text in loose]])
    evidence = _evidence(votes)
    exemplars: list[tuple[str, ...]] = []
    other_words: list[tuple[str, ...]] = []
    taken = set(federation.words)
    for label in range(len(federation.labels)):
        mine = evidence[:, label]
        worth = np.where((mine > 0) & (mine >= CLEAR * mine.max(initial=0.0)), mine + natural, -np.inf)
        best = [int(i) for i in np.argsort(-worth, kind="stable") if np.isfinite(worth[i])]
        best_framed, best_loose = [i for i in best if i < n_framed], [i for i in best if i >= n_framed]
        exemplars.append(tuple(texts[i] for i in [*best_framed, *best_loose][:N_EXEMPLARS]))
        words = dict.fromkeys(shortlist[i // len(FRAMES)] for i in best_framed)
        other_words.append(tuple(w for w in words if w in short and w not in taken)[:N_WORDS])
        taken.update(other_words[-1])
    federation.log(
        "materials",
        {
            "n_written": len(written),
            "exemplars": dict(zip(federation.labels, map(list, exemplars), strict=True)),
            "words": dict(zip(federation.labels, map(list, other_words), strict=True)),
        },
    )
    named = named_fields(federation.instruction)
    return Materials(
        instructions=(federation.instruction,),
        # What the person asks for, and more often than any other name: it is the best one can know without a call.
        fields=(*named * 3, *FIELDS),
        exemplars=tuple(exemplars),
        words=federation.words,
        other_words=tuple(other_words),
    )


def writing_requests(
    federation: Federation, public: Sequence[str], rng: np.random.Generator, max_calls: int
) -> list[TextRequest]:
    """Requests for short texts of each label: a few prompts, each with several seeds, so that prompts are shared."""
    per_label = max(1, max_calls // len(federation.words))
    requests = []
    for word in federation.words:
        for part in np.array_split(np.arange(per_label), max(1, per_label // 8)):
            style = [public[i] for i in rng.permutation(len(public))[:N_STYLE]]
            shown = "".join(f"- {text}\n" for text in style)
            opening = f"Very short texts:\n{shown}\n" if shown else ""
            requests += [
                TextRequest(
                    prompt=f"{opening}Very short texts, all of them clearly {word}:\n-",
                    max_tokens=10,
                    temperature=0.8,
                    top_p=0.95,
                    seed=int(rng.integers(2**31)),
                )
                for _ in part
            ]
    return requests


def clean_texts(written: Sequence[str], words: Sequence[str]) -> list[str]:
    """Whole short sentences without a label word in them (an exemplar must show a label, not name it)."""
    texts = dict.fromkeys(text.strip(" \"'*-") for text in written)
    taken = {word.lower() for word in words}
    return [
        text
        for text in texts
        if usable_exemplar(text, max_words=EXEMPLAR_WORDS)
        and re.search(r"[.!?]$", text)
        and taken.isdisjoint(re.findall(r"\w+", text.lower()))
    ]


def indicative_words(session: Session, corpus: Sequence[str]) -> Steps[list[list[str]]]:
    """For each label, up to `N_SHORTLIST` words of public or written text that stand for it.

    A word's worth is the evidence of the domain models' vote on the word itself plus twice the gain in log-odds of
    their votes on the texts that hold it: the first knows meaning, the second keeps function words out.
    """
    n_labels = len(session.federation.labels)
    corpus = list(dict.fromkeys(text for text in corpus if text.strip()))[:MAX_CORPUS]
    holds = [set(re.findall(r"[a-z]{3,}", text.lower())) for text in corpus]
    counts = Counter(word for words in holds for word in words)
    vocabulary = sorted(counts, key=lambda word: (-counts[word], word))[:MAX_VOCABULARY]
    if not vocabulary:
        return [[] for _ in range(n_labels)]
    votes = yield from session.vote([*vocabulary, *corpus])
    of_words, of_texts = votes[: len(vocabulary)], votes[len(vocabulary) :]
    base = of_texts.mean(axis=0)
    index = {word: i for i, word in enumerate(vocabulary)}
    # Mean vote of the texts that hold a word, with two more texts of the average kind.
    mean = np.tile(2.0 * base, (len(vocabulary), 1))
    for words, vote in zip(holds, of_texts, strict=True):
        mean[[index[word] for word in words if word in index]] += vote
    mean /= 2.0 + np.array([counts[word] for word in vocabulary])[:, None]
    worth = _evidence(of_words) + 2.0 * (_logit(mean) - _logit(base))
    order = np.argsort(-worth, axis=0, kind="stable")
    return [
        [vocabulary[i] for i in order[:, label] if worth[i].argmax() == label][:N_SHORTLIST]
        for label in range(n_labels)
    ]


def _evidence(votes: FloatArray) -> FloatArray:
    """How much votes (n, K) speak for each label and against the next best one, in log-odds; at most one is positive.

    Odds are over what is usual for the label: text about nothing is no evidence for the label that the domain models
    happen to give it.
    """
    if not len(votes):
        return votes
    odds = _logit(votes)
    odds = odds - odds.mean(axis=0)
    top = np.sort(odds, axis=1)
    best_other = np.where(odds == top[:, -1:], top[:, -2:-1], top[:, -1:])
    return np.asarray(odds - best_other)


def _logit(p: FloatArray) -> FloatArray:
    q = np.clip(p, 0.005, 0.995)
    return np.asarray(np.log(q / (1 - q)))


def draft_like(i: int, materials: Materials, rng: np.random.Generator) -> Draft:
    """Seed draft number i: the first is the person's instruction alone, the others have one exemplar a label."""
    if i == 0:
        return Draft(
            instruction=materials.instructions[0], fields=materials.fields[0], exemplars=(), words=materials.words
        )
    return random_draft(materials, rng)


def vary(parents: Sequence[Draft], materials: Materials, rng: np.random.Generator, n: int, known: _Pool) -> list[Draft]:
    """``n`` new drafts: half crossovers of two parents, half edits of one; better parents are drawn more often."""
    rank = 1.0 / np.arange(1, len(parents) + 1)
    children: list[Draft] = []
    for _ in range(20 * n):
        if len(children) == n:
            break
        a, b = rng.choice(len(parents), size=2, p=rank / rank.sum())
        child = crossover(parents[a], parents[b], rng) if a != b else edit(parents[a], materials, rng)
        if child not in known and child not in children:
            children.append(child)
    return children


def distinct(drafts: Sequence[Draft]) -> list[Draft]:
    """Without repetitions, in order."""
    return list(dict.fromkeys(drafts))


# ------------------------------------------------------------------------------------------------ choosing


def rank_sets(session: Session, drafts: Sequence[Draft], stop: int) -> Steps[list[list[Draft]]]:
    """All sets of ``max_prompts`` of ``drafts``, best first by combined score less `LIKENESS`; in a set, the best draft
    first.

    Sets are as large as the person allows: one more prompt lowers the variance of the answer, which is worth more than
    the noise by which a smaller set now and then scores higher. Prompts are scored on texts [0, stop) where they are
    not yet; a set costs no call beyond that, since the clients combine label scores that they have.
    """
    federation = session.federation
    prompts = [draft.template() for draft in drafts]
    full = list(combinations(range(len(prompts)), min(federation.max_prompts, len(prompts))))
    sets = list(dict.fromkeys([*singles(prompts), *full]))
    standings = yield from session.score(prompts, sets, stop)
    score = {s: standing.score for s, standing in zip(sets, standings, strict=True)}
    alike = {
        s: float(np.mean([similarity(drafts[i], drafts[j]) for i, j in combinations(s, 2)] or [0.0])) for s in full
    }
    ranked = sorted(full, key=lambda s: LIKENESS * alike[s] - score[s])
    best = ranked[0]
    federation.log(
        "sets",
        {
            "fm_calls": federation.max_fm_calls - session.left,
            "n_sets": len(sets),
            "n_texts": standings[0].n,
            "best_score": score[best],
            "best_single": max(score[(i,)] for i in range(len(prompts))),
            "prompts": [prompts[i].text for i in best],
        },
    )
    return [[drafts[i] for i in sorted(s, key=lambda i: -score[(i,)])] for s in ranked]


def members(ranked: Sequence[Sequence[Draft]], n: int) -> list[Draft]:
    """The first ``n`` different drafts that occur in sets, best set first."""
    return list(dict.fromkeys(draft for s in ranked for draft in s))[:n]
