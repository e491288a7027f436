"""The command line: ``promptfed run``, ``resume``, ``server``, ``client``, ``keys``, ``eval``, ``transfer``,
``predict``, ``report``, ``compare``, ``doctor``, ``methods``, ``serve``, ``cache``.

Exit codes: 0 done, 2 something that the caller can mend, 3 a run that failed. Errors go to stderr without a traceback.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from promptfed.console import (
    SIMULATION,
    err_console,
    out_console,
    print_estimate,
    show_method,
    show_methods,
    show_run,
    tell,
)
from promptfed.errors import ConfigError, DataError, PromptfedError
from promptfed.ports import free_port

if TYPE_CHECKING:
    from promptfed.prompts.artefact import PromptSet
    from promptfed.prompts.calibration import Calibration
    from promptfed.types import IntArray

app = typer.Typer(
    name="promptfed",
    help="Federated tuning of foundation models that nobody may fine-tune: prompts travel, text stays.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Personal = Annotated[
    bool, typer.Option("--personal", help="With --client: the prompts that this client chose for itself.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


def main() -> None:
    """Entry point: turns promptfed's own errors into a message and an exit code."""
    try:
        app()
    except PromptfedError as error:
        err_console.print(f"[bold red]error:[/] {_plain(error)}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except OSError as error:
        # A folder that can't be written, a disk that is full, a key that can't be read.
        err_console.print(f"error: {error.filename or 'the system'}: {error.strerror or error}", markup=False)
        sys.exit(3)
    except KeyboardInterrupt:
        is_run = set(sys.argv[1:2]) & {"run", "resume", "server"}
        err_console.print("stopped" + ("; a run goes on with: promptfed resume FOLDER" if is_run else ""))
        sys.exit(130)
    except Exception as error:
        if os.environ.get("PROMPTFED_TRACEBACK"):
            raise
        # What another library says may quote a text.
        err_console.print(
            f"error: {type(error).__name__}, which promptfed did not expect; PROMPTFED_TRACEBACK=1 shows where it came "
            "from (and may show texts)",
            markup=False,
        )
        sys.exit(3)


@app.command("run")
def run_command(
    config: Annotated[Path, typer.Argument(help="Configuration file (TOML).")],
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; runs/NAME by default.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a key: section.key=value.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing run folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Estimate calls, time and money; run nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Tune one prompt set over all clients, in this process (a simulation), and write a run folder with a report."""
    from promptfed.app import estimate, run
    from promptfed.config import load_config

    checked = load_config(config, overrides or [])
    if dry_run:
        print_estimate(estimate(checked), as_json)
        return
    folder = out or Path("runs") / config.stem
    if as_json:
        result = run(checked, out=folder, force=force)
        print(json.dumps(result.summary))  # noqa: T201
        return
    show_run(lambda listeners: run(checked, out=folder, force=force, listeners=listeners), folder)


@app.command("resume")
def resume_command(
    folder: Annotated[Path, typer.Argument(help="Folder of a run that was stopped or killed.")],
    as_json: Json = False,
) -> None:
    """Go on with a run where it stopped; no FM call that was answered is made again."""
    from promptfed.app import resume
    from promptfed.folder import config_of

    if as_json:
        print(json.dumps(resume(folder).summary))  # noqa: T201
        return
    is_network = config_of(folder).network is not None
    if is_network:
        tell("promptfed")
    show_run(lambda listeners: resume(folder, listeners=listeners), folder, "" if is_network else SIMULATION)


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
    data: Annotated[Path, typer.Option("--data", help="CSV file of this client's training texts.")],
    client_id: Annotated[str, typer.Option("--id", help="This client's id, as the server knows it.")],
    server: Annotated[str, typer.Option("--server", help="Where the server is, HOST:PORT.")],
    test: Annotated[
        Path | None,
        typer.Option(
            "--test",
            help="Labelled texts kept out of tuning, to measure on; without them this client is not measured.",
        ),
    ] = None,
    fm: Annotated[str, typer.Option("--fm", help="Foundation model that may read the texts, KIND:NAME.")] = (
        "embedded:smollm2-135m-instruct"
    ),
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
) -> None:
    """Take part in a federation with texts that stay here. Runs until it is stopped."""
    from promptfed.site import join_federation

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
    )


cache_app = typer.Typer(no_args_is_help=True, help="Look at and empty a file of remembered FM answers (fm.cache).")
app.add_typer(cache_app, name="cache")


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


keys_app = typer.Typer(no_args_is_help=True, help="Make keys and certificates for a federation over a network.")
app.add_typer(keys_app, name="keys")


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


@app.command("eval")
def eval_command(
    prompt: Annotated[Path, typer.Argument(help="prompt.json or a run folder.")],
    data: Annotated[Path, typer.Argument(help="Labelled CSV file.")],
    fm: Annotated[str, typer.Option("--fm", help="Foundation model, KIND:NAME.")] = "embedded:smollm2-135m-instruct",
    client: Annotated[str | None, typer.Option("--client", help="Use this client's calibration (run folder).")] = None,
    personal: Personal = False,
    text_column: Annotated[str, typer.Option("--text-column")] = "text",
    label_column: Annotated[str, typer.Option("--label-column")] = "label",
    as_json: Json = False,
) -> None:
    """Measure a tuned prompt on texts with labels, or with answers."""
    import numpy as np

    from evaluators import answers, metrics
    from promptfed.registry import load_fm

    tuned, calibration = _tuned(prompt, client, personal)
    rows = _rows(data, text_column, label_column)
    predicted = tuned.predict([text for text, _ in rows], fm=load_fm(fm), calibration=calibration)
    if tuned.labels:
        labels = _label_indices(data, rows, tuned)
        uniform = {label: 1.0 / len(tuned.labels) for label in tuned.labels}
        proba = np.array([[(p.proba or uniform)[label] for label in tuned.labels] for p in predicted])
        values, errors = metrics.with_errors(proba, labels, np.random.default_rng(0))
    else:
        values, errors = answers.with_errors(answers.per_text([p.answer for p in predicted], [y for _, y in rows]))
    failed = sum(p.label is None and p.answer is None for p in predicted)
    if as_json:
        body = {name: {"value": values[name], "se": errors[name]} for name in values}
        print(json.dumps({"n": len(rows), "n_failed": failed, "prompt_id": tuned.prompt_id, "metrics": body}))  # noqa: T201
        return
    table = Table("metric", "value", "95% interval", title=f"{tuned.prompt_id} on {len(rows)} texts")
    for name, value in values.items():
        half = 1.96 * errors[name]
        table.add_row(name, f"{value:.3f}", f"{value - half:.3f} to {value + half:.3f}")
    out_console.print(table)
    if failed:
        out_console.print(
            f"{failed} texts failed at the FM and count as {'uniform guesses' if tuned.labels else 'wrong'}"
        )


@app.command("transfer")
def transfer_command(
    prompt: Annotated[Path, typer.Argument(help="prompt.json or a run folder.")],
    data: Annotated[Path, typer.Argument(help="Labelled CSV file.")],
    fm: Annotated[str, typer.Option("--fm", help="The other foundation model, KIND:NAME.")],
    origin: Annotated[
        str | None,
        typer.Option("--from", help="The model that the prompt was tuned on; by default the one that it names."),
    ] = None,
    text_column: Annotated[str, typer.Option("--text-column")] = "text",
    label_column: Annotated[str, typer.Option("--label-column")] = "label",
    as_json: Json = False,
) -> None:
    """Measure what a tuned prompt is worth at another foundation model, as it is and recalibrated without labels."""
    from dataclasses import asdict

    from evaluators.transfer import ORIGIN, RECALIBRATED, STORED, transfer
    from promptfed.registry import load_fm
    from promptfed.runs import read_about

    tuned, _ = _tuned(prompt, None, False)
    if not tuned.labels:
        raise ConfigError(f"{prompt} generates answers: measure it at the other model with promptfed eval --fm {fm}")
    rows = _rows(data, text_column, label_column)
    texts, labels = [text for text, _ in rows], _label_indices(data, rows, tuned)
    named, note = str(read_about(prompt).get("fm", "")), ""
    other, model = load_fm(fm), None
    try:
        # An id is an address and what tells weights apart.
        model = load_fm(origin or named.partition("@")[0])
    except PromptfedError as error:
        if origin is not None:
            raise
        note = f"not measured at {named or 'the model that it was tuned on'}: {error}; name that model in --from"
    if model is not None and named and model.fm_id != named:
        note = f"tuned on {named}, compared with {model.fm_id}: other weights"
    result = transfer(tuned, texts, labels, other, model)
    if as_json:
        differences = [{"of": a, "less": b, **asdict(d)} for (a, b), d in result.differences.items()]
        ids = {"fm": other.fm_id, "from": model.fm_id if model else None, "prompt_id": tuned.prompt_id, "note": note}
        body = {**ids, "n": result.n, "n_failed": dict(result.n_failed), "accuracy": dict(result.accuracy)}
        print(json.dumps({**body, "differences": differences}))  # noqa: T201
        return
    called = {
        ORIGIN: f"{model.fm_id if model else ''}, where it was tuned",
        STORED: f"{other.fm_id}, as it is",
        RECALIBRATED: f"{other.fm_id}, recalibrated without labels",
    }
    table = Table("measured at", "accuracy", title=f"{tuned.prompt_id} on {result.n} texts")
    for name, value in result.accuracy.items():
        table.add_row(called[name], f"{value:.3f}")
    out_console.print(table)
    for (a, b), d in result.differences.items():
        low, high = (100 * end for end in d.ci95)
        out_console.print(
            f"{a} less {b}: {100 * d.difference:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}", highlight=False
        )
    for model_id, n in result.n_failed.items():
        if n:
            out_console.print(f"{n} texts failed at {model_id} and count as wrong", highlight=False)
    if note:
        err_console.print(note, markup=False)


@app.command("predict")
def predict_command(
    prompt: Annotated[Path, typer.Argument(help="prompt.json or a run folder.")],
    source: Annotated[
        Path | None, typer.Argument(help="Text file, one text a line; standard input by default.")
    ] = None,
    fm: Annotated[str, typer.Option("--fm", help="Foundation model, KIND:NAME.")] = "embedded:smollm2-135m-instruct",
    client: Annotated[str | None, typer.Option("--client", help="Use this client's calibration (run folder).")] = None,
    personal: Personal = False,
) -> None:
    """Label texts, or answer them: lines in, one JSON object a line out, in order."""
    from promptfed.registry import load_fm

    tuned, calibration = _tuned(prompt, client, personal)
    texts = _lines(source)
    model = load_fm(fm)
    for start in range(0, len(texts), 256):
        for answer in tuned.predict(texts[start : start + 256], fm=model, calibration=calibration):
            line: dict[str, Any] = {"answer": answer.answer}
            if tuned.labels:
                line = {"label": answer.label, "proba": {k: round(p, 4) for k, p in answer.proba.items()}}
            print(json.dumps(line, ensure_ascii=False), flush=True)  # noqa: T201


@app.command("report")
def report_command(folder: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """Write report.html anew from a run folder."""
    from promptfed.report.build import build_report

    out_console.print(str(build_report(folder)), highlight=False)


@app.command("compare")
def compare_command(
    a: Annotated[str, typer.Argument(help="Run folder, or several (seeds) joined by commas.")],
    b: Annotated[str, typer.Argument(help="The same for the other side.")],
    arm: Annotated[str, typer.Option("--arm", help="Arm of both sides.")] = "fm",
    arm_b: Annotated[str | None, typer.Option("--arm-b", help="Arm of the second side, if it differs.")] = None,
    as_json: Json = False,
) -> None:
    """Compare two runs, or two arms, in pairs on the same texts (accuracy or token F1, mean over clients)."""
    from dataclasses import asdict

    from promptfed.runs import compare_runs

    result = compare_runs([Path(p) for p in a.split(",")], [Path(p) for p in b.split(",")], arm, arm_b)
    if as_json:
        print(json.dumps(asdict(result)))  # noqa: T201
        return
    low, high = result.ci95
    out_console.print(
        f"{arm} {result.mean_a:.3f}  against  {arm_b or arm} {result.mean_b:.3f}  on {result.n_texts} texts\n"
        f"difference {100 * result.difference:+.1f} points, 95% interval {100 * low:+.1f} to {100 * high:+.1f}, "
        f"p = {result.p_value:.3g}",
        highlight=False,
    )


@app.command("methods")
def methods_command(
    name: Annotated[str | None, typer.Argument(help="A method: show its card and options.")] = None,
    as_json: Json = False,
) -> None:
    """List the registered methods, or show one: what it needs of the FM, what it sends, its options."""
    from promptfed.registry import METHODS, describe_method, names

    if name is not None:
        found = describe_method(name)
        if as_json:
            print(json.dumps(found, default=str))  # noqa: T201
        else:
            show_method(found)
        return
    rows: list[dict[str, Any]] = []
    for known in names(METHODS):
        try:
            rows.append(describe_method(known))
        except ImportError as error:  # one package that is broken must not hide the others
            rows.append({"name": known, "error": f"can't be loaded ({type(error).__name__})"})
    if as_json:
        print(json.dumps(rows, default=str))  # noqa: T201
    else:
        show_methods(rows)


@app.command("doctor")
def doctor_command(
    fm: Annotated[str, typer.Option("--fm", help="Foundation model, KIND:NAME.")] = "embedded:smollm2-135m-instruct",
    as_json: Json = False,
) -> None:
    """Check this machine: versions, the FM and its speed, the encoder."""
    from promptfed.doctor import checks

    rows = checks(fm)
    if as_json:
        print(json.dumps([{"check": n, "ok": ok, "found": found} for n, ok, found in rows]))  # noqa: T201
    else:
        table = Table("", Column("check", overflow="fold"), Column("found", overflow="fold"))
        for name, ok, found in rows:
            table.add_row("[green]ok[/]" if ok else "[red]no[/]", name, found)
        out_console.print(table)
    if not all(ok for _, ok, _ in rows):
        raise typer.Exit(3)


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


# ------------------------------------------------------------------------------------------------------ helpers


def _new_folder_of(folder: Path, *names: str) -> Path:
    """``folder``, made; raises `ConfigError` if it holds one of ``names`` already: a key in use must not be lost."""
    if taken := [folder / n for n in names if (folder / n).exists()]:
        raise ConfigError(f"{taken[0]} exists; choose another folder, or remove it if nobody uses it any more")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _tuned(prompt: Path, client: str | None, personal: bool) -> tuple[PromptSet, Calibration | None]:
    """The tuned prompts and a client's calibration of them, or the prompts that the client chose for itself."""
    from promptfed.prompts.artefact import PromptSet
    from promptfed.runs import read_calibration, read_personal

    if client is None:
        if personal:
            raise ConfigError("--personal needs --client: whose prompts?")
        return PromptSet.load(prompt), None
    if not prompt.is_dir():
        raise ConfigError(f"--client needs a run folder, where the clients' calibrations are; got {prompt}")
    if personal:
        return read_personal(prompt, client), None
    tuned = PromptSet.load(prompt)
    if not tuned.labels:
        raise ConfigError("--client names a calibration, and prompts that generate answers have none: leave it out")
    return tuned, read_calibration(prompt, client)


def _rows(data: Path, text_column: str, label_column: str) -> list[tuple[str, str]]:
    """Texts of a file, each with its label or answer."""
    from clients.data import read_rows

    columns = {"client_column": "", "text_column": text_column, "label_column": label_column}
    return [(text, label) for _, text, label in read_rows(data, client="all", **columns)]


def _label_indices(data: Path, rows: Sequence[tuple[str, str]], tuned: PromptSet) -> IntArray:
    """Where each row's label stands in ``tuned.labels``."""
    import numpy as np

    index = {label: k for k, label in enumerate(tuned.labels)}
    if unknown := sorted({label for _, label in rows} - set(index)):
        raise DataError(f"{data} has labels {', '.join(unknown)}; the prompt knows {', '.join(tuned.labels)}")
    return np.array([index[label] for _, label in rows], dtype=np.int64)


def _lines(source: Path | None) -> list[str]:
    try:
        content = sys.stdin.buffer.read() if source is None else source.read_bytes()
        return [line for line in content.decode("utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise DataError(f"{source}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source or 'standard input'}: can't be read as UTF-8 text ({type(error).__name__})") from None


def _plain(error: PromptfedError) -> str:
    return str(error).replace("[", "\\[")


if __name__ == "__main__":
    main()
