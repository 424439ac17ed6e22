"""Sentences of a small English grammar, and the same sentences broken in one place.

A sentence is acceptable if and only if the categories of its words form one of the finitely many patterns
that ``RULES`` derive up to ``LONGEST`` words. Every word has one category, so membership is one look-up, and
a mistake that happens to give another good sentence is recognised and drawn again.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

WORDS = {
    "NAME": "mary john peter susan",
    "HE": "he she",
    "THEY": "they we",
    "HIM": "him them us",
    "THE": "the my",
    "A": "a every this",
    "THESE": "these several both",
    "ADJ": "big small tall young happy quiet",
    "CAT": "cat dog bird horse boy girl teacher farmer",
    "CATS": "cats dogs birds horses boys girls teachers farmers",
    "SLEEPS": "sleeps smiles waits sings",
    "SLEEP": "sleep smile wait sing",
    "SEES": "sees likes helps follows knows",
    "SEE": "see like help follow know",
    "SAYS": "says thinks",
    "SAY": "say think",
    "IS": "is",
    "ARE": "are",
    "WILL": "will can must",
    "OFTEN": "often never always",
    "NEAR": "near behind beside",
    "WHO": "who",
    "THAT": "that",
}
WORDS_OF = {category: words.split() for category, words in WORDS.items()}
CATEGORY_OF = {word: category for category, words in WORDS_OF.items() for word in words}

# Lower-case suffixes carry the number: a subject's phrase and its verb agree across whatever stands between.
RULES = {
    "S": ["SUBJECT_one VERB_one", "SUBJECT_many VERB_many"],
    "SUBJECT_one": ["HE", "NOUN_one"],
    "SUBJECT_many": ["THEY", "NOUN_many"],
    "OBJECT": ["HIM", "NOUN_one", "NOUN_many"],
    "NOUN_one": ["NAME", "THE KIND_one", "A KIND_one"],
    "NOUN_many": ["THE KIND_many", "THESE KIND_many"],
    "KIND_one": ["CAT", "ADJ CAT", "CAT NEAR OBJECT", "CAT WHO VERB_one"],
    "KIND_many": ["CATS", "ADJ CATS", "CATS NEAR OBJECT", "CATS WHO VERB_many"],
    "VERB_one": ["ACT_one", "OFTEN ACT_one", "WILL ACT_many", "IS ADJ", "SAYS THAT S"],
    "VERB_many": ["ACT_many", "OFTEN ACT_many", "WILL ACT_many", "ARE ADJ", "SAY THAT S"],
    "ACT_one": ["SLEEPS", "SEES OBJECT"],
    "ACT_many": ["SLEEP", "SEE OBJECT"],
}
SHORTEST, LONGEST = 4, 7

# What a word is mistaken for: the other number, case, or kind of verb.
CONFUSED = {
    "HE": ["THEY", "HIM"],
    "THEY": ["HE", "HIM"],
    "HIM": ["HE", "THEY"],
    "THE": ["NAME"],
    "A": ["THESE"],
    "THESE": ["A"],
    "CAT": ["CATS"],
    "CATS": ["CAT"],
    "SLEEPS": ["SLEEP", "SEES"],
    "SLEEP": ["SLEEPS", "SEE"],
    "SEES": ["SEE", "SLEEPS"],
    "SEE": ["SEES", "SLEEP"],
    "SAYS": ["SAY", "SEES"],
    "SAY": ["SAYS", "SEE"],
    "IS": ["ARE", "WILL"],
    "ARE": ["IS", "WILL"],
    "WILL": ["IS", "ARE"],
    "WHO": ["THAT"],
    "THAT": ["WHO"],
}
# How many words a mistake adds. All four are equally likely.
MISTAKES = {"confuse": 0, "swap": 0, "drop": -1, "insert": 1}

Pattern = tuple[str, ...]


class Sentence(NamedTuple):
    """Words joined by blanks, and whether the grammar derives them."""

    text: str
    label: int


@cache
def patterns(num_words: int) -> tuple[Pattern, ...]:
    """All sequences of ``num_words`` categories that the grammar derives, in a fixed order."""
    return tuple(sorted(_derive(("S",), num_words)))


@cache
def _derive(symbols: Pattern, num_words: int) -> frozenset[Pattern]:
    """Sequences of ``num_words`` categories derived from ``symbols`` one after the other."""
    if not symbols:
        return frozenset([()] if num_words == 0 else [])
    if len(symbols) > num_words:  # every symbol derives a word or more
        return frozenset()
    head, *tail = symbols
    if head not in RULES:
        return frozenset((head, *rest) for rest in _derive(tuple(tail), num_words - 1))
    return frozenset(
        first + rest
        for head_words in range(1, num_words - len(tail) + 1)
        for rule in RULES[head]
        for first in _derive(tuple(rule.split()), head_words)
        for rest in _derive(tuple(tail), num_words - head_words)
    )


@cache
def _pattern_set(num_words: int) -> frozenset[Pattern]:
    return frozenset(patterns(num_words))


def is_acceptable(words: Sequence[str]) -> bool:
    """Whether the grammar derives the sentence, in at most ``LONGEST`` words.

    Example:
        >>> is_acceptable("the cats near mary sleep".split())
        True
        >>> is_acceptable("the cats near mary sleeps".split())
        False
    """
    pattern = tuple(CATEGORY_OF.get(word, "") for word in words)
    return len(pattern) <= LONGEST and pattern in _pattern_set(len(pattern))


def generate(num_train: int, num_val: int, seed: int = 0) -> tuple[list[Sentence], list[Sentence]]:
    """Draw a training and a validation split that share no sentence, each half acceptable, half broken.

    Both classes have the same distribution of lengths, so that length alone tells nothing.

    Args:
        num_train: sentences in the training split.
        num_val: sentences in the validation split.
        seed: of the draw.
    """
    rng = random.Random(seed)
    train: list[Sentence] = []
    val: list[Sentence] = []
    for label, draw in ((1, _acceptable), (0, _broken)):
        # Odd sizes: the extra sentence of each split is an acceptable one.
        in_train, in_val = (num_train + label) // 2, (num_val + label) // 2
        texts: dict[str, None] = {}  # a set that keeps the order of drawing
        while len(texts) < in_train + in_val:
            # A repeated sentence adds nothing and the same length is tried again.
            texts[" ".join(draw(rng, SHORTEST + len(texts) % (LONGEST - SHORTEST + 1)))] = None
        # Short sentences are used up as the draw goes on, so which split gets a sentence is drawn apart.
        sentences = [Sentence(text, label) for text in texts]
        rng.shuffle(sentences)
        train += sentences[:in_train]
        val += sentences[in_train:]
    return train, val


def _fill(rng: random.Random, pattern: Sequence[str]) -> list[str]:
    return [rng.choice(WORDS_OF[category]) for category in pattern]


def _acceptable(rng: random.Random, num_words: int) -> list[str]:
    return _fill(rng, rng.choice(patterns(num_words)))


def _broken(rng: random.Random, num_words: int) -> list[str]:
    """``num_words`` words that the grammar does not derive, one mistake away from a sentence that it does."""
    while True:
        mistake = rng.choice(tuple(MISTAKES))
        pattern = list(rng.choice(patterns(num_words - MISTAKES[mistake])))
        place = rng.randrange(1 if mistake == "swap" else 0, len(pattern))
        if mistake == "confuse":
            pattern[place] = rng.choice(CONFUSED.get(pattern[place], [pattern[place]]))
        elif mistake == "swap":
            pattern[place - 1], pattern[place] = pattern[place], pattern[place - 1]
        elif mistake == "drop":
            del pattern[place]
        else:
            pattern.insert(place, rng.choice(tuple(WORDS_OF)))
        if tuple(pattern) not in _pattern_set(num_words):
            return _fill(rng, pattern)
