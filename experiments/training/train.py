"""The training loop. Knows no config and no file; yields records."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from experiments.tasks.base import Task, to_device
from experiments.training.precision import Precision
from experiments.training.recorder import Diverged, Record
from experiments.training.state import State


class Budget(NamedTuple):
    """How long to train, and how often to look, in steps."""

    max_steps: int
    eval_every: int
    log_every: int
    checkpoint_every: int
    accumulate: int = 1
    """Batches whose gradients make one step."""


class Moment(NamedTuple):
    """Where the loop pauses, for records to be written and the state to be saved."""

    records: list[Record]
    evaluated: bool = False
    """``records`` is an evaluation, and the model holds the weights that were evaluated."""
    state: dict[str, Any] | None = None
    """Where nothing of a step is left to do: what is saved now goes on as if it had never stopped."""


def train(
    task: Task,
    state: State,
    budget: Budget,
    precision: Precision,
    *,
    device: torch.device,
    should_stop: Callable[[int], bool] = lambda step: False,
) -> Iterator[Moment]:
    """Train ``state.model`` up to step ``budget.max_steps``.

    Args:
        task: gives loss and metrics; loaded.
        state: at step 0, or wherever it was saved.
        budget: steps.
        precision: of forward and backward.
        device: of the model.
        should_stop: asked after each step, whose number it is given; where it says so, that step is the last.

    Yields:
        Moments: with the records of the steps every ``budget.log_every`` steps, with that of an evaluation,
        and with the state every ``budget.checkpoint_every`` steps and after the last. In between the host
        never waits for the device. All processes see the same.

    Raises:
        Diverged: after the records that show it.
    """
    model, optimizer, clock, ranks = state.model, state.optimizer, state.clock, state.ranks
    replica = ranks.replicate(model, accumulates=budget.accumulate > 1)
    model.train()
    while state.step < budget.max_steps:
        clock.start()
        loss = torch.zeros((), device=device)
        for missing in reversed(range(budget.accumulate)):
            batch = to_device(next(state.batches), device)
            clock.lap("data")
            ranks.exchange_gradients(replica, now=missing == 0)
            with precision.autocast():
                output = task.forward(replica, batch)
            clock.lap("forward")
            state.scaler.scale(output.loss / budget.accumulate).backward()
            clock.lap("backward")
            loss += output.loss.detach() / budget.accumulate
            state.tally = state.tally + output.tally
        lr = optimizer.param_groups[0]["lr"]
        state.scaler.unscale_(optimizer)
        loss = ranks.mean(loss)
        optimizer.clipping.observe(loss)
        optimizer.step()  # not the scaler's: the clipping skips what is not finite, and says so
        state.scaler.update()
        state.scheduler.step()
        optimizer.zero_grad()
        clock.lap("clip+step")

        state.step += 1
        state.recorder.add({"step": state.step, "epoch": state.batches.epochs, "lr": lr}, loss, optimizer)
        last = state.step == budget.max_steps
        evaluates = last or state.step % budget.eval_every == 0
        saves = last or state.step % budget.checkpoint_every == 0
        looks = evaluates or saves or state.step % budget.log_every == 0
        # Several processes agree only where the host waits for the device anyway.
        stopping = (looks or ranks.alone) and ranks.any(should_stop(state.step))
        if looks or stopping:
            clock.settle()
            records = state.recorder.flush()
            yield Moment(records)
            state.recorder.check(records[-1]["step"], last)
        if evaluates:
            with output_of(optimizer):
                record = evaluation(task, state, precision, device)
                yield Moment([record], evaluated=True)
            if not math.isfinite(record["val/loss"]):
                raise Diverged(f"the evaluation loss is {record['val/loss']} after step {state.step}")
            state.tally = 0
            model.train()
        if saves or stopping:
            yield Moment([], state=state.state_dict())
        if stopping:
            return


def evaluation(task: Task, state: State, precision: Precision, device: torch.device) -> Record:
    """The record of an evaluation, and of the training batches since the one before."""

    def evaluate() -> tuple[float, dict[str, float]]:
        with precision.autocast():
            return task.evaluate(state.model, device)

    record = {"step": state.step, "epoch": state.batches.epochs}
    tally = state.ranks.sum(state.tally)
    record |= {f"train/{name}": value for name, value in task.metrics(tally).items()}
    loss, metrics = state.ranks.from_first(evaluate)
    return record | {"val/loss": loss} | {f"val/{name}": value for name, value in metrics.items()}


@contextlib.contextmanager
def output_of(optimizer: Optimizer) -> Iterator[None]:
    """The optimizer's output in the parameters, where that is not the point it trains at (SSTM)."""
    swaps = hasattr(optimizer, "eval") and hasattr(optimizer, "train")
    if swaps:
        optimizer.eval()
    yield
    if swaps:
        optimizer.train()
