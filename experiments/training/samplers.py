"""Which trials come next, given what came of those before: one class for each way to choose.

What is asked for is a function of the search and of the trials so far, and both are in the sweep's folder: a
sweep that was killed asks again for the same.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from experiments.errors import UserError
from experiments.training.space import Dimension, points
from experiments.trials import Trial


class Ask(NamedTuple):
    """A job to be."""

    overrides: list[str]
    """Each with one value."""
    trial: dict[str, Any]
    until: int | None = None

    @property
    def label(self) -> str:
        """What tells it from the others, for people; its seed comes last."""
        names = [self.trial[name] for name in ("phase", "method") if name in self.trial]
        values = [f"{key}={value}" for key, value in self.trial["values"].items()]
        where = [] if self.until is None else [f"to step {self.until}"]
        return " ".join([*names, *values, self.overrides[-1], *where])


@dataclass(frozen=True)
class Search(ABC):
    """What a sweep that chooses was asked for: plain values, which its folder keeps."""

    n_trials: int
    seed: int
    """Of the choices; ``seeds`` are those of the runs."""
    by: str
    """Evaluation that counts: ``final`` or ``best``."""
    metric: str | None
    """What counts of it; None is the task's own metric."""
    fixed: list[str]
    """Overrides of all trials."""

    @classmethod
    def load(cls, plain: dict[str, Any]) -> Self:
        """The search that ``dump`` made these values of."""
        return cls(**{"metric": None, **plain})

    def dump(self) -> dict[str, Any]:
        """Its values."""
        return asdict(self)

    @abstractmethod
    def ask(self, trials: list[Trial], workers: int, folder: Path) -> list[Ask]:
        """What to run next, now that all is done; nothing if that was all.

        Args:
            trials: so far.
            workers: jobs that run at the same time.
            folder: of the sweep, which may not be there yet where there are no trials.
        """

    def jobs(self, seeds: list[str], trial: dict[str, Any], until: int | None = None) -> list[Ask]:
        """A trial at these seeds."""
        method = [f"clipping={trial['method']}"] if "method" in trial else []
        values = [f"{key}={value}" for key, value in trial["values"].items()]
        return [Ask([*self.fixed, *method, *values, f"seed={seed}"], trial, until) for seed in seeds]


@dataclass(frozen=True)
class Sobol(Search):
    """Evenly spread points, all at once."""

    seeds: list[str]
    dimensions: list[Dimension]

    @classmethod
    def load(cls, plain: dict[str, Any]) -> Self:
        return cls(
            **{"metric": None, **plain} | {"dimensions": [Dimension(**one) for one in plain["dimensions"]]}
        )

    def dump(self) -> dict[str, Any]:
        return asdict(self) | {"dimensions": [one._asdict() for one in self.dimensions]}

    def ask(self, trials: list[Trial], workers: int, folder: Path) -> list[Ask]:
        return self.points(len(trials))

    def points(self, first: int, until: int | None = None) -> list[Ask]:
        """The trials from this one on."""
        if first >= self.n_trials:
            return []
        chosen = list(enumerate(points(self.dimensions, self.n_trials, self.seed)))[first:]
        return [
            ask
            for number, values in chosen
            for ask in self.jobs(self.seeds, {"number": number, "values": values}, until)
        ]


@dataclass(frozen=True)
class Halving(Sobol):
    """Evenly spread points, all trained for a while, the best of them for longer, and so on to the end."""

    factor: int
    """Of the trials one in so many goes on."""
    steps: list[int | None]
    """At which they are compared; None, the last, for the end."""

    def ask(self, trials: list[Trial], workers: int, folder: Path) -> list[Ask]:
        there: list[Trial] = []
        for place, step in enumerate(self.steps):
            before, there = there, [trial for trial in trials if trial.until == step]
            if place == 0:
                asked = self.points(len(there), step)
            else:
                wanted = best_of(before, math.ceil(self.n_trials / self.factor**place))
                known = {trial.number for trial in there}
                asked = [
                    ask
                    for trial in wanted
                    if trial.number not in known
                    for ask in self.jobs(self.seeds, {"number": trial.number, "values": trial.values}, step)
                ]
            if asked:
                return asked
        return []


@dataclass(frozen=True)
class Tpe(Sobol):
    """Optuna's tree-structured Parzen estimator, which prefers values near those of good trials."""

    startup_trials: int
    """Drawn at random."""

    def ask(self, trials: list[Trial], workers: int, folder: Path) -> list[Ask]:
        count = min(workers, self.n_trials - len(trials))
        if count <= 0:
            return []
        from experiments.training import tpe

        told = tpe.tell(trials, self.dimensions, folder) if trials else []
        seed = (self.seed, len(trials))
        chosen = tpe.ask(told, self.dimensions, count, seed, self.startup_trials)
        return [
            ask
            for number, values in enumerate(chosen, start=len(trials))
            for ask in self.jobs(self.seeds, {"number": number, "values": values})
        ]


def best_of(trials: list[Trial], count: int) -> list[Trial]:
    """The best trials, those that diverged or failed left out; of equals the earlier ones."""
    ranked = sorted(trials, key=lambda trial: (-trial.score, trial.number))
    return [trial for trial in ranked[:count] if math.isfinite(trial.score)]


def steps_of(rungs: int, factor: int, max_steps: int, eval_every: int) -> list[int | None]:
    """Where trials are compared: after the last step and, each time, one in ``factor`` of the steps before.

    Raises:
        UserError: there are not so many evaluations.
    """
    steps = [round(max_steps / factor**below / eval_every) * eval_every for below in range(rungs - 1, 0, -1)]
    if steps != sorted(set(steps) - {0}) or (steps and steps[-1] >= max_steps):
        raise UserError(
            f"hydra.sweeper.rungs={rungs} with factor={factor} compares trials after {max_steps} // {factor} "
            f"steps and so on, and eval_every={eval_every} of max_steps={max_steps} evaluates too seldom: "
            "fewer rungs, or a smaller eval_every"
        )
    return [*steps, None]
