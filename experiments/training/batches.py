"""Training batches, epoch after epoch, from wherever a run stopped."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from experiments.tasks.base import Batch, TrainLoader


class Batches:
    """An endless stream of a loader's batches that knows where it is.

    Args:
        loader: gives the batches of one epoch.
    """

    def __init__(self, loader: TrainLoader) -> None:
        self._loader = loader
        self._batches: Iterator[Batch] | None = None
        self._epoch = 0
        self._taken = 0  # of this epoch

    @property
    def epochs(self) -> float:
        """Epochs so far."""
        size = len(self._loader)
        return (self._epoch * size + self._taken) / size

    def __next__(self) -> Batch:
        if self._batches is None:
            self._open()
        while (batch := next(self._batches, None)) is None:
            self._epoch, self._taken = self._epoch + 1, 0
            self._open()
        self._taken += 1
        return batch

    def _open(self) -> None:
        self._loader.set_epoch(self._epoch)
        if self._taken and hasattr(self._loader, "skip"):
            self._loader.skip(self._taken)
            self._batches = iter(self._loader)
        else:
            self._batches = itertools.islice(iter(self._loader), self._taken, None)

    def state_dict(self) -> dict[str, int]:
        """Where the stream is."""
        return {"epoch": self._epoch, "taken": self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go there. A data loader draws from the global generators here, as it did when the epoch began."""
        self._epoch, self._taken = state["epoch"], state["taken"]
        self._open()
