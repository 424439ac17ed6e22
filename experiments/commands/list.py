"""``clipbench list``. What there is to choose, and what was run."""

from __future__ import annotations

from pathlib import Path

from experiments.errors import UserError, nearest

LIST_HELP = """\
clipbench list GROUP     the options, one line each; GROUP is task, optimizer, clipping, scheduler, preset,
                         logger, experiment or figure
clipbench list runs      runs with status and best metric
"""

GROUPS = ("task", "optimizer", "clipping", "scheduler", "preset", "logger", "experiment", "figure")


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(LIST_HELP, end="")
        return 0 if argv else 2
    what, options = argv[0], argv[1:]
    if what == "runs":
        return _list_runs(options)
    if what not in GROUPS:
        choices = (*GROUPS, "runs")
        raise UserError(f"cannot list {what!r}; choose one of {', '.join(choices)}.{nearest(what, choices)}")
    if options:
        raise UserError(f"clipbench list {what} takes nothing more, got {' '.join(options)}")
    from experiments.training.presets import conf_dir

    folder = conf_dir() / what
    paths = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.yaml")}
    width = max(map(len, paths), default=0)
    for name, path in sorted(paths.items()):
        comments = [line for line in path.read_text().splitlines() if line.startswith("# ")]
        told = [line for line in comments if not line.startswith("# @")]
        print(f"{name:<{width}}  {told[0][2:] if told else ''}")
    return 0


def _list_runs(options: list[str]) -> int:
    import argparse

    from experiments.analysis.tables import format_table, grid, markdown_grid, runs_table, write_grid
    from experiments.runs import FINISHED, find_runs

    parser = argparse.ArgumentParser(prog="clipbench list runs")
    parser.add_argument("--results-dir", default="results", help="where runs/ lies (default: results)")
    parser.add_argument("--experiment", help="only the runs of this one")
    parser.add_argument(
        "--rows", help="a grid of medians over seeds: its rows, as in clipping,clipping.threshold"
    )
    parser.add_argument("--columns", default="optimizer.lr", help="of the grid (default: %(default)s)")
    parser.add_argument("--out", help="folder to write the grid into, as CSV and Markdown")
    args = parser.parse_args(options)
    root = Path(args.results_dir) / "runs"
    found = [run for run in find_runs(root) if args.experiment in (None, run.names["experiment"])]
    if not found:
        print(f"no runs in {root}; 'clipbench run' makes one, --results-dir looks elsewhere")
        return 0
    if args.rows is None:
        print(format_table(runs_table(found)))
        return 0
    finished = [run for run in found if (run.status or {}).get("status") in FINISHED]
    table = grid(finished, args.rows.split(","), args.columns.split(","))
    print(markdown_grid(table))
    if args.out:
        print(*write_grid(Path(args.out), table), sep="\n")
    return 0
