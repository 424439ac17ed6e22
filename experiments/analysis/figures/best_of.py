"""Tuning: what the best of k tried settings is expected to give, beside the default that nobody tuned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.analysis.entries import Entry, floor, load_entries
from experiments.analysis.figures import base
from experiments.analysis.marks import Mark
from experiments.analysis.methods import Result
from experiments.analysis.stats import expected_best_of, to_scores
from experiments.analysis.style import QUIET
from experiments.runs import FINISHED

BORDER = 0.6
"""On the axis of k, left of which the defaults stand."""


@dataclass(frozen=True, kw_only=True)
class BestOf:
    """Expected metric of the best of k settings, drawn at random from those tried, over k.

    Of a setting the median over seeds of the final metric counts; one that diverged as a model that learned
    nothing. The best is chosen on the same seeds.

    Args:
        title: above the figure.
        default: setting -> value, or values where methods differ, of those that nobody tuned; a method need
            not have all.
        lines: settings that tell methods apart.
        facets: setting that tells panels apart.
        labels: better names for methods and facets.
    """

    title: str
    default: Mapping[str, Any]
    lines: Sequence[str] = ("clipping",)
    facets: str = "task"
    labels: Mapping[str, str] = field(default_factory=dict)

    def table(self, results: Sequence[Result]) -> pd.DataFrame:
        """A row for each k, and one for the default settings."""
        metric, higher_is_better = base.metric_of(results)
        sign = 1 if higher_is_better else -1
        rows = []
        for (facet, *line), entries in self._methods(results).items():
            told = {
                "facet": base.label([facet], self.labels),
                "line": base.label(line, self.labels),
                "clipping": entries[0].names["clipping"],
                "metric": metric,
                "better": "higher" if higher_is_better else "lower",
                "tried": len(entries),
            }
            medians, nothing = [entry.median for entry in entries], floor(entries)
            scores = np.maximum(to_scores(medians, higher_is_better), to_scores(nothing, higher_is_better))
            for entry, score in zip(entries, scores, strict=True):
                if self._is_default(entry):
                    rows.append({**told, "kind": "default", "k": 0, "value": sign * score})
            for k in range(1, len(scores) + 1):
                rows.append({**told, "kind": "best of", "k": k, "value": sign * expected_best_of(scores, k)})
        return pd.DataFrame(rows)

    def _methods(self, results: Sequence[Result]) -> dict[tuple[Any, ...], list[Entry]]:
        """Facet and line -> an entry for each setting tried."""
        settings = [
            replace(
                result, task=base.text(base.setting(result, self.facets)), method=result.run.names["digest"]
            )
            for result in results
            if result.summary["status"] in FINISHED
        ]
        methods: dict[tuple[Any, ...], list[Entry]] = {}
        for entry in load_entries(settings, None):
            key = tuple(base.setting(entry.results[0], path) for path in (self.facets, *self.lines))
            methods.setdefault(key, []).append(entry)
        return {key: methods[key] for key in base.in_order(methods, self.labels)}

    def _is_default(self, entry: Entry) -> bool:
        (result, *_) = entry.results
        return all(base.has(result, path, [None, *_values(known)]) for path, known in self.default.items())

    def draw(self, table: pd.DataFrame) -> Figure:
        """A panel for each facet."""
        facets = list(dict.fromkeys(table["facet"]))
        drawn = base.marks_of(table)
        figure = Figure(figsize=(2.9 + 3.6 * len(facets), 4.2), layout="constrained")
        panels = figure.subplots(1, len(facets), squeeze=False, sharey=True)[0]
        wide = base.is_wide(table["value"], ratio=10)
        for facet, axes in zip(facets, panels, strict=True):
            shown = table[table["facet"] == facet]
            self._draw_panel(axes, shown, drawn)
            axes.set_title(facet)
            if wide:
                base.log_scale(axes)
        metric, better = table["metric"].iloc[0], table["better"].iloc[0]
        panels[0].set_ylabel(f"final {metric}{', log scale' if wide else ''} ({better} is better)")
        tried = table.groupby("line")["tried"].max()
        entries = {f"{line} ({tried[line]} tried)": how for line, how in drawn.items()}
        base.legend(figure, entries)
        default = " ".join(
            f"{path.rpartition('.')[2]}={' or '.join(map(base.text, _values(value)))}"
            for path, value in self.default.items()
        )
        base.explain(
            figure,
            "Expected best of k settings drawn from those tried, each the median over its seeds, chosen on "
            f"these same seeds. Default: {default}, where a method has it.",
        )
        return figure

    def _draw_panel(self, axes: Axes, shown: pd.DataFrame, drawn: dict[str, Mark]) -> None:
        most = int(shown["k"].max())
        at_default = BORDER - max(0.8, 0.1 * most)
        for number, (line, how) in enumerate(drawn.items()):
            points = shown[(shown["line"] == line) & (shown["kind"] == "best of")]
            axes.plot(points["k"], points["value"], color=how.color, linestyle=how.linestyle)
            untuned = shown[(shown["line"] == line) & (shown["kind"] == "default")]
            # Beside each other, left of the curves.
            at = at_default + 0.5 * (number / max(len(drawn) - 1, 1) - 0.5)
            axes.plot([at] * len(untuned), untuned["value"], color=how.color, marker=how.marker, linestyle="")
        ticks = [1, *MaxNLocator(5, integer=True).tick_values(2, most)]
        ticks = sorted({int(tick) for tick in ticks if 1 <= tick <= most})
        axes.set_xticks([at_default, *ticks], ["default", *map(str, ticks)])
        axes.axvline(BORDER, color=QUIET, linewidth=0.6)
        axes.set_xlabel("k, settings tried")
        base.quiet_grid(axes)


def _values(one_or_more: Any) -> Sequence[Any]:
    return one_or_more if isinstance(one_or_more, list | tuple) else [one_or_more]
