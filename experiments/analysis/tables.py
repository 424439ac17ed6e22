"""Tables of runs: one row a run, or a grid of medians over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.errors import UserError
from experiments.runs import Run, write_whole

if TYPE_CHECKING:
    import pandas as pd


def runs_table(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Say of each run what it is, how far it came, and where it lies; one row per run, missing is None."""
    return [_row(run) for run in runs]


def _row(run: Run) -> dict[str, Any]:
    names, summary = run.names, run.summary()
    higher_is_better = summary.get("higher_is_better")
    return {
        "experiment": names["experiment"],
        "task": f"{names['task']}-{names['preset']}",
        "optimizer": names["optimizer"],
        "clipping": names["clipping"],
        "seed": int(names["seed"]) if names["seed"].isdecimal() else names["seed"],
        "status": (run.status or {}).get("status"),
        "step": run.last_step(),
        "metric": summary.get("metric"),
        "better": None if higher_is_better is None else "higher" if higher_is_better else "lower",
        "best": (summary.get("best") or {}).get("value"),
        "digest": names["digest"],
        "path": str(run.path),
    }


def grid(runs: Iterable[Run], rows: list[str], columns: list[str]) -> pd.DataFrame:
    """The median over seeds of the final metric, for each combination of settings.

    A diverged run counts as the worst value, inf or -inf, and so does one that ended without an evaluation.

    Args:
        runs: finished ones, all of one metric.
        rows: settings that tell rows apart: ``clipping``, ``optimizer`` and other names of a run, dotted
            paths into its config (``optimizer.lr``), or several of these divided by ``|``, the first that a
            run has.
        columns: likewise; together with the rows they leave only the seed open.

    Raises:
        UserError: the runs differ in more than the settings and the seed, or have different metrics.
    """
    import pandas as pd

    table, metrics, digests = [], set(), {}
    for run in runs:
        summary, config = run.summary(), run.config()
        metrics.add(summary["metric"])
        worst = -math.inf if summary["higher_is_better"] else math.inf
        value = summary["final"].get(f"val/{summary['metric']}", worst)
        cell = {setting: _setting(run.names, config, setting) for setting in (*rows, *columns)}
        digest = digests.setdefault(tuple(cell.values()), run.names["digest"])
        if digest != run.names["digest"]:
            told = ", ".join(f"{name}={value}" for name, value in cell.items())
            raise UserError(
                f"runs {digest} and {run.names['digest']} are both of {told}: add what tells them apart"
            )
        table.append({**cell, "value": worst if summary["status"] == "diverged" else value})
    if len(metrics) > 1:
        raise UserError(f"a grid is of one metric, these runs have {', '.join(sorted(metrics))}")
    frame = pd.DataFrame(table)
    medians = frame.groupby([*rows, *columns], dropna=False)["value"].median()
    return medians.unstack(columns)


def _setting(names: dict[str, str], config: dict[str, Any], alternatives: str) -> Any:
    for path in alternatives.split("|"):
        if path in names:
            return names[path]
        node: Any = config
        for key in path.split("."):
            node = node.get(key) if isinstance(node, dict) else None
        if node is not None:
            return node
    return "-"


def write_grid(folder: Path, table: pd.DataFrame) -> list[Path]:
    """Write a grid as CSV and as Markdown into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "grid.csv", folder / "grid.md"]
    with write_whole(paths[0]) as file:
        file.write(table.to_csv().encode())
    with write_whole(paths[1]) as file:
        file.write(markdown_grid(table).encode())
    return paths


def markdown_grid(table: pd.DataFrame) -> str:
    """Render a grid; nothing is marked as best, as seeds are few."""
    names = [str(name).replace("|", " or ") for name in table.index.names]
    heads = [
        f"{table.columns.name} {column:g}" if isinstance(column, float) else str(column) for column in table
    ]
    lines = ["| " + " | ".join([*names, *heads]) + " |", "|" + "---|" * len(names) + "---:|" * len(heads)]
    for key, values in table.iterrows():
        cells = [str(part) for part in (key if isinstance(key, tuple) else (key,))]
        cells += ["" if math.isnan(value) else f"{value:.3g}" for value in values]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


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
