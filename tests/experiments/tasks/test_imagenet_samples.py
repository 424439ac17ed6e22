"""Laws of the embedded pictures: balanced, no leak, no shortcut, and each kind looks like itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experiments.tasks.samples import imagenet as samples
from experiments.tasks.samples.imagenet import KINDS, SIZE, generate


@pytest.fixture(scope="module")
def splits():
    return generate(8_000, 1_000, seed=0)  # as many as the task asks for


def test_shapes_types_and_balance(splits):
    for (pictures, labels), number in zip(splits, (8_000, 1_000), strict=True):
        assert pictures.shape == (number, SIZE, SIZE, 3)
        assert pictures.dtype == np.uint8
        assert np.bincount(labels).tolist() == [number / len(KINDS)] * len(KINDS)


def test_any_number_is_drawn():
    (train, labels), (val, _) = generate(23, 11)
    assert (len(train), len(val)) == (23, 11)
    assert set(np.bincount(labels)) == {2, 3}


def test_no_picture_is_drawn_twice(splits):
    drawn = [picture.tobytes() for pictures, _ in splits for picture in pictures]
    assert len(set(drawn)) == 9_000


def test_seed_decides_everything():
    first, again = generate(200, 50, seed=0), generate(200, 50, seed=0)
    for ours, theirs in zip(first, again, strict=True):
        assert all(np.array_equal(this, that) for this, that in zip(ours, theirs, strict=True))
    assert not np.array_equal(first[0][0], generate(200, 50, seed=1)[0][0])


def test_colours_and_single_pixels_are_no_shortcut(splits):
    """The best linear rule on pixels, colours and their spread is far below what the mini model reaches."""

    def features(pictures):
        values = torch.from_numpy(pictures).float() / 255
        coarse = torch.nn.functional.avg_pool2d(values.permute(0, 3, 1, 2), 4).flatten(1)
        flat = values.flatten(1, 2)
        return torch.cat([coarse, flat.mean(1), flat.std(1), torch.ones(len(flat), 1)], dim=1)

    (train, train_labels), (val, val_labels) = splits
    targets = torch.nn.functional.one_hot(torch.from_numpy(train_labels)).float()
    weights = torch.linalg.lstsq(features(train), targets).solution
    predicted = (features(val) @ weights).argmax(1).numpy()
    assert (predicted == val_labels).mean() < 0.3


def test_a_kind_is_drawn_where_it_is_told_from_the_ground(monkeypatch):
    """Without noise, a disc takes the share of a picture that its radius says, and is the brighter part."""
    monkeypatch.setattr(samples, "NOISE", 0.0)
    monkeypatch.setattr(samples, "LIGHT", 0.0)
    discs = samples._draw(np.random.default_rng(0), KINDS["disc"], 200).astype(float).sum(3)
    darkest, brightest = discs.min((1, 2)), discs.max((1, 2))
    bright = discs > ((darkest + brightest) / 2)[:, None, None]
    shares = bright.mean((1, 2))
    assert (brightest - darkest > 20).all()
    # Radius 7 at least, with the centre 10 pixels or more from every edge; 12 at most.
    assert shares.min() > 0.9 * np.pi * 7**2 / SIZE**2
    assert shares.max() < 1.1 * np.pi * 12**2 / SIZE**2
