"""``clipbench run -m``: look a sweep up or freeze it, run what is missing, and say what came of it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shlex
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import sweeps
from experiments.errors import UserError
from experiments.runs import FINISHED, Run
from experiments.sweeps import Job, Sweep, find_sweeps
from experiments.training import search as searching
from experiments.training.presets import Presets, added_conf, conf_dir
from experiments.training.sweep import FAILED, Driver, Row, is_open, seconds_for, standing
from experiments.training.tuning import Tuning
from experiments.training.version import code_version
from experiments.trials import trials_of

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from experiments.training.engines import Launcher
    from experiments.training.freeze import Composer
    from experiments.training.samplers import Search
    from experiments.training.sweep_job import Ended
    from experiments.trials import Tuned

# Of the configuration, what is in no run.
NOT_OF_RUNS = ("figure", "hydra", "sweep_job.yaml")


def launch(argv: list[str], flags: list[str], given: dict[str, str]) -> int:
    """Run a sweep.

    Args:
        argv: as typed, for the record.
        flags: what of it is no setting, ``-m`` apart.
        given: the settings.
    """
    own, dry = _flags(flags)
    _check(given)
    force, quiet = _switch(given, "force"), _switch(given, "quiet")
    experiment, conf = given.get("experiment", "adhoc"), _content(own)
    overrides = sorted(filter(sweeps.matters, (f"{key}={value}" for key, value in given.items())))
    digest = sweeps.digest(overrides, conf)
    sweep = Sweep.locate(given.get("results_dir", "results"), experiment, digest)
    composer, search, jobs = None, None, []
    with _explained(presets := Presets(given.get("preset"), given, own), given):
        if not sweep.exists:
            composer = _composer(presets, given, own)
            search, jobs = _frozen(composer)
            if not quiet:
                print(*composer.told, sep="\n")
            results_dir = jobs[0].config["results_dir"]  # which an experiment may set
            sweep = Sweep.locate(results_dir, experiment, digest)
        if sweep.exists:
            check_inputs(sweep)
            _extend(sweep, given)
            jobs, search = sweep.jobs(), searching.load(sweep)
        elif not dry:
            _say_what_stays_behind(sweep, overrides)
            settings = given | {
                "preset": Path(jobs[0].choices["preset"]).name,
                "device": jobs[0].config["device"],
            }
            asked = {"argv": argv, "overrides": overrides, "conf": conf, "settings": settings}
            _create(sweep, composer, jobs, search, config_dir=own, **asked)
        anew = sweeps.DONE + FAILED if force else ()
        missing = [job for job in jobs if is_open(sweep.status(job), anew)]
        if not (missing or dry or searching.more(sweep, search, workers=1)):
            return report(sweep)
        launcher = (composer or _composer(presets, given, own)).launcher
    if dry:
        return _dry_run(sweep, jobs, missing, launcher, search)
    return start(sweep, launcher, anew=anew, quiet=quiet)


def start(sweep: Sweep, launcher: Launcher, *, anew: Collection[str] = (), quiet: bool | None = None) -> int:
    """Run what is missing of a sweep, and say what came of it; returns the exit code.

    Args:
        sweep: with its jobs.
        launcher: of Hydra's.
        anew: jobs that stand in one of these statuses are run again from the beginning.
        quiet: whether jobs print nothing while they train; None for what their configs say.
    """
    from experiments.training.engines import Engine

    def engine(launch: str) -> Engine:
        watched = launch if launcher.watches else None
        task = functools.partial(frozen_job, str(sweep.path.absolute()), watched, launcher.in_process)
        return Engine(launcher, sweep.path, task)

    rows = standing(sweep)
    print(f"{len(rows)} jobs, {sum(row.done for row in rows)} of them done: {sweep.path}", flush=True)
    began = time.monotonic()
    propose = searching.proposing(searching.load(sweep), launcher.at_once, _composer_again)
    driver = Driver(sweep, engine, anew=anew, quiet=quiet, propose=propose)
    try:
        signal = driver.run()
    except OSError as error:
        raise UserError(f"results_dir: cannot write {error.filename}: {error.strerror}") from None
    return report(sweep, driver.ended, signal, time.monotonic() - began)


def frozen_job(folder: str, launch: str | None, in_process: bool, cfg: DictConfig) -> Ended:
    """What Hydra's launchers call, in whatever process they run it.

    Args:
        folder: of the sweep.
        launch: that the job must not outlive; None where it may.
        in_process: whether it runs in the process of the launch.
        cfg: of conf/sweep_job.yaml.
    """
    from experiments.training.sweep_job import Interrupted, run_job

    sweep = Sweep(folder)
    job = sweep.job(cfg.job)
    title = f"job {job.index}  {job.label}"
    if in_process and not cfg.quiet:
        print(title, flush=True)
    ended = run_job(
        sweep,
        launch,
        job,
        force=cfg.force,
        quiet=cfg.quiet,
        afterwards=lambda outcome: _draw(outcome.status, outcome.run),
    )
    if ended.status not in ("elsewhere", "stopped"):
        told = f"{ended.status}: {ended.message}\n{_shown(sweep.run(job).path)}"
        # In one piece, or those of other processes would come between.
        print(told if in_process and not cfg.quiet else f"{title}\n{told}", flush=True)
    if in_process and ended.signal is not None:
        raise Interrupted(ended.signal)
    return ended


def report(
    sweep: Sweep, ended: dict[int, Ended] | None = None, signal: int | None = None, seconds: float = 0.0
) -> int:
    """Say how a sweep stands; returns the exit code.

    Args:
        sweep: with its jobs.
        ended: what a launch has heard of them.
        signal: that has ended the launch.
        seconds: that it took.
    """
    rows = standing(sweep, ended)
    for row in rows:
        _draw(row.status, sweep.run(row.job))  # where a process was killed between the two
    undone = [row for row in rows if not row.done]
    if undone:
        print(table(sweep, undone))
    taken = f" in {duration(seconds)}" if seconds else ""
    print(f"{len(rows)} jobs{taken}: {sweeps.count(row.status for row in rows)}")
    _say_other_code(sweep, rows)
    _publish(sweep, rows, fresh=ended is not None)
    if any(row.status in FAILED for row in undone):
        print(f"clipbench sweep retry --failed {sweep.path} runs again what failed")
    print(sweep.path, flush=True)
    return 128 + signal if signal is not None else 1 if undone else 0


def table(sweep: Sweep, rows: list[Row]) -> str:
    """A line for each job: which it is, how it stands, where its run is."""
    from experiments.analysis.tables import format_table

    return format_table(
        [
            {
                "job": row.job.index,
                "overrides": row.job.label,
                "status": row.status,
                "message": row.message,
                "run": str(sweep.run(row.job).path),
            }
            for row in rows
        ]
    )


def check_inputs(sweep: Sweep) -> None:
    """Raise ``UserError`` if the jobs would read other data than those that are done."""
    if changed := sweep.changed_input():
        raise UserError(
            f"{changed} has changed since {sweep.path} was launched, and the jobs to come would not be "
            "comparable with those that are done: put it back, or begin a new sweep with experiment=NAME"
        )


def duration(seconds: float) -> str:
    """A time for people: ``45 s``, ``12 min``, ``3.2 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def _flags(flags: list[str]) -> tuple[str | None, bool]:
    """The folder of ``--config-dir``, and whether it is a dry run."""
    folder, others = added_conf(flags)
    for flag in others:
        if flag.partition("=")[0] in ("--cfg", "-c"):
            raise UserError("--cfg shows the config of one run: leave out -m")
        if flag != "--dry-run":
            raise UserError(f"a sweep takes --dry-run and --config-dir FOLDER, got {flag!r}")
    return folder, bool(others)


def _check(given: dict[str, str]) -> None:
    if os.environ.get("WORLD_SIZE") and "MASTER_ADDR" in os.environ:
        raise UserError("torchrun starts the processes of one run; a sweep starts those of each: nproc=N")
    if "," in given.get("preset", ""):
        raise UserError(f"one preset a launch, got preset={given['preset']}: presets never share a table")
    if "," in given.get("experiment", ""):
        raise UserError(
            f"one experiment a launch, got experiment={given['experiment']}: each has sweeps of its own"
        )


def _switch(given: dict[str, str], key: str) -> bool | None:
    if key not in given:
        return None
    if given[key].lower() not in ("true", "false"):
        raise UserError(f"{key} must be true or false, got {given[key]!r}")
    return given[key].lower() == "true"


def _content(config_dir: str | None) -> str:
    """Digest of the configuration that runs are made of."""
    total = hashlib.sha256()
    for folder in (conf_dir(), *([] if config_dir is None else [Path(config_dir)])):
        for path in sorted(folder.rglob("*.yaml")):
            name = path.relative_to(folder)
            if name.parts[0] not in NOT_OF_RUNS:
                total.update(f"{name.as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()[:12]


@contextlib.contextmanager
def _explained(presets: Presets, given: dict[str, str]) -> Iterator[None]:
    """What Hydra complains about, in our words."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("hydra", "omegaconf"):
            raise
        from experiments.complaints import explain

        of_job = dict(override.split("=", 1) for override in getattr(error, "overrides", ()))
        raise presets.complaint or explain(error, given | of_job) from None


def _composer(presets: Presets, given: dict[str, str], config_dir: str | None) -> Composer:
    from experiments.training.freeze import Composer

    return Composer(presets, given, config_dir)


def _composer_again(sweep: Sweep) -> Composer:
    """What composes more jobs of a sweep just as its first ones."""
    facts = sweep.facts()
    if _content(facts["config_dir"]) != facts["conf"]:
        raise UserError(
            f"the configuration has changed since {sweep.path} was launched, and the trials to come would "
            "not be comparable with those that are done: put it back, or begin a new sweep by the same "
            f"command, {facts['command']}"
        )
    given = facts["settings"]
    return _composer(Presets(given["preset"], given, facts["config_dir"]), given, facts["config_dir"])


def _frozen(composer: Composer) -> tuple[Search | None, list[Job]]:
    """The search that is asked for, None for every combination, and the jobs that are known at first."""
    if (search := searching.search_of(composer)) is not None:
        asked = search.ask([], composer.launcher.at_once, Path())
        jobs = [job._replace(index=place) for place, job in enumerate(searching.freeze(composer, asked, 0))]
        _check_one(jobs, "task", lambda job: job.choices["task"])
    else:
        jobs = _combinations(composer)
    _check_one(jobs, "experiment", lambda job: job.choices["experiment"])
    _check_one(jobs, "results_dir", lambda job: job.config["results_dir"])
    return search, jobs


def _check_one(jobs: list[Job], what: str, value: Callable[[Job], str]) -> None:
    if len(values := {value(job) for job in jobs}) > 1:
        raise UserError(f"one {what} a launch, got {', '.join(sorted(values))}")


def _combinations(composer: Composer) -> list[Job]:
    """A job for every combination, each run once."""
    grid = composer.grid()
    jobs: dict[str, Job] = {}
    for number, (overrides, label) in enumerate(zip(grid, sweeps.labels(grid), strict=True)):
        job = composer.freeze(overrides, number, label)
        jobs.setdefault(job.run, job._replace(index=len(jobs)))
    if len(jobs) < len(grid):
        composer.told[f"{len(grid) - len(jobs)} jobs are the same run as another and left out"] = None
    return list(jobs.values())


def _extend(sweep: Sweep, given: dict[str, str]) -> None:
    """Ask a sweep for as many trials as are given, where it has fewer."""
    facts, key = sweep.facts(), "n_trials"
    asked = given.get(f"hydra.sweeper.{key}", "")
    if facts["search"] is not None and asked.isdecimal() and int(asked) > facts["search"][key]:
        sweep.rewrite(facts | {"search": facts["search"] | {key: int(asked)}})


def _create(sweep: Sweep, composer: Composer, jobs: list[Job], search: Search | None, **facts: Any) -> None:
    facts["command"] = shlex.join(["clipbench", "run", *facts.pop("argv")])
    facts |= {
        "search": searching.dump(search),
        "cwd": os.getcwd(),
        "code": code_version(),
        "launcher": composer.launcher._asdict(),
        "inputs": sweeps.looks_of(composer.inputs),
    }
    try:
        sweep.create(facts, jobs)
    except OSError as error:
        raise UserError(f"results_dir: cannot write {error.filename}: {error.strerror}") from None


def _say_what_stays_behind(sweep: Sweep, overrides: list[str]) -> None:
    """An unfinished sweep of the same command, which was frozen before the configuration changed."""
    for other in find_sweeps(sweep.results_dir, sweep.experiment):
        if other.facts()["overrides"] == overrides and (rows := standing(other)):
            done = sum(row.done for row in rows)
            if done < len(rows):
                print(
                    f"the configuration has changed since {other.path} was launched, of which {done} of "
                    f"{len(rows)} jobs are done: this is a new sweep; the old one as it was is finished by\n"
                    f"  clipbench sweep resume {other.path}"
                )


def _dry_run(
    sweep: Sweep, jobs: list[Job], missing: list[Job], launcher: Launcher, search: Search | None
) -> int:
    rows = [Row(job, sweep.status(job)["status"], "") for job in jobs]
    print(table(sweep, rows))
    print(f"{len(rows)} jobs: {sweeps.count(row.status for row in rows)}; {len(missing)} of them would run")
    if search is not None:
        print(f"of {search.n_trials} trials; jobs that depend on the results of these come then")
    if not missing:
        return 0
    seconds, known = seconds_for(missing, sweep.results_dir)
    if seconds is None:
        print("how long they take is not known: no run of the same task and preset is finished here")
    else:
        print(
            f"about {duration(seconds / launcher.at_once)}, {launcher.at_once} at a time: by the median "
            f"seconds a step of {known} finished runs of the same task and preset"
        )
    return 0


def _draw(status: str, run: Run) -> None:
    if status in FINISHED and not run.curves_path.exists():
        from experiments.analysis.draw import draw_curves

        draw_curves(run)


def _shown(path: Path) -> Path:
    """A path as a user of this folder would spell it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _publish(sweep: Sweep, rows: list[Row], *, fresh: bool) -> None:
    """Say which trial is the best so far; write what a sweep shows of which all is done, and say where."""
    jobs = [row.job for row in rows] if all(row.done for row in rows) else []
    if (search := searching.load(sweep)) is not None:
        from experiments.analysis.trials import best_lines

        trials = trials_of(sweep)
        tuned = search.outcome(trials) if isinstance(search, Tuning) and jobs else []
        jobs = [job for one in tuned if one.report for job in one.report.jobs]
        print(*best_lines(trials), sep="\n")
        _publish_tuning(sweep, tuned, fresh=fresh)
    if _are_methods(jobs) and (fresh or not sweep.comparison_path.exists()):
        from experiments.analysis.compare import write_comparison
        from experiments.analysis.methods import Mixed

        try:
            write_comparison([sweep.run(job) for job in jobs], sweep.path)
        except UserError as error:
            print(f"not compared: {error}")
            if isinstance(error, Mixed):
                print(f"  clipbench compare {_shown(sweep.path)} --allow-mixed")
    if _are_methods(jobs) and sweep.comparison_path.exists():
        print(f"compared: {_shown(sweep.comparison_path)}")


def _publish_tuning(sweep: Sweep, tuned: list[Tuned], *, fresh: bool) -> None:
    if not tuned:
        return
    if fresh or not sweep.tuning_path.exists():
        from experiments.analysis.tuned import write_tuning

        write_tuning(sweep, tuned)
    for one in tuned:
        for edge in one.edges:
            print(f"clipbench: warning: {one.method} is best where {edge}: a better may lie beyond")
    print(f"tuned: {_shown(sweep.tuning_path)}")


def _are_methods(jobs: list[Job]) -> bool:
    """Whether some of these jobs differ in more than task and seed."""
    parents = {(job.choices["task"], Path(job.run).parent) for job in jobs}
    return len(parents) > len({task for task, _ in parents})


def _say_other_code(sweep: Sweep, rows: list[Row]) -> None:
    now = code_version()
    codes = [sweep.status(row.job).get("code") for row in rows if row.done]
    other = [code for code in codes if code and code != now]
    if other:
        print(
            f"{len(other)} of them were made by code {', '.join(sorted(set(other)))}, this is {now}; "
            "force=true runs them anew"
        )
