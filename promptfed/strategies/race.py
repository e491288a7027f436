"""``race``: propose many prompts, score them everywhere under calibration, halve, recombine, keep a diverse few.

promptfed's own method. Elimination on paired scores is successive halving (Jamieson & Talwalkar, AISTATS 2016, arXiv
1502.07943) with bounded sums from every client in place of one loss; sets are chosen by forward selection over
combined scores (Caruana et al., ICML 2004), which costs no FM call since clients keep the label scores that they paid
for. In order:

1. *Write*: the FM writes short texts of each label, in the style of the public pool where there is one.
2. *Vote*: the clients' domain models say which words and texts stand for which label; the FM says which are natural.
3. *Race*: drafts are scored on the clients' first few texts, the better part goes on to more texts, and survivors are
   recombined and edited between the heats.
4. *Choose*: the best set of at most ``max_prompts``; its calls go to more texts, then it is weighed and calibrated.

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
    random_draft,
    usable_exemplar,
)
from promptfed.prompts.template import PromptTemplate
from promptfed.strategies.base import Federation, Session, Standing, Steps, singles
from promptfed.types import Capability, FloatArray, TextRequest

# Shares of max_fm_calls. What a stage leaves over goes to the last one, which scores the chosen set on more texts.
WRITE_SHARE, FIRST_SHARE, VARY_SHARE, SECOND_SHARE, THIRD_SHARE = 0.05, 0.34, 0.12, 0.18, 0.13
# Texts, over all clients, that decide the first heat: about 25 tell a hopeless prompt from a fair one.
FIRST_TEXTS = 25
N_SECOND, N_THIRD = 10, 5
# How many of the best-voted texts of a label may become exemplars, and how long they may be.
N_EXEMPLARS, EXEMPLAR_WORDS = 16, 6
# Words of the vocabulary that the domain models vote on, and how many a label keeps.
MAX_VOCABULARY, N_WORDS = 600, 8
# Public texts shown to the FM as examples of form (not of label) when it writes.
N_STYLE = 4


class Race:
    """The flagship method."""

    name = "race"
    needs = frozenset({Capability.LABEL_LOGPROBS, Capability.TEXT})

    def run(self, federation: Federation) -> Steps[PromptSet]:
        session = Session(federation)
        rng = federation.rng(1)
        budget, n_clients = federation.max_fm_calls, len(federation.clients)
        first_stop = max(1, round(FIRST_TEXTS / n_clients))
        n_first = int(budget * FIRST_SHARE) // (n_clients * first_stop)
        if n_first < 3:
            needed = int(np.ceil(3 * n_clients * first_stop / FIRST_SHARE))
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

        stop = first_stop
        for n_keep, share in ((N_SECOND, SECOND_SHARE), (N_THIRD, THIRD_SHARE)):
            survivors = pool.best(n_keep)
            stop += max(1, int(budget * share) // (len(survivors) * n_clients))
            pool = _Pool()
            yield from self._heat(session, pool, survivors, stop)

        finalists = [draft.template() for draft in pool.best(N_THIRD)]
        chosen = yield from choose_set(session, finalists, stop)
        more = session.left // (len(chosen) * n_clients)
        if more:
            yield from session.score(chosen, singles(chosen), stop + more)
        tuned = yield from session.calibrate(chosen)
        return tuned

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

    def leader(self) -> tuple[Draft, Standing]:
        draft = self.best(1)[0]
        return draft, self._entries[draft]


# ------------------------------------------------------------------------------------------------ proposing


def gather(session: Session, rng: np.random.Generator, max_calls: int) -> Steps[Materials]:
    """Let the FM write and the domain models vote, and sort what came out into `Materials`."""
    federation = session.federation
    public = [t for t in federation.public if usable_exemplar(t, max_words=EXEMPLAR_WORDS)]
    written = yield from session.write(writing_requests(federation, public, rng, max_calls - len(FRAMES)))

    # Words of public and written text that the domain models take for a label, and that the FM finds natural.
    vocabulary = frequent_words([*federation.public, *written], MAX_VOCABULARY)
    by_label: Sequence[Sequence[int]] = [[] for _ in federation.labels]
    if vocabulary:
        votes = yield from session.vote(vocabulary)
        by_label = top_by_label(votes, np.zeros(len(vocabulary)), N_WORDS * 3)
    shortlist = [i for mine in by_label for i in mine]
    fluency = np.zeros((len(FRAMES), len(vocabulary)))
    if shortlist:
        fluency[:, shortlist] = yield from session.weigh(FRAMES, [vocabulary[i] for i in shortlist])
    taken = {word.lower() for word in federation.words}
    other_words = []
    framed = []
    for label, mine in enumerate(by_label):
        worth = {i: _logit(votes[i, label]) + fluency[:, i].max() for i in mine if vocabulary[i] not in taken}
        best = sorted(worth, key=lambda i: -worth[i])[:N_WORDS]
        other_words.append(tuple(vocabulary[i] for i in best))
        framed += [f"{frame} {vocabulary[i]}." for i in best for frame in FRAMES]

    # Short texts, from all three sources; the shorter of two that are voted alike goes first.
    texts = list(dict.fromkeys([*framed, *clean_texts([*written, *public], federation.words)]))
    exemplars: tuple[tuple[str, ...], ...] = tuple(() for _ in federation.labels)
    if texts:
        votes = yield from session.vote(texts)
        handicap = -0.5 * np.array([len(text.split()) for text in texts])
        exemplars = tuple(tuple(texts[i] for i in mine) for mine in top_by_label(votes, handicap, N_EXEMPLARS))
    federation.log(
        "materials",
        {
            "n_written": len(written),
            "exemplars": dict(zip(federation.labels, map(list, exemplars), strict=True)),
            "words": dict(zip(federation.labels, map(list, other_words), strict=True)),
        },
    )
    return Materials(
        # A person's instruction is drawn twice as often as none.
        instructions=(federation.instruction, federation.instruction, "") if federation.instruction else ("",),
        fields=FIELDS,
        exemplars=exemplars,
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


def frequent_words(texts: Sequence[str], n: int) -> list[str]:
    """The ``n`` lower-case words of three letters or more that stand in most texts."""
    counts = Counter(word for text in texts for word in set(re.findall(r"[a-z]{3,}", text.lower())))
    return sorted(counts, key=lambda word: (-counts[word], word))[:n]


def top_by_label(votes: FloatArray, handicap: FloatArray, n: int) -> list[list[int]]:
    """For each label the ``n`` rows voted for it that have the largest log-odds plus ``handicap``, best first."""
    out = []
    for label in range(votes.shape[1]):
        worth = _logit(votes[:, label]) + handicap
        order = np.argsort(-worth, kind="stable")
        out.append([int(i) for i in order if votes[i].argmax() == label][:n])
    return out


def _logit(p: FloatArray) -> FloatArray:
    q = np.clip(p, 0.005, 0.995)
    return np.asarray(np.log(q / (1 - q)))


def draft_like(i: int, materials: Materials, rng: np.random.Generator) -> Draft:
    """Seed draft number i: the first is the person's instruction alone, then one or two exemplars a label."""
    if i == 0:
        return Draft(
            instruction=materials.instructions[0], fields=materials.fields[0], exemplars=(), words=materials.words
        )
    return random_draft(materials, rng, per_label=2 if i % 3 == 0 and len(materials.exemplars) <= 3 else 1)


def vary(
    parents: Sequence[Draft], materials: Materials, rng: np.random.Generator, n: int, known: _Pool
) -> list[Draft]:
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


def choose_set(session: Session, finalists: Sequence[PromptTemplate], stop: int) -> Steps[list[PromptTemplate]]:
    """The set of at most ``max_prompts`` finalists with the best combined score; its best single prompt comes first.

    All sets are scored, from label scores that the clients have: no FM call is made.
    """
    most = min(session.federation.max_prompts, len(finalists))
    sets = [s for size in range(1, most + 1) for s in combinations(range(len(finalists)), size)]
    standings = yield from session.score(finalists, sets, stop)
    score = {s: standing.score for s, standing in zip(sets, standings, strict=True)}
    best = max(sets, key=lambda s: score[s])
    session.federation.log("set", {"n_sets": len(sets), "score": score[best], "best_single": max(score[(i,)] for i in best)})
    return [finalists[i] for i in sorted(best, key=lambda i: -score[(i,)])]
