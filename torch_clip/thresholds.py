"""Where the threshold comes from: a constant, or a percentile of the gradient norms seen so far."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_left, insort
from collections import deque
from typing import Any

import torch
from torch import Tensor

from torch_clip.scalars import Number, isfinite, where


class Threshold(ABC):
    """A rule that gives the threshold of a step, and keeps what it must remember for that."""

    @abstractmethod
    def update(self, norm: Number) -> Number:
        """The threshold for a step whose gradient norm is ``norm``."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What the rule remembers, as tensors, numbers and strings."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything."""


class Constant(Threshold):
    """The same threshold at every step.

    Args:
        value: in [0, inf]; inf never clips, 0 zeroes every gradient.
    """

    def __init__(self, value: float) -> None:
        value = float(value)
        if not value >= 0:
            raise ValueError(f"threshold must be in [0, inf], got {value:g}")
        self.value = value

    def update(self, norm: Number) -> float:
        return self.value

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def reset(self) -> None:
        pass

    def __repr__(self) -> str:
        return f"Constant({self.value:g})"


class Percentile(Threshold):
    r"""A percentile of the gradient norms seen so far, the current one included.

    .. math::
        \eta_k(p) = p\text{-th percentile of } n_0, \dots, n_k

    Exact, interpolated linearly between the two nearest norms as :func:`numpy.quantile` does. Norms that are
    not finite, and those that are exactly zero and so say nothing about the scale of a gradient, are not
    recorded; with none recorded the threshold is inf.

    Args:
        percentile: p in (0, 1].
        window: the percentile is of the last ``window`` norms; None means of all.
    """

    def __init__(self, percentile: float, window: int | None = None) -> None:
        percentile = float(percentile)
        if not 0 < percentile <= 1:
            hint = (
                f"; for the {percentile:g}th percentile give {percentile / 100:g}"
                if 1 < percentile <= 100
                else ""
            )
            raise ValueError(f"percentile must be in (0, 1], got {percentile:g}{hint}")
        if window is not None and (window != int(window) or window < 1):
            raise ValueError(f"window must be a whole number from 1, or None for all norms, got {window}")
        self.percentile = percentile
        self.window = None if window is None else int(window)
        self._history: HostHistory | DeviceHistory = HostHistory(self.window)

    def update(self, norm: Number) -> Number:
        self._move_to(norm.device if isinstance(norm, Tensor) else None)
        self._history.append(norm)
        threshold = self._history.quantile(self.percentile)
        return threshold.to(norm.dtype) if isinstance(norm, Tensor) else threshold

    def reserve(self, steps: int, device: torch.device | str) -> None:
        """Make room on ``device`` for ``steps`` norms in all, as a captured CUDA graph cannot grow."""
        self._move_to(torch.device(device))
        self._history.reserve(steps)

    @property
    def history(self) -> Tensor:
        """The recorded norms, float64 on the CPU: in order of time with a window, else sorted."""
        return self._history.to_tensor()

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "window": self.window}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.window is not None and state["window"] is None and len(state["history"]) > self.window:
            raise ValueError(
                f"the state holds all norms, in no order of time; window={self.window} asks for the last ones"
            )
        self.reset()
        self._history.extend(state["history"])

    def reset(self) -> None:
        self._history = HostHistory(self.window)

    def _move_to(self, device: torch.device | None) -> None:
        """Continue the history where the gradients are now: after loading, or when the model was moved."""
        if device == self._history.device:
            return
        norms = self.history
        self._history = HostHistory(self.window) if device is None else DeviceHistory(self.window, device)
        self._history.extend(norms)

    def __repr__(self) -> str:
        window = "" if self.window is None else f", window={self.window}"
        return f"Percentile({self.percentile:g}{window})"


class HostHistory:
    """Sorted norms in 8 bytes each: insertion by bisection, 20 microseconds at a million."""

    device = None

    def __init__(self, window: int | None) -> None:
        self.sorted = array("d")
        self.recent = None if window is None else deque(maxlen=window)

    def append(self, norm: float) -> None:
        if not math.isfinite(norm) or norm == 0.0:
            return
        if self.recent is not None:
            if len(self.recent) == self.recent.maxlen:
                self.sorted.pop(bisect_left(self.sorted, self.recent[0]))
            self.recent.append(norm)
        insort(self.sorted, norm)

    def extend(self, norms: Tensor) -> None:
        values = norms.tolist()
        if self.recent is not None:
            self.recent.extend(values)
            values = self.recent
        self.sorted = array("d", sorted(values))

    def quantile(self, percentile: float) -> float:
        if not self.sorted:
            return math.inf
        position = percentile * (len(self.sorted) - 1)
        below = math.floor(position)
        low, high = self.sorted[below], self.sorted[min(below + 1, len(self.sorted) - 1)]
        return _lerp(low, high, position - below)

    def to_tensor(self) -> Tensor:
        values = self.sorted if self.recent is None else array("d", self.recent)
        # Cloned: a tensor on the array's memory would not notice that the array moves when it grows.
        return (
            torch.frombuffer(values, dtype=torch.float64).clone()
            if values
            else torch.empty(0, dtype=torch.float64)
        )


class DeviceHistory:
    """The same in device tensors, without ever reading one.

    Without a window the sorted norms stand in a buffer between a -inf sentinel and +inf padding; a new norm x
    is inserted by clamping it between each entry and the next, and x = +inf is a no-op. With a window a ring
    is sorted at each step. All tensors keep their place, as a captured CUDA graph needs.
    """

    def __init__(self, window: int | None, device: torch.device) -> None:
        self.device = device
        self.window = window
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self._appended = 0  # upper bound of count that the host knows without asking
        self._buffer = torch.empty(0, dtype=torch.float64, device=device)
        self._write = torch.zeros((), dtype=torch.int64, device=device)
        self.reserve(1024 if window is None else window)

    def reserve(self, capacity: int) -> None:
        """Room for ``capacity`` norms."""
        if self.window is not None:
            capacity = self.window
        size = capacity if self.window is not None else capacity + 2
        if size <= len(self._buffer):
            return
        grown = torch.full((size,), math.inf, dtype=torch.float64, device=self.device)
        grown[: len(self._buffer)] = self._buffer
        if self.window is None:
            grown[:1].fill_(-math.inf)
        self._buffer = grown

    def append(self, norm: Tensor) -> None:
        usable = torch.isfinite(norm) & (norm != 0)
        norm = norm.to(self._buffer.dtype)
        if self.window is None:
            self._appended += 1
            if self._appended > len(self._buffer) - 2:
                self.reserve(2 * self._appended)
            norm = torch.where(usable, norm, math.inf)
            self._buffer[1:] = torch.clamp(norm, self._buffer[:-1], self._buffer[1:])
            self.count += usable
        else:
            at_write = torch.arange(self.window, device=self.device) == self._write
            self._buffer.copy_(torch.where(at_write & usable, norm, self._buffer))
            self._write.copy_((self._write + usable) % self.window)
            self.count.copy_(torch.clamp(self.count + usable, max=self.window))

    def extend(self, norms: Tensor) -> None:
        if not len(norms):
            return
        self.reserve(2 * len(norms))
        norms = norms[-self.window :] if self.window is not None else norms
        start = 0 if self.window is not None else 1
        self._buffer[start : start + len(norms)] = norms.to(self.device)
        self.count.fill_(len(norms))
        self._appended = len(norms)
        if self.window is not None:
            self._write.fill_(len(norms) % self.window)

    def quantile(self, percentile: float) -> Tensor:
        values = self._buffer[1:] if self.window is None else self._buffer.sort().values
        last = (self.count - 1).clamp(min=0)
        position = percentile * last.to(torch.float64)
        below = position.floor()
        index = below.to(torch.int64)
        low = values.gather(0, index.view(1)).view(())
        high = values.gather(0, torch.minimum(index + 1, last).view(1)).view(())
        return _lerp(low, high, position - below)

    def to_tensor(self) -> Tensor:
        count = int(self.count)
        if self.window is None:
            return self._buffer[1 : 1 + count].cpu()
        start = int(self._write) if count == self.window else 0
        return self._buffer.roll(-start)[:count].cpu()


def _lerp(low: Number, high: Number, t: Number) -> Number:
    """Linear interpolation as numpy's, from whichever end is nearer, so that results agree bit for bit."""
    step = high - low
    return where(isfinite(high), where(t < 0.5, low + step * t, high - step * (1 - t)), high)
