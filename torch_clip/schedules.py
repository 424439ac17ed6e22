"""Settings that follow the step: a threshold, a percentile or a beta may be one of these.

The step is the clipping's own count, skipped steps included; it is in the clipping's state, so that a resumed
run goes on where it was.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from torch_clip.scalars import Number

Setting = float | Callable[[int | Tensor], Number]
"""A number, or a function of the step: of a Python int on a CPU, of an int64 tensor, shape (), elsewhere."""


class Schedule(ABC):
    """A number that goes from ``start`` to ``end`` in ``steps`` steps and stays there.

    Args:
        start: at step 0.
        end: from step ``steps`` on.
        steps: a whole number from 1.
    """

    def __init__(self, start: float, end: float, steps: int) -> None:
        self.start, self.end, self.steps = float(start), float(end), whole(steps, "steps")
        if not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise ValueError(f"a schedule goes between finite numbers, got {start} and {end}")

    def __call__(self, step: int | Tensor) -> Number:
        """The value at ``step``, counted from 0."""
        if isinstance(step, Tensor):
            way = torch.clamp(step.double() / self.steps, max=1.0)
        else:
            way = min(step / self.steps, 1.0)
        left = self.left(way)
        value = self.start * left + self.end * (1.0 - left)
        low, high = sorted((self.start, self.end))  # which rounding must not pass
        return torch.clamp(value, low, high) if isinstance(value, Tensor) else min(max(value, low), high)

    @abstractmethod
    def left(self, way: Number) -> Number:
        """What is left of the difference after the share ``way`` of the steps: 1 at 0, 0 at 1."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.start:g}, {self.end:g}, steps={self.steps})"


class Constant(Schedule):
    """The same number at every step.

    Args:
        value: the number.
    """

    def __init__(self, value: float) -> None:
        super().__init__(value, value, 1)

    def left(self, way: Number) -> Number:
        return 0.0 * way

    def __repr__(self) -> str:
        return f"Constant({self.start:g})"


class Linear(Schedule):
    r"""A straight line.

    .. math::
        v_k = v_0 + (v_K - v_0) \, k / K, \qquad v_k = v_K \text{ from step } K \text{ on}

    Args:
        start: :math:`v_0`, at step 0.
        end: :math:`v_K`, from step ``steps`` on.
        steps: K, a whole number from 1.

    Example:
        >>> [round(Linear(10.0, 1.0, steps=3)(step), 3) for step in (0, 1, 3, 100)]
        [10.0, 7.0, 1.0, 1.0]
    """

    def left(self, way: Number) -> Number:
        return 1.0 - way


class Cosine(Schedule):
    r"""Half a cosine: slow at both ends.

    .. math::
        v_k = v_K + (v_0 - v_K) \, \frac{1 + \cos(\pi k / K)}{2}, \qquad
        v_k = v_K \text{ from step } K \text{ on}

    Args:
        start: :math:`v_0`, at step 0.
        end: :math:`v_K`, from step ``steps`` on.
        steps: K, a whole number from 1.

    Example:
        >>> [round(Cosine(10.0, 0.0, steps=4)(step), 3) for step in (0, 1, 2, 4, 9)]
        [10.0, 8.536, 5.0, 0.0, 0.0]
    """

    def left(self, way: Number) -> Number:
        cos = torch.cos(math.pi * way) if isinstance(way, Tensor) else math.cos(math.pi * way)
        return (1.0 + cos) / 2


def setting(value: Setting, name: str, ok: Callable[[float], bool], allowed: str) -> Setting:
    """``value`` as a float, or the schedule that it is, if ``ok`` takes it; a schedule is asked at its ends.

    Raises:
        ValueError: names the setting, the allowed range and the value.
    """
    if isinstance(value, Schedule):
        for end in (value.start, value.end):
            if not ok(end):
                raise ValueError(f"{name} must be {allowed}, got {value}")
        return value
    return value if callable(value) else fixed(value, name, ok, allowed)


def fixed(value: float, name: str, ok: Callable[[float], bool], allowed: str) -> float:
    """``value`` as a float, if ``ok`` takes it: a setting that does not follow the step."""
    if callable(value):
        raise ValueError(f"{name} must be a number {allowed}, and follows no schedule, got {value}")
    value = float(value)
    if not ok(value):
        raise ValueError(f"{name} must be {allowed}, got {value:g}")
    return value


def whole(value: float, name: str, least: int = 1) -> int:
    """``value`` as an int; a ``ValueError`` names a setting that is no whole number from ``least``."""
    if not math.isfinite(value) or value != int(value) or value < least:
        raise ValueError(f"{name} must be a whole number from {least}, got {value}")
    return int(value)


def at(value: Setting, step: int | Tensor) -> Number:
    """The value of a setting at ``step``."""
    return value(step) if callable(value) else value


def shown(value: Setting) -> str:
    return repr(value) if callable(value) else f"{value:g}"
