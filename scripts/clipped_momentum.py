"""SGD as the code of arXiv 2106.05958 clips it, beside which ours is shown on the regression."""

from collections.abc import Iterable

import torch
from torch import nn


class ClippedMomentum(torch.optim.Optimizer):
    r"""SGD that clamps each element of its momentum, where clipped SGD clamps those of the gradient.

    .. math::
        b \leftarrow \mu b + g, \qquad w \leftarrow w - \gamma \, \mathrm{clamp}(b, -T, T)

    The momentum stays as it is, so a spike goes on at the threshold until it has decayed below.

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
                momentum = state["momentum"].mul_(group["momentum"]).add_(param.grad)
                bound = group["threshold"]
                param.sub_(momentum.clamp(-bound, bound), alpha=group["lr"])
