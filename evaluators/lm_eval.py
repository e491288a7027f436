"""promptfed in lm-evaluation-harness (lm-eval): a foundation model, or a tuned prompt set, as a model of the harness.

    import lm_eval
    from evaluators.lm_eval import PromptfedLM, evaluate_prompt

    lm_eval.simple_evaluate(model=PromptfedLM("embedded:smollm2-135m-instruct"), tasks=["lambada_openai"])
    tuned = promptfed.Prompt.load("runs/demo")
    evaluate_prompt(tuned, "embedded:smollm2-135m-instruct", "examples/lm_eval", "sentiment5_sample")

By itself the harness keeps every text in its result, and logs a row whose target is no choice. `evaluate_prompt` has it
do neither.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from promptfed.errors import ConfigError, DataError, FMError, UnknownNameError
from promptfed.fm.base import BaseFM, run_sync
from promptfed.prompts.artefact import PromptSet
from promptfed.prompts.calibration import Calibration
from promptfed.registry import model_of
from promptfed.types import Capability, FMRequest, FMResponse, LabelRequest, TextRequest

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.evaluator import evaluate
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
except ImportError:
    raise ConfigError("evaluators.lm_eval needs a package more: pip install 'promptfed[lm-eval]'") from None

# Above it every token has more than half of the probability, so none is more probable.
_SURELY_GREEDY = math.log(0.5)
_GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}

Pair = tuple[str, str]  # a context and its continuation, neither empty


class PromptfedLM(LM):  # type: ignore[misc]
    """A promptfed foundation model, or the model at an address such as ``embedded:NAME``.

    ``end_of_text`` is how the model writes its end-of-text token, which stands in for an empty context.
    ``rolling_window`` is the longest text, in characters, whose `loglikelihood_rolling` is asked for in one piece.

    Nothing is cut: a context that the model has no room for is a failure. `FMError` says how many requests failed.
    """

    def __init__(self, fm: BaseFM | str, *, end_of_text: str = "<|endoftext|>", rolling_window: int = 6000) -> None:
        super().__init__()
        if rolling_window < 2:
            raise ConfigError(f"rolling_window is {rolling_window} characters; expected 2 or more")
        self._fm = model_of(fm)
        self._end_of_text = end_of_text
        self._window = rolling_window

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """The log-probability of each continuation over the whole vocabulary, and whether it is greedy.

        White space that ends a context goes with the continuation, as in the harness's own models. One FM call a
        context, and one more for each token that greedy decoding has in common with a continuation whose probability
        is 0.5 or less. Greedy: decoding writes the continuation, and ends a token where it ends.
        """
        self._fm.require(Capability.PROMPT_LOGPROBS, "loglikelihood of lm-eval")
        self._fm.require(Capability.TEXT, "loglikelihood of lm-eval")
        pairs = [self._pair(*request.args) for request in requests]
        logp = self._score(pairs)
        greedy = {pair for pair in logp if logp[pair] > _SURELY_GREEDY}
        greedy |= self._written(logp.keys() - greedy)
        return [(logp[pair], pair in greedy) for pair in pairs]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """The log-probability of each text after the end-of-text token.

        A text that is longer than ``rolling_window`` is cut, before a space where there is one, into pieces of half of
        it at most, each scored as the continuation of the piece before it alone. Every character is scored once.
        """
        self._fm.require(Capability.PROMPT_LOGPROBS, "loglikelihood_rolling of lm-eval")
        texts = [self._pieces(*request.args) for request in requests]
        logp = self._score([pair for pairs in texts for pair in pairs])
        return [math.fsum(logp[pair] for pair in pairs) for pairs in texts]

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """What the model writes after each context. A context that is asked about again has another seed.

        Raises `ConfigError` for generation options other than until, max_gen_toks, do_sample, temperature and top_p.
        """
        self._fm.require(Capability.TEXT, "generate_until of lm-eval")
        seen: Counter[str] = Counter()
        asked = []
        for request in requests:
            context, options = request.args
            asked.append(self._text_request(context, options, seed=seen[context]))
            seen[context] += 1
        return [answer.text or "" for answer in _ask(self._fm, asked)]

    def _pair(self, context: str, continuation: str) -> Pair:
        stem = context.rstrip()
        return stem or self._end_of_text, context[len(stem) :] + continuation

    def _pieces(self, text: str) -> list[Pair]:
        longest = self._window if len(text) <= self._window else self._window // 2
        pieces = []
        while len(text) > longest:
            space = text.rfind(" ", 1, longest + 1)
            cut = space if space > 0 else longest
            pieces.append(text[:cut])
            text = text[cut:]
        if text:
            pieces.append(text)
        return list(zip([self._end_of_text, *pieces], pieces, strict=False))

    def _text_request(self, context: str, options: Mapping[str, Any], seed: int) -> TextRequest:
        given = normalize_gen_kwargs(dict(options))
        if unknown := sorted(set(given) - _GENERATION):
            raise ConfigError(
                f"generation_kwargs has {', '.join(unknown)}; promptfed can do {', '.join(sorted(_GENERATION))}"
            )
        return TextRequest(
            prompt=context or self._end_of_text,
            max_tokens=given["max_gen_toks"],
            temperature=given.get("temperature", 1.0) if given["do_sample"] else 0.0,
            top_p=given.get("top_p", 1.0),
            seed=seed,
            stop=tuple(stop for stop in given["until"] if stop),
        )

    def _score(self, pairs: Collection[Pair]) -> dict[Pair, float]:
        """Each pair's log-probability; one request a context."""
        wanted: dict[str, dict[str, None]] = {}
        for context, continuation in pairs:
            wanted.setdefault(context, {})[continuation] = None
        asked = [
            LabelRequest(prefix="", text=context, suffix="", labels=tuple(continuations), absolute=True)
            for context, continuations in wanted.items()
        ]
        return {
            (request.text, label): logp
            for request, answer in zip(asked, _ask(self._fm, asked), strict=True)
            for label, logp in zip(request.labels, answer.logprobs or (), strict=True)
        }

    def _written(self, pairs: Collection[Pair]) -> set[Pair]:
        """Those pairs whose continuation greedy decoding writes.

        Only texts of one token more each time show where tokens end. They grow while they agree with a continuation:
        for most contexts, one token says that it does not.
        """
        found: set[Pair] = set()
        live, n = set(pairs), 0
        while live:
            n += 1
            contexts = sorted({context for context, _ in live})
            asked = [TextRequest(prompt=context, max_tokens=n, stop=()) for context in contexts]
            answers = dict(zip(contexts, _ask(self._fm, asked), strict=True))
            found |= {(context, wanted) for context, wanted in live if answers[context].text == wanted}
            live = {(context, wanted) for context, wanted in live - found if _may_become(answers[context], wanted, n)}
        return found


class PromptSetLM(LM):  # type: ignore[misc]
    """A tuned prompt set on a foundation model (or its address), for multiple-choice tasks.

    The choices are the prompt set's labels, and the context is the text to label, as it is. A choice's log-probability
    is that of `PromptSet.predict`, and the label that it predicts is the greedy one. ``calibration`` is a client's own;
    the pooled one is the default.
    """

    def __init__(self, prompt_set: PromptSet, fm: BaseFM | str, *, calibration: Calibration | None = None) -> None:
        super().__init__()
        self._prompt_set = prompt_set
        self._fm = model_of(fm)
        self._calibration = calibration

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Raises `ConfigError` where a choice is no label of the prompt set, `FMError` where the model failed."""
        labels = self._prompt_set.labels
        asked = [(context, continuation.strip()) for context, continuation in (r.args for r in requests)]
        if strays := sum(label not in labels for _, label in asked):
            raise ConfigError(
                f"{strays} of {len(asked)} choices of the task are no labels of the prompt set; expected "
                f"doc_to_choice to be {', '.join(labels)}"
            )
        texts = list(dict.fromkeys(text for text, _ in asked))
        predictions = self._prompt_set.predict(texts, fm=self._fm, calibration=self._calibration)
        if failed := sum(p.label is None for p in predictions):
            raise FMError(f"{failed} of {len(texts)} texts failed at {self._fm.fm_id}")
        of = dict(zip(texts, predictions, strict=True))
        return [(_log(of[text].proba[label]), of[text].label == label) for text, label in asked]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:  # noqa: ARG002
        raise ConfigError("a prompt set labels texts and can't score them; give the model itself, as PromptfedLM")

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:  # noqa: ARG002
        raise ConfigError("a prompt set labels texts and writes none; give the model itself, as PromptfedLM")


def evaluate_prompt(
    prompt_set: PromptSet,
    fm: BaseFM | str,
    folder: Path | str,
    task: str,
    *,
    calibration: Calibration | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """What the harness measures of a prompt set on ``task``, a multiple-choice task of a YAML file under ``folder``.

    The harness's result: ``result["results"][task]`` has the metrics (``"acc,none"``). It holds no row. ``limit``
    takes the first rows only. Files that the task names with a relative path are looked for where the program runs,
    unless a function beside the YAML file reads them, as in examples/lm_eval.

    Raises `ConfigError` or `UnknownNameError` for a task that is not there, is of another kind or shows more than the
    text, and `DataError` for rows whose target is not among their choices.
    """
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not manager.all_tasks:
        raise ConfigError(f"{folder} has no task; expected a folder with a YAML file that names one (task: NAME)")
    if task not in manager.all_tasks:
        raise UnknownNameError("task", task, manager.all_tasks)
    loaded = manager.load([task])
    for name, each in loaded["tasks"].items():
        _check_task(name, each)
    lm = PromptSetLM(prompt_set, fm, calibration=calibration)
    # The samples that the harness would log are the clients' texts.
    return dict(evaluate(lm, loaded, limit=limit, log_samples=False))


def _check_task(name: str, task: Any) -> None:
    """Raise unless ``task`` asks for a choice after the text alone, and every row's target is a choice: the harness
    would log other rows."""
    if task.OUTPUT_TYPE != "multiple_choice":
        raise ConfigError(f"{name} has output_type {task.OUTPUT_TYPE}; a prompt set needs multiple_choice")
    if task.config.description or task.config.num_fewshot:
        raise ConfigError(f"{name} puts a description or examples before the text; a prompt set has its own")
    strays = 0
    for row in task.eval_docs:
        choices, target = task.doc_to_choice(row), task.doc_to_target(row)
        targets = target if isinstance(target, list) else [target]
        strays += not all(t in choices or t in range(len(choices)) for t in targets)
    if strays:
        raise DataError(f"{strays} rows of {name} have a target that is not among their choices")


def _ask(fm: BaseFM, requests: Sequence[FMRequest]) -> list[FMResponse]:
    """All answers; raises `FMError` if any failed or is to a context that was cut."""
    answers = run_sync(fm.complete(requests))
    failed = [a for a in answers if a.error is not None or not all(map(math.isfinite, a.logprobs or ()))]
    if failed:
        why = failed[0].error or "a log-probability is not finite"
        raise FMError(f"{len(failed)} of {len(answers)} requests failed at {fm.fm_id} ({why})")
    if cut := sum(a.truncated for a in answers):
        raise FMError(
            f"{cut} of {len(answers)} contexts are longer than {fm.fm_id} can read; ask for fewer few-shot examples, "
            "leave long documents out, or choose a model with a longer context"
        )
    return answers


def _may_become(answer: FMResponse, wanted: str, n: int) -> bool:
    """Whether the greedy text of ``n`` tokens may grow to be ``wanted``."""
    text = (answer.text or "").rstrip("\ufffd")  # the first bytes of a character whose others are in the next token
    has_ended = 0 < answer.completion_tokens < n
    return wanted.startswith(text) and n < len(wanted.encode()) and not has_ended


def _log(p: float) -> float:
    return math.log(p) if p > 0 else -math.inf
