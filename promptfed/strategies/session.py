"""The standard client tasks as steps: what every method is written from."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from promptfed.errors import ConfigError, RunError
from promptfed.messages import Ask, MomentSums, Newton, NewtonPart, Score, Scored
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.calibration import Calibration, NewtonSums, flattened, newton_step, prior
from promptfed.prompts.template import PromptTemplate
from promptfed.strategies.base import (
    MAX_TRIES,
    Federation,
    Reading,
    Replies,
    Standing,
    Steps,
    candidate_sets,
    singles,
)
from promptfed.strategies.exchanges import Exchanges, picked
from promptfed.types import FloatArray

# Share of the calls up to a milestone that `Session.conclude` gets, and of how many prompts it chooses a set: the texts
# that choose it calibrate it too.
RESERVE, N_FINALISTS = 0.4, 4


class Session(Exchanges):
    """The standard client tasks: scores of prompts on the clients' texts, and what is fitted on those."""

    def __init__(self, federation: Federation, *, reserve: float = RESERVE) -> None:
        """``reserve``: share of the calls up to a milestone that is held back for `conclude`. Raises `ConfigError`
        where no client has a text with a label, or an answer, to score prompts by."""
        if not federation.n_train:
            raise ConfigError(
                "no client has a labelled text, and prompts are scored by those: give some, or use method zero_shot or "
                "manual_few_shot, which need none"
            )
        super().__init__(federation, reserve=reserve)
        self._scored: dict[tuple[str, str], int] = {}  # (prompt_id, client) -> texts scored
        self._pooled: dict[str, Calibration] = {}  # prompt_id -> label-free calibration of the prompt alone
        self._moments: dict[str, dict[str, MomentSums]] = {}  # prompt_id -> client -> what `score_each` had of it

    def affords(self, cost: int, best: Sequence[PromptTemplate]) -> Steps[bool]:
        """Whether the search may spend ``cost`` more calls; milestones that they would pass are read first, with
        ``best``, best first. False at the last one: then comes `conclude`."""
        while cost > self.search_left:
            if len(self._milestones) == 1:
                return False
            yield from self.conclude(best)
        return True

    def conclude(
        self,
        best: Sequence[PromptTemplate],
        *,
        penalty: Callable[[tuple[int, ...]], float] = lambda _set: 0.0,
        strength: float = 4.0,
    ) -> Steps[PromptSet]:
        """Read the run at the next milestone: score the first `N_FINALISTS` of ``best`` on all the texts that it still
        pays for, choose the set, weigh its label words, and calibrate. ``penalty`` is taken off a set's score."""
        federation = self.federation
        finalists = list(dict.fromkeys(best))[: max(N_FINALISTS, federation.max_prompts)]
        stop = max(1, self.reach(finalists, max(min(self.milestone - self.spent, self.left), 0)))
        if self.cost(finalists, stop) > self.left:  # not even one text each
            finalists, stop = finalists[:1], 1
        ranked = yield from self.rank_sets(finalists, stop, penalty)
        chosen = yield from self.verbalize([finalists[i] for i in ranked[0]])
        # The others too, without a call: clients may choose from them for themselves.
        rest = yield from self.verbalize([p for i, p in enumerate(finalists) if i not in ranked[0]])
        prompt = yield from self.calibrate(chosen, stop, strength=strength)
        single = prompt if len(chosen) == 1 else (yield from self.calibrate(chosen[:1], stop, strength=strength))
        reading = Reading(
            milestone=self.milestone,
            fm_calls=self.spent,
            prompt=prompt,
            single=single,
            stop=stop,
            finalists=(*chosen, *rest),
        )
        self._milestones = self._milestones[1:]
        self._since = self.spent
        federation.read(reading)
        return prompt

    def rank_sets(
        self,
        prompts: Sequence[PromptTemplate],
        stop: int,
        penalty: Callable[[tuple[int, ...]], float] = lambda _set: 0.0,
    ) -> Steps[list[tuple[int, ...]]]:
        """All sets of ``max_prompts`` of ``prompts``, as indices, by combined score less ``penalty``, best first; in a
        set, the best prompt first.

        Sets are as large as the person allows: one more prompt lowers the variance of the answer, which is worth more
        than the noise by which a smaller set now and then scores higher. Prompts are scored on texts [0, stop) where
        they are not yet; a set costs no call beyond that, since the clients combine label scores that they have.
        """
        sets = candidate_sets(len(prompts), self.federation.max_prompts)
        full = [s for s in sets if len(s) == len(sets[-1])]
        standings = yield from self.score(prompts, sets, stop, differences=False)
        score = {s: standing.score for s, standing in zip(sets, standings, strict=True)}
        ranked = sorted(full, key=lambda s: penalty(s) - score[s])
        best = ranked[0]
        self.federation.log(
            "sets",
            {
                "fm_calls": self.spent,
                "n_sets": len(sets),
                "n_texts": standings[0].n,
                "best_score": score[best],
                "best_single": max(score[(i,)] for i in range(len(prompts))),
                "prompts": [prompts[i].text for i in best],
            },
        )
        return [tuple(sorted(s, key=lambda i: -score[(i,)])) for s in ranked]

    def cost(self, prompts: Sequence[PromptTemplate], stop: int, clients: Sequence[str] | None = None) -> int:
        """FM calls that `score` would be granted."""
        return sum(self._cost(prompts, stop, c) for c in clients or self.federation.clients)

    def _cost(self, prompts: Sequence[PromptTemplate], stop: int, client: str) -> int:
        stop = min(stop, self.federation.clients[client])
        return sum(max(0, stop - self._scored.get((p.prompt_id, client), 0)) for p in prompts)

    def reach(self, prompts: Sequence[PromptTemplate], max_calls: int) -> int:
        """The largest ``stop`` up to which ``prompts`` can be scored on every client's texts for ``max_calls``.

        Clients with fewer texts leave their share to the others; one that came late has to catch up.
        """
        longest = max(self.federation.clients.values())
        beyond = bisect_right(range(longest + 1), max_calls, key=lambda stop: self.cost(prompts, stop))
        return max(0, beyond - 1)

    def ask(
        self, prompts: Sequence[PromptTemplate], stop: int | None, clients: Sequence[str] | None = None
    ) -> Steps[tuple[int, FloatArray, FloatArray]]:
        """Have ``prompts`` scored by the FM on each client's texts [0, stop), where they are not yet.

        Without ``stop``: no call, only what they were scored on before.

        Returns the number of texts and the pooled sums of centred label scores (J, K) and of their squares (J,).
        """
        grants = {c: self._cost(prompts, stop or 0, c) for c in clients or self.federation.clients}
        while sum(grants.values()) > self.left and len(grants) > 1:
            # A client that came late has most to catch up on, and may be more than the budget can bear.
            del grants[max(sorted(grants), key=grants.__getitem__)]
        shape = (len(prompts), len(self.federation.labels))
        n, parts = 0, list[MomentSums]()
        for _ in range(MAX_TRIES if stop is None else 1):
            replies = yield from self.exchange(
                "ask", dict.fromkeys(grants, Ask(prompts=tuple(prompts), stop=stop)), grants
            )
            answers = picked(
                replies, MomentSums, lambda b: (len(b.total), len(b.squares)) == (shape[0] * shape[1], shape[0])
            )
            self._note_scored(prompts, stop or 0, answers)
            parts = list(answers.values())
            n = sum(p.n for p in parts)
            if n:
                break
        else:
            raise RunError("no client scored any text; at least one text is needed")
        total = np.sum([np.reshape(p.total, shape) for p in parts], axis=0)
        squares = np.sum([p.squares for p in parts], axis=0)
        for p, t, q in zip(prompts, total, squares, strict=True):
            self._pooled[p.prompt_id] = prior(n, t[None], np.array([q]))
        return n, total, squares

    def score(
        self,
        prompts: Sequence[PromptTemplate],
        sets: Sequence[tuple[int, ...]],
        stop: int,
        clients: Sequence[str] | None = None,
        *,
        differences: bool = True,
    ) -> Steps[list[Standing]]:
        """Standings of ``sets`` of ``prompts`` on each client's texts [0, stop), summed over clients; without
        ``differences`` those are nan, which makes the replies a third as large.

        A client that missed the round in which the FM was to be asked may ask it now, for the same grant.
        """
        asked = list(clients or self.federation.clients)
        yield from self.ask(prompts, stop, asked)
        weights, bias = self.pooled(prompts)
        body = Score(
            prompts=tuple(prompts), sets=tuple(sets), stop=stop, weights=weights, bias=bias, differences=differences
        )
        n, n_diff = 0, len(sets) if differences else 0
        for _ in range(MAX_TRIES):  # those that have the scores may just have missed this round
            again = {c: self._cost(prompts, stop, c) for c in asked}
            again = {c: calls for c, calls in again.items() if 0 < calls <= self._owed.get(c, 0)}
            replies = yield from self.exchange("score", dict.fromkeys(asked, body), again=again)
            right_size = picked(
                replies, Scored, lambda b: (len(b.total), len(b.diff), len(b.diff_sq)) == (len(sets), n_diff, n_diff)
            )
            whole = [c for c, body in right_size.items() if body.n == min(stop, self.federation.clients[c])]
            self._note_scored(prompts, stop, whole)
            parts = list(right_size.values())
            n = sum(p.n for p in parts)
            if n:
                break
        else:
            raise RunError("no client scored any text; at least one text is needed")
        total = np.sum([p.total for p in parts], axis=0) / n
        diff, diff_sq = (
            np.sum([getattr(p, name) for p in parts], axis=0) / n if differences else np.full(len(sets), np.nan)
            for name in ("diff", "diff_sq")
        )
        spread = np.sqrt(np.maximum(diff_sq - diff**2, 0.0) / n)
        return [
            Standing(n=n, score=float(t), diff=float(d), diff_se=float(s))
            for t, d, s in zip(total, diff, spread, strict=True)
        ]

    def pooled(self, prompts: Sequence[PromptTemplate]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Weights (J,) and flat bias (J x K) of each prompt's label-free calibration when it was last asked about."""
        return flattened([self._pooled[p.prompt_id] for p in prompts])

    def score_each(self, hands: Mapping[str, tuple[Sequence[PromptTemplate], int]]) -> Steps[dict[str, Scored]]:
        """Score at each client prompts of its own on its texts [0, stop): ``hands`` maps a client to (prompts, stop).

        A client's own sums of each of its prompts. A prompt's label-free calibration is pooled over all clients that it
        was dealt to so far. Who does not answer, or not for all the texts, is missing.
        """
        n_labels, clients = len(self.federation.labels), self.federation.clients
        replies = yield from self.exchange(
            "ask",
            {c: Ask(prompts=tuple(prompts), stop=stop) for c, (prompts, stop) in hands.items()},
            {c: self._cost(prompts, stop, c) for c, (prompts, stop) in hands.items()},
        )
        answered = list[str]()
        for client, part in picked(replies, MomentSums, lambda _: True).items():
            prompts, stop = hands[client]
            if (len(part.total), len(part.squares)) == (len(prompts) * n_labels, len(prompts)):
                answered.append(client)
                self._note_scored(prompts, stop, [client])
                for j, prompt in enumerate(prompts):
                    mine = slice(j * n_labels, (j + 1) * n_labels)
                    one = MomentSums(n=part.n, total=part.total[mine], squares=part.squares[j : j + 1])
                    self._moments.setdefault(prompt.prompt_id, {})[client] = one
        tasks = dict[str, Score]()
        for client in answered:
            prompts, stop = hands[client]
            weights, bias = flattened([self._prior_of(p) for p in prompts])
            tasks[client] = Score(prompts=tuple(prompts), sets=singles(prompts), stop=stop, weights=weights, bias=bias)
        if not tasks:
            return {}
        replies = yield from self.exchange("score", tasks)
        return {
            c: body
            for c, body in picked(replies, Scored, lambda b: len(b.total) == len(b.diff)).items()
            if len(body.total) == len(hands[c][0]) and body.n == min(hands[c][1], clients[c])
        }

    def _prior_of(self, prompt: PromptTemplate) -> Calibration:
        parts = list(self._moments[prompt.prompt_id].values())
        total, squares = (np.sum([getattr(p, name) for p in parts], axis=0) for name in ("total", "squares"))
        return prior(sum(p.n for p in parts), total[None], squares)

    def _note_scored(self, prompts: Sequence[PromptTemplate], stop: int, clients: Iterable[str]) -> None:
        for client in clients:
            reached = min(stop, self.federation.clients[client])
            for p in prompts:
                key = (p.prompt_id, client)
                self._scored[key] = max(reached, self._scored.get(key, 0))

    def calibrate(
        self, prompts: Sequence[PromptTemplate], stop: int | None = None, *, strength: float = 4.0, steps: int = 3
    ) -> Steps[PromptSet]:
        """Weigh and calibrate ``prompts`` together on the clients' texts [0, stop), by federated Newton steps.

        Costs FM calls only where a prompt was not scored on those texts yet; without ``stop``, none.
        """
        n, total, squares = yield from self.ask(prompts, stop)
        at = yield from self._newton(prompts, stop, prior(n, total, squares), strength, steps)
        return self.prompt_set(prompts, at)

    def verbalize(
        self, prompts: Sequence[PromptTemplate], *, strength: float = 2.0, steps: int = 2
    ) -> Steps[list[PromptTemplate]]:
        """Learn over all clients how much each label word tells (`PromptTemplate.readout`), on the texts that each
        prompt was scored on; no FM call. Prompts that generate have none, and come back as they are.

        A word's weight starts at its share of the prompt's own temperature, and is held there by ``strength``.
        """
        learned = []
        for prompt in prompts:
            if not prompt.words:
                learned.append(prompt)
                continue
            if prompt.prompt_id not in self._pooled:
                yield from self.ask([prompt], None)
            pooled = self._pooled[prompt.prompt_id]
            label = prompt.word_labels
            share = pooled.weights[0] / np.bincount(label)[label]
            start = Calibration(weights=tuple(share.tolist()), bias=pooled.bias)
            at = yield from self._newton([prompt], None, start, strength, steps, words=True)
            learned.append(replace(prompt, readout=at.weights))
        return learned

    def _newton(
        self,
        prompts: Sequence[PromptTemplate],
        stop: int | None,
        start: Calibration,
        strength: float,
        steps: int,
        *,
        words: bool = False,
    ) -> Steps[Calibration]:
        """``steps`` federated Newton steps from ``start``, to which ``strength`` holds the fit; none without labels."""
        at, size = start, len(start.weights) + len(start.bias)
        for _ in range(steps if self.federation.labels else 0):
            body = Newton(prompts=tuple(prompts), stop=stop, weights=at.weights, bias=at.bias, words=words)
            replies = yield from self.exchange(
                "words" if words else "newton", dict.fromkeys(self.federation.clients, body)
            )
            pooled = sum_newton_parts(replies, size)
            if pooled is None:
                raise RunError("no client took part in the calibration; at least one is needed")
            at = newton_step(pooled, at, start, strength)
        return at

    def prompt_set(self, prompts: Sequence[PromptTemplate], calibration: Calibration) -> PromptSet:
        return PromptSet(
            labels=self.federation.labels,
            prompts=tuple(prompts),
            weights=calibration.weights,
            bias=calibration.bias,
        )


def sum_newton_parts(replies: Replies, size: int) -> NewtonSums | None:
    """The clients' parts of a Newton step in ``size`` parameters, summed; None where there are none."""
    total: NewtonSums | None = None
    for part in picked(replies, NewtonPart, lambda b: len(b.gradient) == size).values():
        total = part.sums if total is None else total + part.sums
    return total
