"""A Llama-family forward pass for scoring many short texts behind one shared prompt, without padding waste.

All matrix products run over the packed tokens of a batch, (n_tokens, hidden); only attention sees a padded
(n_texts, longest) shape, and there the prompt's keys and values are computed once and shared. A text that several
labels of many tokens may follow is computed once too, as a `Tree`. What SmolLM2-135M does on 2 cores: see
docs/engine.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from promptfed.errors import ConfigError

Prefix = list[tuple[Tensor, Tensor]]  # per layer: keys and values, each (n_kv_heads, n_prefix, head_dim)


def fast_dtype() -> torch.dtype:
    """bfloat16 where this CPU multiplies it in hardware, 3 times as fast as float32 there; where it is emulated it is 8
    times as slow."""
    has = torch.cpu.get_capabilities()
    return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32


class Tree(NamedTuple):
    """Tokens, and continuations of them that don't see each other."""

    body: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...] = ()

    @property
    def tokens(self) -> tuple[int, ...]:
        return (*self.body, *chain.from_iterable(self.branches))

    @property
    def positions(self) -> tuple[int, ...]:
        """Of `tokens`: a branch goes on where the body ends."""
        n = len(self.body)
        return (*range(n), *(p for branch in self.branches for p in range(n, n + len(branch))))

    @property
    def owners(self) -> tuple[int, ...]:
        """Of `tokens`: 0 for the body, else 1 + the number of the branch."""
        return (*(0,) * len(self.body), *(b for b, branch in enumerate(self.branches, 1) for _ in branch))


class _Layer(NamedTuple):
    norm1: Tensor
    qkv: Tensor  # (n_heads * d + 2 * n_kv * d, hidden)
    out: Tensor
    norm2: Tensor
    gate_up: Tensor  # (2 * intermediate, hidden)
    down: Tensor


class PackedLlama:
    """Weights of a ``LlamaForCausalLM`` folder (config.json and model.safetensors) and its packed forward pass."""

    def __init__(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        dtype = dtype or fast_dtype()
        config = json.loads((folder / "config.json").read_text())
        if config.get("model_type") != "llama":
            raise ConfigError(
                f"the embedded engine reads Llama-family models; {folder.name} has model_type "
                f"{config.get('model_type')!r}. Choose a Llama-family model"
            )
        usual = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
        odd = [f"{name} {config[name]!r}" for name, value in usual.items() if (config.get(name) or value) != value]
        if odd:
            raise ConfigError(
                f"the embedded engine computes SiLU layers without biases; {folder.name} has {', '.join(odd)}"
            )
        weights = {name: w.to(dtype) for name, w in load_file(folder / "model.safetensors").items()}
        self.n_heads: int = config["num_attention_heads"]
        self.n_kv: int = config["num_key_value_heads"]
        self.head_dim: int = config.get("head_dim") or config["hidden_size"] // self.n_heads
        self.context: int = config["max_position_embeddings"]
        self._eps: float = config["rms_norm_eps"]
        self.embedding = weights["model.embed_tokens.weight"]
        self.head = weights.get("lm_head.weight", self.embedding)
        self._final_norm = weights["model.norm.weight"]
        self._layers = [self._layer(weights, i) for i in range(config["num_hidden_layers"])]
        self._cos, self._sin = self._rotations(config, dtype)

    @staticmethod
    def _layer(weights: dict[str, Tensor], i: int) -> _Layer:
        def get(name: str) -> Tensor:
            return weights[f"model.layers.{i}.{name}.weight"]

        return _Layer(
            norm1=get("input_layernorm"),
            qkv=torch.cat([get(f"self_attn.{part}_proj") for part in "qkv"]),
            out=get("self_attn.o_proj"),
            norm2=get("post_attention_layernorm"),
            gate_up=torch.cat([get("mlp.gate_proj"), get("mlp.up_proj")]),
            down=get("mlp.down_proj"),
        )

    def _rotations(self, config: dict[str, object], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
            raise ConfigError(f"the embedded engine knows plain rotary embeddings; the model asks for {rope}")
        theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)  # type: ignore[arg-type]
        half = self.head_dim // 2
        angles = torch.outer(torch.arange(self.context).float(), theta ** -(torch.arange(half).float() / half))
        # rotate_half(x) * sin is written as swap(x) * sin', with the sign folded into sin'.
        cos = torch.cat([angles.cos(), angles.cos()], dim=-1)
        sin = torch.cat([-angles.sin(), angles.sin()], dim=-1)
        return cos.to(dtype)[:, None], sin.to(dtype)[:, None]

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int]) -> Prefix:
        """Keys and values of a prompt, to be shared by the texts that follow it. An empty prompt gives ``[]``."""
        keep: Prefix = []
        if tokens:
            self._forward([Tree(tuple(tokens))], [], keep)
        return keep

    @torch.inference_mode()
    def hidden(self, trees: Sequence[Tree], prefix: Prefix) -> Tensor:
        """Final hidden states, packed: of each tree the last token of its body, then all tokens of its branches."""
        lengths = [len(tree.tokens) for tree in trees]
        ends = torch.cumsum(torch.tensor(lengths), 0).tolist()
        wanted = (torch.arange(end - n + len(t.body) - 1, end) for t, n, end in zip(trees, lengths, ends, strict=True))
        return self._forward(trees, prefix, None, torch.cat(list(wanted)))

    def _mask(self, trees: Sequence[Tree], n_prefix: int, longest: int) -> Tensor:
        """What each token doesn't see: (1 or n_trees, longest, n_prefix + longest), 0 or minus infinity."""
        seen = torch.ones(1, longest, n_prefix + longest, dtype=torch.bool).tril(n_prefix)
        if any(sum(map(bool, tree.branches)) > 1 for tree in trees):
            owners = torch.zeros(len(trees), longest, dtype=torch.long)
            for row, tree in zip(owners, trees, strict=True):
                row[: len(tree.tokens)] = torch.tensor(tree.owners)
            key, query = owners[:, None, :], owners[:, :, None]
            kin = F.pad((key == 0) | (key == query), (n_prefix, 0), value=True)
            seen = seen & kin
        return torch.zeros(seen.shape, dtype=self.embedding.dtype).masked_fill_(~seen, float("-inf"))

    def _forward(
        self, trees: Sequence[Tree], prefix: Prefix, keep: Prefix | None, rows: Tensor | None = None
    ) -> Tensor:
        n_prefix = prefix[0][0].shape[1] if prefix else 0
        lengths = torch.tensor([len(tree.tokens) for tree in trees])
        n, longest = len(trees), int(lengths.max())
        width = n_prefix + longest
        tokens = torch.tensor([t for tree in trees for t in tree.tokens])
        position = torch.tensor([p for tree in trees for p in tree.positions])
        owner = torch.repeat_interleave(torch.arange(n), lengths)
        column = torch.arange(len(tokens)) - torch.repeat_interleave(torch.cumsum(lengths, 0) - lengths, lengths)
        ragged = bool((lengths != longest).any())
        in_queries = owner * longest + column
        in_keys = owner * width + n_prefix + column
        cos, sin = self._cos[position + n_prefix], self._sin[position + n_prefix]
        d, groups, half = self.head_dim, self.n_heads // self.n_kv, self.head_dim // 2
        # Query heads that share a key head are folded into the length, so keys are never repeated.
        mask = self._mask(trees, n_prefix, longest).repeat(1, groups, 1)[:, None]
        x: Tensor = self.embedding[tokens]
        keys = x.new_zeros(n, width, self.n_kv, d)
        values = x.new_zeros(n, width, self.n_kv, d)
        padded = x.new_zeros(n * longest, self.n_heads, d)
        last = len(self._layers) - 1
        for i, layer in enumerate(self._layers):
            normed = F.rms_norm(x, (x.shape[-1],), layer.norm1, self._eps)
            qkv = F.linear(normed, layer.qkv).view(len(tokens), self.n_heads + 2 * self.n_kv, d)
            turned = qkv[:, : self.n_heads + self.n_kv]
            turned = turned * cos + torch.cat([turned[..., half:], turned[..., :half]], dim=-1) * sin
            keys.view(-1, self.n_kv, d)[in_keys] = turned[:, self.n_heads :]
            values.view(-1, self.n_kv, d)[in_keys] = qkv[:, self.n_heads + self.n_kv :]
            if n_prefix:
                keys[:, :n_prefix] = prefix[i][0].transpose(0, 1)
                values[:, :n_prefix] = prefix[i][1].transpose(0, 1)
            if keep is not None:
                keep.append((keys[0].transpose(0, 1).clone(), values[0].transpose(0, 1).clone()))
                if i == last:
                    return x
            padded[in_queries] = turned[:, : self.n_heads]
            queries = padded.view(n, longest, self.n_kv, groups, d).permute(0, 2, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(
                queries.reshape(n, self.n_kv, groups * longest, d),
                keys.transpose(1, 2),
                values.transpose(1, 2),
                attn_mask=mask,
            )
            mixed = mixed.view(n, self.n_kv, groups, longest, d).permute(0, 3, 1, 2, 4)
            mixed = mixed.reshape(n * longest, self.n_heads * d)
            if ragged:
                mixed = mixed[in_queries]
            if rows is not None and i == last:
                mixed, x = mixed[rows], x[rows]
            x = x + F.linear(mixed, layer.out)
            normed = F.rms_norm(x, (x.shape[-1],), layer.norm2, self._eps)
            gate, up = F.linear(normed, layer.gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        final: Tensor = F.rms_norm(x, (x.shape[-1],), self._final_norm, self._eps)
        return final
