"""Who does the tasks of single methods (`promptfed.messages.methods`) at a client: one function a task.

Such a task leaves nothing behind at the client: what it has to remember from round to round comes with it. So a client
that starts again need not do it anew.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from clients.embedding import embed
from clients.relabelling import relabel
from promptfed.messages import ReplyBody
from promptfed.messages.methods import Embed, Relabel

if TYPE_CHECKING:
    from clients.client import Client

Doing = Callable[["Client", Any], Awaitable[ReplyBody]]

METHOD_TASKS: Mapping[type, Doing] = {Embed: embed, Relabel: relabel}
