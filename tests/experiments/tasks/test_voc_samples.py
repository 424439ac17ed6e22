"""Laws of the embedded shapes: void outlines, every class, no leak, and colour alone is no answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experiments.tasks.metrics import confusion_matrix, mean_iou
from experiments.tasks.samples.voc import CLASSES, KINDS, SIZE, VOID, generate


@pytest.fixture(scope="module")
def splits():
    return generate(2_000, 300, seed=0)  # as many as the task asks for


def test_shapes_types_and_values(splits):
    for (pictures, masks), number in zip(splits, (2_000, 300), strict=True):
        assert pictures.shape == (number, SIZE, SIZE, 3)
        assert masks.shape == (number, SIZE, SIZE)
        assert pictures.dtype == masks.dtype == np.uint8
        assert np.unique(masks).tolist() == [*range(len(CLASSES)), VOID]


def test_any_number_is_drawn():
    (train, _), (val, _) = generate(53, 1)
    assert (len(train), len(val)) == (53, 1)


def test_classes_are_void_and_background_in_the_proportions_of_voc(splits):
    masks = splits[0][1]
    assert 0.05 < (masks == VOID).mean() < 0.15
    labelled = masks[masks != VOID]
    shares = np.bincount(labelled, minlength=len(CLASSES)) / len(labelled)
    assert 0.7 < shares[0] < 0.85
    assert (shares[1:] > 0.02).all()


def test_two_classes_never_touch(splits):
    masks = splits[0][1].astype(int)
    for a, b in ((masks[:, 1:], masks[:, :-1]), (masks[:, :, 1:], masks[:, :, :-1])):
        assert not ((a != b) & (a != VOID) & (b != VOID)).any()


def test_no_picture_is_drawn_twice(splits):
    drawn = [picture.tobytes() for pictures, _ in splits for picture in pictures]
    assert len(set(drawn)) == 2_300


def test_seed_decides_everything():
    first, again = generate(60, 10, seed=0), generate(60, 10, seed=0)
    for ours, theirs in zip(first, again, strict=True):
        assert all(np.array_equal(this, that) for this, that in zip(ours, theirs, strict=True))
    assert not np.array_equal(first[0][0], generate(60, 10, seed=1)[0][0])


def test_colour_alone_is_no_answer(splits):
    """Calling each pixel by the likeliest class of its colour is far below what the mini model reaches."""
    (train, train_masks), (val, val_masks) = ((pictures[:400], masks[:400]) for pictures, masks in splits)

    def bins(pictures):
        quantised = pictures.astype(int) // 16
        return quantised[..., 0] * 256 + quantised[..., 1] * 16 + quantised[..., 2]

    counts = np.zeros((16**3, len(CLASSES)))
    known = train_masks != VOID
    np.add.at(counts, (bins(train)[known], train_masks[known]), 1)
    predicted = torch.from_numpy(counts.argmax(1)[bins(val)])
    score = mean_iou(confusion_matrix(predicted, torch.from_numpy(val_masks), len(CLASSES), VOID))
    assert 0.2 < score < 0.6


def test_a_shape_is_of_its_colour(splits):
    """Pixels of a class are on average nearest to that class's own colour."""
    pictures, masks = splits[0]
    colours = np.array([colour for _, colour in KINDS.values()])
    for kind in range(len(KINDS)):
        mean = pictures[masks == kind + 1].mean(0) / 255
        assert np.linalg.norm(colours - mean, axis=1).argmin() == kind
