"""Cost anatomy: what a step's time goes into."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.analysis.figures import base
from experiments.analysis.methods import Result
from experiments.analysis.style import GREEN, ORANGE, SKY, VERMILION

PARTS = {"data": SKY, "forward": GREEN, "backward": ORANGE, "clip+step": VERMILION}
MOST_COLUMNS = 2


@dataclass(frozen=True, kw_only=True)
class CostAnatomy:
    """Bars of milliseconds per training step, a part's length its median over seeds.

    Args:
        title: above the figure.
        lines: settings that tell methods apart.
        facets: setting that tells panels apart.
        labels: better names for methods and facets.
    """

    title: str
    lines: Sequence[str] = ("clipping",)
    facets: str = "task"
    labels: Mapping[str, str] = field(default_factory=dict)

    def table(self, results: Sequence[Result]) -> pd.DataFrame:
        """A row for each part of each method's step."""
        timed = [result for result in results if result.summary["steps"] and result.summary.get("time")]
        rows = []
        for key, group in base.groups(timed, (self.facets, *self.lines), self.labels).items():
            told = {
                "facet": base.label(key[:1], self.labels),
                "line": base.label(key[1:], self.labels),
                "clipping": group[0].names["clipping"],
                "seeds": len(group),
            }
            for part in PARTS:
                spent = [1e3 * r.summary["time"][part] / r.summary["steps"] for r in group]
                rows.append({**told, "part": part, "milliseconds": np.median(spent)})
        return pd.DataFrame(rows)

    def repeatable(self, table: pd.DataFrame) -> pd.DataFrame:
        """What of a table the same runs give again: no time."""
        return table.drop(columns="milliseconds")

    def draw(self, table: pd.DataFrame) -> Figure:
        """A panel for each facet, a bar for each method."""
        facets = list(dict.fromkeys(table["facet"]))
        lines = list(dict.fromkeys(table["line"]))
        across = min(len(facets), MOST_COLUMNS)
        down = math.ceil(len(facets) / across)
        size = (3.2 + 3.6 * across, 0.6 + down * (0.9 + 0.26 * len(lines)))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(down, across, squeeze=False, sharey=True)
        for facet, axes in zip(facets, panels.flat, strict=False):
            parts = table[table["facet"] == facet].pivot(index="line", columns="part", values="milliseconds")
            parts = parts.reindex(lines)
            left = np.zeros(len(lines))
            for part, color in PARTS.items():
                axes.barh(range(len(lines)), parts[part], left=left, color=color, height=0.7, label=part)
                left = left + parts[part].to_numpy()
            for place, (total, clipping) in enumerate(zip(left, parts["clip+step"], strict=True)):
                if np.isfinite(total):
                    told = f"{total:.3g} ms, {clipping / total:.0%}"
                    axes.annotate(
                        told, (total, place), (4, 0), textcoords="offset points", va="center", size=7.5
                    )
            axes.set_xlim(0, np.nanmax(left) * 1.45)
            axes.set_ylim(len(lines) - 0.4, -0.6)
            axes.set_title(facet)
            axes.set_xlabel("ms per step")
            base.quiet_grid(axes, "x")
        for axes in panels.flat[len(facets) :]:
            axes.set_visible(False)
        panels[0, 0].set_yticks(range(len(lines)), lines)
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center")
        base.explain(figure, "Beside a bar: its length, and the share of clip+step.")
        return figure
