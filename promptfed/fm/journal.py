"""Answers kept on disk by the hash of their request, for tests (record, replay) and for runs that resume.

A line is JSON: the key and the answer's fields. Neither prompts nor texts are written for label requests; what a
`TextRequest` made the model write is stored, since it is the answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel

from promptfed.errors import DataError
from promptfed.files import append_whole, cut_back
from promptfed.fm.base import BaseFM, WrappedFM
from promptfed.types import Capability, FMRequest, FMResponse


class _Line(BaseModel, extra="forbid"):
    """A line of the journal, field by field."""

    key: str
    answer: FMResponse


def request_key(fm_id: str, request: FMRequest) -> str:
    """SHA-256 of the model and everything that its answer depends on."""
    body = [fm_id, type(request).__name__, dataclasses.astuple(request)]
    return hashlib.sha256(
        json.dumps(body, ensure_ascii=False, default=bytes.hex).encode(errors="surrogatepass")
    ).hexdigest()[:32]


def read_journal(path: Path) -> dict[str, FMResponse]:
    """All answers in a journal. A last line that was cut off is ignored; any other bad line is a `DataError`."""
    answers: dict[str, FMResponse] = {}
    lines = io.BytesIO(path.read_bytes() if path.exists() else b"")
    for number, line in enumerate(lines, start=1):
        try:
            record = _Line.model_validate(json.loads(line.decode()))
        except ValueError:
            if not line.endswith(b"\n"):
                break
            raise DataError(
                f"{path}, line {number}: not an answer of this version; give the client another folder"
            ) from None
        answers[record.key] = record.answer
    return answers


def _line(key: str, answer: FMResponse) -> str:
    return json.dumps({"key": key, "answer": dataclasses.asdict(answer)}) + "\n"


class RecordingFM(WrappedFM):
    """Answers from the journal where it can; asks ``inner`` for the rest and writes that down before returning.

    What one `complete` brought is written at once, so a process that is killed leaves all of a batch in the journal or
    nothing. A last line that was cut off is removed from the journal, and its request asked again.
    """

    def __init__(self, inner: BaseFM, path: Path) -> None:
        super().__init__(inner)
        self._path = path
        if path.exists():
            cut_back(path)
        self._answers = read_journal(path)
        self._asks = True

    @contextmanager
    def only(self) -> Iterator[None]:
        """Answer from the journal only: what is not in it is a failed item, as it was when it was asked."""
        self._asks = False
        try:
            yield
        finally:
            self._asks = True

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        keys = [request_key(self.fm_id, r) for r in requests]
        missing = {k: r for k, r in zip(keys, requests, strict=True) if k not in self._answers}
        if self._asks and missing:
            fresh = dict(zip(missing, await self._inner.complete(list(missing.values())), strict=True))
        else:
            fresh = dict.fromkeys(missing, FMResponse(error="not in the journal"))
        answered = {key: answer for key, answer in fresh.items() if answer.error is None}
        if answered:
            append_whole(self._path, "".join(_line(key, answer) for key, answer in answered.items()).encode())
            self._answers |= answered
        return [self._answers.get(k) or fresh[k] for k in keys]


class ReplayFM(BaseFM):
    """Answers from a journal only. A request that was never recorded is a failed item, not a new call."""

    def __init__(self, path: Path, fm_id: str) -> None:
        self._answers, self._fm_id = read_journal(path), fm_id

    @property
    def fm_id(self) -> str:
        return self._fm_id

    @property
    def capabilities(self) -> frozenset[Capability]:
        return frozenset({Capability.TEXT, Capability.LABEL_LOGPROBS})

    async def complete(self, requests: Sequence[FMRequest]) -> list[FMResponse]:
        missing = FMResponse(error="not in the journal")
        return [self._answers.get(request_key(self.fm_id, r), missing) for r in requests]
