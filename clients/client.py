"""A client: private data, a domain model and a metered foundation model, behind `handle(task bytes) -> reply bytes`.

What leaves is what the replies in `promptfed.messages` carry. An exception in here leaves as the name of its class:
its text might quote data.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from clients.answers import AnswerStore
from clients.arms import Arms
from clients.cascade import risk_counts
from clients.data import ClientData, Labelled, client_rng
from clients.distillation import judged, lessons_of, teach
from clients.domain_models.base import save_model
from clients.history import TaskHistory
from clients.learning import Learning
from clients.personal import Chosen
from clients.scores import ScoreStore
from clients.tasks import METHOD_TASKS
from evaluators import answers, metrics
from promptfed.errors import BudgetError, DataError, WireError
from promptfed.files import write_whole
from promptfed.fm.base import BaseFM
from promptfed.fm.decorators import Budgeted, Metered, Reached
from promptfed.ledger import Usage
from promptfed.messages import (
    Adopt,
    Adopted,
    Ask,
    Distil,
    Distilled,
    Evaluate,
    Evaluated,
    Failed,
    Join,
    Joined,
    MomentSums,
    Newton,
    NewtonPart,
    Reply,
    ReplyBody,
    Risk,
    Score,
    Scored,
    Stack,
    Task,
    Teach,
    Train,
    Trained,
    Unlearn,
    Unlearned,
    Vote,
    Votes,
    Weigh,
    Weighed,
    Write,
    Written,
    decode_reply,
    decode_task,
    encode,
)
from promptfed.privacy.secret import Secret
from promptfed.prompts.calibration import Calibration, mix, moments, sums
from promptfed.types import Encoder
from retrieval.encoder import DividedEncoder


class Client:
    """One organisation. ``folder`` is its own: calibration, stacker, per-text results and its ``history`` stay there.

    ``public_encoder`` reads public texts only, so simulated clients may share what it remembers. ``noise_key`` is for
    simulations, which have to be repeatable: without it, the client makes a key of its own that nobody else knows.
    Without ``labels`` the task is generation: there is no domain model and nothing to calibrate.
    """

    def __init__(
        self,
        data: ClientData,
        labels: tuple[str, ...],
        fm: BaseFM,
        encoder: Encoder,
        *,
        public_encoder: Encoder | None = None,
        seed: int,
        folder: Path | None = None,
        history: str = "history",
        noise_key: bytes | None = None,
        domain_model: str = "linear",
    ) -> None:
        self.data, self.labels = data, labels
        self.folder = folder
        self._meter = Metered(Reached(fm))
        self.fm = Budgeted(self._meter)
        self._history = TaskHistory(folder / f"{history}.msgpack" if folder is not None else None)
        self._restored = not self._history.tasks
        told = [decode_reply(known).usage for known in self._history.replies]
        self._n_calls, self._usd = sum(usage.fm_calls for usage in told), sum((usage.usd for usage in told), 0.0)
        self._seed = seed
        self.encoder = encoder
        self.public_encoder = public_encoder or encoder
        self.scores = ScoreStore(data.train, len(labels)) if labels else AnswerStore(data.train)
        self.unlabelled = ScoreStore(_without_labels(data.unlabelled), len(labels))
        self._secret = Secret(noise_key) if noise_key is not None else None
        private = (*data.train.texts, *data.test.texts, *data.unlabelled)
        reading = DividedEncoder(private, encoder, self.public_encoder)
        self.domain = Learning(domain_model, reading, data, len(labels), seed)
        self.arms = Arms(data, self.scores, len(labels), self.domain)
        self._held_out = AnswerStore(data.test)

    @property
    def client_id(self) -> str:
        return self.data.client_id

    @property
    def secret(self) -> Secret:
        """Where noise comes from that the client adds to what it says."""
        if self._secret is None:
            self._secret = Secret.kept_in(self.folder)
        return self._secret

    async def handle(self, task: bytes) -> bytes:
        """Do one task. Never raises for a task that failed: the reply is then `Failed` with a class name."""
        number = granted = 0

        def reply(body: ReplyBody) -> bytes:
            # What was granted and is gone counts as called, whether or not the model answered.
            usage = replace(self._meter.usage, fm_calls=granted - self.fm.grant)
            calls, usd = self._n_calls, self._usd
            # As a reply carries it: the sum has to be the same after a restart.
            self._n_calls, self._usd = calls + usage.fm_calls, usd + float(np.float32(usage.usd))
            made = Reply(
                round=number, client_id=self.client_id, usage=usage, calls_before=calls, usd_before=usd, body=body
            )
            return encode(made)

        try:
            await self.restore()
            self._meter.usage, self.fm.grant = Usage(), 0
            message = decode_task(task)
            number = message.round
            if message.client_id != self.client_id:
                raise WireError(f"a task for {message.client_id!r} reached {self.client_id!r}")
            if (known := self._history.reply_to(task)) is not None:
                return known
            self.fm.usd = message.usd
            granted = self.fm.grant = min(message.grant, max(message.limit - self._n_calls, 0))
            done = reply(await self._do(message))
            self._history.add(task, done)
            return done
        except Exception as error:  # noqa: BLE001  (the boundary: no exception, and no text of one, may leave)
            return reply(Failed(reason=type(error).__name__))

    async def restore(self) -> None:
        """Do again what an earlier process of this client did, as far as it changed the client. Raises `DataError`
        where answers of the FM are lost that it had then."""
        if self._restored:
            return
        try:
            for task, replied in zip(map(decode_task, self._history.tasks), self._history.replies, strict=True):
                spent = decode_reply(replied).usage
                self._meter.usage, self.fm.grant = Usage(), spent.fm_calls
                caught_up = isinstance(task.body, Score) and self.fm.grant > 0
                if caught_up or isinstance(task.body, Ask | Vote | Distil | Unlearn | Evaluate):
                    await self._do(task)
                    if self._meter.usage.failed_calls > spent.failed_calls:
                        raise DataError(
                            f"the journal of client {self.client_id!r} lacks answers that its history tells of: "
                            "restore it from a copy, or give the client another folder"
                        )
        finally:
            self.fm.grant = 0
        self._restored = True

    async def _do(self, task: Task) -> ReplyBody:
        match task.body:
            case Join():
                present = sorted(set(self.data.train.labels.tolist()))
                return Joined(
                    fm=self.fm.fm_id,
                    encoder=self.encoder.encoder_id,
                    capabilities=tuple(sorted(self.fm.capabilities)),
                    n_train=len(self.data.train),
                    n_test=len(self.data.test),
                    labels=tuple(self.labels[k] for k in present),
                    n_dropped=self.data.n_dropped,
                    n_unlabelled=len(self.data.unlabelled),
                    domain_model=self.domain.kind if self.labels else "",
                    soft_space=self.fm.soft_space,
                    is_priced=self.fm.is_priced,
                )
            case Write():
                answers = await self.fm.complete(task.body.requests)
                return Written(texts=tuple(answer.text or "" for answer in answers))
            case Weigh():
                answers = await self.fm.complete(task.body.requests)
                return Weighed(
                    logprobs=tuple(answer.logprobs or () for answer in answers),
                    n_tokens=tuple(answer.label_tokens or () for answer in answers),
                )
            case Vote():
                return self._vote(task.body)
            case Ask():
                await self.scores.ask(self.fm, task.body.prompts, task.body.stop or 0)
                scores, _, _ = self.scores.get(task.body.prompts, task.body.stop)
                total, squares = moments(scores)
                return MomentSums(n=len(scores), total=_flat(total), squares=_flat(squares))
            case Score():
                if task.grant:
                    with suppress(BudgetError):  # spent on a task that failed
                        await self.scores.ask(self.fm, task.body.prompts, task.body.stop)
                return self._score(task.body)
            case Newton():
                if task.body.words:
                    scores, labels = self.scores.words(task.body.prompts[0], task.body.stop)
                else:
                    scores, labels, _ = self.scores.get(task.body.prompts, task.body.stop)
                at = Calibration(weights=task.body.weights, bias=task.body.bias).shifted(self.scores.log_prior)
                return NewtonPart.of(sums(scores, labels, at))
            case Stack():
                return NewtonPart.of(self.arms.stack_sums(task.body.prompt, task.body.weights))
            case Risk():
                return risk_counts(self, task.body)
            case Adopt():
                return self._adopt(task.body)
            case Train():
                parameters = self.domain.trained(task.body.parameters, task.body.proximal)
                return Trained(n=len(self.data.train), parameters=_flat(parameters))
            case Teach():
                return await teach(self, task.body)
            case Distil():
                return await self._distil(task.body)
            case Unlearn():
                self.domain.unlearn()
                return Unlearned()
            case Evaluate():
                return await self._evaluate(task.body)
            case _:
                return await METHOD_TASKS[type(task.body)](self, task.body)

    def _vote(self, task: Vote) -> Votes:
        return Votes.of(self.domain.voter.predict_proba(task.texts))

    def _score(self, task: Score) -> Scored:
        bias = np.reshape(task.bias, (len(task.prompts), len(self.labels)))
        per_set = np.array(
            [
                self.scores.proper_scores(
                    [task.prompts[i] for i in s],
                    task.stop,
                    mix([(task.weights[i], bias[i]) for i in s]),
                    beside=task.prompts,
                    half=task.half,
                )
                for s in task.sets
            ]
        )
        diff = per_set - per_set[0] if task.differences else per_set[:0]
        return Scored(
            n=per_set.shape[1],
            total=_flat(per_set.sum(axis=1)),
            diff=_flat(diff.sum(axis=1)),
            diff_sq=_flat((diff**2).sum(axis=1)),
        )

    def _adopt(self, task: Adopt) -> Adopted:
        if self.folder is not None:
            task.prompt.save(self.folder / "prompt.json", about={"fm": self.fm.fm_id})
        if not self.labels:
            return Adopted(n_calibration=0)
        own = self.arms.calibrate(task.prompt)
        self._keep("calibration.json", {"prompt_id": task.prompt.prompt_id, **asdict(own)})
        self._keep(
            "stacker.json",
            {
                "prompt_id": task.prompt.prompt_id,
                "weights": task.stack,
                "domain_calibration": asdict(self.domain.calibration),
                "log_prior": self.scores.log_prior.tolist(),
            },
        )
        if task.cascade is not None:
            single = task.cascade.single
            if self.folder is not None:
                single.save(self.folder / "single.json")
            own_single = asdict(self.arms.calibrate(single))
            told = {"thresholds": task.cascade.thresholds, "target": task.cascade.target}
            self._keep("cascade.json", {"prompt_id": single.prompt_id, **told, **own_single})
        chosen = Chosen(choice="global", prompt=task.prompt)
        if task.offer is not None:
            chosen = self.arms.choose(task.prompt, task.offer)
        mine = self.arms.calibrate(chosen.prompt)
        if self.folder is not None:
            used = replace(chosen.prompt, weights=mine.weights, bias=mine.bias)
            used.save(self.folder / "personal.json", about={"choice": chosen.choice})
        if self.folder is not None:
            kept = self.folder / "domain_model.npz"
            save_model(kept, self.domain.model, self.domain.kind, self.labels, self.encoder.encoder_id)
        return Adopted(n_calibration=len(self.scores.get(task.prompt.prompts)[0]), choice=chosen.choice)

    async def _distil(self, task: Distil) -> Distilled:
        taught = await lessons_of(self, task)
        before, after = self.domain.learn(taught)
        return judged(before, after, self.data.train.labels, len(taught))

    async def _evaluate(self, task: Evaluate) -> Evaluated:
        answered = wrong = tuple[int, ...]()
        if self.labels:
            if task.arm == "cascade":
                passed, calls = await self.arms.cascade(task, self.fm)
                proba = passed.proba
                answered, wrong = passed.by_stage(self.data.test.labels)
            else:
                proba, calls = await self.arms.predict(task, self.fm)
            labels = self.data.test.labels
            values, errors = metrics.with_errors(proba, labels, client_rng(self._seed, self.client_id, 7))
            record = {"labels": labels.tolist(), "proba": np.round(proba, 6).tolist()}
        else:
            measured, calls = await self._held_out.measure(task, self.fm)
            values, errors = answers.with_errors(measured)
            record = {metric: np.round(each, 6).tolist() for metric, each in measured.items()}
        if self.folder is not None:
            # Per text, so that runs can be compared in pairs. It stays in the client's folder.
            texts = [hashlib.sha256(t.encode()).hexdigest()[:16] for t in self.data.test.texts]
            self._keep(f"evaluation/{task.arm}.json", {"texts": texts, **record})
        return Evaluated(
            n=len(self.data.test),
            values=values,
            errors=errors,
            calls_per_prediction=calls,
            answered=answered,
            wrong=wrong,
        )

    def _keep(self, name: str, content: object) -> None:
        if self.folder is not None:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(content) + "\n")


def _flat(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> tuple[float, ...]:
    return tuple(float(v) for v in np.ravel(values))


def _without_labels(texts: tuple[str, ...]) -> Labelled:
    return Labelled(texts=texts, labels=np.zeros(len(texts), dtype=np.int64))
