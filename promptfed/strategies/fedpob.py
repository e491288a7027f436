"""``fedpob``: a linear bandit over the embeddings of prompts, whose statistics all clients share.

FedPOB (Lu, Hong, Shang, Wang, Ban, Yao, Min Zhang, Qiu & Dai, "FedPOB: Sample-Efficient Federated Prompt Optimization
via Bandits", preprint 2025, arXiv 2509.24701): federated LinUCB, arms are prompts, features their embeddings; and
FedPOB-Pref, its variant for comparisons in place of scores, a federated linear duelling bandit (arXiv 2502.01085): the
first arm is the best so far, the second the one with the greatest upper confidence bound against it.

What differs from the paper, and why:

- All statistics live at the server and are up to date in every round, so there is no threshold that starts a
  synchronisation; arms that were dealt in the same round count as pending (`promptfed.strategies.bandit`).
- A prompt has a feature of its own beside its embedding (a linear model with random effects): two prompts with almost
  the same embedding may do unlike well, and no pull could ever tell a purely linear model so.
- So has the batch of texts that it was scored on, with a variance like that of its mean: all arms meet the same first
  texts of a client, and how hard those are says nothing of the arm.
- A pull is a few texts at several clients: under a calibration from three texts of one client no prompt shows what it
  is worth.
- Where answers are written, arms differ in the pairs of text and answer that they show; a score is a token F1.
- The best arms at the end count, and not the reward on the way, so there is more exploration than regret would have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Protocol

import numpy as np
from pydantic import Field

from promptfed.errors import RunError, WireError
from promptfed.messages import Scored
from promptfed.messages.methods import Embed, Embedded, unpacked
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.grammar import Draft, Materials, draft_like, draw_exemplars
from promptfed.prompts.template import PromptTemplate
from promptfed.strategies.bandit import DuelBandit, LinearBandit
from promptfed.strategies.base import MAX_TRIES, Card, Federation, Steps
from promptfed.strategies.exchanges import picked
from promptfed.strategies.pool import concluded, diverse
from promptfed.strategies.proposal import gather, gathering_needs
from promptfed.strategies.session import N_FINALISTS, RESERVE, Session
from promptfed.types import Capability, FloatArray, IntArray

# Standard deviation of one text's score under good prompts: it scales the widths.
NOISE = 0.2
# Features are of about unit size; this one, of the level that all arms share, is as good as free of the ridge.
LEVEL = 25.0
# The least number of pulls for which a search is worth its name, and of rounds up to a milestone: a bandit learns from
# one to the next.
MIN_PULLS, MIN_ROUNDS = 3, 10
# Clients that are asked for the same vectors, of which the first answer is taken: one may fail.
N_EMBEDDERS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class FedPOB:
    """``kind``: scores or comparisons. ``n_arms`` prompts, embedded in ``dimension`` numbers; in a round each of
    ``clients_per_round`` clients (0: as many as leave calls for `MIN_ROUNDS` rounds) gets an arm, ``clients_per_arm``
    of them the same, and scores it on as many new texts as make ``texts_per_pull`` together. Arms show up to
    ``max_exemplars`` a label. ``ridge``: pulls that the prior belief counts; ``exploration``: widths in standard
    deviations of the posterior."""

    kind: Literal["linucb", "duelling"] = "linucb"
    n_arms: Annotated[int, Field(ge=2)] = 60
    max_exemplars: Annotated[int, Field(ge=1)] = 2
    dimension: Annotated[int, Field(ge=1)] = 32
    clients_per_round: Annotated[int, Field(ge=0)] = 0
    clients_per_arm: Annotated[int, Field(ge=1)] = 5
    texts_per_pull: Annotated[int, Field(ge=1)] = 20
    ridge: Annotated[float, Field(gt=0)] = 5.0
    exploration: Annotated[float, Field(ge=0)] = 6.0
    reserve: Annotated[float, Field(gt=0, lt=1)] = RESERVE

    name: ClassVar[str] = "fedpob"
    needs: ClassVar[frozenset[Capability]] = frozenset({Capability.LABEL_CHOICE, Capability.TEXT})
    card: ClassVar[Card] = Card(
        paper="Lu et al. 2025, arXiv 2509.24701; LinUCB: Li et al., WWW 2010; duelling: Saha, NeurIPS 2021",
        sends=frozenset({"write", "weigh", "vote", "embed", "ask", "score", "newton"}),
        crosses="Votes on public texts, vectors of candidate prompts, and sums of bounded scores.",
        kinds=frozenset({"classification", "generation"}),
    )

    def run(self, federation: Federation) -> Steps[PromptSet]:
        session, rng = Session(federation, reserve=self.reserve), federation.rng(1)
        self._check(session)
        materials = yield from gather(session, rng)
        arms = _unlike([self._arm(i, materials, rng) for i in range(self.n_arms)])
        prompts = [draft.template() for draft in arms]
        vectors = yield from embedded(session, prompts, self.dimension, seed=int(rng.integers(2**31)))
        book = _BOOKS[self.kind](features(vectors), self)
        best = arms[:1]
        missed = dict[str, int]()  # rounds in a row that a client did not answer
        stops = dict[str, IntArray]()  # texts of a client that each arm was scored on
        while True:
            for c in federation.clients:
                missed.setdefault(c, 0)
                stops.setdefault(c, np.zeros(len(arms), dtype=np.int64))
            if min(missed.values()) >= MAX_TRIES:
                raise RunError("no client scored any text; at least one text is needed")
            reached = [c for c in federation.clients if missed[c] < MAX_TRIES]
            dealt = self._deal(session, book, stops, reached, rng)
            hands = {c: ([prompts[a] for a in mine], stop) for c, (mine, stop) in dealt.items()}
            cost = sum(session.cost(mine, stop, [c]) for c, (mine, stop) in hands.items())
            if not hands or cost > session.search_left:
                prompt = yield from concluded(session, best)
                if session.is_over:
                    return prompt
                # They have been scored on more texts now, which costs nothing to hear of.
                templates = [draft.template() for draft in best]
                mine, stop = [arms.index(draft) for draft in best], session.reach(templates, 0)
                dealt = {c: (mine, min(stop, n)) for c, n in federation.clients.items() if stop > 0}
                hands = {c: (templates, stop) for c, (_, stop) in dealt.items()}
                if not hands:
                    continue
            scored = yield from session.score_each(hands)
            missed |= {c: 0 if c in scored else missed[c] + 1 for c in hands}
            for client, body in scored.items():
                mine, stop = dealt[client]
                book.enter(client, mine, stop, body)
                stops[client][mine] = np.maximum(stops[client][mine], stop)
            n_texts = np.sum(list(stops.values()), axis=0)
            worth = {arm: float(w) for arm, w, n in zip(arms, book.worth(), n_texts, strict=True) if n}
            best = diverse(worth, N_FINALISTS) or arms[:1]
            federation.log(
                "pull",
                {
                    "fm_calls": session.spent,
                    "n_arms_pulled": len(worth),
                    "n_texts": int(n_texts.sum()),
                    "best_worth": max(worth.values(), default=0.0),
                    "best_prompt": best[0].template().text,
                },
            )

    def _arm(self, i: int, materials: Materials, rng: np.random.Generator) -> Draft:
        """The first arm is the person's instruction alone, the others are few-shot prompts of the shared pool."""
        draft = draft_like(i, materials, rng)
        n = int(rng.integers(self.max_exemplars)) + 1
        return draft if i == 0 else replace(draft, exemplars=draw_exemplars(materials, n, rng))

    def _check(self, session: Session) -> None:
        """Raise `ConfigError` where the budget, up to the first milestone, is too small for `MIN_PULLS`."""
        share, least = gathering_needs(session.federation)
        # A first duel is scored twice, one against the best so far about once.
        n_calls = (MIN_PULLS + 1) * self.texts_per_pull + least
        needed = int(np.ceil(n_calls / (1 - self.reserve - share)))
        session.require(needed, f"{MIN_PULLS} pulls of fedpob with texts_per_pull = {self.texts_per_pull}")

    def _deal(
        self,
        session: Session,
        book: Book,
        stops: Mapping[str, IntArray],
        reached: Sequence[str],
        rng: np.random.Generator,
    ) -> dict[str, tuple[list[int], int]]:
        """For each client of the round, out of ``reached``: its arms, and up to which of its texts they are to be
        scored now."""
        sizes = session.federation.clients
        n_groups = max(1, int(session.budget * (1 - self.reserve)) // (MIN_ROUNDS * self.texts_per_pull))
        n_clients = self.clients_per_round or n_groups * self.clients_per_arm
        clients = [reached[i] for i in rng.permutation(len(reached))][:n_clients]
        dealt = dict[str, tuple[list[int], int]]()
        book.open()
        for group in np.array_split(clients, max(1, round(len(clients) / self.clients_per_arm))):
            step = max(1, round(self.texts_per_pull / len(group)))
            left = np.sum([stops[c] < sizes[c] for c in group], axis=0) > 0
            if not left.any():
                continue
            mine = book.choose(left)
            for c in group:
                at = int(min(stops[c][mine]))  # a duel is fought on texts that both are scored on
                if at < sizes[c]:
                    dealt[str(c)] = (mine, min(at + step, sizes[c]))
        return dealt


def _unlike(drafts: Sequence[Draft]) -> list[Draft]:
    """Without those that come out as the same prompt."""
    return list({draft.template().prompt_id: draft for draft in reversed(drafts)}.values())[::-1]


def embedded(session: Session, prompts: Sequence[PromptTemplate], dimension: int, seed: int) -> Steps[FloatArray]:
    """(n, dimension) vectors of ``prompts`` and the words they are read off, by the first client that gives them."""
    texts = tuple(f"{p.text} {' '.join(w for words in p.by_label for w in words)}" for p in prompts)
    clients = list(session.federation.clients)
    for start in range(0, len(clients), N_EMBEDDERS):
        task = Embed(texts=texts, dimension=dimension, seed=seed)
        replies = yield from session.exchange("embed", dict.fromkeys(clients[start : start + N_EMBEDDERS], task))
        for client, body in picked(replies, Embedded, lambda _: True).items():
            try:
                return unpacked(body.vectors, len(texts), dimension)
            except WireError as error:
                session.federation.log("refused", {"client": client, "reason": type(error).__name__})
    raise RunError("no client embedded the prompts; at least one is needed")


def features(vectors: FloatArray) -> FloatArray:
    """An arm's embedding, centred over the arms and of unit mean square, and an indicator of its own."""
    centred = vectors - vectors.mean(axis=0)
    size = np.sqrt((centred**2).sum(axis=1).mean())
    return np.hstack([centred / max(float(size), 1e-12), np.eye(len(vectors))])


class Book(Protocol):
    """What was seen of the arms, and a bandit on it."""

    def open(self) -> None:
        """Start a round: build the bandit from what was seen."""

    def choose(self, left: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> list[int]:
        """The arm or pair for the next group of clients, out of those that are ``left``."""

    def enter(self, client: str, arms: Sequence[int], stop: int, scored: Scored) -> None:
        """A client's sums of ``arms`` over its texts [0, stop)."""

    def worth(self) -> FloatArray:
        """Posterior mean of each arm, in units of score."""


class ScoreBook:
    """Mean scores of new texts: LinUCB."""

    def __init__(self, x: FloatArray, method: FedPOB) -> None:
        self._x, self._method = x, method
        self._sums: dict[tuple[str, int], tuple[int, float]] = {}  # (client, arm) -> texts and total so far
        self._seen: list[tuple[int, str, int, int, float]] = []  # arm, client, texts [start, stop), their mean score
        self.open()

    def open(self) -> None:
        method, d = self._method, self._x.shape[1]
        # Texts are cut where a pull of some arm ended; each cut-off piece has a level of its own.
        cuts = {c: sorted({0, *(s for _, k, _, s, _ in self._seen if k == c)}) for c in {s[1] for s in self._seen}}
        place = {(c, at): i for i, (c, at) in enumerate((c, at) for c in sorted(cuts) for at in cuts[c][:-1])}
        self._n_pieces = len(place)
        self._bandit = LinearBandit(d + self._n_pieces + 1, method.ridge)
        for arm, client, start, stop, mean in self._seen:
            x = np.concatenate([self._x[arm], np.zeros(self._n_pieces), [LEVEL]])
            for at, end in zip(cuts[client], cuts[client][1:], strict=False):
                if start <= at < stop:
                    # Prior variance of a piece's level: that of the mean of its texts' scores.
                    x[d + place[client, at]] = (end - at) / (stop - start) * self._scale(end - at)
            self._bandit.observe(x, mean, (stop - start) / method.texts_per_pull)

    def _scale(self, n_texts: int) -> float:
        return float(np.sqrt(self._method.ridge * self._method.texts_per_pull / n_texts))

    def choose(self, left: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> list[int]:
        x = self._typical
        unit = NOISE / np.sqrt(self._method.texts_per_pull)
        upper = x @ self._bandit.theta + self._method.exploration * unit * self._bandit.width(x)
        arm = int(np.where(left, upper, -np.inf).argmax())
        self._bandit.expect(x[arm])
        return [arm]

    @property
    def _typical(self) -> FloatArray:
        """Each arm on texts of usual difficulty."""
        n = len(self._x)
        return np.hstack([self._x, np.zeros((n, self._n_pieces)), np.full((n, 1), LEVEL)])

    def enter(self, client: str, arms: Sequence[int], stop: int, scored: Scored) -> None:
        for arm, total in zip(arms, scored.total, strict=True):
            start, before = self._sums.get((client, arm), (0, 0.0))
            if stop > start:
                self._sums[client, arm] = (stop, total)
                self._seen.append((arm, client, start, stop, (total - before) / (stop - start)))

    def worth(self) -> FloatArray:
        self.open()
        return np.asarray(self._typical @ self._bandit.theta)


class DuelBook:
    """Which of two did better at a client, and no more: FedPOB-Pref."""

    def __init__(self, x: FloatArray, method: FedPOB) -> None:
        self._x, self._method = x, method
        self._duels: dict[tuple[str, int, int], tuple[int, float]] = {}  # client, a, b -> texts, whether a won
        self.open()

    def open(self) -> None:
        self._bandit = DuelBandit(self._x.shape[1], self._method.ridge)
        for (_, a, b), (n, won) in self._duels.items():
            self._bandit.observe(self._x[a] - self._x[b], won, n / self._method.texts_per_pull)

    def choose(self, left: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> list[int]:
        value = self._x @ self._bandit.theta
        first = int(value.argmax())
        difference = self._x - self._x[first]
        # The standard deviation of log-odds is two widths (`DuelBandit`).
        upper = value + self._method.exploration * 2.0 * self._bandit.width(difference)
        others = left & (np.arange(len(value)) != first)
        second = int(np.where(others if others.any() else np.arange(len(value)) != first, upper, -np.inf).argmax())
        self._bandit.expect(difference[second])
        return [first, second]

    def enter(self, client: str, arms: Sequence[int], stop: int, scored: Scored) -> None:
        """``scored.diff`` are sums of differences to the first arm: above 0, it lost."""
        first = arms[0]
        for arm, diff in zip(arms[1:], scored.diff[1:], strict=True):
            won = 0.5 - 0.5 * float(np.sign(diff))
            a, b, won_a = (first, arm, won) if first < arm else (arm, first, 1.0 - won)
            self._duels[client, a, b] = (stop, won_a)

    def worth(self) -> FloatArray:
        """Log-odds scaled to scores: against an equal arm, a duel on a pull's texts has this slope."""
        self.open()
        slope = np.sqrt(8.0 / np.pi) * np.sqrt(self._method.texts_per_pull) / NOISE
        return np.asarray(self._x @ self._bandit.theta / slope)


_BOOKS: Mapping[str, type[ScoreBook] | type[DuelBook]] = {"linucb": ScoreBook, "duelling": DuelBook}
