"""``clipbench sweep``. What became of a sweep, and what to do about the rest of it."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import sweeps
from experiments.errors import UserError, nearest
from experiments.runs import Run, RunLocked, find_unstarted
from experiments.sweeps import Sweep, find_sweeps

if TYPE_CHECKING:
    from experiments.training.engines import Launcher

SWEEP = "folder of a sweep, or name of an experiment for its newest; default: the newest of all"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="clipbench sweep", description="Work on a sweep that clipbench run -m has launched."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    status = commands.add_parser("status", help="counts, and a line for each job that is not done")
    resume = commands.add_parser("resume", help="run what is missing, as it was frozen")
    retry = commands.add_parser("retry", help="the same, and run again from the beginning what failed")
    retry.add_argument("--failed", action="store_true", required=True, help="jobs that ended in an error")
    prune = commands.add_parser("prune", help="list run folders without a result, which --yes deletes")
    prune.add_argument("--yes", action="store_true", help="delete them")
    for command in (status, resume, retry, prune):
        command.add_argument("sweep", nargs="?", help=SWEEP)
        command.add_argument("--results-dir", default="results", help="where to look (default: results)")
    for command in (resume, retry):
        command.add_argument("--launcher", help="basic, joblib, ...; default: as at first")
        command.add_argument("--jobs", type=int, help="that run at the same time")
    args = parser.parse_args(argv)
    sweep = _find(args.sweep, args.results_dir)
    if args.command == "status":
        return _status(sweep)
    if args.command == "prune":
        return _prune(sweep, args.yes)
    return _go_on(sweep, args.launcher, args.jobs, failed=args.command == "retry")


def _find(asked: str | None, results_dir: str) -> Sweep:
    if asked is not None and Sweep(asked).exists:
        return Sweep(asked)
    found = find_sweeps(results_dir, asked or "*")
    if found:
        return found[-1]
    if asked is None:
        raise UserError(
            f"no sweep in {results_dir}; clipbench run -m launches one, --results-dir looks elsewhere"
        )
    names = sorted({sweep.experiment for sweep in find_sweeps(results_dir)})
    choices = f"those in {results_dir} are {', '.join(names)}" if names else f"{results_dir} has none"
    raise UserError(f"{asked!r} is no sweep and no experiment with one; {choices}.{nearest(asked, names)}")


def _status(sweep: Sweep) -> int:
    from experiments.analysis.trials import trials_text
    from experiments.commands.launch import table
    from experiments.training.sweep import standing
    from experiments.trials import trials_of

    rows = standing(sweep)
    undone = [row for row in rows if not row.done]
    if undone:
        print(table(sweep, undone))
    if trials := trials_of(sweep):
        print(trials_text(trials))
    print(f"{len(rows)} jobs: {sweeps.count(row.status for row in rows)}")
    print(sweep.path)
    return 0


def _go_on(sweep: Sweep, name: str | None, jobs: int | None, *, failed: bool) -> int:
    from experiments.commands.launch import check_inputs, report, start
    from experiments.training.search import load, more
    from experiments.training.sweep import FAILED, is_open

    check_inputs(sweep)
    anew = FAILED if failed else ()
    left = any(is_open(sweep.status(job), anew) for job in sweep.jobs())
    if not (left or more(sweep, load(sweep), workers=1)):
        return report(sweep)
    return start(sweep, _launcher(sweep, name, jobs), anew=anew)


def _launcher(sweep: Sweep, name: str | None, jobs: int | None) -> Launcher:
    from hydra.errors import HydraException

    from experiments.complaints import explain
    from experiments.training.engines import Launcher, launcher_of

    launcher = Launcher(**sweep.facts()["launcher"])
    if name not in (None, launcher.name):
        try:
            launcher = launcher_of(name)
        except HydraException as error:
            raise explain(error, {}) from None
    if jobs is None:
        return launcher
    if jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {jobs}")
    return launcher.limited(jobs)


def _prune(sweep: Sweep, yes: bool) -> int:
    """Run folders of a sweep that hold no result, and what killed processes have left."""
    found: list[tuple[str, Run]] = []
    for job in sweep.jobs():
        status = sweep.status(job)["status"]
        if status not in (*sweeps.DONE, "running", sweeps.MISSING):
            found.append((status, sweep.run(job)))
    found += [("never began", run) for run in find_unstarted(sweep.results_dir / "runs")]
    drafts = sweeps.find_drafts(sweep.results_dir)
    listed = [(what, run.path) for what, run in found] + [("half a sweep", path) for path in drafts]
    for what, path in listed:
        print(f"{what:<12} {path}")
    if not listed:
        print(f"nothing to prune of {sweep.path}")
    elif not yes:
        print(f"{len(listed)} folders; --yes deletes them, checkpoints to go on from included")
    else:
        _delete(found, drafts)
    return 0


def _delete(found: list[tuple[str, Run]], drafts: list[Path]) -> None:
    deleted = 0
    for _, run in found:
        try:
            run.delete()
            deleted += 1
        except RunLocked as error:
            print(f"kept: {error}")
    for path in drafts:
        shutil.rmtree(path)
    print(f"{deleted + len(drafts)} folders deleted")
