"""Outlines as fields: above 0 inside, falling to 0 at the edge with a slope of about 1 a unit of length.

``u`` and ``v`` are coordinates in units of a shape's radius, its centre at (0, 0). A field takes and gives
arrays of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Field = Callable[[np.ndarray, np.ndarray], np.ndarray]


def disc(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A filled circle."""
    return 1 - np.hypot(u, v)


def ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A circle with a hole of half its radius."""
    return 0.25 - abs(np.hypot(u, v) - 0.75)


def square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A square of the disc's area."""
    return 0.89 - np.maximum(abs(u), abs(v))


def triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A triangle with three equal sides."""
    sides = (2 * np.pi / 3 * corner for corner in range(3))
    return 0.65 - np.maximum.reduce([np.cos(angle) * u + np.sin(angle) * v for angle in sides])


def cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Two bars at a right angle."""
    u, v = abs(u), abs(v)
    return np.minimum(np.maximum(0.33 - u, 0.33 - v), 1 - np.maximum(u, v))


def flower(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Five petals."""
    return 0.65 + 0.4 * np.cos(5 * np.arctan2(v, u)) - np.hypot(u, v)
