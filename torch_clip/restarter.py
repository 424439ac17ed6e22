"""Restarts: go on from the average, or the last output, of the steps since the last restart.

Averages are of parameters. Buffers stay as they are: after a restart from an average a model with BatchNorm
wants its running statistics anew, see ``torch.optim.swa_utils.update_bn``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_clip.sstm import SSTM
from torch_clip.thresholds import Constant

OUTPUTS = ("average", "last")


class _Properties(Protocol):
    optimizer_class: type[Optimizer]
    optimizer_kwargs: dict[str, Any]


class RunningMean:
    """Mean of the values that some parameters took: one buffer each, float32, where the parameter is."""

    def __init__(self) -> None:
        self.count = 0
        self._params: list[Tensor] = []
        self._means: list[Tensor] = []

    @torch.no_grad()
    def add(self, params: Iterable[Tensor]) -> None:
        """Take in the values that ``params`` have now."""
        params = list(params)
        if not self.count:
            self._params = params
            self._means = [
                p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in params
            ]
        elif len(params) != len(self._params) or any(
            a is not b for a, b in zip(params, self._params, strict=True)
        ):
            raise ValueError("the parameters are not those of the calls before")
        self.count += 1
        for param, mean in zip(params, self._means, strict=True):
            mean.lerp_(param.to(mean.dtype), 1 / self.count)

    @torch.no_grad()
    def write_back(self) -> None:
        """Set the parameters to their means, in place; whether they require a gradient stays."""
        for param, mean in zip(self._params, self._means, strict=True):
            param.copy_(mean)

    def clear(self) -> None:
        self.count, self._params, self._means = 0, [], []

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "means": [mean.clone() for mean in self._means]}

    def load_state_dict(self, state: dict[str, Any], params: Iterable[Tensor]) -> None:
        self.count = state["count"]
        self._params = list(params) if self.count else []
        self._means = [
            mean.to(param.device, copy=True) for mean, param in zip(state["means"], self._params, strict=True)
        ]


def reset_optimizer(optimizer: Optimizer) -> None:
    """Make an optimizer as new: momenta, step counts and a clipping's history are gone.

    In place, so that schedulers and scalers keep their optimizer. Learning rates, parameter groups, settings,
    and the clipping's counts and draws stay.
    """
    if isinstance(optimizer, SSTM):
        optimizer.restart()
    optimizer.state.clear()
    if hasattr(optimizer, "clipping"):
        optimizer.clipping.forget()


class RestartScheduler:
    r"""Restarts an optimizer every so many steps, as R-clipped-SGD and R-clipped-SSTM do.

    .. math::
        x \leftarrow \text{output of the stage}, \qquad
        N_{t+1} = \lceil \text{factor} \cdot N_t \rceil, \qquad
        T_{t+1} = \text{threshold\_decay} \cdot T_t

    Call ``step()`` after ``optimizer.step()``.

    Args:
        optimizer: to restart, in place.
        first: steps of the first stage.
        factor: growth of a stage, at least 1; 1 is the papers' constant interval.
        max_interval: cap of a stage's steps; None for none.
        output: ``"average"`` of the points of the stage (R-clipped-SGD), or the ``"last"`` one
            (R-clipped-SSTM, whose output is y); None is the paper's for the optimizer.
        threshold_decay: in (0, 1], multiplies the clipping's constant threshold at each restart; the papers'
            is :math:`2^{-1/2}`.

    Reference:
        Gorbunov, Danilova, Gasnikov, 2020, https://arxiv.org/abs/2005.10785
    """

    def __init__(
        self,
        optimizer: Optimizer,
        first: int = 100,
        factor: float = 1.0,
        max_interval: int | None = None,
        output: str | None = None,
        threshold_decay: float = 1.0,
    ) -> None:
        if output is None:
            output = "last" if isinstance(optimizer, SSTM) else "average"
        if output not in OUTPUTS:
            raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
        if not 0 < threshold_decay <= 1:
            raise ValueError(f"threshold_decay must be in (0, 1], got {threshold_decay}")
        if threshold_decay < 1 and _threshold(optimizer) is None:
            raise ValueError("threshold_decay needs an optimizer clipped at a constant threshold")
        self.optimizer = optimizer
        self.output = output
        self.threshold_decay = threshold_decay
        self.restarts = 0
        self._interval = _Interval(first, factor, max_interval)
        self._mean = RunningMean()

    def step(self) -> bool:
        """Count a step; restart where one is due. Returns whether it did."""
        if self.output == "average":
            self._mean.add(self._params())
        if not self._interval.step():
            return False
        if self.output == "average":
            self._mean.write_back()
            self._mean.clear()
        elif isinstance(self.optimizer, SSTM):
            self.optimizer.eval()  # the output is y, not the point that is trained
        reset_optimizer(self.optimizer)
        if self.threshold_decay < 1:
            self.optimizer.clipping.threshold.value *= self.threshold_decay
        self.restarts += 1
        return True

    def state_dict(self) -> dict[str, Any]:
        return {
            "restarts": self.restarts,
            "interval": self._interval.state_dict(),
            "mean": self._mean.state_dict(),
            "threshold": _threshold(self.optimizer),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.restarts = state["restarts"]
        self._interval.load_state_dict(state["interval"])
        self._mean.load_state_dict(state["mean"], self._params())
        if state["threshold"] is not None:
            self.optimizer.clipping.threshold.value = state["threshold"]

    def _params(self) -> list[Tensor]:
        return [param for group in self.optimizer.param_groups for param in group["params"]]


class Restarter:
    """Restarts from the mean of the points since the last restart, at growing intervals; SSTM from its y.

    Call ``add_coords`` and then ``make_restart`` after each optimizer step.

    Args:
        optimizer_properties: kept for callers; the optimizer given to ``make_restart`` is restarted in place.
        first_restart_steps_cnt: points before the first restart.
        restart_coeff: growth of the interval, at least 1; it grows by one step at least.
        max_steps_cnt: cap of the interval.
    """

    def __init__(
        self,
        optimizer_properties: _Properties,
        first_restart_steps_cnt: int = 100,
        restart_coeff: float = 1.5,
        max_steps_cnt: int = 5000,
    ) -> None:
        self.optimizer_class = optimizer_properties.optimizer_class
        self.optimizer_kwargs = optimizer_properties.optimizer_kwargs
        self._interval = _Interval(first_restart_steps_cnt, restart_coeff, max_steps_cnt, grows=True)
        self._mean = RunningMean()
        self._loaded: dict[str, Any] | None = None

    def add_coords(self, params: Iterable[Tensor]) -> None:
        """Take in the point that ``params`` are at."""
        params = list(params)
        if self._loaded is not None:
            self._mean.load_state_dict(self._loaded, params)
            self._loaded = None
        self._mean.add(params)

    def make_restart(self, model: nn.Module, optimizer: Optimizer) -> Optimizer:
        """Restart if the interval is full.

        Args:
            model: whose parameters ``add_coords`` was given.
            optimizer: of the model; restarted in place.

        Returns:
            The optimizer to go on with: ``optimizer``.
        """
        if self._interval.reached(self._mean.count):
            known = set(map(id, model.parameters()))
            if any(id(param) not in known for param in self._mean._params):
                raise ValueError("add_coords was given parameters of another model")
            if isinstance(optimizer, SSTM):
                optimizer.eval()  # the paper restarts it from its output y, which is an average already
            else:
                self._mean.write_back()
            self._mean.clear()
            self._interval.next()
            reset_optimizer(optimizer)
        return optimizer

    def state_dict(self) -> dict[str, Any]:
        mean = self._loaded if self._loaded is not None else self._mean.state_dict()
        return {"interval": self._interval.state_dict(), "mean": mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._interval.load_state_dict(state["interval"])
        self._mean.clear()
        self._loaded = state["mean"] if state["mean"]["count"] else None


class _Interval:
    """Steps of a stage, growing from stage to stage."""

    def __init__(self, first: int, factor: float, most: int | None, *, grows: bool = False) -> None:
        if first < 1:
            raise ValueError(f"the first restart must come after at least 1 step, got {first}")
        if factor < 1:
            raise ValueError(f"an interval must grow by a factor of at least 1, got {factor}")
        if most is not None and most < first:
            raise ValueError(f"the longest interval must be at least the first, {first}, got {most}")
        self.length = first
        self.done = 0
        self._factor = factor
        self._most = most
        self._grows = grows

    def reached(self, count: int) -> bool:
        return count >= self.length

    def step(self) -> bool:
        self.done += 1
        if not self.reached(self.done):
            return False
        self.next()
        return True

    def next(self) -> None:
        self.done = 0
        # Without the one step more, an interval of 1 would never grow by a factor below 2.
        longer = max(math.ceil(self.length * self._factor), self.length + self._grows)
        self.length = longer if self._most is None else min(longer, self._most)

    def state_dict(self) -> dict[str, Any]:
        return {"length": self.length, "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.length, self.done = state["length"], state["done"]


def _threshold(optimizer: Optimizer) -> float | None:
    """The constant threshold of its clipping; None where it has none, or one that changes by itself."""
    threshold = getattr(getattr(optimizer, "clipping", None), "threshold", None)
    return threshold.value if isinstance(threshold, Constant) and isinstance(threshold.value, float) else None
