"""``clipbench compare``. Which method is better, how sure that is, and at what cost."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.errors import UserError, nearest, writing

if TYPE_CHECKING:
    from experiments.runs import Run

DESCRIPTION = """\
Compare the methods of finished runs: what was measured, on each task a verdict against a reference on the
same seeds, and all tasks together. Prints tables; --out writes them in all formats, with the curves.

  clipbench compare adhoc                          an experiment, also --experiment adhoc
  clipbench compare results/sweeps/adhoc/b91c6c0   what a sweep has run: the folder that it printed last
  clipbench compare some/runs more/runs --reference norm
"""
FORMATS = ("text", "markdown", "latex", "csv", "json")


def main(argv: list[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser(
        prog="clipbench compare",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", nargs="*", help="run folders, folders of them, sweeps' folders, experiments"
    )
    parser.add_argument("--experiment", help="the runs of this one instead")
    parser.add_argument("--results-dir", default="results", help="where its runs/ lie (default: results)")
    parser.add_argument("--reference", help="method to compare with (default: no_clip of the same optimizer)")
    parser.add_argument("--metric", help="recorded metric to compare (default: each task's own)")
    parser.add_argument(
        "--target",
        help="metric to time, 0.5 or cola=0.5,voc=0.6 (default: the reference's median, on seeds left out by "
        "--seeds if there are any)",
    )
    parser.add_argument("--seeds", help="to compare, as in 0-4,7 (default: all)")
    parser.add_argument(
        "--tuned-at",
        metavar="SEEDS",
        help="choose the best setting of each method at these seeds, and compare it at the others",
    )
    parser.add_argument(
        "--format",
        default="text",
        help=f"{', '.join(FORMATS)} (default: text); csv has several tables below each other, of which --out "
        "writes a file each, and json the runs too",
    )
    parser.add_argument(
        "--out",
        help="folder to write into: each table as CSV and Parquet, all as text, "
        "Markdown, LaTeX and JSON, and the curves",
    )
    parser.add_argument("--tables", action="store_true", help="with --out: tables only")
    parser.add_argument(
        "--allow-mixed",
        action="store_true",
        help="compare runs of different presets, budgets, evaluations, data, code versions or devices",
    )
    args = parser.parse_args(argv)
    if args.format not in FORMATS:
        choices = f"{', '.join(FORMATS)}, got {args.format!r}.{nearest(args.format, FORMATS)}"
        raise UserError(f"--format must be one of {choices}")
    if args.tables and not args.out:
        raise UserError("--tables goes with --out FOLDER")
    targets = None if args.target is None else _targets(args.target)
    seeds = None if args.seeds is None else _seeds("--seeds", args.seeds)
    tuned_at = set() if args.tuned_at is None else _seeds("--tuned-at", args.tuned_at)
    runs = _runs(args.folder, Path(args.results_dir) / "runs", args.experiment)

    from experiments.analysis import tables
    from experiments.analysis.compare import compare, write

    comparison = compare(
        runs,
        reference=args.reference,
        metric=args.metric,
        targets=targets,
        seeds=seeds,
        tuned_at=tuned_at,
        allow_mixed=args.allow_mixed,
    )
    written: list[Path] = []
    if args.out:
        with writing("--out", args.out):
            written = write(comparison, Path(args.out), drawn=not args.tables)
    every = [*comparison.tables, comparison.runs] if args.format == "json" else comparison.tables
    print(tables.FORMATS[args.format](every), end="")
    if written:
        print("", *written, sep="\n")
    return 0


def _runs(folders: list[str], root: Path, experiment: str | None) -> list[Run]:
    """The runs in folders, or of an experiment."""
    from experiments.runs import find_runs

    if folders and experiment:
        raise UserError("give folders or --experiment, not both")
    known = sorted(path.name for path in root.glob("*/"))
    there = f"{root} has {', '.join(known) or 'none'}"
    if folders:
        runs = {}
        for folder in folders:
            found = _runs_in(folder, root)
            if not found:
                raise UserError(
                    f"there are no runs in {folder}, and no experiment of that name: {there}; "
                    f"'clipbench run' makes one.{nearest(folder, known)}"
                )
            runs |= {run.path.resolve(): run for run in found}
        return list(runs.values())
    if experiment is None:
        raise UserError(f"name folders of runs, or an --experiment: {there}")
    if experiment not in known:
        raise UserError(f"there is no --experiment {experiment}: {there}.{nearest(experiment, known)}")
    return find_runs(root / experiment)


def _runs_in(folder: str, root: Path) -> list[Run]:
    """The runs at and below a folder, of a sweep, or of the experiment of this name; else none."""
    from experiments.runs import find_runs
    from experiments.sweeps import Sweep

    sweep = Sweep(folder)
    if sweep.exists:
        return [sweep.run(job) for job in sweep.jobs()]
    return find_runs(folder) or find_runs(root / folder)


def _targets(text: str) -> dict[str | None, float]:
    """``0.5``, for all tasks, or ``cola=0.5,voc=0.6``."""
    targets: dict[str | None, float] = {}
    for part in text.split(","):
        task, _, value = part.rpartition("=")
        try:
            targets[task or None] = float(value)
        except ValueError:
            targets[task or None] = math.nan
        if not math.isfinite(targets[task or None]):
            raise UserError(f"--target must be a number, or TASK=NUMBER,TASK=NUMBER, got {text!r}")
    return targets


def _seeds(option: str, text: str) -> set[int]:
    """``0-4,7``."""
    seeds: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"{option} must be whole numbers and ranges of them, as in 0-4,7, got {text!r}")
        seeds |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return seeds
