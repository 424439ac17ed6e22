"""Fair tuning: the same number of trials for every method, at the same seeds, and a report at other seeds."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from experiments.errors import UserError
from experiments.training.samplers import Ask, Search, best_of
from experiments.training.space import Dimension, points
from experiments.trials import Trial, Tuned

SAMPLERS = ("sobol", "grid")
SELECT, REPORT, DEFAULT = "select", "report", "default"
THRESHOLD = "clipping.threshold"


@dataclass(frozen=True)
class Tuning(Search):
    """Trials of each method at ``select_seeds``, then its best and its defaults at ``report_seeds``."""

    sampler: str
    """How trials are chosen, one of ``SAMPLERS``."""
    space: list[Dimension]
    methods: dict[str, list[str]]
    """Clipping -> the settings of the space that it has."""
    select_seeds: list[str]
    report_seeds: list[str]

    @classmethod
    def load(cls, plain: dict[str, Any]) -> Self:
        return cls(**{"metric": None, **plain} | {"space": [Dimension(**one) for one in plain["space"]]})

    def dump(self) -> dict[str, Any]:
        return asdict(self) | {"space": [one._asdict() for one in self.space]}

    def check(self) -> None:
        """Raise ``UserError`` where the tuning would not be fair."""
        if both := sorted(set(self.select_seeds) & set(self.report_seeds), key=int):
            raise UserError(
                f"select_seeds and report_seeds share {', '.join(both)}: what is chosen at a seed is "
                "flattered by it; report at others"
            )
        for one in self.space:
            if one.key == THRESHOLD and not one.has_infinity:
                raise UserError(
                    f"the space of {THRESHOLD} must have infinity, which clips nothing, or a method could "
                    "lose to no clipping for want of trying it: add inf to the choices, or or_inf to the "
                    "tags, tag(log,or_inf,interval(0.1,10))"
                )
        if idle := [method for method, keys in self.methods.items() if not keys]:
            raise UserError(
                f"{', '.join(idle)} has none of the settings of the space, and its trials would all be one: "
                "add optimizer.lr to the space"
            )
        if self.sampler == "grid":
            if interval := next((one.key for one in self.space if not one.choices), None):
                raise UserError(
                    f"sampler=grid takes choices, and {interval} has an interval: use sampler=sobol"
                )
            sizes = {method: len(self._values(method)) for method in self.methods}
            if set(sizes.values()) != {self.n_trials}:
                told = ", ".join(f"{method} {size}" for method, size in sizes.items())
                raise UserError(
                    f"every method must have as many trials, n_trials={self.n_trials}, and the grids have "
                    f"{told}: sampler=sobol gives each the same number"
                )

    def ask(self, trials: list[Trial], workers: int, folder: Path) -> list[Ask]:
        known = {(trial.method, trial.phase, trial.number) for trial in trials}
        asked = [
            ask
            for method in self.methods
            if any((method, SELECT, number) not in known for number in range(self.n_trials))
            for number, values in enumerate(self._values(method))
            if (method, SELECT, number) not in known
            for ask in self._jobs(method, SELECT, number, values, self.select_seeds)
        ]
        return asked or self._reports(trials, known)

    def _values(self, method: str) -> list[dict[str, str]]:
        """Of the trials of a method. Methods share the points, as far as they have the settings."""
        keys = self.methods[method]
        if self.sampler == "grid":
            choices = [one.choices for one in self.space if one.key in keys]
            return [dict(zip(keys, values, strict=True)) for values in itertools.product(*choices)]
        chosen = points(self.space, self.n_trials, self.seed)
        return [{key: values[key] for key in keys} for values in chosen]

    def _reports(self, trials: list[Trial], known: set[tuple[str, str, int]]) -> list[Ask]:
        asked = []
        for method in self.methods:
            best = self._best(method, trials)
            for phase, number, values in ((DEFAULT, 0, {}), (REPORT, best.number, best.values)):
                if (method, phase, number) not in known:
                    asked += self._jobs(method, phase, number, values, self.report_seeds)
        return asked

    def _jobs(
        self, method: str, phase: str, number: int, values: dict[str, str], seeds: list[str]
    ) -> list[Ask]:
        return self.jobs(seeds, {"number": number, "values": values, "method": method, "phase": phase})

    def _best(self, method: str, trials: list[Trial]) -> Trial:
        tried = [trial for trial in trials if (trial.method, trial.phase) == (method, SELECT)]
        return next(iter(best_of(tried, 1)), tried[0])

    def outcome(self, trials: list[Trial]) -> list[Tuned]:
        """What came of each method whose best is known."""
        found = []
        for method in self.methods:
            of_method = {(trial.phase, trial.number): trial for trial in trials if trial.method == method}
            default = of_method.get((DEFAULT, 0))
            if default is None:
                continue
            tried = [trial for (phase, _), trial in of_method.items() if phase == SELECT]
            best = self._best(method, trials)
            there = [one for one in self.space if one.key in best.values]
            edges = [edge for one in there if (edge := one.edge(best.values[one.key]))]
            found.append(Tuned(method, tried, best, edges, of_method.get((REPORT, best.number)), default))
        return found
