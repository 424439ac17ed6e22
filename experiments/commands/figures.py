"""``clipbench figures``. Every figure of conf/figure from the run folders, or made and held to them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.errors import UserError, complain

if TYPE_CHECKING:
    from experiments.analysis.figures.plan import Plan

DESCRIPTION = """\
Draw the figures of conf/figure from finished runs: <out>/<experiment>/<figure>.png and .pdf, with all that is
drawn as .csv, and as .json which runs, versions and settings it was made of.
"""


def main(argv: list[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser(prog="clipbench figures", description=DESCRIPTION)
    parser.add_argument("name", nargs="*", help="figures; default: all of which there are runs")
    parser.add_argument("--results-dir", default="results", help="where runs/ lies (default: results)")
    parser.add_argument("--out", default="results", help="where figures go (default: results)")
    parser.add_argument("--run", action="store_true", help="make the runs that are missing first")
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit code 1 if a figure is missing or is not what its CSV gives",
    )
    parser.add_argument("--runs", action="store_true", help="with --check: or not what the runs give")
    args = parser.parse_args(argv)
    if args.runs and not args.check:
        raise UserError("--runs goes with --check; --run makes runs")
    if args.run and args.check:
        raise UserError("--check writes nothing: leave out --run")

    from experiments.analysis.figures.plan import find_plans
    from experiments.training.presets import conf_dir

    plans = find_plans(conf_dir() / "figure", args.name)
    results_dir, out = Path(args.results_dir), Path(args.out)
    if args.check:
        return _check(plans, out, results_dir if args.runs else None)
    code = _run(plans, results_dir) if args.run else 0
    return max(code, _draw(plans, results_dir, out, named=bool(args.name)))


def _run(plans: list[Plan], results_dir: Path) -> int:
    from experiments.commands import run

    sweeps = dict.fromkeys(sweep for plan in plans for sweep in plan.sweeps)
    codes = []
    for number, sweep in enumerate(sweeps, start=1):
        print(f"[{number}/{len(sweeps)}] clipbench run -m {sweep}", flush=True)
        codes.append(run.main(["-m", *shlex.split(sweep), f"results_dir={results_dir}"]))
    return max(codes, default=0)


def _draw(plans: list[Plan], results_dir: Path, out: Path, *, named: bool) -> int:
    from experiments.analysis.figures.base import ended
    from experiments.analysis.publish import Published, make, runs_of

    code = 0
    for plan in plans:
        runs = runs_of(plan, results_dir)
        if not named and not runs:
            print(
                f"{plan.name}: no runs of {plan.experiment}; clipbench figures {plan.name} --run makes them"
            )
            continue
        try:
            made = make(plan, *ended(runs))
        except UserError as error:  # the others can still be drawn
            code = complain(UserError(f"{plan.name}: {error}"))
            continue
        published = Published(plan, out)
        published.write(made)
        print(f"{plan.name}: {len(made.runs)} runs, {published.paths['png']}", flush=True)
        for line in made.unfinished:
            print(f"  not drawn: {line}")
    return code


def _check(plans: list[Plan], out: Path, results_dir: Path | None) -> int:
    from experiments.analysis.publish import Published

    failed = 0
    for plan in plans:
        found = Published(plan, out).check(results_dir)
        for problem in found.problems:
            print(f"{plan.name}: FAILED: {problem}")
        failed += bool(found.problems)
        if not found.problems:
            held = f"data ok, {', '.join(found.notes)}" if found.notes else "ok"
            print(f"{plan.name}: {held}", flush=True)
    return int(failed > 0)
