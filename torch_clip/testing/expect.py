"""What laws are written with: heavy-tailed gradients, runs of a clipping, comparisons that say numbers."""

from __future__ import annotations

import copy
import inspect
import io
import math
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from torch_clip.attach import clip
from torch_clip.clipping import Telemetry

Make = Callable[..., Any]
"""Makes a new clipping at each call without arguments."""
Grads = list[Tensor | None]
"""Of one step, one a parameter."""

SHAPES = ((7,), (4, 3), (2, 3, 5))
COUNTS = ("steps", "clipped_steps", "skipped_steps")
# What a state may tell of steps without effect; not one of these may come to anything in those that follow.
COUNTED = frozenset((*COUNTS, "skipped"))


class NotClaimed(Exception):
    """The clipping does not say that it keeps this law."""


class Skipped(Exception):
    """The law cannot be tried here."""


def heavy_tailed(steps: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Grads]:
    """Gradients of shapes ``SHAPES`` whose norms are Student-t(2) around 0.1, 1 and 10 in turn."""
    rng = torch.Generator().manual_seed(seed)
    size = math.sqrt(sum(math.prod(shape) for shape in SHAPES))
    stream = []
    for step in range(steps):
        normal, exponential = torch.randn((), generator=rng), -torch.rand((), generator=rng).log()
        length = 10.0 ** (step % 3 - 1) * abs(normal) / exponential.clamp(1e-6).sqrt() / size
        stream.append([(torch.randn(shape, generator=rng) * length).to(dtype) for shape in SHAPES])
    return stream


class Run:
    """A clipping and the parameters that it meets at each step, as its state may belong to them."""

    def __init__(self, clipping: Any, like: Grads) -> None:
        self.clipping = clipping
        self.params = [torch.nn.Parameter(torch.ones_like(grad)) for grad in like]

    def step(self, grads: Grads) -> dict[str, Any]:
        """The gradients as clipped, and the telemetry in numbers."""
        assign(self.params, grads)
        said = self.clipping.clip_(self.params)
        after = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.params]
        return {"gradient": after, **numbers(said)}

    def remembered(self) -> dict[str, Any]:
        """The state without counts and without generators, which a step without effect may advance."""
        return {
            path: value
            for path, value in leaves(copy.deepcopy(self.clipping.state_dict())).items()
            if not COUNTED.intersection(path.split(".")) and getattr(value, "dtype", None) is not torch.uint8
        }


def assign(params: list[Tensor], grads: Grads) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.clone()


def attach(
    make: Make | None, grads: Grads, optimizer: type[Optimizer] = SGD, **settings: Any
) -> tuple[Optimizer, list[Tensor]]:
    """An optimizer (of no clipping for None), and its parameters."""
    params = [torch.nn.Parameter(torch.ones_like(grad)) for grad in grads]
    settings = {"lr": 0.1, **({"momentum": 0.9} if optimizer is SGD else {}), **settings}
    made = optimizer(params, **settings)
    return (made if make is None else clip(made, make())), params


def train(optimizer: Optimizer, params: list[Tensor], stream: list[Grads]) -> list[Tensor]:
    for grads in stream:
        assign(params, grads)
        optimizer.step()
    return [param.detach().clone() for param in params]


def takes(make: Make, setting: str) -> bool:
    return setting in inspect.signature(make).parameters


def numbers(said: Telemetry) -> dict[str, float]:
    return {name: float(value) for name, value in said._asdict().items()}


def norm_of(tensors: Grads) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def through_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """What is in a nested state, by its dotted path."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return {path: value}
    return {p: v for k, inner in items for p, v in leaves(inner, f"{path}.{k}" if path else str(k)).items()}


def expect(truth: bool | Tensor, message: str) -> None:
    if not truth:  # an assert statement is gone under python -O
        raise AssertionError(message)


def expect_equal(saw: Any, wanted: Any, what: str, rtol: float = 0.0) -> None:
    """Nested states are equal bit for bit, NaN equal to NaN; or to ``rtol`` of a tensor's largest element."""
    saw, wanted = leaves(saw), leaves(wanted)
    expect(saw.keys() == wanted.keys(), f"{what}: expected {', '.join(wanted)}, saw {', '.join(saw)}")
    for path, expected in wanted.items():
        got, where = saw[path], f"{what}: {path}" if path else what
        if not isinstance(expected, Tensor | float) or not isinstance(got, Tensor | float | int):
            expect(
                type(got) is type(expected) and got == expected, f"{where}: expected {expected}, saw {got}"
            )
            continue
        kinds = [(getattr(x, "dtype", float), tuple(getattr(x, "shape", ()))) for x in (expected, got)]
        expect(kinds[0] == kinds[1], f"{where}: expected {kinds[0]}, saw {kinds[1]}")
        a, b = (torch.as_tensor(x).detach().double().flatten() for x in (got, expected))
        finite = b[b.isfinite()].abs()
        slack = rtol * float(finite.max()) if len(finite) else 0.0
        wrong = ~torch.isclose(a, b, rtol=0.0, atol=slack, equal_nan=True)
        if wrong.any():
            at = int(wrong.nonzero()[0])
            share = f" ({int(wrong.sum())} of {len(b)} elements differ)" if len(b) > 1 else ""
            raise AssertionError(f"{where}: expected {float(b[at]):.9g}, saw {float(a[at]):.9g}{share}")


def origin(error: BaseException) -> str:
    """The last line at work outside of torch and of the laws."""
    others = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))
    frames = traceback.extract_tb(error.__traceback__)
    its = [frame for frame in frames if not frame.filename.startswith((*others, "<"))]
    return f"{Path(its[-1].filename).name}:{its[-1].lineno}" if its else "a line of torch"
