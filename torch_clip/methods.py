r"""The named methods. Most pick a scope, a threshold, a shape and a gate; the others do more than scale.

A setting that may be a function of the step takes one of ``torch_clip.schedules``.

:math:`g` is the gradient of all parameters as one vector, :math:`T` the threshold,
:math:`\eta_k(p)` the p-th percentile of the gradient norms up to step k.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar

from torch.nn import Module

from torch_clip.clipping import Clipping, Transform
from torch_clip.gates import RandomGate
from torch_clip.schedules import Setting, setting
from torch_clip.scopes import Element, Excluded, Global, PerTensor, PerUnit
from torch_clip.shapes import normalized, smooth, smooth_sqrt
from torch_clip.spike_guard import SpikeGuard
from torch_clip.thresholds import Constant, MovingNorm, Percentile, WeightNorm, ZScore
from torch_clip.transforms import AdaClip, AdaGN, SpamClip, StableSpamClip, UClip


class NoClip(Clipping):
    """Clips nothing; measures the gradient norm and guards against non-finite gradients like the others."""

    def __init__(self, *, nonfinite: str = "skip") -> None:
        super().__init__(Global(), Constant(math.inf), nonfinite=nonfinite)


class NormClip(Clipping):
    r"""Clips the gradient norm at a constant.

    .. math::
        g \leftarrow \min\left(1, \frac{T}{\|g\|_2}\right) g

    Args:
        threshold: T in [0, inf], in units of the gradient norm, or a function of the step.
        nonfinite: ``"skip"``, ``"propagate"`` or ``"error"``, see ``Clipping``.

    Reference:
        Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks, 2012,
        https://arxiv.org/abs/1211.5063
    """

    def __init__(self, threshold: Setting = 1.0, *, nonfinite: str = "skip") -> None:
        super().__init__(Global(), Constant(threshold), nonfinite=nonfinite)


class _RandNormClip(Clipping):
    power: ClassVar[int]

    def __init__(
        self, threshold: Setting = 1.0, beta: Setting = 0.85, *, seed: int = 0, nonfinite: str = "skip"
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
        threshold: T in [0, inf], in units of the gradient norm, or a function of the step.
        beta: in (0, 1], or a function of the step; 1 is ``NormClip``.
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
        threshold: T in [0, inf], in units of the gradient norm, or a function of the step.
        beta: in (0, 1], or a function of the step; 1 is ``NormClip``.
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
        threshold: T in [0, inf], in units of a tensor's gradient norm, or a function of the step.
        nonfinite: ``"skip"``, ``"propagate"`` or ``"error"``, see ``Clipping``.
    """

    def __init__(self, threshold: Setting = 1.0, *, nonfinite: str = "skip") -> None:
        super().__init__(PerTensor(), Constant(threshold), nonfinite=nonfinite)


class CoordWiseClip(Clipping):
    r"""Clamps each coordinate of the gradient; the direction may change.

    .. math::
        g_{ij} \leftarrow \min\left(1, \frac{T}{|g_{ij}|}\right) g_{ij}

    Args:
        threshold: T in [0, inf], in units of a coordinate, or a function of the step.
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

    def __init__(self, threshold: Setting = 0.1, *, nonfinite: str = "skip", measure: bool = True) -> None:
        super().__init__(Element(measure), Constant(threshold), nonfinite=nonfinite)


class AutoClip(Clipping):
    r"""Clips the gradient norm at a percentile of all gradient norms seen so far.

    The current norm joins the history before the percentile is taken, so the first step is never clipped:

    .. math::
        g \leftarrow \min\left(1, \frac{\eta_k(p)}{\|g\|_2}\right) g

    Args:
        percentile: p in (0, 1], or a function of the step. Smaller clips more often; 1 never clips.
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
        self, percentile: Setting = 0.75, window: int | None = None, *, nonfinite: str = "skip"
    ) -> None:
        super().__init__(Global(), Percentile(percentile, window), nonfinite=nonfinite)


class _RandAutoClip(Clipping):
    power: ClassVar[int]

    def __init__(
        self,
        percentile: Setting = 0.75,
        beta: Setting = 0.85,
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
        percentile: p in (0, 1], or a function of the step.
        beta: in (0, 1], or a function of the step; 1 is ``AutoClip``.
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
        percentile: p in (0, 1], or a function of the step.
        beta: in (0, 1], or a function of the step; 1 is ``AutoClip``.
        window: the percentile is of the last ``window`` norms; None means of all.
        seed: of the draws, one a step for all parameters.
        nonfinite: ``"skip"``, ``"propagate"`` or ``"error"``, see ``Clipping``.

    Reference:
        TorchClippedOptimizers, 2022.
    """

    power = 2


class LayerWiseAutoClip(Clipping):
    r"""Clips each tensor's gradient norm at a percentile of that tensor's own last norms.

    .. math::
        g_i \leftarrow \min\left(1, \frac{\eta_{i,k}(p)}{\|g_i\|_2}\right) g_i, \qquad
        \eta_{i,k}(p) = p\text{-th percentile of } \|g_i\|_2 \text{ in the last } W \text{ steps}

    What ``percentile_clipping`` of bitsandbytes' optimizers did (before 0.50): its 5 is ``percentile=0.05``
    here. The current norm is in the history and a history that is not full yet is taken as it is, so that the
    first step is never clipped; there it was compared with zeros.

    Args:
        percentile: p in (0, 1], or a function of the step. Smaller clips more often; 1 never clips.
        window: W, norms of each tensor, a whole number from 1.
        nonfinite: ``"skip"``, ``"propagate"`` or ``"error"``, see ``Clipping``.

    Reference:
        Seetharaman et al., AutoClip, 2020, https://arxiv.org/abs/2007.14469, for each tensor as in
        bitsandbytes' percentile clipping, https://github.com/bitsandbytes-foundation/bitsandbytes
    """

    def __init__(self, percentile: Setting = 0.75, window: int = 100, *, nonfinite: str = "skip") -> None:
        super().__init__(PerTensor(), Percentile(percentile, window), nonfinite=nonfinite)


class ZClip(Clipping):
    r"""Clips gradient norms whose z-score, by moving averages of mean and variance, is too high.

    .. math::
        z = \frac{n - \mu}{\sigma + 10^{-6}}, \qquad
        g \leftarrow \frac{T}{n} \, g \text{ if } z > z_{max}, \qquad
        T = \mu + \frac{z_{max}^2 \sigma}{z} \ \text{(reciprocal)}, \ \mu \ \text{(mean)}, \
        \mu + z_{max} \sigma \ \text{(fixed)}

    with :math:`n = \|g\|_2`, and then :math:`\mu \leftarrow \alpha \mu + (1 - \alpha) e`,
    :math:`\sigma^2 \leftarrow \alpha \sigma^2 + (1 - \alpha) (e - \mu)^2` with e = T for a spike, n
    otherwise.
    The first ``warmup`` norms give mean and variance to begin with, and are not clipped. Norms that are not
    finite change neither.

    Args:
        z_threshold: :math:`z_{max}`, above 0.
        decay: :math:`\alpha`, in [0, 1).
        warmup: norms, a whole number from 1.
        target: where a spike is brought to: ``"reciprocal"``, ``"mean"`` or ``"fixed"``.
        max_grad_norm: T is never more than this; None: no such cap. (The published code caps at 1.0 unless
            told otherwise, which clips every step of a run whose norms are larger.)
        nonfinite: ``"skip"``, ``"propagate"`` or ``"error"``, see ``Clipping``.

    Note:
        ``telemetry.threshold`` of a step that is not clipped is the norm at which clipping would begin,
        :math:`\mu + z_{max} (\sigma + 10^{-6})`; inf in the warm-up.

    Reference:
        Kumar et al., ZClip: Adaptive spike mitigation for LLM pre-training, 2025,
        https://arxiv.org/abs/2504.02507
    """

    def __init__(
        self,
        z_threshold: float = 2.5,
        decay: float = 0.97,
        warmup: int = 25,
        target: str = "reciprocal",
        max_grad_norm: float | None = None,
        *,
        nonfinite: str = "skip",
    ) -> None:
        most = math.inf if max_grad_norm is None else max_grad_norm
        super().__init__(Global(), ZScore(z_threshold, decay, warmup, target, most), nonfinite=nonfinite)


class AGC(Clipping):
    r"""Adaptive gradient clipping: each row at a share of the norm of its own weights.

    .. math::
        G_i \leftarrow \min\left(1, \frac{\lambda \max(\|W_i\|_2, \epsilon)}{\|G_i\|_2}\right) G_i
        \quad \text{for each row } i \text{ of each weight}

    A row is what leads to one output, see ``torch_clip.scopes.PerUnit``; a bias is one row.

    Args:
        threshold: :math:`\lambda` in [0, inf], or a function of the step; smaller for larger batches: 0.01 is
            the paper's for 4096.
        eps: :math:`\epsilon`, above 0, so that weights of zero can grow.
        exclude: what is not clipped: ``"last"``, the layer of the last matrix, as the paper does; or an
            iterable of name patterns (``"fc.*"``), parameters and modules; None: nothing.
        model: whose parameters these are. Gives names to patterns, which otherwise come from an optimizer
            made of ``model.named_parameters()``, and tells transposed convolutions, whose filters lie in the
            second dimension.
        nonfinite: ``"skip"``, ``"propagate"`` (only the row suffers) or ``"error"``, see ``Clipping``.

    Note:
        Reads the parameters as well as the gradients, and writes the rows that it clips. Nothing is
        remembered.

    Reference:
        Brock, De, Smith, Simonyan, High-performance large-scale image recognition without normalization,
        2021, https://arxiv.org/abs/2102.06171
    """

    def __init__(
        self,
        threshold: Setting = 0.01,
        eps: float = 1e-3,
        exclude: str | Iterable[Excluded] | None = "last",
        model: Module | None = None,
        *,
        nonfinite: str = "skip",
    ) -> None:
        super().__init__(PerUnit(exclude, model), WeightNorm(threshold, eps), nonfinite=nonfinite)


class AdaGC(Clipping):
    r"""Clips each tensor's gradient at a factor above the moving average of its clipped norms.

    .. math::
        g_i \leftarrow \min\left(1, \frac{\lambda_{rel} \gamma_i}{\|g_i\|_2}\right) g_i, \qquad
        \gamma_i \leftarrow \beta \gamma_i + (1 - \beta) \|g_i\|_2 \ \text{(of the clipped gradient)}

    For the first ``warmup`` steps the gradient as a whole is clipped at :math:`\lambda_{abs}` instead, and
    :math:`\gamma_i` is the smallest norm that tensor i had after that. A tensor that has had no gradient yet
    begins with its first one, and :math:`\gamma_i` stays above 1e-8, so that no tensor is frozen for good.

    Args:
        relative: :math:`\lambda_{rel}`, above 1.
        absolute: :math:`\lambda_{abs}`, above 0.
        decay: :math:`\beta`, in [0, 1).
        warmup: steps, a whole number from 1.
        nonfinite: ``"skip"``, ``"propagate"`` or ``"error"``, see ``Clipping``.

    Reference:
        Wang et al., AdaGC: Improving training stability for large language model pretraining, 2025,
        https://arxiv.org/abs/2502.11034
    """

    def __init__(
        self,
        relative: float = 1.05,
        absolute: float = 1.0,
        decay: float = 0.98,
        warmup: int = 100,
        *,
        nonfinite: str = "skip",
    ) -> None:
        super().__init__(PerTensor(), MovingNorm(relative, absolute, decay, warmup), nonfinite=nonfinite)


class SmoothClip(Clipping):
    r"""Scales every gradient, a long one more: the norm after stays below the threshold.

    .. math::
        g \leftarrow \frac{T}{T + \|g\|_2} \, g

    Args:
        threshold: T in [0, inf], in units of the gradient norm, or a function of the step.
        nonfinite: ``"skip"``, ``"propagate"`` or ``"error"``, see ``Clipping``.

    Reference:
        Zhang, He, Sra, Jadbabaie, Why gradient clipping accelerates training: a theoretical justification for
        adaptivity, 2019, https://arxiv.org/abs/1905.11881
    """

    def __init__(self, threshold: Setting = 1.0, *, nonfinite: str = "skip") -> None:
        super().__init__(Global(), Constant(threshold), shape=smooth, nonfinite=nonfinite)


class SmoothSqrtClip(Clipping):
    r"""Scales every gradient as ``SmoothClip`` does, short ones less.

    .. math::
        g \leftarrow \frac{T}{\sqrt{T^2 + \|g\|_2^2}} \, g

    Args:
        threshold: T in [0, inf], in units of the gradient norm, or a function of the step.
        nonfinite: ``"skip"``, ``"propagate"`` or ``"error"``, see ``Clipping``.
    """

    def __init__(self, threshold: Setting = 1.0, *, nonfinite: str = "skip") -> None:
        super().__init__(Global(), Constant(threshold), shape=smooth_sqrt, nonfinite=nonfinite)


class NormalizedGrad(Clipping):
    r"""Gives every gradient the same norm; a short one is lengthened, a zero one stays zero.

    .. math::
        g \leftarrow \frac{N}{\|g\|_2} \, g

    Args:
        norm: N in [0, inf), or a function of the step.
        nonfinite: ``"skip"``, ``"propagate"`` or ``"error"``, see ``Clipping``.

    Reference:
        Hazan, Levy, Shalev-Shwartz, Beyond convexity: Stochastic quasi-convex optimization, 2015,
        https://arxiv.org/abs/1507.02030
    """

    bounded = False

    def __init__(self, norm: Setting = 1.0, *, nonfinite: str = "skip") -> None:
        norm = setting(norm, "norm", lambda norm: 0 <= norm < math.inf, "in [0, inf)")
        super().__init__(Global(), Constant(norm), shape=normalized, nonfinite=nonfinite)


CLIPPINGS: dict[str, type[Transform]] = {
    "no_clip": NoClip,
    "norm": NormClip,
    "linear_rand_norm": LinearRandNormClip,
    "quadratic_rand_norm": QuadraticRandNormClip,
    "layer_wise": LayerWiseClip,
    "coordinate_wise": CoordWiseClip,
    "auto_clip": AutoClip,
    "linear_rand_autoclip": LinearRandAutoClip,
    "quadratic_rand_autoclip": QuadraticRandAutoClip,
    "layer_wise_autoclip": LayerWiseAutoClip,
    "zclip": ZClip,
    "agc": AGC,
    "adagc": AdaGC,
    "spam": SpamClip,
    "adaclip": AdaClip,
    "adagn": AdaGN,
    "stable_spam": StableSpamClip,
    "uclip": UClip,
    "smooth": SmoothClip,
    "smooth_sqrt": SmoothSqrtClip,
    "normalized": NormalizedGrad,
    "spike_guard": SpikeGuard,
}
"""``clipping_type`` -> class: the one list of methods."""
