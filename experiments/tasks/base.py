"""The contract between a task and the runner: what a task gives, in the order the runner asks for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler


class Output(NamedTuple):
    """What one batch gives: the loss to differentiate, and predicted and true classes for the metrics."""

    loss: Tensor
    """Mean loss of the batch, shape ()."""
    predictions: Tensor
    """Class indices, any shape."""
    targets: Tensor
    """Class indices, the shape of ``predictions``."""


class Task(ABC):
    """Data, model, loss and metrics of one benchmark problem.

    A constructor only checks and stores its settings, so that a finished run is recognised before any data
    is read; ``load`` reads the data and raises ``UserError`` for whatever the user can mend.
    """

    metric: ClassVar[str]
    """Name of the metric that decides which evaluation is best; larger is better."""
    num_classes: int
    """Side of the confusion matrix that the metrics are functions of."""

    def input_files(self) -> list[Path]:
        """Local files that change the numbers, data and weights: fingerprinted into the run's identity."""
        return []

    @abstractmethod
    def load(self) -> None:
        """Read or generate the data. Called once, before everything below."""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """A new model, initialised from torch's global generator, which the runner has seeded."""

    @abstractmethod
    def train_loader(self, seed: int) -> DataLoader:
        """Batches of one epoch, with an ``EpochSampler`` as ``batch_sampler``."""

    @abstractmethod
    def eval_loader(self) -> DataLoader:
        """Batches of the evaluation split, in fixed order."""

    @abstractmethod
    def forward(self, model: nn.Module, batch: Any) -> Output:
        """Loss and predictions of one batch that lies on the model's device."""

    @abstractmethod
    def metrics(self, confusion: Tensor) -> dict[str, float]:
        """Metric names and values of a confusion matrix, (num_classes, num_classes), rows are targets."""


class EpochSampler(Sampler[list[int]]):
    """Batches of indices in an order drawn from (seed, epoch) alone, so that resuming can repeat it.

    Args:
        size: number of examples.
        batch_size: indices in a batch; a last, smaller batch is dropped unless it is the only one.
        seed: of the run.
    """

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        self.size = size
        self.batch_size = min(batch_size, size)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        # The factor keeps (seed, epoch) pairs apart: seed 1 epoch 0 must not repeat seed 0 epoch 1.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield order[start : start + self.batch_size]
