"""torch's optimizers with clipping attached."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from torch.optim import SGD, Adam, AdamW
from torch.optim.optimizer import ParamsT

from torch_clip.attach import clip
from torch_clip.clipping import Transform
from torch_clip.methods import CLIPPINGS
from torch_clip.sstm import SSTM


def make_clipping(
    clipping_type: str = "norm",
    clipping_level: float | None = None,
    p_autoclip: float | None = None,
    beta: float | None = None,
) -> Transform:
    """A method by its name, from the settings of TorchClippedOptimizers.

    Args:
        clipping_type: a key of ``torch_clip.methods.CLIPPINGS``.
        clipping_level: threshold, any real number; None is the method's default.
        p_autoclip: percentile in (0, 1]; None is the method's default.
        beta: of the random methods, in (0, 1]; None is the method's default.

    A setting that the method does not have is ignored, so that one set of settings fits all methods.
    """
    if clipping_type not in CLIPPINGS:
        close = difflib.get_close_matches(str(clipping_type), CLIPPINGS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"clipping_type must be one of {', '.join(CLIPPINGS)}, got {clipping_type!r}{hint}")
    method = CLIPPINGS[clipping_type]
    settings = {"threshold": clipping_level, "percentile": p_autoclip, "beta": beta}
    known = inspect.signature(method).parameters
    return method(**{name: value for name, value in settings.items() if name in known and value is not None})


class ClippedSGD(SGD):
    """:class:`torch.optim.SGD` that clips the gradient before its momentum and weight decay see it.

    Args:
        params: as in torch.
        lr: as in torch.
        momentum: as in torch.
        clipping_type: ``norm``, ``linear_rand_norm``, ``quadratic_rand_norm``, ``layer_wise``,
            ``coordinate_wise``, ``auto_clip``, ``linear_rand_autoclip``, ``quadratic_rand_autoclip`` or
            ``no_clip``.
        clipping_level: the threshold; None is the method's default (1.0, coordinate_wise 0.1).
        p_autoclip: percentile of the auto methods, in (0, 1]; None is 0.75.
        beta: base of the random methods, in (0, 1]; None is 0.85.
        clipping: a clipping object; replaces the four settings above.
        **sgd: torch's other keywords: dampening, weight_decay, nesterov, maximize, foreach, differentiable,
            fused.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.0,
        *,
        clipping_type: str = "norm",
        clipping_level: float | None = None,
        p_autoclip: float | None = None,
        beta: float | None = None,
        clipping: Transform | None = None,
        **sgd: Any,
    ) -> None:
        super().__init__(params, lr=lr, momentum=momentum, **sgd)
        clip(self, clipping or make_clipping(clipping_type, clipping_level, p_autoclip, beta))


class _ClippedMoments:
    # First base of the two below: the same settings in front of either.
    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        clipping_type: str = "norm",
        clipping_level: float | None = None,
        p_autoclip: float | None = None,
        beta: float | None = None,
        clipping: Transform | None = None,
        **options: Any,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, **options)
        clip(self, clipping or make_clipping(clipping_type, clipping_level, p_autoclip, beta))


class ClippedAdam(_ClippedMoments, Adam):
    """:class:`torch.optim.Adam` that clips the gradient before its moments see it.

    Args:
        params: as in torch.
        lr: as in torch.
        betas: as in torch.
        clipping_type: as in ``ClippedSGD``.
        clipping_level: as in ``ClippedSGD``.
        p_autoclip: as in ``ClippedSGD``.
        beta: as in ``ClippedSGD``; not one of ``betas``.
        clipping: a clipping object; replaces the four settings above.
        **options: torch's other keywords.
    """


class ClippedAdamW(_ClippedMoments, AdamW):
    """:class:`torch.optim.AdamW` that clips the gradient before its moments see it.

    Args:
        params: as in torch.
        lr: as in torch.
        betas: as in torch.
        clipping_type: as in ``ClippedSGD``.
        clipping_level: as in ``ClippedSGD``.
        p_autoclip: as in ``ClippedSGD``.
        beta: as in ``ClippedSGD``; not one of ``betas``.
        clipping: a clipping object; replaces the four settings above.
        **options: torch's other keywords.
    """


class ClippedSSTM(SSTM):
    """:class:`torch_clip.sstm.SSTM` with a clipping, whose threshold the method schedules.

    Args:
        params: as in torch.
        lr: as in ``SSTM``.
        L: as in ``SSTM``.
        clipping_type: of the methods with a constant threshold; ``no_clip`` is plain SSTM.
        clipping_level: B in the method; None is the clipping's default.
        beta: as in ``ClippedSGD``.
        nu: as in ``SSTM``.
        a_k_ratio_upper_bound: as in ``SSTM``.
        clipping_iter_start: as in ``SSTM``.
        p_autoclip: accepted for the original's callers; no method that SSTM takes uses it.
        offset: as in ``SSTM``.
        clipping: a clipping object; replaces ``clipping_type``, ``clipping_level`` and ``beta``.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        L: float,
        clipping_type: str = "no_clip",
        clipping_level: float | None = 1.0,
        beta: float | None = None,
        nu: float = 1.0,
        a_k_ratio_upper_bound: float = 1.0,
        clipping_iter_start: int | None = None,
        p_autoclip: float | None = None,
        offset: int = 1,
        clipping: Transform | None = None,
    ) -> None:
        super().__init__(params, lr, L, nu, a_k_ratio_upper_bound, clipping_iter_start, offset)
        clip(self, clipping or make_clipping(clipping_type, clipping_level, p_autoclip, beta))
