"""Pictures of shapes on a grey ground, with masks that say what each pixel is; outlines are void, as in VOC.

Every kind has a colour of its own that others come close to: colour tells something, and form the rest.
"""

from __future__ import annotations

import numpy as np

from experiments.tasks.samples import shapes

SIZE = 64
VOID = 255
OUTLINE = 1.5  # pixels to either side of an edge that are void
MOST = 3  # shapes in a picture
NOISE = 0.1  # standard deviation; colours lie in [0, 1]
SPREAD = 0.15  # standard deviation of a kind's colour
PLACES = np.arange(SIZE, dtype=np.float32)
AT_ONCE = 50  # pictures whose arrays fit into the cache of a processor

KINDS = {
    "disc": (shapes.disc, (0.8, 0.35, 0.3)),
    "square": (shapes.square, (0.35, 0.75, 0.3)),
    "triangle": (shapes.triangle, (0.3, 0.35, 0.8)),
    "cross": (shapes.cross, (0.7, 0.7, 0.35)),
}
CLASSES = ("background", *KINDS)

Split = tuple[np.ndarray, np.ndarray]
"""Pictures, uint8 (number, SIZE, SIZE, 3), and their masks, uint8 (number, SIZE, SIZE).

A mask holds places in ``CLASSES``, or VOID.
"""


def generate(num_train: int, num_val: int, seed: int = 0) -> tuple[Split, Split]:
    """Draw a training and a validation split.

    Args:
        num_train: pictures in the training split.
        num_val: pictures in the validation split.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    return _split(rng, num_train), _split(rng, num_val)


def _split(rng: np.random.Generator, number: int) -> Split:
    starts = range(0, number, AT_ONCE)
    pictures, masks = zip(*(_draw(rng, min(AT_ONCE, number - start)) for start in starts), strict=True)
    return np.concatenate(pictures), np.concatenate(masks)


def _draw(rng: np.random.Generator, number: int) -> Split:
    """``number`` pictures with one to three shapes, the later ones in front."""
    picture = _ground(rng, number)
    mask = np.zeros((number, SIZE, SIZE), np.uint8)
    count = rng.integers(1, MOST + 1, number)
    for place in range(MOST):
        kinds = rng.integers(len(KINDS), size=number)
        for kind, (field, colour) in enumerate(KINDS.values()):
            chosen = np.flatnonzero((kinds == kind) & (place < count))
            distance = _distance(rng, field, len(chosen))
            colours = colour + SPREAD * rng.standard_normal((len(chosen), 1, 1, 3))
            inside = np.clip(distance + 0.5, 0, 1)[..., None]
            picture[chosen] += inside * (colours.astype(np.float32) - picture[chosen])
            mask[chosen] = np.where(distance > 0, kind + 1, mask[chosen])
            mask[chosen] = np.where(abs(distance) <= OUTLINE, VOID, mask[chosen])
    picture += NOISE * rng.standard_normal(picture.shape, np.float32)
    return (picture.clip(0, 1) * 255).astype(np.uint8), mask


def _ground(rng: np.random.Generator, number: int) -> np.ndarray:
    """Waves of any direction between two colours that are nearly grey, floats (number, SIZE, SIZE, 3)."""
    greys = rng.uniform(0.2, 0.8, (2, number, 1, 1, 1)) + rng.uniform(-0.15, 0.15, (2, number, 1, 1, 3))
    first, second = greys.astype(np.float32)
    angle, length, phase = _uniform(rng, number, (0, 2 * np.pi), (6, 40), (0, 2 * np.pi))
    along = np.cos(angle) * PLACES + np.sin(angle) * PLACES[:, None]
    wave = 0.5 + 0.5 * np.sin(2 * np.pi * along / length + phase)[..., None]
    return first + (second - first) * wave / 2


def _distance(rng: np.random.Generator, field: shapes.Field, number: int) -> np.ndarray:
    """About the distance in pixels to the edge of a shape in any place, size and turn; above 0 inside."""
    x, y, radius, angle = _uniform(rng, number, (8, 56), (8, 56), (10, 22), (0, 2 * np.pi))
    u, v = (PLACES - x) / radius, (PLACES[:, None] - y) / radius
    return radius * field(np.cos(angle) * u + np.sin(angle) * v, np.cos(angle) * v - np.sin(angle) * u)


def _uniform(rng: np.random.Generator, number: int, *ranges: tuple[float, float]) -> np.ndarray:
    """For each range (low, high), floats (number, 1, 1)."""
    low, high = np.array(ranges).T[..., None]
    return rng.uniform(low, high, (len(ranges), number)).astype(np.float32)[..., None, None]
