"""N-grams that the slots of a prompt are filled with: candidates from public text, ranked by what clients count.

The vocabulary of BDPL (Diao et al., TMLR 2023, arXiv 2201.08531, section 3.2) is n-grams whose words belong together,
by their pointwise mutual information

    PMI(w1 ... wm) = log p(w1 ... wm) - sum_i log p(wi),    p(g) = texts that hold g / texts               (1)

counted on the training texts. Here the training texts are the clients': candidates come from public text (or from what
the foundation model wrote), and clients say in how many of their texts each stands. PMI alone is largest for what
stands in two texts by chance, so n-grams are ranked by p(g) PMI(g), their share of the mutual information (Evert, The
Statistics of Word Cooccurrences, 2005, section 3.1.6).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

# Longest n-grams, how many are counted, and in how many texts of a client one must stand for the client to say so: a
# client's promises, whatever a server asks.
MAX_WORDS, MAX_NGRAMS, LEAST_TEXTS = 3, 800, 3
# An n-gram does not go beyond a mark that ends a clause; digits and underscores make no word.
_CLAUSE = re.compile(r"[^\w'@#\s-]+|\n|--+")
_WORD = re.compile(r"(?<![\w'])[^\W\d_]+(?:['-][^\W\d_]+)*(?![\w'])")


def ngrams_of(text: str, max_words: int) -> frozenset[str]:
    """All n-grams of one to ``max_words`` words that stand in ``text``, in lower case, apostrophes straight."""
    found = set[str]()
    for clause in _CLAUSE.split(text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")):
        words = _WORD.findall(clause)
        for n in range(1, max_words + 1):
            found.update(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
    return frozenset(found)


def counted(texts: Iterable[str], max_words: int) -> Counter[str]:
    """In how many of ``texts`` each n-gram stands."""
    return Counter(ngram for text in texts for ngram in ngrams_of(text, max_words))


def candidates(texts: Iterable[str], max_words: int, most: int) -> list[str]:
    """Up to ``most`` n-grams of public ``texts``, those that stand in most texts first. The single words of which each
    is made are among them: they are needed for (1)."""
    counts = counted(texts, max_words)
    chosen: dict[str, None] = {}
    for ngram in sorted(counts, key=lambda g: (-counts[g], g)):
        new = [g for g in (*ngram.split(), ngram) if g not in chosen]
        if len(chosen) + len(new) > most:
            break
        chosen |= dict.fromkeys(new)
    return list(chosen)


def pmi(ngram: str, counts: Mapping[str, int], n: int) -> float:
    """Equation (1) over ``n`` texts, in nats: 0 for a single word, -inf for what stands in none."""
    words = ngram.split()
    if not counts.get(ngram) or not all(counts.get(word) for word in words):
        return -math.inf
    return math.log(counts[ngram] / n) - sum(math.log(counts[word] / n) for word in words)


def ranked(counts: Mapping[str, int], n: int, size: int) -> list[str]:
    """The ``size`` n-grams with the largest share of the mutual information of ``n`` texts.

    An n-gram that holds, or is held by, a better one is left out. Single words (their PMI is 0) come after all that
    belong together, then those whose words avoid each other, and at last what stands in no text; more frequent ones
    first.
    """

    def share(ngram: str) -> float:
        return counts[ngram] / n * pmi(ngram, counts, n) if counts[ngram] else -math.inf

    kept: list[str] = []
    for ngram in sorted(counts, key=lambda g: (-share(g), -counts[g], g)):
        if len(kept) == size:
            break
        if not any(_holds(ngram, other) or _holds(other, ngram) for other in kept):
            kept.append(ngram)
    return kept


def _holds(longer: str, shorter: str) -> bool:
    return f" {shorter} " in f" {longer} "


def joined(ngrams: Sequence[str], text: str) -> str:
    """A prompt's ``text`` with ``ngrams`` before it."""
    return f"{' '.join(ngrams)}\n\n{text}"
