"""Curves over the steps: any recorded column, mean or median over seeds with its band."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from experiments.analysis.figures import base
from experiments.analysis.marks import Mark
from experiments.analysis.methods import Result
from experiments.analysis.stats import mean_interval
from experiments.analysis.style import VERMILION
from experiments.errors import UserError

CENTRES = ("mean", "median")
STRETCHES = {"mean": "mean", "max": "largest"}
CHARACTERS_OF_A_NAME = 28  # in a line of it
FEW = 30
"""Points that are marked one by one."""
SHARES = (0, 0.0001, 0.001, 0.01, 0.1, 0.5, 1)
"""Named on the axis of a share."""
X_NAMES = {"step": "step", "epoch": "epoch"}


@dataclass(frozen=True, kw_only=True)
class Curves:
    """A row of panels for each recorded column, a column of panels for each value of a setting.

    A line is the mean over seeds with its t-interval, or their median with the range of all. Where runs
    diverged it is that of the others, the legend says how many these are, and each diverged run is drawn by
    itself up to a cross where it ends. A share is always the mean over seeds, without a band: one of few
    steps would reach from none to all.

    Args:
        title: above the figure.
        panels: recorded column -> what the axis is called, with its unit.
        x: ``step`` or ``epoch``.
        lines: settings that tell lines apart.
        labels: better names for lines and facets.
        facets: setting that tells columns of panels apart.
        centre: ``mean`` or ``median``.
        log: columns on a log scale.
        shares: columns from 0 to 1, in percent, on a scale that spreads out what is near 0.
        points: at most so many along a line; of a run with more records one for each of equal stretches.
        stretches: what stands for a stretch, its ``mean`` or its ``max``.
    """

    title: str
    panels: dict[str, str]
    x: str = "step"
    lines: Sequence[str] = ("clipping",)
    labels: dict[str, str] = field(default_factory=dict)
    facets: str | None = None
    centre: str = "mean"
    log: Sequence[str] = ()
    shares: Sequence[str] = ()
    points: int = 200
    stretches: str = "mean"

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("x", self.x, X_NAMES),
            ("centre", self.centre, CENTRES),
            ("stretches", self.stretches, STRETCHES),
        ):
            if value not in choices:
                raise UserError(f"{name} must be {' or '.join(choices)}, got {value!r}")

    def table(self, results: Sequence[Result]) -> pd.DataFrame:
        """A row for each point of a line, and for each of a run that diverged."""
        by = [*([self.facets] if self.facets else []), *self.lines]
        rows = []
        for key, group in base.groups(results, by, self.labels).items():
            facet = self.labels.get(base.text(key[0]), base.text(key[0])) if self.facets else ""
            line = base.label(key[len(by) - len(self.lines) :], self.labels)
            told = {"facet": facet, "line": line, "clipping": group[0].names["clipping"]}
            records = [(result, result.run.records()) for result in group]
            for column in self.panels:
                known = [
                    (result, frame[frame[column].notna()]) for result, frame in records if column in frame
                ]
                rows += [{**told, "panel": column, **row} for row in self._rows(known, column)]
        missing = set(self.panels) - {row["panel"] for row in rows}
        if missing:
            raise UserError(f"none of these runs has recorded {', '.join(sorted(missing))}")
        return pd.DataFrame(rows)

    def _rows(self, known: Sequence[tuple[Result, pd.DataFrame]], column: str) -> list[dict]:
        """Rows of one panel and line, of the records of each run that have the column."""
        longest = max((frame for _, frame in known), key=len, default=())
        if len(longest) == 0:
            return []
        stretch = stretch_of(longest[self.x].max(), len(longest), self.points)
        series = [(result, self._thinned(frame[self.x], frame[column], stretch)) for result, frame in known]
        alive = [values for result, values in series if not base.lost(result)]
        told = {"stretch": stretch, "seeds": len(series), "diverged": len(series) - len(alive)}
        rows = []
        if alive:
            together = pd.concat(alive, axis=1)
            for x, values in zip(together.index, together.to_numpy(), strict=True):
                rows.append({"kind": "line", "seed": None, **told, "x": x, **self._point(values, column)})
        for result, values in series:
            if base.lost(result):
                rows += [
                    {"kind": "diverged", "seed": result.seed, **told, "x": x, "value": value}
                    for x, value in values[np.isfinite(values)].items()
                ]
        return rows

    def _thinned(self, x: pd.Series, values: pd.Series, stretch: float | None) -> pd.Series:
        """Values by x, or by the ends of equal stretches of x."""
        at = x if stretch is None else np.ceil(x / stretch) * stretch
        return values.groupby(at.to_numpy()).agg(self.stretches)

    def _point(self, values: np.ndarray, column: str) -> dict[str, float]:
        values = values[~np.isnan(values)]
        if column in self.shares:
            return {"value": values.mean()}
        if self.centre == "median":
            return {"value": np.median(values), "low": values.min(), "high": values.max()}
        return dict(zip(("value", "low", "high"), mean_interval(values), strict=True))

    def draw(self, table: pd.DataFrame) -> Figure:
        """Panels that share x within a column, and y within a row."""
        facets = list(dict.fromkeys(table["facet"]))
        drawn = base.marks_of(table)
        size = (2.6 + max(3.0 * len(facets), 4.6), 1.1 + max(2.2 * len(self.panels), 2.9))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(self.panels), len(facets), squeeze=False, sharex="col", sharey="row")
        for (column, name), row in zip(self.panels.items(), grid, strict=True):
            for facet, axes in zip(facets, row, strict=True):
                shown = table[(table["panel"] == column) & (table["facet"] == facet)]
                self._draw_panel(axes, shown, drawn, column)
                if axes in grid[0]:
                    axes.set_title(facet)
                if axes in grid[-1]:
                    axes.set_xlabel(X_NAMES[self.x])
            name += ", log scale" if column in self.log else ""
            name += ", fourth-root scale" if column in self.shares else ""
            row[0].set_ylabel(textwrap.fill(name, CHARACTERS_OF_A_NAME))
        self._legend(figure, table, drawn)
        return figure

    def _draw_panel(self, axes: Axes, shown: pd.DataFrame, drawn: dict[str, Mark], column: str) -> None:
        for (line, kind, _), points in shown.groupby(["line", "kind", "seed"], sort=False, dropna=False):
            how = drawn[line]
            few = how.marker if len(points) <= FEW else ""
            if kind == "line":
                axes.plot(points["x"], points["value"], color=how.color, linestyle=how.linestyle, marker=few)
                if column not in self.shares:
                    axes.fill_between(
                        points["x"], points["low"], points["high"], color=how.color, alpha=0.15, linewidth=0
                    )
            else:
                axes.plot(
                    points["x"], points["value"], color=how.color, linestyle=how.linestyle, linewidth=0.7
                )
                axes.plot(
                    points["x"].iloc[-1], points["value"].iloc[-1], color=VERMILION, marker="x", clip_on=False
                )
        if column in self.log:
            base.log_scale(axes)
        if column in self.shares:
            _share_scale(axes)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.margins(x=0.02)
        base.quiet_grid(axes)

    def _legend(self, figure: Figure, table: pd.DataFrame, drawn: dict[str, Mark]) -> None:
        counts = table.groupby("line")[["seeds", "diverged"]].max()
        entries = {}
        for line, how in drawn.items():
            seeds, lost = (int(counts.loc[line, name]) for name in ("seeds", "diverged"))
            entries[f"{line} ({seeds - lost} of {seeds} seeds)" if lost else line] = how
        extra = {}
        if counts["diverged"].any():
            extra["end"] = Line2D([], [], color=VERMILION, marker="x", linestyle="", label="a run diverged")
        few = table.groupby(["line", "panel", "facet"]).size().max() <= FEW
        base.legend(figure, entries, markers=few, **extra)
        told = {
            "mean": "Line: mean over seeds; band: its 95 % interval",
            "median": "Line: median over seeds; band: their range",
        }[self.centre]
        if self.shares:
            told += "; shares: mean over seeds, without band"
        if table["stretch"].notna().any():
            told += f"; of each run the {STRETCHES[self.stretches]} of every {self._lengths(table)}"
        base.explain(figure, f"{told}.")

    def _lengths(self, table: pd.DataFrame) -> str:
        lengths = sorted(table["stretch"].dropna().unique())
        unit = f"{X_NAMES[self.x]}{'' if lengths == [1] else 's'}"
        return f"{' or '.join(f'{length:g}' for length in lengths)} {unit}"


def _share_scale(axes: Axes) -> None:
    """A scale on which one of a hundred thousand elements is told from none, and none has a place."""
    root, power = _to_the(1 / 4), _to_the(4)
    axes.set_yscale("function", functions=(root, power))
    axes.set_ylim(power(np.array([-0.04, 1.04])))  # no line lies on the edge
    axes.set_yticks(SHARES, [f"{100 * share:g} %" for share in SHARES])


def _to_the(exponent: float) -> Callable[[np.ndarray], np.ndarray]:
    """Power of a number without its sign, which it keeps."""
    return lambda share: np.sign(share) * np.abs(share) ** exponent


def stretch_of(last: float, records: int, points: int) -> float | None:
    """Length of the stretches that turn so many records into at most so many points; None to keep all.

    Example:
        >>> stretch_of(20_000, 20_000, points=200), stretch_of(2_000, 10, points=200)
        (100.0, None)
    """
    if records <= points:
        return None
    least = last / points
    power = 10 ** math.floor(math.log10(least))
    return float(next(step * power for step in (1, 2, 5, 10) if step * power >= least * (1 - 1e-9)))
