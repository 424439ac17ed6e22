"""Heat maps: the final metric over two settings, with every cell in it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments.analysis.figures import base
from experiments.analysis.methods import Result

MOST_COLUMNS = 4
LOST, NOT_RUN = "#9A9A9A", "#E4E4E4"


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """A map of two settings for each value of a third: in a cell the median over seeds of the final metric.

    A seed that diverged counts as the worst. A cell in which half of them did is hatched and says so, one
    with fewer says so below its number; a combination that was never run is left grey.

    Args:
        title: above the figure.
        x: setting along the columns of a map.
        y: setting along its rows; several divided by ``|`` where clippings call it differently.
        x_name: what the axis is called.
        y_name: likewise.
        facets: setting of which each value has a map.
        labels: better names for facets.
    """

    title: str
    x: str = "optimizer.lr"
    y: str = "clipping.threshold"
    x_name: str = "learning rate"
    y_name: str = "threshold"
    facets: str = "clipping"
    labels: dict[str, str] = field(default_factory=dict)

    def table(self, results: Sequence[Result]) -> pd.DataFrame:
        """A row for each cell, those without runs too."""
        metric, higher_is_better = base.metric_of(results)
        found = base.groups(results, (self.facets, self.y, self.x), self.labels)
        columns = sorted({x for _, _, x in found}, key=base.rank)
        rows = []
        for facet in dict.fromkeys(facet for facet, _, _ in found):
            for y in dict.fromkeys(y for other, y, _ in found if other == facet):
                for x in columns:
                    group = found.get((facet, y, x), [])
                    lost = Counter(filter(None, map(base.lost, group)))
                    rows.append(
                        {
                            "facet": base.label([facet], self.labels),
                            "row": base.text(y),
                            "column": base.text(x),
                            "metric": metric,
                            "better": "higher" if higher_is_better else "lower",
                            "value": np.median([base.final(result) for result in group])
                            if group
                            else math.nan,
                            "seeds": len(group),
                            "lost": lost.total(),
                            "kind": " or ".join(lost),
                        }
                    )
        return pd.DataFrame(rows)

    def draw(self, table: pd.DataFrame) -> Figure:
        """A panel a facet, all with the same colours."""
        facets = list(dict.fromkeys(table["facet"]))
        columns = list(dict.fromkeys(table["column"]))
        across = min(MOST_COLUMNS, len(facets))
        down = math.ceil(len(facets) / across)
        rows = max(table[table["facet"] == facet]["row"].nunique() for facet in facets)
        size = (1.4 + across * max(1.9, 0.9 + 0.55 * len(columns)), 1.1 + down * (0.75 + 0.42 * rows))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(down, across, squeeze=False)
        colors, norm = self._colors(table)
        for facet, axes in zip(facets, panels.flat, strict=False):
            self._draw_map(axes, table[table["facet"] == facet], columns, colors, norm)
            axes.set_title(facet)
        for axes in panels.flat[len(facets) :]:
            axes.set_visible(False)
        metric, better = table["metric"].iloc[0], table["better"].iloc[0]
        figure.colorbar(
            matplotlib.cm.ScalarMappable(norm, colors),
            ax=panels,
            label=f"final {metric}, median over seeds\n({better} is better)",
            aspect=30,
            extend="max" if norm.vmax < table["value"].replace(math.inf, math.nan).max() else "neither",
        )
        for axes in panels[:-1, :].flat:
            axes.set_xlabel("")
        for axes in panels[:, 1:].flat:
            axes.set_ylabel("")
        return figure

    def _colors(self, table: pd.DataFrame) -> tuple[matplotlib.colors.Colormap, Normalize]:
        """Colours in which brighter is better, over the finite values that are not far beyond the others."""
        values = table["value"].to_numpy(float)
        values = values[np.isfinite(values)]
        if len(values) == 0:
            values = np.array([0.0, 1.0])
        low, high, log = base.span(values)
        name = "viridis" if table["better"].iloc[0] == "higher" else "viridis_r"
        return matplotlib.colormaps[name], (LogNorm if log else Normalize)(low, high)

    def _draw_map(
        self,
        axes: Axes,
        cells: pd.DataFrame,
        columns: list[str],
        colors: matplotlib.colors.Colormap,
        norm: Normalize,
    ) -> None:
        rows = list(dict.fromkeys(cells["row"]))
        for cell in cells.itertuples():
            at = columns.index(cell.column), rows.index(cell.row)
            box = Rectangle((at[0] - 0.5, at[1] - 0.5), 1, 1, linewidth=1, edgecolor="white")
            if cell.seeds == 0:
                told, shade = "not run", NOT_RUN
            elif not math.isfinite(cell.value):
                told, shade = f"{cell.kind}\n{cell.lost} of {cell.seeds}", LOST
                box.set_hatch("////")
            else:
                told, shade = f"{cell.value:.2g}", colors(norm(cell.value))
                told += f"\n{cell.lost} of {cell.seeds} {cell.kind}" if cell.lost else ""
            box.set_facecolor(shade)
            axes.add_patch(box)
            size = 8 if len(told) < 7 else 6.5
            axes.text(*at, told, **_readable_on(shade), size=size, ha="center", va="center")
        axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(-0.5, len(rows) - 0.5))
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), [row or "none" for row in rows])
        axes.set_xlabel(self.x_name)
        axes.set_ylabel(self.y_name)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)


def _readable_on(shade: str | tuple[float, ...]) -> dict[str, object]:
    """Colour of a text, and a box that hides the hatching behind it."""
    red, green, blue = matplotlib.colors.to_rgb(shade)
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
    box = {"facecolor": shade, "edgecolor": "none", "boxstyle": "square,pad=0.15"}
    return {"color": "white" if dark else "black", "bbox": box}
