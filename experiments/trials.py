"""What the trials of a sweep came to. A trial is one choice of values, tried at one seed or several."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.errors import UserError, nearest
from experiments.runs import Run
from experiments.sweeps import DONE, Job, Sweep


class Result(NamedTuple):
    """What a job came to."""

    metric: str
    value: float
    """Infinite, on the bad side, for a run that diverged."""
    higher_is_better: bool


class Counts(NamedTuple):
    """What of a run makes it good."""

    by: str
    """``final`` for the last evaluation, ``best`` for the best one."""
    metric: str | None
    """A recorded one, of which a loss is better when lower; None is the task's own."""


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
    search = sweep.facts().get("search") or {}
    counts = Counts(search.get("by", "final"), search.get("metric"))
    groups: dict[str, list[Job]] = {}
    for job in sweep.jobs():
        if job.trial is not None:
            groups.setdefault(json.dumps([job.trial, job.until]), []).append(job)
    return [_trial(sweep, jobs, counts) for jobs in groups.values()]


def _trial(sweep: Sweep, jobs: list[Job], counts: Counts) -> Trial:
    told: dict[str, Any] = {"method": "", "phase": "", **jobs[0].trial}
    results = [result_of(sweep, job, counts) for job in jobs]
    return Trial(**told, until=jobs[0].until, jobs=jobs, results=results)


def result_of(sweep: Sweep, job: Job, counts: Counts) -> Result | None:
    """What a job came to.

    Raises:
        UserError: its run has no such metric.
    """
    if sweep.status(job)["status"] not in DONE:
        return None
    run = sweep.run(job)
    summary = run.summary()
    metric, higher_is_better = judged_by(summary, counts.metric)
    step = math.inf if job.until is None else job.until
    if summary["status"] == "diverged" and summary["steps"] <= step:
        value = math.nan
    else:
        value = _value_at(run, step, counts.by, metric, higher_is_better)
    worst = -math.inf if higher_is_better else math.inf
    return Result(metric, value if math.isfinite(value) else worst, higher_is_better)


def judged_by(summary: Mapping[str, Any], metric: str | None) -> tuple[str, bool]:
    """Name of the metric that counts, the task's own if None, and whether more of it is better.

    A loss is better when lower, any other metric as the task's own is.
    """
    name = metric or summary["metric"]
    return name, summary["higher_is_better"] and not name.endswith("loss")


def _value_at(run: Run, step: float, by: str, metric: str, higher_is_better: bool) -> float:
    """By the evaluations up to a step, which the run may have gone beyond."""
    records = run.records()
    if f"val/{metric}" not in records:
        known = [name.removeprefix("val/") for name in records if name.startswith("val/")]
        raise UserError(
            f"{run.path} has no metric {metric!r}; it has {', '.join(known)}.{nearest(metric, known)}"
        )
    values = records.loc[(records["step"] <= step) & records["val/loss"].notna(), f"val/{metric}"]
    if by == "best":
        return float(values.max() if higher_is_better else values.min())
    return float(values.iloc[-1])
