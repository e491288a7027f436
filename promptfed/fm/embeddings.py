"""A model's input embeddings, for soft prompts at a server that takes vectors: it takes them for the whole prompt, so
what follows a soft prompt has to be turned into vectors here, with the tokenizer and the embedding matrix of the very
weights that the server has."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from promptfed.errors import ConfigError
from promptfed.fm.weights import weight_files
from promptfed.prompts.soft import check_soft
from promptfed.types import SoftPrompt, SoftSpace

if TYPE_CHECKING:
    from torch import Tensor


def soft_space_of(matrix: Tensor) -> SoftSpace:
    """Where soft prompts of a model with this input embedding matrix (n_vocabulary, hidden) live."""
    return SoftSpace(hidden=int(matrix.shape[1]), std=float(matrix.detach().float().std(correction=0)))


class TokenEmbeddings:
    """Tokenizer and input embedding matrix of a Hugging Face model folder; read when first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def hidden(self) -> int:
        """Numbers in a vector."""
        return int(self._matrix.shape[1])

    @cached_property
    def space(self) -> SoftSpace:
        return soft_space_of(self._matrix)

    def encoded(self, soft: SoftPrompt, prompt: str, tokens: Sequence[int] = ()) -> str:
        """``soft``, the embeddings of the prompt's tokens and those of ``tokens``, (n, hidden), as vLLM's
        ``prompt_embeds``: a tensor as `torch.save` writes it, in base64. Raises `ConfigError` for a soft prompt of
        another model."""
        import torch

        ahead = torch.tensor(check_soft(soft, self.hidden), dtype=self._matrix.dtype)
        read = [*self._tokenizer.encode(prompt, add_special_tokens=False).ids, *tokens]
        buffer = io.BytesIO()
        torch.save(torch.cat([ahead, self._matrix[read]]), buffer)
        return base64.b64encode(buffer.getvalue()).decode()

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self._folder / "tokenizer.json"))

    @cached_property
    def _matrix(self) -> Tensor:
        from safetensors import safe_open

        for shard in weight_files(self._folder):
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name.endswith(("embed_tokens.weight", "wte.weight")):
                        matrix: Tensor = file.get_tensor(name)
                        return matrix
        raise ConfigError(f"{self._folder.name} has no input embeddings that promptfed knows")
