"""The made-up extraction data: repeatable, answers stand in notes, and nothing of training comes back when it is
measured."""

from __future__ import annotations

import csv
import gzip
import re
from itertools import combinations
from pathlib import Path

from evaluators.extraction import DOMAINS, NOTICES, PUBLIC, TEST, TRAIN, public_texts, rows, write

EXAMPLE = Path(__file__).parents[2] / "examples" / "extraction"


def read(path: Path) -> list[list[str]]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def template_of(text: str) -> str:
    """The template that a text was made from."""
    for template in (t for domain in (*DOMAINS.values(), NOTICES) for t in domain.notes):
        pattern = re.escape(template[0].upper() + template[1:] if template[0] != "{" else template)
        pattern = re.sub(r"\\{\w+\\}", ".+", pattern)
        if re.match(pattern + r" [A-Z][^?]+\?$", text):
            return template
    raise AssertionError(text)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write(tmp_path / name, seed=seed, n_train=5, n_test=3, n_public=4)

    a, b, c = ([(tmp_path / n / f"{part}.csv.gz").read_bytes() for part in ("train", "test", "public")] for n in "abc")
    assert a == b
    assert all(x != y for x, y in zip(a, c, strict=True))


def test_the_files_of_the_example_are_the_generators(tmp_path: Path) -> None:
    write(tmp_path)

    for part in ("train", "test", "public"):
        assert read(EXAMPLE / f"{part}.csv.gz") == read(tmp_path / f"{part}.csv.gz"), part


def test_every_answer_stands_once_in_its_note_and_every_client_has_its_share() -> None:
    for split, n in ((TRAIN, 60), (TEST, 30)):
        made = rows(split, n, seed=3)

        assert {client: sum(c == client for c, _, _ in made) for client in DOMAINS} == dict.fromkeys(DOMAINS, n)
        assert len({text for _, text, _ in made}) == len(made)
        assert all(text.count(answer) == 1 for _, text, answer in made)
        assert all(text.endswith("?") and "\n" not in text for _, text, _ in made)


def test_held_out_templates_wordings_and_values_are_really_held_out() -> None:
    train, test = rows(TRAIN, 60, seed=1), rows(TEST, 60, seed=1)
    public = public_texts(60, seed=1)
    of = {"train": [t for _, t, _ in train], "test": [t for _, t, _ in test], "public": public}
    templates = {part: {template_of(t) for t in texts} for part, texts in of.items()}
    # Names, cities, firms and numbers: words that begin with a capital or hold a digit, but not those of templates.
    fixed = {w for d in (*DOMAINS.values(), NOTICES) for t in d.notes for w in re.findall(r"\w+", t)}
    fixed |= {
        w for d in (*DOMAINS.values(), NOTICES) for ws in d.questions.values() for w in re.findall(r"\w+", str(ws))
    }
    months = set("January February March April May June July August September October November December".split())  # noqa: SIM905
    trades = set("Foods Logistics Media Paper Tools Textiles Travel Power Glass".split())  # noqa: SIM905
    names = {
        part: {w for t in texts for w in re.findall(r"\b[A-Z][a-z]+\b", t)} - fixed - months - trades
        for part, texts in of.items()
    }
    dates = {part: set(re.findall(r"\d+ [A-Z]\w+ \d{4}", " ".join(texts))) for part, texts in of.items()}
    codes = {part: set(re.findall(r"[A-Z]-\d{5}", " ".join(texts))) for part, texts in of.items()}

    for a, b in combinations(of, 2):
        for found in (templates, dates, codes):
            assert found[a].isdisjoint(found[b])
        assert names[a].isdisjoint(names[b]), names[a] & names[b]
    assert {a for _, _, a in train}.isdisjoint(a for _, _, a in test)
    asked = {part: {re.findall(r"[A-Z][^.]*\?$", t)[0] for t in of[part]} for part in ("train", "test")}
    assert asked["train"].isdisjoint(asked["test"])
    assert PUBLIC not in (TRAIN, TEST)
