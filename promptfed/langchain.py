"""promptfed in LangChain: a foundation model as a chat model, a tuned prompt as a prompt template and as a classifier.

    from promptfed.langchain import FMChatModel, classifier, prompt_template

    chat = FMChatModel(fm="embedded:smollm2-135m-instruct", max_tokens=40)
    label = classifier(promptfed.Prompt.load("runs/demo"), "embedded:smollm2-135m-instruct")
    chain = label | (lambda p: f"Say in one sentence why a review may be {p.label}.") | chat

LangChain hands texts and answers to the callbacks of a call. Where LangSmith tracing is on (the environment variable
``LANGSMITH_TRACING``) they leave this machine: leave it off where texts must not travel.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from promptfed.errors import ConfigError, FMError, FMUnreachableError
from promptfed.fm.base import BaseFM, run_sync
from promptfed.fm.completions import model_name
from promptfed.prompts.artefact import Prediction, PromptSet
from promptfed.prompts.calibration import Calibration
from promptfed.prompts.template import SLOT, PromptTemplate
from promptfed.registry import model_of
from promptfed.types import Capability, FMResponse, TextRequest

try:
    from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
    from langchain_core.language_models import BaseChatModel, LangSmithParams
    from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, SystemMessage
    from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
    from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
    from langchain_core.prompts import ChatPromptTemplate
    from langchain_core.runnables import Runnable, RunnableConfig
except ImportError:
    raise ConfigError("promptfed.langchain needs a package more: pip install 'promptfed[langchain]'") from None

_ROLES = ((SystemMessage, "System"), (HumanMessage, "User"), (AIMessage, "Assistant"))
# A model that has answered may go on and write the next question as well.
_NEXT_TURN = "\nUser:"


class Sampling(BaseModel):
    """How an answer is written: the fields of `TextRequest`, with bounds."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    max_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()


class FMChatModel(BaseChatModel, Sampling):
    """A promptfed foundation model, or the model at an address such as ``embedded:NAME``, as a chat model.

    It reads a `transcript` of the messages and continues it. With ``raw`` it reads one human message as it stands: what
    a tuned prompt needs (`prompt_template`). White space around an answer is removed. The fields of `Sampling` may be
    given for one call, too (``chat.invoke(messages, seed=3)``, or ``chat.bind``). The same call has the same answer.
    A streamed answer comes in one piece; ``streaming`` is a field because LangChain's callers set it.

    ``response_metadata`` has ``model_name``, ``fm_id``, ``finish_reason`` (length or stop) and ``truncated``: whether
    the prompt was too long for the model and was cut.

    Raises `CapabilityError` for a model that does not write, `FMError` where it fails (`FMUnreachableError` where it is
    not reached), and `ConfigError` for messages that are not text, and options of a call that it does not have.
    """

    fm: BaseFM | str
    raw: bool = False
    streaming: bool = False
    _fm: BaseFM = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        super().model_post_init(context)
        self._fm = model_of(self.fm)
        self._fm.require(Capability.TEXT, "FMChatModel")

    @property
    def _llm_type(self) -> str:
        return "promptfed"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        """All that an answer depends on: LangChain's cache of answers goes by it."""
        return {"fm_id": self._fm.fm_id, "raw": self.raw, **self._sampling()}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=list(self.stop) if stop is None else stop, **kwargs)
        params["ls_provider"] = "promptfed"
        params.setdefault("ls_model_name", model_name(self._fm.fm_id))
        return params

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002
        **kwargs: Any,
    ) -> ChatResult:
        request = self._request(messages, stop, kwargs)
        (answer,) = run_sync(self._fm.complete([request]))
        return self._result(request, answer)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,  # noqa: ARG002
        **kwargs: Any,
    ) -> ChatResult:
        request = self._request(messages, stop, kwargs)
        (answer,) = await self._fm.complete([request])
        return self._result(request, answer)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        yield _whole(self._generate(messages, stop, **kwargs))

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,  # noqa: ARG002
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        yield _whole(await self._agenerate(messages, stop, **kwargs))

    def _sampling(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in Sampling.model_fields}

    def _request(self, messages: Sequence[BaseMessage], stop: list[str] | None, options: dict[str, Any]) -> TextRequest:
        if stop is not None:
            options = {**options, "stop": stop}
        try:
            used = Sampling.model_validate({**self._sampling(), **options})
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise ConfigError(
                f"the option {place} of a call: {first['msg']}; a call may have {', '.join(Sampling.model_fields)}"
            ) from None
        prompt, ends = (_alone(messages), ()) if self.raw else (transcript(messages), (_NEXT_TURN,))
        return TextRequest(prompt=prompt, **{**used.model_dump(), "stop": (*used.stop, *ends)})

    def _result(self, request: TextRequest, answer: FMResponse) -> ChatResult:
        if answer.text is None:
            kind = FMUnreachableError if answer.outage else FMError
            raise kind(f"{self._fm.fm_id} gave no answer: {answer.error}")
        message = AIMessage(
            content=answer.text.strip(),
            usage_metadata=UsageMetadata(
                input_tokens=answer.prompt_tokens,
                output_tokens=answer.completion_tokens,
                total_tokens=answer.prompt_tokens + answer.completion_tokens,
                input_token_details=InputTokenDetails(cache_read=answer.cached_tokens),
            ),
            response_metadata={
                "model_name": model_name(self._fm.fm_id),
                "fm_id": self._fm.fm_id,
                "finish_reason": "length" if answer.completion_tokens >= request.max_tokens else "stop",
                "truncated": answer.truncated,
            },
        )
        return ChatResult(generations=[ChatGeneration(message=message)])


def transcript(messages: Sequence[BaseMessage]) -> str:
    """What a model is asked to continue. Its answer ends where it begins another turn of the user::

        System: Be brief.
        User: Which month is the shortest?
        Assistant:

    It is plain: nothing in a message is escaped, and names of speakers are not shown. A model's own chat template is
    its adapter's affair. Raises `ConfigError` for messages of another kind, or with anything but text in them.
    """
    if not messages:
        raise ConfigError("a chat needs at least one message")
    return "\n".join([*(f"{_role(message)}: {_text(message)}" for message in messages), "Assistant:"])


def prompt_template(prompt: PromptTemplate) -> ChatPromptTemplate:
    """A tuned prompt as one human message with the variable ``text``; nothing else in it is interpreted.

    A prompt is tuned for a model that continues it: ask ``FMChatModel(raw=True)``. A chat model that answers instead
    may do worse, and says neither label words only nor probabilities; `classifier` does.
    """
    before, after = (part.replace("{", "{{").replace("}", "}}") for part in prompt.text.split(SLOT))
    return ChatPromptTemplate.from_messages([("human", before + SLOT + after)])


def classifier(
    prompt_set: PromptSet, fm: BaseFM | str, calibration: Calibration | None = None
) -> Runnable[str, Prediction]:
    """The result of a run as a step of a chain, from a text to its `Prediction`.

    ``fm`` is a model or its address; ``calibration`` is a client's own, and the pooled one is the default. It costs one
    FM call a text and prompt, and ``batch`` asks for all of them at once. A text that the FM failed on has ``label``
    None, as in `PromptSet.predict`. Raises `CapabilityError` for a model that can't score labels, and `ConfigError` for
    prompts that generate.
    """
    if not prompt_set.labels:
        raise ConfigError("classifier needs prompts with labels; those that generate are for prompt_template")
    model = model_of(fm)
    model.require(Capability.LABEL_CHOICE, "classifier")
    return _Classifier(prompt_set, model, calibration)


class _Classifier(Runnable[str, Prediction]):
    def __init__(self, prompt_set: PromptSet, fm: BaseFM, calibration: Calibration | None) -> None:
        self._prompt_set, self._fm, self._calibration = prompt_set, fm, calibration
        self.name = f"promptfed_{prompt_set.prompt_id}"

    def invoke(self, input: str, config: RunnableConfig | None = None, **kwargs: Any) -> Prediction:  # noqa: A002
        return self.batch([input], config, **kwargs)[0]

    async def ainvoke(
        self,
        input: str,  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> Prediction:
        return (await self.abatch([input], config, **kwargs))[0]

    def batch(
        self,
        inputs: list[str],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Prediction]:
        return self._batch_with_config(self._predict, inputs, config, return_exceptions=return_exceptions, **kwargs)

    async def abatch(
        self,
        inputs: list[str],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Prediction]:
        return await self._abatch_with_config(
            self._apredict, inputs, config, return_exceptions=return_exceptions, **kwargs
        )

    def _predict(self, texts: list[str]) -> list[Exception | Prediction]:
        return run_sync(self._apredict(texts))

    async def _apredict(self, texts: list[str]) -> list[Exception | Prediction]:
        prompts, n = self._prompt_set.prompts, len(texts)
        answers = await self._fm.complete([request for prompt in prompts for request in prompt.requests(texts)])
        scores = [prompt.label_scores(answers[j * n : (j + 1) * n]) for j, prompt in enumerate(prompts)]
        return [*self._prompt_set.predict_from(scores, self._calibration)]


def _whole(result: ChatResult) -> ChatGenerationChunk:
    """An answer as the only piece of a stream."""
    message = result.generations[0].message
    return ChatGenerationChunk(message=AIMessageChunk(**message.model_dump(exclude={"type"}), chunk_position="last"))


def _alone(messages: Sequence[BaseMessage]) -> str:
    """The text of the one human message that a raw model reads."""
    if [_role(message) for message in messages] != ["User"]:
        raise ConfigError(f"with raw, the prompt is one human message; got {[message.type for message in messages]}")
    return _text(messages[0])


def _role(message: BaseMessage) -> str:
    role = next((role for kind, role in _ROLES if isinstance(message, kind)), None)
    if role is None:
        raise ConfigError(f"a promptfed chat has system, human and AI messages; got a {message.type} message")
    return role


def _text(message: BaseMessage) -> str:
    if other := sorted({block["type"] for block in message.content_blocks} - {"text"}):
        raise ConfigError(f"a promptfed model reads text only; the {message.type} message holds {', '.join(other)}")
    return str(message.text)
