"""The language model with low-rank matrices: a tiny random one, and the packaged one once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clients.data import read_rows
from clients.domain_models import lora
from clients.domain_models.lora import LoRADomainModel
from promptfed.types import DomainModel
from tests.contracts.domain_model import DomainModelContract, encoder
from tests.support import sentences

DEMO = Path(__file__).parents[3] / "examples" / "sentiment5"
pytestmark = pytest.mark.usefixtures("one_thread")


class TestLoRA(DomainModelContract):
    averageable = True
    held_out = 0.55  # of a model with random weights

    @pytest.fixture(autouse=True)
    def _tiny(self, tiny_llama: Path) -> None:
        self._folder = str(tiny_llama)

    def model(self, n_labels: int = 2, seed: int = 0) -> DomainModel:
        return LoRADomainModel(encoder(), n_labels, seed=seed, name=self._folder)


def test_two_clients_share_the_model_and_not_their_parameters(tiny_llama: Path) -> None:
    data = sentences(20)
    one, other = (LoRADomainModel(encoder(), 2, name=str(tiny_llama)) for _ in range(2))
    before = other.predict_proba(data.texts)

    one.fit(data.texts, np.eye(2)[data.labels])

    assert one._shared is other._shared
    assert np.array_equal(other.predict_proba(data.texts), before)
    assert not np.allclose(one.predict_proba(data.texts), before)


def test_the_low_rank_matrices_are_trained_too(tiny_llama: Path) -> None:
    data = sentences(20)
    model = LoRADomainModel(encoder(), 2, name=str(tiny_llama))
    start = model.parameters.copy()

    model.fit(data.texts, np.eye(2)[data.labels])

    n_head = 2 * (model._shared.width + 1)
    assert np.abs(model.parameters - start)[:-n_head].max() > 1e-4


@pytest.mark.model
@pytest.mark.timeout(600)
def test_the_packaged_model_learns_from_a_few_reviews(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "LEAST_STEPS", 12)  # half a minute
    columns = {"client_column": "client", "text_column": "text", "label_column": "label"}
    rows = [(text, label) for _, text, label in read_rows(DEMO / "train.csv.gz", **columns)]
    names = sorted({label for _, label in rows})  # 40 texts to learn from, 80 to tell
    by_label = [[text for text, label in rows if label == name and 40 <= len(text) <= 70] for name in names]
    train, held_out = ([texts[i] for i in range(*which) for texts in by_label] for which in ((0, 20), (20, 60)))
    model = LoRADomainModel(encoder(), 2).fit(train, np.tile(np.eye(2), (20, 1)))

    right = model.predict_proba(held_out).argmax(axis=1) == np.tile([0, 1], 40)

    assert right.mean() >= 0.65
    assert 30_000 < len(model.parameters) < 100_000
    lora._shared.cache_clear()


def test_without_its_package_it_is_refused_where_it_is_named() -> None:
    code = (
        "import importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name, *a: None if name == 'peft' else find(name, *a); "
        "from promptfed.plugins import DOMAIN_MODELS, find as named; named(DOMAIN_MODELS, 'domain model', 'lora')"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert "ConfigError: domain model 'lora' needs a package more: pip install 'promptfed[lora]'" in done.stderr
