"""Pictures of tails: records of ``clipbench tails`` to a table, the table to a picture of a panel a sample.

Of a training run's records, which have no noise, the gradient norms alone are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter
from scipy import stats

from experiments.analysis.figures.base import quiet_grid
from experiments.analysis.style import BLUE, ORANGE, QUIET, SKY, VERMILION
from experiments.errors import UserError
from torch_clip import tails

SAMPLES = {
    "grad_norm": "gradient norm",
    "noise_norm": "norm of the noise",
    "noise_projection": "noise in one direction",
}
"""Column of the records -> what it is called."""
WIDE = 10
"""Interquartile ranges beyond the median at which a histogram ends."""
MOST_BINS, CURVE_POINTS, MOST_POINTS = 80, 200, 400
DASHED = (0, (4, 1.5))
DOTS = {"color": BLUE, "marker": "o", "markersize": 2.5, "linestyle": "", "label": "mini-batches"}


def samples(records: pd.DataFrame) -> dict[str, np.ndarray]:
    """The finite values of each sample that was recorded, by what it is called."""
    found = {name: records[column].to_numpy(float) for column, name in SAMPLES.items() if column in records}
    return {name: values[np.isfinite(values)] for name, values in found.items()}


def has_tail(values: np.ndarray) -> bool:
    """Whether there are enough values, and the largest tenth is not all alike."""
    sizes = np.abs(values[values != 0])
    return len(sizes) >= 40 and np.quantile(sizes, 0.9) < sizes.max()


def _with_tail(records: pd.DataFrame) -> dict[str, np.ndarray]:
    found = {name: values for name, values in samples(records).items() if has_tail(values)}
    if not found:
        raise UserError("these records have no gradient norms that differ: there is no tail to draw")
    return found


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """The density of each sample beside the normal of its mean and standard deviation.

    Where values lie far out, more than ten interquartile ranges from the median, the axis ends there and the
    panel says how many are beyond; they count in the density and in the normal.

    Args:
        title: above the figure.
    """

    title: str

    def table(self, records: pd.DataFrame) -> pd.DataFrame:
        """A row for each bar, ``kind`` bar, and for each point of the normal's curve."""
        parts = []
        for name, values in _with_tail(records).items():
            low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
            spread = high - low
            ends = max(values.min(), middle - WIDE * spread), min(values.max(), middle + WIDE * spread)
            width = 2 * spread / len(values) ** (1 / 3)  # Freedman and Diaconis
            bins = int(np.clip((ends[1] - ends[0]) / width, 10, MOST_BINS)) if width else 10
            counts, edges = np.histogram(values, bins, ends)
            told = {"panel": name, "n": len(values), "beyond": len(values) - counts.sum()}
            widths = np.diff(edges)
            bars = {"x": edges[:-1], "width": widths, "y": counts / len(values) / widths}
            x = np.linspace(edges[0], edges[-1], CURVE_POINTS)
            curve = {"x": x, "y": stats.norm.pdf(x, values.mean(), values.std(ddof=1))}
            parts += [{**told, "kind": "bar", **bars}, {**told, "kind": "normal", **curve}]
        return _table(parts)

    def draw(self, table: pd.DataFrame) -> Figure:
        """Bars and the curve."""
        figure = _figure(table)
        for axes, name, shown in _panels(figure, table):
            bars, curve = (shown[shown["kind"] == kind] for kind in ("bar", "normal"))
            axes.bar(bars["x"], bars["y"], bars["width"], align="edge", color=SKY, label="mini-batches")
            axes.plot(curve["x"], curve["y"], color=VERMILION, label="normal of their mean\nand deviation")
            axes.set_xlabel(name)
            axes.set_ylabel("density")
            axes.margins(x=0)
            beyond = int(shown["beyond"].iloc[0])
            if beyond:
                _note(axes, f"{beyond:,} beyond the axis")
        _legend(figure)
        return figure


@dataclass(frozen=True, kw_only=True)
class Survival:
    """The share of values above x on logarithmic axes, from the median up: a power law is a straight line.

    Beside the sample lie the power law and the lognormal that fit its largest values.

    Args:
        title: above the figure.
        tail: share of the largest values that the two are fitted to.
    """

    title: str
    tail: float = tails.TAILS[-1]

    def table(self, records: pd.DataFrame) -> pd.DataFrame:
        """A row for each point of the sample and of the fits; of many values the largest are all kept."""
        parts = []
        for name, values in _with_tail(records).items():
            ordered = np.sort(np.abs(values[values != 0]))[::-1]
            n = len(ordered)
            fit = tails.compare_lognormal(values, self.tail)
            told = {"panel": name, "n": n, "alpha": fit.alpha}
            rank = np.unique(np.geomspace(1, n, MOST_POINTS).round().astype(int))
            parts.append({**told, "kind": "sample", "x": ordered[rank - 1], "y": rank / n})
            x, above = np.geomspace(fit.x_min, ordered[0], CURVE_POINTS), fit.k / n
            parts.append({**told, "kind": "power law", "x": x, "y": above * (x / fit.x_min) ** -fit.alpha})
            if np.isfinite(fit.mu):  # else it is the power law
                tail, start = (stats.norm.logsf(np.log(at), fit.mu, fit.sigma) for at in (x, fit.x_min))
                parts.append({**told, "kind": "lognormal", "x": x, "y": above * np.exp(tail - start)})
        return _table(parts)

    def draw(self, table: pd.DataFrame) -> Figure:
        """Points and lines."""
        figure = _figure(table)
        for axes, name, shown in _panels(figure, table):
            by_kind = dict(list(shown.groupby("kind")))
            points = by_kind["sample"]
            axes.plot(points["x"], points["y"], **DOTS)
            for kind, color, line in (("power law", VERMILION, "-"), ("lognormal", "black", DASHED)):
                if kind in by_kind:
                    fit, label = by_kind[kind], f"{kind} fitted to\nthe largest {self.tail:.0%}"
                    axes.plot(fit["x"], fit["y"], color=color, linestyle=line, label=label)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlim(left=points.loc[points["y"] <= 0.5, "x"].min())
            axes.set_ylim(0.5 / shown["n"].iloc[0], 0.6)
            _few_numbers(axes)
            signed = name == SAMPLES["noise_projection"]
            axes.set_xlabel(f"x: {'magnitude of ' if signed else ''}{name}")
            axes.set_ylabel("share of mini-batches above x")
            _note(axes, rf"power law: $\alpha$ = {shown['alpha'].iloc[0]:.3g}")
            quiet_grid(axes, "both")
        _legend(figure)
        return figure


@dataclass(frozen=True, kw_only=True)
class HillPlot:
    """Hill's tail index by the share of the largest values that it is taken from: a power law is a plateau.

    Args:
        title: above the figure.
    """

    title: str

    def table(self, records: pd.DataFrame) -> pd.DataFrame:
        """A row for each k."""
        parts = []
        for name, values in _with_tail(records).items():
            n = np.count_nonzero(values)
            columns = {column: part.numpy() for column, part in tails.hill_plot(values)._asdict().items()}
            parts.append({"panel": name, "n": n, "share": columns["k"] / n, **columns})
        return _table(parts)

    def draw(self, table: pd.DataFrame) -> Figure:
        """The estimate, its band, and the index above which the variance is finite."""
        figure = _figure(table)
        for axes, name, shown in _panels(figure, table):
            _band(axes, shown["share"], shown, SKY, "95 % interval")
            axes.plot(shown["share"], shown["alpha"], color=BLUE, label="Hill's estimate")
            limit = tails.FINITE_VARIANCE
            axes.axhline(limit, color=VERMILION, linestyle=DASHED, label="below it: infinite\nvariance")
            sure = shown[(shown["k"] >= 10) & np.isfinite(shown["high"])]  # infinite where values are alike
            axes.set_yscale("log")
            axes.set_ylim(min(1, 0.8 * sure["low"].min()), max(5, 1.3 * sure["high"].max()))
            axes.set_xlim(0, shown["share"].max())
            _few_numbers(axes)
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.set_xlabel(f"share of the largest used\n({name})")
            axes.set_ylabel(r"tail index $\alpha$")
            quiet_grid(axes, "both")
        _legend(figure)
        return figure


@dataclass(frozen=True, kw_only=True)
class QQ:
    """Each sample in order beside a normal one, with the band that normal samples keep to.

    Args:
        title: above the figure.
    """

    title: str

    def table(self, records: pd.DataFrame) -> pd.DataFrame:
        """A row for each point; many values are thinned, but for those at the ends."""
        parts = []
        for name, values in _with_tail(records).items():
            n, plot = len(values), tails.qq(values)
            rank = np.unique(np.geomspace(1, n / 2, MOST_POINTS // 2).round().astype(int)) - 1
            kept = np.unique([*rank, *(n - 1 - rank)])
            columns = {column: part.numpy()[kept] for column, part in plot._asdict().items()}
            parts.append({"panel": name, "n": n, **columns})
        return _table(parts)

    def draw(self, table: pd.DataFrame) -> Figure:
        """Points, the line on which they would be equal, and the band."""
        figure = _figure(table)
        for axes, name, shown in _panels(figure, table):
            _band(axes, shown["normal"], shown, ORANGE, "where 95 % of\nnormal samples are")
            axes.plot(shown["normal"], shown["normal"], color=VERMILION, label="normal")
            axes.plot(shown["normal"], shown["sample"], **DOTS)
            axes.set_xlabel("quantile of the fitted normal")
            axes.set_ylabel(name)
            quiet_grid(axes, "both")
        _legend(figure)
        return figure


KINDS = {"histogram": Histogram, "survival": Survival, "hill": HillPlot, "qq": QQ}
"""File name -> what is drawn."""


def draw(name: str, records: pd.DataFrame, title: str) -> tuple[Figure, pd.DataFrame]:
    """One of ``KINDS`` of some records, and the table of all that it shows."""
    kind = KINDS[name](title=title)
    table = kind.table(records)
    figure = kind.draw(table)
    figure.suptitle(title)
    return figure, table


def _table(parts: list[dict]) -> pd.DataFrame:
    return pd.concat([pd.DataFrame(part) for part in parts], ignore_index=True)


def _figure(table: pd.DataFrame) -> Figure:
    return Figure(figsize=(2 + 3.2 * table["panel"].nunique(), 3.5), layout="constrained")


def _panels(figure: Figure, table: pd.DataFrame) -> Iterator[tuple[Axes, str, pd.DataFrame]]:
    """A panel for each sample, with its name and rows."""
    groups = list(table.groupby("panel", sort=False))
    for axes, (name, shown) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        yield axes, name, shown


def _band(axes: Axes, x: pd.Series, shown: pd.DataFrame, color: str, label: str) -> None:
    axes.fill_between(x, shown["low"], shown["high"], color=color, alpha=0.4, linewidth=0, label=label)


def _note(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="right", fontsize="small", fontweight="normal", color=QUIET)


def _few_numbers(axes: Axes) -> None:
    """Numbers between powers of ten where a logarithmic axis spans few of these."""
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        if axis.get_scale() != "log":
            continue
        if high > 1000 * low:
            axis.set_minor_formatter(NullFormatter())
            continue
        digits = "125" if high > 10 * low else "1235"
        plain = FuncFormatter(lambda x, _, digits=digits: f"{x:g}" if f"{x:e}"[0] in digits else "")
        axis.set_major_formatter(plain)
        axis.set_minor_formatter(plain)


def _legend(figure: Figure) -> None:
    entries = {}
    for axes in figure.axes:  # a lognormal may be drawn in some panels only
        entries |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside right center")
