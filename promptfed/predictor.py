"""Everything that a client has, put together to answer: prompt, its own calibration, domain model, cascade, passages.

    predictor = Predictor.load("runs/demo", fm=promptfed.load_fm("embedded:smollm2-135m-instruct"), client="drugs")
    answer, = predictor.predict(["It helped from the first day."])
    answer.label, answer.by, answer.passages

The domain model's answers cost no FM call. Which stage answers what: `clients.cascade`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from clients.cascade import passes_on
from clients.domain_models.base import load_model, smoothed
from promptfed.errors import ConfigError
from promptfed.fm.base import BaseFM, run_sync
from promptfed.messages import STAGES
from promptfed.prompts.artefact import Prediction, PromptSet
from promptfed.prompts.calibration import Calibration
from promptfed.prompts.passages import fitting, grounded, outvoted
from promptfed.prompts.template import PromptTemplate
from promptfed.runs import client_folder, read_calibration, read_made_for, read_record
from promptfed.types import DomainModel, Encoder, FloatArray, Hit, Retriever

# Passages that are looked for, and the tokens that they may take in a prompt.
N_PASSAGES, PASSAGE_TOKENS = 3, 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer(Prediction):
    """A `Prediction` that says where it comes from: ``by`` is the stage of `promptfed.messages.STAGES` that answered;
    ``prompts`` were asked, with their exemplars in them, and ``passages`` quoted (empty where no FM was asked)."""

    by: str = STAGES[-1]
    prompts: tuple[PromptTemplate, ...] = field(default=(), repr=False)
    passages: tuple[Hit, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    """One that asks the FM: prompts, and the client's calibration of them."""

    prompt: PromptSet
    calibration: Calibration


@dataclass(frozen=True, slots=True, kw_only=True)
class _Quoted:
    """What one prompt quotes: passages, and as much of their texts as fits."""

    hits: tuple[Hit, ...] = ()
    texts: tuple[str, ...] = ()


class Predictor:
    """Answers as one client does. `load` reads what a run left at the client; ``retriever`` finds passages.

    ``passage_tokens`` is what the passages in a prompt may take. ``isolate``: what each source says, another client or
    a document of one's own, stands in a prompt of its own, with as many tokens, and they vote, so that a wrong or
    poisoned source is outvoted by those that agree; costs a call a source in place of one.
    """

    def __init__(
        self,
        fm: BaseFM,
        final: _Stage,
        *,
        domain: tuple[DomainModel, Calibration, FloatArray] | None = None,
        stack: tuple[float, float] = (1.0, 0.0),
        single: _Stage | None = None,
        thresholds: tuple[float, ...] = (),
        retriever: Retriever | None = None,
        n_passages: int = N_PASSAGES,
        passage_tokens: int = PASSAGE_TOKENS,
        isolate: bool = False,
    ) -> None:
        self._fm, self._final, self._domain, self._stack = fm, final, domain, stack
        self._single, self._thresholds = single, thresholds
        self._retriever, self._isolate = retriever, isolate
        self._n_passages, self._passage_tokens = n_passages, passage_tokens
        self.labels = final.prompt.labels

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        fm: BaseFM,
        client: str,
        encoder: Encoder | None = None,
        retriever: Retriever | None = None,
        **options: Any,
    ) -> Predictor:
        """``folder``: a run folder, or the folder of a run at the client itself. ``encoder`` in place of the one that
        the domain model was trained with, which is loaded by its name otherwise. ``options``: ``n_passages``,
        ``passage_tokens``, ``isolate``.

        Raises `DataError` for a folder without such a client, and for parts of different runs.
        """
        home = client_folder(Path(folder), client)
        final = _stage(home, "prompt.json", "calibration.json")
        record = read_made_for(final.prompt, home / "stacker.json")
        model = load_model(home / "domain_model.npz", final.prompt.labels, encoder)
        calibration = Calibration(**{k: tuple(v) for k, v in record["domain_calibration"].items()})
        more: dict[str, Any] = {}
        if (home / "cascade.json").is_file():
            more["single"] = _stage(home, "single.json", "cascade.json")
            more["thresholds"] = tuple(read_record(home / "cascade.json")["thresholds"])
        weights = record["weights"]
        return cls(
            fm,
            final,
            domain=(model, calibration, np.array(record["log_prior"])),
            stack=(weights[0], weights[1]),
            retriever=retriever,
            **more,
            **options,
        )

    def predict(self, texts: Sequence[str]) -> list[Answer]:
        """`apredict`, blocking; notebook-safe."""
        return run_sync(self.apredict(texts))

    async def apredict(self, texts: Sequence[str]) -> list[Answer]:
        """One answer a text; ``label`` is None where the FM failed."""
        n, n_labels = len(texts), len(self.labels)
        stage = np.full(n, len(STAGES) - 1)
        proba = np.full((n, n_labels), 1.0 / n_labels)
        failed = np.zeros(n, dtype=bool)
        offset = np.zeros((n, n_labels))
        if self._domain is not None and n:
            model, calibration, log_prior = self._domain
            domain = calibration.logits(smoothed(model.predict_proba(texts))[:, None])
            offset = self._stack[1] * (domain - log_prior)
            if self._thresholds:
                proba, stage[:] = softmax(domain, axis=1), 0
        found: dict[int, list[_Quoted]] = {}
        asked: dict[int, tuple[PromptTemplate, ...]] = {}
        scores: dict[str, dict[int, FloatArray | None]] = {}
        steps = [] if self._single is None else [(1, self._single)]
        for number, step in (*steps, (2, self._final)):
            if self._thresholds:
                unsure = passes_on(proba, stage, number - 1, self._thresholds)
                stage[unsure] = number
            rows = np.flatnonzero(stage == number).tolist()
            await self._look_up(texts, rows, found)
            for prompt in step.prompt.prompts:
                known = scores.setdefault(prompt.prompt_id, {})
                await self._ask(prompt, texts, [i for i in rows if i not in known], found, known)
            for i in rows:
                asked[i] = (*asked.get(i, ()), *(p for p in step.prompt.prompts if p not in asked.get(i, ())))
                each = [scores[p.prompt_id][i] for p in step.prompt.prompts]
                failed[i] = any(one is None for one in each)
                if not failed[i]:
                    logits = step.calibration.logits(np.array(each)[None])
                    proba[i] = softmax(self._stack[0] * logits[0] + offset[i])
        return [
            Answer(
                label=None if failed[i] else self.labels[int(proba[i].argmax())],
                proba={} if failed[i] else dict(zip(self.labels, proba[i].tolist(), strict=True)),
                by=STAGES[stage[i]],
                prompts=asked.get(i, ()),
                passages=tuple(hit for quoted in found.get(i, ()) for hit in quoted.hits),
            )
            for i in range(n)
        ]

    async def _look_up(self, texts: Sequence[str], rows: Sequence[int], found: dict[int, list[_Quoted]]) -> None:
        """Passages for the texts ``rows`` that have none yet."""
        new = [i for i in rows if i not in found]
        if self._retriever is None or not new:
            return
        queries = [texts[i] for i in new]
        look = getattr(self._retriever, "asearch", None)
        hits = await look(queries, self._n_passages) if look else self._retriever.search(queries, self._n_passages)
        for i, mine in zip(new, hits, strict=True):
            found[i] = self._quoted(mine)

    def _quoted(self, hits: Sequence[Hit]) -> list[_Quoted]:
        """What stands in one prompt together, of those with a text: all, or with ``isolate`` those of one source."""
        sources: dict[str, list[Hit]] = {}
        for hit in hits:
            if hit.text:
                sources.setdefault((hit.owner or hit.doc_id) if self._isolate else "", []).append(hit)
        out = []
        for of in sources.values():
            shown = fitting([hit.text for hit in of], self._passage_tokens)
            if shown:
                out.append(_Quoted(hits=tuple(of[: len(shown)]), texts=shown))
        return out

    async def _ask(
        self,
        prompt: PromptTemplate,
        texts: Sequence[str],
        rows: Sequence[int],
        found: Mapping[int, Sequence[_Quoted]],
        known: dict[int, FloatArray | None],
    ) -> None:
        """Label scores (K,) of each text of ``rows``; None where the FM failed."""
        groups = [[grounded(prompt, quoted.texts) for quoted in found.get(i) or [_Quoted()]] for i in rows]
        requests = [p.requests([texts[i]])[0] for i, group in zip(rows, groups, strict=True) for p in group]
        answers = await self._fm.complete(requests) if requests else []
        at = 0
        for i, group in zip(rows, groups, strict=True):
            said = prompt.label_scores(answers[at : at + len(group)])
            at += len(group)
            if np.ma.getmaskarray(said).all():
                known[i] = None
            elif len(group) == 1:
                known[i] = np.asarray(said.data[0])
            else:
                known[i] = outvoted(said[None])[0]


def _stage(home: Path, prompt: str, calibration: str) -> _Stage:
    tuned = PromptSet.load(home / prompt)
    if not tuned.labels:
        raise ConfigError("prompts that generate answers have no domain model to answer with: use Prompt.predict")
    return _Stage(prompt=tuned, calibration=read_calibration(home / calibration, tuned))
