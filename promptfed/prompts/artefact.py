"""The shared result of a run: a weighted set of prompts with a pooled calibration, versioned and content-hashed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from promptfed.errors import DataError, PromptfedError
from promptfed.files import write_whole
from promptfed.prompts.answers import vote
from promptfed.prompts.calibration import Calibration
from promptfed.prompts.template import PromptTemplate, content_hash
from promptfed.types import LabelScorer

SCHEMA_VERSION = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The most probable label and all label probabilities; of prompts that generate, ``answer`` alone. What the FM
    failed on has neither."""

    label: str | None = None
    proba: dict[str, float]
    answer: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """``logits = sum_j weights[j] * centred label scores of prompts[j] + bias``, in the order of ``labels``.

    The prompt that is best by itself comes first. Prompts that generate have no labels and no bias: the answer is what
    most of ``weights`` is behind (`promptfed.prompts.answers.vote`).
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  (read by pydantic where a message carries this)

    labels: tuple[str, ...]
    prompts: tuple[PromptTemplate, ...]
    weights: tuple[float, ...]
    bias: tuple[float, ...]

    def __post_init__(self) -> None:
        # The numbers that the wire carries (32 bits), so that the id is the same everywhere.
        for name in ("weights", "bias"):
            rounded = np.asarray(getattr(self, name), dtype=np.float32)
            object.__setattr__(self, name, tuple(rounded.tolist()))
        if not self.prompts or len(self.weights) != len(self.prompts):
            raise DataError(f"a prompt set needs one weight a prompt; got {len(self.weights)} for {len(self.prompts)}")
        if len(self.bias) != len(self.labels) or any(len(p.words) != len(self.labels) for p in self.prompts):
            raise DataError(f"a prompt set for {len(self.labels)} labels needs that many biases and label words")

    @property
    def pooled(self) -> Calibration:
        """The calibration that goes with it, over all clients' texts."""
        return Calibration(weights=self.weights, bias=self.bias)

    @property
    def is_calibrated(self) -> bool:
        """Whether weights and bias were fitted; if not, scores are taken as the FM gives them."""
        return any(weight != 1.0 for weight in self.weights) or any(self.bias)

    @property
    def prompt_id(self) -> str:
        """Content hash; the name under which a prompt is cited."""
        return content_hash(self._record(), 16)

    def _record(self) -> dict[str, Any]:
        """As JSON has it; a prompt without a soft part does not mention one."""
        record: dict[str, Any] = TypeAdapter(PromptSet).dump_python(self, mode="json")
        for prompt in record["prompts"]:
            if prompt["soft"] is None:
                del prompt["soft"]
        return record

    def predict(
        self, texts: Sequence[str], *, fm: LabelScorer, calibration: Calibration | None = None
    ) -> list[Prediction]:
        """One `Prediction` a text. ``calibration`` is a client's own; the pooled one is the default.

        Costs one FM call a text and prompt. A text that the FM failed on has ``label`` and ``answer`` None.
        """
        if not self.labels:
            if calibration is not None:
                raise DataError("prompts that generate answers have no calibration")
            said = zip(*(fm.write_answers(p, texts) for p in self.prompts), strict=True)
            return [Prediction(proba={}, answer=vote(answers, self.weights)) for answers in said]
        return self.predict_from([fm.score_labels(p, texts) for p in self.prompts], calibration)

    def predict_from(
        self, scores: Sequence[np.ma.MaskedArray[Any, Any]], calibration: Calibration | None = None
    ) -> list[Prediction]:
        """`predict` where the label scores (n, n_labels) of each prompt are there already."""
        masked = np.ma.stack(scores, axis=1)
        used = calibration or self.pooled
        if len(used.weights) != len(self.prompts) or len(used.bias) != len(self.labels):
            raise DataError(f"the calibration is for {len(used.weights)} prompts, the set has {len(self.prompts)}")
        failed = np.atleast_1d(np.ma.getmaskarray(masked).any(axis=(1, 2)))
        proba = used.predict_proba(np.asarray(masked.data))
        return [
            Prediction(label=None, proba={})
            if bad
            else Prediction(
                label=self.labels[int(row.argmax())], proba=dict(zip(self.labels, map(float, row), strict=True))
            )
            for row, bad in zip(proba, failed, strict=True)
        ]

    def save(self, path: Path, about: dict[str, Any] | None = None) -> None:
        """Write prompt.json. ``about`` is stored beside it and not hashed (method, seed, FM)."""
        record = {"schema_version": SCHEMA_VERSION, "prompt_id": self.prompt_id, **self._record(), "about": about or {}}
        write_whole(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> PromptSet:
        """Read prompt.json, or the one in a run folder; raises `DataError` if it is missing, of another version or
        changed by hand."""
        path = Path(path)
        if path.is_dir():
            path = path / "prompt.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            version, claimed = record["schema_version"], record["prompt_id"]
            if version != SCHEMA_VERSION:
                raise DataError(f"schema_version {version}; this promptfed reads {SCHEMA_VERSION}")
            keys: Sequence[str] = ("labels", "prompts", "weights", "bias")
            loaded: PromptSet = TypeAdapter(cls).validate_json(json.dumps({k: record[k] for k in keys}))
        except OSError as error:
            raise DataError(f"{path}: can't be read ({error.strerror})") from None
        except PromptfedError as error:
            raise DataError(f"{path}: {error}") from None
        except (ValueError, KeyError, TypeError, ValidationError) as error:
            raise DataError(f"{path}: not a prompt.json ({type(error).__name__})") from None
        if loaded.prompt_id != claimed:
            raise DataError(f"{path}: the content is {loaded.prompt_id} but the file says {claimed}; it was changed")
        return loaded
