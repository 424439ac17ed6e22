"""Tables of runs: one row a run, or a grid of medians over seeds; and a table written in many ways."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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
    cells = frame.groupby([*rows, *columns], dropna=False)["value"]
    medians, counts = cells.median().unstack(columns), cells.size()
    seeds = " to ".join(map(str, sorted({counts.min(), counts.max()})))
    medians.attrs["cells"] = f"final {metrics.pop()}, median over seeds ({seeds}); inf: half of them diverged"
    return medians


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
    return "\n".join([*lines, "", f"In a cell: {table.attrs['cells']}"]) + "\n"


def format_table(rows: list[dict[str, Any]]) -> str:
    """Align rows with the same keys under their names: numbers to the right, text to the left."""
    if not rows:
        return "no runs"
    return _align(list(rows[0]), [[cell(row[key]) for key in row] for row in rows], _numeric(rows, rows[0]))


def _numeric(rows: list[dict[str, Any]], keys: Iterable[str]) -> list[bool]:
    """Say for each key whether all it holds are numbers; gaps do not count."""
    held = [[row[key] for row in rows if row[key] is not None] for key in keys]
    return [all(isinstance(value, int | float) for value in values) for values in held]


def _align(heads: Sequence[str], lines: list[list[str]], right: Sequence[bool]) -> str:
    columns = []
    for head, cells, to_the_right in zip(heads, zip(*lines, strict=True), right, strict=True):
        width = max(map(len, (head, *cells)))
        pad = str.rjust if to_the_right else str.ljust
        columns.append([pad(text, width) for text in (head, *cells)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def cell(value: Any) -> str:
    """Write a value for people: four digits, ``-`` where there is none."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


Row = dict[str, Any]
Show = Callable[[Row], str]
LATEX_ESCAPES = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "\\": r"\textbackslash{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
    }
)


@dataclass(frozen=True)
class Table:
    """One table, to be written for people (text, Markdown, LaTeX) and for programs (CSV, JSON, Parquet).

    Args:
        name: of its files.
        title: above it.
        rows: one or more, of the same keys: all there is to know. Missing is None; a number may be infinite.
        columns: heading -> key, or a function of a row that gives a cell. Only people's formats follow them.
        notes: below it.
    """

    name: str
    title: str
    rows: list[Row]
    columns: dict[str, str | Show]
    notes: tuple[str, ...] = ()

    def cells(self) -> list[list[str]]:
        """The rows as people read them."""
        shows = self.columns.values()
        return [[show(row) if callable(show) else cell(row[show]) for show in shows] for row in self.rows]

    def to_the_right(self) -> list[bool]:
        """Say of each column whether it is aligned so: all but those of text."""
        keys = [show for show in self.columns.values() if isinstance(show, str)]
        numeric = dict(zip(keys, _numeric(self.rows, keys), strict=True))
        return [callable(show) or numeric[show] for show in self.columns.values()]

    def text(self) -> str:
        """Aligned by spaces, for a terminal."""
        lines = [self.title, "", _align(list(self.columns), self.cells(), self.to_the_right()), ""]
        return "\n".join([*lines, *(f"* {note}" for note in self.notes)]).rstrip() + "\n"

    def markdown(self) -> str:
        """A heading, a table and a list of notes."""
        rule = ["---:" if right else "---" for right in self.to_the_right()]
        cells = [[text.replace("|", r"\|") for text in line] for line in (list(self.columns), *self.cells())]
        cells.insert(1, rule)
        table = ["| " + " | ".join(line) + " |" for line in cells]
        notes = ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join([f"### {self.title}", "", *table, *notes]) + "\n"

    def latex(self) -> str:
        """A ``table`` float with booktabs' rules, the title and the notes its caption."""
        lines = [
            " & ".join(text.translate(LATEX_ESCAPES) for text in line) + r" \\"
            for line in (list(self.columns), *self.cells())
        ]
        caption = " ".join([f"{self.title}.", *(f"{note}." for note in self.notes)])
        return "\n".join(
            [
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{caption.translate(LATEX_ESCAPES)}}}",
                rf"\begin{{tabular}}{{{''.join('r' if right else 'l' for right in self.to_the_right())}}}",
                r"\toprule",
                lines[0],
                r"\midrule",
                *lines[1:],
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )

    def csv(self) -> str:
        """All keys of the rows in full precision, missing left empty."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def as_dict(self) -> dict[str, Any]:
        """What goes into JSON, which knows no infinity: that is text there."""
        rows = [{key: _strict(value) for key, value in row.items()} for row in self.rows]
        return {"name": self.name, "title": self.title, "rows": rows, "notes": list(self.notes)}


def _strict(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _json(tables: Sequence[Table]) -> str:
    return json.dumps([table.as_dict() for table in tables], indent=1, allow_nan=False) + "\n"


def _csv(tables: Sequence[Table]) -> str:
    if len(tables) == 1:
        return tables[0].csv()
    return "\n".join(f"# {table.name}\n{table.csv()}" for table in tables)


FORMATS: dict[str, Callable[[Sequence[Table]], str]] = {
    "text": lambda tables: "\n".join(table.text() for table in tables),
    "markdown": lambda tables: "\n".join(table.markdown() for table in tables),
    "latex": lambda tables: "\n".join(table.latex() for table in tables),
    "csv": _csv,
    "json": _json,
}
"""Name -> several tables as one text."""

SUFFIXES = {"text": "txt", "markdown": "md", "latex": "tex"}


def write_tables(
    folder: Path, name: str, tables: Sequence[Table], for_programs: Sequence[Table] = ()
) -> list[Path]:
    """Write tables as one file of each format, and each as a CSV and a Parquet file of its own.

    Args:
        folder: made if need be.
        name: with which all files begin.
        tables: for people and programs.
        for_programs: too long for people; in JSON, CSV and Parquet only.
    """
    import pandas as pd

    folder.mkdir(parents=True, exist_ok=True)
    every = [*tables, *for_programs]
    contents = {f"{name}.{suffix}": FORMATS[form](tables).encode() for form, suffix in SUFFIXES.items()}
    contents[f"{name}.json"] = FORMATS["json"](every).encode()
    for table in every:
        contents[f"{name}-{table.name}.csv"] = table.csv().encode()
        contents[f"{name}-{table.name}.parquet"] = pd.DataFrame(table.rows).to_parquet(index=False)
    for file_name, content in contents.items():
        with write_whole(folder / file_name) as file:
            file.write(content)
    return [folder / file_name for file_name in contents]
