"""The command line: ``promptfed run``, ``resume``, ``eval``, ``transfer``, ``predict``, ``report``, ``compare``,
``doctor``, ``methods``, and what `promptfed.cli_operators` and `promptfed.cli_retrieval` have.

Exit codes: 0 done, 2 something that the caller can mend, 3 a run that failed. Errors go to stderr without a traceback.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from promptfed import cli_operators, cli_retrieval
from promptfed.cli_operators import Json
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

if TYPE_CHECKING:
    from promptfed.prompts.artefact import Prediction, PromptSet
    from promptfed.prompts.calibration import Calibration
    from promptfed.types import IntArray

app = typer.Typer(
    name="promptfed",
    help="Federated tuning of foundation models that nobody may fine-tune: prompts travel, text stays.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_operators.app)
app.add_typer(cli_retrieval.app)

AsClient = Annotated[
    str | None,
    typer.Option("--client", help="Answer as this client: its calibration, domain model and cascade (run folder)."),
]
PromptOnly = Annotated[
    bool, typer.Option("--prompt-only", help="With --client: its calibration alone, without its domain model.")
]
Personal = Annotated[
    bool, typer.Option("--personal", help="With --client: the prompts that this client chose for itself.")
]


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


@app.command("eval")
def eval_command(
    prompt: Annotated[Path, typer.Argument(help="prompt.json or a run folder.")],
    data: Annotated[Path, typer.Argument(help="Labelled CSV file.")],
    fm: Annotated[str, typer.Option("--fm", help="Foundation model, KIND:NAME.")] = "embedded:smollm2-135m-instruct",
    client: AsClient = None,
    personal: Personal = False,
    prompt_only: PromptOnly = False,
    text_column: Annotated[str, typer.Option("--text-column")] = "text",
    label_column: Annotated[str, typer.Option("--label-column")] = "label",
    as_json: Json = False,
) -> None:
    """Measure a tuned prompt, or with --client all that a client has, on texts with labels, or with answers."""
    import numpy as np

    from evaluators import answers, metrics
    from promptfed.predictor import Predictor
    from promptfed.registry import load_fm

    tuned, calibration = _tuned(prompt, client, personal, prompt_only)
    rows = _rows(data, text_column, label_column)
    texts, labels = [text for text, _ in rows], _label_indices(data, rows, tuned)
    model = load_fm(fm)
    _tell_of_another_fm(prompt, model.fm_id)
    predicted: Sequence[Prediction]
    if client is not None and not (personal or prompt_only):
        predicted = Predictor.load(prompt, fm=model, client=client).predict(texts)
    else:
        predicted = tuned.predict(texts, fm=model, calibration=calibration)
    if tuned.labels:
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

    tuned, _ = _tuned(prompt, None)
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
    client: AsClient = None,
    personal: Personal = False,
    prompt_only: PromptOnly = False,
    index: Annotated[
        Path | None, typer.Option("--index", help="With --client: quote passages of this index (promptfed index).")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option("--encoder", help="Encoder of the index; all-minilm-l6-v2 by default.")
    ] = None,
    n_passages: Annotated[
        int | None, typer.Option("--passages", min=1, help="Passages a text, with --index; 3 by default.")
    ] = None,
    isolate: Annotated[
        bool, typer.Option("--isolate", help="With --index: a prompt for each document found, and they vote.")
    ] = False,
) -> None:
    """Label texts, or answer them: lines in, one JSON object a line out, in order; of a blank line it says null.

    With --client, each line also says who answered (dm: the domain model alone; fm_single_dm: with the best prompt;
    fm_dm: with all), the prompts asked, and the passages quoted.
    """
    from promptfed.registry import load_fm

    if client is None and index:
        raise ConfigError("--index needs --client: whose?")
    given = {"--encoder": encoder, "--passages": n_passages, "--isolate": isolate or None}
    if index is None and (without := [name for name, value in given.items() if value is not None]):
        raise ConfigError(f"{without[0]} is about passages: it needs --index")
    if index is not None and (prompt_only or personal):
        raise ConfigError("--index goes with all that the client has: leave out --prompt-only and --personal")
    if client is not None and not (prompt_only or personal):
        options = {"isolate": isolate, **({"n_passages": n_passages} if n_passages is not None else {})}
        _predict_as(client, prompt, _lines(source), fm, index, encoder or "all-minilm-l6-v2", **options)
        return
    tuned, calibration = _tuned(prompt, client, personal, prompt_only)
    texts = _lines(source)
    model = load_fm(fm)
    _tell_of_another_fm(prompt, model.fm_id)

    def answered(part: list[str]) -> Iterator[dict[str, Any]]:
        for answer in tuned.predict(part, fm=model, calibration=calibration):
            if tuned.labels:
                yield {"label": answer.label, "proba": _rounded(answer.proba)}
            else:
                yield {"answer": answer.answer}

    _print_in_step(texts, answered, "label" if tuned.labels else "answer")


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


# ------------------------------------------------------------------------------------------------------ helpers


def _tuned(
    prompt: Path, client: str | None, personal: bool = False, prompt_only: bool = False
) -> tuple[PromptSet, Calibration | None]:
    """The tuned prompts and a client's calibration of them, or the prompts that the client chose for itself."""
    from promptfed.prompts.artefact import PromptSet
    from promptfed.runs import client_folder, read_calibration, read_personal

    if personal and prompt_only:
        raise ConfigError("--personal and --prompt-only are two prompts: name one of them")
    if client is None:
        if personal or prompt_only:
            raise ConfigError(f"{'--personal' if personal else '--prompt-only'} needs --client: whose?")
        return PromptSet.load(prompt), None
    if not prompt.is_dir():
        raise ConfigError(f"--client needs a run folder, where the clients' calibrations are; got {prompt}")
    if personal:
        return read_personal(prompt, client), None
    if not PromptSet.load(prompt).labels:
        raise ConfigError("--client names a calibration, and prompts that generate answers have none: leave it out")
    home = client_folder(prompt, client)
    tuned = PromptSet.load(home)
    return tuned, read_calibration(home / "calibration.json", tuned)


def _predict_as(
    client: str, folder: Path, texts: Sequence[str], fm: str, index: Path | None, encoder: str, **options: Any
) -> None:
    """With all that a client has."""
    from promptfed.predictor import Predictor
    from promptfed.registry import load_fm

    _tuned(folder, client)  # what is wrong with the folder is told before a model is loaded
    retriever = None
    if index is not None:
        from retrieval.encoder import load_encoder
        from retrieval.index import LocalIndex

        retriever = LocalIndex.open(index, load_encoder(encoder))
    model = load_fm(fm)
    predictor = Predictor.load(folder, fm=model, client=client, retriever=retriever, **options)
    _tell_of_another_fm(folder, model.fm_id)

    def answered(part: list[str]) -> Iterator[dict[str, Any]]:
        for answer in predictor.predict(part):
            yield {
                "label": answer.label,
                "proba": _rounded(answer.proba),
                "by": answer.by,
                "prompts": [p.prompt_id for p in answer.prompts],
                "passages": [{"doc_id": h.doc_id, "passage": h.passage} for h in answer.passages],
            }

    _print_in_step(texts, answered)


def _print_in_step(
    lines: Sequence[str], answered: Callable[[list[str]], Iterable[dict[str, Any]]], named: str = "label"
) -> None:
    """One JSON object for each of ``lines``, batch by batch; nobody is asked about a blank one, of which what is
    ``named`` is null."""
    for start in range(0, len(lines), 256):
        part = lines[start : start + 256]
        texts = [line for line in part if line.strip()]
        answers = iter(answered(texts) if texts else ())
        for line in part:
            record = next(answers) if line.strip() else {named: None}
            print(json.dumps(record, ensure_ascii=False), flush=True)  # noqa: T201


def _tell_of_another_fm(prompt: Path, fm_id: str) -> None:
    from promptfed.runs import read_about

    tuned_on = read_about(prompt).get("fm")
    if tuned_on is not None and tuned_on != fm_id:
        err_console.print(f"tuned on {tuned_on}, answered by {fm_id}: the calibration is of the former", markup=False)


def _rounded(proba: Mapping[str, float]) -> dict[str, float]:
    return {label: round(p, 4) for label, p in proba.items()}


def _rows(data: Path, text_column: str, label_column: str) -> list[tuple[str, str]]:
    """Texts of a file, each with its label or answer; as in a run, rows with an empty text are left out."""
    from clients.data import read_rows

    columns = {"client_column": "", "text_column": text_column, "label_column": label_column}
    rows = [(text, label) for _, text, label in read_rows(data, client="all", **columns)]
    kept = [(text, label) for text, label in rows if text.strip()]
    if not kept:
        raise DataError(f"{data} has no text to measure on")
    if len(kept) < len(rows):
        err_console.print(f"{data}: {len(rows) - len(kept)} rows with an empty text are left out", markup=False)
    return kept


def _label_indices(data: Path, rows: Sequence[tuple[str, str]], tuned: PromptSet) -> IntArray:
    """Where each row's label stands in ``tuned.labels``; none for prompts that generate answers."""
    import numpy as np

    from clients.data import check_labels

    if not tuned.labels:
        return np.zeros(0, dtype=np.int64)
    check_labels(str(data), {label for _, label in rows}, tuned.labels)
    index = {label: k for k, label in enumerate(tuned.labels)}
    return np.array([index[label] for _, label in rows], dtype=np.int64)


def _lines(source: Path | None) -> list[str]:
    try:
        content = sys.stdin.buffer.read() if source is None else source.read_bytes()
        # Not splitlines: it also cuts at characters that may stand within a text.
        lines = [line.removesuffix("\r") for line in content.decode("utf-8-sig").split("\n")]
        return lines if lines[-1] else lines[:-1]
    except FileNotFoundError:
        raise DataError(f"{source}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source or 'standard input'}: can't be read as UTF-8 text ({type(error).__name__})") from None


def _plain(error: PromptfedError) -> str:
    return str(error).replace("[", "\\[")


if __name__ == "__main__":
    main()
