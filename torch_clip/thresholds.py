"""Where the threshold comes from: a constant, a percentile of the norms so far, their mean and spread, ..."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_clip.histories import HostHistory, Memory, SortedHistory, WindowHistory, grown
from torch_clip.scalars import Number, isfinite, minimum, quotient, sqrt, where
from torch_clip.schedules import Setting, at, fixed, setting, shown, whole
from torch_clip.shapes import hard


class Moment(NamedTuple):
    """What a rule may know of a step besides the norms of its units."""

    step: int | Tensor
    """Steps before this one."""
    total: Number
    """Norm of all gradients."""
    finite: bool | Tensor
    """Whether all of the gradient is finite; where not, nothing must be remembered."""
    weights: Callable[[], Number]
    """Norms of the parameters of each unit, shaped as the norms; costs one read of the parameters."""


class Threshold(ABC):
    """A rule that gives the threshold of a step, and keeps what it must remember for that."""

    @abstractmethod
    def update(self, norms: Number, moment: Moment) -> Number:
        """The threshold for a step, and what is to be remembered of it.

        Args:
            norms: of one unit, a Python float or on a device a tensor, shape (); of several, shape (units,),
                0 for a unit without a gradient.
            moment: the step.

        Returns:
            One threshold for all, or one for each unit, shaped as ``norms``.
        """

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
    """The same threshold at every step, or a schedule.

    Args:
        value: in [0, inf]; inf never clips, 0 zeroes every gradient. A function of the step, see
            ``torch_clip.schedules``, is asked at each step.
    """

    def __init__(self, value: Setting) -> None:
        self.value = setting(value, "threshold", lambda value: value >= 0, "in [0, inf]")

    def update(self, norms: Number, moment: Moment) -> Number:
        value = at(self.value, moment.step)
        return value.to(norms.dtype) if isinstance(value, Tensor) else value

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def reset(self) -> None:
        pass

    def __repr__(self) -> str:
        return f"Constant({shown(self.value)})"


class Percentile(Threshold):
    r"""A percentile of the gradient norms seen so far, the current one included.

    .. math::
        \eta_k(p) = p\text{-th percentile of } n_0, \dots, n_k

    Exact, interpolated linearly between the two nearest norms as :func:`numpy.quantile` does. Norms that are
    not finite, and those that are exactly zero and so say nothing about the scale of a gradient, are not
    recorded; with none recorded the threshold is inf. Of several units each has a history of its own.

    Args:
        percentile: p in (0, 1], or a function of the step.
        window: the percentile is of the last ``window`` norms; None means of all, for one unit only.
    """

    def __init__(self, percentile: Setting, window: int | None = None) -> None:
        hint = ""
        if not callable(percentile) and 1 < (percentile := float(percentile)) <= 100:
            hint = f"; for the {percentile:g}th percentile give {percentile / 100:g}"
        try:
            self.percentile = setting(percentile, "percentile", lambda p: 0 < p <= 1, "in (0, 1]")
        except ValueError as error:
            raise ValueError(f"{error}{hint}") from None
        self.window = None if window is None else whole(window, "window")
        self._history: HostHistory | SortedHistory | WindowHistory = HostHistory(self.window)

    def update(self, norms: Number, moment: Moment) -> Number:
        self._move_to(norms)
        self._history.append(norms, moment.finite)
        threshold = self._history.quantile(at(self.percentile, moment.step))
        return threshold.to(norms.dtype) if isinstance(norms, Tensor) else threshold

    def reserve(self, steps: int, device: torch.device | str) -> None:
        """Make room on ``device`` for ``steps`` norms in all, as a captured CUDA graph cannot grow."""
        self._move_to(torch.empty((), device=device))
        self._history.reserve(steps)

    @property
    def history(self) -> Tensor:
        """The recorded norms, float64 on the CPU: in order of time with a window, else sorted.

        Of several units shape (units, window), each row in order of time and filled up with NaN.
        """
        return self._history.to_tensor()

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "window": self.window}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        history = state["history"]
        if self.window is not None and state["window"] is None and len(history) > self.window:
            raise ValueError(
                f"the state holds all norms, in no order of time; window={self.window} asks for the last ones"
            )
        self.reset()
        if history.ndim == 2:
            self._history = WindowHistory(self.window, (len(history),), torch.device("cpu"))
        self._history.extend(history)

    def reset(self) -> None:
        self._history = HostHistory(self.window)

    def _move_to(self, norms: Number) -> None:
        """Continue the history where the norms are now: after loading, or when the model was moved."""
        device = norms.device if isinstance(norms, Tensor) else None
        units = tuple(norms.shape) if isinstance(norms, Tensor) else ()
        if device == self._history.device and units == self._history.units:
            return
        past = self.history
        if units and self.window is None:
            raise ValueError("a history of all norms is for one unit; of several units give a window")
        if device is None:
            self._history = HostHistory(self.window)
        elif self.window is None:
            self._history = SortedHistory(device)
        else:
            self._history = WindowHistory(self.window, units, device)
            if units:
                past = grown(past if past.ndim == 2 else past.new_empty(0, self.window), units[0], math.nan)
        self._history.extend(past)

    def __repr__(self) -> str:
        window = "" if self.window is None else f", window={self.window}"
        return f"Percentile({shown(self.percentile)}{window})"


class _Remembering(Threshold):
    """A rule whose state is a ``Memory``."""

    _memory: Memory

    def state_dict(self) -> dict[str, Any]:
        return self._memory.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._memory.load_state_dict(state)

    def reset(self) -> None:
        self._memory.reset()


def _usable(norms: Number, moment: Moment) -> bool | Tensor:
    """Which norms say something about the scale of gradients."""
    return isfinite(norms) & (norms > 0) & moment.finite


_SPREAD_EPS = 1e-6

TARGETS: dict[str, Callable[[Number, Number, Number, float], Number]] = {
    "reciprocal": lambda mean, std, z, limit: mean + limit * limit * quotient(std, z),
    "mean": lambda mean, std, z, limit: mean,
    "fixed": lambda mean, std, z, limit: mean + limit * std,
}
"""Where a spike is brought to, given mean and spread of the norms, its z-score, and the limit."""


class ZScore(_Remembering):
    r"""A bound on how many standard deviations a norm may lie above the mean of those before it.

    .. math::
        z = \frac{n - \mu}{\sigma + 10^{-6}}, \qquad T = \begin{cases}
            \mu + z_{max}^2 \sigma / z & \text{if } z > z_{max} \text{ (target "reciprocal")} \
            \mu + z_{max} (\sigma + 10^{-6}) & \text{otherwise, which clips nothing} \end{cases}

    and then, with e = T for a spike and n otherwise,

    .. math::
        \mu \leftarrow \alpha \mu + (1 - \alpha) e, \qquad
        \sigma^2 \leftarrow \alpha \sigma^2 + (1 - \alpha) (e - \mu)^2

    from the mean and the variance of the first ``warmup`` norms, during which T is inf. Norms that are zero
    or not finite change nothing.

    Args:
        limit: :math:`z_{max}`, above 0.
        decay: :math:`\alpha`, in [0, 1).
        warmup: norms to begin with, a whole number from 1.
        target: where a spike is brought to: ``"reciprocal"``, nearer to the mean the higher it is;
            ``"mean"``; or ``"fixed"``, :math:`\mu + z_{max} \sigma`.
        most: T is never more than this; inf means no such cap.
    """

    def __init__(
        self,
        limit: float = 2.5,
        decay: float = 0.97,
        warmup: int = 25,
        target: str = "reciprocal",
        most: float = math.inf,
    ) -> None:
        self.limit = fixed(limit, "z_threshold", lambda z: 0 < z < math.inf, "in (0, inf)")
        self.decay = fixed(decay, "decay", lambda decay: 0 <= decay < 1, "in [0, 1)")
        self.warmup = whole(warmup, "warmup")
        if target not in TARGETS:
            raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
        self.target = target
        self.most = fixed(most, "max_grad_norm", lambda most: most > 0, "in (0, inf], or None")
        self._memory = Memory(recorded=0.0, mean=0.0, variance=0.0)

    def update(self, norms: Number, moment: Moment) -> Number:
        recorded, mean, variance = self._memory.beside(norms)
        usable, warm = _usable(norms, moment), recorded >= self.warmup
        std = sqrt(variance)
        z = (norms - mean) / (std + _SPREAD_EPS)
        spike = warm & (z > self.limit)
        threshold = where(warm, mean + self.limit * (std + _SPREAD_EPS), math.inf)
        threshold = where(spike, TARGETS[self.target](mean, std, z, self.limit), threshold)

        effective = where(spike, threshold, norms)
        # Welford's mean and variance of all norms in the warm-up, moving ones after it.
        count = recorded + 1
        weight = where(warm, 1 - self.decay, 1 / count)
        moved = mean + weight * (effective - mean)
        spread = where(warm, effective - moved, effective - mean) * (effective - moved)
        spread = variance + weight * (spread - variance)
        self._memory.remember(
            where(usable, where(warm, recorded, count), recorded),
            where(usable, moved, mean),
            where(usable, spread, variance),
        )
        threshold = minimum(threshold, self.most)
        return threshold.to(norms.dtype) if isinstance(norms, Tensor) else threshold

    def __repr__(self) -> str:
        return f"ZScore({self.limit:g}, decay={self.decay:g}, warmup={self.warmup}, target={self.target!r})"


class WeightNorm(Threshold):
    r"""A share of the norm of the unit's own weights.

    .. math::
        T = \lambda \max(\|W\|_2, \epsilon)

    Args:
        factor: :math:`\lambda`, in [0, inf].
        eps: :math:`\epsilon`, above 0, so that weights of zero can grow.
    """

    def __init__(self, factor: Setting = 0.01, eps: float = 1e-3) -> None:
        self.factor = setting(factor, "threshold", lambda factor: factor >= 0, "in [0, inf]")
        self.eps = fixed(eps, "eps", lambda eps: 0 < eps < math.inf, "in (0, inf)")

    def update(self, norms: Number, moment: Moment) -> Number:
        weights = moment.weights()
        threshold = at(self.factor, moment.step) * where(weights > self.eps, weights, self.eps)
        return threshold.to(norms.dtype) if isinstance(norms, Tensor) else threshold

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def reset(self) -> None:
        pass

    def __repr__(self) -> str:
        return f"WeightNorm({shown(self.factor)}, eps={self.eps:g})"


class MovingNorm(_Remembering):
    r"""A factor above the moving average of the unit's own clipped norms.

    .. math::
        T = \lambda_{rel} \gamma, \qquad \gamma \leftarrow \beta \gamma + (1 - \beta) \min(n, T)

    During the first ``warmup`` steps the gradient as a whole is clipped at a constant instead,
    :math:`T = h n` with :math:`h = \min(1, \lambda_{abs} / \|g\|_2)`, and :math:`\gamma` is the smallest h n
    so far. A unit whose first gradient comes later begins then. :math:`\gamma` is never below ``eps``, and
    steps whose gradient is zero or not finite change nothing.

    Args:
        relative: :math:`\lambda_{rel}`, above 1, or the threshold could only fall.
        absolute: :math:`\lambda_{abs}`, above 0.
        decay: :math:`\beta`, in [0, 1).
        warmup: steps, a whole number from 1.
        eps: above 0, in units of a norm.
    """

    def __init__(
        self,
        relative: float = 1.05,
        absolute: float = 1.0,
        decay: float = 0.98,
        warmup: int = 100,
        eps: float = 1e-8,
    ) -> None:
        self.relative = fixed(relative, "relative", lambda factor: factor > 1, "in (1, inf]")
        self.absolute = fixed(absolute, "absolute", lambda norm: norm > 0, "in (0, inf]")
        self.decay = fixed(decay, "decay", lambda decay: 0 <= decay < 1, "in [0, 1)")
        self.warmup = whole(warmup, "warmup")
        self.eps = fixed(eps, "eps", lambda eps: 0 < eps < math.inf, "in (0, inf)")
        self._steps = Memory(warmup_steps=0.0)
        self._memory = Memory(average=math.inf)

    def update(self, norms: Number, moment: Moment) -> Number:
        (steps,) = self._steps.beside(moment.total)
        (average,) = self._memory.beside(norms)
        usable = _usable(norms, moment)
        begins = (average == math.inf) | (steps < self.warmup)
        whole_gradient = hard(moment.total, self.absolute)
        threshold = where(begins, whole_gradient * norms, self.relative * average)

        clipped = minimum(norms, threshold)
        moved = where(begins, minimum(clipped, average), average + (1 - self.decay) * (clipped - average))
        moved = where(moved > self.eps, moved, self.eps)
        self._memory.remember(where(usable, moved, average))
        counts = _usable(moment.total, moment) & (steps < self.warmup)
        self._steps.remember(where(counts, steps + 1, steps))
        return threshold.to(norms.dtype) if isinstance(norms, Tensor) else threshold

    def state_dict(self) -> dict[str, Any]:
        return self._steps.state_dict() | super().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps.load_state_dict(state)
        super().load_state_dict(state)

    def reset(self) -> None:
        self._steps.reset()
        super().reset()

    def __repr__(self) -> str:
        return (
            f"MovingNorm({self.relative:g}, absolute={self.absolute:g}, decay={self.decay:g}, "
            f"warmup={self.warmup})"
        )


class MeanOverRms(_Remembering):
    r"""The mean of the unit's norms over their root mean square: about 1, and smaller after a spike.

    .. math::
        m \leftarrow \gamma_1 m + (1 - \gamma_1) n, \qquad
        v \leftarrow \gamma_2 v + (1 - \gamma_2) n^2, \qquad
        T = \frac{m / (1 - \gamma_1^t)}{\sqrt{v / (1 - \gamma_2^t)}}

    with t norms so far, the current one included. Norms that are zero or not finite change nothing.

    Args:
        mean_decay: :math:`\gamma_1`, in [0, 1).
        square_decay: :math:`\gamma_2`, in [0, 1).
    """

    def __init__(self, mean_decay: float = 0.7, square_decay: float = 0.9) -> None:
        self.mean_decay = fixed(mean_decay, "mean_decay", lambda decay: 0 <= decay < 1, "in [0, 1)")
        self.square_decay = fixed(square_decay, "square_decay", lambda decay: 0 <= decay < 1, "in [0, 1)")
        # How much of each average is filled grows as the average itself does, with the same rounding.
        self._memory = Memory(mean=0.0, mean_filled=0.0, square=0.0, square_filled=0.0)

    def update(self, norms: Number, moment: Moment) -> Number:
        usable = _usable(norms, moment)
        values = self._memory.beside(norms)
        decays = (self.mean_decay, self.mean_decay, self.square_decay, self.square_decay)
        takes = (norms, 1.0, norms * norms, 1.0)
        values = [
            where(usable, decay * value + (1 - decay) * new, value)
            for value, decay, new in zip(values, decays, takes, strict=True)
        ]
        self._memory.remember(*values)
        mean, mean_filled, square, square_filled = values
        threshold = quotient(mean, mean_filled) / sqrt(
            where(square > 0, quotient(square, square_filled), 1.0)
        )
        threshold = where(square > 0, threshold, norms)  # also where the squares underflow
        return threshold.to(norms.dtype) if isinstance(norms, Tensor) else threshold

    def __repr__(self) -> str:
        return f"MeanOverRms({self.mean_decay:g}, {self.square_decay:g})"
