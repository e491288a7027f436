"""The command line of those who operate a federation: ``server``, ``client``, ``keys``, ``serve``, ``cache``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from promptfed.console import out_console, show_run, tell
from promptfed.errors import ConfigError
from promptfed.ports import free_port

app = typer.Typer()
cache_app = typer.Typer(no_args_is_help=True, help="Look at and empty a file of remembered FM answers (fm.cache).")
keys_app = typer.Typer(no_args_is_help=True, help="Make keys and certificates for a federation over a network.")
app.add_typer(cache_app, name="cache")
app.add_typer(keys_app, name="keys")

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
# Options of `client` that say how its index is shared.
ABOUT_INDEX = ("share", "accept", "hourly_queries", "centroid_epsilon", "max_centroid_epsilon", "renew_centroid")


@app.command("server")
def server_command(
    config: Annotated[
        Path, typer.Argument(help="Configuration file (TOML) that has a network section (docs/deploy.md).")
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; runs/NAME by default.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a key: section.key=value.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing run folder.")] = False,
) -> None:
    """Run the server of a federation whose clients are elsewhere, over Flower, and write a run folder with a report."""
    from promptfed.config import load_config
    from promptfed.network import serve

    checked = load_config(config, overrides or [])
    folder = out or Path("runs") / config.stem
    tell("promptfed")
    show_run(lambda listeners: serve(checked, out=folder, force=force, listeners=listeners), folder, "")


@app.command("client")
def client_command(
    context: typer.Context,
    client_id: Annotated[str, typer.Option("--id", help="This client's id, as the server knows it.")],
    server: Annotated[str, typer.Option("--server", help="Where the server is, HOST:PORT.")],
    data: Annotated[
        Path | None, typer.Option("--data", help="CSV file of this client's training texts, with labels.")
    ] = None,
    test: Annotated[
        Path | None,
        typer.Option(
            "--test",
            help="Labelled texts kept out of tuning, to measure on; without them this client is not measured.",
        ),
    ] = None,
    unlabelled: Annotated[
        Path | None,
        typer.Option("--unlabelled", help="More texts of this client, without labels, for the FM to teach from."),
    ] = None,
    fm: Annotated[str, typer.Option("--fm", help="Foundation model that may read the texts, KIND:NAME.")] = (
        "embedded:smollm2-135m-instruct"
    ),
    domain_model: Annotated[
        str,
        typer.Option("--domain-model", help="Kind of the small model that is trained here (docs/domain-models.md)."),
    ] = "linear",
    encoder: Annotated[
        str, typer.Option("--encoder", help="Sentence encoder of the domain model; the same at all clients.")
    ] = "all-minilm-l6-v2",
    folder: Annotated[
        Path | None,
        typer.Option("--folder", help="Folder for what this client keeps (private); promptfed-ID by default."),
    ] = None,
    key: Annotated[
        Path | None, typer.Option("--key", help="This client's private key, from: promptfed keys client ID.")
    ] = None,
    certificates: Annotated[
        Path | None,
        typer.Option("--root-certificates", help="The server's ca.pem; the system's certificates by default."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No encryption and no key: for tests on one machine only.")
    ] = False,
    text_column: Annotated[str, typer.Option("--text-column")] = "text",
    label_column: Annotated[str, typer.Option("--label-column")] = "label",
    prices: Annotated[Path | None, typer.Option("--prices", help="TOML file with what the FM's tokens cost.")] = None,
    cache: Annotated[Path | None, typer.Option("--cache", help="SQLite file to remember the FM's answers in.")] = None,
    index: Annotated[
        Path | None, typer.Option("--index", help="Index that others may search, from: promptfed index add.")
    ] = None,
    share: Annotated[
        str, typer.Option("--share", help="What askers see of a passage: nothing, scores, snippets or documents.")
    ] = "snippets",
    accept: Annotated[str, typer.Option("--accept", help="Queries taken as: text, vector, or text,vector.")] = (
        "text,vector"
    ),
    hourly_queries: Annotated[
        int | None,
        typer.Option("--hourly-queries", min=1, help="Queries of the index an hour that askers may send, together."),
    ] = None,
    centroid_epsilon: Annotated[
        float,
        typer.Option("--centroid-epsilon", help="Privacy of the centroid that routes queries; 0: none is given out."),
    ] = 8.0,
    max_centroid_epsilon: Annotated[
        float | None,
        typer.Option("--max-centroid-epsilon", help="What all its releases may cost together; one release by default."),
    ] = None,
    renew_centroid: Annotated[
        bool, typer.Option("--renew-centroid", help="Release a new centroid if the documents have changed.")
    ] = False,
) -> None:
    """Take part in a federation with texts that stay here. Runs until it is stopped."""
    from typing import Any, cast

    from promptfed.site import join_federation
    from retrieval.owner import Policy

    for name in ABOUT_INDEX:
        source = context.get_parameter_source(name)
        if index is None and source is not None and source.name != "DEFAULT":
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} is about an index that others may search: it needs --index")
    policy = Policy(
        shares=cast(Any, share),
        accepts=cast(Any, tuple(form.strip() for form in accept.split(","))),
        hourly_queries=hourly_queries,
        epsilon=centroid_epsilon or None,
        max_epsilon=centroid_epsilon if max_centroid_epsilon is None else max_centroid_epsilon,
    )
    tell("promptfed")
    join_federation(
        client_id,
        train=data,
        test=test,
        columns=(text_column, label_column),
        fm=fm,
        encoder=encoder,
        folder=folder or Path(f"promptfed-{client_id}"),
        server=server,
        key=key,
        certificates=certificates,
        insecure=insecure,
        prices=prices,
        cache=cache,
        index=index,
        policy=policy,
        renew_centroid=renew_centroid,
        unlabelled=unlabelled,
        domain_model=domain_model,
    )


@app.command("serve", context_settings={"allow_extra_args": True})
def serve_command(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="What vLLM is to serve: a packaged model's name, a folder, or owner/model on a hub. With embedded: "
            "before it, promptfed's own engine serves it. What stands behind -- goes to vLLM as it is."
        ),
    ],
    host: Annotated[
        str, typer.Option("--host", help="For embedded models; off this machine's own addresses a key is required.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes any free one.")] = 8700,
    api_key_env: Annotated[
        str | None,
        typer.Option("--api-key-env", help="Variable that holds the API key; PROMPTFED_API_KEY, if set, by default."),
    ] = None,
    join: Annotated[
        bool,
        typer.Option("--join", help="For embedded models: batches that requests share; faster, less reproducible."),
    ] = False,
    python: Annotated[
        Path | None, typer.Option("--python", help="Interpreter that has vLLM; .venv-vllm here by default.")
    ] = None,
    soft_prompts: Annotated[
        bool, typer.Option("--soft-prompts", help="Let vLLM take prompt embeddings; for callers who are trusted.")
    ] = False,
    wait: Annotated[float, typer.Option("--wait", min=1, help="Seconds that vLLM may take to start.")] = 900.0,
    print_command: Annotated[
        bool, typer.Option("--print-command", help="Print what would be started, for vLLM; start nothing.")
    ] = False,
) -> None:
    """Serve a foundation model to other processes over HTTP; use it as openai:http://HOST:PORT/v1#MODEL."""
    if ":" in model:
        from promptfed.fm.serve import serve
        from promptfed.registry import load_fm

        if context.args or python or soft_prompts or print_command:
            raise ConfigError(f"{model} is served without vLLM: --python, --soft-prompts, --print-command are for vLLM")
        serve(lambda: load_fm(model), host=host, port=port, api_key_env=api_key_env, join=join)
        return
    from promptfed.fm.vllm_server import find_vllm, plan, run_server, this_machine

    if host != "127.0.0.1" or api_key_env or join:
        raise ConfigError(
            "--host, --api-key-env and --join are for embedded models. vLLM's own key (PROMPTFED_API_KEY) guards only "
            "a part of its paths, so it listens on this machine alone: put a proxy in front (docs/fm-server.md)"
        )
    interpreter, distribution = find_vllm(python)
    launch = plan(
        model,
        this_machine(),
        python=interpreter,
        distribution=distribution,
        port=port or free_port(),
        soft_prompts=soft_prompts,
        more=context.args,
    )
    if print_command:
        print(launch.as_shell())  # noqa: T201
        return
    run_server(launch, wait_s=wait, tell=lambda line: print(line, flush=True))  # noqa: T201


@cache_app.command("stats")
def cache_stats_command(file: Annotated[Path, typer.Argument(help="The cache.")], as_json: Json = False) -> None:
    """How many answers of which model it holds, and how large it is."""
    from dataclasses import asdict

    from promptfed.fm.cache import cache_stats

    stats = cache_stats(file)
    if as_json:
        print(json.dumps(asdict(stats)))  # noqa: T201
        return
    table = Table("foundation model", "answers", title=f"{file}, {stats.n_bytes / 2**20:.1f} MB")
    for fm_id, n in stats.answers.items():
        table.add_row(fm_id, str(n))
    out_console.print(table)


@cache_app.command("purge")
def cache_purge_command(
    file: Annotated[Path, typer.Argument(help="The cache.")],
    fm: Annotated[str | None, typer.Option("--fm", help="Only answers of this model; its id, as in stats.")] = None,
    days: Annotated[float | None, typer.Option("--older-than", min=0, help="Only answers older than so many days.")] = (
        None
    ),
) -> None:
    """Remove remembered answers, so that they are gone from the file as well."""
    from promptfed.fm.cache import purge

    n = purge(file, fm_id=fm, older_than_s=None if days is None else days * 86_400)
    out_console.print(f"{n} answers removed from {file}", highlight=False)


@keys_app.command("server")
def keys_server_command(
    hosts: Annotated[list[str], typer.Argument(help="Names or addresses that clients reach the server by.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the files.")] = Path("keys"),
) -> None:
    """A certificate for the server, and the root certificate that clients check it with."""
    from promptfed.federation.flower.certificates import make_server_certificate

    files = make_server_certificate(_new_folder_of(out, "server.key", "server.pem", "ca.pem"), hosts)
    out_console.print(f"server: {files.certificate}, {files.private_key} (keep it here)", highlight=False)
    out_console.print(f"clients: --root-certificates {files.ca}", highlight=False)


@keys_app.command("client")
def keys_client_command(
    name: Annotated[str, typer.Argument(help="The client's id.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the files.")] = Path("keys"),
) -> None:
    """A client's key pair. The public half goes to the server's operator, the private half nowhere."""
    from promptfed.federation.flower.certificates import make_node_key

    private = _new_folder_of(out, name, f"{name}.pub") / name
    public = make_node_key(private)
    out_console.print(f"client: --key {private} (keep it here)\nserver: {public}", highlight=False)


def _new_folder_of(folder: Path, *names: str) -> Path:
    """``folder``, made; raises `ConfigError` if it holds one of ``names`` already: a key in use must not be lost."""
    if taken := [folder / n for n in names if (folder / n).exists()]:
        raise ConfigError(f"{taken[0]} exists; choose another folder, or remove it if nobody uses it any more")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
