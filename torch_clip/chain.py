"""Several clippings, one after the other."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torch_clip.clipping import Telemetry, Transform
from torch_clip.norms import Grads
from torch_clip.scalars import Number, minimum, opposite, where
from torch_clip.scopes import Measured


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
