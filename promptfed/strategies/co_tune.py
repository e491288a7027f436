"""``co_tune``: prompts and domain models in turns, each from what the other has come to (Setting 3 of Ren et al., arXiv
2502.12176).

1. Prompts are tuned as in `race`, from what the domain models vote for, up to a part of the calls.
2. The FM teaches the domain models, with the best prompt so far, what it says of the clients' unlabelled texts and of
   the public ones (`distillation`).
3. The domain models vote anew, and `race` goes on with what they vote for now, against the prompts that it has.

The turns end when they help neither: when the domain models' score on labelled texts that they were not fitted on did
not rise (where it fell, the lessons are taken back), and none of the new prompts came among the finalists. What is left
of the calls then goes on as in `race`. Both are bounded scores (1 - Brier/2, higher is better) on texts that what is
scored has not seen, so that neither side can be talked into believing the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, TypeVar

import numpy as np
from pydantic import Field

from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.grammar import Draft, Materials
from promptfed.strategies.base import Card, Federation, Reading, Steps
from promptfed.strategies.distillation import Learned, Teacher
from promptfed.strategies.pool import Pool
from promptfed.strategies.race import Race
from promptfed.strategies.session import Session

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class CoTune(Race):
    """``n_turns`` at most, each with as many calls; ``teach_share`` of a turn's go into teaching. ``min_confidence``:
    of how much the FM has to be sure of a text to teach it."""

    n_turns: Annotated[int, Field(ge=2)] = 2
    teach_share: Annotated[float, Field(gt=0, lt=1)] = 0.4
    min_confidence: Annotated[float, Field(ge=0, le=1)] = 0.9

    name: ClassVar[str] = "co_tune"
    card: ClassVar[Card] = Card(
        paper="Setting 3 of Ten Challenging Problems in Federated Foundation Models (arXiv 2502.12176); race",
        sends=frozenset({"write", "weigh", "vote", "ask", "score", "newton", "teach", "distil", "unlearn"}),
        crosses="Votes on public texts, what the FM says of public texts, and sums of bounded scores.",
        kinds=frozenset({"classification"}),
    )

    def run(self, federation: Federation) -> Steps[PromptSet]:
        wanted = {*federation.milestones, federation.max_fm_calls}
        ends = {federation.max_fm_calls * turn // self.n_turns for turn in range(1, self.n_turns)}
        last: list[Reading] = []

        def read(reading: Reading) -> None:
            last[:] = [reading]
            if reading.milestone in wanted:
                federation.read(reading)

        teacher = Teacher(min_confidence=self.min_confidence)
        better: list[Materials] = []  # what the domain models last voted for, once they were taught
        goes_on = True

        def later(
            session: Session, pool: Pool, finalists: list[Draft], materials: Materials, rng: np.random.Generator
        ) -> Steps[tuple[Pool, list[Draft]]]:
            nonlocal goes_on
            taught, since = False, session.spent
            if goes_on:
                learned = yield from self._taught(session, teacher, last[-1])
                if taught := learned.after > learned.before:
                    better[:] = [(yield from self._materials(session, rng))]
            before = {draft.template().prompt_id for draft in finalists}
            n_gone = session.spent - since
            now = better[0] if better else materials
            pool, finalists = yield from self._later(session, pool, finalists, now, rng, n_gone)
            found = any(draft.template().prompt_id not in before for draft in finalists)
            goes_on = goes_on and (taught or found)
            federation.log("turn", {"taught": taught, "found": found, "goes_on": goes_on})
            return pool, finalists

        session = Session(replace(federation, milestones=tuple(sorted(wanted | ends))[:-1], read=read))
        return (yield from self._race(session, federation.rng(1), later))

    def _taught(self, session: Session, teacher: Teacher, reading: Reading) -> Steps[Learned]:
        """Teach the domain models for a share of the calls up to the next milestone."""
        prompts = {c: reading.of(c).single for c in session.present}
        calls = int(self.teach_share * max(session.milestone - session.spent, 0))
        return (yield from _accounted(session, teacher.distil(session.federation, prompts, calls)))


def _accounted(session: Session, steps: Steps[T]) -> Steps[T]:
    """``steps``, with what they cost on the session's account."""
    try:
        round_ = next(steps)
        while True:
            round_ = steps.send((yield from session.exchange(round_.name, round_.tasks, round_.grants)))
    except StopIteration as done:
        result: T = done.value
        return result
