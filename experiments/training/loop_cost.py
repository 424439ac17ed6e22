"""What the runner costs: its steps per second against a loop written by hand, on the same model and data."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

import torch_clip
from experiments.runs import Run
from experiments.tasks.base import Task, to_device
from experiments.tasks.cola import CoLA
from experiments.training.batches import Batches
from experiments.training.bookkeeper import Bookkeeper
from experiments.training.checkpoint import Checkpoints
from experiments.training.clock import clock_for
from experiments.training.loggers import Logger
from experiments.training.precision import Precision
from experiments.training.presets import conf_dir
from experiments.training.progress import Progress
from experiments.training.ranks import Ranks
from experiments.training.recorder import Record, Recorder
from experiments.training.state import State
from experiments.training.summary import Results
from experiments.training.train import Budget, train
from torch_clip.methods import NormClip

STEPS = 20
"""Of one contender before it is the next one's turn: the runner's default `log_every`."""
FOREVER = 10**9


def loop_cost(device: torch.device, rounds: int, warm_up: int = 2) -> dict[str, tuple[float, float]]:
    """Time all contenders in turn, on the mini preset of cola with AdamW clipped by norm.

    Args:
        device: of the model.
        rounds: of ``STEPS`` steps each.
        warm_up: rounds before those, not counted.

    Returns:
        Contender -> median milliseconds of a step, and the median over the rounds of its steps per second
        relative to the loop by hand. All see the same batches in the same round.
    """
    preset = yaml.safe_load((conf_dir() / "preset" / "cola" / "mini.yaml").read_text())
    task = CoLA(model=preset["model"], batch_size=preset["batch_size"], max_length=preset["max_length"])
    task.load()
    with tempfile.TemporaryDirectory() as folder:
        contenders = {
            "by hand": by_hand(task, device),
            "runner": runner(task, device, Recorder(STEPS, device), Path(folder, "runner")),
            "runner, recording nothing": runner(task, device, Blank(STEPS, device), Path(folder, "blank")),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for round_ in range(warm_up + rounds):
            names = list(contenders)
            for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
                began = time.perf_counter()
                next(contenders[name])
                if round_ >= warm_up:
                    seconds[name].append(time.perf_counter() - began)
    hand = seconds["by hand"]
    return {
        name: (
            statistics.median(own) / STEPS * 1e3,
            statistics.median(h / o for h, o in zip(hand, own, strict=True)),
        )
        for name, own in seconds.items()
    }


def by_hand(task: Task, device: torch.device) -> Iterator[None]:
    """The loop that one would write, pausing every ``STEPS`` steps."""
    torch.manual_seed(0)
    model = task.build_model().to(device)
    optimizer = torch_clip.clip(AdamW(model.parameters(), lr=1e-3, fused=True), NormClip(1.0))
    scheduler = LambdaLR(optimizer, lambda k: 1.0)
    loader = task.train_loader(0)
    step = 0
    for epoch in range(FOREVER):
        loader.set_epoch(epoch)
        for batch in loader:
            loss = task.forward(model, to_device(batch, device)).loss
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            if step % STEPS == 0:
                loss.item()  # as any loop that shows its loss now and then
                yield


def runner(task: Task, device: torch.device, recorder: Recorder, folder: Path) -> Iterator[None]:
    """The runner's own loop with its books, pausing every ``STEPS`` steps, when the records are written."""
    torch.manual_seed(0)
    model = task.build_model().to(device)
    optimizer = torch_clip.clip(AdamW(model.parameters(), lr=1e-3, fused=True), NormClip(1.0))
    scheduler = LambdaLR(optimizer, lambda k: 1.0)
    precision, ranks = Precision("fp32", device), Ranks(0, 1, device)
    batches, clock = Batches(task.train_loader(0)), clock_for(device)
    state = State(model, optimizer, scheduler, precision.scaler(), batches, recorder, clock, ranks)
    place, results = Run(folder), Results(task.metric, task.higher_is_better)
    place.start({})
    progress = Progress(FOREVER, task.metric, results, quiet=True)
    books = Bookkeeper(place, Checkpoints(place, "none"), state, results, progress, Logger(), FOREVER, {})
    for moment in train(task, state, Budget(FOREVER, FOREVER, STEPS, FOREVER), precision, device=device):
        books.write(moment)
        yield


class Blank(Recorder):
    """Records the step alone, for what the telemetry costs."""

    def add(self, known: Record, loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        self._known = [known | {"train/loss": 0.0, "clipped": 0.0}]

    def flush(self) -> list[Record]:
        return self._known
