"""Skipping the steps whose gradient norm, or loss, is a spike."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from torch_clip.clipping import Transform
from torch_clip.histories import HostHistory, Memory, WindowHistory
from torch_clip.norms import Grads
from torch_clip.scalars import Number, isfinite, opposite, tensor, where
from torch_clip.schedules import fixed, whole
from torch_clip.scopes import Measured
from torch_clip.thresholds import Moment


class SpikeError(RuntimeError):
    """``SpikeGuard`` has skipped as many steps in a row as it was told to bear."""


SIGNALS = ("grad_norm", "loss")
REASONS = (*SIGNALS, "gradient")


class SpikeGuard(Transform):
    r"""Skips a step whose gradient norm, or loss, lies far above those before it.

    .. math::
        \text{skip if } x > \mu + \sigma_{max} s

    with mean :math:`\mu` and sample standard deviation s of the last ``window`` values that were let through,
    the current one not among them; from ``min_history`` values on. A skipped step changes neither parameters
    nor the optimizer's state. Values that are not finite are never recorded; a loss that is not finite is a
    spike. An unusually small value is none.

    Args:
        sigma: :math:`\sigma_{max}`, above 0.
        window: values that are looked back on, a whole number from 2.
        min_history: values without which nothing is skipped, from 2 to ``window``.
        watch: ``"grad_norm"``, ``"loss"`` or both. The loss must be told before each step, by
            ``optimizer.clipping.observe(loss)``, unless a closure returns it; with several processes it must
            be the same in all of them.
        max_consecutive: after so many steps skipped in a row, for a spike or a gradient that is not finite,
            ``SpikeError`` is raised; on a device the host looks once in so many steps. None: never.
        nonfinite: ``"skip"``, ``"propagate"`` or ``"error"``, see ``Clipping``.

    Raises:
        SpikeError: from the step; it names the step and the value.

    Note:
        ``telemetry.threshold`` is the bound on the gradient norm, inf before there is one.

    Reference:
        OLMo-core's SkipStepOptimizer, https://github.com/allenai/OLMo-core, here one-sided and safe from NaN.
    """

    bounded = True
    by_factor = True
    skips = True

    def __init__(
        self,
        sigma: float = 6.0,
        window: int = 128,
        min_history: int = 64,
        watch: str | Iterable[str] = "grad_norm",
        max_consecutive: int | None = 100,
        *,
        nonfinite: str = "skip",
    ) -> None:
        super().__init__(nonfinite=nonfinite)
        self.sigma = fixed(sigma, "sigma", lambda sigma: sigma > 0, "in (0, inf]")
        self.window = whole(window, "window", 2)
        self.min_history = whole(min_history, "min_history", 2)
        if self.min_history > self.window:
            raise ValueError(f"min_history must be at most window={self.window}, got {min_history}")
        self.watch = (watch,) if isinstance(watch, str) else tuple(watch)
        if not self.watch or any(signal not in SIGNALS for signal in self.watch):
            raise ValueError(f"watch takes {', '.join(SIGNALS)}, got {watch!r}")
        self.max_consecutive = None if max_consecutive is None else whole(max_consecutive, "max_consecutive")
        self.forget()

    def observe(self, loss: Tensor | float) -> None:
        """Tell the loss of the coming step, one element."""
        self._loss = loss.detach().reshape(()) if isinstance(loss, Tensor) else float(loss)

    def coef(self, measured: Measured) -> Number:
        """The one factor for all gradients: 1."""
        return 1.0

    def apply_(self, grads: Grads, measured: Measured) -> tuple[Number, Number, Number]:
        """Change nothing."""
        return 1.0, 0.0, measured.shown

    def look(self, grads: Grads, lengths: Number, moment: Moment) -> tuple[Number, bool | Tensor]:
        """The bound on the norm, and whether this is a spike."""
        finite = moment.finite
        in_a_row, *last = self._skips.beside(moment.total)
        # What SpikeError would tell: the step, which of REASONS, the value, mean and standard deviation.
        told = (moment.step, REASONS.index("gradient"), moment.total, 0.0, 0.0)
        last = [where(finite, old, new) for old, new in zip(last, told, strict=True)]
        spike = opposite(finite) & finite  # no, on the host or on the device
        shown, values = math.inf, {}
        for signal in self.watch:
            values[signal] = value = moment.total if signal == "grad_norm" else self._told_loss(moment.total)
            history = self._history(signal, moment.total)
            mean, std = history.mean_and_std()
            # Of equal values the deviation is 0, and rounding alone would be a spike.
            bound = mean + self.sigma * (std + 1e-6 * abs(mean))
            bound = where(history.count >= self.min_history, bound, math.inf)
            above = value > bound
            if signal == "grad_norm":
                shown = bound
            else:
                above = above | opposite(isfinite(value))
            above = above & finite
            told = (moment.step, REASONS.index(signal), value, mean, std)
            last = [where(above, new, old) for new, old in zip(told, last, strict=True)]
            spike = spike | above
        for signal, value in values.items():
            self._histories[signal].append(value, finite & opposite(spike))
        skipped = spike | opposite(finite) if self.nonfinite == "skip" else spike
        self._skips.remember(where(skipped, in_a_row + 1, 0.0), *last)
        self._stop_after_too_many(on_host=not isinstance(spike, Tensor))
        return shown.to(lengths.dtype) if isinstance(shown, Tensor) else shown, spike

    def _told_loss(self, beside: Number) -> Number:
        if self._loss is None:
            raise ValueError(
                "SpikeGuard looks at the loss: tell it before each step by optimizer.clipping.observe(loss)"
            )
        loss, self._loss = self._loss, None
        return tensor(loss, torch.float64, beside.device) if isinstance(beside, Tensor) else float(loss)

    def _history(self, signal: str, beside: Number) -> HostHistory | WindowHistory:
        device = beside.device if isinstance(beside, Tensor) else None
        history = self._histories.get(signal)
        if history is None or history.device != device:
            past, history = history, _empty(self.window, device, signal)
            if past is not None:
                history.extend(past.to_tensor())
            self._histories[signal] = history
        return history

    def _stop_after_too_many(self, on_host: bool) -> None:
        if self.max_consecutive is None:
            return
        self._unread += 1
        if not on_host and self._unread < self.max_consecutive:
            return
        self._unread = 0
        in_a_row, step, reason, value, mean, std = map(float, self._skips.state_dict().values())
        if in_a_row < self.max_consecutive:
            return
        reason = REASONS[int(reason)]
        if reason == "gradient" or not math.isfinite(value):
            told = f"the {reason} of step {step:.0f} is not finite: {value:g}"
        else:
            told = (
                f"{reason} {value:.6g} at step {step:.0f} is far above the last ones, of mean {mean:.6g} and "
                f"standard deviation {std:.6g}"
            )
        raise SpikeError(f"{in_a_row:.0f} steps in a row were skipped; {told}")

    def remembered(self) -> dict[str, Any]:
        """The values looked back on, and the skips in a row."""
        histories = {signal: history.to_tensor() for signal, history in self._histories.items()}
        return {"histories": histories, "skipped": self._skips.state_dict()}

    def recall(self, state: dict[str, Any]) -> None:
        """Go on from ``remembered()``."""
        self.forget()
        for signal, values in state["histories"].items():
            self._histories[signal] = _empty(self.window, None, signal)
            self._histories[signal].extend(values)
        self._skips.load_state_dict(state["skipped"])

    def forget(self) -> None:
        """Forget the values looked back on."""
        self._histories: dict[str, HostHistory | WindowHistory] = {}
        self._skips = Memory(in_a_row=0.0, step=0.0, reason=0.0, value=0.0, mean=0.0, std=0.0)
        self._unread = 0
        self._loss: Tensor | float | None = None


def _empty(window: int, device: torch.device | None, signal: str) -> HostHistory | WindowHistory:
    zeros = signal == "loss"  # a loss may be 0
    return HostHistory(window, zeros) if device is None else WindowHistory(window, (), device, zeros)
