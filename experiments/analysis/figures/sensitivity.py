"""Sensitivity: how the final metric depends on one setting, a curve per method, diverged runs in the plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments.analysis.figures import base
from experiments.analysis.marks import Mark
from experiments.analysis.methods import Result
from experiments.analysis.stats import to_scores
from experiments.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The final metric over a setting on a log scale: median over seeds, and the range of all.

    A seed that diverged counts as the worst. A strip above the curves has a marker wherever runs diverged,
    full where these are half of them or more. A method without the setting is a line across.

    Args:
        title: above the figure.
        x: a setting whose values are positive; several divided by ``|`` where methods call it differently.
        x_name: what the axis is called, with its unit.
        lines: settings that tell methods apart.
        best_over: settings whose best value is taken at each x, by the median over the same seeds.
        facets: setting that tells panels apart.
        labels: better names for lines and facets.
    """

    title: str
    x: str = "optimizer.lr"
    x_name: str = "learning rate"
    lines: Sequence[str] = ("clipping",)
    best_over: Sequence[str] = ()
    facets: str | None = None
    labels: dict[str, str] = field(default_factory=dict)

    def table(self, results: Sequence[Result]) -> pd.DataFrame:
        """A row for each point."""
        metric, higher_is_better = base.metric_of(results)
        facets = [self.facets] if self.facets else []
        keys = (*facets, *self.lines, self.x, *self.best_over)
        best: dict[tuple[Any, ...], tuple[float, dict[str, Any]]] = {}
        for key, group in base.groups(results, keys, self.labels).items():
            line_at, x_at = len(facets), len(facets) + len(self.lines)
            values = [base.final(result) for result in group]
            row = {
                "facet": base.label(key[:line_at], self.labels),
                "line": base.label(key[line_at:x_at], self.labels),
                "clipping": group[0].names["clipping"],
                "x": math.nan if key[x_at] is None else key[x_at],
                "setting": self._chosen(key[x_at + 1 :]),
                "metric": metric,
                "better": "higher" if higher_is_better else "lower",
                "value": np.median(values),
                "low": min(values),
                "high": max(values),
                "seeds": len(group),
                "lost": sum(bool(base.lost(result)) for result in group),
            }
            place, score = key[: x_at + 1], float(to_scores(row["value"], higher_is_better))
            if place not in best or score > best[place][0]:
                best[place] = score, row
        table = pd.DataFrame([row for _, row in best.values()])
        if table["x"].isna().all():
            raise UserError(f"none of these runs has {self.x}")
        return table

    def _chosen(self, values: Sequence[Any]) -> str:
        names = [path.split("|")[0].rpartition(".")[2] for path in self.best_over]
        known = zip(names, map(base.text, values), strict=True)
        return " ".join(f"{name}={value}" for name, value in known if value)

    def draw(self, table: pd.DataFrame) -> Figure:
        """A panel for each facet, a strip for what diverged above it."""
        facets = list(dict.fromkeys(table["facet"]))
        drawn = base.marks_of(table)
        suffering = list(dict.fromkeys(table[table["lost"] > 0]["line"]))
        strip = 0.18 * len(suffering)
        figure = Figure(figsize=(2.9 + 4.4 * len(facets), 4.6 + strip), layout="constrained")
        ratios = [max(strip, 1e-3), 3.6]
        panels = figure.subplots(
            2, len(facets), squeeze=False, sharex=True, sharey="row", height_ratios=ratios
        )
        places = _places(table["x"])
        low, high, log = base.span(table[["value", "low", "high"]].to_numpy().ravel())
        for facet, above, axes in zip(facets, *panels, strict=True):
            shown = table[table["facet"] == facet]
            self._draw_curves(axes, _within(shown, low, high), drawn, places)
            self._draw_strip(above, shown, drawn, places, suffering)
            above.set_title(facet)
        metric, better = table["metric"].iloc[0], table["better"].iloc[0]
        panels[1, 0].set_ylabel(f"final {metric}{', log scale' if log else ''} ({better} is better)")
        if log:
            base.log_scale(panels[1, 0])
        base.legend(figure, drawn)
        told = "Marker: median over seeds; bar: their range"
        if self.best_over:
            names = " and ".join(path.split("|")[0] for path in self.best_over)
            told += f"; at each x the {names} of the best median"
        if high < table["value"].replace(math.inf, math.nan).max():
            told += f"; what is above {high:.2g} is drawn there"
        base.explain(figure, f"{told}.")
        return figure

    def _draw_curves(
        self, axes: Axes, shown: pd.DataFrame, drawn: dict[str, Mark], places: dict[float, float]
    ) -> None:
        reach = math.log10(max(places.values()) / min(places.values())) or 1
        for number, (line, how) in enumerate(drawn.items()):
            points = shown[shown["line"] == line]
            if points.empty:
                continue
            if points["x"].isna().all():
                axes.axhline(points["value"].iloc[0], color=how.color, linestyle=how.linestyle, zorder=1)
                continue
            # A little apart, or equal ones would hide each other.
            x = points["x"].map(places) * 10 ** (0.012 * reach * (number - (len(drawn) - 1) / 2))
            axes.plot(x, points["value"], color=how.color, linestyle=how.linestyle, marker=how.marker)
            axes.vlines(x, points["low"], points["high"], color=how.color, alpha=0.35, linewidth=3, zorder=1)
        axes.set_xscale("log")
        axes.set_xticks(list(places.values()), ["none" if math.isinf(x) else f"{x:g}" for x in places])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.06)
        axes.set_xlabel(f"{self.x_name} (log scale)")
        base.quiet_grid(axes)

    def _draw_strip(
        self,
        axes: Axes,
        shown: pd.DataFrame,
        drawn: dict[str, Mark],
        places: dict[float, float],
        suffering: Sequence[str],
    ) -> None:
        for point in shown[(shown["lost"] > 0) & shown["x"].notna()].itertuples():
            how, at = drawn[point.line], (places[point.x], suffering.index(point.line))
            full = 2 * point.lost >= point.seeds
            axes.plot(*at, color=how.color, marker=how.marker, markerfacecolor=how.color if full else "none")
            told = f"{point.lost} of {point.seeds}"
            axes.annotate(
                told, at, (5, 0), textcoords="offset points", size=6.5, va="center", color=how.color
            )
        axes.set_ylim(max(len(suffering), 1) - 0.5, -0.5)
        axes.set_yticks([])
        axes.tick_params(bottom=False, labelbottom=False)
        axes.spines[:].set_visible(False)
        if suffering:
            axes.set_facecolor("#F3F3F3")
            axes.set_ylabel("diverged", rotation=0, ha="right", va="center")


def _within(points: pd.DataFrame, low: float, high: float) -> pd.DataFrame:
    """Points and bars that end where the axis does; where most runs diverged there is no point."""
    value = points["value"].where(np.isfinite(points["value"])).clip(low, high)
    return points.assign(value=value, low=points["low"].clip(low, high), high=points["high"].clip(low, high))


def _places(values: pd.Series) -> dict[float, float]:
    """Where each x is drawn: an infinite one, at which nothing is clipped, to the right of the others."""
    known = sorted(set(values.dropna()))
    finite = [value for value in known if math.isfinite(value)]
    places = {value: value for value in finite}
    if len(finite) < len(known):
        step = finite[-1] / finite[-2] if len(finite) > 1 else 10
        places[math.inf] = finite[-1] * step if finite else 1.0
    return places
