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


def tensor(x: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``x`` as a tensor; the host does not wait, as it would to copy a Python number to a device."""
    if isinstance(x, Tensor):
        return x.to(device, dtype, non_blocking=True)
    return torch.full((), x, dtype=dtype, device=device)


def quotient(x: Number, y: Number) -> Number:
    """``x / y`` of numbers that are not negative; 0 where x is 0, whatever y, and inf where only y is 0."""
    if isinstance(x, Tensor):
        return torch.where(x == 0, 0.0, x / y)
    if isinstance(y, Tensor):
        return quotient(tensor(x, y.dtype, y.device), y)
    return 0.0 if x == 0 else x / y if y else math.inf


def sqrt(x: Number) -> Number:
    return x.sqrt() if isinstance(x, Tensor) else math.sqrt(x)


def minimum(x: Number, y: float | Tensor) -> Number:
    """The smaller of ``x`` and ``y``; ``y`` where ``x`` is NaN."""
    return where(x < y, x, y)


def opposite(truth: bool | Tensor) -> bool | Tensor:
    return ~truth if isinstance(truth, Tensor) else not truth
