"""A client on a machine of its own: puts its files, its models and Flower's node together."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from clients.data import Rows, read_rows, read_texts
from clients.host import ClientHost
from promptfed.errors import ConfigError
from promptfed.federation.flower.node import serve_node
from promptfed.folder import claimed
from promptfed.registry import load_fm
from retrieval.encoder import load_encoder
from retrieval.index import LocalIndex
from retrieval.owner import IndexOwner, Policy

log = logging.getLogger("promptfed.client")


def join_federation(
    client_id: str,
    *,
    train: Path | None,
    test: Path | None,
    columns: tuple[str, str],
    fm: str,
    encoder: str,
    folder: Path,
    server: str,
    key: Path | None = None,
    certificates: Path | None = None,
    insecure: bool = False,
    prices: Path | None = None,
    cache: Path | None = None,
    index: Path | None = None,
    policy: Policy | None = None,
    renew_centroid: bool = False,
    unlabelled: Path | None = None,
    domain_model: str = "linear",
) -> None:
    """Serve ``server``'s runs with the texts of ``train`` and ``test`` until stopped. ``columns``: text and label. The
    FM may tell the domain model what ``unlabelled`` texts are about. With an ``index``, answer searches of it as far as
    ``policy`` lets them.

    Raises `DataError` and `ConfigError` before anything is connected, and `ConfigError` if the server refuses the key.
    """
    text_column, label_column = columns
    if train is None and unlabelled is None:
        raise ConfigError(
            "this client has no text: give labelled ones (--data), unlabelled ones (--unlabelled), or both"
        )

    def rows(path: Path | None) -> Rows:
        if path is None:
            return []
        return read_rows(path, client_column="", text_column=text_column, label_column=label_column, client=client_id)

    training, held_out = rows(train), rows(test)
    besides = read_texts(unlabelled, text_column=text_column) if unlabelled is not None else []
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # a new one is for its owner alone: words are in it
    with claimed(folder):
        model = load_fm(fm, prices=prices, cache=cache)
        reader = load_encoder(encoder)
        owner = None
        if index is not None:
            owner = IndexOwner(client_id, LocalIndex.open(index, reader), policy, folder=folder / "index")
            owner.prepare(renew=renew_centroid)
        host = ClientHost(
            client_id,
            training,
            held_out,
            model,
            reader,
            folder,
            owner,
            unlabelled=besides,
            domain_model=domain_model,
        )
        host.warm_up()
        log.info("%s: %s is ready; connecting to %s", client_id, fm, server)
        asyncio.run(
            serve_node(
                host.handle,
                client_id=client_id,
                server=server,
                folder=folder / "flower",
                root_certificates=certificates,
                private_key=key,
                insecure=insecure,
            )
        )
