"""Methods that do more than scale: remember elements, carry over, skip steps, and chains of methods."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from torch_clip.clipping import Clipping, Telemetry, Transform
from torch_clip.norms import Grads, norm_dtype, over_shards_
from torch_clip.scalars import Number, isfinite, minimum, number, opposite, tensor, where
from torch_clip.schedules import Setting, fixed, whole
from torch_clip.scopes import Element, Measured, PerTensor, Scope, of_elements, ratio
from torch_clip.shapes import hard, normalized
from torch_clip.thresholds import (
    Constant,
    HostHistory,
    MeanOverRms,
    Memory,
    Moment,
    WindowHistory,
)


class _Buffers:
    """A float32 tensor beside each gradient (float64 for float64), by the parameter's place among all."""

    def __init__(self) -> None:
        self._tensors: dict[int, Tensor] = {}

    def beside(self, grads: Grads) -> list[Tensor]:
        """Those of all gradients, zero at first."""
        found = []
        for i, param, grad in zip(grads.index, grads.params, grads.tensors, strict=True):
            if param.grad.layout is not torch.strided:
                raise ValueError(
                    f"parameter {i} has a sparse gradient; a memory of each element needs dense ones"
                )
            buffer, dtype = self._tensors.get(i), norm_dtype(grad.dtype)
            if buffer is None:
                buffer = torch.zeros_like(grad, dtype=dtype)
            elif buffer.shape != grad.shape:
                raise ValueError(
                    f"parameter {i} had a gradient of shape {tuple(buffer.shape)}, now one of "
                    f"{tuple(grad.shape)}: give the same parameters in the same order at every step"
                )
            found.append(buffer.to(grad.device, dtype))
            self._tensors[i] = found[-1]
        return found

    def state_dict(self) -> dict[int, Tensor]:
        return {i: tensor.clone() for i, tensor in self._tensors.items()}

    def load_state_dict(self, state: dict[int, Tensor]) -> None:
        self._tensors = {i: tensor.clone() for i, tensor in state.items()}


class SpamClip(Transform):
    r"""Clamps each element to a multiple of its own root mean square: spikes go, the rest stays.

    .. math::
        g_{ij} \leftarrow \mathrm{sign}(g_{ij}) \min\left(|g_{ij}|, \sqrt{\theta \hat v_{ij}}\right), \qquad
        v_{ij} \leftarrow \beta v_{ij} + (1 - \beta) g_{ij}^2, \qquad \hat v = v / (1 - \beta^t)

    The average of the steps before decides, and takes in what was clipped. Off for the first ``warmup``
    gradients of a tensor, and for an element that has had none but zeros. SPAM also resets Adam's moments
    every so many steps; that is the optimizer's part, and is left to it.

    Args:
        theta: :math:`\theta`, above 0: the square of how many times its root mean square an element may be.
        decay: :math:`\beta`, in [0, 1).
        warmup: gradients of a tensor, a whole number from 1.
        nonfinite: ``"skip"``, ``"propagate"`` or ``"error"``, see ``Clipping``.

    Note:
        ``telemetry.threshold`` is the root mean square of the bounds, inf before there are any. Keeps one
        float32 buffer a parameter (saved in the state; of a sharded parameter the shard), and reads it and
        the gradients several times.

    Reference:
        Huang et al., SPAM: Spike-aware Adam with momentum reset for stable LLM training, 2025,
        https://arxiv.org/abs/2501.06842
    """

    bounded = True
    unit = "elements"

    def __init__(
        self, theta: float = 5000.0, decay: float = 0.999, warmup: int = 100, *, nonfinite: str = "skip"
    ) -> None:
        super().__init__(nonfinite=nonfinite)
        self.theta = fixed(theta, "theta", lambda theta: theta > 0, "in (0, inf]")
        self.decay = fixed(decay, "decay", lambda decay: 0 <= decay < 1, "in [0, 1)")
        self.warmup = whole(warmup, "warmup")
        self._scope = PerTensor()
        self._squares = _Buffers()
        self._memory = Memory(recorded=0.0)

    def _norms(self, grads: Grads) -> tuple[Tensor, Tensor | None]:
        return self._scope.norms(grads)

    def apply_(self, grads: Grads, measured: Measured) -> tuple[Number, Number, Number]:
        """Clamp, and take what is left into the averages."""
        (recorded,) = self._memory.beside(measured.lengths)
        usable = measured.lengths.isfinite() & (measured.lengths > 0) & measured.finite
        # theta / (1 - beta^t), which makes a bound out of an average; inf as long as there is none.
        factor = torch.where(recorded >= self.warmup, self.theta / (1 - self.decay**recorded), math.inf)
        self._memory.remember(recorded + usable)
        bounds, clipped, norms = [], [], []
        on_cpu = not isinstance(measured.total, Tensor)
        for grad, mean, f, take in zip(
            grads.tensors,
            self._squares.beside(grads),
            self._scope.pick(factor, grads).unbind(),
            self._scope.pick(usable, grads).unbind(),
            strict=True,
        ):
            f, take = f.to(grad.device, non_blocking=True), take.to(grad.device, non_blocking=True)
            if on_cpu and not f.isfinite():
                clipped.append(grad.new_zeros((), dtype=mean.dtype))
                bounds.append(clipped[-1])
            else:
                bound = mean * f
                bounds.append(torch.nan_to_num(bound.sum(), posinf=0.0))  # 0 * inf is NaN
                bound = torch.where(mean > 0, bound.sqrt_(), math.inf).to(grad.dtype)
                clipped.append((grad.abs() > bound).to(mean.dtype).sum())
                grad.clamp_(-bound, bound)
            square = grad.to(mean.dtype).square()
            norms.append(square.sum().sqrt())
            mean.copy_(torch.where(take, self.decay * mean + (1 - self.decay) * square, mean))
        total = measured.total
        coef, share = of_elements(grads, total, clipped, norms)
        over_shards_(bounds, grads.meshes)
        device = bounds[0].device
        bound = torch.stack([value.to(device, non_blocking=True) for value in bounds]).sum()
        shown = (bound / sum(param.numel() for param in grads.params)).sqrt()
        shown = number(torch.where(shown > 0, shown, math.inf))
        return coef, share, shown

    def remembered(self) -> dict[str, Any]:
        """The averages, and of how many gradients they are."""
        return {"squares": self._squares.state_dict(), **self._memory.state_dict()}

    def recall(self, state: dict[str, Any]) -> None:
        """Go on from ``remembered()``."""
        self._squares.load_state_dict(state["squares"])
        self._memory.load_state_dict(state)

    def forget(self) -> None:
        """Forget the averages."""
        self._squares = _Buffers()
        self._memory.reset()


class AdaClip(Transform):
    r"""Brings the elements of a tensor that tower over the largest ones of the past down to their size.

    .. math::
        m \leftarrow \theta m + (1 - \theta) \max_j |g_j|, \qquad \hat m = m / (1 - \theta^t), \qquad
        g_j \leftarrow \frac{\hat m}{\max_j |g_j|} g_j \quad \text{where } |g_j| > \hat m

    for each tensor; the current step's largest element is in the average. The first half of StableSPAM.

    Args:
        theta: :math:`\theta`, in [0, 1).
        nonfinite: ``"skip"``, ``"propagate"`` or ``"error"``, see ``Clipping``.

    Note:
        ``telemetry.threshold`` is the median of :math:`\hat m` over the tensors. Reads the gradients once
        more for their largest elements, and where it clips some times more.

    Reference:
        Huang et al., Stable-SPAM: How to train in 4-bit more stably than 16-bit Adam, 2025,
        https://arxiv.org/abs/2502.17055
    """

    bounded = True
    unit = "elements"
    by_tensor = True

    def __init__(self, theta: float = 0.999, *, nonfinite: str = "skip") -> None:
        super().__init__(nonfinite=nonfinite)
        self.theta = fixed(theta, "theta", lambda theta: 0 <= theta < 1, "in [0, 1)")
        self._scope = PerTensor()
        # How much of the average is filled grows as the average itself does, with the same rounding.
        self._memory = Memory(largest=0.0, filled=0.0)

    def _norms(self, grads: Grads) -> tuple[Tensor, Tensor | None]:
        return self._scope.norms(grads)

    def apply_(self, grads: Grads, measured: Measured) -> tuple[Number, Number, Number]:
        """Scale what towers over the average."""
        largest = [
            torch.linalg.vector_norm(grad, math.inf) if grad.numel() else grad.new_zeros(())
            for grad in grads.tensors
        ]
        over_shards_(largest, grads.meshes, "max")
        device, dtype = measured.lengths.device, measured.lengths.dtype
        here = torch.stack([value.to(device, dtype, non_blocking=True) for value in largest])
        average, filled = self._memory.beside(measured.lengths)
        whole = self._scope.spread(here, grads)
        usable = (whole > 0) & whole.isfinite() & measured.finite
        average = torch.where(usable, self.theta * average + (1 - self.theta) * whole, average)
        filled = torch.where(usable, self.theta * filled + (1 - self.theta), filled)
        self._memory.remember(average, filled)

        known = whole.isfinite() & (filled > 0)
        bounds = self._scope.pick(torch.where(known, average / filled, math.inf), grads)
        clipped, norms = [], []
        towers = [True] * len(here) if isinstance(measured.total, Tensor) else (here > bounds).tolist()
        for place, (grad, bound, factor, norm) in enumerate(
            zip(grads.tensors, bounds.unbind(), hard(here, bounds).unbind(), measured.norms, strict=True)
        ):
            if not towers[place] and place not in grads.meshes:  # of a shard the norm is that of the whole
                clipped.append(torch.zeros_like(norm))
                norms.append(norm)
                continue
            bound, factor = (x.to(grad.device, non_blocking=True) for x in (bound, factor))
            above = grad.abs() > bound
            clipped.append(above.to(dtype).sum())
            grad.copy_(torch.where(above, grad * factor.to(grad.dtype), grad))
            norms.append(torch.linalg.vector_norm(grad, dtype=norm_dtype(grad.dtype)))
        coef, share = of_elements(grads, measured.total, clipped, norms)
        return coef, share, number(bounds.median())

    def remembered(self) -> dict[str, Any]:
        """The averages."""
        return self._memory.state_dict()

    def recall(self, state: dict[str, Any]) -> None:
        """Go on from ``remembered()``."""
        self._memory.load_state_dict(state)

    def forget(self) -> None:
        """Forget the averages."""
        self._memory.reset()


class AdaGN(Clipping):
    r"""Gives each tensor's gradient the mean of its past norms over their root mean square as its norm.

    .. math::
        m \leftarrow \gamma_1 m + (1 - \gamma_1) \|g_i\|_2, \qquad
        v \leftarrow \gamma_2 v + (1 - \gamma_2) \|g_i\|_2^2, \qquad
        g_i \leftarrow \frac{\hat m}{\sqrt{\hat v}} \, \frac{g_i}{\|g_i\|_2}

    with both averages corrected for their start at zero. Every gradient comes out about as long as 1, so it
    may lengthen. The second half of StableSPAM.

    Args:
        mean_decay: :math:`\gamma_1`, in [0, 1).
        square_decay: :math:`\gamma_2`, in [0, 1).
        nonfinite: ``"skip"``, ``"propagate"`` or ``"error"``, see ``Clipping``.

    Reference:
        Huang et al., Stable-SPAM: How to train in 4-bit more stably than 16-bit Adam, 2025,
        https://arxiv.org/abs/2502.17055
    """

    bounded = False

    def __init__(
        self, mean_decay: float = 0.7, square_decay: float = 0.9, *, nonfinite: str = "skip"
    ) -> None:
        super().__init__(
            PerTensor(), MeanOverRms(mean_decay, square_decay), shape=normalized, nonfinite=nonfinite
        )


class UClip(Transform):
    r"""Clips, and adds what was cut off to the next gradient: nothing is lost, only late.

    .. math::
        u_t = \mathrm{clip}(g_t + \Delta_{t-1}), \qquad \Delta_t = \delta \, (g_t + \Delta_{t-1} - u_t)

    With :math:`\delta = 1` the sum of all u differs from the sum of all g by :math:`\Delta_t` alone, so that
    clipping is unbiased on average. A spike of norm n comes back for n / T steps: ``decay`` and ``cap`` bound
    that, and give up as much of the unbiasedness.

    Args:
        threshold: T in [0, inf], in units of an element (of a norm with another scope), or a function of the
            step, see ``torch_clip.schedules``.
        scope: what is clipped as one, of ``torch_clip.scopes``; None is ``Element()``.
        decay: :math:`\delta`, in [0, 1]; what is kept of the carry from step to step.
        cap: each element (or unit of the scope) of the carry is clipped at this, in (0, inf].
        nonfinite: ``"skip"``, ``"propagate"`` or ``"error"``, see ``Clipping``. The carry stays as it is in
            a step that is not finite.

    Note:
        Keeps one float32 buffer a parameter (saved in the state; of a sharded parameter the shard), and reads
        and writes it and the gradients.

    Reference:
        Elesedy, Hutter, U-Clip: On-average unbiased stochastic gradient clipping, 2023,
        https://arxiv.org/abs/2302.02971
    """

    bounded = False
    carries = True

    def __init__(
        self,
        threshold: Setting = 0.1,
        scope: Scope | None = None,
        decay: float = 1.0,
        cap: float = math.inf,
        *,
        nonfinite: str = "skip",
    ) -> None:
        super().__init__(nonfinite=nonfinite)
        self.scope = Element() if scope is None else scope
        if not self.scope.measure:
            raise ValueError(
                f"scope {self.scope} without measuring: UClip needs the norms of what it carries"
            )
        self.threshold = Constant(threshold)
        self.decay = fixed(decay, "decay", lambda decay: 0 <= decay <= 1, "in [0, 1]")
        self.cap = fixed(cap, "cap", lambda cap: cap > 0, "in (0, inf]")
        self._carry = _Buffers()

    @property
    def unit(self) -> str:
        """What ``Telemetry.clipped`` is a share of, by the scope."""
        return self.scope.unit

    @property
    def by_tensor(self) -> bool:
        """Whether it matters how a gradient is divided into tensors."""
        return self.scope.by_tensor

    def check(self, grads: Grads) -> None:
        """Raise ``ValueError`` for parameters that the scope cannot tell apart."""
        self.scope.check(grads)

    def look(self, grads: Grads, lengths: Number, moment: Moment) -> tuple[Number, bool | Tensor]:
        """The threshold; nothing is skipped."""
        return self.threshold.update(lengths, moment), False

    def apply_(self, grads: Grads, measured: Measured) -> tuple[Number, Number, Number]:
        """Add the carry, clip, and keep what is cut off."""
        carries = self._carry.beside(grads)
        finite = [
            flag.to(grad.device, non_blocking=True) if isinstance(flag := measured.finite, Tensor) else flag
            for grad in grads.tensors
        ]
        for grad, carry, fine in zip(grads.tensors, carries, finite, strict=True):
            carry.add_(where(fine, grad, torch.zeros_like(grad)))
            grad.copy_(where(fine, carry, grad + carry))
        summed = self._measure(grads, measured, measured.threshold)
        coef, share = self.scope.scale_(grads, summed, hard)
        for grad, carry, fine in zip(grads.tensors, carries, finite, strict=True):
            left = where(fine, carry - grad, carry)
            carry.copy_(where(fine, self.decay * left, left))
        if self.cap < math.inf:
            carried = grads.replaced(carries)
            self.scope.scale_(
                carried,
                self._measure(carried, measured, self.cap),
                # What is at the cap already would be rounded once more in a step that must not touch it.
                lambda norms, cap: where(measured.finite, hard(norms, cap), 0 * hard(norms, cap) + 1),
            )
        return ratio(coef * summed.total, measured.total), share, measured.shown

    def _measure(self, grads: Grads, measured: Measured, threshold: Number) -> Measured:
        norms, lengths = self.scope.norms(grads)
        total = number(torch.linalg.vector_norm(norms))
        lengths = total if lengths is None else lengths
        return measured._replace(total=total, norms=norms, lengths=lengths, threshold=threshold)

    def remembered(self) -> dict[str, Any]:
        """The carry."""
        return {"carry": self._carry.state_dict()}

    def recall(self, state: dict[str, Any]) -> None:
        """Go on with the carry in ``state``."""
        self._carry.load_state_dict(state["carry"])

    def forget(self) -> None:
        """Drop the carry."""
        self._carry = _Buffers()


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


class Chain(Transform):
    """Several clippings, one after the other.

    The norm that telemetry shows is that of the gradient that came; a step that the first one skips is none
    for the others either. ``telemetry.clipped`` is 1 where any of them clipped, ``threshold`` the smallest of
    those that clip the whole gradient, or else the first one's; what each did is in
    ``chain.clippings[i].telemetry``.

    Args:
        *clippings: at least one; all with the same ``nonfinite``; a ``SpikeGuard`` only in the first place.

    Example:
        >>> import torch
        >>> from torch_clip.methods import CoordWiseClip, NormClip
        >>> chain = Chain(CoordWiseClip(3.0), NormClip(1.0))
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([30.0, 4.0])
        >>> round(chain.clip_([weight]).clip_coef, 4), weight.grad
        (0.033, tensor([0.7071, 0.7071]))
    """

    def __init__(self, *clippings: Transform) -> None:
        if not clippings:
            raise ValueError("a chain needs at least one clipping")
        for clipping in clippings:
            if not isinstance(clipping, Transform):
                raise TypeError(f"a chain is of clippings such as NormClip(1.0), got {clipping!r}")
        policies = sorted({clipping.nonfinite for clipping in clippings})
        if len(policies) > 1:
            raise ValueError(f"all of a chain need the same nonfinite, got {', '.join(policies)}")
        if any(clipping.skips for clipping in clippings[1:]):
            raise ValueError("SpikeGuard goes first: a step cannot be skipped once gradients were changed")
        if not all(clipping.measures for clipping in clippings):
            raise ValueError("a chain multiplies what norms became: all of it must measure")
        if len({id(clipping) for clipping in clippings}) < len(clippings):
            raise ValueError("the same clipping is in the chain twice; each needs a memory of its own")
        super().__init__(nonfinite=policies[0])
        self.clippings = clippings

    @property
    def bounded(self) -> bool:
        """Whether all of them are."""
        return all(clipping.bounded for clipping in self.clippings)

    @property
    def skips(self) -> bool:
        """Whether the first may skip a step though the gradient is finite."""
        return self.clippings[0].skips

    @property
    def by_tensor(self) -> bool:
        """Whether it matters to any of them how a gradient is divided into tensors."""
        return any(clipping.by_tensor for clipping in self.clippings)

    @property
    def carries(self) -> bool:
        """Whether any of them does."""
        return any(clipping.carries for clipping in self.clippings)

    def observe(self, loss: Tensor | float) -> None:
        """Tell the loss of the coming step, one element."""
        for clipping in self.clippings:
            clipping.observe(loss)

    def check(self, grads: Grads) -> None:
        """Raise ``ValueError`` for parameters that the settings of any do not fit."""
        for clipping in self.clippings:
            clipping.check(grads)

    def measure(self, *args: Any, **kwargs: Any) -> Measured:
        """As the first one does."""
        return self.clippings[0].measure(*args, **kwargs)

    def apply_(self, grads: Grads, measured: Measured) -> tuple[Number, Number, Number]:
        """One after the other."""
        first, *others = self.clippings
        said = [first.scale_(grads, measured)]
        # To the others a step that is skipped on a device is one that is not finite: nothing to remember.
        fine = measured.finite & opposite(measured.skip)
        for clipping in others:
            now = clipping.measure(grads, finite=fine)
            said.append(clipping.skip(now) if now.skip is True else clipping.scale_(grads, now))
        coef, any_clipped = 1.0, False
        for telemetry in said:
            coef = coef * telemetry.clip_coef
            any_clipped = any_clipped | (telemetry.clipped > 0)
        whole = [t.threshold for c, t in zip(self.clippings, said, strict=True) if c.unit == "steps"]
        shown = whole[0] if whole else said[0].threshold
        for threshold in whole[1:]:
            shown = minimum(shown, threshold)
        return coef, where(any_clipped, 1.0, 0.0), shown

    def scale_(self, grads: Grads, measured: Measured) -> Telemetry:
        """One after the other, and record; a step without gradients is one for each."""
        if not grads.tensors:
            for clipping in self.clippings:
                clipping.scale_(grads, measured)
        return super().scale_(grads, measured)

    def skip(self, measured: Measured) -> Telemetry:
        """Count a step that is not taken, for each of them."""
        for clipping in self.clippings:
            clipping.skip(measured)
        return super().skip(measured)

    def remembered(self) -> dict[str, Any]:
        """The state of each."""
        return {"clippings": [clipping.state_dict() for clipping in self.clippings]}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ``ValueError`` if ``state`` is not of a chain of these methods."""
        super().check_state(state)
        if len(state["clippings"]) != len(self.clippings):
            raise ValueError(
                f"the state is of a chain of {len(state['clippings'])}, this one has {len(self.clippings)}"
            )
        for clipping, its in zip(self.clippings, state["clippings"], strict=True):
            clipping.check_state(its)

    def recall(self, state: dict[str, Any]) -> None:
        """Go on from the states of each."""
        for clipping, its in zip(self.clippings, state["clippings"], strict=True):
            clipping.load_state_dict(its)

    def forget(self) -> None:
        """Have each forget what it remembers."""
        for clipping in self.clippings:
            clipping.forget()

    def reset(self) -> None:
        """Forget everything remembered and counted, of each too."""
        super().reset()
        for clipping in self.clippings:
            clipping.reset()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.clippings))})"


class StableSpamClip(Chain):
    r"""StableSPAM's two parts, one after the other: ``AdaClip``, then ``AdaGN``.

    Args:
        theta: of ``AdaClip``, in [0, 1).
        mean_decay: :math:`\gamma_1` of ``AdaGN``, in [0, 1).
        square_decay: :math:`\gamma_2` of ``AdaGN``, in [0, 1).
        nonfinite: ``"skip"``, ``"propagate"`` or ``"error"``, see ``Clipping``.

    Reference:
        Huang et al., Stable-SPAM: How to train in 4-bit more stably than 16-bit Adam, 2025,
        https://arxiv.org/abs/2502.17055
    """

    def __init__(
        self,
        theta: float = 0.999,
        mean_decay: float = 0.7,
        square_decay: float = 0.9,
        *,
        nonfinite: str = "skip",
    ) -> None:
        super().__init__(
            AdaClip(theta, nonfinite=nonfinite), AdaGN(mean_decay, square_decay, nonfinite=nonfinite)
        )
