"""What the table of settings tried says of made-up grids."""

import math

import pytest

from experiments.analysis.compare import compare

RATES = (0.01, 0.1, 1.0)


def tuning(runs) -> dict[str, dict]:
    tables = {table.name: table for table in compare(runs).tables}
    return {row["clipping"]: row for row in tables["tuning"].rows}


@pytest.fixture
def grid(make_runs):
    """Return a function: finals by learning rate and threshold, for three seeds each."""

    def make(finals: dict, task: str = "quadratic"):
        runs = []
        for (lr, threshold), final in finals.items():
            settings = {"optimizer.lr": lr, "clipping.threshold": threshold}
            runs += make_runs([final] * 3, task=task, clipping="norm", settings=settings)
        return runs

    return make


def test_one_setting_each_is_no_tuning(make_runs):
    comparison = compare([*make_runs([0.5, 0.6]), *make_runs([0.5, 0.6], clipping="norm")])
    assert "tuning" not in [table.name for table in comparison.tables]


def test_the_best_and_what_fewer_tries_would_give(grid):
    finals = {(0.01, 1.0): 0.4, (0.1, 1.0): 0.1, (1.0, 1.0): math.inf, (0.1, 3.0): 0.3}
    row = tuning(grid(finals))["norm"]
    assert (row["tried"], row["best settings"], row["best"]) == (4, "threshold=1 lr=0.1", 0.1)
    # Training begins with a loss of 2.0, 2.01 or 2.02: what the one that diverged counts as.
    values = [0.1, 0.3, 0.4, 2.01]
    assert row["best of 1"] == pytest.approx(sum(values) / 4)
    weights = [(1 - i / 4) ** 3 - (1 - (i + 1) / 4) ** 3 for i in range(4)]
    assert row["best of 3"] == pytest.approx(sum(w * v for w, v in zip(weights, values, strict=True)))
    assert row["best of 10"] < row["best of 3"]
    assert row["lr sensitivity"] == pytest.approx((0.4 + 0.1 + 2.01) / 3 - 0.1)
    assert row["usable lr decades"] == 0
    assert row["best on the edge of"] is None


def test_a_best_on_the_edge_is_told(grid):
    finals = {(lr, threshold): 0.5 - 0.1 * lr + threshold for lr in RATES for threshold in (0.1, 0.2, 0.3)}
    assert tuning(grid(finals))["norm"]["best on the edge of"] == "threshold, lr"
    inside = {(lr, 1.0): 1 + math.log10(lr / 0.1) ** 2 for lr in RATES}
    assert tuning(grid(inside))["norm"]["best on the edge of"] is None


def test_where_higher_is_better_a_run_that_diverged_counts_as_zero(grid):
    finals = {(0.01, 1.0): 0.59, (0.1, 1.0): 0.6, (1.0, 1.0): math.nan}
    row = tuning(grid(finals, task="cola"))["norm"]
    assert row["best of 1"] == pytest.approx((0.59 + 0.6) / 3)
    assert row["lr sensitivity"] == pytest.approx(0.6 - (0.59 + 0.6) / 3)
    assert row["usable lr decades"] == pytest.approx(1)


def test_all_diverged(grid):
    row = tuning(grid({(0.1, 1.0): math.nan, (1.0, 1.0): math.nan}))["norm"]
    assert row["best"] == math.inf
    assert row["best of 3"] == pytest.approx(2.01)
    assert (row["usable lr decades"], row["best on the edge of"]) == (0, None)
