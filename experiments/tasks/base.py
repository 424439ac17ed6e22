"""The contract between a task and the runner: what a task gives, in the order the runner asks for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from experiments.errors import UserError
from experiments.tasks.needs import Need

Batch = dict[str, Tensor]
"""What a loader gives and ``Task.forward`` takes; the runner moves its tensors to the model's device."""


class Output(NamedTuple):
    """What one batch gives: the loss to differentiate, and what the metrics need to know of it."""

    loss: Tensor
    """Mean loss of the batch, shape ()."""
    size: int
    """Examples that ``loss`` is a mean of: its weight in the loss of a whole split."""
    tally: Tensor | int = 0
    """Counts or sums of one fixed shape, without a graph, that add up over batches: metrics are functions of
    their sum. Of a classification its confusion matrix; 0 where the loss says all."""


class TrainLoader(Protocol):
    """Batches of one epoch, in an order drawn from (seed, epoch) alone, so that resuming can repeat it.

    May have ``skip(batches)``: leave out so many at the start of the next iteration, without reading them.
    Without it, resuming reads them again. May have ``split(rank, world)``: give one of ``world`` parts of
    every batch, over which the mean of their losses is the loss of the batch: equal parts, or ``mean_over``
    in each, which says by what to divide the sum of its examples' losses. Without it, processes that train
    together all compute the whole batch.
    """

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is, counted from 0."""

    def __len__(self) -> int:
        """Batches in an epoch."""

    def __iter__(self) -> Iterator[Batch]: ...


class Task(ABC):
    """Data, model, loss and metrics of one benchmark problem.

    A constructor only checks and stores its settings, so that a finished run is recognised before any data
    is read; ``load`` reads the data and raises ``UserError`` for whatever the user can mend.
    """

    metric: ClassVar[str]
    """Name of the metric that decides which evaluation is best: one of ``metrics``, or ``loss``."""
    higher_is_better: ClassVar[bool] = True
    """Whether the best evaluation has the largest ``metric``, or the smallest."""

    def input_files(self) -> list[Path]:
        """Local files that change the numbers, data and weights: fingerprinted into the run's identity."""
        return []

    def needs(self) -> list[Need]:
        """Data and weights that ``load`` and ``build_model`` read and the task does not bring."""
        return []

    @abstractmethod
    def load(self) -> None:
        """Read or generate the data. Called once, before everything below."""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """A new model, initialised from torch's global generator, which the runner has seeded."""

    @abstractmethod
    def train_loader(self, seed: int) -> TrainLoader:
        """Training batches, epoch by epoch: most often an ``EpochLoader``."""

    def eval_loader(self) -> Iterable[Batch]:
        """Batches of the evaluation split, in fixed order; asked by ``evaluate`` as it stands below."""
        raise NotImplementedError

    @abstractmethod
    def forward(self, model: nn.Module, batch: Batch) -> Output:
        """Loss and tally of one batch that lies on the model's device; the host must not wait for it."""

    def metrics(self, tally: Tensor) -> dict[str, float]:
        """Names and values, beside the loss, of tallies added up over batches: recorded of both splits."""
        return {}

    @torch.no_grad()
    def evaluate(self, model: nn.Module, device: torch.device) -> tuple[float, dict[str, float]]:
        """Loss and metrics over the whole evaluation split; leaves ``model`` in evaluation mode.

        Args:
            model: on ``device``.
            device: where batches go.
        """
        model.eval()
        loss = torch.zeros((), device=device)
        size = 0
        tally: Tensor | int = 0
        for batch in self.eval_loader():
            output = self.forward(model, to_device(batch, device))
            loss += output.loss * output.size
            size += output.size
            tally = tally + output.tally
        return loss.item() / size, self.metrics(tally)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on ``device``; the host does not wait for copies from pinned memory."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """A generator on the CPU whose draws depend on (seed, epoch) alone."""
    # The factor keeps (seed, epoch) pairs apart: seed 1 epoch 0 must not repeat seed 0 epoch 1.
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


class EpochSampler(Sampler[list[int]]):
    """Batches of indices in an order drawn from (seed, epoch) alone.

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
        self.start = 0
        """Batches left out at the start of an iteration."""
        self.part = slice(None)
        """What is given of each batch."""

    def __len__(self) -> int:
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.size, generator=epoch_generator(self.seed, self.epoch)).tolist()
        for start in range(self.start * self.batch_size, len(self) * self.batch_size, self.batch_size):
            yield order[start : start + self.batch_size][self.part]


class EpochLoader(DataLoader):
    """A data set's batches, epoch by epoch, in the order of an ``EpochSampler``.

    A data set that augments must do so by (seed, epoch, index), or a resumed run sees other examples; where
    it has a ``set_epoch`` of its own, it is told the epoch.

    Args:
        dataset: with a length.
        batch_size: examples in a batch.
        seed: of the run.
        options: of ``DataLoader``, such as ``num_workers``, ``collate_fn``, ``pin_memory``.
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int, **options: Any) -> None:
        sampler = EpochSampler(len(dataset), batch_size, seed)
        super().__init__(dataset, batch_sampler=sampler, **options)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is, counted from 0."""
        self.batch_sampler.epoch = epoch
        self.batch_sampler.start = 0
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def skip(self, batches: int) -> None:
        """Leave out so many batches at the start of the next iteration, unread; after ``set_epoch``."""
        self.batch_sampler.start = batches

    def split(self, rank: int, world: int) -> None:
        """Give one of ``world`` equal parts of every batch from now on."""
        size = self.batch_sampler.batch_size
        if size % world:
            raise UserError(
                f"batch_size must be a multiple of {world}, the processes that share it, got {size}"
            )
        self.batch_sampler.part = slice(rank, None, world)


def as_is(batch: Batch) -> Batch:
    """``collate_fn`` for a data set whose ``__getitems__`` gives a whole batch."""
    return batch
