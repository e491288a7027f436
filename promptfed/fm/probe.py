"""Finding out what an OpenAI-compatible server is and what it can do, by asking it a few tokens' worth.

In this order: the model card of ``promptfed serve``; vLLM's ``logprob_token_ids``; the most probable tokens of
``/completions``; those of ``/chat/completions``; an answer that a JSON schema binds; an answer in words. The first that
works is how labels are scored. Nothing is assumed from a server's name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from pydantic import BaseModel

from promptfed.errors import CapabilityError, ConfigError, FMError, FMUnreachableError, UnknownNameError
from promptfed.fm.dialects.base import Dialect, parsed
from promptfed.fm.dialects.chat import CHOICE_TOKENS, Chat, ChatDialect, How, in_json, label_schema
from promptfed.fm.dialects.completions import Completion, CompletionsDialect
from promptfed.fm.dialects.served import ServedDialect
from promptfed.fm.dialects.vllm import SPELT, VLLMDialect, naming
from promptfed.fm.embeddings import TokenEmbeddings
from promptfed.fm.endpoint import KEY_VARIABLE, Endpoint, UnansweredError
from promptfed.fm.weights import find_weights
from promptfed.prompts.soft import soft_prompt
from promptfed.prompts.template import content_hash
from promptfed.types import Capability, SoftSpace

CARD_S = 10.0
# A first answer may wait for a model to be compiled or loaded.
PROBE_S = 60.0
# Between tries, unless the server asks for more (Retry-After).
WAITS_S = (0.5, 1.0)
SAYS = "The sky is"
A = TypeVar("A", bound=BaseModel)
EXACT = frozenset({Capability.TEXT, Capability.LABEL_LOGPROBS})


class _Card(BaseModel):
    """What ``promptfed serve`` says of an embedded model."""

    fm_id: str
    capabilities: list[str]
    soft_space: SoftSpace | None = None


class _Model(BaseModel):
    id: str
    root: str | None = None
    max_model_len: int | None = None
    promptfed: _Card | None = None


class _Models(BaseModel):
    data: list[_Model]


async def find_dialect(endpoint: Endpoint, name: str) -> Dialect:
    """How the server at ``endpoint`` is asked for model ``name``.

    Raises `ConfigError` for a key that it refuses, `UnknownNameError` for a model that it does not have,
    `CapabilityError` if it does nothing of the above, `FMUnreachableError` where no server answers.
    """
    models = await _models(endpoint, name)
    found = next((model for model in models or [] if model.id == name), None)
    if models is not None and found is None:
        raise UnknownNameError(f"model at {endpoint.url}", name, [model.id for model in models])
    if found is not None and found.promptfed is not None:
        known = frozenset(c for c in Capability if c.value in found.promptfed.capabilities)
        served = ServedDialect(endpoint, name, found.promptfed.fm_id, known)
        served.soft_space = found.promptfed.soft_space
        return served
    return await _completions(endpoint, name, found, models or []) or await _chat(endpoint, name)


async def _models(endpoint: Endpoint, name: str) -> list[_Model] | None:
    """The models that the server lists; None if it keeps no list."""
    try:
        said = await _patiently(lambda: endpoint.get("/models", min(endpoint.timeout_s, CARD_S)))
        models = parsed(_Models, said)
    except UnansweredError as error:
        if error.status in (401, 403):
            does = "refuses this API key" if endpoint.key else "asks for an API key"
            raise ConfigError(f"{endpoint.url} {does} ({error.kind}); set {KEY_VARIABLE} to the server's") from None
        if error.status in (404, 405):
            return None
        raise FMUnreachableError(
            f"no OpenAI-compatible server answers at {endpoint.url} ({error.kind}). "
            f"To start one: promptfed serve {name}"
        ) from None
    return models.data


async def _completions(endpoint: Endpoint, name: str, found: _Model | None, models: list[_Model]) -> Dialect | None:
    plain = await _complete(endpoint, name)
    if plain is None:
        return None
    spelt = await _complete(endpoint, name, prompt=[" blue", " not blue"], **SPELT)
    tokens = [choice.prompt_token_ids for choice in spelt.choices] if spelt else []
    if len(tokens) == 2 and tokens[0] and tokens[1]:
        wanted = sorted({tokens[0][0], tokens[1][0]})
        exact = await _complete(endpoint, name, **naming(wanted))
        if exact is not None and None not in map(exact.choices[0].logprob_of, wanted):
            return await _vllm(endpoint, name, found, models, plain.system_fingerprint)
    for top in (20, 5):
        told = await _complete(endpoint, name, logprobs=top)
        if told is not None and len(told.choices[0].top) >= 2:
            known = frozenset({Capability.TEXT, Capability.TOP_LOGPROBS})
            print_ = plain.system_fingerprint
            fm_id = f"completions-top{top}:{name}@{print_ or 'unknown'}"
            return CompletionsDialect(endpoint, name, fm_id, known, top=top, fingerprint=print_)
    return None


async def _vllm(
    endpoint: Endpoint, name: str, found: _Model | None, models: list[_Model], fingerprint: str | None
) -> Dialect:
    """A server that has ``logprob_token_ids``. ``promptfed serve`` gives its model the name NAME@DIGEST too."""
    known = set(EXACT)
    read = await _complete(endpoint, name, prompt_logprobs=0)
    if read is not None and read.choices[0].prompt_logprobs:
        known.add(Capability.PROMPT_LOGPROBS)
    digest = next((m.id.removeprefix(f"{name}@") for m in models if m.id.startswith(f"{name}@")), None)
    embeddings = await _embeddings(endpoint, name, digest) if digest else None
    if embeddings is not None:
        known.add(Capability.PROMPT_EMBEDS)
    about = [name, found and (found.root, found.max_model_len), fingerprint]
    fm_id = f"vllm:{name}@{digest or content_hash(about)}"
    return VLLMDialect(
        endpoint,
        name,
        fm_id,
        frozenset(known),
        fingerprint=None if digest else fingerprint,
        embeddings=embeddings,
    )


async def _embeddings(endpoint: Endpoint, name: str, digest: str) -> TokenEmbeddings | None:
    """This machine's embeddings, if they are of the server's weights and it takes vectors."""
    try:
        folder, own = find_weights(name, fetch=False)
    except (ConfigError, UnknownNameError):
        return None
    if own != digest:
        return None
    embeddings = TokenEmbeddings(folder)
    sent = embeddings.encoded(soft_prompt([[0.0] * embeddings.hidden]), SAYS)
    return embeddings if await _complete(endpoint, name, prompt=None, prompt_embeds=[sent]) is not None else None


async def _chat(endpoint: Endpoint, name: str) -> Dialect:
    """A server that only chats. It tells no digest, but hosted APIs the dated name of the model that answers: it stands
    in the id. Their fingerprints change from answer to answer, and would part clients, and a run from its journal."""
    messages = [{"role": "user", "content": f"{SAYS} blue. Is it? Answer yes or no."}]
    for limit in ("max_tokens", "max_completion_tokens"):
        body: dict[str, Any] = {"model": name, "messages": messages, limit: 16}
        plain = await _try(Chat, endpoint, "/chat/completions", body)
        if plain is not None:
            break
    else:
        raise CapabilityError(
            f"{name} at {endpoint.url} answers neither /completions nor /chat/completions; is it a model that writes?"
        )
    model = f"{name}@{plain.model or 'unknown'}"
    for top in (20, 5):
        told = await _try(Chat, endpoint, "/chat/completions", body | {"logprobs": True, "top_logprobs": top})
        if told is not None and len(told.choices[0].top) >= 2:
            known = frozenset({Capability.TEXT, Capability.TOP_LOGPROBS})
            fm_id = f"chat-top{top}:{model}"
            return ChatDialect(endpoint, name, fm_id, known, how="logprobs", top=top, limit=limit)
    known = frozenset({Capability.TEXT, Capability.LABEL_CHOICE})
    labels = ["yes", "no"]
    asked = body | {limit: CHOICE_TOKENS, "response_format": label_schema(labels)}
    bound = await _try(Chat, endpoint, "/chat/completions", asked)
    is_bound = bound is not None and in_json(bound.choices[0].message.content or "", labels) is not None
    how: How = "schema" if is_bound else "words"
    return ChatDialect(endpoint, name, f"chat-{how}:{model}", known, how=how, limit=limit)


async def _complete(endpoint: Endpoint, name: str, **fields: Any) -> Completion | None:
    """One token, by ``/completions``; or None if the server does not know that, or ``fields``."""
    asked = {"model": name, "prompt": [SAYS], "max_tokens": 1, "temperature": 0, **fields}
    return await _try(Completion, endpoint, "/completions", asked)


async def _try(kind: type[A], endpoint: Endpoint, path: str, body: dict[str, Any]) -> A | None:
    """The answer, or None if the server does not know the path or the fields."""
    try:
        return parsed(kind, await _answer(endpoint, path, body))
    except UnansweredError:
        return None


async def _answer(endpoint: Endpoint, path: str, body: dict[str, Any]) -> Any:
    """What the server answers, or None if it does not know the path or the fields."""
    try:
        return await _patiently(lambda: endpoint.post(path, body, max(endpoint.timeout_s, PROBE_S)))
    except UnansweredError as error:
        if error.status in (401, 403):
            raise ConfigError(f"{endpoint.url} refuses this API key ({error.kind}); set {KEY_VARIABLE}") from None
        if error.outage and not (error.garbled or error.status in (404, 500, 501)):
            raise FMUnreachableError(f"{endpoint.url} answers /models but not {path} ({error.kind})") from None
        if error.status is not None and 300 <= error.status < 400:
            raise FMError(f"{endpoint.url} sends on to another address ({error.kind}): name that one") from None
        return None


async def _patiently(ask: Callable[[], Awaitable[Any]]) -> Any:
    """Asks again after what may pass: a server that was busy or failed once must not look like one that can do less."""
    for wait_s in WAITS_S:
        try:
            return await ask()
        except UnansweredError as error:
            if not (error.garbled or error.status == 429 or (error.status or 0) >= 500):
                raise
            await asyncio.sleep(max(wait_s, error.retry_after_s or 0.0))
    return await ask()
