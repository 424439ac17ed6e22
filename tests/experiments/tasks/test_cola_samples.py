"""Laws of the embedded sentences: right labels, no leak, no shortcut."""

from collections import Counter

import pytest
import torch

from experiments.tasks.metrics import confusion_matrix, matthews_corrcoef
from experiments.tasks.samples.cola import (
    CATEGORY_OF,
    LONGEST,
    RULES,
    SHORTEST,
    WORDS_OF,
    generate,
    is_acceptable,
)


@pytest.fixture(scope="module")
def splits():
    return generate(6_000, 1_000, seed=0)


def derives(symbols: list[str], categories: list[str]) -> bool:
    """Whether the grammar derives the categories: by parsing, where the generator looks patterns up."""
    if not symbols or not categories:
        return symbols == categories
    if len(symbols) > len(categories):
        return False
    head, *tail = symbols
    if head in RULES:
        return any(derives(rule.split() + tail, categories) for rule in RULES[head])
    return head == categories[0] and derives(tail, categories[1:])


def test_every_word_has_one_category():
    assert len(CATEGORY_OF) == sum(len(words) for words in WORDS_OF.values())
    assert 70 <= len(CATEGORY_OF) <= 80


@pytest.mark.parametrize(
    ("sentence", "acceptable"),
    [
        ("the cats near mary sleep", True),
        ("the cats near mary sleeps", False),  # agreement across the modifier
        ("she thinks that they sleep", True),
        ("she thinks that they sleeps", False),
        ("a dog who sees us is happy", True),
        ("a dogs who sees us is happy", False),
        ("every small boy will sing", True),
        ("every small boy will sings", False),
        ("him likes the tall teacher", False),
        ("the likes him tall teacher", False),
        ("dog likes the tall teacher", False),
        ("the cats near zebras sleep", False),  # no word of the grammar
        ("the cat who likes the cat who likes the cat sleeps", False),  # longer than any sentence drawn
    ],
)
def test_recogniser_by_example(sentence, acceptable):
    assert is_acceptable(sentence.split()) == acceptable


def test_labels_are_right_by_an_independent_parser(splits):
    for text, label in splits[0][::7] + splits[1]:
        categories = [CATEGORY_OF[word] for word in text.split()]
        assert derives(["S"], categories) == bool(label), text


def test_no_sentence_is_drawn_twice(splits):
    train, val = ({text for text, _ in split} for split in splits)
    assert len(train) == 6_000
    assert len(val) == 1_000
    assert not train & val


def test_classes_are_balanced_at_every_length(splits):
    for split in splits:
        assert sum(label for _, label in split) * 2 == len(split)
    by_length = Counter((len(text.split()), label) for text, label in splits[0] + splits[1])
    expected = 7_000 / 2 / (LONGEST - SHORTEST + 1)
    assert by_length == {
        (length, label): expected for length in range(SHORTEST, LONGEST + 1) for label in (0, 1)
    }


def test_odd_sizes_are_kept():
    train, val = generate(7, 3)
    assert (len(train), len(val)) == (7, 3)


def test_counting_words_is_no_shortcut(splits):
    """The best linear rule on word counts stays far below what a model that reads the order reaches."""
    words = sorted(CATEGORY_OF)

    def counts(split):
        return torch.tensor([[1.0, *(text.split().count(word) for word in words)] for text, _ in split])

    train_labels, val_labels = (torch.tensor([label for _, label in split]) for split in splits)
    weights = torch.linalg.lstsq(counts(splits[0]), train_labels[:, None] * 2.0 - 1, driver="gelsd").solution
    predictions = (counts(splits[1]) @ weights > 0).long().squeeze(1)
    assert matthews_corrcoef(confusion_matrix(predictions, val_labels, 2)) < 0.25


def test_seed_decides_everything(splits):
    assert generate(6_000, 1_000, seed=0) == splits
    assert generate(6_000, 1_000, seed=1) != splits
