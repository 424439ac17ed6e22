"""B44: the quotient is of one batch, robust, and leaves the model alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from torch_clip.smoothness import estimate_smoothness


class Quadratic(nn.Module):
    def __init__(self, curvature: list[float]) -> None:
        super().__init__()
        self.curvature = torch.tensor(curvature)
        self.x = nn.Parameter(torch.ones(len(curvature)))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return 0.5 * (self.curvature * self.x.square()).sum() + (noise * self.x).sum()


def loss(model: nn.Module, noise: torch.Tensor) -> torch.Tensor:
    return model(noise)


def test_gradient_noise_does_not_enter():
    torch.manual_seed(0)
    batches = [100 * torch.distributions.StudentT(1.5).sample((3,)) for _ in range(50)]
    model = Quadratic([2.0, 2.0, 2.0])
    # Gradients of different batches would differ by the noise, a hundred times the curvature.
    assert estimate_smoothness(model, loss, batches, lr=0.01) == pytest.approx(2.0, rel=1e-3)
    between = estimate_smoothness(Quadratic([0.1, 1.0, 3.0]), loss, batches, quantile=1.0)
    assert 0.1 < between <= 3.0 * (1 + 1e-3)


def test_model_gradients_buffers_and_generators_stay():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    model(torch.randn(8, 4)).sum().backward()
    state = copy.deepcopy(model.state_dict())
    grads = [param.grad.clone() for param in model.parameters()]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    found = estimate_smoothness(
        model, lambda net, x: net(x).square().mean(), [torch.ones(8, 4).cumsum(0)] * 3
    )
    assert torch.equal(torch.rand(2), expected)
    assert math.isfinite(found)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))


@pytest.mark.parametrize(
    ("curvature", "dtype", "tolerance"), [(1e-4, torch.float32, 0.05), (6.0, torch.bfloat16, 0.2)]
)
def test_the_step_is_measured_as_taken(curvature, dtype, tolerance):
    # Rounding takes other steps than lr * gradient.
    model = Quadratic([curvature] * 64).to(dtype)
    found = estimate_smoothness(model, loss, [torch.zeros(64, dtype=dtype)], lr=1e-2 / curvature**0.5)
    assert found == pytest.approx(curvature, rel=tolerance)


def test_steps_that_rounding_swallows_are_left_out():
    model = Quadratic([1.0]).to(torch.bfloat16)
    with pytest.raises(ValueError, match="none of 1 batches"):
        estimate_smoothness(model, loss, [torch.zeros(1, dtype=torch.bfloat16)], lr=1e-4)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        estimate_smoothness(model.requires_grad_(False), loss, [torch.zeros(1)])
    with pytest.raises(ValueError, match="lr must be in"):
        estimate_smoothness(model, loss, [], lr=math.inf)


def test_steps_of_no_length_are_left_out():
    model = Quadratic([2.0])
    nothing = torch.tensor([-2.0])  # the gradient at x = 1 is 0
    assert estimate_smoothness(model, loss, [nothing, torch.tensor([1.0])]) == pytest.approx(2.0, rel=1e-3)
    with pytest.raises(ValueError, match="none of 2 batches"):
        estimate_smoothness(model, loss, [nothing, nothing])
    with pytest.raises(ValueError, match="lr must be in"):
        estimate_smoothness(model, loss, [], lr=0.0)
    with pytest.raises(ValueError, match="quantile must be in"):
        estimate_smoothness(model, loss, [], quantile=2.0)
