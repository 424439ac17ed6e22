"""What conf/figure says of a figure: whose runs it draws, how, and what makes them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import get_class

from experiments.analysis.figures.base import Kind
from experiments.errors import UserError, nearest

KEYS = ("experiment", "runs", "tuned", "figure", "sweeps", "note")
NEEDED = ("experiment", "figure")
TUNED_KEYS = ("seeds", "metric")


@dataclass(frozen=True)
class Plan:
    """A figure as it is meant to be, before it is drawn."""

    name: str
    experiment: str
    """The folder of results that the figure lies in; and whose runs are drawn, unless ``runs`` says so."""
    runs: dict[str, Any]
    """Setting -> the value or values that a run must have."""
    tuned: dict[str, Any]
    """``seeds`` at which the best setting of each method was chosen, by ``metric`` where that is not the
    task's own: it alone is drawn, at its other seeds. Empty: all runs are drawn."""
    figure: dict[str, Any]
    """``_target_`` and settings of its kind."""
    sweeps: tuple[str, ...]
    """What is typed after ``clipbench run -m`` to make its runs."""
    note: str
    """What the caption says of the data."""
    kind: Kind

    @property
    def experiments(self) -> list[str]:
        """Whose runs are drawn: one, unless ``runs`` names others."""
        names = self.runs.get("experiment", self.experiment)
        return names if isinstance(names, list) else [names]

    @property
    def drawn_as(self) -> dict[str, Any]:
        """All that decides what it looks like, its runs apart."""
        return {
            "experiment": self.experiment,
            "runs": self.runs,
            "tuned": self.tuned,
            "figure": self.figure,
            "note": self.note,
        }


def find_plans(folder: Path, names: Sequence[str]) -> list[Plan]:
    """Read the figures of these names, or all, in a folder of YAML."""
    paths = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    for name in names:
        if name not in paths:
            choices = ", ".join(paths) or "none"
            raise UserError(f"there is no figure {name!r}; choose of {choices}.{nearest(name, paths)}")
    return [read_plan(paths[name]) for name in (names or paths)]


def read_plan(path: Path) -> Plan:
    """Read one figure's YAML.

    Raises:
        UserError: there is something wrong with it.
    """
    content = yaml.safe_load(path.read_text())
    if not isinstance(content, dict):
        raise UserError(f"{path} must have keys, {', '.join(KEYS)}")
    for key in content:
        if key not in KEYS:
            raise UserError(f"{path} has the key {key!r}; it takes {', '.join(KEYS)}.{nearest(key, KEYS)}")
    for key in NEEDED:
        if not content.get(key):
            raise UserError(f"{path} lacks {key}")
    sweeps = tuple(content.get("sweeps") or ())
    for sweep in sweeps:
        if not all("=" in word for word in shlex.split(sweep)):
            raise UserError(
                f"{path}: a line of sweeps is KEY=VALUE ..., as after clipbench run -m; got {sweep!r}"
            )
    return Plan(
        name=path.stem,
        experiment=content["experiment"],
        runs=content.get("runs") or {},
        tuned=_tuned(path, content.get("tuned") or {}),
        figure=content["figure"],
        sweeps=sweeps,
        note=content.get("note") or "",
        kind=_kind(path, dict(content["figure"])),
    )


def _tuned(path: Path, tuned: Any) -> dict[str, Any]:
    known = isinstance(tuned, dict) and not set(tuned) - set(TUNED_KEYS)
    seeds = tuned.get("seeds") if known else None
    listed = isinstance(seeds, list) and seeds and all(isinstance(seed, int) for seed in seeds)
    if tuned and not (listed and isinstance(tuned.get("metric"), str | None)):
        raise UserError(f"{path}: tuned takes seeds, a list of them, and a metric's name, got {tuned!r}")
    return tuned


def _kind(path: Path, settings: dict[str, Any]) -> Kind:
    target = settings.pop("_target_", None)
    if target is None:
        raise UserError(f"{path}: figure lacks _target_, such as experiments.analysis.figures.curves.Curves")
    try:
        make = get_class(target)
    except Exception as error:  # whatever the module does when it is imported
        raise UserError(f"{path}: cannot use {target}: {error}") from None
    known = [field.name for field in fields(make)]
    for name in settings:
        if name not in known:
            raise UserError(
                f"{path}: {make.__name__} has no setting {name!r}; it has {', '.join(known)}."
                f"{nearest(name, known)}"
            )
    try:
        return make(**settings)
    except TypeError as error:  # one is missing
        raise UserError(f"{path}: {str(error).replace('__init__()', '')}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
