"""Performance profiles: on how many tasks a method is nearly as fast as the fastest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.analysis.compare import NO_CLIPPING
from experiments.analysis.entries import Entry, by_task
from experiments.analysis.figures import base
from experiments.analysis.marks import Mark
from experiments.analysis.methods import Result
from experiments.analysis.stats import HORIZON, performance_profile, profile_score, time_ratios
from experiments.errors import UserError, nearest

BEYOND = HORIZON + 0.35
"""Where a method is drawn that took longer, or never got there."""


@dataclass(frozen=True, kw_only=True)
class PerformanceProfile:
    """Share of the tasks within a factor of the best time to target; beside it the factor on each task.

    The time is the Kaplan-Meier median of the steps over seeds, infinite where less than half reached the
    target.

    Args:
        title: above the figure.
        targets: task -> what its metric is to reach; of one that is not there the reference's median, as
            ``clipbench compare`` has it.
        reference: method whose median that is, by its name in the figure.
        lines: settings that tell methods apart.
        labels: better names for methods and tasks.
    """

    title: str
    targets: Mapping[str, float] = field(default_factory=dict)
    reference: str = NO_CLIPPING
    lines: Sequence[str] = ("clipping",)
    labels: Mapping[str, str] = field(default_factory=dict)

    def table(self, results: Sequence[Result]) -> pd.DataFrame:
        """A row for each method on each task."""
        entries = base.entries(results, self.lines, self.labels)
        tasks = by_task(entries)
        for name in self._given:
            if name not in tasks:
                raise UserError(f"targets has {name}; tasks are {', '.join(tasks)}.{nearest(name, tasks)}")
        known = {task: self._target(task, of_task) for task, of_task in tasks.items()}
        times: dict[str, dict[str, float]] = {}
        clippings = {}
        for entry in entries:
            times.setdefault(entry.method, {})[entry.task] = entry.steps_to(known[entry.task]).median
            clippings[entry.method] = entry.names["clipping"]
        for method, of_method in times.items():
            if missing := [task for task in tasks if task not in of_method]:
                raise UserError(f"{method} has no runs on {', '.join(missing)}, which others have")
        ratios = time_ratios([[of_method[task] for of_method in times.values()] for task in tasks]).T
        return pd.DataFrame(
            {
                "line": method,
                "clipping": clippings[method],
                "task": task,
                "target": known[task],
                "steps": times[method][task],
                "ratio": ratio,
                "score": profile_score(of_method),
            }
            for method, of_method in zip(times, ratios, strict=True)
            for task, ratio in zip(tasks, of_method, strict=True)
        )

    def _target(self, task: str, entries: Sequence[Entry]) -> float:
        if task in self._given:
            return self._given[task]
        medians = {entry.method: entry.median for entry in entries}
        target = medians.get(self.reference)
        if target is None:
            raise UserError(
                f"targets has none for {task}, where there is no reference {self.reference!r} to give one; "
                f"its methods are {', '.join(medians)}.{nearest(self.reference, medians)}"
            )
        if not math.isfinite(target):
            raise UserError(f"targets has none for {task}, where half the runs of {self.reference} diverged")
        return target

    @property
    def _given(self) -> dict[str, float]:
        """The targets, by what the tasks are called here."""
        return {self.labels.get(task, task): target for task, target in self.targets.items()}

    def draw(self, table: pd.DataFrame) -> Figure:
        """The profile on the left, the tasks behind it on the right."""
        drawn = base.marks_of(table)
        tasks = list(dict.fromkeys(table["task"]))
        figure = Figure(figsize=(11, 3.4 + 0.25 * len(tasks)), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.1])
        for number, (line, how) in enumerate(drawn.items()):
            runs = table[table["line"] == line]
            self._draw_profile(left, runs["ratio"].to_numpy(), how, (number + 0.5) / len(drawn))
            # A little apart, or equal ones would hide each other.
            apart = (number - (len(drawn) - 1) / 2) / len(drawn)
            self._draw_ratios(right, runs, tasks, how, 0.6 * apart)
        left.set(xlim=(1, HORIZON), ylim=(-0.05, 1.05))
        left.set_ylabel("share of tasks within that factor")
        right.set(xlim=(0.9, HORIZON + 0.5), ylim=(len(tasks) - 0.5, -0.5))
        right.set_yticks(range(len(tasks)), tasks)
        right.set_xticks([1, 2, 3, 4, BEYOND], ["1", "2", "3", "4", "more\nor never"])
        for axes in (left, right):
            axes.set_xlabel("steps to target / those of the best method")
            base.quiet_grid(axes, "x")
        scores = table.groupby("line")["score"].first()
        base.legend(figure, {f"{line}: {scores[line]:.2f}": how for line, how in drawn.items()})
        base.explain(
            figure,
            "In the legend the area under the profile, from 0 to 1. Where profiles are one line, their "
            f"markers take turns along it. Steps: median over seeds. {self._targets_told(table)}",
        )
        return figure

    def _targets_told(self, table: pd.DataFrame) -> str:
        targets = table.drop_duplicates("task").set_index("task")["target"]
        told = ", ".join(
            f"{task} {target:.4g}{' (given)' if task in self._given else ''}"
            for task, target in targets.items()
        )
        others = set(targets.index) - set(self._given)
        return f"Targets{f', the median of {self.reference} unless given' if others else ''}: {told}."

    def _draw_profile(self, axes: Axes, ratios: np.ndarray, how: Mark, turn: float) -> None:
        taus = np.unique([1.0, *ratios[ratios <= HORIZON], HORIZON])
        axes.step(
            taus,
            performance_profile(ratios, taus),
            where="post",
            color=how.color,
            linestyle=how.linestyle,
        )
        # Equal profiles hide each other: the markers on them do not.
        at = np.arange(1, HORIZON) + turn
        axes.plot(at, performance_profile(ratios, at), color=how.color, marker=how.marker, linestyle="")

    def _draw_ratios(
        self, axes: Axes, runs: pd.DataFrame, tasks: Sequence[str], how: Mark, lower: float
    ) -> None:
        at = np.where(runs["ratio"] <= HORIZON, runs["ratio"], BEYOND)
        places = [tasks.index(task) + lower for task in runs["task"]]
        axes.plot(at, places, color=how.color, marker=how.marker, linestyle="", clip_on=False)
