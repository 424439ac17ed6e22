"""Of settings that were tried, which is the best of each method, and which nobody tuned."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from experiments.analysis.methods import Result
from experiments.errors import UserError
from experiments.trials import judged_by

Method = tuple[str, str, str]
UNTUNED = "untuned:"


@dataclass(frozen=True)
class Chosen:
    """Runs, split by what they are for; methods are called by optimizer and clipping alone."""

    tried: list[Result]
    """At the seeds that the best was chosen by, each setting a method of its own."""
    tuned: list[Result]
    """The best setting of each method, at other seeds."""
    untuned: list[Result]
    """Settings that were run at other seeds only, as the defaults are."""


def choose(results: Sequence[Result], seeds: Collection[int], metric: str | None = None) -> Chosen:
    """Choose the best setting of each task, optimizer and clipping.

    Args:
        results: identified.
        seeds: by which it is chosen: the mean over them counts, and a setting needs a run at each.
        metric: that is compared, the task's own if None.

    Raises:
        UserError: there is no setting to choose of, or the best has no run at another seed.
    """
    methods: dict[Method, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        method = (result.task, result.names["optimizer"], result.names["clipping"])
        methods[method][result.run.names["digest"]].append(result)
    several = len({optimizer for _, optimizer, _ in methods}) > 1
    chosen = Chosen([], [], [])
    for (_, optimizer, clipping), settings in methods.items():
        name = f"{optimizer} {clipping}" if several else clipping
        scores = {
            digest: score
            for digest, runs in settings.items()
            if (score := _score(runs, seeds, metric)) is not None
        }
        if scores:
            best = max(scores, key=lambda digest: (scores[digest], len(settings[digest])))
            tuned = [result for result in settings[best] if result.seed not in seeds]
            if not tuned:
                path = settings[best][0].run.path.parent
                raise UserError(f"{path} is the best of {name}, and has runs at no other seeds to report")
            chosen.tuned.extend(replace(result, method=name) for result in tuned)
        for runs in settings.values():
            chosen.tried.extend(result for result in runs if result.seed in seeds)
            if not any(result.seed in seeds for result in runs):
                chosen.untuned.extend(_untuned(result, name) for result in runs)
    if not chosen.tuned:
        listed = ", ".join(map(str, sorted(seeds)))
        raise UserError(f"no setting has finished runs at all of the seeds {listed} to be chosen by")
    return chosen


def _untuned(result: Result, name: str) -> Result:
    """One that no choice was made for; its settings say so where they are listed."""
    return replace(result, method=name, details={"untuned": UNTUNED, **result.details})


def _score(runs: Sequence[Result], seeds: Collection[int], metric: str | None) -> float | None:
    """Mean of the final metric over these seeds, larger is better; None if a run is missing."""
    values = []
    for result in runs:
        if result.seed in seeds:
            name, higher_is_better = judged_by(result.summary, metric)
            value = math.nan if result.diverged else result.summary["final"].get(f"val/{name}", math.nan)
            values.append((value if higher_is_better else -value) if math.isfinite(value) else -math.inf)
    return sum(values) / len(values) if len(values) == len(seeds) else None
