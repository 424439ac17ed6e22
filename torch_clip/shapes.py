"""How the clip coefficient follows from norm and threshold: hard, smooth, or by normalising.

Each is a function of the norm and the threshold of a unit, Python floats or tensors of any shape. All of them
are 1 at an infinite threshold, and 1 for a zero gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from torch_clip.scalars import Number, quotient, where

_LARGEST = 3e38  # of float32

Shape = Callable[[Number, Number], Number]


def hard(norm: Number, threshold: Number) -> Number:
    """``threshold / max(norm, threshold)``: exactly 1 up to the threshold, at 0 / 0 and at inf / inf too.

    A NaN norm gives NaN.
    """
    if isinstance(norm, Tensor):
        return torch.where(norm <= threshold, 1.0, threshold / norm)
    return 1.0 if norm <= threshold else threshold / norm


def smooth(norm: Number, threshold: Number) -> Number:
    """``threshold / (threshold + norm)``: what comes out grows, and stays below the threshold."""
    return 1.0 / (1.0 + quotient(norm, threshold))


def smooth_sqrt(norm: Number, threshold: Number) -> Number:
    """``threshold / sqrt(threshold^2 + norm^2)``: as ``smooth``, nearer to 1 below the threshold."""
    ratio = quotient(norm, threshold)
    one = torch.ones_like(ratio) if isinstance(ratio, Tensor) else 1.0
    # hypot, since the square of a large ratio overflows.
    return 1.0 / (torch.hypot(one, ratio) if isinstance(ratio, Tensor) else math.hypot(one, ratio))


def normalized(norm: Number, threshold: Number) -> Number:
    """``threshold / norm``: every gradient comes out as long as the threshold; a short one is lengthened.

    1 at an infinite threshold too; what is too short for float32 to lengthen so far is lengthened less.
    """
    coef = where(norm == 0, 1.0, quotient(threshold, norm))
    coef = where(coef > _LARGEST, _LARGEST, coef)
    endless = threshold == math.inf
    if isinstance(endless, Tensor):
        return torch.where(endless, 1.0, coef)
    return coef * 0.0 + 1.0 if endless else coef  # shaped as the norm, and NaN where that is
