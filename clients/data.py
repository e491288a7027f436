"""A client's private data: read once, checked at the boundary, put in the order in which it will be scored."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from promptfed.errors import DataError
from promptfed.tables import records
from promptfed.types import IntArray

# A label or a client's id: one line, without control characters, short.
_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f]{1,100}")
# An error shows no more of a client's id, or of a label, than so many characters.
_SHOWN = 40
# Nor more labels than so many.
_LABELS_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """Texts and label indices of equal length. In a generation task there are no labels, but an answer a text."""

    texts: tuple[str, ...] = field(repr=False)
    labels: IntArray
    answers: tuple[str, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientData:
    """What one client holds. ``n_dropped`` counts rows left out because their text was empty. Its FM may tell its
    domain model what ``unlabelled`` texts are about (`clients.distillation`)."""

    client_id: str
    train: Labelled
    test: Labelled
    unlabelled: tuple[str, ...] = field(default=(), repr=False)
    n_dropped: int = 0


Rows = list[tuple[str, str, str]]  # client, text, label or answer


def read_rows(
    path: Path, *, client_column: str, text_column: str, label_column: str, client: str | None = None
) -> Rows:
    """Rows (client, text, label) of a CSV file in UTF-8, gzipped if it ends in .gz.

    ``client`` stands in for a missing client column. Raises `DataError` naming file and row or column, never a text;
    also for a label that is long or has several lines, and for a client's id that can't name a folder.
    """
    wanted = [text_column, label_column] + ([client_column] if client is None else [])
    rows: Rows = []
    for number, record in records(path, wanted):
        label = record[label_column].strip()
        if not label:
            raise DataError(f"{path}, row {number}: column {label_column!r} is empty; expected a label or answer")
        if not _NAME.fullmatch(label):
            raise DataError(
                f"{path}, row {number}: column {label_column!r} holds no label or short answer but {len(label)} "
                "characters or several lines; is it the right column, and is every quote closed?"
            )
        owner = client if client is not None else record[client_column].strip()
        if not owner:
            raise DataError(f"{path}, row {number}: column {client_column!r} is empty; expected a client's name")
        _check_client_id(owner, f"{path}, row {number}: ")
        rows.append((owner, record[text_column], label))
    return rows


def read_texts(path: Path, *, text_column: str) -> list[str]:
    """The texts of an unlabelled (public) CSV file; empty ones are left out."""
    return [record[text_column] for _, record in records(path, [text_column]) if record[text_column].strip()]


def _check_client_id(client_id: str, place: str = "") -> None:
    """Raise `DataError` unless the client's folder can have the id as its name."""
    is_name = _NAME.fullmatch(client_id) is not None and client_id not in (".", "..")
    if not is_name or set(client_id) & set("/\\") or len(client_id.encode()) > 255:
        raise DataError(
            f"{place}client id {client_id[:_SHOWN]!r} can't name a folder; expected at most 100 characters (255 bytes) "
            "without /, \\ or control characters"
        )


def assemble(
    train: Rows,
    test: Rows,
    labels: Sequence[str],
    seed: int,
    *,
    unlabelled: Sequence[tuple[str, str]] = (),
    max_labels: int | None = None,
) -> list[ClientData]:
    """One `ClientData` a client, sorted by id, training texts in scoring order (`scoring_order`).

    Without ``labels`` the task is generation: what stands in their column are answers. ``unlabelled``: texts (client,
    text) besides. With ``max_labels``, only the first so many training texts of a client keep their label, and the
    others are unlabelled.

    Rows with an empty text are dropped and counted. A client needs a text in ``train`` or ``unlabelled``: one without
    is a `DataError`, and so are an unknown label and a client id that can't name a folder.
    """
    index = {label: k for k, label in enumerate(labels)}
    more: dict[str, list[str]] = {client: [] for client in (*(c for c, _, _ in train), *(c for c, _ in unlabelled))}
    for client, text in unlabelled:
        if text.strip():
            more[client].append(text)
    for name, rows in (("train", train), ("test", test)):
        if labels:
            check_labels(name, {label for _, _, label in rows}, labels)
    clients = sorted(more)
    for client in clients:
        _check_client_id(client)
    strangers = sorted({client for client, _, _ in test} - set(clients))
    if strangers:
        raise DataError(f"test has clients that train lacks: {', '.join(s[:_SHOWN] for s in strangers)}")
    of_client = {client: (list[tuple[str, str]](), list[tuple[str, str]]()) for client in clients}
    n_dropped = dict.fromkeys(clients, 0)
    for part, rows in enumerate((train, test)):
        for client, text, label in rows:
            if text.strip():
                of_client[client][part].append((text, label))
            else:
                n_dropped[client] += 1
    out = []
    for client, (mine, held_out) in of_client.items():
        if not mine and not more[client]:
            raise DataError(f"client {client[:_SHOWN]!r} has no training text left after empty ones were dropped")
        order = scoring_order(np.array([index.get(y, 0) for _, y in mine]), client_rng(seed, client))
        ordered = [mine[i] for i in order]
        out.append(
            ClientData(
                client_id=client,
                train=_labelled(ordered[:max_labels], index),
                test=_labelled(held_out, index),
                unlabelled=(*(text for text, _ in ordered[len(ordered[:max_labels]) :]), *more[client]),
                n_dropped=n_dropped[client],
            )
        )
    return out


def check_labels(name: str, found: Collection[str], expected: Collection[str]) -> None:
    """Raise `DataError` for labels that are not expected. It quotes few, and none that may be texts: of another column
    than that of the labels, for one."""
    unknown = sorted(set(found) - set(expected))
    if not unknown:
        return
    quoted = [label for label in unknown if len(label) <= _SHOWN and len(label.split()) <= 3]
    if len(quoted) < len(unknown) or len(unknown) > _LABELS_SHOWN:
        raise DataError(
            f"{name} has {len(unknown)} labels that are not among {', '.join(expected)}: is it the right column?"
        )
    raise DataError(f"{name} has labels {', '.join(quoted)}; expected {', '.join(expected)}")


def client_rng(seed: int, client_id: str, *stream: int) -> np.random.Generator:
    """A client's own generator: the same for the same id in any federation."""
    digest = int.from_bytes(hashlib.sha256(client_id.encode()).digest()[:8], "big")
    return np.random.default_rng(np.random.SeedSequence([seed, digest, *stream]))


def scoring_order(labels: IntArray, rng: np.random.Generator) -> IntArray:
    """A shuffle in which every prefix has about the label proportions of the whole, so that few texts say more."""
    place = np.empty(len(labels))
    for label in np.unique(labels):
        mine = rng.permutation(np.flatnonzero(labels == label))
        place[mine] = (np.arange(len(mine)) + rng.random()) / len(mine)
    return np.argsort(place, kind="stable")


def _labelled(pairs: Sequence[tuple[str, str]], index: Mapping[str, int]) -> Labelled:
    return Labelled(
        texts=tuple(text for text, _ in pairs),
        labels=np.array([index[y] for _, y in pairs if index], dtype=np.int64),
        answers=() if index else tuple(answer for _, answer in pairs),
    )
