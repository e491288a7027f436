"""What promptfed's own client costs: FM calls a second through the whole seam against a server that answers at once.

    python benchmarks/seam.py                      # prints JSON

The server is a process of its own on one core, this client on the other, so the rate is the client's on one core. It
answers fixed bytes of the right shape: nothing is computed there. The seam is what a client of a federation has:
Budgeted(Metered(Reached(Pooled(RecordingFM(Retrying(OpenAIFM)))))). `served`, `vllm` and `completions` carry many calls
in a request, `chat` one. Medians of --repeat runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from promptfed.fm.decorators import Budgeted, Metered, Pooled, Reached, Retrying
from promptfed.fm.journal import RecordingFM
from promptfed.fm.openai import OpenAIFM
from promptfed.ports import free_port
from promptfed.prompts.template import PromptTemplate

PROMPT = PromptTemplate(text="Text: {text}\nLabel:", words=("good", "bad"))
KINDS = ("served", "vllm", "completions", "chat")


def main() -> None:
    """Start a server of each kind, ask it, print the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--serve", nargs=2, metavar=("KIND", "PORT"), help="be the server")
    args = parser.parse_args()
    if args.serve:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        asyncio.run(serve(args.serve[0], int(args.serve[1])))
        return
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rates = {kind: measure(kind, args.calls, args.repeat) for kind in KINDS}
    about = {"python": platform.python_version(), "cpu": platform.processor(), "calls": args.calls}
    print(json.dumps({"fm_calls_a_second": rates, **about}, indent=2))


def measure(kind: str, n_calls: int, repeat: int) -> float:
    """Median calls a second of fresh texts."""
    port = free_port()
    server = subprocess.Popen([sys.executable, __file__, "--serve", kind, str(port)], stdout=subprocess.PIPE)
    assert server.stdout is not None
    server.stdout.readline()
    try:
        model = OpenAIFM(f"http://127.0.0.1:{port}/v1#m")
        rates = []
        for i in range(repeat):
            with tempfile.TemporaryDirectory() as folder:
                journal = RecordingFM(Retrying(model), Path(folder) / "journal.jsonl")
                fm = Budgeted(Metered(Reached(Pooled(journal))))
                fm.grant = n_calls
                start = time.perf_counter()
                scores = fm.score_labels(PROMPT, [f"run {i}, text {j} of an ordinary length" for j in range(n_calls)])
                rates.append(n_calls / (time.perf_counter() - start))
                assert not scores.mask.any(), "the server's answers are not understood"
        return round(statistics.median(rates), 1)
    finally:
        server.terminate()
        server.wait()


# ---------------------------------------------------------------- the server


async def serve(kind: str, port: int) -> None:
    """HTTP by hand, so that the server takes next to no time: read a request, write an answer of the right shape."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next((int(h[15:]) for h in head.split(b"\r\n") if h.lower().startswith(b"content-length:")), 0)
                body = json.loads(await reader.readexactly(length)) if length else {}
                path = head.split(b" ", 2)[1].decode()
                said = answer(kind, path, body)
                data = json.dumps(said or {}).encode()
                status = b"200 OK" if said is not None else b"404 Not Found"
                top = b"HTTP/1.1 " + status + b"\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                writer.write(top % len(data) + data)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", port, limit=2**26)
    print("ready", flush=True)
    await server.serve_forever()


def answer(kind: str, path: str, body: dict[str, object]) -> dict[str, object] | None:
    """What a server of this kind would say."""
    if path.endswith("/models"):
        card = {"promptfed": {"fm_id": "bench:m@0", "capabilities": ["text", "label_logprobs"]}}
        return {"data": [{"id": "m", "object": "model", **(card if kind == "served" else {})}]}
    if path.endswith("/chat/completions"):
        tops = [{"token": t, "logprob": lp} for t, lp in (("good", -0.5), ("bad", -1.0), ("no", -5.0), ("yes", -6.0))]
        choice = {"message": {"content": "good"}, "logprobs": {"content": [{"top_logprobs": tops}]}}
        return {"model": "m", "choices": [choice], "usage": USAGE} if kind == "chat" else None
    prompts = body.get("prompt")
    n = len(prompts) if isinstance(prompts, list) else 1
    if kind == "served":
        own = {"promptfed": {"logprobs": [-0.5, -1.0], "prompt_tokens": 12}}
        return {"system_fingerprint": "bench:m@0", "choices": [own] * n}
    if kind == "chat":
        return None
    named = body.get("logprob_token_ids") if kind == "vllm" else None
    ids = {f"token_id:{t}": -0.5 for t in named} if isinstance(named, list) else {" good": -0.5, " bad": -1.0}
    spelt = [{"prompt_token_ids": [len(str(p))]} for p in prompts] if isinstance(prompts, list) else []
    choices = [{"text": "a", "logprobs": {"top_logprobs": [ids]}} for _ in range(n)]
    if kind == "vllm" and body.get("return_token_ids"):
        choices = [choice | extra for choice, extra in zip(choices, spelt, strict=True)]
    return {"choices": choices, "usage": USAGE, "system_fingerprint": "0"}


USAGE = {"prompt_tokens": 12, "completion_tokens": 1}

if __name__ == "__main__":
    main()
