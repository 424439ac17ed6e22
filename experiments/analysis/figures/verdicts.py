"""Verdicts: where each method's runs ended, and how far from the reference on the same seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from experiments.analysis import stats
from experiments.analysis.entries import Entry, by_task
from experiments.analysis.figures import base
from experiments.analysis.marks import Mark
from experiments.analysis.methods import Result
from experiments.analysis.verdicts import REFERENCE, judged_against
from experiments.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """The final metric of each run with mean and 95 % interval, and its difference to a reference's.

    Differences are paired by seed, ratios where lower is better; the verdict is Holm's over the methods.

    Args:
        title: above the figure.
        reference: line that the others are compared with, by its name in the figure.
        metric: that is compared, the task's own if None.
        lines: settings that tell methods apart.
        facets: setting that tells rows of panels apart.
        labels: better names for methods and facets.
    """

    title: str
    reference: str
    metric: str | None = None
    lines: Sequence[str] = ("clipping",)
    facets: str = "task"
    labels: Mapping[str, str] = field(default_factory=dict)

    def table(self, results: Sequence[Result]) -> pd.DataFrame:
        """A row for each run, and for each method; ``kind`` run, mean, difference or ratio."""
        base.metric_of(results, self.metric)  # refuses two
        entries = base.entries(results, self.lines, self.labels, self.facets, self.metric)
        return pd.DataFrame([row for of_facet in by_task(entries).values() for row in self._rows(of_facet)])

    def _rows(self, entries: Sequence[Entry]) -> list[dict[str, object]]:
        known = {entry.method: entry for entry in entries}
        if self.reference not in known:
            raise UserError(
                f"there is no reference {self.reference!r}; these are {', '.join(known)}."
                f"{nearest(self.reference, known)}"
            )
        reference = known[self.reference]
        judged = judged_against(entries, dict.fromkeys(entries, reference))
        rows: list[dict[str, object]] = []
        for entry in entries:
            told = {
                "facet": entry.task,
                "line": entry.method,
                "clipping": entry.names["clipping"],
                "metric": entry.metric,
                "better": "higher" if entry.higher_is_better else "lower",
                "verdict": "",
            }
            runs = zip(entry.seeds, entry.final, strict=True)
            rows += [{**told, "kind": "run", "seed": seed, "value": value} for seed, value in runs]
            told |= {"n": len(entry.seeds), "diverged": entry.diverged}
            rows.append({**told, "kind": "mean", **_interval(stats.mean_interval(entry.final))})
            if entry is reference:
                rows.append({**told, "kind": "difference", "verdict": REFERENCE})
                continue
            verdict = judged[entry]
            kind = "ratio" if verdict.test == "ratio" else "difference"
            told |= {"kind": kind, "n": verdict.seeds, "verdict": verdict.verdict, "p_holm": verdict.p_holm}
            rows.append({**told, **_interval(getattr(verdict, kind)), "detectable": verdict.detectable})
        return rows

    def draw(self, table: pd.DataFrame) -> Figure:
        """Two panels a facet, a row for each method."""
        drawn = base.marks_of(table)
        facets = list(dict.fromkeys(table["facet"]))
        figure = Figure(figsize=(11, len(facets) * (1.3 + 0.33 * len(drawn))), layout="constrained")
        panels = figure.subplots(len(facets), 2, squeeze=False, width_ratios=[1, 1.25])
        for facet, (left, right) in zip(facets, panels, strict=True):
            shown = table[table["facet"] == facet]
            self._draw_runs(left, shown, drawn)
            self._draw_differences(right, shown, drawn)
            if len(facets) > 1:
                left.set_title(facet)
        base.explain(
            figure,
            "Left: each run, below it mean and 95 % interval of the method. Right: paired by seed with "
            f"{self.reference}, t-intervals, hollow without a verdict, at {stats.ALPHA:g} after Holm.",
        )
        return figure

    def _draw_runs(self, axes: Axes, shown: pd.DataFrame, drawn: Mapping[str, Mark]) -> None:
        runs, means = (shown[shown["kind"] == kind] for kind in ("run", "mean"))
        wide = base.is_wide(runs["value"])
        # On a log scale an interval that reaches below 0 goes on to the edge.
        edge = 0.5 * runs["value"][runs["value"] > 0].min() if wide else -math.inf
        for place, (line, how) in enumerate(drawn.items()):
            values = runs.loc[runs["line"] == line, "value"]
            values = values[np.isfinite(values)]
            axes.plot(values, [place] * len(values), "o", color=how.color, alpha=0.45, markersize=4)
            for mean in means[means["line"] == line].itertuples():
                _whisker(axes, mean, place + 0.28, how.color, filled=True, edge=edge)
                if mean.diverged:
                    at = {"xycoords": ("axes fraction", "data"), "ha": "right", "fontsize": "small"}
                    axes.annotate(f"{mean.diverged:.0f} of {mean.n:.0f} diverged", (0.99, place), **at)
        if wide:
            axes.set_xlim(left=edge)
        _scale(axes, log=wide)
        axes.set_yticks(range(len(drawn)), list(drawn))
        axes.set_ylim(len(drawn) - 0.4, -0.6)
        row = shown.iloc[0]
        axes.set_xlabel(f"final {row['metric']} ({row['better']} is better)")
        base.quiet_grid(axes, "x")

    def _draw_differences(self, axes: Axes, shown: pd.DataFrame, drawn: Mapping[str, Mark]) -> None:
        compared = shown[shown["kind"].isin(["difference", "ratio"])].set_index("line")
        ratio = (compared["kind"] == "ratio").any()
        axes.axvline(1 if ratio else 0, color="black", linewidth=0.8)
        for place, (line, how) in enumerate(drawn.items()):
            if line not in compared.index:
                continue
            row = compared.loc[line]
            told = row["verdict"] in ("better", "worse")
            if row["kind"] == ("ratio" if ratio else "difference") and row["verdict"] != REFERENCE:
                _whisker(axes, row, place, how.color, filled=told)
            at = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": "small"}
            weight = "bold" if told else "normal"
            axes.annotate(row["verdict"], (1.02, place), annotation_clip=False, fontweight=weight, **at)
        _scale(axes, log=ratio)
        row = shown.iloc[0]
        axes.set_yticks(range(len(drawn)), [])
        axes.set_ylim(len(drawn) - 0.4, -0.6)
        what = "ratio of" if ratio else "difference in"
        axes.set_xlabel(f"{what} {row['metric']} to {self.reference} ({row['better']} is better)")
        base.quiet_grid(axes, "x")


def _scale(axes: Axes, *, log: bool) -> None:
    """Plain numbers, few enough to be read."""
    if log:
        base.log_scale(axes, "x")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _interval(interval: stats.Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def _whisker(
    axes: Axes, row: pd.Series, place: float, color: str, *, filled: bool, edge: float = -math.inf
) -> None:
    """A point with its interval, as far as the edge; nothing where there is no number."""
    if not math.isfinite(row.value):
        return
    if math.isfinite(row.low):
        axes.plot([max(row.low, edge), row.high], [place, place], color=color, linewidth=1.4)
    axes.plot(row.value, place, "o", color=color, markerfacecolor=color if filled else "white")
