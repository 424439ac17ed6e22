"""What a run came to: the parts of its summary."""

from __future__ import annotations

import math
import platform
import resource
import sys
from typing import Any

import torch

from experiments.training.clock import Clock
from experiments.training.recorder import Record

PACKAGES = {
    **{name: name for name in ("torch", "numpy", "torchvision", "transformers", "datasets")},
    "torch_clip": "torch-clip",
    "hydra": "hydra-core",
    "torch_geometric": "torch-geometric",
    "segmentation_models_pytorch": "segmentation-models-pytorch",
}
"""Module -> the package that brings it."""


class Results:
    """Final and best evaluation, and what clipping did, of the records so far.

    Args:
        metric: that decides which evaluation is best.
        higher_is_better: whether the largest is.
    """

    def __init__(self, metric: str, higher_is_better: bool) -> None:
        self._name = f"val/{metric}"
        self._sign = 1 if higher_is_better else -1
        self._clipped = 0.0
        self.steps = 0
        self.final: Record = {}
        self.best: Record = {}
        """Step and value."""

    @property
    def clip_fraction(self) -> float:
        """Mean of ``clipped`` over the steps."""
        return self._clipped / self.steps if self.steps else math.nan

    @property
    def at_best(self) -> bool:
        """Whether the last evaluation is the best so far."""
        return bool(self.best) and self.best["step"] == self.final["step"]

    def add(self, records: list[Record]) -> None:
        """Take in the next records."""
        for record in records:
            if "lr" in record:
                self.steps = record["step"]
                self._clipped += record["clipped"]
                continue
            self.final = record
            value = record[self._name]
            # NaN compares as neither, and would stay the best of all where it comes first.
            better = not self.best or self._sign * value > self._sign * self.best["value"]
            if better and not math.isnan(value):
                self.best = {"step": record["step"], "value": value}

    def as_dict(self) -> dict[str, Any]:
        """Their part of the summary."""
        names = ("steps", "final", "best", "clip_fraction")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """What goes on in a resumed run."""
        return {"clipped": self._clipped, "steps": self.steps, "final": self.final, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._clipped, self.steps = state["clipped"], state["steps"]
        self.final, self.best = state["final"], state["best"]


def cost(clock: Clock, steps: int, device: torch.device) -> dict[str, Any]:
    """Time of the training steps, evaluation and records apart; peak memory of the process or the device."""
    clock.settle()
    seconds = sum(clock.seconds.values())
    on_cuda = device.type == "cuda"
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    peak = (
        torch.cuda.max_memory_allocated(device)
        if on_cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    )
    return {
        "seconds": seconds,
        "steps_per_second": steps / seconds if seconds else math.nan,
        "time": clock.seconds,
        "peak_memory_bytes": peak,
        "device": torch.cuda.get_device_name(device) if on_cuda else f"cpu, {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Versions of what was imported and numbers may depend on; "unknown" of what runs uninstalled."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for module, name in PACKAGES.items():
        if module not in sys.modules:
            continue
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def headline(summary: dict[str, Any]) -> str:
    """One line: final and best metric, clip fraction, speed."""
    metric = summary["metric"]
    final, best = summary["final"], summary["best"]
    return (
        f"{metric} {final[f'val/{metric}']:.4f} (best {best['value']:.4f} at step {best['step']}), "
        f"clipped {100 * summary['clip_fraction']:.3g}% of {summary['clip_unit']}, "
        f"{summary['steps']} steps at {summary['steps_per_second']:.1f} per second"
    )
