"""The packed forward pass against transformers, on a random two-layer model in float32."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from promptfed.errors import ConfigError
from promptfed.fm.packed import PackedLlama, Tree

Tokens = Sequence[int]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def packed(tiny_llama: Path) -> PackedLlama:
    return PackedLlama(tiny_llama, dtype=torch.float32)


@pytest.fixture(scope="module")
def reference(tiny_llama: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@torch.inference_mode()
def hidden_states(model: LlamaForCausalLM, tokens: Tokens) -> Tensor:
    """Final hidden states (n_tokens, hidden) of one sequence alone, without padding or cache."""
    states: Tensor = model.model(torch.tensor([list(tokens)])).last_hidden_state[0]
    return states


def expected(model: LlamaForCausalLM, trees: Sequence[Tree], prefix: Tokens) -> Tensor:
    """Each branch alone behind prefix and body."""
    states = []
    for tree in trees:
        states.append(hidden_states(model, [*prefix, *tree.body])[-1:])
        start = len(prefix) + len(tree.body)
        states += [hidden_states(model, [*prefix, *tree.body, *branch])[start:] for branch in tree.branches]
    return torch.cat(states)


def with_biases(kind: Any, config: Any, folder: Path, seed: int) -> Any:
    """A random model of transformers with random biases, saved in ``folder`` too."""
    torch.manual_seed(seed)
    model = kind(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model


def same(a: Tensor, b: Tensor) -> bool:
    assert a.shape == b.shape
    return bool((a.cpu() - b.cpu()).abs().max() < 1e-4)


def test_the_model_under_test_has_grouped_query_heads_and_an_untied_head(packed: PackedLlama) -> None:
    assert (packed.n_heads, packed.n_kv, packed.head_dim, packed.context) == (4, 2, 16, 64)
    assert packed.head is not packed.embedding


@pytest.mark.parametrize("prefix", [[], [7], [5, 6, 7, 8, 9, 10, 11]], ids=["none", "one token", "seven tokens"])
@pytest.mark.parametrize(
    "trees",
    [
        [Tree((1, 2, 3))],
        [Tree((9,))],
        [Tree((1, 2, 3)), Tree((4, 5, 6))],
        [Tree((1,)), Tree((2, 3, 4, 5, 6)), Tree((7, 8))],
        [Tree((2, 3, 4, 5, 6)), Tree((1,))],
        [Tree((1, 2), ((3, 4),)), Tree((5,), ((6,),))],
        [Tree((1, 2), ((3, 4), (), (5,)))],
        [Tree((1, 2), ((3, 4), (5, 6, 7))), Tree((8,)), Tree((9, 9, 9), ((1,), (1, 2), (3,)))],
    ],
    ids=["one", "one token", "even", "ragged", "long first", "one branch", "three branches", "forked and not"],
)
def test_hidden_states_are_those_of_transformers(
    packed: PackedLlama, reference: LlamaForCausalLM, prefix: list[int], trees: list[Tree]
) -> None:
    got = packed.hidden(trees, packed.prefill(prefix))

    assert same(got, expected(reference, trees, prefix))


@given(data=st.data())
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_ragged_batch_agrees(packed: PackedLlama, reference: LlamaForCausalLM, data: st.DataObject) -> None:
    token = st.integers(0, 255)
    prefix = data.draw(st.lists(token, max_size=10))
    body = st.lists(token, min_size=1, max_size=12).map(tuple)
    branches = st.lists(st.lists(token, max_size=4).map(tuple), max_size=4).map(tuple)
    trees = data.draw(st.lists(st.builds(Tree, body, branches), min_size=1, max_size=5))

    got = packed.hidden(trees, packed.prefill(prefix))

    assert same(got, expected(reference, trees, prefix))


def test_the_whole_context_can_be_used(packed: PackedLlama, reference: LlamaForCausalLM) -> None:
    prefix, tree = list(range(40)), Tree((100,), (tuple(range(101, 124)),))

    got = packed.hidden([tree], packed.prefill(prefix))

    assert same(got, expected(reference, [tree], prefix))


def test_embeddings_can_stand_for_the_tokens_of_a_prompt(packed: PackedLlama) -> None:
    trees = [Tree((1, 2), ((3, 4), (5,))), Tree((6,))]

    got = packed.hidden(trees, packed.prefill(packed.embed([7, 8, 9])))

    assert torch.equal(got, packed.hidden(trees, packed.prefill([7, 8, 9])))


def test_logits_of_single_tokens_are_those_of_the_whole_vocabulary(packed: PackedLlama) -> None:
    states = packed.hidden([Tree((1, 2), ((3, 4), (5,)))], [])

    got = packed.logits_of(states, [0, 3, 3], [9, 8, 255])

    assert same(got, packed.logits(states)[[0, 3, 3], [9, 8, 255]])


def test_a_prefix_serves_many_batches_unchanged(packed: PackedLlama) -> None:
    shared = packed.prefill([1, 2, 3])
    before = [[x.clone() for x in layer] for layer in shared]

    first = packed.hidden([Tree((4, 5)), Tree((6,))], shared)
    packed.hidden([Tree((9, 9, 9, 9))], shared)

    assert all(
        torch.equal(x, y) for now, then in zip(shared, before, strict=True) for x, y in zip(now, then, strict=True)
    )
    assert torch.equal(packed.hidden([Tree((4, 5)), Tree((6,))], shared), first)


def test_an_empty_prefix_is_no_prefix(packed: PackedLlama) -> None:
    assert packed.prefill([]) == []


def test_logits_are_those_of_transformers(packed: PackedLlama, reference: LlamaForCausalLM) -> None:
    with torch.inference_mode():
        logits = reference(torch.tensor([[3, 1, 4, 1, 5]])).logits[0, -1]

    got = packed.hidden([Tree((4, 1, 5))], packed.prefill([3, 1]))[0] @ packed.head.T

    assert same(got, logits)


def test_tied_embeddings_serve_as_the_head(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_llama / "config.json", tmp_path)
    weights = load_file(tiny_llama / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors")

    model = PackedLlama(tmp_path, dtype=torch.float32)

    assert model.head is model.embedding


def test_bfloat16_is_near(tiny_llama: Path, packed: PackedLlama) -> None:
    half = PackedLlama(tiny_llama, torch.bfloat16)

    got, want = (m.hidden([Tree((1,), ((2, 3, 4),))], m.prefill([5, 6])).float() for m in (half, packed))

    assert (torch.nn.functional.cosine_similarity(got, want) > 0.99).all()
    assert half.embedding.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("has", "dtype"),
    [({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)],
)
def test_a_cpu_without_bfloat16_computes_in_float32(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, has: dict[str, bool], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert PackedLlama(tiny_llama).embedding.dtype == dtype


# ---------------------------------------------------------------- models that it does not compute


def changed(folder: Path, target: Path, **changes: object) -> Path:
    shutil.copytree(folder, target, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def test_another_family_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Llama-family.*'gpt2'"):
        PackedLlama(changed(tiny_llama, tmp_path, model_type="gpt2"))


def test_scaled_rotary_embeddings_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    scaled = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 10000.0}

    with pytest.raises(ConfigError, match="rotary"):
        PackedLlama(changed(tiny_llama, tmp_path, rope_parameters=scaled))


def test_another_base_of_the_rotations_is_followed(tiny_llama: Path, tmp_path: Path) -> None:
    parameters = {"rope_type": "default", "rope_theta": 300.0}
    folder = changed(tiny_llama, tmp_path, rope_parameters=parameters)
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert reference.config.rope_parameters["rope_theta"] == 300.0

    got = PackedLlama(folder, dtype=torch.float32).hidden([Tree((0,), (tuple(range(1, 30)),))], [])

    assert same(got, hidden_states(reference, range(30)))


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_a_llama_with_biases_is_computed_or_refused_but_never_computed_without_them(tmp_path: Path, bias: str) -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        **{bias: True},
    )
    reference = with_biases(LlamaForCausalLM, config, tmp_path, seed=1)

    try:
        model = PackedLlama(tmp_path, dtype=torch.float32)
    except ConfigError:
        return

    assert same(model.hidden([Tree((1,), ((2, 3),))], []), hidden_states(reference, [1, 2, 3]))


def test_qwen2_with_its_biases_is_that_of_transformers(tmp_path: Path) -> None:
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    reference = with_biases(Qwen2ForCausalLM, config, tmp_path, seed=2)
    trees = [Tree((1, 2), ((3, 4), (5,))), Tree((6,))]

    model = PackedLlama(tmp_path, dtype=torch.float32)

    assert same(model.hidden(trees, model.prefill([7, 8])), expected(reference, trees, [7, 8]))


def test_another_activation_is_computed_or_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder = changed(tiny_llama, tmp_path, hidden_act="gelu")

    try:
        model = PackedLlama(folder, dtype=torch.float32)
    except ConfigError:
        return

    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert same(model.hidden([Tree((1,), ((2, 3),))], []), hidden_states(reference, [1, 2, 3]))
