"""OpenAI's completions schema: what a request asks of the model, and what its answer looks like to a client."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from pydantic import ValidationError

from promptfed.fm.completions import Completion, model_name
from promptfed.types import FMResponse, LabelRequest, TextRequest


def completion(**fields: Any) -> Completion:
    return Completion.model_validate_json(json.dumps({"model": "m", **fields}))


def test_labels_make_label_requests_that_share_prefix_and_suffix() -> None:
    body = completion(prompt=[" one", " two"], promptfed={"prefix": "P:", "suffix": "\nL:", "labels": [" a", " b c"]})

    assert body.requests() == [
        LabelRequest(prefix="P:", text=text, suffix="\nL:", labels=(" a", " b c")) for text in (" one", " two")
    ]


def test_prompts_without_labels_are_continued_with_openais_defaults() -> None:
    assert completion(prompt="Once").requests() == [
        TextRequest(prompt="Once", max_tokens=16, temperature=1.0, top_p=1.0, seed=0, stop=())
    ]


def test_every_field_of_sampling_arrives() -> None:
    body = completion(prompt="p", max_tokens=3, temperature=0.5, top_p=0.9, seed=4, stop=["\n", "END"])

    assert body.requests() == [
        TextRequest(prompt="p", max_tokens=3, temperature=0.5, top_p=0.9, seed=4, stop=("\n", "END"))
    ]
    assert [r.stop for r in completion(prompt="p", stop="x").requests() if isinstance(r, TextRequest)] == [("x",)]


@pytest.mark.parametrize(("extension", "seeds"), [({}, [7, 8, 7, 8]), ({"seeds": [3, 1]}, [3, 1, 3, 1])])
def test_n_continuations_of_each_prompt_have_a_seed_each(extension: dict[str, Any], seeds: list[int]) -> None:
    body = completion(prompt=["a", "b"], n=2, seed=7, promptfed=extension)

    asked = [(r.prompt, r.seed) for r in body.requests() if isinstance(r, TextRequest)]

    assert asked == list(zip("aabb", seeds, strict=True))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt": []},
        {"prompt": 3},
        {"prompt": [[1, 2]]},
        {"prompt": "p", "max_tokens": 0},
        {"prompt": "p", "temperature": -1},
        {"prompt": "p", "temperature": math.nan},
        {"prompt": "p", "top_p": 0},
        {"prompt": "p", "seed": -1},
        {"prompt": "p", "stream": True},
        {"prompt": "p", "echo": True},
        {"prompt": "p", "presence_penalty": 0.5},
        {"prompt": "p", "logprobs": 3},
        {"prompt": "p", "suffix": "s"},
        {"prompt": "p", "promptfed": {"labels": []}},
        {"prompt": "p", "promptfed": {"labels": " a"}},
        {"prompt": "p", "promptfed": {"seeds": [1, 2]}},
        {"prompt": "p", "promptfed": {"labels": [" a"], "seeds": [1]}},
        {"prompt": "p", "promptfed": {"labels": [" a"]}, "n": 2},
        {"prompt": "p", "promptfed": {"lables": [" a"]}},
    ],
    ids=str,
)
def test_what_is_not_offered_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        completion(**fields)


def test_neutral_values_of_what_is_not_offered_are_accepted() -> None:
    neutral = {"n": 1, "best_of": 1, "echo": False, "stream": False, "frequency_penalty": 0.0, "presence_penalty": 0}

    assert completion(prompt="p", **neutral).requests() == completion(prompt="p").requests()


# ---------------------------------------------------------------- answers


SCORED = {"prompt": [" x"], "promptfed": {"labels": [" a", " b c"]}}


def choices(body: Completion, *answers: FMResponse) -> list[dict[str, Any]]:
    answered: list[dict[str, Any]] = body.answer("k:m@1", body.requests(), list(answers))["choices"]
    return answered


def test_a_scored_choice_carries_the_answer_and_its_text_is_the_best_label() -> None:
    answer = FMResponse(logprobs=(-2.0, -0.2), label_tokens=(1, 2), prompt_tokens=9, cached_tokens=4, truncated=True)

    (choice,) = choices(completion(**SCORED), answer)

    assert choice["text"] == " b c"
    assert choice["logprobs"] is None
    assert FMResponse(**choice["promptfed"]) == answer


def test_logprobs_are_written_in_openais_way_where_asked_for() -> None:
    (choice,) = choices(completion(**SCORED, logprobs=5), FMResponse(logprobs=(-2.0, -0.2)))

    assert choice["logprobs"] == {
        "tokens": [" b c"],
        "token_logprobs": [-0.2],
        "top_logprobs": [{" a": -2.0, " b c": -0.2}],
        "text_offset": [2],
    }


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_fails_its_item_only(bad: float) -> None:
    body = completion(prompt=["x", "y"], promptfed={"labels": [" a", " b"]})

    failed, fine = choices(body, FMResponse(logprobs=(bad, -1.0)), FMResponse(logprobs=(-1.0, -1.0)))

    assert failed["finish_reason"] == "error"
    assert failed["promptfed"]["logprobs"] is None
    assert "not finite" in failed["promptfed"]["error"]
    assert fine["promptfed"]["logprobs"] == (-1.0, -1.0)


def test_a_text_says_whether_it_stopped_or_was_cut() -> None:
    body = completion(prompt=["x", "y"], max_tokens=3)

    cut, stopped = choices(body, FMResponse(text="one", completion_tokens=3), FMResponse(text="2", completion_tokens=1))

    assert (cut["text"], cut["finish_reason"]) == ("one", "length")
    assert (stopped["text"], stopped["finish_reason"]) == ("2", "stop")


def test_usage_is_the_sum() -> None:
    body = completion(prompt=["x", "y"])

    answers = [FMResponse(text="t", prompt_tokens=5, completion_tokens=2, cached_tokens=c) for c in (0, 4)]
    usage = body.answer("k:m@1", body.requests(), answers)["usage"]

    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (10, 4, 14)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 4


@pytest.mark.parametrize(
    ("fm_id", "name"),
    [
        ("embedded:smollm2-135m-instruct@b179c9523d0e", "smollm2-135m-instruct"),
        ("scripted:overlap@0", "overlap"),
        ("kind:a@b@0", "a@b"),
        ("plain", "plain"),
    ],
)
def test_the_name_of_a_model_is_the_middle_of_its_id(fm_id: str, name: str) -> None:
    assert model_name(fm_id) == name
