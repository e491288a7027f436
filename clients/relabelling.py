"""Public texts labelled by the client's foundation model with the client's own labelled texts before its eyes: what
`Relabel` asks (fed_icl).

The own texts, shots, go to the FM only. What leaves is the label probabilities of the public texts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from clients.data import Labelled, client_rng
from promptfed.errors import WireError
from promptfed.messages import Votes
from promptfed.messages.methods import Relabel
from promptfed.prompts.grammar import Draft
from promptfed.prompts.template import SLOT

if TYPE_CHECKING:
    from clients.client import Client

# A shot is cut after so many words: it has to leave room for the others, and for the text that is asked about.
MAX_SHOT_WORDS = 40


async def relabel(client: Client, task: Relabel) -> Votes:
    """Probabilities of the labels in 255ths, from one FM call a text; uniform where the FM failed.

    A text of the context is asked about with a prompt that leaves it out: it must not be shown its own label. Raises
    `WireError` unless each label has its words: with words of its choice a server could have the FM spell out a shot.
    """
    if len(task.words) != len(client.labels):
        raise WireError(f"words for {len(task.words)} labels, and there are {len(client.labels)}")
    shots = draw_shots(client.data.train, task.n_shots, client_rng(task.seed, client.client_id))
    rng = client_rng(task.seed, client.client_id, 1)
    shown = [*shots, *task.context]
    order = [shown[i] for i in rng.permutation(len(shown))]
    prompts = [
        Draft(
            instruction=task.instruction,
            fields=task.fields,
            exemplars=tuple(e for e in order if e[0] != text),
            words=task.words,
        ).template()
        for text in task.texts
    ]
    requests = [prompt.requests([text])[0] for prompt, text in zip(prompts, task.texts, strict=True)]
    answers = await client.fm.complete(requests)
    scores = np.array([p.label_scores([a]).data[0] for p, a in zip(prompts, answers, strict=True)])
    shares = np.rint(np.exp(scores) * 255).astype(np.uint8)
    return Votes(n_labels=len(client.labels), shares=shares.tobytes())


def draw_shots(data: Labelled, n: int, rng: np.random.Generator) -> list[tuple[str, int]]:
    """Up to ``n`` texts of each label that occurs, on one line each, cut after `MAX_SHOT_WORDS`."""
    shots = list[tuple[str, int]]()
    for label in np.unique(data.labels):
        mine = [i for i in np.flatnonzero(data.labels == label) if SLOT not in data.texts[i]]
        chosen = rng.permutation(mine)[:n].astype(np.int64)
        shots += [(" ".join(data.texts[i].split()[:MAX_SHOT_WORDS]), int(label)) for i in chosen]
    return shots
