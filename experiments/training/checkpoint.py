"""Checkpoints of a run: ``last`` to go on from, ``best`` to use, and every one where that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from experiments.errors import UserError
from experiments.runs import FINISHED, Run
from experiments.training.ends import lack_of_memory

KEEPS = ("best", "last", "all", "none")


class Checkpoints:
    """Writes a run's checkpoints and reads them back.

    Args:
        place: the run.
        keep: what stays when the run has ended well, one of ``KEEPS``. Until then ``last`` is always there.
    """

    def __init__(self, place: Run, keep: str) -> None:
        self._place = place
        self._keep = keep

    def save_last(self, step: int, content: dict[str, Any], *, final: bool) -> None:
        """Save all that is needed to go on; of the ``final`` step only where it is to be kept."""
        if self._keep == "all":
            self._write(f"step={step}", content)
        if not final or self._keep in ("last", "all"):
            self._write("last", content)

    def save_best(self, content: dict[str, Any]) -> None:
        """Save what was best so far."""
        if self._keep in ("best", "all"):
            self._write("best", content)

    def load_last(self) -> dict[str, Any] | None:
        """What the last ``save_last`` saved, on the CPU; None if there is none."""
        path = self._place.checkpoint_path("last")
        return _read(path, "force=true starts anew") if path.exists() else None

    def tidy(self, status: str) -> None:
        """Remove what is not to be kept of a run that ended as ``status``."""
        if status in FINISHED and self._keep != "all":
            self._place.drop_checkpoints(but=self._keep)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        with self._place.write_checkpoint(name) as file:
            save(content, file)


def weights_of(path: Path) -> tuple[dict[str, Tensor], int]:
    """The weights in any checkpoint of a run, on the CPU, and the step that they are of.

    Raises:
        UserError: the file is damaged, or is no checkpoint.
    """
    content = _read(path, "give another one")
    if isinstance(content, dict) and "step" in content:
        model = content.get("model") or content.get("state", {}).get("model")
        if isinstance(model, dict):
            return model, content["step"]
    raise UserError(f"{path} is no checkpoint of a run")


def _read(path: Path, way_on: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises one of many
        if lack_of_memory(error) is not None:
            raise UserError(f"memory has run out reading the checkpoint {path}: free some") from error
        raise UserError(f"cannot read the checkpoint {path} ({type(error).__name__}); {way_on}") from error


def save(content: dict[str, Any], file: BinaryIO) -> None:
    """``torch.save``, whose complaint about a full disk is the disk's own."""
    try:
        torch.save(content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
