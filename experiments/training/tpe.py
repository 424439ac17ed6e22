"""Optuna's sampler. Its study lies in the sweep's folder, for Optuna's own tools too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState, create_trial

from experiments.training.space import Dimension
from experiments.trials import Trial

STUDY = "sweep"


def tell(trials: list[Trial], dimensions: list[Dimension], folder: Path) -> list[FrozenTrial]:
    """Put into the study what came of trials, each once; return all that is in it.

    One that diverged is as bad as can be, one with a job that failed is known as failed.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=f"sqlite:///{folder.absolute() / 'study.db'}",
        study_name=STUDY,
        load_if_exists=True,
        direction="maximize",
    )
    distributions = {one.key: _distribution(one) for one in dimensions}
    for trial in trials[len(study.get_trials(deepcopy=False)) :]:
        failed = trial.mean is None
        study.add_trial(
            create_trial(
                params={one.key: _param(one, trial.values[one.key]) for one in dimensions},
                distributions=distributions,
                value=None if failed else trial.score,
                state=TrialState.FAIL if failed else TrialState.COMPLETE,
            )
        )
    return study.get_trials()


def ask(
    told: list[FrozenTrial],
    dimensions: list[Dimension],
    count: int,
    seed: tuple[int, int],
    startup_trials: int,
) -> list[dict[str, str]]:
    """Choose the values of the next trials.

    Args:
        told: the trials before them.
        dimensions: to choose from.
        count: of the next trials, which will run at the same time.
        seed: of what is drawn.
        startup_trials: so many, of all, are drawn at random.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # A study does not keep the state of its sampler: a new one each time, or a sweep would not resume as it
    # would have gone on. What is asked for is kept in the sweep's list of jobs; the study learns of results.
    sampler = optuna.samplers.TPESampler(
        seed=int(np.random.SeedSequence(seed).generate_state(1)[0]),
        n_startup_trials=startup_trials,
        constant_liar=count > 1,
    )
    study = optuna.create_study(sampler=sampler, direction="maximize")
    study.add_trials(told)
    distributions = {one.key: _distribution(one) for one in dimensions}
    asked = [study.ask(distributions).params for _ in range(count)]
    return [{one.key: _text(one, params[one.key]) for one in dimensions} for params in asked]


def _distribution(one: Dimension) -> BaseDistribution:
    if one.choices:
        return CategoricalDistribution(one.choices)
    kind = IntDistribution if one.integer else FloatDistribution
    return kind(one.low, one.high, log=one.log)


def _param(one: Dimension, text: str) -> str | int | float:
    return text if one.choices else int(text) if one.integer else float(text)


def _text(one: Dimension, param: str | float) -> str:
    return param if one.choices else one.text(param)
