"""Plain text tables of runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from experiments.runs import Run


def runs_table(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Say of each run what it is, how far it came, and where it lies; one row per run, missing is None."""
    return [_row(run) for run in runs]


def _row(run: Run) -> dict[str, Any]:
    names, summary = run.names, run.summary()
    return {
        "experiment": names["experiment"],
        "task": f"{names['task']}-{names['preset']}",
        "optimizer": names["optimizer"],
        "clipping": names["clipping"],
        "seed": int(names["seed"]) if names["seed"].isdecimal() else names["seed"],
        "status": (run.status or {}).get("status"),
        "step": run.last_step(),
        "metric": summary.get("metric"),
        "best": (summary.get("best") or {}).get("value"),
        "digest": names["digest"],
        "path": str(run.path),
    }


def format_table(rows: list[dict[str, Any]]) -> str:
    """Align rows with the same keys under their names: numbers to the right, text to the left."""
    if not rows:
        return "no runs"
    columns = []
    for key in rows[0]:
        values = [row[key] for row in rows]
        cells = [key, *map(_cell, values)]
        width = max(map(len, cells))
        # A column is numeric if all it holds are numbers; gaps do not count.
        number = all(isinstance(value, int | float) for value in values if value is not None)
        columns.append([cell.rjust(width) if number else cell.ljust(width) for cell in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
