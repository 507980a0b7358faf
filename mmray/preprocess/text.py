"""From a string to token ids, by NLTK's word tokeniser and a vocabulary of the training table's words.

Reads texts -> gives int32 arrays, 0 where a text has ended. Any string will do, in any script, in time linear in its
length.
"""

import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import nltk.tokenize
import numpy as np
from numpy.typing import NDArray

from mmray.config import TextConfig
from mmray.table import Fault, Reason, fault

PADDING, UNKNOWN = 0, 1
RESERVED_IDS = 2
MAX_REMEMBERED = 2**16  # words, whose tokens are known
MAX_WORD_CHARS = 64  # of what is remembered, and of a word's n-grams: beyond it is no word but a URL, a key or noise

# Scripts written without spaces between words: NLTK would make one token of a whole sentence. Each character is a
# token, with the vowel signs and tone marks that belong to it.
_UNSPACED = (
    "\u0e00-\u0e7f\u0e80-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Tibetan, Burmese, Khmer
    "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # kana, Han
)
_MARKS = (
    "\u0300-\u036f\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece\u0f71-\u0f87"
    "\u102b-\u103e\u17b4-\u17d3\u3099\u309a\ufe00-\ufe0f"
)
_CHARACTER = re.compile(f"([{_UNSPACED}][{_MARKS}]*)")

_CONTRACTIONS = (*nltk.tokenize.NLTKWordTokenizer.CONTRACTIONS2, *nltk.tokenize.NLTKWordTokenizer.CONTRACTIONS3)
_CONTRACTED = frozenset("".join(re.findall(r"\(([a-z']+)\)", rule.pattern)) for rule in _CONTRACTIONS)  # cannot, gimme
_CLOSERS = "])}>\"'\u00bb\u201d\u2019"  # NLTK splits a full stop before them off, at the end of a text
_BETWEEN = "X"  # no word of a text in lower case
_remembered: dict[str, Sequence[str]] = {}


@dataclass(frozen=True)
class Vocabulary:
    """The words a model knows: id k + 2 is `words[k]`; 0 is padding, 1 any other word."""

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ids", {word: k + RESERVED_IDS for k, word in enumerate(self.words)})

    @classmethod
    def from_counts(cls, counts: Mapping[str, int], config: TextConfig) -> "Vocabulary":
        """Takes the most frequent words; of equally frequent ones, the first in code point order."""
        frequent = [word for word, count in counts.items() if count >= config.min_count]
        frequent.sort(key=lambda word: (-counts[word], word))
        return cls(tuple(frequent[: config.vocabulary_size - RESERVED_IDS]))

    @classmethod
    def from_json(cls, text: str) -> "Vocabulary":
        """Reads what `to_json` wrote.

        Raises:
            ValueError: it is not a list of different strings.
        """
        words = json.loads(text)
        if not isinstance(words, list) or not all(isinstance(w, str) for w in words) or len(set(words)) != len(words):
            raise ValueError("a vocabulary is a list of different words")
        return cls(tuple(words))

    def to_json(self) -> str:
        """Returns the words as JSON, in the order of their ids."""
        return json.dumps(self.words)

    def ids(self, tokens: Sequence[str]) -> list[int]:
        """Returns the id of each token."""
        known: dict[str, int] = self._ids  # type: ignore[attr-defined]
        return [known.get(token, UNKNOWN) for token in tokens]


def tokenize(text: str, config: TextConfig) -> list[str]:
    """Returns the first `max_tokens` tokens of a text: lower-cased words and punctuation, as NLTK splits them."""
    # Half a surrogate pair becomes a question mark, half a character at the cut is dropped.
    clean = text[: config.max_bytes].encode("utf-8", "replace")[: config.max_bytes].decode("utf-8", "ignore")
    words = _CHARACTER.sub(r" \1 ", clean.lower()).split()
    # Each word gives one token at least. One word more than needed: NLTK treats the end of a text specially.
    words = words[: config.max_tokens + 1]
    if words and words[0].startswith(('"', "''")):  # of quotes there NLTK makes what it makes of them nowhere else
        return _split(" ".join(words))[: config.max_tokens]
    end = _end(words)
    known = _tokens_of(words[:end])
    tokens = [token for word in words[:end] for token in known[word]]
    rest = " ".join(words[end:])
    tokens += _tokens_of_end(rest) if len(rest) <= MAX_WORD_CHARS else _split_end(rest)
    return tokens[: config.max_tokens]


def _end(words: Sequence[str]) -> int:
    """Returns where the part of a text begins that NLTK treats as its end: a last word with signs, what closes it."""
    end = len(words)
    while end > 0 and not words[end - 1].strip(_CLOSERS):
        end -= 1
    return max(end - 1, 0) if end < len(words) or not words or not words[-1].isalnum() else end


def _tokens_of(words: Iterable[str]) -> dict[str, Sequence[str]]:
    """Returns the tokens of each word: what NLTK makes of one depends on no other, but for the end of a text.

    Most words come again, and NLTK would take a third of the time that a row takes.
    """
    found = {word: (word,) if _is_whole(word) else _remembered.get(word, ()) for word in words}
    new = [word for word, tokens in found.items() if not tokens]
    if new:
        tokens = iter(_split(f" {_BETWEEN} ".join(["", *new, ""]))[1:])
        learned = {word: tuple(iter(tokens.__next__, _BETWEEN)) for word in new}
        if len(_remembered) + len(learned) > MAX_REMEMBERED:
            _remembered.clear()
        _remembered.update((word, its) for word, its in learned.items() if len(word) <= MAX_WORD_CHARS)
        found |= learned
    return found


def _is_whole(word: str) -> bool:
    """Whether NLTK leaves a word as it is: it has no signs, and is none of a few. Others may be, too."""
    return word.isalnum() and word.isascii() and word not in _CONTRACTED


def _split_end(words: str) -> tuple[str, ...]:
    return tuple(_split(f"{_BETWEEN} {words}")[1:])


_tokens_of_end = lru_cache(maxsize=2**12)(_split_end)


def _split(text: str) -> list[str]:
    return nltk.tokenize.word_tokenize(text, preserve_line=True)  # type: ignore[no-any-return]


def text_fault(text: str | None, tokens: Sequence[str]) -> Fault | None:
    """Returns why a text says nothing, or None where it has a token."""
    if text is None:
        return fault(Reason.TEXT_NULL, "no text")
    if all(token.strip("\ufffd") == "" for token in tokens):
        if tokens:
            return fault(Reason.TEXT_INVALID, "no valid UTF-8 in the text")
        return fault(Reason.TEXT_EMPTY, "no token in the text")
    return None


def encode(
    texts: Sequence[str | None], vocabulary: Vocabulary, config: TextConfig
) -> tuple[dict[str, NDArray[np.generic]], list[Fault | None]]:
    """Encodes B texts.

    Returns:
        `token_ids` int32 [B, L], L the most tokens of a text (at least 1); with `ngram_buckets` also `ngram_ids`
        int32 [B, G]. And for each text why it cannot be used, if so; its ids are then all padding.
    """
    tokens = [tokenize(text, config) if text else [] for text in texts]
    faults = [text_fault(text, found) for text, found in zip(texts, tokens, strict=True)]
    usable = [[] if bad else found for found, bad in zip(tokens, faults, strict=True)]
    arrays = {"token_ids": _padded([vocabulary.ids(found) for found in usable])}
    if config.ngram_buckets:
        arrays["ngram_ids"] = _padded([_ngram_ids(found, config) for found in usable])
    return arrays, faults


def _ngram_ids(tokens: Sequence[str], config: TextConfig) -> list[int]:
    ids: list[int] = []
    for token in tokens:
        if len(ids) >= config.max_ngrams:
            break
        ids += _word_ngram_ids(token[:MAX_WORD_CHARS], config.ngram_min, config.ngram_max, config.ngram_buckets)
    return ids[: config.max_ngrams]


@lru_cache(maxsize=2**16)
def _word_ngram_ids(word: str, shortest: int, longest: int, buckets: int) -> tuple[int, ...]:
    """Hashes the n-grams of `<word>`: the signs tell its beginning and end (Bojanowski et al. 2017)."""
    marked = f"<{word}>"
    grams = (marked[k : k + n] for n in range(shortest, longest + 1) for k in range(len(marked) - n + 1))
    return tuple(zlib.crc32(gram.encode()) % buckets + 1 for gram in grams)


def _padded(rows: Sequence[Sequence[int]]) -> NDArray[np.generic]:
    width = max((len(row) for row in rows), default=0)
    out = np.zeros((len(rows), max(width, 1)), np.int32)
    for k, row in enumerate(rows):
        out[k, : len(row)] = row
    return out
