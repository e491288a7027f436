"""The embedded engine on a GPU against the same on a CPU. Skipped where there is no GPU: CI has none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from promptfed.fm.embedded import EmbeddedFM
from promptfed.fm.packed import PackedLlama, Tree
from promptfed.types import FMResponse, LabelRequest, TextRequest
from tests.support import wait_for

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
TREES = [Tree((1, 2), ((3, 4), (5, 6, 7))), Tree((8,)), Tree((9, 9, 9), ((1,), (1, 2), (3,))), Tree((4, 5, 6))]
WORDS = (" negative", " positive")


@pytest.mark.parametrize("prefix", [[], [7], [5, 6, 7, 8, 9, 10, 11]], ids=["none", "one token", "seven tokens"])
def test_hidden_states_are_those_of_the_cpu(tiny_llama: Path, prefix: list[int]) -> None:
    there, here = (PackedLlama(tiny_llama, torch.float32, torch.device(name)) for name in ("cuda", "cpu"))

    got, want = (model.hidden(TREES, model.prefill(prefix)) for model in (there, here))

    assert got.is_cuda
    assert (got.cpu() - want).abs().max() < 1e-4


def test_label_scores_of_the_packaged_model_agree_with_float32_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 moves a log-probability by 0.05 on average (docs/engine.md)."""
    asked = [
        LabelRequest(prefix=prefix, text=f" {text}", suffix="\nSentiment:", labels=WORDS)
        for prefix in ("Text:", "Text: It was awful.\nSentiment: negative\n\nText:")
        for text in ("I loved every minute of it.", "A bore, from the first scene to the last!", "good " * 60, "Hm.")
    ]
    got = EmbeddedFM("smollm2-135m-instruct")
    with monkeypatch.context() as patch:
        patch.setattr("promptfed.fm.packed.fast_device", lambda: torch.device("cpu"))
        patch.setattr("promptfed.fm.packed.fast_dtype", lambda: torch.float32)
        want = EmbeddedFM("smollm2-135m-instruct")

    here, there = (scores(wait_for(fm.complete(asked))) for fm in (want, got))

    assert np.abs(here - there).mean() < 0.05


def test_it_writes_text() -> None:
    fm = EmbeddedFM("smollm2-135m-instruct")
    asked = TextRequest(prompt="The capital of France is", max_tokens=8, temperature=0.0, stop=("\n",))

    (answer,) = wait_for(fm.complete([asked]))

    assert answer.text is not None
    assert "Paris" in answer.text


def scores(answers: list[FMResponse]) -> np.ndarray:
    """Log-probabilities, (n_answers, n_labels)."""
    return np.array([answer.logprobs for answer in answers])
