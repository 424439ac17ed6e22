"""The original's comparison of methods: the train loss large, the train metric over the evaluated one."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.analysis import style
from experiments.analysis.marks import Mark, marks

MOST_POINTS = 400
"""Of one curve of the train loss; its window is longer than the gaps between them."""
MOST_MARKED = 30
BAND = (0.1, 0.9)
HOW_TO_READ = "line: median over n seeds\nband: their middle 80 %"
METHOD = ["method", "clipping"]
COLUMNS = ["panel", *METHOD, "seeds", "diverged", "curve", "step", "median", "low", "high"]


def comparison_figure(
    curves: pd.DataFrame, *, metric: str, higher_is_better: bool, title: str
) -> tuple[Figure, pd.DataFrame]:
    """Draw the curves of several methods on one task.

    After its last record a run that diverged counts as worse than any number: a line of which half diverged
    ends, a band with such a run reaches the panel's edge, and a cross shows where that began.

    Args:
        curves: records of runs, with columns ``method clipping seed status`` beside ``step epoch train/loss
            train/<metric> val/loss val/<metric>``; methods are drawn in their order.
        metric: that is compared.
        higher_is_better: whether it is.
        title: above the figure.

    Returns:
        The figure, and a table of all that is drawn: the crosses are panel ``diverged``, and the lines where
        epochs begin panel ``epoch``, of which ``curve`` is the number.
    """
    table = comparison_table(curves, metric, higher_is_better)
    return draw_comparison(table, title), table


def comparison_table(curves: pd.DataFrame, metric: str, higher_is_better: bool) -> pd.DataFrame:
    """All that is drawn of curves; the arguments are those of ``comparison_figure``."""
    runs = curves.groupby([*METHOD, "seed"], sort=False).agg(
        diverged=("status", lambda status: status.iloc[0] == "diverged"), last=("step", "max")
    )
    loss, curve = _smoothed_loss(curves)
    parts = [_summary(loss, "train/loss", runs, math.inf).assign(panel="train loss", curve=curve)]
    evaluated = curves[curves["val/loss"].notna()]
    worst = -math.inf if higher_is_better else math.inf
    for column in (f"train/{metric}", f"val/{metric}"):
        if column != "train/loss" and evaluated[column].notna().any():
            part = _summary(evaluated, column, runs, worst)
            parts.append(part.assign(panel=column.replace("/", " "), curve="evaluations"))
    ends = runs[runs["diverged"]].reset_index().rename(columns={"last": "step"})
    parts.append(ends[[*METHOD, "step"]].assign(panel="diverged"))
    if epochs := _epochs(curves):
        parts.append(pd.DataFrame(epochs, columns=["step", "curve"]).assign(panel="epoch"))
    return pd.concat(parts, ignore_index=True)[COLUMNS]


def _training(curves: pd.DataFrame) -> pd.DataFrame:
    """The records of training steps whose loss is a number."""
    return curves[np.isfinite(curves["train/loss"])]


def _epochs(curves: pd.DataFrame) -> list[tuple[float, int]]:
    """Where epochs begin, by the longest run."""
    train = _training(curves)
    last = train.loc[train["step"].idxmax()]
    longest = train[(train["method"] == last["method"]) & (train["seed"] == last["seed"])]
    return style.epoch_starts(longest["step"].to_numpy(), longest["epoch"].to_numpy())


def _smoothed_loss(curves: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Smooth the train loss of each run, thin it, and say how it was smoothed."""
    train = _training(curves)
    steps = np.sort(train["step"].unique())
    window = style.window_for(len(steps))
    kept = train["step"].isin(steps[:: math.ceil(len(steps) / MOST_POINTS)])

    def smoothed(how: str) -> pd.DataFrame:
        losses = train.groupby([*METHOD, "seed"], sort=False)["train/loss"]
        smooth = losses.transform(lambda loss: style.smooth(loss.to_numpy(), window, how))
        return train.assign(**{"train/loss": smooth})[kept]

    # On a log scale a mean follows the largest value, and would rise half a window before a divergence.
    how, loss = "median", smoothed("median")
    if not style.is_wide(loss["train/loss"].to_numpy()):
        how, loss = "mean", smoothed("mean")
    return loss, style.window_label(steps, window, how)


def _summary(rows: pd.DataFrame, column: str, runs: pd.DataFrame, worst: float) -> pd.DataFrame:
    """Median and band over the seeds of each method, step by step."""
    rows = rows.assign(**{column: rows[column].where(np.isfinite(rows[column]), worst)})
    steps = np.sort(rows["step"].unique())
    parts = []
    for (method, clipping), of_method in runs.groupby(METHOD, sort=False):
        own = rows[(rows["method"] == method) & (rows["clipping"] == clipping)]
        wide = own.pivot(index="step", columns="seed", values=column)
        wide = wide.reindex(index=steps, columns=of_method.index.get_level_values("seed"))
        inside = wide.bfill().notna().to_numpy()  # a step without a number has that of the one before
        lost = ~inside & of_method["diverged"].to_numpy()
        wide = wide.ffill().where(inside).mask(lost, worst).dropna(how="all")
        low, high = np.nanquantile(wide, BAND, axis=1, method="inverted_cdf")
        summary = {"step": wide.index, "median": np.nanmedian(wide, axis=1), "low": low, "high": high}
        counts = {"seeds": len(of_method), "diverged": int(of_method["diverged"].sum())}
        parts.append(pd.DataFrame({"method": method, "clipping": clipping, **counts, **summary}))
    return pd.concat(parts)


def draw_comparison(table: pd.DataFrame, title: str) -> Figure:
    """Draw the table of a comparison."""
    names = [name for name in dict.fromkeys(table["panel"]) if name not in ("diverged", "epoch")]
    rows = max(len(names) - 1, 1)
    figure = Figure(figsize=(14, 6.4), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1)
    grid = figure.add_gridspec(rows, 2, width_ratios=[1.7, 1])
    loss = figure.add_subplot(grid[:, 0])
    panels = [loss, *(figure.add_subplot(grid[row, 1], sharex=loss) for row in range(rows))]
    shown = table[table["panel"].isin(names)]
    drawn = marks(zip(shown["method"], shown["clipping"], strict=True))
    epochs = [(row.step, int(row.curve)) for row in table[table["panel"] == "epoch"].itertuples()]
    for axes, name in zip(panels, names, strict=True):
        _draw_panel(axes, table[table["panel"] == name], drawn)
        style.mark_epochs(axes, epochs)
        style.tidy(axes)
    ends = table[table["panel"] == "diverged"]
    at_the_top = loss.get_xaxis_transform()
    for method, step in zip(ends["method"], ends["step"], strict=True):
        loss.plot(step, 0.98, marker="x", color=drawn[method].color, transform=at_the_top, clip_on=False)
    figure.suptitle(title)
    _add_legend(figure, shown, drawn)
    return figure


def _draw_panel(axes: Axes, shown: pd.DataFrame, drawn: dict[str, Mark]) -> None:
    values = shown[["median", "low", "high"]].to_numpy()
    known = values[np.abs(values) < style.LARGEST]
    wide = style.is_wide(known)
    if wide:
        axes.set_yscale("log")
    bottom, top = _limits(known, wide)
    for method, points in shown.groupby("method", sort=False):
        how = drawn[method]
        axes.plot(
            points["step"],
            points["median"].where(points["median"].abs() < style.LARGEST),
            color=how.color,
            linestyle=how.linestyle,
            marker=how.marker if len(points) <= MOST_MARKED else "",
        )
        if points["seeds"].iloc[0] > 1:
            low, high = (points[edge].clip(bottom, top) for edge in ("low", "high"))
            faint = {"facecolor": (how.color, 0.12), "edgecolor": (how.color, 0.35), "linewidth": 0.6}
            axes.fill_between(points["step"], low, high, **faint)
    axes.set_ylim(bottom, top)
    name, curve = shown["panel"].iloc[0], shown["curve"].iloc[0]
    axes.set_title(name if curve == "evaluations" else f"{name}, {curve}", **style.TITLE)
    axes.set_ylabel(name + (" (log scale)" if wide else ""))


def _limits(known: np.ndarray, log: bool) -> tuple[float, float]:
    """Limits of an axis around these values, with a margin."""
    if len(known) == 0:
        return 0.0, 1.0
    ends = np.log([known.min(), known.max()]) if log else np.array([known.min(), known.max()])
    margin = 0.05 * (ends[1] - ends[0]) or 0.05
    bottom, top = ends[0] - margin, ends[1] + margin
    return (math.exp(bottom), math.exp(top)) if log else (float(bottom), float(top))


def _add_legend(figure: Figure, table: pd.DataFrame, drawn: dict[str, Mark]) -> None:
    """Name the lines beside the panels, where they cover nothing."""
    counts = table.groupby("method")[["seeds", "diverged"]].max().fillna(0).astype(int)
    handles = []
    for method, how in drawn.items():
        seeds, diverged = counts.loc[method]
        label = f"{method} (n = {seeds}{f', {diverged} diverged' if diverged else ''})"
        handles.append(
            Line2D([], [], color=how.color, linestyle=how.linestyle, marker=how.marker, label=label)
        )
    if counts["diverged"].any():
        cross = Line2D([], [], linestyle="", marker="x", color=style.QUIET, label="a run diverged")
        handles.append(cross)
    figure.legend(
        handles=handles,
        loc="outside right center",
        title=HOW_TO_READ,
        title_fontsize="small",
        alignment="left",
        frameon=False,
    )
