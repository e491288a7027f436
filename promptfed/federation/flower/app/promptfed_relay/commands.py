"""Runs several of Flower's own commands (`flwr ...`) in one process, since starting it once takes seconds.

The first argument is a JSON list of argument lists. What each prints is followed by a record separator.
"""

from __future__ import annotations

import json
import sys

import click
from flwr.cli.app import app
from typer.main import get_command

SEPARATOR = "\x1e"


def main() -> None:
    """Exit code 1, and the message of the command that failed, when one fails."""
    for args in json.loads(sys.argv[1]):
        try:
            get_command(app).main(args, prog_name="flwr", standalone_mode=False)
        except click.ClickException as error:
            sys.exit(error.format_message())
        sys.stdout.write(SEPARATOR)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
