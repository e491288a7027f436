"""Any causal language model that transformers computes, behind the same interface as `PackedLlama`, and slower.

The prompt's keys and values are computed once and copied for each batch. Branches of a tree become rows of their own,
and rows are padded at their end: what comes after a token never changes what is computed for it, so no mask and no
positions need to be made up, whatever the model does with them.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from promptfed.errors import ConfigError
from promptfed.fm.packed import Tree, fast_device, fast_dtype

# Logits that may be held at once: 256 MB in float32.
MAX_LOGITS = 64_000_000
Prefix = list[Any]  # the model's own cache, of one row; empty for an empty prompt


class GenericLM:
    """Weights of a Hugging Face folder with a causal language model. Raises `ConfigError` if it can't be used."""

    def __init__(self, folder: Path, dtype: torch.dtype | None = None, device: torch.device | None = None) -> None:
        config = json.loads((folder / "config.json").read_text())
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype or fast_dtype(), attn_implementation="eager", local_files_only=True
            )
        except (ValueError, OSError, ImportError) as error:
            raise ConfigError(
                f"{folder.name} does not load as a causal language model (model_type {config.get('model_type')!r}, "
                f"{type(error).__name__}). Choose a folder that transformers' AutoModelForCausalLM reads"
            ) from None
        self._model = model.to(device or fast_device()).eval()
        self._takes_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        text = model.config.get_text_config()
        self.context: int = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 2048
        self.hidden_size: int = model.get_input_embeddings().weight.shape[1]

    @property
    def embedding(self) -> Tensor:
        """The input embedding matrix, (n_vocabulary, hidden)."""
        matrix: Tensor = self._model.get_input_embeddings().weight
        return matrix

    @torch.inference_mode()
    def embed(self, tokens: Sequence[int]) -> Tensor:
        """The input embeddings of tokens, (n, hidden)."""
        ids = torch.tensor(tokens, dtype=torch.long, device=self._model.device)
        embedded: Tensor = self._model.get_input_embeddings()(ids)
        return embedded

    @torch.inference_mode()
    def prefill(self, prompt: Sequence[int] | Tensor) -> Prefix:
        """What the model keeps of a prompt: tokens, or their embeddings (n, hidden). An empty prompt gives ``[]``."""
        if not len(prompt):
            return []
        embedded = prompt if isinstance(prompt, Tensor) else self.embed(prompt)
        made = self._model(inputs_embeds=embedded.to(self._model.dtype)[None], use_cache=True, **self._keep([-1]))
        return [made.past_key_values]

    @torch.inference_mode()
    def hidden(self, trees: Sequence[Tree], prefix: Prefix) -> Tensor:
        """Logits (n, n_vocabulary) in float32: of each tree after the last token of its body, then after all tokens of
        its branches."""
        # A row: tokens, and how many of its last places are wanted; the first of a tree shows its body's end too.
        rows = [
            (tree.body + branch, len(branch) + (b == 0))
            for tree in trees
            for b, branch in enumerate(tree.branches or ((),))
            if b == 0 or branch
        ]
        n_vocabulary, parts = self._model.config.get_text_config().vocab_size, []
        at = 0
        while at < len(rows):
            n = 1
            while at + n < len(rows) and self._places(rows[at : at + n + 1]) * n_vocabulary <= MAX_LOGITS:
                n += 1
            parts.append(self._wanted(rows[at : at + n], prefix))
            at += n
        return torch.cat(parts)

    def logits(self, states: Tensor) -> Tensor:
        return states

    def logits_of(self, states: Tensor, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Of one token at each of ``rows`` of `hidden`."""
        return states[list(rows), list(tokens)]

    def _keep(self, places: Sequence[int]) -> dict[str, Any]:
        return {"logits_to_keep": torch.tensor(places, device=self._model.device)} if self._takes_rows else {}

    def _places(self, rows: Sequence[tuple[tuple[int, ...], int]]) -> int:
        """How many logits rows a batch makes: every row's wanted places, at all rows (or all places)."""
        return len(rows) * (len(_wanted_places(rows)) if self._takes_rows else max(len(tokens) for tokens, _ in rows))

    def _wanted(self, rows: Sequence[tuple[tuple[int, ...], int]], prefix: Prefix) -> Tensor:
        longest = max(len(tokens) for tokens, _ in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        for line, (tokens, _) in zip(ids, rows, strict=True):
            line[: len(tokens)] = torch.tensor(tokens)
        cache = None
        if prefix:
            cache = copy.deepcopy(prefix[0])
            cache.batch_repeat_interleave(len(rows))
        places = _wanted_places(rows) if self._takes_rows else list(range(longest))
        made = self._model(
            input_ids=ids.to(self._model.device),
            past_key_values=cache,
            use_cache=cache is not None,
            **self._keep(places),
        )
        column = {place: c for c, place in enumerate(places)}
        chosen = [
            (r, column[place]) for r, (tokens, n) in enumerate(rows) for place in range(len(tokens) - n, len(tokens))
        ]
        row, col = zip(*chosen, strict=True)
        return made.logits[list(row), list(col)].float()  # type: ignore[no-any-return]


def _wanted_places(rows: Sequence[tuple[tuple[int, ...], int]]) -> list[int]:
    return sorted({place for tokens, n in rows for place in range(len(tokens) - n, len(tokens))})
