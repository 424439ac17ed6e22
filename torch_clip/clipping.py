"""The contract of a clipping, and its commonest kind: scope x threshold x shape x gate."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torch_clip.gates import Always, Gate
from torch_clip.norms import Grads
from torch_clip.scalars import Number, isfinite, number, opposite, where
from torch_clip.scopes import Element, Global, Measured, Scope
from torch_clip.shapes import Shape, hard, normalized
from torch_clip.thresholds import Constant, Moment, Percentile, Threshold

NONFINITE = ("skip", "propagate", "error")

Describe = Callable[[Tensor], str]
"""Names a parameter."""


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
    """The threshold in use; where units differ, their median."""
    clipped: Number
    """Share of the method's units (``clipping.unit``: steps, tensors, elements) that were clipped."""
    steps: int | Tensor
    """Steps so far, skipped ones included."""
    clipped_steps: int | Tensor
    """Steps so far in which anything was clipped."""
    skipped_steps: int | Tensor
    """Steps so far that were skipped, because the gradient was not finite or the method said so."""


class Transform(ABC):
    """What stands between gradients and an optimizer: changes ``.grad`` in place, and says what it did.

    A method that only scales is a ``Clipping``. One that does more says how in ``look`` and ``apply_``: an
    optimizer, or ``clip_``, calls ``measure``, and then ``scale_`` unless the step is to be skipped. On a
    device other than the CPU nothing is ever read by the host: a step to be skipped is told by a tensor,
    ``scale_`` is called all the same, and what a method remembers must not change where that is true.

    Args:
        nonfinite: what to do when the norm is NaN or Inf. ``"skip"``: an optimizer that the clipping is
            attached to does not step, nothing is recorded, the skip is counted; ``clip_`` alone removes the
            gradients (sets them to None; on other devices than the CPU to zero), so that an optimizer called
            next does not step. ``"propagate"``: scale as :func:`torch.nn.utils.clip_grad_norm_` would.
            ``"error"``: raise ``NonFiniteGradientError``, which names the parameters; it makes the host wait.
    """

    bounded: bool = False
    """Never lengthens a gradient, and changes nothing where nothing is clipped."""
    carries: ClassVar[bool] = False
    """Adds to a gradient what was left of earlier ones."""
    measures: bool = True
    """Whether norms are taken at all."""
    by_tensor: bool = False
    """Whether it matters how a gradient is divided into tensors."""
    skips: bool = False
    """Whether it may skip a step though the gradient is finite."""
    by_factor: bool = False
    """Whether one factor for all gradients is all there is to it, so that a fused kernel can do it."""
    unit: str = "steps"
    """What ``Telemetry.clipped`` is a share of."""

    def __init__(self, *, nonfinite: str = "skip") -> None:
        if nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite must be one of {', '.join(NONFINITE)}, got {nonfinite!r}")
        self.nonfinite = nonfinite
        self.telemetry: Telemetry | None = None
        """Of the last step; None before the first."""
        # Steps, clipped steps, skipped steps: Python integers until a device is met, then one int64 tensor.
        self._counts: list[int] | Tensor = [0, 0, 0]

    def look(self, grads: Grads, lengths: Number, moment: Moment) -> tuple[Number, bool | Tensor]:
        """The threshold of this step, and whether it is to be skipped though the gradient is finite."""
        return math.inf, False

    def check(self, grads: Grads) -> None:  # noqa: B027
        """Raise ``ValueError`` for parameters that the settings do not fit; asked when attached."""

    def observe(self, loss: Tensor | float) -> None:  # noqa: B027
        """Tell the loss of the coming step, one element; only ``SpikeGuard`` asks for it."""

    @abstractmethod
    def apply_(self, grads: Grads, measured: Measured) -> tuple[Number, Number, Number]:
        """Change the gradients in place.

        Returns:
            Norm after / norm before, the share of units clipped, and the threshold to show.
        """

    def _norms(self, grads: Grads) -> tuple[Tensor, Tensor | None]:
        """Norm of each gradient, and of each unit where that is not the whole."""
        return Global().norms(grads)

    @torch.no_grad()
    def clip_(self, params: Iterable[Any] | Tensor) -> Telemetry:
        """Clip the gradients of ``params`` in place, as one step.

        Args:
            params: parameters; those without a gradient are passed over. A method that remembers something of
                each (``layer_wise_autoclip``, say) takes the same ones in the same order at every step. Pairs
                of name and parameter, and an optimizer's parameter groups, say more to those that ask.

        Returns:
            What was done, see ``Telemetry``.
        """
        grads = Grads([params] if isinstance(params, Tensor) else params)
        measured = self.measure(grads)
        if measured.skip is True:
            for param in grads.params:
                param.grad = None
            return self.skip(measured)
        telemetry = self.scale_(grads, measured)
        if isinstance(measured.skip, Tensor):
            # Not multiplied by zero: 0 * inf is NaN.
            for grad in grads.tensors:
                grad.masked_fill_(measured.skip.to(grad.device, non_blocking=True), 0.0)
        return telemetry

    def measure(
        self,
        grads: Grads,
        grad_scale: Number = 1.0,
        threshold_scale: float = 1.0,
        describe: Describe | None = None,
        finite: bool | Tensor = True,
    ) -> Measured:
        """Norms and threshold of this step; histories take it in. First half of ``clip_``.

        Args:
            grads: to be clipped.
            grad_scale: factor that the gradients carry, of a ``GradScaler``; norms are those without it.
            threshold_scale: multiplies the threshold in this step, of an optimizer that schedules it.
            describe: names a parameter in the message of ``nonfinite="error"``.
            finite: whether the gradient was finite before others changed it.
        """
        if not grads.tensors:
            return Measured(0.0, None, 0.0, math.inf, math.inf, True, False)
        if self.measures:
            norms, lengths = self._norms(grads)
            if isinstance(grad_scale, Tensor) or grad_scale != 1.0:
                norms = norms / grad_scale
                lengths = lengths if lengths is None else lengths / grad_scale
            total = number(torch.linalg.vector_norm(norms))
            finite = isfinite(total) & finite
        else:
            norms, lengths, total = None, None, math.nan
        if self.nonfinite == "error" and not finite:
            raise NonFiniteGradientError(_nonfinite_message(grads, norms, describe))
        lengths = total if lengths is None else lengths
        moment = Moment(self._counts_beside(total)[0], total, finite, lambda: self._weights(grads))
        threshold, skip = self.look(grads, lengths, moment)
        threshold = threshold * threshold_scale
        if self.nonfinite == "skip":
            skip = opposite(finite) | skip
        shown = threshold
        if isinstance(threshold, Tensor) and threshold.ndim:
            shown = number(self._typical(threshold, grads))
        return Measured(total, norms, lengths, threshold, shown, finite, skip)

    def _weights(self, grads: Grads) -> Number:
        norms, lengths = self._norms(grads.weights())
        return number(torch.linalg.vector_norm(norms)) if lengths is None else lengths

    def _typical(self, thresholds: Tensor, grads: Grads) -> Tensor:
        return thresholds.median()

    def scale_(self, grads: Grads, measured: Measured) -> Telemetry:
        """Clip in place and record. Second half of ``clip_``."""
        if not grads.tensors:
            return self.record(measured, 1.0, 0.0)
        coef, clipped, shown = self.apply_(grads, measured)
        if self.bounded:  # the two norms may be summed in different orders
            coef = where(coef > 1, 1.0, coef)
        if isinstance(measured.skip, Tensor):
            shown = where(measured.skip, measured.shown, shown)
        return self.record(measured._replace(shown=shown), coef, clipped)

    def skip(self, measured: Measured) -> Telemetry:
        """Count a step that the host knows is not taken; instead of ``scale_``."""
        return self.record(measured, 1.0, 0.0)

    def record(self, measured: Measured, coef: Number, clipped: Number) -> Telemetry:
        """Count the step and publish its telemetry.

        Args:
            measured: what ``measure`` returned.
            coef: norm after / norm before.
            clipped: share of units clipped.
        """
        counts = self._counts
        if isinstance(measured.total, Tensor):
            skipped = measured.skip
            if not isinstance(skipped, Tensor):
                skipped = torch.zeros_like(measured.finite)
            coef = torch.where(skipped, 1.0, coef)
            clipped = torch.where(skipped, 0.0, clipped)
            counts = self._counts_beside(measured.total)
            counts += torch.stack((torch.ones_like(skipped), clipped > 0, skipped))
        else:
            counts[0] += 1  # of a device too, when a step has no gradients
            counts[1] += clipped > 0
            counts[2] += measured.skip
        if isinstance(counts, Tensor):
            counts = counts.clone().unbind()  # what is published must not count on
        self.telemetry = Telemetry(measured.total, coef, measured.shown, clipped, *counts)
        return self.telemetry

    def remembered(self) -> dict[str, Any]:
        """What the method remembers, the counts apart: tensors, numbers, strings, lists and dictionaries."""
        return {}

    def recall(self, state: dict[str, Any]) -> None:  # noqa: B027  nothing, where nothing is remembered
        """Go on from ``remembered()``, which is in ``state``."""

    def forget(self) -> None:  # noqa: B027
        """Forget what is remembered; counts and random draws go on."""

    @property
    def method(self) -> str:
        """What a state must be of to be loaded."""
        return type(self).__name__

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on bit for bit; loads with ``weights_only=True``."""
        counts = self._counts
        steps, clipped, skipped = counts.tolist() if isinstance(counts, Tensor) else counts
        return {
            "method": self.method,
            "steps": steps,
            "clipped_steps": clipped,
            "skipped_steps": skipped,
            **self.remembered(),
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ``ValueError`` if ``state`` is of another method."""
        if state["method"] != self.method:
            raise ValueError(f"the state is of {state['method']}, this clipping is {self.method}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, which must come from the same method."""
        self.check_state(state)
        self.recall(state)
        self._counts = [state["steps"], state["clipped_steps"], state["skipped_steps"]]

    def reset(self) -> None:
        """Forget everything remembered and counted."""
        self.forget()
        self._counts = [0, 0, 0]
        self.telemetry = None

    def _counts_beside(self, total: Number) -> list[int] | Tensor:
        """The running counts where this step is computed: a model may move, and states load on the host."""
        if isinstance(total, Tensor):
            if not isinstance(self._counts, Tensor):
                self._counts = torch.tensor(self._counts, device=total.device)
        elif isinstance(self._counts, Tensor):
            self._counts = self._counts.tolist()
        return self._counts

    def __repr__(self) -> str:
        settings = (f"{name}={getattr(self, name)!r}" for name in inspect.signature(type(self)).parameters)
        return f"{type(self).__name__}({', '.join(settings)})"


class Clipping(Transform):
    r"""Scales gradients: scope says what as one, threshold how long, shape how strictly, gate whether.

    .. math::
        g \leftarrow \frac{T}{\max(\|g\|_2, T)} \, g \quad \text{for each unit } g \text{ of the scope,
        if the gate fires}

    (of the shape ``hard``). The norm is accumulated in float32 (float64 for float64 gradients) over all that
    is passed in. On a device other than the CPU nothing is ever read by the host.

    Args:
        scope: ``Global()``, ``PerGroup()``, ``PerModule()``, ``PerTensor()``, ``PerUnit()`` or ``Element()``.
        threshold: ``Constant(T)``, ``Percentile(p)``, ``ZScore()``, ``MovingNorm()``, ``WeightNorm()`` ...
        gate: ``Always()`` or ``RandomGate(beta, power)``.
        shape: of ``torch_clip.shapes``: ``hard``, ``smooth``, ``smooth_sqrt`` or ``normalized``.
        nonfinite: see ``Transform``.

    Raises:
        ValueError: the parts make no sense together, and why.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> Clipping(Global(), Constant(1.0)).clip_([weight]).grad_norm
        5.0
        >>> weight.grad
        tensor([0.6000, 0.8000])
    """

    def __init__(
        self,
        scope: Scope,
        threshold: Threshold,
        gate: Gate | None = None,
        *,
        shape: Shape = hard,
        nonfinite: str = "skip",
    ) -> None:
        super().__init__(nonfinite=nonfinite)
        gate = Always() if gate is None else gate
        if isinstance(scope, Element):
            if not isinstance(threshold, Constant):
                raise ValueError(
                    f"{threshold} is of norms, and an element has none; with scope {scope} use Constant, or "
                    "SpamClip, which remembers the size of each element"
                )
            if not isinstance(gate, Always):
                raise ValueError(f"{gate} decides by the norm of a gradient; with scope {scope} use Always")
            if shape is not hard:
                raise ValueError(f"scope {scope} clamps; with shape {shape.__name__} use another scope")
        endless = isinstance(threshold, Percentile) and threshold.window is None
        if endless and not isinstance(scope, Global | Element):
            raise ValueError(
                f"{threshold} with scope {scope} would keep every norm of each unit; give a window"
            )
        if not scope.measure and nonfinite != "propagate":
            raise ValueError(f"without measuring, nonfinite must be 'propagate', got {nonfinite!r}")
        self.scope = scope
        self.threshold = threshold
        self.shape = shape
        self.gate = gate

    @property
    def bounded(self) -> bool:
        """Whether it never lengthens a gradient, and changes nothing where nothing is clipped."""
        return self.shape is not normalized

    @property
    def unit(self) -> str:
        """What ``Telemetry.clipped`` is a share of: steps, groups, modules, tensors, rows or elements."""
        return self.scope.unit

    @property
    def measures(self) -> bool:
        """Whether norms are taken at all."""
        return self.scope.measure

    @property
    def by_tensor(self) -> bool:
        """Whether it matters how a gradient is divided into tensors."""
        return self.scope.by_tensor

    @property
    def by_factor(self) -> bool:
        """Whether a fused kernel can do it; a method with a scaling of its own cannot be left to one."""
        own = type(self).apply_ is not Clipping.apply_ or type(self).scale_ is not Transform.scale_
        return isinstance(self.scope, Global) and not own

    def check(self, grads: Grads) -> None:
        """Raise ``ValueError`` for parameters that the scope cannot tell apart."""
        self.scope.check(grads)

    def look(self, grads: Grads, lengths: Number, moment: Moment) -> tuple[Number, bool | Tensor]:
        """The threshold, or those of the units; nothing is skipped."""
        return self.threshold.update(lengths, moment), False

    def coef(self, measured: Measured) -> Number:
        """The one factor for all gradients, in [0, 1]; the scope must be ``Global``."""
        return self._coef_of(measured)(measured.lengths, measured.threshold)

    def apply_(self, grads: Grads, measured: Measured) -> tuple[Number, Number, Number]:
        """Scale each unit."""
        return *self.scope.scale_(grads, measured, self._coef_of(measured)), measured.shown

    def _coef_of(self, measured: Measured) -> Callable[[Number, Number], Number]:
        step = self._counts_beside(measured.total)[0]

        def coef_of(lengths: Number, threshold: Number) -> Number:
            coef = self.shape(lengths, threshold)
            return where(self.gate.fires(coef, step), coef, 1.0)

        return coef_of

    def _norms(self, grads: Grads) -> tuple[Tensor, Tensor | None]:
        return self.scope.norms(grads)

    def _typical(self, thresholds: Tensor, grads: Grads) -> Tensor:
        return self.scope.typical(thresholds, grads)

    def remembered(self) -> dict[str, Any]:
        """What the threshold remembers, and of what."""
        return self.threshold.state_dict()

    @property
    def method(self) -> str:
        """What a state must be of to be loaded: of what is no named method, the parts decide."""
        if type(self) is not Clipping:
            return super().method
        return f"Clipping({type(self.scope).__name__}, {type(self.threshold).__name__})"

    def recall(self, state: dict[str, Any]) -> None:
        """Go on with the threshold."""
        self.threshold.load_state_dict(state)

    def forget(self) -> None:
        """Forget what the threshold remembers."""
        self.threshold.reset()

    def __repr__(self) -> str:
        parts = [repr(self.scope), repr(self.threshold), repr(self.gate)]
        if self.shape is not hard:
            parts.append(f"shape={getattr(self.shape, '__name__', self.shape)}")
        return f"{type(self).__name__}({', '.join(parts)}, nonfinite={self.nonfinite!r})"


def _nonfinite_message(grads: Grads, norms: Tensor, describe: Callable[[Tensor], str] | None) -> str:
    culprits = [i for i, norm in enumerate(norms.tolist()) if not math.isfinite(norm)]
    if not culprits:
        return "the gradients are finite, but the norm of them all overflows float32"
    named = [describe(grads.params[i]) if describe else f"parameter {i}" for i in culprits[:5]]
    more = f" and {len(culprits) - 5} more" if len(culprits) > 5 else ""
    where = ", ".join(named) + more
    return f"the gradient norm is not finite in {where}; nonfinite='skip' would skip such a step"
