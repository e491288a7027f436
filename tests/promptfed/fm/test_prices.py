"""What answers cost, what they can cost at most, and files that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from promptfed.errors import ConfigError, SpendingLimitError
from promptfed.fm.decorators import Budgeted
from promptfed.fm.prices import FRAME_TOKENS, LABEL_ANSWER_TOKENS, Price, Priced, PriceFile
from promptfed.fm.scripted import ScriptedFM
from promptfed.registry import load_fm
from promptfed.types import Capability, FMResponse, LabelRequest, TextRequest
from tests.support import wait_for

FILE = """
date = 2026-11-25
[models.m]
prompt = 2.0
cached = 0.5
completion = 10.0
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prices.toml"
    path.write_text(FILE)
    return path


def test_an_answer_costs_fresh_cached_and_written_tokens_at_their_rates() -> None:
    answer = FMResponse(text="a", prompt_tokens=1000, cached_tokens=400, completion_tokens=50)

    assert Price(prompt=2.0, cached=0.5, completion=10.0).of(answer) == pytest.approx((1200 + 200 + 500) / 1e6)
    assert Price(prompt=2.0, completion=10.0).of(answer) == pytest.approx((2000 + 500) / 1e6)


def test_a_request_costs_at_most_its_bytes_as_tokens() -> None:
    price = Price(prompt=1.0, completion=100.0)

    asked = LabelRequest(prefix="é", text="ab", suffix="c", labels=(" x", " y"))  # 5 bytes and 4 of labels

    assert price.most(asked) == pytest.approx((9 + FRAME_TOKENS + 100 * LABEL_ANSWER_TOKENS) / 1e6)
    assert price.most(TextRequest(prompt="abc", max_tokens=7)) == pytest.approx((3 + FRAME_TOKENS + 700) / 1e6)


def test_labels_of_several_tokens_may_be_prompts_of_their_own() -> None:
    price = Price(prompt=1.0, completion=0.0)
    asked = LabelRequest(prefix="", text="a", suffix="", labels=("x", "y"))
    exact = ScriptedFM(capabilities=frozenset({Capability.LABEL_LOGPROBS, Capability.PROMPT_LOGPROBS}))

    assert Priced(exact, price).most_usd([asked]) == pytest.approx(3 * price.most(asked))
    assert Priced(ScriptedFM(), price).most_usd([asked]) == pytest.approx(price.most(asked))


def test_answers_carry_their_price() -> None:
    fm = Priced(ScriptedFM(), Price(prompt=1e6, completion=0.0))

    (answer,) = wait_for(fm.complete([LabelRequest(prefix="one two", text="three", suffix="", labels=("x", "y"))]))

    assert answer.usd == 3.0


def test_no_call_is_made_that_could_cost_more_than_is_left() -> None:
    price = Price(prompt=1.0, completion=0.0)
    asked = TextRequest(prompt="a" * 36, max_tokens=1)  # at most 100 millionths, in truth 1 a word
    fm = Budgeted(Priced(ScriptedFM(), price))
    fm.grant, fm.usd = 10, 201e-6

    wait_for(fm.complete([asked, asked]))
    assert fm.usd == pytest.approx(199e-6)
    with pytest.raises(SpendingLimitError, match=r"2 FM calls could cost 0.0002 USD, 0.000199 are left"):
        wait_for(fm.complete([asked, asked]))

    assert fm.grant == 8


def test_the_file_names_models_and_a_date(file: Path) -> None:
    prices = PriceFile.read(file)

    assert str(prices.date) == "2026-11-25"
    assert prices.of("m", file).cached == 0.5
    with pytest.raises(ConfigError, match=r"no price of n; it has m"):
        prices.of("n", file)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("date = 2026-11-25\n[models.m]\nprompt = -1.0\ncompletion = 1.0", "models.m.prompt: .*greater than or equal"),
        ("date = 2026-11-25\n[models.m]\nprompt = 1.0", "models.m.completion: Field required"),
        ("[models]", "date: Field required"),
        ("date = ", "not TOML"),
    ],
)
def test_a_file_that_is_none_says_where(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(content)

    with pytest.raises(ConfigError, match=said):
        PriceFile.read(path)


def test_a_model_is_loaded_with_its_price_and_a_cache(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(FILE.replace("models.m", "models.overlap"))
    asked = LabelRequest(prefix="one two", text="three", suffix="", labels=("x", "y"))

    fm = load_fm("scripted:overlap", prices=path, cache=tmp_path / "answers.sqlite")
    (paid,), (remembered,) = (wait_for(fm.complete([asked])) for _ in range(2))

    assert paid.usd == pytest.approx((3 * 2 + 10) / 1e6)
    assert (remembered.usd, remembered.from_cache, remembered.logprobs) == (0.0, True, paid.logprobs)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        load_fm("scripted:overlap", prices=tmp_path / "none.toml")
