"""The rows of the claim, from records small enough to count by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import methods_tables as tables

AT = "@2500"


def record(method: str, seed: int, data: str = "topics6", **arms: dict[str, list[int]]) -> dict[str, Any]:
    """Of ``arms``: by client which texts were right, packed as `methods.py` packs them."""
    right = {
        f"{arm}{AT}": {
            client: {"n": len(bits), "bits": np.packbits(np.array(bits, dtype=np.uint8)).tobytes().hex()}
            for client, bits in by_client.items()
        }
        for arm, by_client in arms.items()
    }
    return {"data": data, "method": method, "seed": seed, "readings": [{"milestone": 2500}], "right": right}


def test_over_clients_a_small_client_weighs_as_much_as_a_large_one_and_over_texts_less() -> None:
    race = record("race", 1, fm={"small": [1], "large": [0] * 9})
    other = record("fedbpt", 1, fm={"small": [0], "large": [0] * 9})

    def points(over: str) -> float:
        got = tables.paired([race, other], ("race", f"fm{AT}"), ("fedbpt", f"fm{AT}"), over)
        assert got is not None
        return got.difference

    assert points("clients") == pytest.approx(0.5)
    assert points("texts") == pytest.approx(0.1)


def test_only_seeds_that_both_have_are_compared() -> None:
    found = [
        record("race", 1, fm={"a": [1, 1]}),
        record("race", 2, fm={"a": [0, 0]}),
        record("fedbpt", 1, fm={"a": [1, 0]}),
    ]

    got = tables.paired(found, ("race", f"fm{AT}"), ("fedbpt", f"fm{AT}"))

    assert got is not None
    assert got.difference == pytest.approx(0.5)
    assert tables.paired(found, ("race", f"fm{AT}"), ("aug_pe", f"fm{AT}")) is None


def test_where_seeds_deal_out_texts_alike_they_are_averaged_by_text() -> None:
    found = [record("race", seed, "sentiment5", fm={"a": bits}) for seed, bits in ((1, [1, 0]), (2, [1, 1]))]

    assert tables.right(found, f"fm{AT}")["a"].tolist() == [[1.0, 0.0], [1.0, 1.0]]


def test_where_they_do_not_a_client_of_a_seed_is_one_of_its_own() -> None:
    found = [record("race", seed, fm={"a": bits}) for seed, bits in ((1, [1, 0]), (2, [1, 1, 1]))]

    assert {c: r.tolist() for c, r in tables.right(found, f"fm{AT}").items()} == {
        "1/a": [[1.0, 0.0]],
        "2/a": [[1.0, 1.0, 1.0]],
    }


def test_the_worst_fifth_is_each_sides_own() -> None:
    clients = ["a", "b", "c", "d", "e"]
    good, bad = [1] * 10, [1] * 5 + [0] * 5
    race = record(
        "race",
        1,
        fm_personal=dict.fromkeys(clients, good),
        fm={c: bad if c == "a" else good for c in clients},
    )
    local = record("local_only", 1, fm={c: bad if c == "b" else good for c in clients})

    got = tables._worst_fifth([race, local])

    assert got["clients"] == 5
    assert got["mean"] == {"personal": 1.0, "global": 0.5, "local_only": 0.5}
    assert got["personal less global"]["points"] == 50.0
    assert got["personal less local_only"]["ci95"][0] > 0
