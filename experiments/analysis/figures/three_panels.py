"""The original's comparison of methods, as a figure of one task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
from matplotlib.figure import Figure

from experiments.analysis.entries import curves
from experiments.analysis.figures import base
from experiments.analysis.figures.comparison import comparison_table, draw_comparison
from experiments.analysis.methods import Result


@dataclass(frozen=True, kw_only=True)
class ThreePanels:
    """Train loss large, train metric over the evaluated one; medians over seeds with bands.

    Args:
        title: above the figure.
        metric: that is drawn, the task's own if None.
        lines: settings that tell methods apart.
        labels: better names for methods.
    """

    title: str
    metric: str | None = None
    lines: Sequence[str] = ("clipping",)
    labels: Mapping[str, str] = field(default_factory=dict)

    def table(self, results: Sequence[Result]) -> pd.DataFrame:
        """A row for each point of a line, each cross and each beginning of an epoch."""
        metric, higher_is_better = base.metric_of(results, self.metric)
        entries = base.entries(results, self.lines, self.labels, metric=self.metric)
        return comparison_table(curves(entries), metric, higher_is_better)

    def draw(self, table: pd.DataFrame) -> Figure:
        """The three panels."""
        return draw_comparison(table, self.title)
