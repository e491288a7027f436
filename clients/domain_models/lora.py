"""``lora``: a small language model whose last layers are adapted by low-rank matrices, under a linear head over the
last hidden state of its last token (Hu et al., ICLR 2022, arXiv 2106.09685).

The language model itself is frozen, loaded once a process, and shared by all clients of a simulation: what a client
owns is its ``parameters``, the low-rank matrices and the head, some 60,000 numbers for the packaged model.
"""

from __future__ import annotations

import io
import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np

from clients.domain_models.linear import LinearHead
from promptfed.errors import ConfigError
from promptfed.fm.weights import find_weights
from promptfed.types import Encoder, FloatArray

if find_spec("peft") is None:  # told when the kind is named, before a run begins
    raise ConfigError("domain model 'lora' needs a package more: pip install 'promptfed[lora]'")

RANK, N_ADAPTED = 8, 4
# What stands behind a text, so that the model is about to sum it up where its state is read: on sentiment, 96 labels,
# a head alone gets .80 with it, .77 without, and .67 from the mean of all states.
ENDING = "\nThis text is"
MAX_TOKENS = 128
BATCH, WEIGHT_DECAY = 16, 0.01
# The head starts from nothing and has to come further than the matrices.
LEARNING_RATE, HEAD_RATE = 1e-3, 1e-2
# Passes over the texts of a whole fit, and steps at least.
EPOCHS, LEAST_STEPS = 6, 40


class LoRADomainModel:
    """A language model by packaged name, folder or hub name. The encoder is not used.

    Matrices A are drawn from ``seed``, the same at all clients; matrices B and the head start at zero, so that it
    starts as the frozen model with a uniform prediction. A head that is still zero is first fitted alone, on what the
    frozen model makes of the texts: from a random head, the first steps would only spoil the model (Kumar et al., ICLR
    2022, arXiv 2202.10054).
    """

    def __init__(
        self,
        encoder: Encoder,  # noqa: ARG002
        n_labels: int,
        *,
        seed: int = 0,
        name: str = "smollm2-135m-instruct",
    ) -> None:
        self._shared, self._n_labels, self._seed = _shared(name), n_labels, seed
        self._start = np.concatenate([self._shared.first(seed), np.zeros(n_labels * (self._shared.width + 1))])
        self.parameters: FloatArray = self._start

    def fit(self, texts: Sequence[str], targets: FloatArray) -> LoRADomainModel:
        self.parameters = self._start
        n_steps = max(LEAST_STEPS, math.ceil(EPOCHS * len(texts) / BATCH))
        self.parameters = self.trained(texts, targets, n_steps=n_steps)
        return self

    def trained(self, texts: Sequence[str], targets: FloatArray, *, n_steps: int, proximal: float = 0.0) -> FloatArray:
        """As `clients.domain_models.base.Averageable` says; a step is one of AdamW on a batch of 16 texts."""
        import torch

        weighty = np.flatnonzero(targets.sum(axis=1) > 0)
        if not len(weighty):
            return self.parameters
        rng = np.random.default_rng(self._seed)
        begun = self.parameters
        if not begun[len(self._shared.first(0)) :].any():
            begun = self._probed([texts[i] for i in weighty.tolist()], targets[weighty], proximal)
        with self._shared.holding(begun, self._n_labels) as (adapted, head):
            start = [p.detach().clone() for p in (*adapted, *head)]
            groups = [{"params": adapted, "lr": LEARNING_RATE}, {"params": list(head), "lr": HEAD_RATE}]
            optimiser = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
            left: list[int] = []
            for _ in range(n_steps):
                if len(left) < min(BATCH, len(weighty)):
                    left = [*left, *rng.permutation(weighty).tolist()]
                batch, left = left[:BATCH], left[BATCH:]
                goal = torch.tensor(targets[batch], dtype=torch.float32)
                logp = torch.log_softmax(self._shared.logits([texts[i] for i in batch], head), dim=1)
                loss = -(goal * logp).sum() / goal.sum()
                if proximal:
                    moved = ((p - s).square().sum() for p, s in zip((*adapted, *head), start, strict=True))
                    loss = loss + proximal / 2 * sum(moved)
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            return _flat([*adapted, *head])

    def _probed(self, texts: Sequence[str], targets: FloatArray, proximal: float) -> FloatArray:
        """The parameters with a head that was fitted alone. What all texts have in common is nearly all of a hidden
        state, so the head is fitted on what is left, brought to about length 1."""
        import torch

        with self._shared.holding(self.parameters, self._n_labels), torch.no_grad():
            x = np.concatenate(
                [self._shared.features(texts[i : i + BATCH]).double().numpy() for i in range(0, len(texts), BATCH)]
            )
        mean = x.mean(axis=0)
        scale = max(float(np.linalg.norm(x - mean, axis=1).mean()), 1e-6)
        head = LinearHead(self._n_labels).fit((x - mean) / scale, targets, proximal=proximal * len(texts))
        flat = np.zeros(self._n_labels * (x.shape[1] + 1)) if head.flat is None else head.flat
        w, b = flat[: -self._n_labels].reshape(self._n_labels, -1) / scale, flat[-self._n_labels :]
        n_matrices = len(self.parameters) - len(flat)
        return np.concatenate([self.parameters[:n_matrices], w.ravel(), b - w @ mean])

    def predict_proba(self, texts: Sequence[str]) -> FloatArray:
        import torch

        out = np.zeros((len(texts), self._n_labels))
        with self._shared.holding(self.parameters, self._n_labels) as (_, head), torch.no_grad():
            for start in range(0, len(texts), BATCH):
                logits = self._shared.logits(texts[start : start + BATCH], head)
                out[start : start + BATCH] = torch.softmax(logits.double(), dim=1).numpy()
        return out


class _Shared:
    """The frozen model with places for low-rank matrices in its last layers."""

    def __init__(self, name: str) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModel, AutoTokenizer

        folder, _ = find_weights(name)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        with redirect_stderr(io.StringIO()):  # the loader draws a progress bar of its own
            base = AutoModel.from_pretrained(folder, dtype=torch.float32)
        n_layers = base.config.num_hidden_layers
        adapted = "|".join(str(i) for i in range(max(0, n_layers - N_ADAPTED), n_layers))
        places = rf"layers\.({adapted})\.self_attn\.(q|v)_proj"
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=places)
        with warnings.catch_warnings():  # peft asks transformers for what has another name by now
            warnings.simplefilter("ignore", FutureWarning)
            self._model = get_peft_model(base, config).eval()
        self._adapted = [p for name, p in self._model.named_parameters() if p.requires_grad]
        self._is_a = ["lora_A" in name for name, p in self._model.named_parameters() if p.requires_grad]
        self.width = int(base.config.hidden_size)
        self._pad = self._tokenizer.pad_token_id or 0
        self._lock = threading.RLock()

    def first(self, seed: int) -> FloatArray:
        """A of standard deviation 1/sqrt(inputs), B zero."""
        rng = np.random.default_rng(seed)
        parts = [
            rng.normal(size=p.shape) / np.sqrt(p.shape[1]) if is_a else np.zeros(tuple(p.shape))
            for p, is_a in zip(self._adapted, self._is_a, strict=True)
        ]
        return np.concatenate([part.ravel() for part in parts])

    @contextmanager
    def holding(self, flat: FloatArray, n_labels: int) -> Iterator[tuple[list[Any], tuple[Any, Any]]]:
        """The places filled with ``flat``, and the head; nobody else's in the meantime."""
        import torch

        with self._lock, torch.no_grad():
            at = 0
            for p in self._adapted:
                p.copy_(torch.tensor(flat[at : at + p.numel()], dtype=torch.float32).view(p.shape))
                at += p.numel()
            w = torch.tensor(flat[at : at + n_labels * self.width], dtype=torch.float32).view(n_labels, self.width)
            b = torch.tensor(flat[at + n_labels * self.width :], dtype=torch.float32)
            with torch.enable_grad():
                yield self._adapted, (w.requires_grad_(), b.requires_grad_())

    def logits(self, texts: Sequence[str], head: tuple[Any, Any]) -> Any:
        """(n, K)."""
        return self.features(texts) @ head[0].T + head[1]

    def features(self, texts: Sequence[str]) -> Any:
        """(n, width): the last hidden state behind text and `ENDING`, of length 1."""
        import torch

        end = self._tokenizer(ENDING, add_special_tokens=False)["input_ids"]
        ids = [self._tokenizer(text)["input_ids"][: MAX_TOKENS - len(end)] + end for text in texts]
        longest = max(map(len, ids))
        tokens = torch.tensor([mine + [self._pad] * (longest - len(mine)) for mine in ids])
        mask = torch.tensor([[1] * len(mine) + [0] * (longest - len(mine)) for mine in ids])
        hidden = self._model(input_ids=tokens, attention_mask=mask).last_hidden_state
        last = hidden[torch.arange(len(ids)), torch.tensor([len(mine) - 1 for mine in ids])]
        return last / last.norm(dim=1, keepdim=True).clamp_min(1e-6)


@lru_cache(maxsize=2)
def _shared(name: str) -> _Shared:
    return _Shared(name)


def _flat(parts: Sequence[Any]) -> FloatArray:
    return np.concatenate([p.detach().double().numpy().ravel() for p in parts])
