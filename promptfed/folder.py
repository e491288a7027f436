"""The run folder: begun whole or not at all, replaced only if it is one, held by one process at a time."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from promptfed.config import Config, dump_toml, load_config
from promptfed.errors import ConfigError, UserError
from promptfed.federation.events import read_events
from promptfed.files import write_whole


@contextmanager
def new_folder(folder: Path, config: Config, force: bool) -> Iterator[None]:
    """Make ``folder`` for a run of ``config`` and hold it. A caller that stops with a `UserError` before anything was
    paid for leaves no folder behind, and the one that was to be replaced where it was.

    Raises `ConfigError` if ``folder`` exists and ``force`` is off.
    """
    check_folder(folder, force)
    replaced = _begin(folder, config)
    with claimed(folder):
        try:
            yield
        except UserError:
            if not _paid_for(folder):
                shutil.rmtree(folder, ignore_errors=True)
                if replaced.exists():
                    replaced.replace(folder)
            raise
        finally:
            shutil.rmtree(replaced, ignore_errors=True)


def config_of(folder: Path) -> Config:
    """The configuration of the run in ``folder``. Raises `ConfigError` if there is none."""
    if not (folder / "config.toml").is_file():
        raise ConfigError(f"{folder} is not a run folder (no config.toml); give the folder of a run that was stopped")
    return load_config(folder / "config.toml")


@contextmanager
def begun_folder(folder: Path) -> Iterator[Config]:
    """Hold the folder of a run that was stopped; gives its configuration."""
    config = config_of(folder)
    with claimed(folder):
        yield config


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other processes from working on ``folder``; the claim ends with the process. Raises `ConfigError`."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is working on {folder}; wait for it, or stop it first") from None
        yield


def check_folder(out: Path, force: bool) -> None:
    """Raises `ConfigError` if ``out`` exists and ``force`` is off; with it, only a run folder may be replaced."""
    if not out.exists():
        return
    if not force:
        raise ConfigError(
            f"{out} exists; choose another folder, give --force to replace it, or go on with promptfed resume {out}"
        )
    if not out.is_dir() or (any(out.iterdir()) and not (out / "config.toml").is_file()):
        raise ConfigError(f"{out} is not a run folder (no config.toml); --force would delete it, so choose another")


def _begin(folder: Path, config: Config) -> Path:
    """Make a run folder, with its configuration or not at all; returns where the one that it replaces was put."""
    replaced, scratch = (folder.with_name(f".{folder.name}.{what}") for what in ("replaced", "new"))
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    write_whole(scratch / "config.toml", dump_toml(config))
    if folder.exists():
        with claimed(folder):
            shutil.rmtree(replaced, ignore_errors=True)
            folder.replace(replaced)
    scratch.replace(folder)
    return replaced


def _paid_for(folder: Path) -> bool:
    """Whether a round with FM calls was logged."""
    log = folder / "events.jsonl"
    return log.exists() and any(event.get("fm_calls") for event in read_events(log) if event["kind"] == "round")
