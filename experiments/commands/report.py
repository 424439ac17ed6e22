"""``clipbench report``. One page on an experiment, to be sent or printed."""

from __future__ import annotations

from pathlib import Path

from experiments.errors import UserError, nearest, writing


def main(argv: list[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser(
        prog="clipbench report",
        description="Write one HTML page, which needs nothing but itself: verdicts, figures, settings, what "
        "failed, and how to make it all again.",
    )
    parser.add_argument("what", nargs="+", metavar="EXPERIMENT|FOLDER", help="names, or folders of runs")
    parser.add_argument("--results-dir", default="results", help="where runs/ lies (default: results)")
    parser.add_argument("--out", help="the page (default: <results-dir>/<experiment>/report.html)")
    args = parser.parse_args(argv)
    results_dir = Path(args.results_dir)
    folders = [_folder(what, results_dir) for what in args.what]

    from experiments.analysis.figures.plan import find_plans
    from experiments.analysis.report import report
    from experiments.runs import find_runs, write_whole
    from experiments.sweeps import find_sweeps
    from experiments.training.presets import conf_dir

    runs = [run for folder in folders for run in find_runs(folder)]
    if not runs:
        raise UserError(f"there are no runs in {' or '.join(map(str, folders))}")
    experiments = {run.names["experiment"]: None for run in runs}
    plans = [
        plan for plan in find_plans(conf_dir() / "figure", []) if set(plan.experiments) <= set(experiments)
    ]
    sweeps = [sweep for experiment in experiments for sweep in find_sweeps(results_dir, experiment)]
    title = ", ".join(experiments)
    page = report(title, runs, plans, sweeps)
    out = Path(args.out) if args.out else results_dir / next(iter(experiments)) / "report.html"
    with writing("--out", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with write_whole(out) as file:
            file.write(page.encode())
    print(out)
    return 0


def _folder(what: str, results_dir: Path) -> Path:
    """The folder of runs that is meant."""
    runs = results_dir / "runs"
    for folder in (runs / what, Path(what)):
        if folder.is_dir():
            return folder
    known = sorted(path.name for path in runs.iterdir() if path.is_dir()) if runs.is_dir() else []
    raise UserError(
        f"{what!r} is no experiment in {runs} and no folder; there is {', '.join(known) or 'no experiment'}."
        f"{nearest(what, known)}"
    )
