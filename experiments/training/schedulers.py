"""Schedules of the learning rate where transformers has none: torch's own, after a warm-up.

All of conf/scheduler warm up alike: from 0 at the first step, linearly. A budget that ends within the warm-up
never leaves it.
"""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, SequentialLR, StepLR


def step(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    step_size: int | None = None,
    gamma: float = 0.1,
) -> LRScheduler:
    r"""Multiply the learning rate by :math:`\gamma` every ``step_size`` steps after the warm-up of W steps.

    .. math::
        \text{lr}_k = \text{lr} \, \gamma^{\lfloor (k - W) / \text{step\_size} \rfloor}

    Args:
        optimizer: whose groups give lr.
        num_warmup_steps: W.
        num_training_steps: of the whole run.
        step_size: steps; None is a third of those after the warm-up.
        gamma: factor.
    """
    if step_size is None:
        step_size = max(1, math.ceil((num_training_steps - num_warmup_steps) / 3))
    return _after_warm_up(StepLR(optimizer, step_size, gamma), num_warmup_steps)


def one_cycle(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> LRScheduler:
    """Torch's ``OneCycleLR``: up to lr by a half cosine and down again; the momentum stays as it is.

    A warm-up before it leads to where the cycle starts, lr / ``div_factor``.

    Args:
        optimizer: whose groups give lr, the highest of the cycle.
        num_warmup_steps: before the cycle.
        num_training_steps: of the whole run.
        pct_start: share of the cycle that goes up.
        div_factor: lr over where the cycle starts.
        final_div_factor: where it starts over where it ends.
    """
    cycle = OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=max(1, num_training_steps - num_warmup_steps),
        pct_start=pct_start,
        div_factor=div_factor,
        final_div_factor=final_div_factor,
        cycle_momentum=False,
    )
    return _after_warm_up(cycle, num_warmup_steps)


def polynomial(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    power: float = 0.9,
    lr_end: float = 0.0,
) -> LRScheduler:
    r"""Transformers' polynomial decay to ``lr_end`` after the warm-up of W of all T steps.

    .. math::
        \text{lr}_k = \text{lr}_T + (\text{lr} - \text{lr}_T) \left(\frac{T - k}{T - W}\right)^\text{power}

    Args:
        optimizer: whose groups give lr.
        num_warmup_steps: W.
        num_training_steps: T.
        power: 1 decays linearly.
        lr_end: :math:`\text{lr}_T`, below lr.
    """
    from transformers import get_polynomial_decay_schedule_with_warmup

    # It divides by T - W also where no step is left to decay in.
    num_training_steps = max(num_training_steps, num_warmup_steps + 1)
    return get_polynomial_decay_schedule_with_warmup(
        optimizer, num_warmup_steps, num_training_steps, lr_end=lr_end, power=power
    )


def _after_warm_up(schedule: LRScheduler, warmup_steps: int) -> LRScheduler:
    if not warmup_steps:
        return schedule
    warm_up = LambdaLR(schedule.optimizer, lambda k: k / warmup_steps)
    return SequentialLR(schedule.optimizer, [warm_up, schedule], milestones=[warmup_steps])
