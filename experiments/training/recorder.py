"""What every step leaves in the records, brought over from the device many steps at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim import Optimizer

Record = dict[str, float]

# So many losses in a row that are not finite are no bad batch any more: the weights themselves are lost.
DIVERGED_AFTER = 20


class Diverged(Exception):
    """The train loss is not finite any more, or the evaluation loss is not."""


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
        self.bad_losses = 0
        """Losses up to the last flush, in a row, that are not finite."""

    def add(self, known: Record, loss: Tensor, optimizer: Optimizer) -> None:
        """Remember one step: what the host knows, the loss, and what the clipping did."""
        told = optimizer.clipping.telemetry
        values = (loss, told.grad_norm, told.threshold, told.clip_coef, told.clipped)
        if self._host:
            known |= {name: float(value) for name, value in zip(self.COLUMNS, values, strict=True)}
        else:
            row = self._device_rows[len(self._known)]
            tensors = [v.to(row.dtype) if isinstance(v, Tensor) else row.new_full((), v) for v in values]
            torch.stack(tensors, out=row)
        self._known.append(known)

    def flush(self) -> list[Record]:
        """Records since the last flush; here the host waits for the device.

        They end where ``DIVERGED_AFTER`` losses in a row were bad, so that a run that diverges has the same
        records however often one looks.
        """
        records, self._known = self._known, []
        if not self._host:
            for record, row in zip(records, self._device_rows[: len(records)].tolist(), strict=True):
                record |= zip(self.COLUMNS, row, strict=True)
        for count, record in enumerate(records, start=1):
            self.bad_losses = 0 if math.isfinite(record["train/loss"]) else self.bad_losses + 1
            if self.bad_losses == DIVERGED_AFTER:
                return records[:count]
        return records

    def check(self, step: int, last: bool) -> None:
        """Raise ``Diverged`` if the losses flushed so far, up to ``step``, say so."""
        if self.bad_losses >= (1 if last else DIVERGED_AFTER):
            raise Diverged(f"the last {self.bad_losses} train losses up to step {step} are not finite")
