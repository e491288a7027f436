"""The embedded model with its real weights, against transformers in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from promptfed.fm.embedded import MAX_TOKENS, EmbeddedFM
from promptfed.fm.weights import find_weights
from promptfed.prompts.template import PromptTemplate
from promptfed.types import FloatArray, FMRequest, FMResponse, LabelRequest, TextRequest
from tests.support import wait_for

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("one_thread")]

NAME = "smollm2-135m-instruct"
PROMPT = PromptTemplate(
    text="Classify the sentiment.\n\nText: I loved it.\nLabel: positive\n\nText: Awful.\nLabel: negative\n\n"
    "Text: {text}\nLabel:",
    words=("negative", "positive"),
)
TEXTS = (
    "A warm and funny film.",
    "Dull from start to end.",
    "Great food, friendly staff!",
    "The battery died after two days.",
    "I would watch it again.",
    "Never again.",
    "ok",
    "The plot makes no sense, yet the music is lovely and the cast does what it can with so little.",
    "Worst purchase of the year.",
    "Excellent.",
    "It broke.",
    "My daughter adores this book and asks for it every night.",
)


@pytest.fixture(scope="session")
def fm() -> EmbeddedFM:
    return EmbeddedFM(NAME)


class Reference:
    """transformers' own forward pass, one sequence at a time, in float32."""

    def __init__(self) -> None:
        folder, _ = find_weights(NAME)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    @torch.inference_mode()
    def continuations(self, request: LabelRequest) -> FloatArray:
        """Sums of token log-probabilities of each label after prefix + text + suffix, normalised over the labels."""
        head = self.ids(request.prefix) + self.ids(request.text + request.suffix)
        tails = [self.ids(label) for label in request.labels]
        sums = []
        after_head: torch.Tensor | None = None
        for tail in tails:
            if len(tail) > 1 or after_head is None:
                n = len(tail)
                logits = self._model(torch.tensor([head + tail[:-1]]), logits_to_keep=n).logits[0]
                logp = logits.log_softmax(dim=-1)
                after_head = logp[0]
            else:
                logp = after_head[None]
            sums.append(sum(float(logp[i, t]) for i, t in enumerate(tail)))
        return np.array(sums) - np.logaddexp.reduce(sums)


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference()


def answer(fm: EmbeddedFM, *requests: FMRequest) -> list[FMResponse]:
    return wait_for(fm.complete(requests))


def test_it_agrees_with_transformers_in_float32(fm: EmbeddedFM, reference: Reference) -> None:
    got = np.asarray(fm.score_labels(PROMPT, TEXTS))

    expected = np.array([reference.continuations(r) for r in PROMPT.requests(TEXTS)])
    assert np.abs(np.exp(got) - np.exp(expected)).mean() < 0.05
    assert np.abs(got - expected).mean() < 0.05
    assert (got.argmax(axis=1) == expected.argmax(axis=1)).mean() >= 11 / 12


def test_the_model_can_tell_good_from_bad(fm: EmbeddedFM) -> None:
    scores = np.asarray(fm.score_labels(PROMPT, TEXTS))
    lean = scores[:, 1] - scores[:, 0]

    good, bad = lean[[0, 2, 4, 9, 11]], lean[[1, 3, 5, 8, 10]]
    # Of the 25 pairs of a good and a bad text, most stand in the right order.
    assert (good[:, None] > bad[None]).mean() > 0.75


def test_multi_token_labels_are_the_sum_over_their_tokens(fm: EmbeddedFM, reference: Reference) -> None:
    labels = (" extraordinarily unimpressive", " a", " rather good")
    assert len(reference.ids(labels[0])) > 2
    assert len(reference.ids(labels[1])) == 1
    request = LabelRequest(prefix="Text:", text=" I liked it.", suffix="\nIn short, it was", labels=labels)

    (got,) = answer(fm, request)

    assert got.logprobs == pytest.approx(reference.continuations(request), abs=0.15)
    assert got.label_tokens == tuple(len(reference.ids(label)) for label in labels)


def test_labels_that_share_all_but_their_last_token_are_the_sum_over_their_tokens_too(
    fm: EmbeddedFM, reference: Reference
) -> None:
    labels = (" not at all good", " not at all bad", " fine", " not at all")
    request = LabelRequest(prefix="Text:", text=" I liked it.", suffix="\nIn short, it was", labels=labels)
    alike = LabelRequest(prefix="Text:", text=" I liked it.", suffix="\nIn short, it was", labels=labels[:2])

    mixed, pair = answer(fm, request, alike)

    assert mixed.logprobs == pytest.approx(reference.continuations(request), abs=0.15)
    assert pair.logprobs == pytest.approx(reference.continuations(alike), abs=0.15)


def test_answers_do_not_depend_on_the_order_of_requests(fm: EmbeddedFM) -> None:
    other = PromptTemplate(text="{text} It was", words=("good", "bad", "neither here nor there"))
    requests = [*PROMPT.requests(TEXTS), *other.requests(TEXTS)]
    shuffled = np.random.default_rng(0).permutation(len(requests))

    first = answer(fm, *requests)
    again = answer(fm, *(requests[i] for i in shuffled))

    assert [first[i].logprobs for i in shuffled] == [a.logprobs for a in again]
    # Which request of a prompt pays for the prompt may change; what all pay together may not.
    assert sum(a.cached_tokens for a in first) == sum(a.cached_tokens for a in again)


def test_an_empty_prefix_works(fm: EmbeddedFM, reference: Reference) -> None:
    request = LabelRequest(prefix="", text="It was awful. I felt", suffix="", labels=(" happy", " sad"))

    (got,) = answer(fm, request)

    assert got.logprobs == pytest.approx(reference.continuations(request), abs=0.1)
    assert got.cached_tokens == 0


def test_a_text_of_100_kilobytes_is_cut_and_flagged(fm: EmbeddedFM) -> None:
    text = "It was a lovely day and we all had a good time. " * 2100
    assert len(text) > 100_000

    long, short = answer(fm, *PROMPT.requests([text, "It was a lovely day."]))

    assert long.truncated
    assert not short.truncated
    assert MAX_TOKENS - 50 < long.prompt_tokens <= MAX_TOKENS
    assert long.logprobs is not None
    assert np.isfinite(long.logprobs).all()


# ---------------------------------------------------------------- generation


def write(fm: EmbeddedFM, **fields: object) -> str:
    request = TextRequest(**{"prompt": "Very short texts:\n-", "max_tokens": 8, "stop": (), **fields})  # type: ignore[arg-type]
    (got,) = answer(fm, request)
    assert got.text is not None
    return got.text


def test_writing_is_deterministic_by_seed(fm: EmbeddedFM) -> None:
    first = [write(fm, temperature=0.9, top_p=0.95, seed=s) for s in range(4)]

    assert [write(fm, temperature=0.9, top_p=0.95, seed=s) for s in range(4)] == first
    assert len(set(first)) > 1


def test_greedy_writing_is_that_of_transformers(fm: EmbeddedFM, reference: Reference) -> None:
    ids = reference.ids("The capital of France is")
    with torch.inference_mode():
        logits = reference._model(torch.tensor([ids])).logits[0, -1]

    got = write(fm, prompt="The capital of France is", max_tokens=1)

    assert got == reference._tokenizer.decode([int(logits.argmax())]) == " Paris"


def test_writing_stops_before_the_stop_string(fm: EmbeddedFM) -> None:
    whole = write(fm, prompt="One, two, three, four,", max_tokens=8)
    assert whole.count(",") >= 2

    assert write(fm, prompt="One, two, three, four,", max_tokens=8, stop=(",",)) == whole[: whole.index(",")]


def test_an_empty_prompt_can_be_continued(fm: EmbeddedFM) -> None:
    (got,) = answer(fm, TextRequest(prompt="", max_tokens=2, stop=()))

    assert got.error is None
    assert got.completion_tokens == 2
