"""What the command line shows of a run: its progress, its result, and what a logger says."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from promptfed.conduct import Result
    from promptfed.federation.events import Listener

out_console = Console()
err_console = Console(stderr=True)

SIMULATION = (
    "promptfed run: an [bold]in-process simulation[/]: every client is an object here, "
    "and what they exchange is serialised and counted."
)


def tell(logger: str) -> None:
    """Show what ``logger`` says, a line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.getLogger(logger).addHandler(handler)
    logging.getLogger(logger).setLevel(logging.INFO)


def show_run(start: Callable[[Sequence[Listener]], Result], folder: Path, opening: str = SIMULATION) -> None:
    """Show ``opening`` and the progress of the run that ``start`` begins with a listener, then its result."""
    if opening:
        out_console.print(opening)
    with _RunProgress() as progress:
        result = start([progress.on_event])
    _print_result(result.summary)
    out_console.print(f"\nprompt  {folder / 'prompt.json'}\nreport  {folder / 'report.html'}", highlight=False)


class _RunProgress:
    """A bar over FM calls: the phase, the best score so far, and the time left at the present rate."""

    def __init__(self) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<34}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("FM calls"),
            TextColumn("{task.fields[tokens]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=err_console,
            transient=not err_console.is_terminal,
            disable=not err_console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=None, tokens="")

    def __enter__(self) -> _RunProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def on_event(self, event: Mapping[str, Any]) -> None:
        kind = event["kind"]
        if kind == "start":
            self._progress.update(self._task, total=event.get("expected_fm_calls"))
        elif kind == "round":
            self._progress.update(
                self._task,
                advance=event["fm_calls"],
                description=f"{event['phase']}: {event['name']}",
                tokens=f"{event['tokens'] / 1000:.0f}k tokens",
            )
            for client, reason in event["failures"].items():
                self._progress.console.print(
                    f"round {event['round']} ({event['name']}): {client} failed: {reason}", markup=False
                )
        elif kind == "turned_away":
            self._progress.console.print(f"{event['client']} was turned away: {event['why']}", markup=False)
        elif kind == "without_labels":
            self._line(f"no labelled text: {', '.join(event['clients'])}")
        elif kind == "distilled":
            change = f"score of the domain models {event['before']:.3f}, then {event['after']:.3f}"
            taken_back = "" if event["kept"] else "; taken back"
            self._line(f"{sum(event['n_lessons'].values())} lessons of the FM, over all clients: {change}{taken_back}")
        elif kind == "heat":
            self._line(
                f"{event['n_candidates']} prompts on {event['n_texts']} texts: best score {event['best_score']:.3f}"
            )
        elif kind == "arm":
            metric = event["metric"]
            self._line(f"{event['arm']}: {metric} {event[metric]:.3f} on held-out text")
        elif kind == "end":
            self._progress.update(self._task, description="done")

    def _line(self, text: str) -> None:
        self._progress.console.print(f"  {text}", highlight=False)


def _print_result(summary: Mapping[str, Any]) -> None:
    metric = summary["primary_metric"]
    table = Table(
        "arm", metric, "95% interval", "FM calls a prediction", title=f"{summary['method']}, seed {summary['seed']}"
    )
    for arm, value in summary["metrics"].get(metric, {}).items():
        low, high = value["ci95"]
        calls = summary["calls_per_prediction"][arm]
        table.add_row(
            arm, f"{value['mean']:.3f}", f"{low:.3f} to {high:.3f}", f"{calls:.3g}", style="bold" if arm == "fm" else ""
        )
    out_console.print(table)
    tuning = summary["ledger"]["tuning"]
    out_console.print(
        f"tuning: {tuning['fm_calls']} FM calls, {tuning['prompt_tokens'] / 1000:.0f}k tokens, "
        f"{tuning['bytes_up'] / 1024:.0f} KB up, {tuning['bytes_down'] / 1024:.0f} KB down, {tuning['wall_s']:.0f} s",
        highlight=False,
    )


def print_estimate(figures: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(figures))  # noqa: T201
        return
    table = Table("phase", "FM calls", "tokens", "minutes", "USD", title="Estimate; nothing was run")
    for phase, row in figures["phases"].items():
        table.add_row(phase, str(row["fm_calls"]), f"{row['tokens']:,}", f"{row['minutes']:.1f}", f"{row['usd']:.2f}")
    out_console.print(table)
    out_console.print(figures["basis"], highlight=False)


READS_TEXT = "needs an FM that follows instructions: worth little with a small or base model"


def show_methods(rows: Sequence[Mapping[str, Any]]) -> None:
    """A line a method, as `promptfed.registry.describe_method` has it."""
    table = Table("method", "needs of the FM", "privacy unit", "paper")
    for row in rows:
        if "error" in row:
            table.add_row(row["name"], "", "", row["error"], style="dim")
            continue
        mark = " *" if row["reads_text"] else ""
        table.add_row(row["name"] + mark, ", ".join(row["needs"]), row["privacy_unit"] or "none", row["paper"])
    out_console.print(table)
    if any(row.get("reads_text") for row in rows):
        out_console.print(f"* {READS_TEXT}", highlight=False)
    out_console.print("More of one: promptfed methods NAME", highlight=False)


def show_method(row: Mapping[str, Any]) -> None:
    """One method's card and options."""
    table = Table(show_header=False, title=row["name"])
    table.add_row("paper", row["paper"])
    table.add_row("needs of the FM", ", ".join(row["needs"]) + (f"; {READS_TEXT}" if row["reads_text"] else ""))
    table.add_row("tasks that it sends", ", ".join(row["sends"]))
    table.add_row("what the replies carry", row["crosses"])
    table.add_row("privacy unit", row["privacy_unit"] or "none: what clients send is exact")
    out_console.print(table)
    if not row["options"]:
        out_console.print("It has no options.")
        return
    options = Table("option", "type", "default", title="method.options", caption="--set method.options.NAME=VALUE")
    for option in row["options"]:
        options.add_row(option["name"], escape(option["type"]), escape(repr(option["default"])))
    out_console.print(options)
