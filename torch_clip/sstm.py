"""Clipped Stochastic Similar Triangles Method: an accelerated method for heavy-tailed noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from torch_clip.clipping import Clipping, Transform
from torch_clip.thresholds import Constant


class SSTM(Optimizer):
    r"""Stochastic Similar Triangles Method, ready for a clipping whose threshold it schedules.

    .. math::
        \alpha_{k+1} &= \frac{\text{lr}}{2L} (k + s)^{2\nu / (1 + \nu)}, \qquad
        A_{k+1} = A_k + \alpha_{k+1} \\
        x^{k+1} &= \frac{A_k y^k + \alpha_{k+1} z^k}{A_{k+1}}, \qquad
        g = \text{clip}\left(\nabla f(x^{k+1}), \ \frac{B}{\alpha_{k+1}}\right) \\
        z^{k+1} &= z^k - \alpha_{k+1} g, \qquad y^{k+1} = \frac{A_k y^k + \alpha_{k+1} z^{k+1}}{A_{k+1}}

    from :math:`A_0 = 0`, :math:`y^0 = z^0 = x^0`; B is the threshold of the clipping that is attached, see
    ``torch_clip.clip``. While training the parameters hold x, where gradients are taken; the method's output
    is y: ``eval()`` puts it into the parameters, ``train()`` takes it out. One buffer a parameter (z,
    float32).

    Args:
        params: as in torch.
        lr: only lr / L matters. A scheduler's change acts from the step after the next, since the next
            point is laid out already.
        L: smoothness of the loss, in units of gradient norm per parameter distance.
        nu: in [0, 1], how smooth the gradient is taken to be (Hoelder exponent); 0 is a constant step.
        a_k_ratio_upper_bound: in (0, 1]; keeps :math:`A_k / A_{k+1}` at most this, so that new gradients
            never lose all weight. 1 is the method itself.
        clipping_iter_start: k at which the threshold in use shall equal the clipping's own; None multiplies
            it by :math:`1 / \alpha_{k+1}` as it stands.
        offset: s; 1 as in arXiv 2106.05958, 2 as in arXiv 2005.10785.

    Raises:
        ValueError: a setting is out of its range.

    Reference:
        Gorbunov, Danilova, Gasnikov, Stochastic optimization with heavy-tailed noise via accelerated gradient
        clipping, 2020, https://arxiv.org/abs/2005.10785; Gorbunov et al., Near-optimal high probability
        complexity bounds for non-smooth stochastic optimization with heavy-tailed noise, 2021,
        https://arxiv.org/abs/2106.05958
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        L: float = 1.0,
        nu: float = 1.0,
        a_k_ratio_upper_bound: float = 1.0,
        clipping_iter_start: int | None = None,
        offset: int = 1,
    ) -> None:
        if not 0 <= lr < math.inf:
            raise ValueError(f"lr must be in [0, inf), got {lr}")
        if not 0 < L < math.inf:
            raise ValueError(f"L must be in (0, inf), got {L}")
        if not 0 <= nu <= 1:
            raise ValueError(f"nu must be in [0, 1], got {nu}")
        if not 0 < a_k_ratio_upper_bound <= 1:
            raise ValueError(f"a_k_ratio_upper_bound must be in (0, 1], got {a_k_ratio_upper_bound}")
        if clipping_iter_start is not None and not (
            clipping_iter_start == int(clipping_iter_start) and clipping_iter_start >= 0
        ):
            raise ValueError(
                f"clipping_iter_start must be a whole number from 0, or None, got {clipping_iter_start}"
            )
        if offset not in (1, 2):
            raise ValueError(f"offset must be 1 or 2, got {offset}")
        defaults = {
            "lr": lr,
            "L": L,
            "nu": nu,
            "a_k_ratio_upper_bound": a_k_ratio_upper_bound,
            "clipping_iter_start": clipping_iter_start,
            "offset": offset,
            "k": 0,
            "A": 0.0,
            "alpha": None,
            "training": True,
        }
        super().__init__(params, defaults)

    @property
    def threshold_scale(self) -> float:
        """What a clipping attached to this optimizer multiplies its threshold by in the coming step."""
        scales = []
        for group in self.param_groups:
            if all(param.grad is None for param in group["params"]):
                continue  # takes no step
            start = group["clipping_iter_start"]
            if start is not None:
                # alpha at `start` over alpha now, both of one learning rate, which a scheduler may change.
                scales.append(_growth(group, start) / _growth(group, group["k"]))
            elif alpha := _alpha(group) if group["alpha"] is None else group["alpha"]:
                scales.append(1 / alpha)
        # The largest step decides, so that no step of z is longer than B; with lr = 0 there is none.
        return min(scales, default=1.0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; returns what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if not group["training"]:
                raise RuntimeError("step() after eval(): call train() first, which puts x back")
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                self._step_group(group, params)
        return loss

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        grads = [param.grad for param in params]
        z = [self._z(param) for param in params]
        A, alpha = group["A"], _alpha(group) if group["alpha"] is None else group["alpha"]
        # In place of y, which is not stored: the parameters become y here and the next x below.
        torch._foreach_add_(params, grads, alpha=-(alpha**2) / (A + alpha) if alpha else 0.0)
        torch._foreach_add_(z, grads, alpha=-alpha)

        group["k"] += 1
        following = _alpha(group)
        bound = group["a_k_ratio_upper_bound"]
        A += alpha
        if bound < 1 and following:
            A = min(A, bound * following / (1 - bound))
        group["A"], group["alpha"] = A, following
        if following:
            # Those without a gradient this time too: theirs was 0, and x moves on between y and z.
            started = [param for param in group["params"] if "z" in self.state.get(param, ())]
            self._lerp_(started, [self._z(param) for param in started], following / (A + following))

    def _z(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "z" not in state:
            # Small steps would be lost in a half-precision sum.
            dtype = torch.promote_types(param.dtype, torch.float32)
            state["z"] = param.detach().to(dtype, copy=True)
        return state["z"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, with z in the dtype it was saved in."""
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for key, param in zip(keys, params, strict=True):
            if key in saved:  # torch casts to the parameter's dtype, which is too coarse for a sum
                self.state[param]["z"] = saved[key]["z"].to(param.device, copy=True)

    @staticmethod
    def _lerp_(params: list[Tensor], towards: list[Tensor], weight: float) -> None:
        for param, target in zip(params, towards, strict=True):
            param.lerp_(target.to(param.dtype), weight)

    @torch.no_grad()
    def eval(self) -> None:
        """Put the method's output y into the parameters. Does nothing if it is there."""
        self._swap(training=False)

    @torch.no_grad()
    def train(self) -> None:
        """Put x back, where the next gradient is to be taken. Does nothing if it is there."""
        self._swap(training=True)

    def restart(self) -> None:
        """Begin anew from where the parameters are: k = 0, A = 0, y = z = x."""
        self.state.clear()
        for group in self.param_groups:
            group.update(k=0, A=0.0, alpha=None, training=True)

    def check_clipping(self, clipping: Transform) -> None:
        """Raise ``ValueError`` for a clipping whose threshold cannot be scheduled; called by ``clip``."""
        if not (isinstance(clipping, Clipping) and isinstance(clipping.threshold, Constant)):
            raise ValueError(
                f"SSTM schedules the threshold, and {type(clipping).__name__} finds its own; "
                "choose a method with a constant threshold, such as NormClip"
            )

    def _swap(self, *, training: bool) -> None:
        for group in self.param_groups:
            if group["training"] == training:
                continue
            group["training"] = training
            A, alpha = group["A"], group["alpha"]
            if not A or not alpha:
                continue  # x = y so far
            params = [param for param in group["params"] if "z" in self.state.get(param, ())]
            z = [self.state[param]["z"] for param in params]
            # x = y + w (z - y) with w = alpha / (A + alpha), so y = x + v (z - x) with v = -alpha / A.
            self._lerp_(params, z, alpha / (A + alpha) if training else -alpha / A)


def _alpha(group: dict[str, Any]) -> float:
    return float(group["lr"]) / (2 * group["L"]) * _growth(group, group["k"])


def _growth(group: dict[str, Any], k: int) -> float:
    return (k + group["offset"]) ** (2 * group["nu"] / (1 + group["nu"]))
