"""The embedded engine on a tiny random model: limits, cuts, counts and seeds, without the real weights."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from promptfed.errors import ConfigError, UnknownNameError
from promptfed.fm.embedded import BATCH_TOKENS, EmbeddedFM
from promptfed.fm.weights import cache_folder, file_digest, find_weights
from promptfed.prompts.soft import soft_prompt
from promptfed.types import Capability, FMRequest, FMResponse, LabelRequest, TextRequest
from tests.support import wait_for

CONTEXT = 64  # one token a byte
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def fm(tiny_llama: Path) -> EmbeddedFM:
    return EmbeddedFM(str(tiny_llama))


def label(text: str, prefix: str = "ab", suffix: str = ".", labels: tuple[str, ...] = ("x", "y")) -> LabelRequest:
    return LabelRequest(prefix=prefix, text=text, suffix=suffix, labels=labels)


def answer(fm: EmbeddedFM, *requests: FMRequest) -> list[FMResponse]:
    return wait_for(fm.complete(requests))


def text_of(fm: EmbeddedFM, **fields: object) -> str:
    (got,) = answer(fm, TextRequest(**{"max_tokens": 8, "stop": (), **fields}))  # type: ignore[arg-type]
    assert got.text is not None
    return got.text


# ---------------------------------------------------------------- identity


def test_the_id_carries_the_digest_of_the_weights(fm: EmbeddedFM, tiny_llama: Path) -> None:
    assert fm.fm_id == f"embedded:{tiny_llama.name}@{file_digest(tiny_llama / 'model.safetensors')}"
    assert fm.capabilities == {
        Capability.TEXT,
        Capability.LABEL_LOGPROBS,
        Capability.PROMPT_LOGPROBS,
        Capability.PROMPT_EMBEDS,
    }


def test_shards_are_one_model(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    LlamaForCausalLM.from_pretrained(tiny_llama).save_pretrained(folder, max_shard_size="60KB")
    shards = sorted(folder.glob("*.safetensors"))

    sharded, whole = EmbeddedFM(str(folder)), EmbeddedFM(str(tiny_llama))

    assert len(shards) > 1
    assert answer(sharded, label("text")) == answer(whole, label("text"))
    assert sharded.fm_id != whole.fm_id
    shards[0].unlink()
    with pytest.raises(ConfigError, match=shards[0].name):
        find_weights(str(folder))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        find_weights(str(tmp_path))


def test_a_name_that_is_nothing_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'smollm2-135m-instruct'"):
        find_weights("smollm-135m-instruct")


def test_a_hub_that_does_not_answer_is_a_config_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def no_hub(*_: object, **__: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_hub)

    with pytest.raises(ConfigError, match=r"some/model is not on this machine and no hub answered \(ConnectionError\)"):
        find_weights("some/model")


@pytest.mark.parametrize("fetch", [True, False])
def test_weights_that_are_only_looked_for_are_not_fetched(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, fetch: bool
) -> None:
    import huggingface_hub

    asked: list[object] = []

    def hub(name: str, *, local_files_only: bool, **_: object) -> str:
        asked.append((name, local_files_only))
        return str(tiny_llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)

    assert find_weights("some/model", fetch=fetch)[0] == tiny_llama
    assert asked == [("some/model", not fetch)]


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PROMPTFED_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("PROMPTFED_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "promptfed"


# ---------------------------------------------------------------- label scores


@torch.inference_mode()
def reference_logp(folder: Path, context: str, continuation: str) -> float:
    """Sum of the log-probabilities of ``continuation``'s tokens after ``context``, in float32 by transformers."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    head, tail = tokenizer.encode(context).ids, tokenizer.encode(continuation).ids
    logp = model(torch.tensor([head + tail])).logits[0].log_softmax(dim=-1)
    return float(sum(logp[len(head) - 1 + i, t] for i, t in enumerate(tail)))


@pytest.mark.parametrize(
    "labels",
    [("x", "y"), ("xy", "z"), ("abc", "de", "f"), ("ax", "ay")],
    ids=["one", "two", "three tokens", "one stem"],
)
def test_labels_are_scored_by_the_sum_over_their_tokens(
    fm: EmbeddedFM, tiny_llama: Path, labels: tuple[str, ...]
) -> None:
    (got,) = answer(fm, label("text", labels=labels))

    by_hand = np.array([reference_logp(tiny_llama, "abtext.", word) for word in labels])
    assert got.logprobs is not None
    assert np.exp(got.logprobs).sum() == pytest.approx(1.0)
    # The engine computes in bfloat16 where the CPU does.
    assert got.logprobs == pytest.approx(by_hand - np.logaddexp.reduce(by_hand), abs=0.15)


@pytest.mark.parametrize("labels", [("x", "y"), ("x",), ("xy", "z"), ("ax", "ay"), ("a whole text as a label",)])
def test_absolute_scores_are_sums_over_the_whole_vocabulary(
    fm: EmbeddedFM, tiny_llama: Path, labels: tuple[str, ...]
) -> None:
    relative = label("text", labels=("x", "yz"))
    request = replace(label("text", labels=labels), absolute=True)

    got, beside = answer(fm, request, relative)

    by_hand = [reference_logp(tiny_llama, "abtext.", word) for word in labels]
    assert got.logprobs == pytest.approx(by_hand, abs=0.15 * max(map(len, labels)))
    assert beside.logprobs is not None
    assert np.exp(beside.logprobs).sum() == pytest.approx(1.0)


def test_a_label_can_follow_the_prefix_at_once(fm: EmbeddedFM, tiny_llama: Path) -> None:
    request = replace(label("", prefix="ab", suffix="", labels=("a whole text",)), absolute=True)

    (got,) = answer(fm, request)

    assert got.logprobs == pytest.approx([reference_logp(tiny_llama, "ab", "a whole text")], abs=1.5)
    assert got.prompt_tokens == 2


def test_absolute_scores_of_some_next_tokens_sum_to_less_than_one(fm: EmbeddedFM) -> None:
    printable = "".join(map(chr, range(33, 127)))

    (got,) = answer(fm, replace(label("text", labels=tuple(printable)), absolute=True))

    # 94 of the 256 tokens: some of the mass, never more than all of it.
    assert got.logprobs is not None
    assert 0.05 < np.exp(got.logprobs).sum() < 1.0


def test_labels_beyond_a_batch_are_scored_as_they_are_alone(fm: EmbeddedFM) -> None:
    many = tuple(map("".join, product("abcdefg", repeat=4)))
    some = many[::100]
    assert 3 * len({word[:-1] for word in many}) > BATCH_TOKENS
    (of_many,), (of_some,) = answer(fm, label("text", labels=many)), answer(fm, label("text", labels=some))

    assert of_many.logprobs is not None
    among = np.array(of_many.logprobs[::100])
    assert of_some.logprobs == pytest.approx(among - np.logaddexp.reduce(among), abs=0.15)


def test_answers_do_not_depend_on_order_or_company(fm: EmbeddedFM) -> None:
    requests = [label("t" * n, prefix=p) for n in (1, 5, 30, 7) for p in ("", "ab", "a longer prefix")]

    forward, backward = answer(fm, *requests), answer(fm, *requests[::-1])

    for a, b, request in zip(forward, backward[::-1], requests, strict=True):
        assert a.logprobs == b.logprobs
        (alone,) = answer(fm, request)
        assert alone.logprobs == pytest.approx(a.logprobs, abs=0.1)


def test_an_empty_prefix_works(fm: EmbeddedFM, tiny_llama: Path) -> None:
    (got,) = answer(fm, label("text", prefix="", labels=("x", "y")))

    by_hand = np.array([reference_logp(tiny_llama, "text.", word) for word in "xy"])
    assert got.logprobs == pytest.approx(by_hand - np.logaddexp.reduce(by_hand), abs=0.15)
    assert got.prompt_tokens == 5


def test_tokens_are_counted_and_shared_ones_as_cached(fm: EmbeddedFM) -> None:
    got = answer(fm, label("one"), label("three"), label("x", prefix="other"))

    assert [a.prompt_tokens for a in got] == [2 + 3 + 1, 2 + 5 + 1, 5 + 1 + 1]
    assert [a.completion_tokens for a in got] == [1, 1, 1]
    # The prompt is computed for the first of its texts, and is there for the others.
    assert sorted(a.cached_tokens for a in got) == [0, 0, 2]
    assert not any(a.truncated for a in got)


def test_a_text_too_long_is_cut_in_the_text_and_flagged(fm: EmbeddedFM) -> None:
    long, fitting = answer(fm, label("t" * 100_000), label("t" * (CONTEXT - 2 - 1 - 1)))

    assert long.truncated
    assert not fitting.truncated
    # Prompt, what is left of the text, suffix and one label token fill the context.
    assert long.prompt_tokens == fitting.prompt_tokens == CONTEXT - 1
    assert long.logprobs == pytest.approx(fitting.logprobs, abs=0.05)


def test_one_character_too_many_is_flagged(fm: EmbeddedFM) -> None:
    (got,) = answer(fm, label("t" * (CONTEXT - 3)))

    assert got.truncated
    assert got.prompt_tokens == CONTEXT - 1


@pytest.mark.parametrize("n_prefix", [CONTEXT, CONTEXT + 1, 5 * CONTEXT])
def test_a_prompt_that_leaves_no_room_fails_as_a_value(fm: EmbeddedFM, n_prefix: int) -> None:
    got = answer(fm, label("text", prefix="p" * n_prefix), label("text"))

    assert got[0].error is not None
    assert "room" in got[0].error
    assert got[0].logprobs is None
    assert got[1].logprobs is not None


@pytest.mark.parametrize(
    "request_", [label("", prefix="", suffix=""), label("text", labels=("x", ""))], ids=["no text", "empty label"]
)
def test_nothing_to_score_is_an_error_as_a_value(fm: EmbeddedFM, request_: LabelRequest) -> None:
    got = answer(fm, request_, label("text"))

    assert got[0].error is not None
    assert got[1].logprobs is not None


def test_no_request_no_answer(fm: EmbeddedFM) -> None:
    assert answer(fm) == []


def test_label_and_text_requests_in_one_batch_keep_their_places(fm: EmbeddedFM) -> None:
    got = answer(fm, label("a"), TextRequest(prompt="p", max_tokens=3, stop=()), label("b"))

    assert [a.logprobs is not None for a in got] == [True, False, True]
    assert [a.text is not None for a in got] == [False, True, False]


# ---------------------------------------------------------------- generation


def test_writing_is_deterministic_by_seed(fm: EmbeddedFM) -> None:
    drawn = [text_of(fm, prompt="p", temperature=1.0, seed=s) for s in range(8)]

    assert [text_of(fm, prompt="p", temperature=1.0, seed=s) for s in range(8)] == drawn
    assert len(set(drawn)) > 4


def test_greedy_writing_takes_no_seed(fm: EmbeddedFM, tiny_llama: Path) -> None:
    got = {text_of(fm, prompt="prompt", seed=s) for s in range(3)}

    assert len(got) == 1


def test_a_tiny_nucleus_is_greedy(fm: EmbeddedFM) -> None:
    greedy = text_of(fm, prompt="prompt")

    assert {text_of(fm, prompt="prompt", temperature=1.0, top_p=1e-9, seed=s) for s in range(5)} == {greedy}


def test_writing_stops_before_the_stop_string(fm: EmbeddedFM) -> None:
    whole = text_of(fm, prompt="prompt", max_tokens=12)
    stop = whole[3:5]
    cut = whole.index(stop)

    (got,) = answer(fm, TextRequest(prompt="prompt", max_tokens=12, stop=(stop, "never")))

    assert got.text == whole[:cut]
    assert got.completion_tokens <= 12


@pytest.mark.parametrize("max_tokens", [1, 2, 5])
def test_writing_ends_after_so_many_tokens(fm: EmbeddedFM, max_tokens: int) -> None:
    (got,) = answer(fm, TextRequest(prompt="p", max_tokens=max_tokens, stop=()))

    assert got.completion_tokens == max_tokens


def test_an_empty_prompt_can_be_continued(fm: EmbeddedFM) -> None:
    (got,) = answer(fm, TextRequest(prompt="", max_tokens=3, stop=()))

    assert got.error is None
    assert got.completion_tokens == 3


@pytest.mark.parametrize("n", [CONTEXT - 2, CONTEXT, 10 * CONTEXT])
def test_a_prompt_that_fills_the_context_is_cut_or_the_writing_ends_early(fm: EmbeddedFM, n: int) -> None:
    (got,) = answer(fm, TextRequest(prompt="p" * n, max_tokens=8, stop=()))

    assert got.error is None
    assert got.completion_tokens >= 1
    assert got.prompt_tokens + got.completion_tokens <= CONTEXT + 1
    assert got.truncated == (got.prompt_tokens < n)


def test_several_texts_of_one_prompt_share_it(fm: EmbeddedFM) -> None:
    requests = [TextRequest(prompt="prompt", max_tokens=3, temperature=1.0, seed=s, stop=()) for s in range(3)]

    got = answer(fm, *requests)

    assert [a.prompt_tokens for a in got] == [6, 6, 6]
    assert sorted(a.cached_tokens for a in got) == [0, 5, 5]
    assert [a.text for a in got] == [answer(fm, r)[0].text for r in requests]


# ---------------------------------------------------------------- event loop


def test_the_event_loop_goes_on_while_it_computes(fm: EmbeddedFM) -> None:
    async def with_a_clock() -> int:
        ticks, work = 0, asyncio.ensure_future(fm.complete([label("t" * 50) for _ in range(50)]))
        while not work.done():
            ticks += 1
            await asyncio.sleep(0.001)
        await work
        return ticks

    assert wait_for(with_a_clock()) > 1


def test_another_copy_of_the_weights_is_the_same_model(fm: EmbeddedFM, tiny_llama: Path, tmp_path: Path) -> None:
    copy = tmp_path / tiny_llama.name
    shutil.copytree(tiny_llama, copy)

    other = EmbeddedFM(str(copy))

    assert other.fm_id == fm.fm_id
    assert answer(other, label("text"))[0].logprobs == answer(fm, label("text"))[0].logprobs


# ---------------------------------------------------------------- soft prompts


def test_the_space_of_soft_prompts_is_that_of_the_token_embeddings(fm: EmbeddedFM) -> None:
    every = "".join(chr(c) for c in range(33, 127))
    some = fm.token_embeddings(every)

    assert fm.soft_space.hidden == some.shape[1] == 64
    assert fm.soft_space.std == pytest.approx(some.std(), rel=0.1)


def test_a_soft_prompt_of_a_texts_embeddings_is_that_text(fm: EmbeddedFM) -> None:
    soft = soft_prompt(fm.token_embeddings("abc "))
    texts = ("one", "three", "fifteen")
    as_text = [label(t, prefix="abc de", labels=("x", "yz")) for t in texts]
    as_soft = [replace(label(t, prefix="de", labels=("x", "yz")), soft=soft) for t in texts]

    got = answer(fm, *as_soft, TextRequest(prompt="de", max_tokens=6, stop=(), soft=soft))

    expected = answer(fm, *as_text, TextRequest(prompt="abc de", max_tokens=6, stop=()))
    assert got == expected


def test_requests_are_grouped_by_their_soft_prompt(fm: EmbeddedFM) -> None:
    one, other = (soft_prompt(fm.token_embeddings(t)) for t in ("abc", "xyz"))
    requests = [replace(label("text"), soft=soft) for soft in (one, other, None)]

    together = answer(fm, *requests)

    assert len({a.logprobs for a in together}) == 3
    assert [answer(fm, r)[0].logprobs for r in requests] == [a.logprobs for a in together]
    assert [a.prompt_tokens for a in together] == [3 + 2 + 5, 3 + 2 + 5, 2 + 5]


def test_a_soft_prompt_of_another_model_is_refused_before_anything_is_computed(fm: EmbeddedFM) -> None:
    narrow = soft_prompt(np.zeros((2, 8)))

    with pytest.raises(ConfigError, match="belongs to the model"):
        answer(fm, label("text"), replace(label("text"), soft=narrow))


def test_a_soft_prompt_that_fills_the_context_fails_as_a_value(fm: EmbeddedFM) -> None:
    soft = soft_prompt(np.zeros((CONTEXT, 64)))

    got = answer(fm, replace(label("text"), soft=soft), TextRequest(prompt="p", max_tokens=2, soft=soft), label("text"))

    assert [a.error is not None for a in got] == [True, True, False]


# ---------------------------------------------------------------- other tokenizers, other families


def test_leading_tokens_of_the_tokenizer_stand_before_the_prefix(
    fm: EmbeddedFM, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "leading"
    shutil.copytree(tiny_llama, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="^ $A", pair="^ $A $B", special_tokens=[("^", tokenizer.token_to_id("^"))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))

    got = answer(EmbeddedFM(str(folder)), label("text"), TextRequest(prompt="p", max_tokens=4, stop=()))

    assert got == answer(fm, label("text", prefix="^ab"), TextRequest(prompt="^p", max_tokens=4, stop=()))


def test_a_folder_without_a_tokenizer_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mute"
    shutil.copytree(tiny_llama, folder)
    (folder / "tokenizer.json").unlink()

    with pytest.raises(ConfigError, match=r"holds no tokenizer\.json"):
        EmbeddedFM(str(folder))


@pytest.fixture(scope="module")
def gpt2(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-gpt2")
    shutil.copy(tiny_llama / "tokenizer.json", folder)
    torch.manual_seed(4)
    config = GPT2Config(vocab_size=256, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@torch.inference_mode()
def gpt2_logp(folder: Path, context: str, continuation: str) -> float:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    head, tail = tokenizer.encode(context).ids, tokenizer.encode(continuation).ids
    logp = model(torch.tensor([head + tail])).logits[0].log_softmax(dim=-1)
    return float(sum(logp[len(head) - 1 + i, t] for i, t in enumerate(tail)))


@pytest.mark.parametrize("prefix", ["ab", ""])
def test_another_family_is_computed_by_transformers(gpt2: Path, prefix: str) -> None:
    fm = EmbeddedFM(str(gpt2))
    texts, labels = ("one", "twelve", "a longer one"), ("x", "yz", "abc", "ay")
    requests = [replace(label(t, prefix=prefix, labels=labels), absolute=True) for t in texts]

    got = answer(fm, *requests)

    for text, one in zip(texts, got, strict=True):
        by_hand = [gpt2_logp(gpt2, f"{prefix}{text}.", word) for word in labels]
        assert one.logprobs == pytest.approx(by_hand, abs=0.3)


def test_another_family_takes_soft_prompts_and_writes(gpt2: Path) -> None:
    fm = EmbeddedFM(str(gpt2))
    soft = soft_prompt(fm.token_embeddings("abc "))
    assert (fm.soft_space.hidden, fm.soft_space.std) == (32, pytest.approx(0.2, rel=0.05))

    got = answer(
        fm, replace(label("t", prefix="de"), soft=soft), TextRequest(prompt="d", max_tokens=4, stop=(), soft=soft)
    )

    assert got == answer(fm, label("t", prefix="abc de"), TextRequest(prompt="abc d", max_tokens=4, stop=()))


def test_a_folder_that_transformers_does_not_know_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unknown"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nobody", "architectures": ["Nobody"]}))

    with pytest.raises(ConfigError, match="'nobody'"):
        EmbeddedFM(str(folder))
