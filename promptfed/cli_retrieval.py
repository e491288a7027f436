"""The command line of retrieval: ``index`` for one's own index, ``search`` for those of a federation's clients."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from promptfed.cli_operators import Json
from promptfed.console import err_console, out_console, tell
from promptfed.errors import ConfigError, RunError
from promptfed.types import QueryForm, SearchMode

if TYPE_CHECKING:
    from promptfed.types import Hit
    from retrieval.index import LocalIndex

app = typer.Typer()
index_app = typer.Typer(no_args_is_help=True, help="Make, change and search an index of this machine's documents.")
app.add_typer(index_app, name="index")

Folder = Annotated[Path, typer.Argument(help="Folder of the index.")]
EncoderName = Annotated[str, typer.Option("--encoder", help="Sentence encoder, the one that the index was made with.")]
K = Annotated[int, typer.Option("-k", min=1, help="Passages for each query.")]
Mode = Annotated[SearchMode, typer.Option("--mode", help="By vectors, by words (BM25), or by both.")]
MINILM = "all-minilm-l6-v2"


@index_app.command("add")
def add_command(
    folder: Folder,
    source: Annotated[Path, typer.Argument(help="CSV file, or folder of .txt and .md files.")],
    id_column: Annotated[str, typer.Option("--id-column")] = "id",
    text_column: Annotated[str, typer.Option("--text-column")] = "text",
    encoder: EncoderName = MINILM,
    as_json: Json = False,
) -> None:
    """Add documents; those that are there already are replaced where they changed. Makes the index if there is none."""
    from dataclasses import asdict

    from retrieval.documents import read_documents
    from retrieval.encoder import load_encoder
    from retrieval.index import Added, LocalIndex

    documents = read_documents(source, id_column=id_column, text_column=text_column)
    reader = load_encoder(encoder)
    index = LocalIndex.open(folder, reader) if (folder / "current").exists() else LocalIndex(reader)
    added = index.add(documents)
    if added != Added(unchanged=added.unchanged) or not (folder / "current").exists():
        index.save(folder)
    if as_json:
        print(json.dumps({**asdict(added), "documents": len(index), "passages": index.n_passages}))  # noqa: T201
        return
    out_console.print(
        f"{added.new} new, {added.replaced} replaced, {added.unchanged} unchanged, {added.empty} empty and left out"
        f"{f' ({added.removed} of them had a text before, and are gone)' if added.removed else ''}; "
        f"{folder} has {len(index)} documents in {index.n_passages} passages",
        highlight=False,
        soft_wrap=True,
    )


@index_app.command("delete")
def delete_command(
    folder: Folder,
    doc_ids: Annotated[list[str], typer.Argument(help="Ids of documents.")],
    encoder: EncoderName = MINILM,
) -> None:
    """Delete documents, from the disk too."""
    index = _opened(folder, encoder)
    unknown = [doc_id for doc_id in doc_ids if doc_id not in index]
    n = index.delete(doc_ids)
    index.save(folder)
    out_console.print(f"{n} deleted; {folder} has {len(index)} documents", highlight=False)
    if unknown:
        err_console.print(f"not there: {', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}", markup=False)


@index_app.command("info")
def info_command(folder: Folder, encoder: EncoderName = MINILM, as_json: Json = False) -> None:
    """Say how large an index is and what it was made with."""
    index = _opened(folder, encoder)
    facts = {
        "documents": len(index),
        "passages": index.n_passages,
        "kind": index.kind,
        "encoder": index.encoder.encoder_id,
    }
    if as_json:
        print(json.dumps(facts))  # noqa: T201
        return
    table = Table("", "", show_header=False)
    for name, value in facts.items():
        table.add_row(name, str(value))
    out_console.print(table)


@index_app.command("search")
def index_search_command(
    folder: Folder,
    query: Annotated[str, typer.Argument(help="What is looked for.")],
    k: K = 5,
    mode: Mode = "dense",
    encoder: EncoderName = MINILM,
    as_json: Json = False,
) -> None:
    """Search one's own index."""
    (hits,) = _opened(folder, encoder).search([query], k, mode)
    _show(hits, as_json)


@app.command("search")
def search_command(
    config: Annotated[Path, typer.Argument(help="Configuration file of the server (TOML), with a network section.")],
    query: Annotated[str, typer.Argument(help="What is looked for.")],
    k: K = 5,
    n_ask: Annotated[int | None, typer.Option("--ask", min=1, help="Clients that are asked; all by default.")] = None,
    send: Annotated[
        QueryForm, typer.Option("--send", help="What of the query leaves: its text or its vector.")
    ] = "vector",
    mode: Mode = "dense",
    merge: Annotated[
        str,
        typer.Option(
            "--merge",
            help="How the owners' scores are made comparable: score (one encoder), cori or rank (several); by default "
            "score for dense searches, else cori.",
        ),
    ] = "",
    asker: Annotated[str, typer.Option("--as", help="Who asks, as the clients' policies know it.")] = "server",
    deadline: Annotated[float, typer.Option("--deadline", min=0.1, help="Seconds that the clients may take.")] = 30.0,
    wait: Annotated[
        float, typer.Option("--wait", min=0.1, help="Seconds to wait for clients that are not connected.")
    ] = 60.0,
    encoder: EncoderName = MINILM,
    as_json: Json = False,
) -> None:
    """Search the indices of a federation's clients, from where its server is. Needs no run; clients have to connect."""
    from promptfed.config import load_config

    checked = load_config(config)
    if checked.network is None:
        raise ConfigError(f"{config} has no [network]; one's own index is searched with promptfed index search")
    from retrieval.encoder import load_encoder
    from retrieval.merging import by_name

    chosen = by_name(merge) if merge else None
    from promptfed.network import search

    tell("promptfed")
    answers = search(
        checked,
        [query],
        k,
        encoder=load_encoder(encoder),
        n_ask=n_ask,
        send=send,
        mode=mode,
        merge=chosen,
        asker=asker,
        deadline_s=deadline,
        wait_s=wait,
    )
    if answers.silent and not answers.hits[0] and set(answers.silent) >= set(answers.asked[0]):
        raise RunError(f"no answer from: {', '.join(answers.silent)}")
    _show(answers.hits[0], as_json)
    if answers.silent:
        err_console.print(f"no answer from: {', '.join(answers.silent)}", markup=False)


def _opened(folder: Path, encoder: str) -> LocalIndex:
    from retrieval.encoder import load_encoder
    from retrieval.index import LocalIndex

    return LocalIndex.open(folder, load_encoder(encoder))


def _show(hits: Sequence[Hit], as_json: bool) -> None:
    if as_json:
        for hit in hits:
            fields = ("owner", "doc_id", "passage", "score", "text")
            print(json.dumps({name: getattr(hit, name) for name in fields}, ensure_ascii=False))  # noqa: T201
        return
    table = Table("score", "document", Column("text", overflow="fold", ratio=1))
    for hit in hits:
        name = f"{hit.owner}: {hit.doc_id}" if hit.owner else hit.doc_id
        table.add_row(f"{hit.score:.3f}", _plain(name), _plain(hit.text)[:200])
    out_console.print(table)
    if not hits:
        out_console.print("nothing found")


def _plain(text: str) -> Text:
    """On one line, without markup, and without what a terminal would take for a command."""
    return Text(" ".join("".join(c if c.isprintable() else " " for c in text).split()))
