"""A client's own randomness: kept, private to its owner, and not the server's."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from promptfed.errors import DataError
from promptfed.privacy.secret import KEY_BYTES, Secret, simulated_key


def test_a_key_is_made_once_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    first = Secret.kept_in(tmp_path / "run")
    again = Secret.kept_in(tmp_path / "run")
    path = tmp_path / "run" / "noise.key"

    assert len(path.read_bytes()) == KEY_BYTES
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert first.uniforms(3, "a").tolist() == again.uniforms(3, "a").tolist()
    assert [p.name for p in path.parent.iterdir()] == ["noise.key"]


def test_two_clients_without_a_folder_have_nothing_in_common() -> None:
    assert Secret.kept_in(None).uniforms(3, "a").tolist() != Secret.kept_in(None).uniforms(3, "a").tolist()


def test_a_file_that_holds_no_key_is_told(tmp_path: Path) -> None:
    (tmp_path / "noise.key").write_bytes(b"short")

    with pytest.raises(DataError, match="32 bytes; got 5"):
        Secret.kept_in(tmp_path)


def test_each_purpose_has_numbers_of_its_own_and_the_same_ones_again() -> None:
    secret = Secret(simulated_key(1, "north"))

    assert secret.uniforms(4, "noise", "a").tolist() == secret.uniforms(4, "noise", "a").tolist()
    assert secret.uniforms(4, "noise", "a").tolist() != secret.uniforms(4, "noise", "b").tolist()
    assert secret.uniforms(4, "ab", "c").tolist() != secret.uniforms(4, "a", "bc").tolist()
    assert Secret(simulated_key(2, "north")).uniforms(4, "x").tolist() != secret.uniforms(4, "x").tolist()
    assert Secret(simulated_key(1, "south")).uniforms(4, "x").tolist() != secret.uniforms(4, "x").tolist()


def test_the_numbers_are_uniform_and_normal() -> None:
    secret = Secret(bytes(KEY_BYTES))
    uniforms, normals = secret.uniforms(20_000, "u"), secret.normals(20_000, "n")

    assert uniforms.min() > 0
    assert uniforms.max() < 1
    assert stats.kstest(uniforms, "uniform").pvalue > 0.001
    assert stats.kstest(normals, "norm").pvalue > 0.001
    assert abs(np.corrcoef(uniforms[1:], uniforms[:-1])[0, 1]) < 0.03
