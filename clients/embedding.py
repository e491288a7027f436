"""Vectors of public texts, projected: what `Embed` asks of a client (fedpob takes prompts for its arms)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from promptfed.messages.methods import Embed, Embedded, packed

if TYPE_CHECKING:
    from clients.client import Client


async def embed(client: Client, task: Embed) -> Embedded:
    """Unit vectors times a Gaussian matrix from the task's seed: inner products stay as they are, up to a relative
    error of about 1/sqrt(dimension) (Johnson & Lindenstrauss, 1984). No FM call."""
    vectors = client.public_encoder.encode(task.texts)
    rng = np.random.default_rng(task.seed)
    projection = rng.normal(size=(vectors.shape[1], task.dimension)) / np.sqrt(task.dimension)
    return Embedded(vectors=packed(vectors @ projection))
