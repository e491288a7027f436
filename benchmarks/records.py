"""Runs that benchmarks compare: how they are configured, kept in their folders and gone on with, and what is recorded
of them, text by text in bits."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from promptfed.app import resume, run
from promptfed.config import Config, load_config
from promptfed.errors import ConfigError
from promptfed.fm.base import BaseFM
from promptfed.folder import config_of
from promptfed.runs import correctness
from promptfed.types import Encoder, FloatArray

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples" / "sentiment5" / "demo.toml"
TOPICS = ROOT.parent / "shared" / "data" / "topics6"


def configured(data: str, overrides: Mapping[str, Any]) -> Config:
    """``sentiment5``, five clients as they are; or ``topics6``, dealt out to ten."""
    changes = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]  # JSON is TOML for what stands here
    if data == "sentiment5":
        return load_config(DEMO, changes)
    source = {
        "data": {part: str((TOPICS / f"{part}.csv").resolve()) for part in ("train", "test")},
        "partition": {"clients": 10, "alpha": 0.1},
        "task": {"instruction": "Classify the topic of the text."},
    }
    return load_config(source, changes)


def kept(folder: Path, config: Config, models: Callable[[], tuple[BaseFM, Encoder]]) -> None:
    """Run, unless the run is there; one that was stopped goes on. Raises `ConfigError` where the folder is of another
    configuration."""
    begun = (folder / "config.toml").is_file()
    if begun and config_of(folder) != config:
        raise ConfigError(f"{folder} holds a run of another configuration: delete it, or give another --work")
    if (folder / "summary.json").is_file():
        return
    fm, encoder = models()
    if begun:
        resume(folder, fm=fm, encoder=encoder)
    else:
        if folder.exists():
            shutil.rmtree(folder)
        run(config, out=folder, fm=fm, encoder=encoder)


def packed(folder: Path, arm: str) -> dict[str, dict[str, Any]]:
    """By client, which held-out texts were answered rightly: bits, texts sorted by hash, in hexadecimal. Raises
    `DataError` for an arm that was not measured."""
    right = correctness([folder], arm)
    return {c: {"n": v.shape[1], "bits": np.packbits(v[0].astype(bool)).tobytes().hex()} for c, v in right.items()}


def unpacked(of_client: Mapping[str, Any]) -> FloatArray:
    """What `packed` has of a client: 1 where it was right, (n,)."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(of_client["bits"]), dtype=np.uint8))[: of_client["n"]]
    return bits.astype(np.float64)


def right(found: Sequence[Mapping[str, Any]], arm: str, *, apart: bool) -> dict[str, FloatArray]:
    """1 where an arm was right, by client, (n_seeds, n_texts). ``apart``: seeds deal texts out differently, so a client
    of one seed is one of its own."""
    out: dict[str, list[FloatArray]] = {}
    for record in found:
        for client, bits in record["right"][arm].items():
            out.setdefault(f"{record['seed']}/{client}" if apart else client, []).append(unpacked(bits))
    return {client: np.stack(rows) for client, rows in out.items()}


def commit() -> str:
    """Of the code that runs, where it is a checkout."""
    git = shutil.which("git") or "git"
    done = subprocess.run([git, "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def machine() -> dict[str, Any]:
    """What numbers depend on."""
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
