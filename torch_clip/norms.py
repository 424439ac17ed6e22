"""How long is a gradient: of all tensors as one vector, of each tensor, or of each element."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from torch_clip.scalars import Number, clip_coef, number, on_host, where

# Below this many elements one foreach call beats a call per tensor; above it the dot product, which uses all
# cores and adds up in many lanes, is faster and ten times as exact as the foreach norm (measured on CPU).
_DOT_FROM = 1 << 14
_PIECE = 1 << 17  # elements; 512 KiB


class Grads:
    """The gradients of some parameters, as plain dense tensors that alias their storage.

    Sparse gradients are coalesced and stand for their values, complex ones for their real view, DTensors for
    their local shard.

    Attributes:
        params: the parameters that have a gradient.
        tensors: their gradients; writing to them writes to the parameters' ``.grad``.
        meshes: of each sharded gradient, by its index, the process groups over which it is sharded.
    """

    __slots__ = ("meshes", "params", "tensors")

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.params = [param for param in params if param.grad is not None]
        self.tensors = [param.grad for param in self.params]
        self.meshes: dict[int, tuple] = {}
        for i, grad in enumerate(self.tensors):
            # One cheap look for the common case: a plain, strided, real tensor.
            if type(grad) is Tensor and grad.layout is torch.strided and not grad.is_complex():
                continue
            self.tensors[i] = self._plain(i, grad)

    def _plain(self, i: int, grad: Tensor) -> Tensor:
        if hasattr(grad, "to_local"):
            if groups := _sharded_over(grad):
                self.meshes[i] = groups
            grad = grad.to_local()
        if grad.layout is not torch.strided:
            if not grad.is_coalesced():
                grad = self.params[i].grad = grad.coalesce()
            grad = grad._values()
        return torch.view_as_real(grad) if grad.is_complex() else grad


def _sharded_over(grad: Tensor) -> tuple:
    """The process groups whose ranks hold different parts of a DTensor."""
    if any(placement.is_partial() for placement in grad.placements):
        raise ValueError(
            f"a gradient with placements {grad.placements} is not reduced yet; reduce it, then clip"
        )
    return tuple(
        grad.device_mesh.get_group(dim)
        for dim, placement in enumerate(grad.placements)
        if not placement.is_replicate()  # strided shards, of tensor parallelism, are no `is_shard()`
    )


def _sums_by_dot(grad: Tensor) -> bool:
    return (
        grad.numel() >= _DOT_FROM and grad.dtype is torch.float32 and on_host(grad) and grad.is_contiguous()
    )


def _norm_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def tensor_norms(grads: Grads) -> Tensor:
    """L2 norm of each gradient, shape (len(grads.tensors),), on the device of the first.

    Accumulated in float32, or in float64 for float64 gradients, whatever their dtype: float16 would overflow
    at 255 elements of 16, bfloat16 would stop growing at 16.
    """
    groups: dict[tuple, list[int]] = defaultdict(list)
    for i, grad in enumerate(grads.tensors):
        groups[_sums_by_dot(grad), grad.device, grad.dtype].append(i)

    norms: list[Tensor] = [None] * len(grads.tensors)  # type: ignore[list-item]
    for (dot, _, dtype), indices in groups.items():
        tensors = [grads.tensors[i] for i in indices]
        if dot:
            flat = (tensor.view(-1) for tensor in tensors)
            found = [torch.dot(vector, vector).sqrt_() for vector in flat]
        elif dtype is torch.float64 or dtype is torch.float32:
            found = torch._foreach_norm(tensors, 2)
        else:
            found = torch._foreach_norm(tensors, 2, dtype=torch.float32)
        for i, norm in zip(indices, found, strict=True):
            norms[i] = norm
    if len({(norm.device, norm.dtype) for norm in norms}) > 1:
        dtype = torch.float64 if any(norm.dtype is torch.float64 for norm in norms) else torch.float32
        norms = [norm.to(norms[0].device, dtype, non_blocking=True) for norm in norms]
    _sum_over_shards_(norms, grads.meshes, squared=True)
    return torch.stack(norms)


def _sum_over_shards_(values: list[Tensor], meshes: dict[int, tuple], *, squared: bool = False) -> None:
    """Replace values of shards by those of whole gradients: one reduction for each set of process groups.

    Args:
        values: one of each gradient.
        meshes: see ``Grads``.
        squared: the squares add up, not the values.
    """
    by_groups: dict[tuple, list[int]] = defaultdict(list)
    for i, groups in meshes.items():
        by_groups[groups].append(i)
    for groups, indices in by_groups.items():
        sums = torch.stack([values[i] for i in indices])
        if squared:
            sums.square_()
        for group in groups:
            torch.distributed.all_reduce(sums, group=group)
        if squared:
            sums.sqrt_()
        for i, value in zip(indices, sums.unbind(), strict=True):
            values[i] = value


class Measured(NamedTuple):
    """A step between measuring and scaling."""

    total: Number
    """Norm of all gradients."""
    norms: Tensor | None
    """Norm of each gradient; None when there are none."""
    threshold: Number
    """The threshold of this step."""
    finite: bool | Tensor
    """Whether the norm is finite."""


Fires = Callable[[Number], "bool | Tensor"]
"""The gate's decision, given a coefficient or a tensor of them."""


class Scope(ABC):
    """What is clipped as one."""

    unit: ClassVar[str]
    """What the share of clipped units counts."""
    measure: bool = True
    """Whether the norms of the gradients are taken at all."""

    @abstractmethod
    def scale_(self, grads: Grads, measured: Measured, fires: Fires) -> tuple[Number, Number]:
        """Clip in place; return norm after / norm before, and the share of units clipped."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Global(Scope):
    """The gradients of all parameters as one vector."""

    unit = "steps"

    def coef(self, total: Number, threshold: Number, fires: Fires) -> Number:
        """The factor for every gradient, in [0, 1]."""
        coef = clip_coef(total, threshold)
        return where(fires(coef), coef, 1.0)

    def scale_(self, grads: Grads, measured: Measured, fires: Fires) -> tuple[Number, Number]:
        coef = self.coef(measured.total, measured.threshold, fires)
        if isinstance(coef, Tensor) or coef != 1.0:
            multiply_(grads.tensors, coef)
        return coef, share_of(coef)


class PerTensor(Scope):
    """The gradient of each parameter by itself."""

    unit = "tensors"

    def scale_(self, grads: Grads, measured: Measured, fires: Fires) -> tuple[Number, Number]:
        coefs = clip_coef(measured.norms, measured.threshold)
        coefs = where(fires(coefs), coefs, 1.0)
        if isinstance(measured.total, Tensor):
            multiply_each_(grads.tensors, coefs)
        else:
            for grad, coef in zip(grads.tensors, coefs.tolist(), strict=True):
                if coef != 1.0:
                    grad.mul_(coef)
        after = torch.linalg.vector_norm(measured.norms * coefs)
        return ratio(number(after), measured.total), number((coefs < 1).to(coefs.dtype).mean())


class Element(Scope):
    """Each element by itself.

    Args:
        measure: False clamps and looks at nothing: the telemetry of norms and of the share clipped is NaN.
    """

    unit = "elements"

    def __init__(self, measure: bool = True) -> None:
        self.measure = measure

    def scale_(self, grads: Grads, measured: Measured, fires: Fires) -> tuple[Number, Number]:
        total, threshold = measured.total, measured.threshold
        if not self.measure:
            for grad in grads.tensors:
                grad.clamp_(-threshold, threshold)
            return math.nan, math.nan
        if not isinstance(total, Tensor) and total <= threshold:  # then no element exceeds it either
            return 1.0, 0.0
        found = [_clamp_(grad, threshold, measured.finite) for grad in grads.tensors]
        clipped, norms = zip(*found, strict=True)
        clipped, norms = list(clipped), list(norms)
        _sum_over_shards_(clipped, grads.meshes)
        _sum_over_shards_(norms, grads.meshes, squared=True)
        device = clipped[0].device
        clipped, norms = (
            torch.stack([value.to(device, non_blocking=True) for value in values])
            for values in (clipped, norms)
        )
        elements = sum(
            grads.params[i].grad.numel() if i in grads.meshes else grad.numel()  # of all shards
            for i, grad in enumerate(grads.tensors)
        )
        after = torch.linalg.vector_norm(norms)
        return ratio(number(after), total), number(clipped.sum() / max(elements, 1))


def _clamp_(grad: Tensor, threshold: float, finite: bool | Tensor) -> tuple[Tensor, Tensor]:
    """Clamp in place; return how many elements were clipped, and the norm after, shapes ()."""
    if finite is not True or not _sums_by_dot(grad):  # the pieces would count NaN, which is not itself
        clipped = torch.count_nonzero(grad.abs() > threshold)
        grad.clamp_(-threshold, threshold)
        return clipped, torch.linalg.vector_norm(grad, dtype=_norm_dtype(grad.dtype))
    # In pieces that stay in the cache, so that memory is read and written once; and all in float, since
    # writing and summing booleans takes torch several times as long.
    clamped, changed = grad.new_empty(2, min(_PIECE, grad.numel()))
    clipped = squares = 0.0
    for piece in grad.view(-1).split(_PIECE):
        n = len(piece)
        torch.clamp(piece, -threshold, threshold, out=clamped[:n])
        clipped += torch.ne(piece, clamped[:n], out=changed[:n]).sum().item()
        squares += torch.dot(clamped[:n], clamped[:n]).item()
        piece.copy_(clamped[:n])
    return torch.tensor(clipped, dtype=torch.float64), torch.tensor(math.sqrt(squares))


def multiply_(tensors: list[Tensor], coef: Number) -> None:
    """Multiply every tensor by one coefficient, wherever it lies."""
    if not isinstance(coef, Tensor):
        torch._foreach_mul_(tensors, coef)
        return
    by_device = defaultdict(list)
    for tensor in tensors:
        by_device[tensor.device].append(tensor)
    for device, there in by_device.items():
        torch._foreach_mul_(there, coef.to(device, non_blocking=True))


def multiply_each_(tensors: list[Tensor], coefs: Tensor) -> None:
    """Multiply each tensor by its own coefficient, without reading it."""
    by_device = defaultdict(list)
    for i, tensor in enumerate(tensors):
        by_device[tensor.device].append(i)
    for device, there in by_device.items():
        factors = coefs.to(device, non_blocking=True).unbind()
        torch._foreach_mul_([tensors[i] for i in there], [factors[i] for i in there])


def share_of(coef: Number) -> Number:
    """1 where the whole gradient was shortened, else 0."""
    return (coef < 1).to(coef.dtype) if isinstance(coef, Tensor) else float(coef < 1)


def ratio(after: Number, before: Number) -> Number:
    """``after / before``, and 1 for a zero gradient."""
    if isinstance(before, Tensor):
        return torch.where(before == 0, 1.0, after / before)
    return after / before if before else 1.0
