"""What rules remember: norms seen so far, and some numbers of each unit; on the host or on a device."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, insort
from collections import deque
from typing import Any

import torch
from torch import Tensor

from torch_clip.scalars import Number, isfinite, tensor, where


class HostHistory:
    """Sorted norms in 8 bytes each: insertion by bisection, 20 microseconds at a million."""

    device = None
    units = ()

    def __init__(self, window: int | None, zeros: bool = False) -> None:
        self.zeros = zeros  # whether a zero says something
        self.sorted = array("d")
        self.recent = None if window is None else deque(maxlen=window)

    def append(self, norm: float, finite: bool) -> None:
        if not (finite and math.isfinite(norm)) or (norm == 0.0 and not self.zeros):
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

    @property
    def count(self) -> int:
        """Norms recorded, in the window if there is one."""
        return len(self.sorted)

    def mean_and_std(self) -> tuple[float, float]:
        """Mean and sample standard deviation; NaN of fewer than two norms."""
        if self.count < 2:
            return math.nan, math.nan
        mean = math.fsum(self.sorted) / self.count
        return mean, math.sqrt(math.fsum((x - mean) * (x - mean) for x in self.sorted) / (self.count - 1))

    def to_tensor(self) -> Tensor:
        values = self.sorted if self.recent is None else array("d", self.recent)
        # Cloned: a tensor on the array's memory would not notice that the array moves when it grows.
        return (
            torch.frombuffer(values, dtype=torch.float64).clone()
            if values
            else torch.empty(0, dtype=torch.float64)
        )


class SortedHistory:
    """All norms in device tensors, without ever reading one.

    They stand sorted in a buffer between a -inf sentinel and +inf padding; a new norm x is inserted by
    clamping it between each entry and the next, and x = +inf is a no-op. All tensors keep their place, as a
    captured CUDA graph needs.
    """

    units = ()

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self._appended = 0  # upper bound of count that the host knows without asking
        self._buffer = torch.full((1,), -math.inf, dtype=torch.float64, device=device)
        self.reserve(1024)

    def reserve(self, capacity: int) -> None:
        """Room for ``capacity`` norms."""
        more = capacity + 2 - len(self._buffer)
        if more > 0:
            self._buffer = torch.cat([self._buffer, self._buffer.new_full((more,), math.inf)])

    def append(self, norm: Tensor, finite: bool | Tensor) -> None:
        usable = torch.isfinite(norm) & (norm != 0) & finite
        self._appended += 1
        if self._appended > len(self._buffer) - 2:
            self.reserve(2 * self._appended)
        norm = torch.where(usable, norm.to(self._buffer.dtype), math.inf)
        self._buffer[1:] = torch.clamp(norm, self._buffer[:-1], self._buffer[1:])
        self.count += usable

    def extend(self, norms: Tensor) -> None:
        self.reserve(2 * len(norms))
        self._buffer[1 : 1 + len(norms)] = norms.to(self.device)
        self.count.fill_(len(norms))
        self._appended = len(norms)

    def quantile(self, percentile: Number) -> Tensor:
        return _quantile(self._buffer[1:], self.count, percentile)

    def to_tensor(self) -> Tensor:
        return self._buffer[1 : 1 + int(self.count)].cpu()


class WindowHistory:
    """The last norms of each unit in a ring, sorted at each step; nothing is ever read.

    Args:
        window: norms of a unit.
        units: their shape, () or (units,).
        device: of the norms.
        zeros: whether a zero says something.
    """

    def __init__(
        self, window: int, units: tuple[int, ...], device: torch.device, zeros: bool = False
    ) -> None:
        self.window, self.units, self.device, self.zeros = window, units, device, zeros
        self.count = torch.zeros(units, dtype=torch.int64, device=device)
        self._ring = torch.full((*units, window), math.inf, dtype=torch.float64, device=device)
        self._write = torch.zeros(units, dtype=torch.int64, device=device)
        self._places = torch.arange(window, device=device)

    def reserve(self, capacity: int) -> None:
        """There is room."""

    def append(self, norms: Tensor, finite: bool | Tensor) -> None:
        usable = torch.isfinite(norms) & finite
        if not self.zeros:
            usable = usable & (norms != 0)
        here = (self._places == self._write.unsqueeze(-1)) & usable.unsqueeze(-1)
        self._ring.copy_(torch.where(here, norms.unsqueeze(-1), self._ring))
        self._write.copy_((self._write + usable) % self.window)
        self.count.copy_(torch.clamp(self.count + usable, max=self.window))

    def extend(self, norms: Tensor) -> None:
        """Go on after ``norms``, (..., up to window), oldest first, filled up with NaN."""
        if norms.shape[-1] > self.window:
            rows = [row[row.isfinite()][-self.window :] for row in norms.view(-1, norms.shape[-1])]
            norms = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=math.nan)
            norms = norms.view(*self.units, -1)
        norms = norms.to(self.device)
        known = norms.isfinite()
        self._ring[..., : norms.shape[-1]] = torch.where(known, norms, math.inf)
        self.count.copy_(known.sum(-1))
        self._write.copy_(self.count % self.window)

    def quantile(self, percentile: Number) -> Tensor:
        return _quantile(self._ring.sort().values, self.count, percentile)

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Mean and sample standard deviation; NaN of fewer than two norms."""
        # In order of size, as the sum must not depend on where in the ring the oldest is.
        ordered, known = self._ring.sort().values, self._places < self.count.unsqueeze(-1)
        mean = torch.where(known, ordered, 0.0).sum(-1) / self.count
        squares = torch.where(known, ordered - mean.unsqueeze(-1), 0.0).square().sum(-1)
        return mean, (squares / (self.count - 1)).sqrt()

    def to_tensor(self) -> Tensor:
        start = torch.where(self.count == self.window, self._write, 0).unsqueeze(-1)
        norms = self._ring.gather(-1, (self._places + start) % self.window).cpu()
        if not self.units:
            return norms[: int(self.count)]
        return torch.where(norms.isfinite(), norms, math.nan)


def _quantile(ordered: Tensor, count: Tensor, percentile: Number) -> Tensor:
    """Of the first ``count`` of ``ordered`` along the last dimension; inf if there are none."""
    last = (count - 1).clamp(min=0)
    position = percentile * last.to(torch.float64)
    below = position.floor()
    index = below.to(torch.int64)
    low = ordered.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    high = ordered.gather(-1, torch.minimum(index + 1, last).unsqueeze(-1)).squeeze(-1)
    return _lerp(low, high, position - below)


def _lerp(low: Number, high: Number, t: Number) -> Number:
    """Linear interpolation as numpy's, from whichever end is nearer, so that results agree bit for bit."""
    step = high - low
    return where(isfinite(high), where(t < 0.5, low + step * t, high - step * (1 - t)), high)


class Memory:
    """Some numbers of each unit: Python floats of one unit on the host, else tensors beside the norms.

    Tensors keep their place, as a captured CUDA graph needs. Of one unit they are float64, as Python's floats
    are, of several they have the dtype of the norms.

    Args:
        **fresh: name of a number -> its value for a unit that nothing is known of.
    """

    def __init__(self, **fresh: float) -> None:
        self._fresh = fresh
        self._values: dict[str, Number] = dict(fresh)

    def beside(self, norms: Number) -> list[Number]:
        """The numbers, in order, where ``norms`` are and of as many units."""
        for name, value in self._values.items():
            self._values[name] = self._fit(value, self._fresh[name], norms)
        return list(self._values.values())

    @staticmethod
    def _fit(value: Number, fresh: float, norms: Number) -> Number:
        if not isinstance(norms, Tensor):
            return value if isinstance(value, float) else value.item()
        dtype = norms.dtype if norms.ndim else torch.float64
        if isinstance(value, Tensor) and (value.shape, value.device, value.dtype) == (
            norms.shape,
            norms.device,
            dtype,
        ):
            return value
        if norms.ndim == 0:
            return tensor(value, dtype, norms.device).clone()
        past = value if isinstance(value, Tensor) and value.ndim else torch.empty(0)
        return grown(past.to(norms.device, dtype), len(norms), fresh)

    def remember(self, *values: Number) -> None:
        """New numbers, in the order of ``beside``."""
        for name, value in zip(self._values, values, strict=True):
            if isinstance(value, Tensor):
                self._values[name].copy_(value)
            else:
                self._values[name] = float(value)

    def state_dict(self) -> dict[str, Any]:
        return {name: v.clone() if isinstance(v, Tensor) else v for name, v in self._values.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        loaded = ((name, state[name]) for name in self._values)
        self._values = {name: v.clone() if isinstance(v, Tensor) else v for name, v in loaded}

    def reset(self) -> None:
        self._values = dict(self._fresh)


def grown(past: Tensor, units: int, fresh: float) -> Tensor:
    """What was remembered of each unit, with ``fresh`` for units that came since."""
    if len(past) > units:
        raise ValueError(
            f"{len(past)} units are remembered, and {units} came: give the same parameters in the same order "
            "at every step"
        )
    return torch.cat([past, past.new_full((units - len(past), *past.shape[1:]), fresh)])
