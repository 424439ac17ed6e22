"""Running the jobs of a sweep to their end, whatever dies on the way."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Collection
from datetime import datetime
from pathlib import Path
from signal import SIGKILL
from typing import Any, NamedTuple

from experiments.errors import UserError
from experiments.runs import FINISHED, find_runs
from experiments.sweeps import DONE, MISSING, Job, Sweep
from experiments.training.engines import Engine
from experiments.training.stop import Stop
from experiments.training.sweep_job import Ended, Interrupted

FAILED = ("oom", "error")
"""Statuses that only ``retry --failed`` and ``force=true`` run again."""
MOST_DEATHS = 2
SECONDS_BETWEEN_LOOKS = 0.3

Propose = Callable[[Sweep], list[Job]]
"""Says which jobs come next, given all results so far; none if that was all."""


class Row(NamedTuple):
    """Where a job stands."""

    job: Job
    status: str
    """Of the run; or ``missing``, ``pruned``, or ``refused`` for bad input."""
    message: str

    @property
    def done(self) -> bool:
        """Whether there is a result."""
        return self.status in DONE


def standing(sweep: Sweep, ended: dict[int, Ended] | None = None) -> list[Row]:
    """Where each job of a sweep stands; ``ended`` is what a launch has heard of some."""
    rows = []
    for job in sweep.jobs():
        status, told = sweep.status(job), (ended or {}).get(job.index)
        name, message = status["status"], status.get("message") or ""
        if told is not None and name not in DONE + FAILED:
            name, message = told.status if name == MISSING else name, told.message
        rows.append(Row(job, name, " ".join(message.split())))
    return rows


def is_open(status: dict[str, Any], anew: Collection[str] = ()) -> bool:
    """Whether a job with this status of its run is to be run, without ``anew`` or with it."""
    return status["status"] in anew or status["status"] not in DONE + FAILED


class Driver:
    """Runs what is missing of a sweep.

    A job whose process died is run again when all others are done, and by itself, so that it takes none with
    it; when it dies again it counts as failed.

    Args:
        sweep: with its jobs, or with none yet.
        make_engine: makes what runs them, given the name of the launch.
        anew: jobs that stand in one of these statuses are run again from the beginning.
        quiet: whether jobs print nothing while they train; None for what their configs say.
        propose: asked for more jobs whenever all are done.
    """

    def __init__(
        self,
        sweep: Sweep,
        make_engine: Callable[[str], Engine],
        *,
        anew: Collection[str] = (),
        quiet: bool | None = None,
        propose: Propose = lambda sweep: [],
    ) -> None:
        self._sweep = sweep
        self._make_engine = make_engine
        self._quiet = quiet
        self._propose = propose
        self._jobs = sweep.jobs()
        before = {job.index: sweep.status(job) for job in self._jobs} if anew else {}
        self._anew = {index: status for index, status in before.items() if status["status"] in anew}
        self._deaths: Counter[int] = Counter()
        self.ended: dict[int, Ended] = {}
        """What was heard of jobs that this launch does not run again."""

    def run(self) -> int | None:
        """Run all jobs to their end; the signal that came before that, if one has."""
        with contextlib.ExitStack() as launch:
            engine = self._make_engine(launch.enter_context(self._sweep.launching()))

            def heard() -> None:
                if not engine.launcher.watches:
                    raise Interrupted(stop.signal)
                launch.close()  # which its jobs do not outlive
                # Not print: it may be what was interrupted.
                os.write(2, b"clipbench: stopping; running jobs write a checkpoint, Ctrl-C does not wait\n")

            stop = Stop(None, then=heard)
            try:
                with stop:
                    while stop.signal is None and (batch := self._next(engine, stop)):
                        self._launch(engine, batch, stop)
            except Interrupted as interrupted:
                return interrupted.number
            return stop.signal

    def _next(self, engine: Engine, stop: Stop) -> list[Job]:
        """Jobs to run now; waits for those that other processes run."""
        waits = False
        while stop.signal is None:
            undone = [job for job in self._jobs if job.index not in self.ended and self._is_open(job)]
            free = [job for job in undone if not self._is_elsewhere(job)]
            fresh = [job for job in free if not self._deaths[job.index]]
            if free:
                return fresh[: engine.batch] or free[:1]
            if not undone:
                if not self._add():
                    return []
                continue
            if not waits:
                print(f"waiting for {len(undone)} jobs that other processes run", flush=True)
            waits = True
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return []

    def _add(self) -> list[Job]:
        """More jobs, of this launch or of another that was faster to ask for them."""
        with self._sweep.alone():
            others = self._sweep.jobs()[len(self._jobs) :]
            added = others or self._sweep.append(self._propose(self._sweep))
        self._jobs += added
        return added

    def _is_open(self, job: Job) -> bool:
        status = self._sweep.status(job)
        return is_open(status) or self._anew.get(job.index) == status

    def _is_elsewhere(self, job: Job) -> bool:
        return self._sweep.status(job)["status"] == "running" or self._sweep.is_claimed(job.index)

    def _launch(self, engine: Engine, batch: list[Job], stop: Stop) -> None:
        indices = [job.index for job in batch]
        self._sweep.abandoned(indices)  # by an earlier launch
        before = [self._sweep.status(job) for job in batch]
        try:
            told = engine.launch([self._overrides(engine, job) for job in batch])
        except Exception as error:  # of many classes: a process has died, if any had begun
            if engine.launcher.in_process:
                raise  # none can have
            told = [
                Ended(index, "killed", "its process died", SIGKILL)
                for index in self._sweep.abandoned(indices)
            ]
            nothing = not told and before == [self._sweep.status(job) for job in batch]
            if nothing and stop.signal is None:
                raise UserError(f"hydra/launcher={engine.launcher.name}: {_first_line(error)}") from error
        if stop.signal is None:
            for ended in told:
                self._note(ended)

    def _note(self, ended: Ended) -> None:
        if ended.status in ("elsewhere", "stopped"):
            return
        if ended.status != "killed" or ended.signal is None:
            self.ended[ended.index] = ended
            return
        self._deaths[ended.index] += 1
        if self._deaths[ended.index] == MOST_DEATHS:
            told = f"{ended.message} (so it did {MOST_DEATHS} times)"
            self.ended[ended.index] = ended._replace(message=told)
        else:
            print(
                f"job {ended.index}: {ended.message}; it runs again, by itself, after the others", flush=True
            )

    def _overrides(self, engine: Engine, job: Job) -> list[str]:
        quiet = self._quiet if engine.launcher.in_process else True  # many would write over each other
        return [
            f"job={job.index}",
            f"force={str(self._anew.get(job.index) == self._sweep.status(job)).lower()}",
            f"quiet={'null' if quiet is None else str(quiet).lower()}",
        ]


def seconds_for(jobs: list[Job], results_dir: Path) -> tuple[float | None, int]:
    """How long jobs would take one after the other, and from how many finished runs that is known.

    It is the median seconds of a step of the same task and preset; None where there is no such run.
    """
    import statistics

    known: dict[tuple[str, str], list[float]] = {}
    for run in find_runs(results_dir / "runs"):
        status = run.status or {}
        if status.get("status") in FINISHED and "resumed" not in status and (steps := run.last_step()):
            began, ended = (datetime.fromisoformat(status[name]) for name in ("started", "finished"))
            kind = run.names["task"], run.names["preset"]
            known.setdefault(kind, []).append((ended - began).total_seconds() / steps)
    wanted = {(job.choices["task"], Path(job.choices["preset"]).name) for job in jobs}
    if not wanted <= set(known):
        return None, 0
    seconds = [
        statistics.median(known[job.choices["task"], Path(job.choices["preset"]).name])
        * (job.until or job.config["max_steps"])
        for job in jobs
    ]
    return sum(seconds), sum(len(known[kind]) for kind in wanted)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
