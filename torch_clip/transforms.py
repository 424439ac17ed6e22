"""Methods that remember something of each element: SPAM and StableSPAM, U-Clip."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_clip.chain import Chain
from torch_clip.clipping import Clipping, Transform
from torch_clip.histories import Memory
from torch_clip.norms import Grads, norm_dtype, over_shards_
from torch_clip.scalars import Number, number, where
from torch_clip.schedules import Setting, fixed, whole
from torch_clip.scopes import Element, Measured, PerTensor, Scope, of_elements, ratio
from torch_clip.shapes import hard, normalized
from torch_clip.thresholds import Constant, MeanOverRms, Moment


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
