"""Of settings that were tried, which is the best of each method, and which nobody tuned."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from experiments.analysis.methods import Result
from experiments.errors import UserError, nearest
from experiments.runs import FINISHED
from experiments.trials import judged_by

Method = tuple[str, str, str]
"""Task, optimizer, clipping."""
Settings = dict[str, list[Result]]
"""Digest -> runs that differ in their seed alone."""


@dataclass(frozen=True)
class Chosen:
    """Runs, split by what they are for."""

    tried: list[Result]
    """At the seeds that the best was chosen by, each setting a method of its own."""
    tuned: list[Result]
    """The best setting of each method at other seeds, called by optimizer and clipping alone."""
    untuned: list[Result]
    """Settings that were run at other seeds only, as the defaults are; called so too, if that is one."""

    @property
    def tries(self) -> list[int]:
        """How many settings were tried of each method."""
        digests = defaultdict(set)
        for result in self.tried:
            digests[_method(result)].add(result.run.names["digest"])
        return [len(found) for found in digests.values()]


def choose(results: Sequence[Result], seeds: Collection[int], metric: str | None = None) -> Chosen:
    """Choose the best setting of each task, optimizer and clipping.

    Args:
        results: identified; those that did not finish are left out.
        seeds: by which it is chosen: the mean over them counts, and a setting needs a finished run at each.
        metric: that is compared, the task's own if None.

    Raises:
        UserError: there is no setting to choose of, no run has the metric, or the best has no run to report.
    """
    methods: dict[Method, Settings] = defaultdict(lambda: defaultdict(list))
    for result in results:
        if result.summary["status"] in FINISHED:
            methods[_method(result)][result.run.names["digest"]].append(result)
    _check_metric(results, metric)
    several = len({optimizer for _, optimizer, _ in methods}) > 1
    chosen = Chosen([], [], [])
    for (_, optimizer, clipping), settings in methods.items():
        name = f"{optimizer} {clipping}" if several else clipping
        chosen.tuned.extend(replace(result, method=name) for result in _best(name, settings, seeds, metric))
        untuned = [runs for runs in settings.values() if not any(result.seed in seeds for result in runs)]
        for runs in settings.values():
            chosen.tried.extend(result for result in runs if result.seed in seeds)
        for runs in untuned:
            chosen.untuned.extend(
                _untuned(result, name if len(untuned) == 1 else result.method) for result in runs
            )
    if not chosen.tuned:
        listed = ", ".join(map(str, sorted(seeds)))
        raise UserError(f"no setting has finished runs at all of the seeds {listed} to be chosen by")
    return chosen


def _method(result: Result) -> Method:
    return result.task, result.names["optimizer"], result.names["clipping"]


def _check_metric(results: Sequence[Result], metric: str | None) -> None:
    known = {name for result in results for name in result.summary["final"] if name.startswith("val/")}
    if metric is not None and f"val/{metric}" not in known:
        names = sorted(name.removeprefix("val/") for name in known)
        raise UserError(
            f"no run has the metric {metric!r}; these have {', '.join(names)}.{nearest(metric, names)}"
        )


def _best(
    name: str, settings: Mapping[str, list[Result]], seeds: Collection[int], metric: str | None
) -> list[Result]:
    """Runs of the best setting of a method, at other seeds; none if it was not tuned."""
    scores = {digest: _score(runs, seeds, metric) for digest, runs in settings.items()}
    known = {digest: score for digest, score in scores.items() if score is not None}
    if not known:
        return []
    # Settings that do the same, as a threshold too high to fire does, tie: the one that was reported.
    best = settings[max(known, key=lambda digest: (known[digest], len(settings[digest])))]
    report = [result for result in best if result.seed not in seeds]
    if not report:
        raise UserError(
            f"{best[0].run.path.parent} is the best of {name}, and has runs at no other seeds to report"
        )
    return report


def _untuned(result: Result, name: str) -> Result:
    """One that no choice was made for; its settings say so where they are listed."""
    return replace(result, method=name, details={"untuned": "untuned:", **result.details})


def _score(runs: Sequence[Result], seeds: Collection[int], metric: str | None) -> float | None:
    """Mean of the final metric over these seeds, larger is better; None if a run is missing."""
    values = []
    for result in runs:
        if result.seed in seeds:
            name, higher_is_better = judged_by(result.summary, metric)
            value = math.nan if result.diverged else result.summary["final"].get(f"val/{name}", math.nan)
            values.append((value if higher_is_better else -value) if math.isfinite(value) else -math.inf)
    return sum(values) / len(values) if len(values) == len(seeds) else None
