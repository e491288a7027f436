"""A model's own embeddings as a server that takes vectors wants them."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from promptfed.errors import ConfigError
from promptfed.fm.dialects.vllm import VLLMDialect
from promptfed.fm.embeddings import TokenEmbeddings
from promptfed.fm.endpoint import Endpoint
from promptfed.prompts.soft import soft_prompt


def test_a_prompt_becomes_the_soft_vectors_and_the_rows_of_its_tokens(tiny_llama: Path) -> None:
    embeddings = TokenEmbeddings(tiny_llama)
    matrix = load_file(tiny_llama / "model.safetensors")["model.embed_tokens.weight"]
    tokens = Tokenizer.from_file(str(tiny_llama / "tokenizer.json")).encode("ab").ids

    sent = embeddings.encoded(soft_prompt(np.full((3, 64), 0.5)), "ab")

    tensor = torch.load(io.BytesIO(base64.b64decode(sent)), weights_only=True)
    assert embeddings.hidden == 64
    assert tensor.tolist() == [[0.5] * 64] * 3 + matrix[tokens].tolist()


def test_a_soft_prompt_of_another_model_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="vectors of 8 numbers, the model of 64"):
        TokenEmbeddings(tiny_llama).encoded(soft_prompt(np.zeros((1, 8))), "ab")


def test_the_space_of_soft_prompts_is_that_of_the_embedding_matrix(tiny_llama: Path) -> None:
    matrix = load_file(tiny_llama / "model.safetensors")["model.embed_tokens.weight"].numpy()
    embeddings = TokenEmbeddings(tiny_llama)
    nowhere = Endpoint("http://127.0.0.1:9/v1", timeout_s=1.0)

    space = VLLMDialect(nowhere, "m", "vllm:m@1", frozenset(), embeddings=embeddings).soft_space

    assert space is not None
    assert space.hidden == 64
    assert space.std == pytest.approx(float(matrix.std()), rel=1e-5)
    assert VLLMDialect(nowhere, "m", "vllm:m@1", frozenset()).soft_space is None
