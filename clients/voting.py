"""Private votes of a client's texts on public candidates: tasks of ``dp_opt_vote`` and ``aug_pe``.

A text more or less at the client changes the exact votes by a bounded amount; what leaves is the votes with Gaussian
noise on each number, rounded to whole numbers: that tells nothing more, and leaves no low-order bits from which the
exact number could be read (Holohan & Braghin, ESORICS 2021, doi 10.1007/978-3-030-88428-4_26, on what they give away).
`promptfed.privacy.accounting` says what that amounts to.

Noise and sampling coins come from the client's `Secret`, the task and, for the noise, the exact votes: a task that
comes twice gets the same answer, which tells nothing new, and votes of other texts get noise of their own.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from promptfed.messages.methods import NearestVotes, NextWord, NoisyVotes, packed
from promptfed.prompts.meta import next_word_request
from promptfed.prompts.template import content_hash
from promptfed.types import FloatArray, IntArray

if TYPE_CHECKING:
    from clients.client import Client

# Words of a text that stand in a meta-prompt: what is longer is cut, so that a group fits into a small model's context.
MAX_WORDS = 60


async def nearest_votes(client: Client, task: NearestVotes) -> NoisyVotes:
    """Histogram over labels and candidates: each text has a vote under its label for the candidate whose vector is
    nearest (cosine)."""
    data = client.data.train
    votes = np.zeros((len(client.labels), len(task.texts)))
    similarity = client.encoder.encode(data.texts) @ client.public_encoder.encode(task.texts).T
    np.add.at(votes, (data.labels, similarity.argmax(axis=1)), 1.0)
    return noised(client, task, votes.ravel())


async def next_word(client: Client, task: NextWord) -> NoisyVotes:
    """Histogram over the candidate words: each group of texts has the FM say one. A group that got no answer has no
    vote. Costs ``n_groups`` FM calls, however many texts were drawn."""
    data = client.data.train
    requests = [
        next_word_request(
            [(" ".join(data.texts[i].split()[:MAX_WORDS]), task.words[data.labels[i]]) for i in group],
            task.fields,
            task.shown,
            task.written,
            task.candidates,
        )
        for group in _groups(client, task)
    ]
    votes = np.zeros(len(task.candidates))
    for answer in await client.fm.complete(requests):
        if answer.logprobs is not None and len(answer.logprobs) == len(votes):
            votes[int(np.argmax(answer.logprobs))] += 1.0
    return noised(client, task, votes)


def _groups(client: Client, task: NextWord) -> list[IntArray]:
    """The texts of each group, in random order. Every text's coin and group are its own affair: a text more leaves all
    other groups as they are."""
    n = len(client.data.train)
    coin, order = (client.secret.uniforms(n, purpose, _name_of(task)) for purpose in ("sample", "order"))
    group = np.where(coin < task.sampling_rate, np.floor(coin / task.sampling_rate * task.n_groups), -1)
    by_order = np.argsort(order)
    return [by_order[group[by_order] == g][: task.max_texts] for g in range(task.n_groups)]


def noised(client: Client, task: NextWord | NearestVotes, votes: FloatArray) -> NoisyVotes:
    """The votes as they may leave."""
    noise = task.noise * client.secret.normals(len(votes), "noise", _name_of(task), repr(votes.tolist()))
    return NoisyVotes(votes=packed(np.rint(votes + noise)))


def _name_of(task: NextWord | NearestVotes) -> str:
    return content_hash(asdict(task), 64)
