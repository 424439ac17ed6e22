"""What a run came to: the parts of its summary."""

from __future__ import annotations

import functools
import math
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from experiments.training.clock import Clock
from experiments.training.train import Record


def results(records: list[Record], metric: str) -> dict[str, Any]:
    """Final and best evaluation, and what clipping did."""
    steps = [record for record in records if "lr" in record]
    evaluations = [record for record in records if "lr" not in record]
    best = max(evaluations, key=lambda record: record[f"val/{metric}"], default=None)
    return {
        "steps": steps[-1]["step"] if steps else 0,
        "final": evaluations[-1] if evaluations else {},
        "best": {"step": best["step"], "value": best[f"val/{metric}"]} if best else {},
        "clip_fraction": sum(record["clipped"] for record in steps) / len(steps) if steps else math.nan,
    }


def cost(clock: Clock, records: list[Record], device: torch.device) -> dict[str, Any]:
    """Time of the training steps, evaluation and records apart; peak memory of the process or the device."""
    clock.settle()
    steps = sum("lr" in record for record in records)
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
    """Versions of what the numbers depend on; "unknown" of what runs without being installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "hydra-core", "numpy", "torch-clip"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


@functools.cache
def code_version() -> str | None:
    """The git commit this package runs from, marked if edited since; None outside a checkout."""
    here = Path(__file__).resolve().parent
    git = functools.partial(subprocess.run, cwd=here, capture_output=True, text=True, check=False)
    try:
        tracked = git(["git", "ls-files", "--error-unmatch", Path(__file__).name])
        if tracked.returncode:
            return None
        commit = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        dirty = git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    except FileNotFoundError:
        return None
    return commit + ("+edited" if dirty else "")


def headline(summary: dict[str, Any]) -> str:
    """One line: final and best metric, clip fraction, speed."""
    metric = summary["metric"]
    final, best = summary["final"], summary["best"]
    return (
        f"{metric} {final[f'val/{metric}']:.4f} (best {best['value']:.4f} at step {best['step']}), "
        f"clipped {100 * summary['clip_fraction']:.3g}% of {summary['clip_unit']}, "
        f"{summary['steps']} steps at {summary['steps_per_second']:.1f} per second"
    )
