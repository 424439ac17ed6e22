r"""The named methods: each picks a scope, a threshold and a gate.

:math:`g` is the gradient of all parameters as one vector, :math:`T` the threshold,
:math:`\eta_k(p)` the p-th percentile of the gradient norms up to step k.
"""

from __future__ import annotations

import math
from typing import ClassVar

from torch_clip.clipping import Clipping
from torch_clip.gates import RandomGate
from torch_clip.norms import Element, Global, PerTensor
from torch_clip.thresholds import Constant, Percentile


class NoClip(Clipping):
    """Clips nothing; measures the gradient norm and guards against non-finite gradients like the others."""

    def __init__(self, *, nonfinite: str = "skip") -> None:
        super().__init__(Global(), Constant(math.inf), nonfinite=nonfinite)


class NormClip(Clipping):
    r"""Clips the gradient norm at a constant.

    .. math::
        g \leftarrow \min\left(1, \frac{T}{\|g\|_2}\right) g

    Args:
        threshold: T in [0, inf], in units of the gradient norm.
        nonfinite: ``"skip"``, ``"propagate"`` or ``"error"``, see ``Clipping``.

    Reference:
        Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks, 2012,
        https://arxiv.org/abs/1211.5063
    """

    def __init__(self, threshold: float = 1.0, *, nonfinite: str = "skip") -> None:
        super().__init__(Global(), Constant(threshold), nonfinite=nonfinite)


class _RandNormClip(Clipping):
    power: ClassVar[int]

    def __init__(
        self, threshold: float = 1.0, beta: float = 0.85, *, seed: int = 0, nonfinite: str = "skip"
    ) -> None:
        super().__init__(
            Global(), Constant(threshold), RandomGate(beta, self.power, seed), nonfinite=nonfinite
        )


class LinearRandNormClip(_RandNormClip):
    r"""Clips the gradient norm at a constant, at random: the longer the gradient, the likelier.

    .. math::
        \alpha = \min\left(1, \frac{T}{\|g\|_2}\right), \qquad
        g \leftarrow \alpha g \ \text{with probability } \beta^{\alpha}

    One draw a step decides for all parameters.

    Args:
        threshold: T in [0, inf], in units of the gradient norm.
        beta: in (0, 1]; 1 is ``NormClip``.
        seed: of the draws.
        nonfinite: ``"skip"``, ``"propagate"`` or ``"error"``, see ``Clipping``.

    Reference:
        TorchClippedOptimizers, 2022.
    """

    power = 1


class QuadraticRandNormClip(_RandNormClip):
    r"""Clips the gradient norm at a constant, at random, more often than ``LinearRandNormClip``.

    .. math::
        \alpha = \min\left(1, \frac{T}{\|g\|_2}\right), \qquad
        g \leftarrow \alpha g \ \text{with probability } \beta^{\alpha^2}

    One draw a step decides for all parameters.

    Args:
        threshold: T in [0, inf], in units of the gradient norm.
        beta: in (0, 1]; 1 is ``NormClip``.
        seed: of the draws.
        nonfinite: ``"skip"``, ``"propagate"`` or ``"error"``, see ``Clipping``.

    Reference:
        TorchClippedOptimizers, 2022.
    """

    power = 2


class LayerWiseClip(Clipping):
    r"""Clips the norm of each parameter's gradient at a constant; the direction of the whole may change.

    .. math::
        g_i \leftarrow \min\left(1, \frac{T}{\|g_i\|_2}\right) g_i \quad \text{for each tensor } i

    Args:
        threshold: T in [0, inf], in units of a tensor's gradient norm.
        nonfinite: ``"skip"``, ``"propagate"`` or ``"error"``, see ``Clipping``.
    """

    def __init__(self, threshold: float = 1.0, *, nonfinite: str = "skip") -> None:
        super().__init__(PerTensor(), Constant(threshold), nonfinite=nonfinite)


class CoordWiseClip(Clipping):
    r"""Clamps each coordinate of the gradient; the direction may change.

    .. math::
        g_{ij} \leftarrow \min\left(1, \frac{T}{|g_{ij}|}\right) g_{ij}

    Args:
        threshold: T in [0, inf], in units of a coordinate.
        nonfinite: ``"skip"``, ``"propagate"`` or ``"error"``, see ``Clipping``. With ``"propagate"`` Inf
            becomes T and NaN stays.
        measure: False clamps and looks at nothing else, which is cheaper than torch's clipping by norm; the
            telemetry of norms and share is NaN then, and ``nonfinite`` must be ``"propagate"``.

    Note:
        A step whose whole norm is below the threshold costs one read of the gradients, as other methods do.
        Any other also reads them to count what is clipped and for the norm after.

    Reference:
        Zhang et al., Why are adaptive methods good for attention models?, 2019, CClip,
        https://arxiv.org/abs/1912.03194
    """

    def __init__(self, threshold: float = 0.1, *, nonfinite: str = "skip", measure: bool = True) -> None:
        super().__init__(Element(measure), Constant(threshold), nonfinite=nonfinite)


class AutoClip(Clipping):
    r"""Clips the gradient norm at a percentile of all gradient norms seen so far.

    The current norm joins the history before the percentile is taken, so the first step is never clipped:

    .. math::
        g \leftarrow \min\left(1, \frac{\eta_k(p)}{\|g\|_2}\right) g

    Args:
        percentile: p in (0, 1]. Smaller clips more often; 1 never clips.
        window: the percentile is of the last ``window`` norms; None means of all.
        nonfinite: ``"skip"``, ``"propagate"`` or ``"error"``, see ``Clipping``.

    Example:
        >>> import torch
        >>> clipping = AutoClip(percentile=0.5)
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> for norm in (1.0, 3.0):  # thresholds 1, then the median of 1 and 3
        ...     weight.grad = torch.tensor([norm])
        ...     print(clipping.clip_([weight]).threshold, weight.grad)
        1.0 tensor([1.])
        2.0 tensor([2.])

    Reference:
        Seetharaman et al., AutoClip: Adaptive gradient clipping for source separation networks, 2020,
        https://arxiv.org/abs/2007.14469
    """

    def __init__(
        self, percentile: float = 0.75, window: int | None = None, *, nonfinite: str = "skip"
    ) -> None:
        super().__init__(Global(), Percentile(percentile, window), nonfinite=nonfinite)


class _RandAutoClip(Clipping):
    power: ClassVar[int]

    def __init__(
        self,
        percentile: float = 0.75,
        beta: float = 0.85,
        window: int | None = None,
        *,
        seed: int = 0,
        nonfinite: str = "skip",
    ) -> None:
        super().__init__(
            Global(), Percentile(percentile, window), RandomGate(beta, self.power, seed), nonfinite=nonfinite
        )


class LinearRandAutoClip(_RandAutoClip):
    r"""Clips at a percentile like ``AutoClip``, at random like ``LinearRandNormClip``.

    .. math::
        \alpha = \min\left(1, \frac{\eta_k(p)}{\|g\|_2}\right), \qquad
        g \leftarrow \alpha g \ \text{with probability } \beta^{\alpha}

    Every norm joins the history, whatever the draw.

    Args:
        percentile: p in (0, 1].
        beta: in (0, 1]; 1 is ``AutoClip``.
        window: the percentile is of the last ``window`` norms; None means of all.
        seed: of the draws, one a step for all parameters.
        nonfinite: ``"skip"``, ``"propagate"`` or ``"error"``, see ``Clipping``.

    Reference:
        TorchClippedOptimizers, 2022.
    """

    power = 1


class QuadraticRandAutoClip(_RandAutoClip):
    r"""Clips at a percentile like ``AutoClip``, at random like ``QuadraticRandNormClip``.

    .. math::
        \alpha = \min\left(1, \frac{\eta_k(p)}{\|g\|_2}\right), \qquad
        g \leftarrow \alpha g \ \text{with probability } \beta^{\alpha^2}

    Every norm joins the history, whatever the draw.

    Args:
        percentile: p in (0, 1].
        beta: in (0, 1]; 1 is ``AutoClip``.
        window: the percentile is of the last ``window`` norms; None means of all.
        seed: of the draws, one a step for all parameters.
        nonfinite: ``"skip"``, ``"propagate"`` or ``"error"``, see ``Clipping``.

    Reference:
        TorchClippedOptimizers, 2022.
    """

    power = 2


CLIPPINGS: dict[str, type[Clipping]] = {
    "no_clip": NoClip,
    "norm": NormClip,
    "linear_rand_norm": LinearRandNormClip,
    "quadratic_rand_norm": QuadraticRandNormClip,
    "layer_wise": LayerWiseClip,
    "coordinate_wise": CoordWiseClip,
    "auto_clip": AutoClip,
    "linear_rand_autoclip": LinearRandAutoClip,
    "quadratic_rand_autoclip": QuadraticRandAutoClip,
}
"""``clipping_type`` -> class: the one list of methods."""
