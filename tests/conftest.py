"""Shared fixtures. The network is closed: a test that reaches for it fails."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clients.data import Labelled
from tests.support import WordEncoder, sentences

LOOPBACK = ("127.", "::1", "localhost")


class NetworkUsedError(AssertionError):
    """A test tried to leave the machine."""


SLOW_SUITES = ("network", "vllm", "nginx")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Suites that start real servers have make targets of their own (``-m network``)."""
    chosen = str(config.getoption("-m"))
    left_out = [item for item in items if any(item.get_closest_marker(m) and m not in chosen for m in SLOW_SUITES)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Only loopback and unix sockets connect; only loopback names resolve."""

    def is_local(family: int, address: Any) -> bool:
        if family not in (socket.AF_INET, socket.AF_INET6):
            return True
        return str(address[0]).startswith(LOOPBACK)

    def guarded(name: str) -> Any:
        original = getattr(socket.socket, name)

        def call(self: socket.socket, address: Any, *rest: Any) -> Any:
            if not is_local(self.family, address):
                raise NetworkUsedError(f"a test tried to {name} to the network")
            return original(self, address, *rest)

        return call

    look_up = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host is not None and not str(host).startswith(LOOPBACK):
            raise NetworkUsedError("a test tried to resolve a name on the network")
        return look_up(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded("connect"))
        patch.setattr(socket.socket, "connect_ex", guarded("connect_ex"))
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield


@pytest.fixture
def encoder() -> WordEncoder:
    """A tiny encoder without weights."""
    return WordEncoder()


@pytest.fixture
def reviews() -> Labelled:
    """Forty made-up reviews, twenty of each label."""
    return sentences(40)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices on one thread: many threads only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with grouped-query heads and a byte-level tokenizer; 64 positions, no meaning."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
