"""The contract of a clipping, and its composition: scope x threshold x gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torch_clip.gates import Always, Gate
from torch_clip.norms import Element, Fires, Global, Grads, Measured, Scope, tensor_norms
from torch_clip.scalars import Number, isfinite, number
from torch_clip.thresholds import Constant, Threshold

NONFINITE = ("skip", "propagate", "error")


class NonFiniteGradientError(RuntimeError):
    """A gradient holds NaN or Inf, or its norm overflows, and the clipping says ``nonfinite="error"``."""


class Telemetry(NamedTuple):
    """What a clipping did in its last step: Python numbers on a CPU, 0-dim tensors on any other device.

    ``float()`` reads either. Every step publishes new tensors, so that they can be kept.
    """

    grad_norm: Number
    """L2 norm of all gradients before clipping."""
    clip_coef: Number
    """Norm after / norm before, in [0, 1] for a method that never lengthens; 1 where the step was skipped."""
    threshold: Number
    """The threshold in use."""
    clipped: Number
    """Share of the method's units (``clipping.unit``: steps, tensors, elements) that were clipped."""
    steps: int | Tensor
    """Steps so far, skipped ones included."""
    clipped_steps: int | Tensor
    """Steps so far in which anything was clipped."""
    skipped_steps: int | Tensor
    """Steps so far that were skipped because the gradient was not finite."""


class Clipping:
    r"""Clips gradients in place: scope says what is clipped as one, threshold how long, gate whether.

    .. math::
        g \leftarrow \frac{T}{\max(\|g\|_2, T)} \, g \quad \text{for each unit } g \text{ of the scope,
        if the gate fires}

    The norm is accumulated in float32 (float64 for float64 gradients) over everything that is passed in. On a
    device other than the CPU nothing is ever read by the host.

    Args:
        scope: ``Global()``, ``PerTensor()`` or ``Element()``.
        threshold: ``Constant(T)`` or ``Percentile(p)``.
        gate: ``Always()`` or ``RandomGate(beta, power)``.
        nonfinite: what to do when the norm is NaN or Inf. ``"skip"``: an optimizer that the clipping is
            attached to does not step, nothing is recorded, the skip is counted; ``clip_`` alone removes the
            gradients (sets them to None; on other devices than the CPU to zero), so that an optimizer called
            next does not step. ``"propagate"``: scale as :func:`torch.nn.utils.clip_grad_norm_` would.
            ``"error"``: raise ``NonFiniteGradientError``, which names the parameters; it makes the host wait.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> Clipping(Global(), Constant(1.0)).clip_([weight]).grad_norm
        5.0
        >>> weight.grad
        tensor([0.6000, 0.8000])
    """

    bounded: ClassVar[bool] = True
    """Never lengthens a gradient, and changes nothing where nothing is clipped."""

    def __init__(
        self, scope: Scope, threshold: Threshold, gate: Gate | None = None, *, nonfinite: str = "skip"
    ) -> None:
        gate = Always() if gate is None else gate
        if nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite must be one of {', '.join(NONFINITE)}, got {nonfinite!r}")
        if not isinstance(scope, Global) and not isinstance(threshold, Constant):
            raise ValueError(f"{threshold} is a percentile of global norms; with scope {scope} use Constant")
        if isinstance(scope, Element) and not isinstance(gate, Always):
            raise ValueError(f"{gate} decides by the norm of a gradient; with scope {scope} use Always")
        if not scope.measure and nonfinite != "propagate":
            raise ValueError(f"without measuring, nonfinite must be 'propagate', got {nonfinite!r}")
        self.scope = scope
        self.threshold = threshold
        self.gate = gate
        self.nonfinite = nonfinite
        self.telemetry: Telemetry | None = None
        """Of the last step; None before the first."""
        # Steps, clipped steps, skipped steps: Python integers until a device is met, then one int64 tensor.
        self._counts: list[int] | Tensor = [0, 0, 0]

    @property
    def unit(self) -> str:
        """What ``Telemetry.clipped`` is a share of: steps, tensors or elements."""
        return self.scope.unit

    @torch.no_grad()
    def clip_(self, params: Iterable[Tensor] | Tensor) -> Telemetry:
        """Clip the gradients of ``params`` in place, as one step.

        Args:
            params: parameters; those without a gradient are passed over.

        Returns:
            What was done, see ``Telemetry``.
        """
        grads = Grads([params] if isinstance(params, Tensor) else params)
        measured = self.measure(grads)
        if self.must_skip(measured):
            for param in grads.params:
                param.grad = None
            return self.record(measured, 1.0, 0.0)
        telemetry = self.scale_(grads, measured)
        if self.nonfinite == "skip" and isinstance(measured.finite, Tensor):
            # Not multiplied by zero: 0 * inf is NaN.
            for grad in grads.tensors:
                grad.masked_fill_(~measured.finite.to(grad.device, non_blocking=True), 0.0)
        return telemetry

    def measure(
        self,
        grads: Grads,
        grad_scale: Number = 1.0,
        threshold_scale: float = 1.0,
        describe: Callable[[Tensor], str] | None = None,
    ) -> Measured:
        """Norms and threshold of this step; the norm joins the history. First half of ``clip_``.

        Args:
            grads: to be clipped.
            grad_scale: factor that the gradients carry, of a ``GradScaler``; norms are those without it.
            threshold_scale: multiplies the threshold in this step, of an optimizer that schedules it.
            describe: names a parameter in the message of ``nonfinite="error"``.
        """
        if not grads.tensors:
            return Measured(0.0, None, math.inf, True)
        if not self.scope.measure:
            return Measured(math.nan, None, self.threshold.update(math.nan) * threshold_scale, True)
        norms = tensor_norms(grads)
        if isinstance(grad_scale, Tensor) or grad_scale != 1.0:
            norms = norms / grad_scale
        total = number(torch.linalg.vector_norm(norms))
        finite = isfinite(total)
        if self.nonfinite == "error" and not finite:
            raise NonFiniteGradientError(_nonfinite_message(grads, norms, describe))
        return Measured(total, norms, self.threshold.update(total) * threshold_scale, finite)

    def must_skip(self, measured: Measured) -> bool:
        """Whether the host knows that this step is to be skipped."""
        return self.nonfinite == "skip" and measured.finite is False

    def coef(self, measured: Measured) -> Number:
        """The one factor for all gradients, in [0, 1]; the scope must be ``Global``."""
        return self.scope.coef(measured.total, measured.threshold, self._gate_of(measured))

    def scale_(self, grads: Grads, measured: Measured) -> Telemetry:
        """Clip in place and record. Second half of ``clip_``."""
        if not grads.tensors:
            return self.record(measured, 1.0, 0.0)
        return self.record(measured, *self.scope.scale_(grads, measured, self._gate_of(measured)))

    def record(self, measured: Measured, coef: Number, clipped: Number) -> Telemetry:
        """Count the step and publish its telemetry.

        Args:
            measured: what ``measure`` returned.
            coef: norm after / norm before.
            clipped: share of units clipped.
        """
        skip = self.nonfinite == "skip"
        counts = self._counts
        if isinstance(measured.total, Tensor):
            if skip:
                coef = torch.where(measured.finite, coef, 1.0)
                clipped = torch.where(measured.finite, clipped, 0.0)
            counts = self._counts_beside(measured.total)
            skipped = ~measured.finite if skip else torch.zeros_like(measured.finite)
            counts += torch.stack((torch.ones_like(skipped), clipped > 0, skipped))
        else:
            counts[0] += 1  # of a device too, when a step has no gradients
            counts[1] += clipped > 0
            counts[2] += skip and not measured.finite
        if isinstance(counts, Tensor):
            counts = counts.clone().unbind()  # what is published must not count on
        self.telemetry = Telemetry(measured.total, coef, measured.threshold, clipped, *counts)
        return self.telemetry

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on bit for bit; loads with ``weights_only=True``."""
        counts = self._counts
        steps, clipped, skipped = counts.tolist() if isinstance(counts, Tensor) else counts
        return {
            "method": type(self).__name__,
            "steps": steps,
            "clipped_steps": clipped,
            "skipped_steps": skipped,
            **self.threshold.state_dict(),
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ``ValueError`` if ``state`` is of another method."""
        if state["method"] != type(self).__name__:
            raise ValueError(f"the state is of {state['method']}, this clipping is {type(self).__name__}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, which must come from the same method."""
        self.check_state(state)
        self.threshold.load_state_dict(state)
        self._counts = [state["steps"], state["clipped_steps"], state["skipped_steps"]]

    def reset(self) -> None:
        """Forget everything remembered and counted."""
        self.threshold.reset()
        self._counts = [0, 0, 0]
        self.telemetry = None

    def _gate_of(self, measured: Measured) -> Fires:
        """The gate at this step."""
        step = self._counts_beside(measured.total)[0]
        return lambda coef: self.gate.fires(coef, step)

    def _counts_beside(self, total: Number) -> list[int] | Tensor:
        """The running counts where this step is computed: a model may move, and states load on the host."""
        if isinstance(total, Tensor):
            if not isinstance(self._counts, Tensor):
                self._counts = torch.tensor(self._counts, device=total.device)
        elif isinstance(self._counts, Tensor):
            self._counts = self._counts.tolist()
        return self._counts

    def __repr__(self) -> str:
        name = type(self).__name__
        return f"{name}({self.scope}, {self.threshold}, {self.gate}, nonfinite={self.nonfinite!r})"


def _nonfinite_message(grads: Grads, norms: Tensor, describe: Callable[[Tensor], str] | None) -> str:
    culprits = [i for i, norm in enumerate(norms.tolist()) if not math.isfinite(norm)]
    if not culprits:
        return "the gradients are finite, but the norm of them all overflows float32"
    named = [describe(grads.params[i]) if describe else f"parameter {i}" for i in culprits[:5]]
    more = f" and {len(culprits) - 5} more" if len(culprits) > 5 else ""
    where = ", ".join(named) + more
    return f"the gradient norm is not finite in {where}; nonfinite='skip' would skip such a step"
