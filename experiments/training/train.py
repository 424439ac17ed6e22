"""The training loop. Knows no config and no file; yields records."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from experiments.tasks.base import Task
from experiments.tasks.metrics import confusion_matrix
from experiments.training.clock import Clock

Record = dict[str, float]

# So many losses in a row that are not finite are no bad batch any more: the weights themselves are lost.
DIVERGED_AFTER = 20


class Diverged(Exception):
    """The train loss is not finite any more, or the evaluation loss is not."""


class Budget(NamedTuple):
    """How long to train, and how often to look, in steps."""

    max_steps: int
    eval_every: int
    log_every: int


def train(
    task: Task,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    budget: Budget,
    *,
    seed: int,
    device: torch.device,
    clock: Clock,
) -> Iterator[list[Record]]:
    """Train ``model`` for ``budget.max_steps`` steps.

    Args:
        task: gives batches, loss and metrics; loaded.
        model: on ``device``.
        optimizer: with a clipping attached, whose telemetry is recorded.
        scheduler: stepped after each optimizer step.
        budget: steps.
        seed: of the data order.
        device: of the model.
        clock: is told where the time goes; evaluation and records are not counted.

    Yields:
        Records, one for each step and one for each evaluation, every ``budget.log_every`` steps and after
        each evaluation. In between the host never waits for the device.

    Raises:
        Diverged: after the records that show it.
    """
    loader = task.train_loader(seed)
    evaluation = task.eval_loader()
    recorder = Recorder(budget.log_every, device)
    confusion = torch.zeros(task.num_classes, task.num_classes, dtype=torch.int64, device=device)
    step = 0
    model.train()
    for epoch in itertools.count():
        loader.batch_sampler.set_epoch(epoch)
        batches = iter(loader)
        while step < budget.max_steps:
            clock.start()
            batch = next(batches, None)
            if batch is None:
                break
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            clock.lap("data")
            output = task.forward(model, batch)
            clock.lap("forward")
            output.loss.backward()
            clock.lap("backward")
            lr = optimizer.param_groups[0]["lr"]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            clock.lap("clip+step")

            step += 1
            confusion += confusion_matrix(output.predictions, output.targets, task.num_classes)
            recorder.add({"step": step, "epoch": step / len(loader), "lr": lr}, output.loss, optimizer)
            last = step == budget.max_steps
            if last or step % budget.log_every == 0 or step % budget.eval_every == 0:
                clock.settle()
                yield recorder.flush()
                recorder.check(step, last)
            if last or step % budget.eval_every == 0:
                record = {"step": step, "epoch": step / len(loader)}
                record |= {f"train/{name}": value for name, value in task.metrics(confusion).items()}
                with output_of(optimizer):
                    record |= evaluate(task, model, evaluation, device)
                yield [record]
                if not math.isfinite(record["val/loss"]):
                    raise Diverged(f"the evaluation loss is {record['val/loss']} after step {step}")
                confusion.zero_()
                model.train()
        if step == budget.max_steps:
            return


@contextlib.contextmanager
def output_of(optimizer: Optimizer) -> Iterator[None]:
    """The optimizer's output in the parameters, where that is not the point it trains at (SSTM)."""
    swaps = hasattr(optimizer, "eval") and hasattr(optimizer, "train")
    if swaps:
        optimizer.eval()
    yield
    if swaps:
        optimizer.train()


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, loader: Any, device: torch.device) -> Record:
    """Loss and metrics over the whole evaluation split, from one confusion matrix."""
    model.eval()
    confusion = torch.zeros(task.num_classes, task.num_classes, dtype=torch.int64, device=device)
    loss = torch.zeros((), device=device)
    examples = 0
    for batch in loader:
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        output = task.forward(model, batch)
        confusion += confusion_matrix(output.predictions, output.targets, task.num_classes)
        loss += output.loss * len(output.targets)
        examples += len(output.targets)
    record = {"val/loss": loss.item() / examples}
    return record | {f"val/{name}": value for name, value in task.metrics(confusion).items()}


class Recorder:
    """Keeps what happens on the device there, and brings many steps over in one transfer.

    Args:
        rows: steps between two transfers.
        device: of the loss.
    """

    COLUMNS = ("train/loss", "grad_norm", "threshold", "clip_coef", "clipped")

    def __init__(self, rows: int, device: torch.device) -> None:
        self._host = device.type == "cpu"
        self._device_rows = torch.empty(0 if self._host else rows, len(self.COLUMNS), device=device)
        self._known: list[Record] = []
        self._bad_losses = 0

    def add(self, known: Record, loss: Tensor, optimizer: Optimizer) -> None:
        """Remember one step: what the host knows, the loss, and what the clipping did."""
        told = optimizer.clipping.telemetry
        values = (loss.detach(), told.grad_norm, told.threshold, told.clip_coef, told.clipped)
        if self._host:
            known |= {name: float(value) for name, value in zip(self.COLUMNS, values, strict=True)}
        else:
            row = self._device_rows[len(self._known)]
            tensors = [v.to(row.dtype) if isinstance(v, Tensor) else row.new_full((), v) for v in values]
            torch.stack(tensors, out=row)
        self._known.append(known)

    def flush(self) -> list[Record]:
        """Records since the last flush; here the host waits for the device."""
        records, self._known = self._known, []
        if not self._host:
            for record, row in zip(records, self._device_rows[: len(records)].tolist(), strict=True):
                record |= zip(self.COLUMNS, row, strict=True)
        for record in records:
            self._bad_losses = 0 if math.isfinite(record["train/loss"]) else self._bad_losses + 1
        return records

    def check(self, step: int, last: bool) -> None:
        """Raise ``Diverged`` if the flushed losses say so."""
        if self._bad_losses >= (1 if last else DIVERGED_AFTER):
            raise Diverged(f"the last {self._bad_losses} train losses up to step {step} are not finite")
