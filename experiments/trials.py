"""What the trials of a sweep came to. A trial is one choice of values, tried at one seed or several."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

from experiments.runs import Run
from experiments.sweeps import DONE, Job, Sweep


class Result(NamedTuple):
    """What a job came to."""

    metric: str
    value: float
    """Infinite, on the bad side, for a run that diverged."""
    higher_is_better: bool


class Trial(NamedTuple):
    """A choice of values, and how good it was up to some step."""

    number: int
    values: dict[str, str]
    """Setting -> value, as on a command line."""
    method: str
    """The clipping that is tuned; empty where a sweep tunes none."""
    phase: str
    """``select``, ``report`` or ``default`` where methods are tuned."""
    until: int | None
    """Step at which it is compared; None for the end."""
    jobs: list[Job]
    """One for each seed."""
    results: list[Result | None]
    """Of the jobs; None for one that has none, or none yet."""

    @property
    def mean(self) -> float | None:
        """Of the metric over the seeds; None unless all have one."""
        if any(result is None for result in self.results):
            return None
        return sum(result.value for result in self.results) / len(self.results)

    @property
    def score(self) -> float:
        """The mean turned so that larger is better; -inf for what diverged or has failed."""
        if (mean := self.mean) is None:
            return -math.inf
        return mean if self.results[0].higher_is_better else -mean


class Tuned(NamedTuple):
    """What tuning a method came to."""

    method: str
    tried: list[Trial]
    best: Trial
    edges: list[str]
    """What of the best lies on the edge of its space, in words."""
    report: Trial | None
    """The best at other seeds; None if another was the best when that was decided."""
    default: Trial
    """The untuned settings at those seeds."""


def trials_of(sweep: Sweep) -> list[Trial]:
    """The trials of a sweep in their order; those of a sweep of every combination are none."""
    by = (sweep.facts().get("search") or {}).get("by", "final")
    groups: dict[str, list[Job]] = {}
    for job in sweep.jobs():
        if job.trial is not None:
            groups.setdefault(json.dumps([job.trial, job.until]), []).append(job)
    return [_trial(sweep, jobs, by) for jobs in groups.values()]


def _trial(sweep: Sweep, jobs: list[Job], by: str) -> Trial:
    told: dict[str, Any] = {"method": "", "phase": "", **jobs[0].trial}
    return Trial(**told, until=jobs[0].until, jobs=jobs, results=[result_of(sweep, job, by) for job in jobs])


def result_of(sweep: Sweep, job: Job, by: str) -> Result | None:
    """What a job came to by the metric of its last evaluation, or with ``best`` of the best one."""
    if sweep.status(job)["status"] not in DONE:
        return None
    run = sweep.run(job)
    summary = run.summary()
    metric, higher_is_better = summary["metric"], summary["higher_is_better"]
    step = math.inf if job.until is None else job.until
    if summary["status"] == "diverged" and summary["steps"] <= step:
        value = math.nan
    elif summary["steps"] > step:
        value = _value_at(run, step, by, f"val/{metric}", higher_is_better)
    else:
        value = summary["best"].get("value", math.nan) if by == "best" else summary["final"][f"val/{metric}"]
    worst = -math.inf if higher_is_better else math.inf
    return Result(metric, value if math.isfinite(value) else worst, higher_is_better)


def _value_at(run: Run, step: float, by: str, name: str, higher_is_better: bool) -> float:
    """By the evaluations up to a step that the run went beyond."""
    records = run.records()
    values = records.loc[(records["step"] <= step) & records["val/loss"].notna(), name]
    if by == "best":
        return float(values.max() if higher_is_better else values.min())
    return float(values.iloc[-1])
