"""torch's optimizers with clipping attached."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from torch.optim import SGD
from torch.optim.optimizer import ParamsT

from torch_clip.attach import clip
from torch_clip.clipping import Clipping
from torch_clip.methods import CLIPPINGS


def make_clipping(
    clipping_type: str = "norm",
    clipping_level: float | None = None,
    p_autoclip: float | None = None,
    beta: float | None = None,
) -> Clipping:
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
        clipping: Clipping | None = None,
        **sgd: Any,
    ) -> None:
        super().__init__(params, lr=lr, momentum=momentum, **sgd)
        clip(self, clipping or make_clipping(clipping_type, clipping_level, p_autoclip, beta))
