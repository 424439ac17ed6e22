"""Time to target: when each run first was good enough, those that never were drawn as censored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.analysis.figures import base
from experiments.analysis.methods import Result
from experiments.analysis.style import QUIET

PANELS = {
    "steps": "steps until an evaluation reaches the target",
    "seconds": "seconds of training until then",
}


@dataclass(frozen=True, kw_only=True)
class TimesToTarget:
    """A mark for each run, the Kaplan-Meier median of each method, in steps and in seconds of training.

    Args:
        title: above the figure.
        target: that the task's metric is to reach.
        lines: settings that tell methods apart.
        labels: better names for methods.
    """

    title: str
    target: float
    lines: Sequence[str] = ("clipping",)
    labels: Mapping[str, str] = field(default_factory=dict)

    def table(self, results: Sequence[Result]) -> pd.DataFrame:
        """A row for each run and panel; ``reached`` 0 where the time is when it was last seen without."""
        metric, higher_is_better = base.metric_of(results)
        rows = []
        for entry in base.entries(results, self.lines, self.labels):
            steps, reached = entry.reach(self.target)
            times = {
                "steps": (steps, entry.steps_to(self.target)),
                "seconds": (steps * entry.seconds_per_step, entry.seconds_to(self.target)),
            }
            for panel, (each, together) in times.items():
                rows += [
                    {
                        "panel": panel,
                        "line": entry.method,
                        "clipping": entry.names["clipping"],
                        "seed": seed,
                        "time": time,
                        "reached": int(there),
                        "median": together.median,
                        "metric": metric,
                        "better": "higher" if higher_is_better else "lower",
                    }
                    for seed, time, there in zip(entry.seeds, each, reached, strict=True)
                ]
        return pd.DataFrame(rows)

    def repeatable(self, table: pd.DataFrame) -> pd.DataFrame:
        """What of a table the same runs give again: the steps."""
        return table[table["panel"] == "steps"].reset_index(drop=True)

    def draw(self, table: pd.DataFrame) -> Figure:
        """Two panels, a row for each method."""
        drawn = base.marks_of(table)
        figure = Figure(figsize=(10, 1.5 + 0.32 * len(drawn)), layout="constrained")
        for (panel, name), axes in zip(PANELS.items(), figure.subplots(1, 2, sharey=True), strict=True):
            shown = table[table["panel"] == panel]
            for place, (line, how) in enumerate(drawn.items()):
                self._draw_method(axes, shown[shown["line"] == line], place, how.color)
            axes.set_xlim(0, shown["time"].max() * 1.05)
            axes.set_xlabel(name)
            base.quiet_grid(axes, "x")
        reached = table[table["panel"] == "steps"].groupby("line")["reached"].agg(["sum", "count"])
        names = [f"{line} ({reached.loc[line, 'sum']} of {reached.loc[line, 'count']})" for line in drawn]
        figure.axes[0].set_yticks(range(len(drawn)), names)
        figure.axes[0].set_ylim(len(drawn) - 0.4, -0.6)
        metric, better = table["metric"].iloc[0], table["better"].iloc[0]
        styles = {
            "reached the target": {"marker": "o"},
            "never did: last seen here": {"marker": ">", "markerfacecolor": "none"},
            "median (Kaplan-Meier)": {"marker": "|", "markersize": 12, "markeredgewidth": 2.5},
        }
        handles = [
            Line2D([], [], color=QUIET, linestyle="", label=name, **how) for name, how in styles.items()
        ]
        figure.legend(handles=handles, loc="outside right center")
        base.explain(figure, f"In brackets: runs that reached {metric} {self.target:g}; {better} is better.")
        return figure

    def _draw_method(self, axes: Axes, runs: pd.DataFrame, place: int, color: str) -> None:
        # Runs that took equally long side by side, not on top of each other.
        spread = [place + 0.5 * ((number + 0.5) / len(runs) - 0.5) for number in range(len(runs))]
        for run, y in zip(runs.itertuples(), spread, strict=True):
            how = {"marker": "o"} if run.reached else {"marker": ">", "markerfacecolor": "none"}
            axes.plot(run.time, y, color=color, alpha=0.8, clip_on=False, **how)
        if math.isfinite(median := runs["median"].iloc[0]):
            axes.vlines(median, place - 0.33, place + 0.33, color=color, linewidth=2.5, alpha=0.6)
