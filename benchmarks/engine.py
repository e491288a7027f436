"""How near the embedded engine comes to what this machine's matrix products can do.

    python benchmarks/engine.py [--model smollm2-135m-instruct] [--repeats 5] [--threads 2] [--server openai:URL#NAME]

Prints JSON. ``rates``: useful GFLOP/s of label scoring on fresh texts of the movies client behind a short and a long
prompt, the prompt's own computation included, and its share of the bare rate: the same layers' matrix products over
their own weights, timed before and after in the same process. Useful are the products over real tokens (in the last
layer those of rows that go on), attention over pairs that see each other, and the label words' projection; padding is
not. ``linear``: seconds of n prompts x m texts. ``peak``: the most memory that a fresh process took.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

from clients.data import read_rows
from promptfed.fm.base import run_sync
from promptfed.fm.embedded import BATCH_TOKENS, GPU_BATCH_TOKENS, EmbeddedFM
from promptfed.fm.packed import fast_device, fast_dtype
from promptfed.fm.weights import find_weights
from promptfed.registry import load_fm
from promptfed.types import FoundationModel, LabelRequest

DEMO = Path(__file__).parent.parent / "examples" / "sentiment5"
WORDS = (" negative", " positive")
EXEMPLARS = (
    ("I loved every minute of it.", "positive"),
    ("It was awful from start to end.", "negative"),
    ("The cast is charming and the story keeps its promise.", "positive"),
    ("A tedious plot, told without wit or warmth.", "negative"),
    ("You will leave with a smile and want to see it again.", "positive"),
    ("Two hours that nobody is going to give me back.", "negative"),
    ("Quiet, clever and moving, with music to match.", "positive"),
    ("The jokes fall flat and the ending makes no sense at all.", "negative"),
    ("What a warm and funny surprise this little thing is.", "positive"),
    ("It wants to shock and only manages to bore.", "negative"),
    ("Beautifully shot, and for once the script deserves it.", "positive"),
    ("Noisy, clumsy, and far too pleased with itself.", "negative"),
)


def demo_texts(part: str, client: str | None = None) -> list[str]:
    """The demo's texts, of one client or of all."""
    columns = {"client_column": "client", "text_column": "text", "label_column": "label"}
    return [text for who, text, _ in read_rows(DEMO / f"{part}.csv.gz", **columns) if client in (None, who)]


def prompt(n_exemplars: int, number: int = 0) -> str:
    """The ``number``-th prompt with so many exemplars; no two begin alike, so none is found computed already."""
    shown = "".join(f"Text: {text}\nSentiment: {label}\n\n" for text, label in EXEMPLARS[:n_exemplars])
    return f"Task {number}. Is the text negative or positive?\n\n{shown}Text:"


PROMPTS = {"short": prompt(1), "long": prompt(12)}


def requests(prefix: str, texts: Sequence[str]) -> list[LabelRequest]:
    return [LabelRequest(prefix=prefix, text=f" {text}", suffix="\nSentiment:", labels=WORDS) for text in texts]


@dataclass(frozen=True)
class Work:
    """Useful floating-point operations of the model in ``folder``."""

    folder: Path

    def __post_init__(self) -> None:
        config = json.loads((self.folder / "config.json").read_text())
        n_heads, hidden = config["num_attention_heads"], config["hidden_size"]
        d = config.get("head_dim") or hidden // n_heads
        keys_values = 2 * config["num_key_value_heads"] * d * hidden
        rest = 2 * n_heads * d * hidden + 3 * hidden * config["intermediate_size"]
        sizes = {
            "layers": config["num_hidden_layers"],
            "keys_values": 2 * keys_values,
            "rest": 2 * rest,
            "pair": 4 * n_heads * d,
            "word": 2 * hidden * len(WORDS),
        }
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "tokenizer", Tokenizer.from_file(str(self.folder / "tokenizer.json")))

    def tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)  # type: ignore[attr-defined]

    def of(self, asked: Sequence[LabelRequest]) -> float:
        """Requests that share one prompt: the prompt's keys and values once, then every text behind it."""
        s = self.sizes  # type: ignore[attr-defined]
        head = self.tokens(asked[0].prefix)
        below = s["layers"] - 1
        total = head * (below * s["rest"] + s["layers"] * s["keys_values"]) + below * s["pair"] * head * (head + 1) / 2
        for request in asked:
            n = self.tokens(request.text + request.suffix)
            pairs = n * head + n * (n + 1) / 2
            total += n * (below * s["rest"] + s["layers"] * s["keys_values"]) + s["rest"]
            total += s["pair"] * (below * pairs + head + n) + s["word"]
        return float(total)


def bare_products(folder: Path, n_tokens: int, dtype: torch.dtype) -> tuple[Callable[[], None], float]:
    """All linear layers' products over their own weights, one after the other; and their operations."""
    device = fast_device()
    weights = load_file(folder / "model.safetensors", device=str(device))
    layers: list[list[torch.Tensor]] = []
    for i in range(1 + max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers."))):

        def get(*parts: str, i: int = i) -> torch.Tensor:
            return torch.cat([weights[f"model.layers.{i}.{part}_proj.weight"] for part in parts]).to(dtype)

        layers.append(
            [
                get("self_attn.q", "self_attn.k", "self_attn.v"),
                get("self_attn.o"),
                get("mlp.gate", "mlp.up"),
                get("mlp.down"),
            ]
        )
    inputs = {w.shape[1]: torch.randn(n_tokens, w.shape[1], device=device).to(dtype) for w in layers[0]}

    @torch.inference_mode()
    def run() -> None:
        for layer in layers:
            for weight in layer:
                F.linear(inputs[weight.shape[1]], weight)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run, 2.0 * n_tokens * sum(w.numel() for layer in layers for w in layer)


def seconds(work: Callable[[], Any]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start


def ask(fm: FoundationModel, asked: Sequence[LabelRequest]) -> float:
    """Seconds until all is answered."""
    start = perf_counter()
    answers = run_sync(fm.complete(asked))
    taken = perf_counter() - start
    assert all(a.error is None for a in answers)
    return taken


def rates(name: str, repeats: int, server: str | None) -> dict[str, Any]:
    """Each repeat loads the model anew (not timed), so that no text has been tokenised before and a server's prefix
    cache begins empty (a new ``cache_salt``)."""
    folder, _ = find_weights(name)
    work = Work(folder)
    movies, others = demo_texts("train", "movies"), demo_texts("train", "products")
    # A blank at the end makes the texts behind the second prompt new to the tokenizer's memory.
    asked = {
        kind: requests(prefix, movies if kind == "short" else [f"{t} " for t in movies])
        for kind, prefix in PROMPTS.items()
    }
    warm_up = requests(prompt(2, number=99), others[:50])
    batch_tokens = GPU_BATCH_TOKENS if torch.cuda.is_available() else BATCH_TOKENS
    bare, bare_flops = bare_products(folder, batch_tokens, fast_dtype())
    at_server: dict[str, list[float]] = {kind: [] for kind in PROMPTS}
    bare_s: list[float] = []
    taken: dict[str, list[float]] = {kind: [] for kind in PROMPTS}
    for _ in range(repeats):
        fm = EmbeddedFM(name)
        for kind in PROMPTS:
            ask(fm, warm_up)
            bare()
            bare_s += [seconds(bare) for _ in range(3)]
            taken[kind].append(ask(fm, asked[kind]))
        if server:
            there = load_fm(server)
            for kind in PROMPTS:
                ask(there, warm_up)
                at_server[kind].append(ask(there, asked[kind]))
    bare_rate = bare_flops / median(bare_s) / 1e9
    out: dict[str, Any] = {"batch_tokens": batch_tokens, "bare_gflops": round(bare_rate, 1)}
    out["bare_gflops_range"] = [round(bare_flops / s / 1e9, 1) for s in (max(bare_s), min(bare_s))]
    for kind, prefix in PROMPTS.items():
        useful = work.of(asked[kind]) / median(taken[kind]) / 1e9
        out[kind] = {
            "prompt_tokens": work.tokens(prefix),
            "tokens_a_text": round(sum(work.tokens(r.text + r.suffix) for r in asked[kind]) / len(movies), 1),
            "calls_a_second": round(len(movies) / median(taken[kind]), 1),
            "useful_gflops": round(useful, 1),
            "share_of_bare": round(useful / bare_rate, 3),
            "seconds": [round(s, 3) for s in taken[kind]],
        }
        if server:
            out[kind]["server_seconds"] = [round(s, 3) for s in at_server[kind]]
            out[kind]["server_calls_a_second"] = round(len(movies) / median(at_server[kind]), 1)
            out[kind]["times_the_server"] = round(median(at_server[kind]) / median(taken[kind]), 2)
    return out


def linearity(name: str) -> list[dict[str, Any]]:
    """Milliseconds a call of n prompts x m texts, and a useful GFLOP, since not all texts are of one length: constant
    where the engine is linear in n * m."""
    fm, work = EmbeddedFM(name), Work(find_weights(name)[0])
    texts = demo_texts("train")
    ask(fm, requests(prompt(2, number=99), texts[:50]))
    rows = []
    for n_prompts, n_texts in ((1, 50), (4, 50), (16, 50), (1, 200), (4, 200), (1, 800)):
        some = [texts[i * len(texts) // n_texts] for i in range(n_texts)]
        by_prompt = [requests(prompt(1, p), some) for p in range(n_prompts)]
        taken = 1000 * ask(fm, [request for asked in by_prompt for request in asked])
        useful = sum(map(work.of, by_prompt)) / 1e9
        row = {"prompts": n_prompts, "texts": n_texts, "ms_a_call": round(taken / (n_prompts * n_texts), 2)}
        rows.append({**row, "ms_a_gflop": round(taken / useful, 2)})
    return rows


def peak(name: str, n_prompts: int, n_texts: int) -> None:
    """Score, then print the most memory that this process took, in MB."""
    texts = [*demo_texts("train"), *demo_texts("test")]
    texts = [*texts, *texts][:n_texts]
    fm = EmbeddedFM(name)
    ask(fm, [r for p in range(n_prompts) for r in requests(prompt(1, p), texts)])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--server", help="address of a server of the same model to time too, openai:URL#NAME")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=["rates", "linear", "peak"], help="one part of it")
    parser.add_argument("--peak-of", type=int, nargs=2, metavar=("PROMPTS", "TEXTS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak_of:
        peak(args.model, *args.peak_of)
        return
    out: dict[str, Any] = {
        "machine": {
            "platform": f"{platform.system()} {platform.machine()}",
            "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "threads": args.threads,
            "torch": torch.__version__,
        }
    }
    if args.only in (None, "rates"):
        out["rates"] = rates(args.model, args.repeats, args.server)
    if args.only in (None, "linear"):
        out["linear"] = linearity(args.model)
    if args.only in (None, "peak"):
        out["peak"] = []
        for sizes in ((1, 100), (16, 2000)):
            command = [sys.executable, __file__, "--model", args.model, "--peak-of", *map(str, sizes)]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            out["peak"].append({"prompts": sizes[0], "texts": sizes[1], "rss_mb": round(float(printed))})
    print(json.dumps(out, indent=2))


if __name__ == "__main__":
    main()
