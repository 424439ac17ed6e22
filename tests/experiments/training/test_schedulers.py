"""The learning rate that is recorded is that of the formula, at every step, with the settings of the YAML."""

from __future__ import annotations

import math

import pytest

from experiments.runs import find_runs
from experiments.training.presets import conf_dir

STEPS, LR = 60, 0.03
SCHEDULERS = sorted(path.stem for path in (conf_dir() / "scheduler").glob("*.yaml"))


def one_cycle(k: int, n: int) -> float:
    """Cosine from 1/25 to 1 over the first 0.3 n steps, and down to 1/25 of a 10,000th over the others."""
    peak, low, end = 0.3 * n - 1, 1 / 25, 1 / 25e4
    if k <= peak:
        return 1 + (low - 1) / 2 * (1 + math.cos(math.pi * k / peak))
    return end + (1 - end) / 2 * (1 + math.cos(math.pi * (k - peak) / (n - 1 - peak)))


# Factor of the learning rate at step k, from 0, of n after the warm-up.
CLOSED_FORM = {
    "constant": lambda k, n: 1.0,
    "linear": lambda k, n: 1 - k / n,
    "cosine": lambda k, n: (1 + math.cos(math.pi * k / n)) / 2,
    "step": lambda k, n: 0.1 ** (k // math.ceil(n / 3)),
    "polynomial": lambda k, n: (1 - k / n) ** 0.9,
    "one_cycle": one_cycle,
}


@pytest.fixture
def recorded(clipbench):
    """The learning rates of a run on the quadratic, with more settings."""

    def run(*settings: str) -> list[float]:
        assert clipbench("run", "task=quadratic", "quiet=true", f"optimizer.lr={LR}", *settings) == 0
        (run,) = find_runs("results")
        return run.records()["lr"].dropna().tolist()

    return run


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_recorded_lr_is_the_closed_form(name, warmup, recorded):
    n = STEPS - warmup
    start = CLOSED_FORM[name](0, n)
    factors = [start * k / warmup for k in range(warmup)] + [CLOSED_FORM[name](k, n) for k in range(n)]
    found = recorded(f"scheduler={name}", f"max_steps={STEPS}", f"warmup_steps={warmup}")
    assert found == pytest.approx([LR * factor for factor in factors], rel=1e-12, abs=1e-12 * LR)
    assert (len(set(found)) > 2) == (name != "constant" or warmup > 0)


def test_schedules_do_not_drift_from_their_closed_form_in_a_long_run(recorded):
    n = 2000
    found = recorded("scheduler=step", "scheduler.step_size=3", "scheduler.gamma=0.99")
    assert found == pytest.approx([LR * 0.99 ** (k // 3) for k in range(n)], rel=1e-12)


@pytest.mark.parametrize("warmup", [4, 9])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_budget_within_the_warm_up_never_leaves_it(name, warmup, recorded):
    found = recorded(f"scheduler={name}", "max_steps=4", f"warmup_steps={warmup}")
    start = 1 / 25 if name == "one_cycle" else 1.0
    assert found == pytest.approx([LR * start * k / warmup for k in range(4)])
