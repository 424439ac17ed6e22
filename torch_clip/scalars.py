"""Arithmetic that is the same for Python numbers and for device tensors.

On a CPU a norm is read into a Python float, because reading costs nothing there and an unclipped step can
then be the plain step. On any other device reading would make the host wait, so the same formulas run on
0-dim tensors. These few functions are all that differs between the two.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Number = float | Tensor
"""A Python float, or a tensor on the gradients' device that nobody has waited for."""


def on_host(tensor: Tensor) -> bool:
    """Whether reading ``tensor`` from Python is free."""
    return tensor.device.type == "cpu"


def number(tensor: Tensor) -> Number:
    """``tensor``, shape (), as a Python float where that is free."""
    return tensor.item() if on_host(tensor) else tensor


def isfinite(x: Number) -> bool | Tensor:
    return torch.isfinite(x) if isinstance(x, Tensor) else math.isfinite(x)


def where(condition: bool | Tensor, x: Number, y: Number) -> Number:
    return torch.where(condition, x, y) if isinstance(condition, Tensor) else x if condition else y


def clip_coef(norm: Number, threshold: Number) -> Number:
    """``threshold / max(norm, threshold)``: exactly 1 up to the threshold, at 0 / 0 and at inf / inf too.

    A NaN norm gives NaN.
    """
    if isinstance(norm, Tensor):
        return torch.where(norm <= threshold, 1.0, threshold / norm)
    return 1.0 if norm <= threshold else threshold / norm
