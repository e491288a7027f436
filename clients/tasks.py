"""Who does the tasks of single methods (`promptfed.messages.methods`) at a client: one function a task.

Such a task leaves nothing behind at the client: what it has to remember from round to round comes with it. So a client
that starts again need not do it anew.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from clients.embedding import embed
from clients.evolution import evolve
from clients.policy import count_ngrams, policy_step
from clients.reflection import reflect, wins
from clients.relabelling import relabel
from clients.voting import nearest_votes, next_word
from promptfed.messages import ReplyBody, methods

if TYPE_CHECKING:
    from clients.client import Client

Doing = Callable[["Client", Any], Awaitable[ReplyBody]]

METHOD_TASKS: Mapping[type, Doing] = {
    methods.CountNgrams: count_ngrams,
    methods.Embed: embed,
    methods.Evolve: evolve,
    methods.NearestVotes: nearest_votes,
    methods.NextWord: next_word,
    methods.PolicyStep: policy_step,
    methods.Reflect: reflect,
    methods.Relabel: relabel,
    methods.Wins: wins,
}
