"""Shared by the tests of torch_clip: gradients with heavy tails, a small model, the path of other devices."""

import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

SHAPES = ((7,), (4, 3), (2, 3, 5))
LONG = (128, 129)  # norms.py takes a dot product for gradients as long as this


@pytest.fixture
def heavy_tailed() -> Callable[..., list[list[torch.Tensor]]]:
    """Gradients of some steps whose norms have a Student-t(2) tail: (seed, steps, dtype) -> tensors."""

    def make(
        seed: int, steps: int, dtype: torch.dtype = torch.float32, long: bool = False
    ) -> list[list[torch.Tensor]]:
        shapes = (*SHAPES, LONG) if long else SHAPES
        rng = np.random.default_rng(seed)
        scales = np.abs(rng.standard_t(2, steps))
        return [
            [torch.tensor(rng.standard_normal(shape) * scale, dtype=dtype) for shape in shapes]
            for scale in scales
        ]

    return make


@pytest.fixture
def parameters() -> Callable[..., list[torch.nn.Parameter]]:
    """Parameters of ones that have the given gradients; a list or a number makes a gradient too."""

    def make(*grads: object, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
        params = []
        for grad in grads:
            grad = grad.clone() if isinstance(grad, torch.Tensor) else torch.tensor(grad, dtype=dtype)
            params.append(torch.nn.Parameter(torch.ones_like(grad)))
            params[-1].grad = grad
        return params

    return make


@pytest.fixture
def train() -> Callable[..., list[torch.Tensor]]:
    """Some steps of ``optimizer`` on parameters, given each step's gradients; returns the parameters.

    Every third step's gradients are 30 times as long, so that methods have something to clip.
    """

    def run(
        optimizer: torch.optim.Optimizer,
        params: list[torch.nn.Parameter],
        steps: range,
        closure: bool = False,
    ) -> list[torch.Tensor]:
        for step in steps:
            rng = torch.Generator().manual_seed(step)

            def backward(step: int = step, rng: torch.Generator = rng) -> torch.Tensor:
                for param in params:
                    noise = torch.randn(param.shape, generator=rng).to(param.dtype)
                    param.grad = noise * (30 if step % 3 == 2 else 1)
                return torch.tensor(float(step))

            if closure:
                optimizer.step(backward)
            else:
                backward()
                optimizer.step()
        return [param.detach().clone() for param in params]

    return run


@pytest.fixture
def weights() -> Callable[[], list[torch.nn.Parameter]]:
    """Three equal parameters at every call."""

    def make() -> list[torch.nn.Parameter]:
        rng = torch.Generator().manual_seed(0)
        return [torch.nn.Parameter(torch.randn(shape, generator=rng)) for shape in ((4, 3), (5,), (2, 2))]

    return make


@pytest.fixture
def same() -> Callable[[object, object], bool]:
    """Whether two nested states are equal bit for bit; NaN equals NaN."""

    def equal(one: object, other: object) -> bool:
        if isinstance(one, torch.Tensor):
            alike = one.dtype == other.dtype and one.shape == other.shape
            return alike and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
        if isinstance(one, dict):
            return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
        if isinstance(one, list | tuple):
            return len(one) == len(other) and all(map(equal, one, other))
        return one == other or (one != one and other != other)

    return equal


@pytest.fixture
def device_path(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, CPU tensors take the path of a device that the host must not wait for."""

    def force() -> None:
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] == "torch_clip" and hasattr(module, "on_host"):
                monkeypatch.setattr(module, "on_host", lambda tensor: False)

    return force


@pytest.fixture(params=["host", "device"])
def path(request: pytest.FixtureRequest, device_path: Callable[[], None]) -> str:
    """The test runs on both paths: of a host that may read, and of a device that it must not wait for."""
    if request.param == "device":
        device_path()
    return request.param
