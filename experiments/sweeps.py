"""Where a sweep lies on disk: the frozen list of its jobs. No other module names a file of it.

A sweep folder, `results/sweeps/<experiment>/<digest>/`, holds no run; its jobs say where theirs are::

    sweep.json   what was asked for, by whom and when
    jobs.jsonl   a frozen job a line; lines are added, never changed
    .live/       locks of the processes that work on it now
    compare*     when all is done: its methods next to each other, with comparison*, the figures
    best*        of a sweep that tunes; tuning.csv has its trials, and study.db those of Optuna
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from experiments import locks
from experiments.runs import FINISHED, SAMPLED_FILES, STATUSES, Run, write_whole

SCHEMA_VERSION = 1
MISSING = "missing"
"""Stands for the status of a job that was never started."""
PRUNED = "pruned"
"""Stands for the status of a job that has stopped where it was to, before the end of its run."""
DONE = (*FINISHED, PRUNED)
"""Statuses with a result."""

# Settings of the command line that say how to launch a sweep, and not what is in it.
NOT_IDENTITY = (
    "results_dir",
    "force",
    "quiet",
    "hydra/launcher",
    "hydra.mode",
    "hydra.sweeper.max_batch_size",
    "hydra.sweeper.n_trials",  # more of them go on with those that are there
)


class Job(NamedTuple):
    """A run to be, with all that was composed for it."""

    overrides: list[str]
    choices: dict[str, str]
    """Name of the option of each group."""
    config: dict[str, Any]
    """Resolved: nothing is looked up any more."""
    run: str
    """Where the run lies, seen from the folder of results."""
    label: str = ""
    """What tells it from the others, for people."""
    index: int = -1
    """Its place in the list, which `Sweep.append` gives it."""
    trial: dict[str, Any] | None = None
    """What it is tried for, where not every combination is: `number values`, and more."""
    until: int | None = None
    """Step at which it stops for now; None for the end of the run."""


def digest(overrides: Iterable[str], conf: str) -> str:
    """Name what is in a sweep: 12 hex digits.

    Args:
        overrides: `KEY=VALUE` as given on the command line; their order does not matter.
        conf: digest of the configuration that they override.
    """
    text = json.dumps([SCHEMA_VERSION, sorted(filter(matters, overrides)), conf])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def matters(override: str) -> bool:
    """Whether another value makes another sweep."""
    key = override.lstrip("+").split("=")[0]
    return key not in NOT_IDENTITY and not key.startswith("hydra.launcher.")


class Sweep:
    """One sweep folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.comparison_path = self.path / "compare.md"
        self.tuning_path = self.path / "best.md"
        self._facts_path = self.path / "sweep.json"
        self._jobs_path = self.path / "jobs.jsonl"
        self._live_dir = self.path / ".live"

    @classmethod
    def locate(cls, results_dir: str | Path, experiment: str, digest: str) -> Sweep:
        """Say where the sweep with this identity lies; nothing is created."""
        return cls(Path(results_dir, "sweeps", experiment, digest))

    def __repr__(self) -> str:
        return f"Sweep({str(self.path)!r})"

    @property
    def exists(self) -> bool:
        """Whether it was written."""
        return self._facts_path.exists()

    @property
    def experiment(self) -> str:
        """Name of the experiment, as the path says."""
        return self.path.absolute().parent.name

    @property
    def results_dir(self) -> Path:
        """The folder of results that it lies in, and its runs too."""
        return Path(os.path.normpath(self.path / "../../.."))

    def create(self, facts: dict[str, Any], jobs: Iterable[Job]) -> None:
        """Write it, whole or not at all; where another launch was faster, that one's stands."""
        draft = Sweep(self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp"))
        draft.path.mkdir(parents=True)
        try:
            draft.append(jobs)
            created = datetime.now(UTC).isoformat()
            draft.rewrite({**facts, "created": created})
            draft.path.rename(self.path)
        except OSError:
            if not self.exists:
                raise
        finally:
            shutil.rmtree(draft.path, ignore_errors=True)

    def facts(self) -> dict[str, Any]:
        """Return what `create` was given, and when that was."""
        return json.loads(self._facts_path.read_bytes())

    def rewrite(self, facts: dict[str, Any]) -> None:
        """Put these facts in the place of the others."""
        with write_whole(self._facts_path) as file:
            file.write(json.dumps(facts, indent=2).encode() + b"\n")

    def append(self, jobs: Iterable[Job]) -> list[Job]:
        """Add jobs so that SIGKILL leaves whole lines; returns them with their places."""
        with self._jobs_path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            there = file.read()
            file.truncate(there.rfind(b"\n") + 1)  # a kill may have cut off a line
            first = there.count(b"\n")
            added = [job._replace(index=first + place) for place, job in enumerate(jobs)]
            file.write("".join(json.dumps(job._asdict()) + "\n" for job in added).encode())
            file.flush()
            os.fsync(file.fileno())
        return added

    def jobs(self) -> list[Job]:
        """Return all jobs so far."""
        return [Job(**json.loads(line)) for line in self._lines()]

    def job(self, index: int) -> Job:
        """Return one job."""
        return Job(**json.loads(self._lines()[index]))

    def _lines(self) -> list[bytes]:
        return self._jobs_path.read_bytes().split(b"\n")[:-1]

    def run(self, job: Job) -> Run:
        """The run of a job, started or not."""
        return Run(self.results_dir / job.run)

    def status(self, job: Job) -> dict[str, Any]:
        """The status of a job's run; `MISSING` if it never began, `PRUNED` if it stopped as it was to."""
        run = self.run(job)
        status = run.status or {"status": MISSING}
        stopped = job.until is not None and status["status"] in ("killed", "timeout")
        if stopped and run.summary().get("steps", -1) >= job.until:
            return {**status, "status": PRUNED}
        return status

    def changed_input(self) -> str | None:
        """Name an input file that is not what it was when the sweep was written; None if there is none."""
        for path, size, mtime in self.facts()["inputs"]:
            if looks(path) != [path, size, mtime]:
                return path
        return None

    @contextlib.contextmanager
    def launching(self) -> Iterator[str]:
        """Launch its jobs: yields a name that `is_live` until the end of the block, or of the process."""
        name = f"launch-{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
        path = self._live(name)
        with locks.hold(path):
            try:
                yield name
            finally:
                path.unlink(missing_ok=True)

    def is_live(self, launch: str) -> bool:
        """Whether a launch goes on; its jobs should not outlive it."""
        return locks.is_held(self._live(launch))

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Decide what comes next, as no other process does meanwhile."""
        with self._live("next").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def claim(self, index: int) -> Iterator[bool]:
        """Work on a job: yields whether it is nobody else's."""
        path = self._live(f"job-{index}")
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locks.hold(path))
            except BlockingIOError:
                yield False
                return
            held.callback(path.unlink, missing_ok=True)
            yield True

    def is_claimed(self, index: int) -> bool:
        """Whether a process works on this job, or is about to."""
        return locks.is_held(self._live(f"job-{index}"))

    def abandoned(self, indices: Iterable[int]) -> list[int]:
        """Say which of these jobs were claimed by a process that died since this was last asked."""
        found = []
        for index in indices:
            path = self._live(f"job-{index}")
            if path.exists() and not locks.is_held(path):
                path.unlink(missing_ok=True)
                found.append(index)
        return found

    @contextlib.contextmanager
    def device(self, count: int) -> Iterator[int]:
        """Use one of `count` devices: yields the number of the one that the fewest jobs of the sweep use."""
        with contextlib.ExitStack() as held:
            for place in itertools.count():
                with contextlib.suppress(BlockingIOError):
                    held.enter_context(locks.hold(self._live(f"device-{place}")))
                    break
            yield place % count

    def _live(self, name: str) -> Path:
        self._live_dir.mkdir(exist_ok=True)
        return self._live_dir / name


def looks(path: str | Path) -> list[Any]:
    """Path, size and time of a file, which change when it does; None for what is gone."""
    try:
        stat = os.stat(path)
    except OSError:
        return [str(path), None, None]
    return [str(path), stat.st_size, stat.st_mtime_ns]


def looks_of(files: Iterable[Path]) -> list[list[Any]]:
    """How input files look; of very many some, evenly spaced by name."""
    paths = sorted({os.path.abspath(file) for file in files})
    return [looks(path) for path in paths[:: max(1, math.ceil(len(paths) / SAMPLED_FILES))]]


def labels(jobs: list[list[str]]) -> list[str]:
    """Say what tells each job from the others: the overrides that not all share; of a single one, all."""
    common = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()
    return [" ".join(override for override in overrides if override not in common) for overrides in jobs]


def count(names: Iterable[str]) -> str:
    """Count statuses in words: `9 ok, 1 error, 2 missing`."""
    counts = Counter(names)
    order = (*STATUSES[1:3], PRUNED, *STATUSES[3:], STATUSES[0], MISSING)
    return ", ".join(f"{counts[name]} {name}" for name in dict.fromkeys((*order, *counts)) if counts[name])


def find_drafts(results_dir: str | Path) -> list[Path]:
    """Return what processes that died while they wrote a sweep have left."""
    return sorted(Path(results_dir, "sweeps").glob("*/.*.tmp"))


def find_sweeps(results_dir: str | Path, experiment: str = "*") -> list[Sweep]:
    """Return the sweeps in a folder of results, the oldest first."""
    found = [Sweep(path.parent) for path in Path(results_dir, "sweeps").glob(f"{experiment}/*/sweep.json")]
    whole = [sweep for sweep in found if not sweep.path.name.startswith(".")]
    return sorted(whole, key=lambda sweep: sweep.facts()["created"])
