"""What is clipped as one: the whole gradient, a parameter group, a module, a tensor, a row, or an element."""

from __future__ import annotations

import fnmatch
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from torch_clip.norms import Grads, norm_dtype, over_shards_, sums_by_dot, tensor_norms
from torch_clip.scalars import Number, number

_PIECE = 1 << 17  # elements; 512 KiB


class Measured(NamedTuple):
    """A step between measuring and scaling."""

    total: Number
    """Norm of all gradients."""
    norms: Tensor | None
    """Norm of each gradient; None when there are none."""
    lengths: Number
    """Norm of each unit of the scope: ``total`` where there is one, else shape (units,)."""
    threshold: Number
    """The threshold of this step, of each unit where they differ."""
    shown: Number
    """The threshold that telemetry shows: the median over the units that have a gradient."""
    finite: bool | Tensor
    """Whether the norm is finite."""
    skip: bool | Tensor
    """Whether the step is to be skipped."""


CoefOf = Callable[[Number, Number], Number]
"""The coefficients of units, given their norms and thresholds; 1 where the gate holds back."""


class Scope(ABC):
    """What is clipped as one."""

    unit: ClassVar[str]
    """What the share of clipped units counts."""
    measure: bool = True
    """Whether the norms of the gradients are taken at all."""
    by_tensor: ClassVar[bool] = False
    """Whether it matters how a gradient is divided into tensors."""

    def check(self, grads: Grads) -> None:  # noqa: B027
        """Raise ``ValueError`` for parameters that the settings do not fit; gradients are not asked for."""

    def norms(self, grads: Grads) -> tuple[Tensor, Tensor | None]:
        """Norm of each gradient, and of each unit where that is not the whole: shape (units,).

        The units are those of all parameters; one without a gradient has norm 0.
        """
        return tensor_norms(grads), None

    @abstractmethod
    def scale_(self, grads: Grads, measured: Measured, coef_of: CoefOf) -> tuple[Number, Number]:
        """Clip in place; return norm after / norm before, and the share of units clipped."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Global(Scope):
    """The gradients of all parameters as one vector."""

    unit = "steps"

    def scale_(self, grads: Grads, measured: Measured, coef_of: CoefOf) -> tuple[Number, Number]:
        coef = coef_of(measured.total, measured.threshold)
        if isinstance(coef, Tensor) or coef != 1.0:
            multiply_(grads.tensors, coef)
        return coef, share_of(coef)


Excluded = str | Tensor | nn.Module
"""A pattern of parameter names as of :mod:`fnmatch`, a parameter, or a module whose parameters are meant."""


class _Parts(Scope):
    """Units that are some tensors each, or parts of a tensor.

    Args:
        exclude: what is not clipped: ``"last"``, the layer of the last matrix, or an iterable of name
            patterns (``"fc.*"``), parameters and modules. Patterns need names: make the optimizer of
            ``model.named_parameters()``, or give ``model``.
        model: whose parameters these are; gives names and the layout of weights.
    """

    by_tensor = True

    def __init__(self, exclude: str | Iterable[Excluded] = (), model: nn.Module | None = None) -> None:
        if isinstance(exclude, nn.Module | Tensor):
            exclude = (exclude,)
        self._last = exclude == "last"
        if isinstance(exclude, str) and not self._last:
            exclude = (exclude,)
        self._patterns, self._excluded = [], []
        if not (exclude is None or isinstance(exclude, Iterable)):
            raise ValueError(f"exclude takes name patterns, parameters and modules, got {exclude!r}")
        for what in () if self._last or exclude is None else exclude:
            if isinstance(what, str):
                self._patterns.append(what)
            elif isinstance(what, nn.Module):
                self._excluded += what.parameters()
            elif isinstance(what, Tensor):
                self._excluded.append(what)
            else:
                raise ValueError(f"exclude takes name patterns, parameters and modules, got {what!r}")
        self._named = list(model.named_parameters()) if model is not None else []
        self._plans: list[tuple[Any, Any]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": []}

    def plan(self, grads: Grads) -> Any:
        """What follows from the parameters alone: which they are, and which of them have a gradient."""
        told = [(id(param), param.shape) for param in grads.all]
        key = (told, grads.index, grads.tensors[0].device, self._told_by(grads))
        for known, plan in self._plans:
            if known == key:
                return plan
        plan = self._make_plan(grads)
        self._plans = [(key, plan), *self._plans[:7]]
        return plan

    def _told_by(self, grads: Grads) -> Any:
        """What else units follow from."""
        return grads.names if self._patterns else None

    @abstractmethod
    def _make_plan(self, grads: Grads) -> Any: ...

    def check(self, grads: Grads) -> None:
        self._left_out(grads)

    def typical(self, values: Tensor, grads: Grads) -> Tensor:
        """The median of ``values``, shape (units,), over the units that have a gradient; inf if none has."""
        present = self.plan(grads).present
        values = values if present is None else values[present]
        return values.median() if len(values) else values.new_full((), math.inf)

    def _names(self, grads: Grads) -> list[str] | None:
        if grads.names is not None:
            return grads.names
        names = {id(param): name for name, param in self._named}
        found = [names.get(id(param)) for param in grads.all]
        return None if None in found else found

    def _left_out(self, grads: Grads) -> set[int]:
        """Places in ``grads.all`` of what is excluded."""
        ids = {id(param) for param in self._excluded}
        places = {i for i, param in enumerate(grads.all) if id(param) in ids}
        if len(places) < len(ids):
            missing = len(ids) - len(places)
            raise ValueError(f"exclude: {missing} of its parameters are not among those clipped")
        if not (self._patterns or self._last):
            return places
        names = self._names(grads)
        if self._last:
            return _last_layer(grads.all, names)
        if names is None:
            raise ValueError(
                f"exclude={self._patterns} needs parameter names: make the optimizer of "
                "model.named_parameters(), or give model="
            )
        for pattern in self._patterns:
            matching = {i for i, name in enumerate(names) if fnmatch.fnmatchcase(name, pattern)}
            if not matching:
                raise ValueError(f"exclude={pattern!r} matches none of {', '.join(names[:5])} ...")
            places |= matching
        return places


def _last_layer(params: list[Tensor], names: list[str] | None) -> set[int]:
    """The last matrix, and the parameters of its module: by name, or else the bias that follows it."""
    last = max((i for i, param in enumerate(params) if param.ndim >= 2), default=None)
    if last is None:
        return set()
    if names is None:
        bias = [param.shape == params[last].shape[:1] for param in params[last + 1 : last + 2]]
        return {last, last + 1} if bias == [True] else {last}
    module = names[last].rpartition(".")[0]
    return {i for i, name in enumerate(names) if name.rpartition(".")[0] == module}


def _there(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)


class _TensorPlan(NamedTuple):
    units: int
    """Of all parameters."""
    unit_of: Tensor | None
    """Unit of each gradient, ``units`` if it is left out; None: they are the gradients themselves."""
    members: Tensor | None
    """Which gradients belong to which unit, bool (units, gradients); None: each unit is one of them."""
    present: Tensor | None
    """The units that have a gradient; None: all."""
    count: int
    """How many these are."""


class _Sets(_Parts):
    """Units that are sets of whole tensors."""

    @abstractmethod
    def _units(self, grads: Grads) -> list[int]:
        """The unit of each parameter in ``grads.all``, numbered from 0."""

    def _make_plan(self, grads: Grads) -> _TensorPlan:
        units, left_out = self._units(grads), self._left_out(grads)
        count = max(units) + 1
        unit_of = [count if i in left_out else units[i] for i in grads.index]
        present = sorted({unit for unit in unit_of if unit < count})
        if unit_of == list(range(count)):
            return _TensorPlan(count, None, None, None, count)
        device = grads.tensors[0].device
        members = None
        if count < len(units):
            members = torch.tensor([[unit == u for u in unit_of] for unit in range(count)])
            members = _there(members, device)
        return _TensorPlan(
            count,
            _there(torch.tensor(unit_of), device),
            members,
            _there(torch.tensor(present, dtype=torch.int64), device) if len(present) < count else None,
            len(present),
        )

    def norms(self, grads: Grads) -> tuple[Tensor, Tensor | None]:
        norms, plan = tensor_norms(grads), self.plan(grads)
        if plan.unit_of is None:
            return norms, norms
        if plan.members is not None:
            # Not by adding into places, the order of which is left open on a device; nor by a product of
            # matrices, in which one NaN would reach all units.
            return norms, torch.linalg.vector_norm(torch.where(plan.members, norms, 0.0), dim=1)
        lengths = norms.new_zeros(plan.units + 1)
        return norms, lengths.index_copy_(0, plan.unit_of, norms)[: plan.units]

    def scale_(self, grads: Grads, measured: Measured, coef_of: CoefOf) -> tuple[Number, Number]:
        plan = self.plan(grads)
        coefs = each = coef_of(measured.lengths, measured.threshold)
        if plan.unit_of is not None:
            each = torch.cat([coefs, coefs.new_ones(1)])[plan.unit_of]
        if isinstance(measured.total, Tensor):
            multiply_each_(grads.tensors, each)
        else:
            for grad, coef in zip(grads.tensors, each.tolist(), strict=True):
                if coef != 1.0:
                    grad.mul_(coef)
        after = torch.linalg.vector_norm(measured.norms * each)
        clipped = (coefs < 1).to(coefs.dtype).sum() / max(plan.count, 1)
        return ratio(number(after), measured.total), number(clipped)


class PerTensor(_Sets):
    """The gradient of each parameter by itself.

    Args:
        exclude: see ``PerUnit``.
        model: see ``PerUnit``.
    """

    unit = "tensors"

    def spread(self, values: Tensor, grads: Grads) -> Tensor:
        """``values`` of the gradients at their places among those of all parameters, others 0."""
        plan = self.plan(grads)
        if plan.unit_of is None:
            return values
        return values.new_zeros(plan.units).index_copy_(0, plan.unit_of, values)

    def pick(self, values: Tensor, grads: Grads) -> Tensor:
        """Those of ``values``, one of each parameter, that belong to gradients."""
        unit_of = self.plan(grads).unit_of
        return values if unit_of is None else values[unit_of]

    def _units(self, grads: Grads) -> list[int]:
        return list(range(len(grads.all)))


class PerGroup(_Sets):
    """The gradients of each parameter group as one vector; without an optimizer there is one group.

    Args:
        exclude: see ``PerUnit``.
        model: see ``PerUnit``.
    """

    unit = "groups"

    def _units(self, grads: Grads) -> list[int]:
        return grads.groups

    def _told_by(self, grads: Grads) -> Any:
        return super()._told_by(grads), grads.groups


class PerModule(_Sets):
    """The gradients of each module's own parameters as one vector: weight and bias of a layer together.

    Modules are told apart by the names of parameters: make the optimizer of ``model.named_parameters()``,
    give those to ``clip_``, or give ``model``.

    Args:
        exclude: see ``PerUnit``.
        model: see ``PerUnit``.
    """

    unit = "modules"

    def check(self, grads: Grads) -> None:
        super().check(grads)
        self._units(grads)

    def _units(self, grads: Grads) -> list[int]:
        names = self._names(grads)
        if names is None:
            raise ValueError(
                "modules are told apart by parameter names: make the optimizer of model.named_parameters(), "
                "or give model="
            )
        modules: dict[str, int] = {}
        return [modules.setdefault(name.rpartition(".")[0], len(modules)) for name in names]

    def _told_by(self, grads: Grads) -> Any:
        return grads.names


class _Rows(NamedTuple):
    """How a gradient falls into rows."""

    place: int
    """In ``grads.tensors``."""
    start: int
    """Of its rows among all."""
    count: int
    """Rows of the whole parameter, of all shards."""
    groups: int | None
    """Of a transposed convolution, whose filters are in dimension 1; None: rows are in dimension 0."""
    local: slice | None
    """Which of the rows are on this rank; None: not sharded."""


class _RowPlan(NamedTuple):
    matrices: list[_Rows]
    """The gradients of several rows."""
    vectors: list[int]
    """Places in ``grads.tensors`` of those that are one row."""
    at: Tensor
    """Which rows these are, int64."""
    left_out: list[int]
    """Places in ``grads.tensors`` of what is excluded."""
    total: int
    """Rows of all parameters, those without a gradient too."""
    present: Tensor | None
    """The rows that have a gradient; None: all."""
    count: int
    """How many these are."""


class PerUnit(_Parts):
    """Each row by itself: the weights that lead to one output of a layer.

    A row is what lies at one index of the first dimension: of a Linear or an attention's packed projection
    the weights of an output, of a convolution a filter, of an embedding the vector of a token. A tensor of
    one dimension is one row. The filters of a transposed convolution lie in the second dimension: give
    ``model``, which tells.

    Args:
        exclude: what is not clipped: ``"last"``, the layer of the last matrix, or an iterable of name
            patterns (``"fc.*"``), parameters and modules. Patterns need names: make the optimizer of
            ``model.named_parameters()``, or give ``model``.
        model: whose parameters these are; gives names and finds transposed convolutions.
    """

    unit = "rows"

    def __init__(self, exclude: str | Iterable[Excluded] = (), model: nn.Module | None = None) -> None:
        super().__init__(exclude, model)
        modules = model.modules() if model is not None else ()
        transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        # Of a weight-normed one the weight is no parameter, but a product of two, one of which has its shape.
        self._transposed = [
            (param, module.groups)
            for module in modules
            if isinstance(module, transposed)
            for param in module.parameters()
            if param.shape == module.weight.shape
        ]

    def _make_plan(self, grads: Grads) -> _RowPlan:
        left_out = self._left_out(grads)
        transposed = {id(weight): groups for weight, groups in self._transposed}
        place_of = {i: place for place, i in enumerate(grads.index)}
        matrices, vectors, at, present, start = [], [], [], [torch.arange(0)], 0
        for i, param in enumerate(grads.all):
            if i in left_out:
                continue
            groups = transposed.get(id(param))
            count = 1 if param.ndim <= 1 else param.shape[0] if groups is None else param.shape[1] * groups
            if i in place_of and param.ndim <= 1:
                vectors.append(place_of[i])
                at.append(start)
            elif i in place_of:
                matrices.append(_Rows(place_of[i], start, count, groups, _local_rows(param, groups)))
            if i in place_of:
                present.append(torch.arange(start, start + count))
            start += count
        count, device = sum(map(len, present)), grads.tensors[0].device
        return _RowPlan(
            matrices,
            vectors,
            _there(torch.tensor(at, dtype=torch.int64), device),
            [place_of[i] for i in sorted(left_out) if i in place_of],
            start,
            None if count == start else _there(torch.cat(present), device),
            count,
        )

    def norms(self, grads: Grads) -> tuple[Tensor, Tensor | None]:
        plan = self.plan(grads)
        device = grads.tensors[0].device
        wide = any(grad.dtype is torch.float64 for grad in grads.tensors)
        dtype = torch.float64 if wide else torch.float32
        lengths = torch.zeros(plan.total, dtype=dtype, device=device)
        norms: list[Tensor] = [None] * len(grads.tensors)  # type: ignore[list-item]
        whole = plan.vectors + plan.left_out
        if whole:
            found = tensor_norms(grads.only(whole)).to(device, dtype, non_blocking=True)
            lengths.index_copy_(0, plan.at, found[: len(plan.vectors)])
            for place, norm in zip(whole, found.unbind(), strict=True):
                norms[place] = norm
        rows = []
        for matrix in plan.matrices:
            own = _row_norms(grads.tensors[matrix.place], matrix.groups).flatten()
            rows.append(_at_rows(own, matrix, grads).to(device, dtype, non_blocking=True))
        places = [matrix.place for matrix in plan.matrices]
        over_shards_(rows, grads.only(places).meshes, "norm")
        for matrix, own, norm in zip(
            plan.matrices, rows, torch._foreach_norm(rows) if rows else [], strict=True
        ):
            lengths[matrix.start : matrix.start + matrix.count] = own
            norms[matrix.place] = norm
        return torch.stack(norms), lengths

    def scale_(self, grads: Grads, measured: Measured, coef_of: CoefOf) -> tuple[Number, Number]:
        plan, on_host = self.plan(grads), not isinstance(measured.total, Tensor)
        coefs = coef_of(measured.lengths, measured.threshold)
        if on_host and not (coefs != 1).any():
            return 1.0, 0.0
        if plan.vectors:
            multiply_each_([grads.tensors[place] for place in plan.vectors], coefs[plan.at])
        for matrix in plan.matrices:
            own = coefs[matrix.start : matrix.start + matrix.count]
            if on_host and not (own != 1).any():
                continue
            grad, param = grads.tensors[matrix.place], grads.params[matrix.place]
            if matrix.local is not None:
                own = own[matrix.local]
            elif param.grad.layout is torch.sparse_coo:
                own = own[param.grad._indices()[0]]
            _multiply_rows_(grad, own.to(grad.device, non_blocking=True), matrix.groups)
        squares = [(measured.lengths * coefs).square().sum()]
        squares += [measured.norms[place].square() for place in plan.left_out]
        after = torch.stack(squares).sum().sqrt()
        clipped = (coefs < 1).to(coefs.dtype).sum() / max(plan.count, 1)
        return ratio(number(after), measured.total), number(clipped)


def _local_rows(param: Tensor, groups: int | None) -> slice | None:
    """Which rows of a sharded parameter are on this rank; those of a transposed convolution must all be."""
    if not hasattr(param, "to_local"):
        return None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if param.ndim <= 1:
        return slice(None)
    shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    if groups is not None:
        if shape[1] != param.shape[1] or (groups > 1 and shape[0] != param.shape[0]):
            raise ValueError("a transposed convolution is sharded across its filters; exclude its weight")
        return slice(None)
    return slice(offset[0], offset[0] + shape[0])


def _as_rows(grad: Tensor, groups: int | None) -> tuple[Tensor, list[int]]:
    """The gradient, viewed so that rows are told apart by whole dimensions; and the others."""
    if grad.ndim <= 1:
        return grad, list(range(grad.ndim))
    if groups is None:
        return grad, list(range(1, grad.ndim))
    grad = grad.unflatten(0, (groups, -1))
    return grad, [dim for dim in range(grad.ndim) if dim not in (0, 2)]


def _row_norms(grad: Tensor, groups: int | None) -> Tensor:
    """Norm of each row in float32 (float64 for float64)."""
    rows, dims = _as_rows(grad, groups)
    if rows.numel() == 0:
        kept = [size for dim, size in enumerate(rows.shape) if dim not in dims]
        return rows.new_zeros(kept or [1], dtype=norm_dtype(grad.dtype))
    if groups is None and grad.ndim > 2 and grad.is_contiguous():
        rows, dims = grad.flatten(1), [1]  # one inner dimension is summed faster than several
    return torch.linalg.vector_norm(rows, dim=dims or None, dtype=norm_dtype(grad.dtype))


def _at_rows(own: Tensor, row: _Rows, grads: Grads) -> Tensor:
    """Norms of the rows that are here, at their places among all rows of the parameter."""
    grad = grads.params[row.place].grad
    if row.local is not None:
        whole = own.new_zeros(row.count)
        whole[row.local] = own
        return whole
    if grad is not None and grad.layout is torch.sparse_coo and len(own) != row.count:
        return own.new_zeros(row.count).index_copy_(0, grad._indices()[0], own)
    return own


def _multiply_rows_(grad: Tensor, coefs: Tensor, groups: int | None) -> None:
    rows, dims = _as_rows(grad, groups)
    shape = [1 if dim in dims else size for dim, size in enumerate(rows.shape)]
    rows.mul_(coefs.view(shape))


class Element(Scope):
    """Each element by itself.

    Args:
        measure: False clamps and looks at nothing: the telemetry of norms and of the share clipped is NaN.
    """

    unit = "elements"

    def __init__(self, measure: bool = True) -> None:
        self.measure = measure

    def scale_(self, grads: Grads, measured: Measured, coef_of: CoefOf) -> tuple[Number, Number]:
        total, threshold = measured.total, measured.threshold
        if not self.measure:
            for grad in grads.tensors:
                limit = _beside(threshold, grad)
                grad.clamp_(-limit, limit)
            return math.nan, math.nan
        if not isinstance(total, Tensor) and total <= threshold:  # then no element exceeds it either
            return 1.0, 0.0
        found = [_clamp_(grad, _beside(threshold, grad), measured.finite) for grad in grads.tensors]
        return of_elements(grads, total, *map(list, zip(*found, strict=True)))


def of_elements(
    grads: Grads, total: Number, clipped: list[Tensor], norms: list[Tensor]
) -> tuple[Number, Number]:
    """Norm after / norm before, and the share of elements clipped.

    Args:
        grads: the gradients.
        total: norm before.
        clipped: how many elements of each gradient, or of its shard here, were clipped.
        norms: norm after of each gradient, or of its shard here.
    """
    over_shards_(clipped, grads.meshes)
    over_shards_(norms, grads.meshes, "norm")
    device = clipped[0].device
    clipped, norms = (
        torch.stack([value.to(device, non_blocking=True) for value in values]) for values in (clipped, norms)
    )
    elements = sum(
        grads.params[i].grad.numel() if i in grads.meshes else grad.numel()  # of all shards
        for i, grad in enumerate(grads.tensors)
    )
    coef = ratio(number(torch.linalg.vector_norm(norms)), total)
    return coef, number(clipped.sum() / max(elements, 1))


def _beside(threshold: Number, grad: Tensor) -> Number:
    if isinstance(threshold, Tensor):
        return threshold.to(grad.device, non_blocking=True)
    return threshold


def _clamp_(grad: Tensor, threshold: float, finite: bool | Tensor) -> tuple[Tensor, Tensor]:
    """Clamp in place; return how many elements were clipped, and the norm after, shapes ()."""
    if finite is not True or not sums_by_dot(grad):  # the pieces would count NaN, which is not itself
        clipped = torch.count_nonzero(grad.abs() > threshold)
        grad.clamp_(-threshold, threshold)
        return clipped, torch.linalg.vector_norm(grad, dtype=norm_dtype(grad.dtype))
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
        if all(tensor.dtype.itemsize >= 4 for tensor in tensors):
            torch._foreach_mul_(tensors, coef)
            return
        coef = torch.tensor(coef, dtype=torch.float32)  # a Python number would be rounded to half precision
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
