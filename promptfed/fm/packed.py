"""A Llama-family forward pass for scoring many short texts behind one shared prompt, without padding.

Everything but attention runs over the packed tokens of a batch, (n_tokens, hidden). Attention has two parts, merged by
their log-sum-exps: all tokens of the batch against the prompt's keys and values, which are computed and stored once,
and each text against itself, where texts of one shape are one call. A text that several labels of many tokens may
follow is computed once too, as a `Tree`. What SmolLM2-135M does on 2 cores: see docs/engine.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from promptfed.errors import ConfigError
from promptfed.fm.weights import weight_files

# Attention to a multiple of so many keys is up to twice as fast: others are filled up with masked ones.
KEYS = 32
FAMILIES = ("llama", "mistral", "qwen2")
# Weights are stored in the order that the CPU's products want for about so many tokens; other numbers work too.
TYPICAL_TOKENS = 768


def fast_dtype() -> torch.dtype:
    """bfloat16 where this machine multiplies it in hardware, 3 times as fast as float32 on a CPU; where it is emulated
    it is 8 times as slow."""
    has = torch.cpu.get_capabilities()
    hardware = torch.cuda.is_available() or has.get("avx512_bf16") or has.get("amx_bf16")
    return torch.bfloat16 if hardware else torch.float32


def fast_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Tree(NamedTuple):
    """Tokens, and continuations of them that don't see each other."""

    body: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...] = ()

    @property
    def tokens(self) -> tuple[int, ...]:
        return (*self.body, *chain.from_iterable(self.branches))

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the body and of the branches."""
        return (len(self.body), *map(len, self.branches))

    @property
    def positions(self) -> tuple[int, ...]:
        """Of `tokens`: a branch goes on where the body ends."""
        n = len(self.body)
        return (*range(n), *(p for branch in self.branches for p in range(n, n + len(branch))))

    @property
    def owners(self) -> tuple[int, ...]:
        """Of `tokens`: 0 for the body, else 1 + the number of the branch."""
        return (*(0,) * len(self.body), *(b for b, branch in enumerate(self.branches, 1) for _ in branch))


class _Seen(NamedTuple):
    """What one layer keeps of a prompt, filled up to a multiple of `KEYS`."""

    keys: Tensor  # (1, n_kv_heads, n_filled, head_dim)
    values: Tensor
    mask: Tensor  # (n_filled,): 0, or minus infinity for what is filled up


Prefix = list[_Seen]  # one a layer


class _Run(NamedTuple):
    """Trees of one shape that follow each other in a batch."""

    n: int
    length: int  # tokens of each
    body: int  # tokens of each body
    mask: Tensor  # (length * groups, n_filled): 0 where a token's queries see another, else minus infinity


class _Linear:
    """``x @ weight.T + bias``, and what follows it: on a CPU in one pass with it, over weights stored for that."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._bias = bias
        # oneDNN multiplies bfloat16 only where the CPU does, and float32 everywhere.
        self._packs = weight.device.type == "cpu" and weight.dtype in (fast_dtype(), torch.float32)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_TOKENS) if self._packs else weight

    def __call__(self, x: Tensor, then: str = "none") -> Tensor:
        """``then``: "none", or "swish", which is SiLU."""
        if self._packs:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, then, [], "")
            return y
        y = F.linear(x, self._weight, self._bias)
        return F.silu(y) if then == "swish" else y

    def with_other(self, x: Tensor, other: Tensor, how: str) -> Tensor:
        """``how``: "mul" or "add", of the product and ``other``."""
        if self._packs:
            y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self._weight, self._bias, how)
            return y
        y = F.linear(x, self._weight, self._bias)
        return y * other if how == "mul" else y + other


class _Layer(NamedTuple):
    qkv: _Linear  # (n_heads * d + 2 * n_kv * d, hidden)
    out: _Linear
    gate: _Linear  # (intermediate, hidden)
    up: _Linear
    down: _Linear


def reason_against(config: dict[str, Any]) -> str | None:
    """Why `PackedLlama` does not compute a model with this config.json; None if it does."""
    if config.get("model_type") not in FAMILIES:
        return f"a Llama-family model is expected ({', '.join(FAMILIES)}), not model_type {config.get('model_type')!r}"
    if (activation := config.get("hidden_act", "silu")) != "silu":
        return f"SiLU layers are expected, not {activation!r}"
    if _rope(config).get("rope_type", "default") != "default":
        return f"plain rotary embeddings are expected, not {_rope(config)}"
    if config.get("quantization_config"):
        return "weights that are not quantised are expected"
    return None


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


class PackedLlama:
    """Weights of a Llama-family folder (config.json and model.safetensors) and its packed forward pass.

    Raises `ConfigError` with `reason_against` it.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None = None, device: torch.device | None = None) -> None:
        dtype, device = dtype or fast_dtype(), device or fast_device()
        config = json.loads((folder / "config.json").read_text())
        if reason := reason_against(config):
            raise ConfigError(f"the packed forward pass does not compute {folder.name}: {reason}")
        weights = {n: w.to(device, dtype) for file in weight_files(folder) for n, w in load_file(file).items()}
        self.n_heads: int = config["num_attention_heads"]
        self.n_kv: int = config.get("num_key_value_heads") or self.n_heads
        self.head_dim: int = config.get("head_dim") or config["hidden_size"] // self.n_heads
        window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
        self.context: int = min(config["max_position_embeddings"], window or config["max_position_embeddings"])
        self._eps: float = config["rms_norm_eps"]
        self.embedding = weights["model.embed_tokens.weight"]
        self.head = weights.get("lm_head.weight", self.embedding)
        self._final_norm = weights["model.norm.weight"]
        self._layers = [self._layer(weights, f"model.layers.{i}") for i in range(config["num_hidden_layers"])]
        self._cos, self._sin = self._rotations(config)

    @property
    def hidden_size(self) -> int:
        return int(self.embedding.shape[1])

    def _layer(self, weights: dict[str, Tensor], name: str) -> _Layer:
        def weight(part: str) -> Tensor:
            return weights[f"{name}.{part}.weight"]

        def bias(*parts: str) -> Tensor | None:
            found = [weights[f"{name}.{part}.bias"] for part in parts if f"{name}.{part}.bias" in weights]
            return torch.cat(found) if found else None

        def scaled(norm: str, *parts: str) -> Tensor:
            """The product behind a norm: the norm's weights go into it, so that only its scale is left to compute."""
            return (torch.cat([weight(p) for p in parts]).float() * weight(norm).float()).to(self.embedding.dtype)

        groups = self.n_heads // self.n_kv

        def by_group(x: Tensor) -> Tensor:
            """Query heads that share a key head, one after the other, become every n_kv-th: the queries of all heads of
            a key head are then rows at one distance from each other, and attention needs no copies."""
            return x.view(self.n_kv, groups, self.head_dim, -1).transpose(0, 1).reshape(x.shape)

        n_queries = self.n_heads * self.head_dim
        attention = [f"self_attn.{part}_proj" for part in "qkv"]
        qkv, qkv_bias = scaled("input_layernorm", *attention), bias(*attention)
        for x in (qkv, qkv_bias):
            if x is not None:
                x[:n_queries] = by_group(x[:n_queries])
        gate, up, down = (f"mlp.{part}_proj" for part in ("gate", "up", "down"))
        out = "self_attn.o_proj"
        return _Layer(
            qkv=_Linear(qkv, qkv_bias),
            out=_Linear(by_group(weight(out).T.contiguous()).T.contiguous(), bias(out)),
            gate=_Linear(scaled("post_attention_layernorm", gate), bias(gate)),
            up=_Linear(scaled("post_attention_layernorm", up), bias(up)),
            down=_Linear(weight(down), bias(down)),
        )

    def _rotations(self, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
        theta = float(_rope(config).get("rope_theta") or config.get("rope_theta") or 10000.0)
        half = self.head_dim // 2
        angles = torch.outer(torch.arange(self.context).float(), theta ** -(torch.arange(half).float() / half))
        # rotate_half(x) * sin is written as swap(x) * sin', with the sign folded into sin'.
        cos = torch.cat([angles.cos(), angles.cos()], dim=-1)
        sin = torch.cat([-angles.sin(), angles.sin()], dim=-1)
        return cos.to(self.embedding)[:, None], sin.to(self.embedding)[:, None]

    @torch.inference_mode()
    def embed(self, tokens: Sequence[int]) -> Tensor:
        """The input embeddings of tokens, (n, hidden)."""
        embedded: Tensor = self.embedding[torch.tensor(tokens, dtype=torch.long, device=self.embedding.device)]
        return embedded

    @torch.inference_mode()
    def prefill(self, prompt: Sequence[int] | Tensor) -> Prefix:
        """Keys and values of a prompt, to be shared by the texts that follow it: tokens, or their embeddings
        (n, hidden). An empty prompt gives ``[]``."""
        embedded = prompt.to(self.embedding) if isinstance(prompt, Tensor) else self.embed(prompt)
        keep: Prefix = []
        if len(embedded):
            self._forward(embedded, [Tree((0,) * len(embedded))], [], keep)
        return keep

    @torch.inference_mode()
    def hidden(self, trees: Sequence[Tree], prefix: Prefix) -> Tensor:
        """Final hidden states, packed: of each tree the last token of its body, then all tokens of its branches."""
        return self._forward(self.embed([t for tree in trees for t in tree.tokens]), trees, prefix, None)

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """Of the whole vocabulary, (n, n_vocabulary) in float32 from `hidden` (n, hidden)."""
        logits: Tensor = states.float() @ self._head32.T
        return logits

    @torch.inference_mode()
    def logits_of(self, states: Tensor, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Of one token at each of ``rows`` of `hidden`, (n,) in float32."""
        logits: Tensor = (states[list(rows)].float() * self.head[list(tokens)].float()).sum(dim=-1)
        return logits

    @cached_property
    def _head32(self) -> Tensor:
        """The whole output projection in float32 (113 MB of SmolLM2): made when the full vocabulary is first needed."""
        head: Tensor = self.head.float()
        return head

    def _runs(self, trees: Sequence[Tree]) -> list[_Run]:
        runs = []
        for shape, members in groupby(trees, key=lambda tree: tree.shape):
            like, *others = members
            owners = torch.tensor(like.owners)
            kin = (owners == 0) | (owners == owners[:, None])
            seen = F.pad(kin.tril(), (0, -len(kin) % KEYS))
            mask = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf")).to(self.embedding.device)
            mask = mask.repeat_interleave(self.n_heads // self.n_kv, dim=0)
            runs.append(_Run(1 + len(others), sum(shape), shape[0], mask))
        return runs

    def _forward(self, x: Tensor, trees: Sequence[Tree], prefix: Prefix, keep: Prefix | None) -> Tensor:
        n_prefix = int(prefix[0].mask.isfinite().sum()) if prefix else 0
        position = torch.tensor([p for tree in trees for p in tree.positions], device=x.device) + n_prefix
        cos, sin = self._cos[position], self._sin[position]
        runs = self._runs(trees)
        d = self.head_dim
        for i, layer in enumerate(self._layers):
            last = i == len(self._layers) - 1
            qkv = layer.qkv(self._normed(x)).view(len(x), -1, d)
            q, k, v = torch.split(qkv, [self.n_heads, self.n_kv, self.n_kv], dim=1)
            k = _turned(k, cos, sin)
            if keep is not None:
                filled = F.pad(torch.zeros(len(k), device=k.device), (0, -len(k) % KEYS), value=float("-inf"))
                keep.append(_Seen(_filled(k[None]).contiguous(), _filled(v[None]).contiguous(), filled))
                if last:
                    return x
            q = _turned(q, cos, sin)
            if last:
                x, q = _wanted(x, runs), _wanted(q, runs)
            mixed = self._attention(q, k, v, runs, prefix[i] if prefix else None, last)
            x = layer.out.with_other(mixed, x, "add")
            normed = self._normed(x)
            x = layer.down.with_other(layer.up.with_other(normed, layer.gate(normed, "swish"), "mul"), x, "add")
        return F.rms_norm(x, (x.shape[-1],), self._final_norm, self._eps)

    def _normed(self, x: Tensor) -> Tensor:
        """Each row over its root mean square; the norm's weights are in the product that follows."""
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = scale.square_().div_(x.shape[-1]).add_(self._eps).rsqrt_()
        return torch.mul(x, scale, out=torch.empty_like(x))

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, runs: Sequence[_Run], prefix: _Seen | None, last: bool
    ) -> Tensor:
        """Of each query to its own text and to the prefix, (n_queries, n_heads * d). In the last layer there are
        queries only for the last token of a body and for those of branches."""
        groups = self.n_heads // self.n_kv
        parts, at_q, at_k = [], 0, 0
        for n, length, body, mask in runs:
            first = body - 1 if last else 0
            end_q, end_k = at_q + n * (length - first), at_k + n * length
            own_q = q[at_q:end_q].view(n, -1, self.n_kv, self.head_dim)
            own_k, own_v = (x[at_k:end_k].view(n, length, self.n_kv, self.head_dim) for x in (k, v))
            parts.append(_attend(own_q, _filled(own_k), _filled(own_v), mask[first * groups :]))
            at_q, at_k = end_q, end_k
        mixed, lse = (x[0] if len(x) == 1 else torch.cat(x) for x in zip(*parts, strict=True))
        if prefix is not None:
            rows = q.view(1, -1, self.n_kv, self.head_dim)
            mask = prefix.mask.expand(rows.shape[1], -1)
            to_prefix, prefix_lse = _attend(rows, prefix.keys, prefix.values, mask)
            mixed = torch.lerp(to_prefix, mixed, (lse - prefix_lse).sigmoid_().to(mixed.dtype)[:, None])
        return mixed.view(len(q), -1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of (n_tokens, heads, d)."""
    half = x.shape[-1] // 2
    turned = x * cos
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half])
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return turned


def _wanted(x: Tensor, runs: Sequence[_Run]) -> Tensor:
    """The rows that `PackedLlama.hidden` returns, of all tokens' rows."""
    parts = torch.split(x, [run.n * run.length for run in runs])
    chosen = [
        p.view(run.n, run.length, *x.shape[1:])[:, run.body - 1 :].flatten(0, 1)
        for p, run in zip(parts, runs, strict=True)
    ]
    return torch.cat(chosen)


def _filled(x: Tensor) -> Tensor:
    """Keys or values (n, length, heads, d) as (n, heads, n_filled, d), filled up with zeros."""
    return F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % KEYS)).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of ``q`` (n, rows, heads, d) to ``k`` and ``v`` (n, heads, length, d), packed to (n * rows * heads, d),
    and the log-sum-exp of each query's scores (n * rows * heads,) in float32. ``mask`` (rows, length) is added."""
    q = q.transpose(1, 2)
    if q.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        mixed, lse = flash(q, k, v, attn_mask=mask[None, None])
    else:
        scores = (q @ k.transpose(2, 3)).float() / q.shape[-1] ** 0.5 + mask
        lse = scores.logsumexp(dim=-1)
        mixed = (scores - lse[..., None]).exp().to(v.dtype) @ v
    return mixed.transpose(1, 2).reshape(-1, q.shape[-1]), lse.transpose(1, 2).reshape(-1)
