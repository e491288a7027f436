"""``fedone_bdpl``: slots of n-grams before a prompt, tuned by policy gradient, one client a round.

BDPL (Diao et al., Black-Box Prompt Learning for Pre-trained Language Models, TMLR 2023, arXiv 2201.08531), federated as
FedOne does it (Wang et al., ICML 2025): the fewer clients a round, the less a step of the policy costs at the
foundation model, so one. In order:

1. *Vocabulary*: n-grams of public text, ranked by what clients count (`promptfed.prompts.ngrams`).
2. *Template*: what stands behind the slots: the person's instruction alone, or the best of a few drafts with one
   exemplar a label, from the pool that all methods share.
3. *Rounds*: the server sends the slots' logits to ``clients_per_round`` clients. Each draws ``n_samples`` prompts a
   step, scores them on the same ``n_texts`` texts and goes along the policy gradient with a leave-one-out baseline
   (`clients.policy`). The server averages what comes back, weighted by the number of texts.
4. *Choose*: the slots' most probable n-grams, two prompts that differ from these in one slot, and the template alone
   are scored on the texts that the rest of the budget pays for.

What differs from the papers. The state is logits, not probabilities on the simplex: no projection is needed, and no
probability can become 0 (the published code divides by it). The published estimator is a leave-one-out one already, by
other words: 1/(I-1) sum_k (l_k - mean) grad = 1/I sum_k (l_k - mean of the others) grad. A step is plain gradient
descent: AdamW begins anew with each client, and its first step from no state is the gradient's sign, as large for an
n-gram that made a hair's breadth of difference as for one that made all of it; momentum, which does live on, is the
server's. The norm that is clipped (at 3) is that of the step, in logits: it bounds how far one client can move the
policy. The loss is that of calibrated scores: a drawn prompt's own label bias is taken off, so that the search does not
go into a bias that calibration takes away for nothing (`clients.policy.calibrated_logits`). A label outside an API's
top tokens is censored (`clients.policy.known_advantages`), not given a probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field
from scipy.special import softmax

from promptfed.errors import ConfigError, WireError
from promptfed.messages.methods import CountNgrams, NgramCounts, Policy, PolicyStep, packed, unpacked
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.calibration import prior
from promptfed.prompts.grammar import Draft, Materials, draft_like
from promptfed.prompts.ngrams import MAX_NGRAMS, MAX_WORDS, candidates, counted, joined, ranked
from promptfed.prompts.slots import entropy, floored, most_probable
from promptfed.prompts.template import PromptTemplate
from promptfed.strategies.base import Card, Federation, Steps
from promptfed.strategies.exchanges import picked
from promptfed.strategies.pool import Pool
from promptfed.strategies.proposal import gather
from promptfed.strategies.session import N_FINALISTS, RESERVE, Session
from promptfed.types import Capability

# Texts, over all clients, that choose the template.
TEMPLATE_TEXTS = 25
# Share of the calls that writing may take at most (`proposal.gather`).
WRITING = 0.06


@dataclass(frozen=True, slots=True, kw_only=True)
class FedOneBDPL:
    """Options: size of the policy (``n_slots``, ``n_ngrams``), what a client does in a round (``n_samples`` prompts on
    ``n_texts`` texts, ``n_steps`` times, with ``learning_rate``), and how rounds are put together."""

    template: Literal["few_shot", "zero_shot"] = "few_shot"
    template_share: Annotated[float, Field(ge=0, lt=1)] = 0.2
    n_slots: Annotated[int, Field(ge=1)] = 5
    n_ngrams: Annotated[int, Field(ge=2)] = 30
    clients_per_round: Annotated[int, Field(ge=1)] = 1
    n_samples: Annotated[int, Field(ge=2)] = 6
    n_texts: Annotated[int, Field(ge=1)] = 4
    n_steps: Annotated[int, Field(ge=1)] = 1
    learning_rate: Annotated[float, Field(gt=0)] = 20.0
    max_step: Annotated[float, Field(gt=0)] = 3.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    entropy_floor: Annotated[float, Field(ge=0, lt=1)] = 0.2
    reserve: Annotated[float, Field(ge=0, lt=1)] = RESERVE

    name: ClassVar[str] = "fedone_bdpl"
    needs: ClassVar[frozenset[Capability]] = frozenset({Capability.TOP_LOGPROBS, Capability.TEXT})
    card: ClassVar[Card] = Card(
        paper="FedOne (Wang et al., ICML 2025); BDPL (Diao et al., TMLR 2023, arXiv 2201.08531)",
        sends=frozenset({"write", "weigh", "vote", "ask", "score", "newton", "count_ngrams", "policy_step"}),
        crosses="Votes on public texts, counts of public n-grams, the slots' logits, and sums of bounded scores.",
    )

    @property
    def estimator(self) -> tuple[Literal["reinforce", "gumbel"], float]:
        """How the gradient is estimated, and at which temperature if that matters."""
        return "reinforce", 1.0

    def run(self, federation: Federation) -> Steps[PromptSet]:
        session, rng = Session(federation, reserve=self.reserve), federation.rng(1)
        stop = self._check_budget(session)
        materials = yield from gather(session, rng)
        vocabulary = yield from self._vocabulary(session, materials)
        pool, policy = Pool(session, stop), SlotPolicy(vocabulary, self.n_slots, self.entropy_floor)
        while True:
            template, weight = yield from self._choose_template(session, pool, materials, rng)
            while True:
                clients = policy.next_clients(session, self.clients_per_round, rng)
                grants = {c: self._calls(federation.clients[c]) for c in clients}
                if not clients or sum(grants.values()) > session.search_left:
                    break
                yield from self._round(session, policy, grants, template, weight, int(rng.integers(2**31)))
            prompt = yield from session.conclude([*policy.best(template, N_FINALISTS - 1), template])
            if session.is_over:
                return prompt

    def _calls(self, n_texts: int) -> int:
        return self.n_steps * self.n_samples * min(self.n_texts, n_texts)

    def _check_budget(self, session: Session) -> int:
        """Texts a client that choose the template. Raises `ConfigError` where there is not one round in the budget."""
        clients = session.federation.clients
        stop = max(1, round(TEMPLATE_TEXTS / len(clients)))
        largest = sorted(map(self._calls, clients.values()))[-self.clients_per_round :]
        n_labels = len(session.federation.labels)
        # The template alone on its texts, a round, and what `gather` takes even of a small budget.
        least = sum(min(stop, n) for n in clients.values()) + sum(largest) + 2 * n_labels + 10
        needed = int(np.ceil((least + 1) / max(1 - self.reserve - WRITING, 0.01)))
        session.require(needed, f"one round of {self.name} with {len(clients)} clients")
        return stop

    def _vocabulary(self, session: Session, materials: Materials) -> Steps[tuple[str, ...]]:
        """The ``n_ngrams`` n-grams of public and written text that rank first by the counts of all clients."""
        federation = session.federation
        written = [text for texts in materials.exemplars for text in texts]
        public = [federation.instruction, *federation.words, *federation.public, *written]
        ngrams = candidates(public, MAX_WORDS, MAX_NGRAMS)
        body = CountNgrams(ngrams=tuple(ngrams))
        replies = yield from session.exchange("count_ngrams", dict.fromkeys(federation.clients, body))
        parts = picked(replies, NgramCounts, lambda b: len(b.counts) == len(ngrams) and max(b.counts, default=0) <= b.n)
        n, counts = sum(p.n for p in parts.values()), np.sum([p.counts for p in parts.values()], axis=0)
        if n and counts.any():
            by_ngram = dict(zip(ngrams, map(int, counts), strict=True))
        else:  # no client has said anything: the public texts alone
            everywhere = counted(public, MAX_WORDS)
            n, by_ngram = len(public), {ngram: everywhere[ngram] for ngram in ngrams}
        vocabulary = tuple(ranked(by_ngram, n, self.n_ngrams))
        if not vocabulary:
            raise ConfigError(f"{self.name} found no words to choose n-grams from; give public texts as data.public")
        federation.log("vocabulary", {"n_texts": n, "n_candidates": len(ngrams), "ngrams": list(vocabulary)})
        return vocabulary

    def _choose_template(
        self, session: Session, pool: Pool, materials: Materials, rng: np.random.Generator
    ) -> Steps[tuple[PromptTemplate, float]]:
        """The best draft so far, after some new ones at each milestone, and what pooled calibration weighs it by."""
        n_texts = sum(min(pool.stop, n) for n in session.federation.clients.values())
        n_new = max(int(session.budget * self.template_share) // n_texts, 0)
        drafts: list[Draft] = []
        if not pool.best(1):
            drafts = [draft_like(0, materials, rng)]
        if self.template == "few_shot":
            drafts += [draft_like(1, materials, rng) for _ in range(n_new - len(drafts))]
        yield from pool.heat([draft for draft in dict.fromkeys(drafts) if draft not in pool])
        template = pool.best(1)[0].template()
        n, total, squares = yield from session.ask([template], None)
        return template, prior(n, total, squares).weights[0]

    def _round(
        self,
        session: Session,
        policy: SlotPolicy,
        grants: dict[str, int],
        template: PromptTemplate,
        weight: float,
        seed: int,
    ) -> Steps[None]:
        """Let the clients of ``grants`` go some steps, and take over what they come to."""
        estimator, temperature = self.estimator
        body = PolicyStep(
            template=template,
            weight=weight,
            vocabulary=policy.vocabulary,
            n_slots=self.n_slots,
            logits=packed(policy.logits),
            n_samples=self.n_samples,
            n_texts=self.n_texts,
            n_steps=self.n_steps,
            learning_rate=self.learning_rate,
            max_step=self.max_step,
            estimator=estimator,
            temperature=temperature,
            entropy_floor=self.entropy_floor,
            seed=seed,
        )
        replies = yield from session.exchange("policy_step", dict.fromkeys(grants, body), grants, optional=True)
        came = picked(replies, Policy, policy.fits)
        if not came:
            return
        policy.update([*came.values()], [session.federation.clients[c] for c in came], self.momentum)
        session.federation.log(
            "policy",
            {
                "fm_calls": session.spent,
                "n_clients": len(came),
                "loss": float(np.mean([p.loss for p in came.values()])),
                "entropy": float(np.mean(entropy(softmax(policy.logits, axis=1)))),
                "ngrams": policy.ngrams(1)[0],
            },
        )


class SlotPolicy:
    """The server's side: the slots' logits, how they last moved, and whose turn it is."""

    def __init__(self, vocabulary: tuple[str, ...], n_slots: int, entropy_floor: float) -> None:
        self.vocabulary = vocabulary
        self.logits = np.full((n_slots, len(vocabulary)), -np.log(len(vocabulary)))
        self._velocity = np.zeros_like(self.logits)
        self._floor = entropy_floor
        self._turns: list[str] = []

    def next_clients(self, session: Session, n: int, rng: np.random.Generator) -> list[str]:
        """Up to ``n`` clients, drawn without replacement from all until each has had its turn; none that owes an
        answer."""
        present, chosen = session.present, list[str]()
        while len(chosen) < min(n, len(present)):
            if not self._turns:
                everyone = sorted(session.federation.clients)
                self._turns = [everyone[i] for i in rng.permutation(len(everyone))]
            client = self._turns.pop()
            if client in present and client not in chosen:
                chosen.append(client)
        return chosen

    def fits(self, body: Policy) -> bool:
        """Whether a reply holds logits of the right shape, all finite."""
        try:
            unpacked(body.logits, *self.logits.shape)
        except WireError:
            return False
        return True

    def update(self, policies: Sequence[Policy], n_texts: Sequence[int], momentum: float) -> None:
        """FedAvg of the logits, weighted by ``n_texts``: one client's replace what was there. ``momentum``: the share
        of the last move that is made once more (FedAvgM, Hsu et al., 2019, arXiv 1909.06335)."""
        moves = [unpacked(p.logits, *self.logits.shape) - self.logits for p in policies]
        self._velocity = momentum * self._velocity + np.average(moves, axis=0, weights=n_texts)
        self.logits = floored(self.logits + self._velocity, self._floor)

    def ngrams(self, n: int) -> list[list[str]]:
        """The n-grams of up to ``n`` prompts, most probable first."""
        return [[self.vocabulary[j] for j in prompt] for prompt in most_probable(self.logits, n)]

    def best(self, template: PromptTemplate, n: int) -> list[PromptTemplate]:
        """Up to ``n`` prompts, most probable first."""
        return [replace(template, text=joined(ngrams, template.text)) for ngrams in self.ngrams(n)]
