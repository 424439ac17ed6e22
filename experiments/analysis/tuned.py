"""What fair tuning came to: every trial, the best of each method next to its defaults, best-of-k curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from experiments.analysis import style
from experiments.analysis.entries import load_entries
from experiments.analysis.figures import base
from experiments.analysis.methods import finished
from experiments.analysis.stats import expected_best_of, mean_interval
from experiments.analysis.tables import Row, Table
from experiments.analysis.tuning import nothing_learned
from experiments.runs import write_whole
from experiments.sweeps import Sweep
from experiments.trials import Trial, Tuned

DEFAULT, TUNED = "default", "tuned"


def write_tuning(sweep: Sweep, methods: Sequence[Tuned]) -> list[Path]:
    """Write ``tuning.csv``, ``best.{csv,md}`` and ``best_of_k.{csv,png}`` into the sweep's folder.

    Args:
        sweep: that tuned.
        methods: that it tuned, each with its trials.
    """
    best = best_table(methods)
    curves = curves_table(sweep, methods)
    contents = {
        "tuning.csv": trials_table(methods).to_csv(index=False),
        "best.csv": best.csv(),
        "best.md": best.markdown(),
        "best_of_k.csv": curves.to_csv(index=False),
    }
    for name, text in contents.items():
        with write_whole(sweep.path / name) as file:
            file.write(text.encode())
    picture = style.save(draw(curves), sweep.path / "best_of_k.png")
    return [*(sweep.path / name for name in contents), picture]


def trials_table(methods: Iterable[Tuned]) -> pd.DataFrame:
    """A row for each trial of each method, those at the report seeds too."""
    rows = []
    for tuned in methods:
        for trial in [*tuned.tried, tuned.default, *([tuned.report] if tuned.report else [])]:
            results = [result for result in trial.results if result is not None]
            rows.append(
                {
                    **{"method": trial.method, "phase": trial.phase, "trial": trial.number},
                    **trial.values,
                    "seeds": " ".join(str(job.config["seed"]) for job in trial.jobs),
                    "metric": results[0].metric if results else None,
                    "mean": trial.mean,
                    "diverged": sum(math.isinf(result.value) for result in results),
                    "failed": len(trial.results) - len(results),
                }
            )
    columns = list(dict.fromkeys(key for row in rows for key in row))
    last = [name for name in ("seeds", "metric", "mean", "diverged", "failed") if name in columns]
    return pd.DataFrame(rows, columns=[name for name in columns if name not in last] + last)


def best_table(methods: Sequence[Tuned]) -> Table:
    """A row for each method: what was chosen, and what that gave at other seeds next to the defaults."""
    rows = [_best_row(tuned) for tuned in methods]
    result = _a_result(methods)
    columns = {
        **{name: name for name in ("method", "chosen", "trials", "selected at")},
        "tuned [95%]": lambda row: _ranged(row, TUNED),
        "default [95%]": lambda row: _ranged(row, DEFAULT),
        "on the edge": "on the edge",
    }
    better = "higher" if result.higher_is_better else "lower"
    notes = (
        f"{result.metric}, mean over seeds, {better} is better; inf: a run diverged",
        "selected at: mean at the seeds by which the best of the trials was chosen, which flatters it; tuned "
        "and default: at seeds that nothing was chosen by, with t-intervals",
        "on the edge: a better value may lie beyond, so the method may be tuned too little",
    )
    return Table("best", "Every method at its best, and as it comes", rows, columns, notes)


def _best_row(tuned: Tuned) -> Row:
    row: Row = {
        "method": tuned.method,
        "chosen": " ".join(f"{key}={value}" for key, value in tuned.best.values.items()),
        "trials": len(tuned.tried),
        "selected at": tuned.best.mean,
    }
    for name, trial in ((TUNED, tuned.report), (DEFAULT, tuned.default)):
        interval = mean_interval(_values(trial))
        row |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return {**row, "on the edge": "; ".join(tuned.edges) or None}


def _ranged(row: Row, name: str) -> str:
    value, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
    return f"{value:.4g}" if math.isnan(low) else f"{value:.4g} [{low:.4g}, {high:.4g}]"


def _values(trial: Trial | None) -> list[float]:
    results = [] if trial is None else trial.results
    return [math.nan if result is None else result.value for result in results]


def _a_result(methods: Sequence[Tuned]) -> Any:
    trials = (trial for tuned in methods for trial in (*tuned.tried, tuned.default))
    return next(result for trial in trials for result in trial.results if result is not None)


def curves_table(sweep: Sweep, methods: Sequence[Tuned]) -> pd.DataFrame:
    """All that is drawn: expected best of k trials, and the means at the report seeds.

    A trial that diverged or failed counts as a model that learned nothing.
    """
    result = _a_result(methods)
    runs = [sweep.run(job) for tuned in methods for trial in tuned.tried for job in trial.jobs]
    of_runs = [replace(one, task="", method=one.run.names["digest"]) for one in finished(runs)[0]]
    nothing = nothing_learned(load_entries(of_runs, result.metric))
    sign = 1 if result.higher_is_better else -1
    rows = []
    for tuned in methods:
        told = {"line": tuned.method, "clipping": tuned.method, "metric": result.metric}
        told["better"] = "higher" if result.higher_is_better else "lower"
        scores = np.maximum([trial.score for trial in tuned.tried], nothing)
        for k in range(1, len(scores) + 1):
            rows.append({**told, "kind": "best of", "k": k, "value": sign * expected_best_of(scores, k)})
        for kind, trial in ((DEFAULT, tuned.default), (TUNED, tuned.report)):
            interval = mean_interval(_values(trial))
            rows.append(
                {**told, "kind": kind, "value": interval.value, "low": interval.low, "high": interval.high}
            )
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame) -> Figure:
    """Best of k on the left; on the right default and tuned at the report seeds."""
    drawn = base.marks_of(table)
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    metric, better = table["metric"].iloc[0], table["better"].iloc[0]
    curves = table[table["kind"] == "best of"]
    for line, how in drawn.items():
        points = curves[curves["line"] == line]
        left.plot(points["k"], points["value"], color=how.color, linestyle=how.linestyle)
    left.set_xlabel("k, trials at the selection seeds")
    left.set_ylabel(f"{metric} ({better} is better)")
    left.set_title("expected best of k trials")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    _draw_report(right, table, list(drawn))
    right.set_xlabel(f"{metric} ({better} is better)")
    right.set_title("at the report seeds: default and tuned")
    finite = table["value"][np.isfinite(table["value"])]
    if base.is_wide(finite, ratio=10):
        base.log_scale(left)
        right.set_xscale("log", nonpositive="clip")  # an interval may reach below 0
    base.quiet_grid(left)
    base.quiet_grid(right, "x")
    look = {"color": style.QUIET, "marker": "o", "linestyle": ""}
    extra = {
        DEFAULT: Line2D([], [], **look, markerfacecolor="white", label=DEFAULT),
        TUNED: Line2D([], [], **look, label="tuned; both with 95 % intervals"),
    }
    base.legend(figure, drawn, markers=False, **extra)
    return figure


def _draw_report(axes: Axes, table: pd.DataFrame, lines: Sequence[str]) -> None:
    drawn = base.marks_of(table)
    for place, line in enumerate(lines):
        for kind, shift in ((DEFAULT, 0.13), (TUNED, -0.13)):
            row = table[(table["line"] == line) & (table["kind"] == kind)].iloc[0]
            how, face = drawn[line], "white" if kind == DEFAULT else drawn[line].color
            if not math.isfinite(row["value"]):
                axes.annotate(
                    f"{kind}: diverged",
                    (1, place + shift),
                    xycoords=("axes fraction", "data"),
                    ha="right",
                    va="center",
                    fontsize="small",
                    color=how.color,
                )
                continue
            if math.isfinite(row["low"]):
                axes.plot([row["low"], row["high"]], [place + shift] * 2, color=how.color, linewidth=1)
            axes.plot(row["value"], place + shift, marker="o", color=how.color, markerfacecolor=face)
    axes.set_yticks(range(len(lines)), lines)
    axes.set_ylim(len(lines) - 0.5, -0.5)
