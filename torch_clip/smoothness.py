"""How smooth is a loss: the L that ``SSTM`` asks for."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def estimate_smoothness(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    *,
    lr: float = 1e-3,
    quantile: float = 0.5,
) -> float:
    r"""Estimate the smoothness constant of a loss along gradient steps.

    .. math::
        L_i = \frac{\|\nabla f(x_{i+1}, \xi_i) - \nabla f(x_i, \xi_i)\|_2}{\|x_{i+1} - x_i\|_2}, \qquad
        x_{i+1} = x_i - \text{lr} \, \nabla f(x_i, \xi_i)

    Both gradients of a quotient are of the same batch with the same random numbers (dropout), so that it
    measures the loss and not its noise. Works on a copy: the model, its gradients and buffers, and torch's
    generators stay as they are.

    Args:
        model: where to start; trained in the mode it is in.
        loss: gives a scalar from a model and a batch.
        batches: one quotient each.
        lr: of the steps between which gradients are compared, in (0, inf).
        quantile: of the quotients, in [0, 1]; the median is robust, 1 is the largest.

    Returns:
        L, in units of gradient norm per parameter distance.

    Raises:
        ValueError: no batch gave a step of positive, finite length, or a setting is out of its range.

    Example:
        >>> import torch
        >>> weight = torch.nn.Linear(2, 1, bias=False)  # f = 3 / 2 (w x)^2 with x = (1, 1): L = 6
        >>> def loss(model, x):
        ...     return 1.5 * model(x).square().sum()
        >>> round(estimate_smoothness(weight, loss, [torch.ones(1, 2)]), 3)
        6.0
    """
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be in (0, inf), got {lr}")
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile must be in [0, 1], got {quantile}")
    model = copy.deepcopy(model)
    params = [param for param in model.parameters() if param.requires_grad]
    if not params:
        raise ValueError("the model has no parameter that requires a gradient")
    devices = sorted({param.device.index for param in params if param.device.type == "cuda"})
    quotients = []
    with torch.random.fork_rng(devices):
        for i, batch in enumerate(batches):
            start = [param.detach().clone() for param in params]
            torch.manual_seed(i)
            before = _gradient(model, loss, batch, params)
            with torch.no_grad():
                torch._foreach_add_(params, before, alpha=-lr)
                # As taken: rounding moves a parameter by less than lr * gradient, or not at all.
                step = _norm(torch._foreach_sub(params, start))
            torch.manual_seed(i)
            after = _gradient(model, loss, batch, params)
            quotients.append(_norm(torch._foreach_sub(after, before)) / step if step else math.nan)
    finite = torch.tensor([q for q in quotients if math.isfinite(q)], dtype=torch.float64)
    if not len(finite):
        raise ValueError(f"none of {len(quotients)} batches gave a step of positive, finite length")
    return torch.quantile(finite, quantile).item()


def _gradient(model: nn.Module, loss: Callable, batch: Any, params: list[Tensor]) -> list[Tensor]:
    with torch.enable_grad():
        grads = torch.autograd.grad(loss(model, batch), params, allow_unused=True)
    return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(params, grads, strict=True)]


def _norm(tensors: tuple[Tensor, ...] | list[Tensor]) -> float:
    return torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(t).double() for t in tensors])
    ).item()
