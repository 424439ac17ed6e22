"""What the runs of one method on one task came to, seed by seed."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from experiments.analysis.methods import Result, Unfinished, natural
from experiments.analysis.stats import TimeToTarget, time_to_target, to_scores
from experiments.errors import UserError, nearest
from experiments.runs import load_records
from experiments.trials import judged_by

if TYPE_CHECKING:
    import pandas as pd


class Entry:
    """The runs of one method on one task, by seed.

    Args:
        results: of one method on one task.
        records: of each of them: step, epoch, losses and metrics.
        metric: that is compared.
        higher_is_better: whether it is.
        failed: how many more runs ended without a result.
    """

    def __init__(
        self,
        results: list[Result],
        records: list[pd.DataFrame],
        metric: str,
        higher_is_better: bool,
        failed: int = 0,
    ) -> None:
        self.results = results
        self.records = records
        self.metric = metric
        self.higher_is_better = higher_is_better
        self.failed = failed
        self.task = results[0].task
        self.method = results[0].method
        self.names = results[0].names
        self.details = results[0].details
        self.settings = results[0].settings
        self.seeds = [result.seed for result in results]
        self.worst = -math.inf if higher_is_better else math.inf

    @property
    def diverged(self) -> int:
        """How many of the runs did."""
        return sum(result.diverged for result in self.results)

    @cached_property
    def final(self) -> np.ndarray:
        """Metric of the last evaluation by seed; of a run that diverged the worst there is."""
        name = f"val/{self.metric}"
        values = [self.worst if r.diverged else r.summary["final"][name] for r in self.results]
        return np.where(np.isfinite(values), values, self.worst)

    @property
    def median(self) -> float:
        """Of ``final``; infinite where half the runs diverged."""
        return float(np.median(self.final))

    @property
    def mean(self) -> float:
        """Of ``final``; infinite where a run diverged."""
        return float(np.mean(self.final))

    @property
    def surroundings(self) -> dict[str, str]:
        """What of ``details`` is no setting of the clipping."""
        return {path: word for path, word in self.details.items() if not path.startswith("clipping.")}

    @cached_property
    def best(self) -> np.ndarray:
        """Metric of the best evaluation by seed, of runs that diverged too."""
        best = np.array([scores.max(initial=-math.inf) for _, scores in self._evaluations])
        return best if self.higher_is_better else -best

    @cached_property
    def at_start(self) -> np.ndarray:
        """The first record of the metric in training, of runs that have one: of a model that knows little."""
        known = [records[f"train/{self.metric}"].dropna() for records in self.records]
        return np.array([values.iloc[0] for values in known if len(values)])

    @cached_property
    def _evaluations(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Steps and scores of each run's evaluations."""
        found = []
        for records in self.records:
            evaluated = records["val/loss"].notna().to_numpy()
            steps, metric = (records[name].to_numpy()[evaluated] for name in ("step", f"val/{self.metric}"))
            found.append((steps, to_scores(metric, self.higher_is_better)))
        return found

    def at(self, seeds: Sequence[int]) -> np.ndarray:
        """The final metric at these seeds."""
        return self.final[[self.seeds.index(seed) for seed in seeds]]

    def steps_to(self, target: float) -> TimeToTarget:
        """Steps until an evaluation is as good as ``target``."""
        steps, reached = self.reach(target)
        return time_to_target(steps, reached, horizon=max(self.budgets))

    def seconds_to(self, target: float) -> TimeToTarget:
        """Seconds of training until then, evaluations apart."""
        steps, reached = self.reach(target)
        horizon = max(self.budgets * self.seconds_per_step)
        # Not censored at each run's own end: a slow run would seem to have been watched for longer.
        return time_to_target(np.where(reached, steps * self.seconds_per_step, horizon), reached, horizon)

    def reach(self, target: float) -> tuple[np.ndarray, np.ndarray]:
        """Step at which each run reached the target, or its budget if it did not; and whether it did.

        One that diverged is known not to reach it within the budget either.
        """
        wanted = to_scores([target], self.higher_is_better)[0]
        steps, reached = [], []
        for (evaluated, scores), budget in zip(self._evaluations, self.budgets, strict=True):
            good = evaluated[scores >= wanted]
            reached.append(len(good) > 0)
            steps.append(good[0] if len(good) else budget)
        return np.array(steps, float), np.array(reached)

    @property
    def budgets(self) -> np.ndarray:
        """Steps that each run may take."""
        return np.array([result.settings["max_steps"] for result in self.results])

    @property
    def seconds_per_step(self) -> np.ndarray:
        """Mean over the steps of each run, evaluations apart."""
        return np.array([r.summary["seconds"] / max(r.summary["steps"], 1) for r in self.results])


def curves(entries: Iterable[Entry]) -> pd.DataFrame:
    """Records of all runs, one below the other, with ``method clipping seed status`` beside them."""
    import pandas as pd

    return pd.concat(
        [
            records.assign(
                method=entry.method,
                clipping=entry.names["clipping"],
                seed=result.seed,
                status=result.summary["status"],
            )
            for entry in entries
            for result, records in zip(entry.results, entry.records, strict=True)
        ],
        ignore_index=True,
    )


def by_task(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Task -> its entries, in their order."""
    tasks: dict[str, list[Entry]] = {}
    for entry in entries:
        tasks.setdefault(entry.task, []).append(entry)
    return tasks


def floor(entries: Sequence[Entry]) -> float:
    """Metric of a model that learned nothing: 0, or where lower is better what training began with.

    NaN if the metric is not recorded in training.
    """
    if entries[0].higher_is_better:
        return 0.0
    at_start = np.concatenate([entry.at_start for entry in entries])
    return float(np.median(at_start)) if len(at_start) else math.nan


def load_entries(
    results: Sequence[Result], metric: str | None, unfinished: Iterable[Unfinished] = ()
) -> list[Entry]:
    """Read what the runs recorded, and put it together by task and method.

    Args:
        results: with their tasks and methods named.
        metric: to compare, the task's own if None. A ``loss`` is better when lower, any other metric as the
            task's own is.
        unfinished: runs beside them; those that failed are counted where other seeds of theirs are.
    """
    failed = Counter(one.run.names["digest"] for one in unfinished if one.failed)
    by_task = defaultdict(list)
    for result in results:
        by_task[result.task].append(result)
    entries = []
    for of_task in by_task.values():
        name, higher = judged_by(of_task[0].summary, metric)
        if metric is not None:
            _check_metric(name, of_task)
        groups = defaultdict(list)
        for result, records in zip(of_task, _records(of_task, name), strict=True):
            groups[result.method].append((result, records))
        for group in groups.values():
            group.sort(key=lambda pair: pair[0].seed)
            of_method, records = map(list, zip(*group, strict=True))
            digests = {result.run.names["digest"] for result in of_method}
            lost = sum(failed[digest] for digest in digests)
            entries.append(Entry(of_method, records, name, higher, lost))
    return sorted(entries, key=lambda entry: (natural(entry.task), natural(entry.method)))


def _check_metric(metric: str, results: Sequence[Result]) -> None:
    known = [
        name.removeprefix("val/")
        for name in max((result.summary["final"] for result in results), key=len)
        if name.startswith("val/")
    ]
    if metric not in known:
        raise UserError(
            f"--metric: {results[0].task} has no {metric!r}; choose one of {', '.join(known)}."
            f"{nearest(metric, known)}"
        )


def _records(results: Sequence[Result], metric: str) -> list[pd.DataFrame]:
    names = ["step", "epoch", "train/loss", f"train/{metric}", "val/loss", f"val/{metric}"]
    columns = list(dict.fromkeys(names))  # the metric may be the loss
    table = load_records([result.run for result in results], columns)
    by_run = dict(list(table.groupby("run")[columns]))
    return [by_run[place] for place in range(len(results))]
