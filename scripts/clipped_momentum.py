"""SGD as the code of arXiv 2106.05958 clips it, beside which ours is shown on the regression."""

from collections.abc import Iterable

import torch
from torch import nn


class ClippedMomentum(torch.optim.Optimizer):
    r"""SGD that clamps each element of its momentum, where clipped SGD clamps those of the gradient.

    .. math::
        b \leftarrow \mathrm{clamp}(\mu b + g, -T, T), \qquad w \leftarrow w - \gamma b

    An element moves by :math:`\gamma T` a step at most; clipped gradients let it gain up to
    :math:`\gamma T / (1 - \mu)`.

    Args:
        params: parameters, or groups of them.
        lr: :math:`\gamma`.
        momentum: :math:`\mu`.
        threshold: :math:`T`.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], *, lr: float, momentum: float, threshold: float
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "threshold": threshold})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["momentum"] = torch.zeros_like(param)
                bound = group["threshold"]
                momentum = state["momentum"].mul_(group["momentum"]).add_(param.grad).clamp_(-bound, bound)
                param.sub_(momentum, alpha=group["lr"])
