"""What the top-level keys of a config may be, checked before anything is read or written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from experiments.errors import UserError, nearest
from experiments.training.checkpoint import KEEPS
from experiments.training.precision import DTYPES
from experiments.training.train import Budget

LARGEST = 2**31 - 1
WHOLE_NUMBERS = {
    **dict.fromkeys(("max_steps", "eval_every", "log_every", "checkpoint_every", "accumulate", "nproc"), 1),
    **dict.fromkeys(("seed", "warmup_steps"), 0),
    "samples": 100,
}
"""Key -> least value."""
SWITCHES = ("force", "quiet", "compile")
CHOICES = {"precision": tuple(DTYPES), "keep": KEEPS}


def check(config: dict[str, Any]) -> None:
    """Raise ``UserError`` for a value that is out of its range; the keys are all of these or some."""
    for key, value in config.items():
        if key in WHOLE_NUMBERS:
            least = WHOLE_NUMBERS[key]
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= LARGEST:
                raise UserError(f"{key} must be a whole number from {least} to {LARGEST}, got {value!r}")
        elif key in SWITCHES and not isinstance(value, bool):
            raise UserError(f"{key} must be true or false, got {value!r}")
        elif key in CHOICES and value not in CHOICES[key]:
            choices = CHOICES[key]
            raise UserError(
                f"{key} must be one of {', '.join(choices)}, got {value!r}.{nearest(str(value), choices)}"
            )
    seconds = config.get("max_seconds")
    if seconds is not None and not (
        isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 < seconds < math.inf
    ):
        raise UserError(f"max_seconds must be a number above 0, or null for no limit, got {seconds!r}")
    results_dir = config["results_dir"]
    if not isinstance(results_dir, str) or not results_dir:
        raise UserError(f"results_dir must be a folder, got {results_dir!r}")
    place = Path(results_dir).absolute()
    there = next(path for path in (place, *place.parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"results_dir: cannot write {place}: {there} is no folder")


def budget(config: dict[str, Any]) -> Budget:
    """The steps of a config that is checked."""
    steps = {key: config[key] for key in Budget._fields}
    return Budget(**steps | {"log_every": min(config["log_every"], config["max_steps"])})


def device(name: str, world: int) -> torch.device:
    """The device of that name; ``auto`` is CUDA where there is one. Of several processes each has its own."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except (RuntimeError, TypeError):
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device={name}: there are {torch.cuda.device_count()} CUDA devices here; try device=cpu"
        )
    if world > 1 and found.index is not None:
        raise UserError(f"device must be auto, cpu or cuda with {world} processes, got {name!r}")
    if found.type not in ("cpu", "cuda"):
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    return found
