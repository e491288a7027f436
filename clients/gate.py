"""The leak gate: what an FM wrote from private texts passes only if it repeats nothing of them that is not known.

Everything else that leaves a client is a number over texts. An instruction that the FM rewrote after it was shown
mistakes is text, and the FM may have copied from what it was shown, a name as easily as a sentence. The gate compares
with *all* of the client's texts, as sets of words: it knows no language and asks no model, so that what it
stops can be said in a sentence a rule (docs/leak-gate.md), and it errs on the side of stopping: what is stopped costs
one rewrite, what slips through can't be called back.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

from clients.common_words import COMMON_WORDS

# So many words in a row, shared with a private text, are a quotation. Single words that only private texts have are
# stopped by themselves, so a run is made of words that everybody uses; of those, three in a row meet by chance
# ("of the text"), four seldom do, and say little where they do.
RUN = 4
# The length bound of what passes: room for a paragraph of rules, not for a document.
MAX_WORDS, MAX_CHARS = 120, 900
# A private word of so many letters may not hide in another one ("unzyzzyva"), be spelled or broken up ("zy zzyva"), or
# be cut off after so many ("zyzzyv"); a shorter one may not have an ending ("Bobs"). Fewer letters occur in any word.
HIDDEN, BROKEN, CUT, ENDING = 5, 3, 4, 2

# Letters and digits; a character is a word in scripts that are written without spaces.
_TOKEN = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]|[^\W_]+")
# Letters that Unicode does not take apart; and how names are spelled where a keyboard lacks their letters.
_BARE = str.maketrans(
    {"ł": "l", "ø": "o", "đ": "d", "ð": "d", "\u0131": "i", "ħ": "h", "ŧ": "t", "æ": "ae", "œ": "oe", "þ": "th"}
)
_SPELLED = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "ø": "oe", "å": "aa"})
# An e-mail or a web address, or the start of one.
_ADDRESS = re.compile(r"@|://|www\.|[^\W_]\.[^\W\d_]{2,}", flags=re.IGNORECASE)


class LeakGate:
    """``private`` are all the texts of a client, ``known`` texts or words that anybody may read: the prompt that was
    rewritten, what the FM was asked, the label words, words of the public texts."""

    def __init__(self, private: Iterable[str], known: Iterable[str], *, run: int = RUN) -> None:
        self._run = run
        known_texts = [plain(text) for text in known]
        known_words = [tokens(text) for text in known_texts]
        self._free = COMMON_WORDS.union(*known_words)
        self._known_chunks = {chunk for text in known_texts for chunk in text.split()}
        private_words = [tokens(form) for text in private for form in {plain(text), plain(_spelled(text))}]
        # A text that is shorter than a run is one as a whole; a single word has its own rule.
        quotable = (_runs(words, min(run, len(words))) for words in private_words if len(words) > 1)
        self._runs = set().union(*quotable).difference(*(self._runs_of(words) for words in known_words))
        self._secret = set().union(*private_words) - self._free
        self._beginnings = {word[:n] for word in self._secret for n in range(CUT, len(word))}

    def passes(self, text: str) -> bool:
        """Whether ``text`` may leave."""
        flat = plain(text)
        words = tokens(flat)
        return (
            len(text) <= MAX_CHARS
            and len(words) <= MAX_WORDS
            and self._runs.isdisjoint(self._runs_of(words))
            and self._secret.isdisjoint(words)
            and not any(self._is_odd(chunk) for chunk in flat.split())
            and not any(self._hides_secret(run) for run in self._unknown(words))
        )

    def _runs_of(self, words: Sequence[str]) -> set[tuple[str, ...]]:
        return set().union(*(_runs(words, n) for n in range(2, self._run + 1)))

    def _is_odd(self, chunk: str) -> bool:
        """A number or an address that is not known, whether or not a private text has it in this form."""
        has_number = any(any(c.isdigit() for c in word) and word not in self._free for word in tokens(chunk))
        return has_number or (_ADDRESS.search(chunk) is not None and chunk not in self._known_chunks)

    def _unknown(self, words: Sequence[str]) -> list[list[str]]:
        """Runs of words that are not free; single letters join them."""
        out: list[list[str]] = [[]]
        for word in words:
            if word in self._free and len(word) > 1:
                out.append([])
            else:
                out[-1].append(word)
        return [run for run in out if run]

    def _hides_secret(self, run: Sequence[str]) -> bool:
        joined = "".join(run)
        is_broken = len(run) > 1
        return any(
            word in self._beginnings
            or any(word[:-n] in self._secret for n in range(1, ENDING + 1) if len(word) - n >= BROKEN)
            or any(len(secret) >= HIDDEN and secret in word for secret in self._secret)
            for word in {*run, joined}
        ) or (is_broken and any(len(secret) >= BROKEN and secret in joined for secret in self._secret))


def _runs(words: Sequence[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def plain(text: str) -> str:
    """``text`` as it is compared: no capitals, accents or invisible characters; full-width letters are letters."""
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    bare = "".join(c for c in decomposed if unicodedata.category(c) not in ("Mn", "Cf"))
    return re.sub(r"n['\u2019]t\b", "nt", bare.translate(_BARE))


def _spelled(text: str) -> str:
    """Müller as Mueller."""
    return unicodedata.normalize("NFC", text.casefold()).translate(_SPELLED)


def tokens(text: str) -> list[str]:
    """The words of a `plain` text."""
    return _TOKEN.findall(text)
