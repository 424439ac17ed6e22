"""Pictures of ten kinds: six shapes and four patterns, in any place, size, turn and colour.

Colours, light and noise are drawn alike for all kinds, so that only form tells them apart.
"""

from __future__ import annotations

import numpy as np

from experiments.tasks.samples import shapes

SIZE = 32
PLACES = np.arange(SIZE, dtype=np.float32)
NOISE = 0.15  # standard deviation; colours lie in [0, 1]
LIGHT = 0.15  # change of all colours over one radius, at most
AT_ONCE = 100  # pictures whose arrays fit into the cache of a processor

KINDS: dict[str, shapes.Field] = {
    "disc": shapes.disc,
    "ring": shapes.ring,
    "square": shapes.square,
    "triangle": shapes.triangle,
    "cross": shapes.cross,
    "flower": shapes.flower,
    # Patterns fill the picture; their waves are as long as a shape's radius.
    "stripes": lambda u, v: np.sin(2 * np.pi * u) / 6,
    "checks": lambda u, v: np.sin(np.pi * u) * np.sin(np.pi * v) / 3,
    "dots": lambda u, v: (np.cos(2 * np.pi * u) + np.cos(2 * np.pi * v) - 0.8) / 6,
    "ripples": lambda u, v: np.cos(2 * np.pi * np.hypot(u, v)) / 6,
}


Split = tuple[np.ndarray, np.ndarray]
"""Pictures, uint8 (number, SIZE, SIZE, 3), and labels, int64 (number,): places in ``KINDS``."""


def generate(num_train: int, num_val: int, seed: int = 0) -> tuple[Split, Split]:
    """Draw a training and a validation split, in each as many pictures of every kind, give or take one.

    Args:
        num_train: pictures in the training split.
        num_val: pictures in the validation split.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    return _split(rng, num_train), _split(rng, num_val)


def _split(rng: np.random.Generator, number: int) -> Split:
    labels = rng.permutation(np.arange(number) % len(KINDS))
    pictures = np.empty((number, SIZE, SIZE, 3), np.uint8)
    for label, field in enumerate(KINDS.values()):
        places = np.flatnonzero(labels == label)
        for start in range(0, len(places), AT_ONCE):
            chosen = places[start : start + AT_ONCE]
            pictures[chosen] = _draw(rng, field, len(chosen))
    return pictures, labels


def _draw(rng: np.random.Generator, field: shapes.Field, number: int) -> np.ndarray:
    """``number`` pictures of one kind."""

    def uniform(low: float, high: float, channels: int = 1) -> np.ndarray:
        return rng.uniform(low, high, (number, 1, 1, channels)).astype(np.float32)

    radius = uniform(7, 12)
    y = (PLACES[:, None, None] - uniform(10, 22)) / radius
    x = (PLACES[:, None] - uniform(10, 22)) / radius
    angle = uniform(0, 2 * np.pi)
    inside = field(np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x)
    inside = np.clip(inside * radius + 0.5, 0, 1)  # an edge one pixel wide
    ground = uniform(0, 0.5, 3)
    contrast = uniform(0.2, 1, 3)  # never darker: telling apart either sign takes a longer training
    contrast *= uniform(0.35, 0.9) / np.linalg.norm(contrast, axis=-1, keepdims=True)
    light = uniform(-LIGHT, LIGHT) * x + uniform(-LIGHT, LIGHT) * y
    picture = rng.standard_normal((number, SIZE, SIZE, 3), np.float32) * NOISE
    picture += ground + light
    picture += contrast * inside
    return (picture.clip(0, 1) * 255).astype(np.uint8)
