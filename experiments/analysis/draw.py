"""The picture of one run: loss, metric, and what clipping did to the gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments.analysis import style
from experiments.runs import Run

TRAIN, VALIDATION, BAD, NORM, SKIPPED = style.BLUE, style.ORANGE, style.VERMILION, style.SKY, style.PINK

STEP_COLUMNS = ["train/loss", "lr", "grad_norm", "threshold", "clip_coef", "clipped"]
MAX_MARKED_POINTS = 60


def draw_curves(run: Run) -> Path:
    """Draw the curves of a run into its folder, and say where."""
    figure = curves_figure(run)
    return style.save(figure, run.curves_path)


def curves_figure(run: Run) -> Figure:
    """Draw train loss, metric and gradient norm against the step; what was not recorded is left out.

    A metric that is the loss itself gets no panel of its own.
    """
    records, summary = run.records(), run.summary()
    if records.empty:
        records = pd.DataFrame(columns=["step"], dtype=float)
    status = (run.status or {}).get("status", "not started")
    metric = summary.get("metric") or _recorded_metric(records)
    best = summary.get("best") or {}
    unit = summary.get("clip_unit") or _recorded_unit(records)
    diverged_at = _end_of_finite_loss(records) if status == "diverged" else None
    by_share = unit != "steps" and len(_finite(records, "clipped")[0]) > 0

    figure = Figure(figsize=(13, 9 if by_share else 8), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1)
    heights = [1.2, 1, 0.4] if by_share else [1.2, 1]
    grid = figure.add_gridspec(len(heights), 2, width_ratios=[1.7, 1], height_ratios=heights)
    loss = figure.add_subplot(grid[0, :] if metric == "loss" else grid[0, 0])
    panels = [loss]
    _draw_loss(loss, records)
    if metric != "loss":
        panels.append(figure.add_subplot(grid[0, 1], sharex=loss))
        _draw_metric(panels[-1], records, metric)
    _mark_best(panels[-1], best)
    panels.append(figure.add_subplot(grid[1, :], sharex=loss))
    _draw_norm(panels[-1], records, unit)
    if by_share:
        panels.append(figure.add_subplot(grid[2, :], sharex=loss))
        _draw_share(panels[-1], records, unit)
        panels[-2].tick_params(labelbottom=False)
    for axes in panels:
        _finish(axes, records, diverged_at)
    figure.suptitle(
        _title(run, summary, status, metric, unit, diverged_at),
        color=BAD if status not in ("ok", "running") else "black",
    )
    return figure


def _draw_loss(axes: Axes, records: pd.DataFrame) -> None:
    steps, values = _finite(records, "train/loss")
    every = np.concatenate([values, _finite(records, "val/loss")[1]])
    wide = style.is_wide(every)
    if len(steps) > MAX_MARKED_POINTS:
        # On a log scale a mean follows the largest value, and would rise half a window before a divergence.
        smooth, window = _smooth(steps, values, "median" if wide else "mean")
        axes.plot(steps, values, color=TRAIN, alpha=0.3, linewidth=0.7, label="train")
        axes.plot(steps, smooth, color=TRAIN, linewidth=2, label=f"train, {window}")
    elif len(steps):
        axes.plot(steps, values, color=TRAIN, label="train", **_markers(steps))
    _plot_validation(axes, records, "val/loss")
    if wide:
        axes.set_yscale("log")
    axes.set_title("loss", **style.TITLE)
    axes.set_ylabel("loss (log scale)" if wide else "loss")


def _draw_metric(axes: Axes, records: pd.DataFrame, metric: str | None) -> None:
    steps, values = _finite(records, f"train/{metric}")
    if len(steps):
        axes.plot(steps, values, color=TRAIN, label="train", **_markers(steps))
    _plot_validation(axes, records, f"val/{metric}")
    axes.set_title(metric or "metric", **style.TITLE)
    axes.set_ylabel(metric or "metric")


def _mark_best(axes: Axes, best: dict[str, Any]) -> None:
    if _is_finite(best.get("step")) and _is_finite(best.get("value")):
        axes.plot(
            best["step"],
            best["value"],
            color=BAD,
            marker="*",
            markersize=15,
            markerfacecolor="none",
            markeredgewidth=1.5,
            linestyle="none",
            label="best",
            clip_on=False,
        )


def _plot_validation(axes: Axes, records: pd.DataFrame, column: str) -> None:
    steps, values = _finite(records, column)
    if len(steps):
        axes.plot(steps, values, color=VALIDATION, linewidth=2, label="evaluation", **_markers(steps))


def _draw_norm(axes: Axes, records: pd.DataFrame, unit: str) -> None:
    steps, norms = _finite(records, "grad_norm")
    if len(steps):
        axes.plot(steps, norms, color=NORM, linewidth=0.9, label="gradient norm", **_markers(steps))
    at, thresholds = _finite(records, "threshold")
    if len(at):
        label = "threshold" if unit == "steps" else f"threshold per {unit.removesuffix('s')} (median)"
        axes.plot(at, thresholds, color="black", linewidth=1.5, label=label, **_markers(at))
    if unit == "steps":
        clipped = np.isin(steps, _steps_where(records, "clipped", lambda share: share > 0))
        if clipped.any():
            axes.plot(
                steps[clipped],
                norms[clipped],
                color=BAD,
                marker="o",
                markersize=4 if len(steps) <= MAX_MARKED_POINTS else 2.5,
                linestyle="none",
                label="clipped",
                zorder=3,
            )
    broken = _steps_where(records, "grad_norm", lambda norm: ~np.isfinite(norm))
    if len(broken):
        axes.plot(
            broken,
            np.full(len(broken), 0.97),
            color=SKIPPED,
            marker="v",
            linestyle="none",
            label="norm not finite",
            transform=axes.get_xaxis_transform(),
        )
    if (norms > 0).any():
        axes.set_yscale("log", nonpositive="mask")
    axes.set_title("gradient norm before clipping", **style.TITLE)
    axes.set_ylabel("norm (log scale)" if (norms > 0).any() else "norm")


def _draw_share(axes: Axes, records: pd.DataFrame, unit: str) -> None:
    steps, shares = _finite(records, "clipped")
    if len(steps) > MAX_MARKED_POINTS:
        smooth, window = _smooth(steps, shares, "mean")
        axes.fill_between(steps, shares, color=BAD, alpha=0.35, linewidth=0, label="each step")
        axes.plot(steps, smooth, color=BAD, label=window)
    else:
        axes.plot(steps, shares, color=BAD, label="each step", **_markers(steps))
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title(f"share of {unit} clipped", **style.TITLE)
    axes.set_ylabel("share")


def _finish(axes: Axes, records: pd.DataFrame, diverged_at: float | None) -> None:
    if not axes.lines:
        axes.text(0.5, 0.5, "nothing recorded", transform=axes.transAxes, ha="center", color=style.QUIET)
    steps, epochs = _finite(records, "epoch")
    style.mark_epochs(axes, style.epoch_starts(steps, epochs))
    if diverged_at is not None:
        axes.axvline(diverged_at, color=BAD, linewidth=1.5, label="diverged")
    style.tidy(axes)
    if axes.get_legend_handles_labels()[0]:
        style.legend_above(axes)


def _title(
    run: Run,
    summary: dict[str, Any],
    status: str,
    metric: str | None,
    unit: str,
    diverged_at: float | None,
) -> str:
    """Return two lines: what the run is, and how it ended."""
    names = {**run.names, **{key: value for key, value in summary.items() if key in run.names}}
    lr = (run.config().get("optimizer") or {}).get("lr")
    what = (
        f"{names['task']} {names['preset']}: {names['optimizer']}{f' (lr {lr:g})' if _is_finite(lr) else ''}"
        f" with {names['clipping']}, seed {names['seed']}"
    )
    how = [status if diverged_at is None else f"diverged at step {diverged_at:g}"]
    if "steps" in summary:
        how.append(f"{summary['steps']} steps")
    final, best = summary.get("final") or {}, summary.get("best") or {}
    value = final.get(f"val/{metric}", final.get(metric))
    if value is not None:
        how.append(f"final {metric} {value:.4g}")
    if best.get("value") is not None:
        how.append(f"best {metric} {best['value']:.4g} at step {best.get('step')}")
    if summary.get("clip_fraction") is not None:
        how.append(f"{100 * summary['clip_fraction']:.3g}% of {unit} clipped")
    if summary.get("steps_per_second") is not None:
        how.append(f"{summary['steps_per_second']:.1f} steps/s")
    return what + "\n" + " | ".join(how)


def _column(records: pd.DataFrame, column: str) -> np.ndarray:
    if column not in records:
        return np.full(len(records), np.nan)
    return pd.to_numeric(records[column], errors="coerce").to_numpy(float)


def _finite(records: pd.DataFrame, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and values of a column where it has a value that can be drawn."""
    values = _column(records, column)
    keep = np.abs(values) < style.LARGEST  # false for NaN too
    return _column(records, "step")[keep], values[keep]


def _steps_where(records: pd.DataFrame, column: str, holds: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return the training steps whose value holds; rows of evaluations are not asked."""
    if column not in records:
        return np.array([])
    training = records.reindex(columns=STEP_COLUMNS).notna().any(axis=1).to_numpy()
    return _column(records, "step")[training & holds(_column(records, column))]


def _end_of_finite_loss(records: pd.DataFrame) -> float | None:
    """Return the first step of the non-finite losses at the end, or else the last step."""
    steps, _ = _finite(records, "train/loss")
    broken = _steps_where(records, "train/loss", lambda loss: ~np.isfinite(loss))
    after = broken[broken > steps.max(initial=-np.inf)]
    everything = _column(records, "step")
    return after[0] if len(after) else everything.max() if len(everything) else None


def _smooth(steps: np.ndarray, values: np.ndarray, how: str) -> tuple[np.ndarray, str]:
    """Return the centred running mean or median, and what to call it."""
    window = style.window_for(len(values))
    return style.smooth(values, window, how), style.window_label(steps, window, how)


def _markers(steps: np.ndarray) -> dict[str, Any]:
    return {"marker": "o", "markersize": 4} if len(steps) <= MAX_MARKED_POINTS else {}


def _recorded_metric(records: pd.DataFrame) -> str | None:
    names = [column.removeprefix("val/") for column in records if column.startswith("val/")]
    return next((name for name in names if name != "loss"), "loss" if names else None)


def _recorded_unit(records: pd.DataFrame) -> str:
    _, clipped = _finite(records, "clipped")
    return "units" if ((clipped > 0) & (clipped < 1)).any() else "steps"


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and np.isfinite(value)
