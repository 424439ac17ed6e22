"""The toy expectation problem of arXiv 2005.10785: four noises of one variance, and how late losses spike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from experiments.errors import UserError, nearest
from experiments.tasks.base import Batch, Output, Task
from experiments.tasks.quadratic import STEPS_IN_EPOCH, NoiseLoader, add_noise, gaussian

DIMENSIONS = 100
START = 0.01  # of coordinate i times i, from 0
WEIBULL_SHAPE = 0.2
BURR_SHAPES = 1.0, 2.3  # the tail falls like a power of -2.3: the variance is barely finite


class Expectation(Task):
    r"""Minimise a square whose gradient is seen under noise of zero mean and unit variance.

    .. math::
        f(x) = \frac{1}{2} \|x\|^2, \qquad \nabla f(x^k, \xi^k) = x^k + \xi^k, \qquad
        x^0 = (0, 0.01, \dots, 0.99),

    so that :math:`f(x^0) = 16.4175`. The coordinates of :math:`\xi^k` are independent: standard normal, or
    exponential, Weibull (shape 0.2) or Burr type XII (shapes 1 and 2.3), shifted and scaled. The mean loss
    that SGD with a step of :math:`\gamma` settles at depends on the variance alone,
    :math:`100 \gamma / (2 (2 - \gamma))`; what the tail changes are the spikes.

    There is no evaluation split. What is recorded as train/loss is the true f(x) where the gradient was
    taken. An evaluation looks at the second half of the steps so far: its loss is their mean loss, beside it
    stand their ``median`` and ``max``.

    Args:
        noise: ``normal``, ``exponential``, ``weibull`` or ``burr``.

    Reference:
        Gorbunov, Danilova, Gasnikov, Stochastic optimization with heavy-tailed noise via accelerated gradient
        clipping, 2020, https://arxiv.org/abs/2005.10785
    """

    metric = "loss"
    higher_is_better = False

    def __init__(self, *, noise: str = "weibull") -> None:
        if noise not in NOISES:
            raise UserError(f"noise must be {', '.join(NOISES)}, got {noise!r}.{nearest(str(noise), NOISES)}")
        self._draw = NOISES[noise]

    def load(self) -> None:
        pass

    def build_model(self) -> RememberedPoint:
        return RememberedPoint()

    def train_loader(self, seed: int) -> NoiseLoader:
        return NoiseLoader(lambda generator: self._draw((STEPS_IN_EPOCH, DIMENSIONS), generator), seed)

    def forward(self, model: RememberedPoint, batch: Batch) -> Output:
        return Output(model(batch["noise"]), size=1)

    def evaluate(self, model: RememberedPoint, device: torch.device) -> tuple[float, dict[str, float]]:
        losses = model.eval().losses()
        late = losses[len(losses) // 2 :]
        return late.mean().item(), {"median": late.quantile(0.5).item(), "max": late.max().item()}


class RememberedPoint(nn.Module):
    """The point x, with the losses at all points where a gradient was taken; they travel with its state."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(START * torch.arange(DIMENSIONS))
        self._steps: list[Tensor] = []

    def forward(self, noise: Tensor) -> Tensor:
        """Loss f(x), shape (), whose gradient is that of f plus ``noise``, shape (100,)."""
        loss = add_noise(0.5 * torch.dot(self.x, self.x), self.x, noise)
        self._remember(loss)
        return loss

    @torch.compiler.disable  # or a compiled forward is compiled anew whenever the list has grown
    def _remember(self, loss: Tensor) -> None:
        self._steps.append(loss.detach()[None])

    def losses(self) -> Tensor:
        """Loss of every step so far, oldest first, (steps,)."""
        self._steps = [torch.cat([self.x.new_empty(0), *self._steps])]
        return self._steps[0]

    def get_extra_state(self) -> Tensor:
        return self.losses()

    def set_extra_state(self, state: Tensor) -> None:
        self._steps = [state.to(self.x.device)]


def exponential(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw from the exponential distribution less its mean, float64 of the given shape."""
    return _waiting_times(shape, generator) - 1


def weibull(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    r"""Draw from the standardised Weibull distribution of shape :math:`c = 0.2`, float64.

    .. math::
        \xi = s \left(e^{1 / c} - \Gamma(1 + 1 / c)\right), \qquad
        s = \left(\Gamma(1 + 2 / c) - \Gamma(1 + 1 / c)^2\right)^{-1 / 2}, \qquad e \sim \text{Exp}(1)
    """
    power = 1 / WEIBULL_SHAPE
    mean = math.gamma(1 + power)
    scale = (math.gamma(1 + 2 * power) - mean**2) ** -0.5
    return scale * (_waiting_times(shape, generator) ** power - mean)


def burr(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    r"""Draw from the standardised Burr type XII distribution of shapes :math:`c = 1, d = 2.3`, float64.

    .. math::
        \xi = \frac{(u^{-1 / d} - 1)^{1 / c} - m_1}{\sqrt{m_2 - m_1^2}}, \qquad
        m_r = d \, \mathrm{B}\left(d - \frac{r}{c}, 1 + \frac{r}{c}\right), \qquad u \sim U(0, 1]
    """
    c, d = BURR_SHAPES

    def moment(r: int) -> float:
        one, other = d - r / c, 1 + r / c
        return d * math.gamma(one) * math.gamma(other) / math.gamma(one + other)

    u = 1 - torch.rand(shape, generator=generator, dtype=torch.float64)  # 0 would give infinity
    deviation = math.sqrt(moment(2) - moment(1) ** 2)
    return ((u ** (-1 / d) - 1) ** (1 / c) - moment(1)) / deviation


def _waiting_times(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return -torch.log1p(-torch.rand(shape, generator=generator, dtype=torch.float64))


NOISES: Mapping[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "normal": gaussian,
    "exponential": exponential,
    "weibull": weibull,
    "burr": burr,
}
