"""Putting clipping in front of any torch optimizer, in place.

The optimizer's class is swapped for a subclass of itself that carries the clipping through ``state_dict``,
pickle and deepcopy. The clipping itself happens in a step pre-hook: hooks run whichever way ``step`` is
called, also through the wrapper that a scheduler made earlier has put around it.
"""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from torch_clip.clipping import Transform
from torch_clip.norms import Grads, tensor_norms
from torch_clip.scalars import number, on_host
from torch_clip.scopes import multiply_, share_of

OptimizerT = TypeVar("OptimizerT", bound=Optimizer)

_GROUP_KEYS = ("clipping", "clipping_type", "clipping_level", "p_autoclip")
# Their fused kernels divide the gradient by `optimizer.grad_scale` and do nothing where `optimizer.found_inf`
# is 1. Compared by step function, so that a subclass with a step of its own is not taken for one of them.
_FUSED_STEPS = tuple(inspect.unwrap(cls.step) for cls in (SGD, Adam, AdamW, Adagrad))


def clip(optimizer: OptimizerT, clipping: Transform) -> OptimizerT:
    """Put ``clipping`` in front of ``optimizer``: from now on each ``step`` clips the gradients first.

    The optimizer stays what it was: closures (clipped after each evaluation, so LBFGS clips and records
    every inner one), schedulers made before or after, ``GradScaler``, parameter groups, ``torch.compile``,
    pickle and deepcopy work as without clipping. ``optimizer.clipping`` is the clipping,
    ``optimizer.clipping.telemetry`` what it did last, ``optimizer.state_dict()["clipping"]`` its state. With
    a fused SGD, Adam, AdamW or Adagrad a global coefficient travels into the update kernel, so that clipping
    costs one read of the gradients.

    Args:
        optimizer: any ``torch.optim.Optimizer``. Changed in place.
        clipping: from ``torch_clip.methods``, or one of your own. It is this optimizer's from now on.

    Returns:
        ``optimizer``.

    Raises:
        TypeError: ``optimizer`` is a wrapper without step hooks (attach to the optimizer inside), or
            ``clipping`` is no clipping.
        ValueError: ``optimizer`` has a clipping already, a parameter group carries clipping settings, or the
            clipping's settings do not fit the parameters (names that are not theirs, say).

    Note:
        On a device other than the CPU, ``nonfinite="skip"`` needs a fused optimizer to be free of host
        synchronisation; with any other it reads one flag a step.

    Example:
        >>> import torch
        >>> from torch_clip.methods import NormClip
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = clip(torch.optim.AdamW(model.parameters()), NormClip(threshold=1.0))
        >>> model(torch.ones(2)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.clipping.telemetry.clipped
        1.0
    """
    if not isinstance(clipping, Transform):
        raise TypeError(f"clipping must be of torch_clip, such as NormClip(1.0), got {clipping!r}")
    # Some wrappers have plain dictionaries here, which torch does not register hooks in.
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", None)
    if not (isinstance(optimizer, Optimizer) and isinstance(hooks, OrderedDict)):
        raise TypeError(
            f"{type(optimizer).__name__} has no step hooks; if it wraps an optimizer, clip the one inside"
        )
    if "clipping" in optimizer.__dict__:
        raise ValueError(f"{type(optimizer).__name__} already has a clipping: {optimizer.clipping}")
    for group in optimizer.param_groups:
        _refuse_clipping_keys(group)
    if hasattr(optimizer, "check_clipping"):
        optimizer.check_clipping(clipping)
    clipping.check(Grads(optimizer.param_groups))
    optimizer.__class__ = _clipped_class(type(optimizer))
    optimizer.clipping = clipping
    _register_hooks(optimizer)
    if "step" in optimizer.__dict__:  # the wrapper of a scheduler, which goes past the class
        optimizer.step = _restoring(optimizer.step, weakref.ref(optimizer))
    return optimizer


def _restoring(step: Callable[..., Any], owner: weakref.ref[Optimizer]) -> Callable[..., Any]:
    @functools.wraps(step)
    def restoring_step(*args: Any, **kwargs: Any) -> Any:
        try:
            return step(*args, **kwargs)
        finally:
            _end_step(owner())

    return restoring_step


@functools.cache
def _clipped_class(base: type[Optimizer]) -> type[Optimizer]:
    if not getattr(base.step, "hooked", False):
        # torch does this when the first optimizer of the class is made; unpickling makes none.
        base.step = Optimizer.profile_hook_step(base.step)
        base.step.hooked = True

    # One base and no slots: a mixin would change the object layout, which __class__ assignment refuses.
    class Clipped(base):  # type: ignore[valid-type, misc]
        _step_can_fuse = inspect.unwrap(base.step) in _FUSED_STEPS

        def step(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().step(*args, **kwargs)
            finally:
                _end_step(self)  # the post-hook does not run when the step raises

        step.hooked = True  # the base's step runs the hooks; wrapping this one too would run them twice

        def add_param_group(self, param_group: dict[str, Any]) -> None:
            _refuse_clipping_keys(param_group)
            super().add_param_group(param_group)

        def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return {**super().state_dict(*args, **kwargs), "clipping": self.clipping.state_dict()}

        def load_state_dict(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            if "clipping" in state_dict:
                self.clipping.check_state(state_dict["clipping"])  # before anything is loaded
            super().load_state_dict(state_dict, *args, **kwargs)
            if "clipping" in state_dict:
                self.clipping.load_state_dict(state_dict["clipping"])
            else:
                self.clipping.reset()
                name = type(self.clipping).__name__
                warnings.warn(f"the loaded state has no 'clipping': {name} starts fresh", stacklevel=2)

        def __getstate__(self) -> dict[str, Any]:
            return {**super().__getstate__(), "clipping": self.clipping}

        def __setstate__(self, state: dict[str, Any]) -> None:
            super().__setstate__(state)
            # Unpickled or copied: hooks do not travel. Loading a state dict comes here too, with its hooks.
            if "clipping" in state:
                _register_hooks(self)

        def __reduce_ex__(self, protocol: int) -> tuple:
            return _rebuild, (base,), self.__getstate__()

    Clipped.__name__, Clipped.__qualname__, Clipped.__module__ = (
        base.__name__,
        base.__qualname__,
        base.__module__,
    )
    return Clipped


def _rebuild(base: type[Optimizer]) -> Optimizer:
    cls = _clipped_class(base)
    return cls.__new__(cls)


def _refuse_clipping_keys(group: dict[str, Any]) -> None:
    for key in _GROUP_KEYS:
        if key in group:
            raise ValueError(
                f"a parameter group has {key!r}; one clipping serves all groups, the settings belong to it"
            )


def _register_hooks(optimizer: Optimizer) -> None:
    optimizer.register_step_pre_hook(_before_step)
    optimizer.register_step_post_hook(_after_step)


@torch.compiler.disable  # traced, grad_scale would be set and then ignored by the compiled step
def _before_step(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
    if optimizer.__dict__.get("_stepping"):
        return None  # a subclass whose step calls that of its base, which has hooks too
    optimizer._stepping = True
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        if not _only_makes_state(optimizer, kwargs):
            _clip(optimizer)
        return None

    @functools.wraps(closure)
    def clipped_closure(*closure_args: Any, **closure_kwargs: Any) -> Any:
        _restore(optimizer)  # LBFGS comes here more than once
        loss = closure(*closure_args, **closure_kwargs)
        if isinstance(loss, Tensor):
            optimizer.clipping.observe(loss)
        _clip(optimizer)
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": clipped_closure}
    return (args[0], clipped_closure, *args[2:]), kwargs


def _only_makes_state(optimizer: Optimizer, kwargs: dict[str, Any]) -> bool:
    """Whether distributed checkpointing steps without lr and gradient, so that there is a state to load into.

    Such a step is none of the training's: counted, it would shift the random draws of the run that saves.
    """
    if kwargs != {"closure": None} or optimizer.state:  # the way it is called there
        return False
    for group in optimizer.param_groups:
        lr = group.get("lr", 0.0)
        if (isinstance(lr, Tensor) and not on_host(lr)) or lr != 0.0:
            return False
    grads = _grads(optimizer)  # read last, and by their norms, so that all ranks decide alike
    return not (grads.tensors and tensor_norms(grads).any())


@torch.compiler.disable
def _after_step(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
    _end_step(optimizer)


def _end_step(optimizer: Optimizer) -> None:
    optimizer.__dict__.pop("_stepping", None)
    _restore(optimizer)


@torch.no_grad()
def _clip(optimizer: Optimizer) -> None:
    """Clip the gradients, or leave the work to the update kernel."""
    clipping = optimizer.clipping
    grads = _grads(optimizer)
    amp_scale = getattr(optimizer, "grad_scale", None)
    if amp_scale is not None and not clipping.by_factor:
        # Set by a GradScaler for the fused kernel; these methods work in the gradient's own units.
        multiply_(grads.tensors, amp_scale.reciprocal())
        _lend(optimizer, "grad_scale", None)
        amp_scale = None
    scale = 1.0 if amp_scale is None else number(amp_scale)
    measured = clipping.measure(
        grads, scale, getattr(optimizer, "threshold_scale", 1.0), functools.partial(_describe, optimizer)
    )

    skip = measured.skip
    fused = optimizer._step_can_fuse and all(group["fused"] for group in optimizer.param_groups)
    if isinstance(skip, Tensor) and not fused:
        skip = bool(skip)  # the one flag that the host must read
    if skip is True:
        _hide_grads(optimizer, grads)
        clipping.skip(measured)
        return
    if not (fused and clipping.by_factor):
        clipping.scale_(grads, measured)
    else:
        coef = clipping.coef(measured) if grads.tensors else 1.0
        clipping.record(measured, coef, share_of(coef))
        if isinstance(coef, Tensor):
            _lend(optimizer, "grad_scale", (scale / coef).float())
        elif coef != 1.0:
            inverse = scale / coef if coef else torch.inf
            _lend(optimizer, "grad_scale", torch.tensor(inverse, dtype=torch.float32))
    if isinstance(skip, Tensor):
        found = getattr(optimizer, "found_inf", None)
        _lend(optimizer, "found_inf", skip.float() if found is None else torch.maximum(skip.float(), found))
        _note_fresh_momentum(optimizer, grads)


def _grads(optimizer: Optimizer) -> Grads:
    return Grads(optimizer.param_groups)


def _describe(optimizer: Optimizer, param: Tensor) -> str:
    for g, group in enumerate(optimizer.param_groups):
        for i, other in enumerate(group["params"]):
            if other is param:
                name = f" {group['param_names'][i]!r}" if "param_names" in group else ""
                return f"parameter {i} of group {g}{name}, shape {tuple(param.shape)}"
    raise ValueError("the parameter is not the optimizer's")


# What a step borrows is given back after it, also when it raises: `_lent` maps an attribute to (value before,
# value lent), `_hidden` holds gradients that the step must not see.


def _lend(optimizer: Optimizer, name: str, value: Tensor | None) -> None:
    lent = optimizer.__dict__.setdefault("_lent", {})
    lent[name] = (getattr(optimizer, name, _ABSENT), value)
    setattr(optimizer, name, value)


_ABSENT = object()


def _hide_grads(optimizer: Optimizer, grads: Grads) -> None:
    """Make the step an exact skip: an optimizer passes over parameters without a gradient."""
    optimizer._hidden = [(param, param.grad) for param in grads.params]
    for param in grads.params:
        param.grad = None


def _note_fresh_momentum(optimizer: Optimizer, grads: Grads) -> None:
    """Fused SGD leaves a momentum buffer uninitialised when its first step is skipped on the device."""
    if any(group.get("momentum") for group in optimizer.param_groups):
        fresh = [p for p in grads.params if optimizer.state.get(p, {}).get("momentum_buffer") is None]
        optimizer._fresh_momentum = (fresh, optimizer.found_inf)


def _restore(optimizer: Optimizer) -> None:
    for name, (before, lent) in optimizer.__dict__.pop("_lent", {}).items():
        # Whoever set something else meanwhile, a GradScaler say, wants that.
        if optimizer.__dict__.get(name, _ABSENT) is not lent:
            continue
        if before is _ABSENT:
            delattr(optimizer, name)
        else:
            setattr(optimizer, name, before)
    for param, grad in optimizer.__dict__.pop("_hidden", ()):
        if param.grad is None:
            param.grad = grad
    fresh, found = optimizer.__dict__.pop("_fresh_momentum", ((), None))
    for param in fresh:
        if (buffer := optimizer.state[param].get("momentum_buffer")) is not None:
            buffer.masked_fill_(found.to(buffer.device, non_blocking=True).bool(), 0.0)
