"""Texts: tokens as NLTK makes them, in any script, for any string."""

import random

import nltk.tokenize
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmray.config import TextConfig
from mmray.preprocess.text import _CHARACTER, PADDING, UNKNOWN, Vocabulary, encode, tokenize
from mmray.table import Reason

CONFIG = TextConfig()
NGRAMS = TextConfig(ngram_buckets=1000)


@pytest.mark.parametrize(
    "text",
    [
        "The quick brown fox can't jump, it's 3.50 USD (really).",
        'She said "no" -- twice... and left. Why?',
        "e.g. Mr. O'Neill's 50% off! #sale @shop http://x.org/a?b=c&d",
        "  white\tspace\n everywhere  ",
    ],
)
def test_tokens_are_those_of_nltk_in_lower_case(text: str) -> None:
    expected = nltk.tokenize.word_tokenize(" ".join(text.lower().split()), preserve_line=True)
    assert tokenize(text, CONFIG) == expected


SIGNS = "' '' \" `` . ... , : ; ( ) ] } > ! * - -- \u00bb \u201c \u201d \u2019 \u2014 # $ & / \\ 5"
WORDS = "a x s n't 's 'll can cannot gimme more'n wanna 'tis d'ye don't e.g mr \u00e9 \u00df \u7ea2 \u0130 \u017f"
ATOMS = [*SIGNS.split(), *WORDS.split(), "\x85", "\xa0", "\u2028", "\t", " ", " ", " "]


# Words are split apart from one another: that gives what the whole text gives, wherever NLTK looks beyond a word.
def test_tokens_are_those_of_nltk_whatever_signs_stand_together() -> None:
    chance = random.Random(0)
    for _ in range(5000):
        text, most = "".join(chance.choices(ATOMS, k=chance.randrange(31))), chance.choice([3, 64])
        words = _CHARACTER.sub(r" \1 ", text.lower()).split()
        expected = nltk.tokenize.word_tokenize(" ".join(words[: most + 1]), preserve_line=True)[:most]
        assert tokenize(text, TextConfig(max_tokens=most)) == expected, text


# No signs, and yet some of them are two tokens.
@pytest.mark.parametrize(
    "word", ["cannot", "gimme", "gonna", "gotta", "lemme", "wanna", "dunno", "12345", "a1b2", "can"]
)
def test_tokens_of_a_word_without_signs_are_those_of_nltk(word: str) -> None:
    for text in (word, f"{word} dog", f"a {word}", f"a {word}, a {word}."):
        assert tokenize(text, CONFIG) == nltk.tokenize.word_tokenize(text, preserve_line=True)


def test_the_first_tokens_of_a_long_text_are_those_of_the_whole() -> None:
    text = "It's a dog. It's a cat, isn't it? " * 100
    whole = nltk.tokenize.word_tokenize(text.lower(), preserve_line=True)
    assert tokenize(text, TextConfig(max_tokens=37)) == whole[:37]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("红色的汽车", ["红", "色", "的", "汽", "车"]),
        ("赤いcarだ", ["赤", "い", "car", "だ"]),
        ("รถสีแดง", ["ร", "ถ", "สี", "แ", "ด", "ง"]),
        ("빨간 자동차", ["빨간", "자동차"]),
        ("красная машина", ["красная", "машина"]),
        ("سيارة حمراء", ["سيارة", "حمراء"]),
    ],
)
def test_text_in_any_script_gives_useful_tokens(text: str, tokens: list[str]) -> None:
    assert tokenize(text, CONFIG) == tokens


@given(st.text(alphabet=st.characters(), max_size=300))
@settings(deadline=None, max_examples=400)
def test_any_string_gives_tokens_or_a_reason(text: str) -> None:
    arrays, (fault,) = encode([text], Vocabulary(("a", "b")), NGRAMS)
    assert (fault is None) == bool((arrays["token_ids"] != PADDING).any())
    assert arrays["token_ids"].dtype == arrays["ngram_ids"].dtype == np.int32
    assert 1 <= arrays["token_ids"].shape[1] <= NGRAMS.max_tokens
    assert arrays["ngram_ids"].max() <= NGRAMS.ngram_buckets


@pytest.mark.parametrize(
    "text", ["\ud800", "a\x00b", "\u202e\u200b", "a" + "\u0301" * 10_000, "x" * 10**6, "." * 10**6]
)
def test_hostile_strings_are_harmless(text: str) -> None:
    assert len(tokenize(text, CONFIG)) <= CONFIG.max_tokens


def test_what_is_beyond_the_bounds_is_never_looked_at() -> None:
    class Counting(str):
        looked_at = 0

        def __getitem__(self, key: object) -> str:
            part = super().__getitem__(key)  # type: ignore[index]
            Counting.looked_at += len(part)
            return part

    tokenize(Counting("word " * 10**6), CONFIG)
    assert 0 < Counting.looked_at <= CONFIG.max_bytes


def test_absent_texts_have_reasons_and_are_all_padding() -> None:
    arrays, faults = encode([None, "", "  \n", "\ufffd\ufffd", "fine"], Vocabulary(("fine",)), NGRAMS)
    assert [f and f.reason for f in faults] == [
        Reason.TEXT_NULL,
        Reason.TEXT_EMPTY,
        Reason.TEXT_EMPTY,
        Reason.TEXT_INVALID,
        None,
    ]
    assert (arrays["token_ids"][:4] == PADDING).all()
    assert (arrays["ngram_ids"][:4] == PADDING).all()


def test_unknown_words_share_an_id_and_keep_their_ngrams() -> None:
    arrays, _ = encode(["dog zyx", "zyxw dog"], Vocabulary(("dog",)), NGRAMS)
    assert arrays["token_ids"].tolist() == [[2, UNKNOWN], [UNKNOWN, 2]]
    shared = set(arrays["ngram_ids"][0].tolist()) & set(arrays["ngram_ids"][1].tolist())
    assert len(shared) >= 6  # of "dog" all, of "zyx" what it has in common with "zyxw"


def test_a_vocabulary_holds_the_most_frequent_words_in_a_fixed_order() -> None:
    counts = {"b": 3, "a": 3, "c": 5, "d": 1}
    assert Vocabulary.from_counts(counts, TextConfig(vocabulary_size=5)).words == ("c", "a", "b")
    assert Vocabulary.from_counts(dict(reversed(counts.items())), TextConfig(min_count=2)).words == ("c", "a", "b")


def test_a_vocabulary_survives_json_and_a_damaged_one_is_refused() -> None:
    vocabulary = Vocabulary(("naïve", "红", "\ud800"))
    assert Vocabulary.from_json(vocabulary.to_json()) == vocabulary
    for damaged in ('["a", "a"]', '{"a": 1}', "[1]", "nonsense"):
        with pytest.raises(ValueError, match=r"."):
            Vocabulary.from_json(damaged)
