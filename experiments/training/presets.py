"""Which preset a launch uses, and what a preset chooses by default: resolvers for conf/run.yaml."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.errors import UserError, nearest


def conf_dir() -> Path:
    """The folder of YAML: inside the package where it is installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


class Presets:
    """The presets of one launch: chosen on the command line, or once for the task.

    Args:
        chosen: name given on the command line, or None.
        given: settings of the command line, which may say where data and weights are.
    """

    def __init__(self, chosen: str | None, given: Mapping[str, str]) -> None:
        self.chosen = chosen
        self.given = {key: value for key, value in given.items() if value != "null"}
        self.complaint: UserError | None = None
        """What ``value`` raised, which Hydra does not pass on."""

    @functools.cache  # noqa: B019  one object a launch
    def name(self, task: str) -> tuple[str, str]:
        """Preset for ``task``, and why."""
        if self.chosen is not None:
            return self.chosen, "as asked"
        if "paper" not in self._names(task):
            return self._names(task)[0], "the only one of this task"
        import torch

        if not torch.cuda.is_available():
            return "mini", "there is no CUDA device; preset=paper runs the full one on any device"
        missing = _missing_for_paper(task, self.given)
        if missing:
            return "mini", f"preset=paper lacks {missing}"
        return "paper", "there is a CUDA device and the data is at hand; preset=mini runs in seconds"

    def value(self, key: str, task: str) -> Any:
        """What the launch's preset of ``task`` says of ``key``, before Hydra composes it."""
        import yaml

        name = self.name(task)[0]
        choices = self._names(task)
        if name not in choices:
            self.complaint = UserError(
                f"task {task} has no preset {name!r}; it has {', '.join(choices)}.{nearest(name, choices)}"
            )
            raise self.complaint
        return yaml.safe_load((conf_dir() / "preset" / task / f"{name}.yaml").read_text())[key]

    def _names(self, task: str) -> list[str]:
        return sorted(path.stem for path in (conf_dir() / "preset" / task).glob("*.yaml"))


def _missing_for_paper(task: str, given: Mapping[str, str]) -> str | None:
    """What the task's paper preset would have to fetch and cannot; tried once, at launch."""
    import importlib

    return importlib.import_module(f"experiments.tasks.{task}").missing_for_paper(given)
