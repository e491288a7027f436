"""What prompts are made of: the FM writes, the clients' domain models vote, and what comes out is sorted by label.

Every method that builds prompts from exemplars draws from these `Materials`, so that none is ahead for its exemplars.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from promptfed.prompts.grammar import FRAMES, Materials, likely_fields, usable_exemplar
from promptfed.strategies.base import Federation, Steps
from promptfed.strategies.proposal_answers import ANSWER_SHARE, gather_pairs
from promptfed.strategies.session import Session
from promptfed.types import FloatArray, TextRequest

# Share of the calls up to the first milestone that go into writing.
WRITE_SHARE = 0.03
# What the domain models vote on at most, how many words a label keeps to be framed, and how many as label words.
MAX_CORPUS, MAX_VOCABULARY, N_SHORTLIST, N_WORDS = 600, 1200, 40, 3
# Label words of all labels together: their weights are learned from a Hessian that a client sends in under 1 KB.
MOST_WORDS = 18
# Exemplars a label, framed words first, whole texts (public or written, of a few words) only where those are too few.
# Not many: heats on 25 texts tell good drafts from fair ones badly, so what may be drawn has to be good on the whole.
N_EXEMPLARS, EXEMPLAR_WORDS = 6, 6
# Pairs of labels that the domain models confuse most, which get contrastive exemplars.
N_CONFUSED = 3
# Share of a label's clearest vote that a text needs: without it, common words ("This is what.") win by fluency alone.
CLEAR = 0.5
# Log-odds of a vote that one nat of the FM's log-probability, or one word less, makes up for.
FLUENCY, SHORTNESS = 0.5, -0.5
# Public texts shown to the FM as examples of form (not of label) when it writes.
N_STYLE = 4


def gather(session: Session, rng: np.random.Generator, *, contrasts: bool = False) -> Steps[Materials]:
    """Let the FM write and the domain models vote, and sort what came out into `Materials`; in a generation task, let
    the FM answer public texts (`gather_pairs`). With ``contrasts``, the labels that domain models confuse get
    exemplars that tell them apart (`contrasting`)."""
    federation = session.federation
    if not federation.labels:
        return (yield from gather_pairs(session, rng))
    max_calls = int(session.milestone * WRITE_SHARE)
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
    clear: list[list[int]] = []
    exemplars: list[tuple[str, ...]] = []
    other_words: list[tuple[str, ...]] = []
    whole: list[tuple[str, ...]] = []
    taken = set(federation.words)
    n_words = words_a_label(len(federation.labels))
    for label in range(len(federation.labels)):
        mine = evidence[:, label]
        worth = np.where((mine > 0) & (mine >= CLEAR * mine.max(initial=0.0)), mine + natural, -np.inf)
        best = [int(i) for i in np.argsort(-worth, kind="stable") if np.isfinite(worth[i])]
        clear.append(best)
        best_framed, best_loose = [i for i in best if i < n_framed], [i for i in best if i >= n_framed]
        exemplars.append(tuple(texts[i] for i in [*best_framed, *best_loose][:N_EXEMPLARS]))
        whole.append(tuple(texts[i] for i in best_loose[:N_EXEMPLARS]))
        words = dict.fromkeys(shortlist[i // len(FRAMES)] for i in best_framed)
        other_words.append(tuple(w for w in words if w in short and w not in taken)[:n_words])
        taken.update(other_words[-1])
    federation.log(
        "materials",
        {
            "n_written": len(written),
            "exemplars": dict(zip(federation.labels, map(list, exemplars), strict=True)),
            "words": dict(zip(federation.labels, map(list, other_words), strict=True)),
        },
    )
    apart = contrasting(votes, clear) if contrasts else []
    if contrasts:
        told = [[(texts[i], federation.labels[label]) for i, label in pair] for pair in apart]
        federation.log("contrasts", {"pairs": told})
    return Materials(
        instructions=(federation.instruction,),
        fields=likely_fields(federation.instruction),
        exemplars=tuple(exemplars),
        words=federation.words,
        other_words=tuple(other_words),
        loose=tuple(whole),
        contrasts=tuple(((texts[i], a), (texts[j], b)) for (i, a), (j, b) in apart),
    )


def words_a_label(n_labels: int) -> int:
    """How many label words each label gets beside the given one."""
    return max(0, min(N_WORDS, MOST_WORDS // n_labels - 1))


def contrasting(votes: FloatArray, clear: Sequence[Sequence[int]]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """For each of the `N_CONFUSED` pairs of labels that are confused most, a text of either, as (number, label).

    How much two labels are confused is the mean product of their votes (n, K), over what it would be if they had
    nothing to do with each other: it is large where domain models, of one client or of several, can't decide between
    them. ``clear[k]`` are the texts that clearly are of label k; of these, the one that has most votes for the other
    label is shown: it tells where the border is.
    """
    n_labels = len(clear)
    usual = votes.mean(axis=0) if len(votes) else np.ones(n_labels)
    confused = votes.T @ votes / max(len(votes), 1) / np.maximum(np.outer(usual, usual), 1e-9)
    pairs = sorted(
        ((a, b) for a in range(n_labels) for b in range(a + 1, n_labels) if clear[a] and clear[b]),
        key=lambda pair: -confused[pair],
    )
    odds = odds_of(votes)
    return [
        ((clear[a][int(odds[clear[a], b].argmax())], a), (clear[b][int(odds[clear[b], a].argmax())], b))
        for a, b in pairs[:N_CONFUSED]
    ]


def gathering_needs(federation: Federation) -> tuple[float, int]:
    """The share of the calls up to the first milestone that `gather` may make (twice that for labels without public
    texts), and the calls that it makes at least: the FM writes a text a label, or answers public texts."""
    if not federation.labels:
        return (ANSWER_SHARE if federation.public else 0.0), 0
    return WRITE_SHARE, len(federation.labels) + len(FRAMES)


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
    odds = odds_of(votes)
    top = np.sort(odds, axis=1)
    best_other = np.where(odds == top[:, -1:], top[:, -2:-1], top[:, -1:])
    return np.asarray(odds - best_other)


def odds_of(votes: FloatArray) -> FloatArray:
    """Log-odds of votes (n, K) over what is usual for the label."""
    odds = _logit(votes)
    return np.asarray(odds - odds.mean(axis=0)) if len(votes) else odds


def _logit(p: FloatArray) -> FloatArray:
    q = np.clip(p, 0.005, 0.995)
    return np.asarray(np.log(q / (1 - q)))
