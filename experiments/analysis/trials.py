"""The trials of a sweep as a table, and the best so far."""

from __future__ import annotations

import math
from collections.abc import Sequence

from experiments.analysis.tables import Row, cell, format_table
from experiments.trials import Trial


def trials_text(trials: Sequence[Trial]) -> str:
    """A line for each trial, and one that says which is the best so far of each method."""
    return "\n".join([format_table(_rows(trials)), *best_lines(trials)])


def best_lines(trials: Sequence[Trial]) -> list[str]:
    """Name the best so far, of each method where several are tuned, among those that got furthest."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.phase in ("", "select") and math.isfinite(trial.score):
            groups.setdefault(trial.method, []).append(trial)
    lines = []
    for method, scored in groups.items():
        furthest = max(_step(trial) for trial in scored)
        best = max((trial for trial in scored if _step(trial) == furthest), key=lambda trial: trial.score)
        values = " ".join(f"{key}={value}" for key, value in best.values.items())
        result = f"{best.results[0].metric} {cell(best.mean)}"
        of_method = f" of {method}" if method else ""
        lines.append(f"best so far{of_method}: trial {best.number}, {values}: {result}")
    return lines


def _step(trial: Trial) -> float:
    return math.inf if trial.until is None else trial.until


def _rows(trials: Sequence[Trial]) -> list[Row]:
    several = {name: any(getattr(trial, name) for trial in trials) for name in ("method", "phase", "until")}
    rows = []
    for trial in trials:
        row: Row = {name: getattr(trial, name) for name in ("method", "phase") if several[name]}
        row |= {
            "trial": trial.number,
            "values": " ".join(f"{key}={value}" for key, value in trial.values.items()) or "as they are",
        }
        if several["until"]:
            row["to step"] = "the end" if trial.until is None else str(trial.until)
        done = sum(result is not None for result in trial.results)
        rows.append({**row, "seeds done": f"{done}/{len(trial.jobs)}", "mean": trial.mean})
    return rows
