"""The calibrated problem: a quadratic under heavy-tailed gradient noise, where clipping provably matters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from experiments.errors import UserError, nearest
from experiments.tasks.base import Batch, Output, Task, epoch_generator

NOISES = ("student", "gaussian")
DIMENSIONS = 20
SMALLEST_CURVATURE, LARGEST_CURVATURE = 0.1, 1.0
DEGREES_OF_FREEDOM = 1.5  # the variance is infinite below 2
WINDOW = 200
STEPS_IN_EPOCH = 10_000  # whose noise is drawn at once; the problem itself has no epochs


class Quadratic(Task):
    r"""Minimise a quadratic whose gradient is seen under noise.

    .. math::
        f(x) = \frac{1}{2} \sum_{i=1}^{20} a_i x_i^2, \qquad
        \nabla f(x^k, \xi^k)_i = a_i x^k_i + \sigma \xi^k_i, \qquad x^0 = (1, \dots, 1),

    with :math:`a_i` evenly spaced from 0.1 to 1, so that :math:`f(x^0) = 5.5`. With ``student`` noise,
    Student's t with 1.5 degrees of freedom, SGD is thrown far away now and then, and clipping holds it; with
    ``gaussian`` noise clipping must not cost anything.

    There is no evaluation split. What is recorded as train/loss is the true f(x) where the gradient was
    taken, and an evaluation is its mean over the last 200 steps, which depends far less on luck than the last
    point.

    Args:
        noise: ``student``, or ``gaussian``, its control.
        scale: :math:`\sigma`, at least 0.
    """

    metric = "loss"
    higher_is_better = False

    def __init__(self, *, noise: str = "student", scale: float = 0.3) -> None:
        if noise not in NOISES:
            raise UserError(
                f"noise must be {' or '.join(NOISES)}, got {noise!r}.{nearest(str(noise), NOISES)}"
            )
        if not isinstance(scale, int | float) or not 0 <= scale < math.inf:
            raise UserError(f"scale must be a number in [0, inf), got {scale!r}")
        self._noise = noise
        self._scale = scale

    def load(self) -> None:
        pass

    def build_model(self) -> Point:
        return Point()

    def train_loader(self, seed: int) -> NoiseLoader:
        return NoiseLoader(self._draw, seed)

    def forward(self, model: Point, batch: Batch) -> Output:
        return Output(model(batch["noise"]), size=1)

    def evaluate(self, model: Point, device: torch.device) -> tuple[float, dict[str, float]]:
        return model.eval().recent_loss(), {}

    def _draw(self, generator: torch.Generator) -> Tensor:
        draw = student if self._noise == "student" else gaussian
        return self._scale * draw((STEPS_IN_EPOCH, DIMENSIONS), generator)


class Point(nn.Module):
    """The point x, with the losses at the last 200 points where a gradient was taken.

    The losses are buffers, so that a resumed run has them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(DIMENSIONS))
        self.register_buffer("curvature", torch.linspace(SMALLEST_CURVATURE, LARGEST_CURVATURE, DIMENSIONS))
        self.register_buffer("recent", torch.zeros(WINDOW))  # the newest last
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, noise: Tensor) -> Tensor:
        """Loss f(x), shape (), whose gradient is that of f plus ``noise``, shape (20,)."""
        loss = add_noise(0.5 * torch.dot(self.curvature * self.x, self.x), self.x, noise)
        self.recent = torch.cat([self.recent[1:], loss.detach()[None]])
        self.steps += 1
        return loss

    def recent_loss(self) -> float:
        """Mean loss of the last 200 steps, or of all if there were fewer."""
        return self.recent[-min(WINDOW, int(self.steps)) :].mean().item()


def add_noise(loss: Tensor, x: Tensor, noise: Tensor) -> Tensor:
    """The same loss, shape (), whose gradient in ``x``, shape (n,), has ``noise``, shape (n,), added."""
    return loss + torch.dot(noise, x - x.detach())  # 0, with the noise as its gradient


class NoiseLoader:
    """Gradient noise step by step, a function of (seed, epoch, step) alone: the same for every method.

    Args:
        draw: noise of ``STEPS_IN_EPOCH`` steps, one a row.
        seed: of the run.
    """

    def __init__(self, draw: Callable[[torch.Generator], Tensor], seed: int) -> None:
        self._draw = draw
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is, counted from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        return STEPS_IN_EPOCH

    def __iter__(self) -> Iterator[Batch]:
        # From epoch 1 on: the coin of a randomised clipping starts where epoch 0 of seed 0 would.
        noise = self._draw(epoch_generator(self._seed, self._epoch + 1)).float()
        return ({"noise": step} for step in noise.unbind())


def student(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    r"""Draw from Student's t with :math:`\nu = 1.5` degrees of freedom, float64 of the given shape.

    .. math::
        t = \sqrt{\nu (u^{-2 / \nu} - 1)} \cos(2 \pi v), \qquad u, v \sim U(0, 1]

    Reference:
        Bailey, Polar generation of random variates with the t-distribution, 1994.
    """
    u, v = 1 - torch.rand((2, *shape), generator=generator, dtype=torch.float64)  # 0 would give infinity
    radius = (DEGREES_OF_FREEDOM * (u ** (-2 / DEGREES_OF_FREEDOM) - 1)).sqrt()
    return radius * torch.cos(2 * math.pi * v)


def gaussian(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw from the standard normal distribution, float64 of the given shape."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)
