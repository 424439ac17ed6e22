"""The best setting of each method is chosen at some seeds and compared at others."""

import math

import pytest

from experiments.analysis.chosen import choose
from experiments.analysis.compare import compare
from experiments.analysis.figures.base import ended
from experiments.analysis.figures.plan import Plan, read_plan
from experiments.analysis.figures.three_panels import ThreePanels
from experiments.analysis.methods import finished, identify
from experiments.analysis.publish import make, runs_of
from experiments.errors import UserError

SELECT, REPORT = (0, 1), (7, 8, 9)


@pytest.fixture
def tuned(make_run):
    """Two settings and the defaults of two methods with SGD, one setting of no clipping with Adam.

    Of norm lr=0.2 is the best where it is chosen, and not at the seeds of the report.
    """

    def setting(lr, select, report, **options):
        for seed, final in zip((*SELECT, *REPORT), (*select, *report), strict=False):
            status = "ok" if math.isfinite(final) else "diverged"
            make_run(final, seed=seed, status=status, settings={"optimizer.lr": lr}, **options)

    def untuned(report, **options):
        for seed, final in zip(REPORT, report, strict=True):
            make_run(final, seed=seed, **options)

    setting(0.2, (0.4, 0.4), (0.3, 0.31, 0.32))
    setting(0.3, (0.3, 0.3), ())
    untuned((0.2, 0.2, 0.2))
    setting(0.2, (0.5, 0.7), (0.55, 0.56, 0.57), clipping="norm")
    setting(0.3, (0.9, math.nan), (0.9, 0.9, 0.9), clipping="norm")
    untuned((0.1, 0.1, 0.1), clipping="norm")
    setting(0.001, (0.6, 0.6), (0.6, 0.61, 0.62), optimizer="adam")


@pytest.fixture
def results(tuned, tmp_path):
    results, _ = finished(runs_of_all(tmp_path))
    identify(results, allow_mixed=False)
    return results


def runs_of_all(folder):
    from experiments.runs import find_runs

    return find_runs(folder / "runs")


def rows(comparison, name):
    (table,) = (table for table in comparison.tables if table.name == name)
    return table.rows


def test_the_best_at_some_seeds_is_reported_at_others(results):
    chosen = choose(results, SELECT)
    tuned = {(r.method, r.settings["optimizer.lr"], r.seed) for r in chosen.tuned}
    settings = {("sgd no_clip", 0.2), ("sgd norm", 0.2), ("adam no_clip", 0.001)}
    assert tuned == {(*setting, seed) for setting in settings for seed in REPORT}
    untuned = {(r.method, r.settings["optimizer.lr"], r.seed) for r in chosen.untuned}
    assert untuned == {(name, 0.1, seed) for name in ("sgd no_clip", "sgd norm") for seed in REPORT}
    assert {r.seed for r in chosen.tried} == set(SELECT)
    assert len(chosen.tried) == 2 * 5


def test_by_another_metric(results):
    norm = [result for result in results if result.names["clipping"] == "norm" and result.seed in (0, 7)]
    for result in norm:
        result.summary["final"]["val/loss"] = 0.1 if result.settings["optimizer.lr"] == 0.2 else 0.5
    for metric, best in ((None, 0.3), ("mcc", 0.3), ("loss", 0.2)):
        assert {result.settings["optimizer.lr"] for result in choose(norm, [0], metric).tuned} == {best}


def test_compared(tuned, tmp_path):
    comparison = compare(runs_of_all(tmp_path), tuned_at=SELECT, reference="sgd no_clip")
    told = {row["method"]: row for row in rows(comparison, "tasks")}
    assert {method: row["seeds"] for method, row in told.items()} == dict.fromkeys(
        ("sgd no_clip", "sgd norm", "adam no_clip"), 3
    )
    assert told["sgd norm"]["difference"] == pytest.approx(0.25)
    assert told["adam no_clip"]["difference"] == pytest.approx(0.3)
    untuned = {row["method"]: row for row in rows(comparison, "untuned")}
    assert untuned["sgd norm"]["difference"] == pytest.approx(-0.1)
    settings = {(row["method"], row["settings"]) for row in rows(comparison, "raw")}
    assert ("sgd norm", "lr=0.2") in settings
    assert ("sgd norm", "untuned: lr=0.1") in settings
    (norm,) = (row for row in rows(comparison, "tuning") if row["clipping"] == "norm")
    assert (norm["tried"], norm["best settings"]) == (2, "lr=0.2")
    assert {row["seed"] for row in comparison.runs.rows} == {*SELECT, *REPORT}


def test_failed_runs_count_where_they_are_reported(tuned, make_run, tmp_path):
    for seed, lr in ((10, 0.2), (1, 0.3), (11, 0.1)):
        settings = {"optimizer.lr": lr}
        make_run(0.5, seed=seed, status="oom", clipping="norm", settings=settings, experiment="again")
    comparison = compare(runs_of_all(tmp_path), tuned_at=SELECT, reference="sgd no_clip")
    for name in ("tasks", "untuned"):
        failed = {row["method"]: row["failed"] for row in rows(comparison, name)}
        assert failed == {method: int(method == "sgd norm") for method in failed}
    assert not any("all runs failed" in note for note in comparison.tables[0].notes)


def test_the_table_of_trials_names_the_setting_that_is_reported(make_run, tmp_path):
    """By the mean, though the median of the other is larger."""
    for lr, finals in ((0.2, (0.5, 0.5, 0.5)), (0.3, (0.6, 0.6, 0.0))):
        for seed, final in enumerate((*finals, 0.5, 0.5)):
            make_run(final, seed=seed, settings={"optimizer.lr": lr})
    comparison = compare(runs_of_all(tmp_path), tuned_at=(0, 1, 2))
    (tried,), (raw,) = rows(comparison, "tuning"), rows(comparison, "raw")
    assert (tried["best settings"], raw["settings"]) == ("lr=0.2", "lr=0.2")


def test_what_nobody_tuned_is_not_thrown_together(make_run, tuned, tmp_path):
    for seed in REPORT:
        make_run(0.9, seed=seed, settings={"optimizer.lr": 0.7}, clipping="norm")
    untuned = {row["method"]: row for row in rows(compare(runs_of_all(tmp_path), tuned_at=SELECT), "untuned")}
    assert {name: row["mean"] for name, row in untuned.items() if "norm" in name} == {
        "sgd norm lr=0.1": pytest.approx(0.1),
        "sgd norm lr=0.7": pytest.approx(0.9),
    }


def test_a_default_that_was_a_trial_as_well(make_run, tmp_path):
    """The reference has no untuned setting of its own then."""
    for clipping, seeds in (("no_clip", (*SELECT, *REPORT)), ("norm", REPORT)):
        for seed in seeds:
            make_run(0.5 + 0.01 * seed, seed=seed, clipping=clipping)
    for seed in (*SELECT, *REPORT):
        make_run(0.6, seed=seed, clipping="norm", settings={"optimizer.lr": 0.2})
    comparison = compare(runs_of_all(tmp_path), tuned_at=SELECT, reference="no_clip")
    assert {row["method"] for row in rows(comparison, "tasks")} == {"no_clip", "norm"}
    (untuned,) = rows(comparison, "untuned")
    assert (untuned["method"], untuned["verdict"]) == ("norm", None)


def test_seeds_to_compare_are_beside_those_to_choose_by(tuned, tmp_path):
    comparison = compare(runs_of_all(tmp_path), tuned_at=SELECT, seeds={8, 9}, reference="sgd no_clip")
    assert {row["seeds"] for row in rows(comparison, "tasks")} == {2}


def test_drawn(tuned, tmp_path):
    path = tmp_path / "figure.yaml"
    path.write_text(
        "experiment: made\ntuned:\n  seeds: [0, 1]\nfigure:\n"
        f"  _target_: {ThreePanels.__module__}.ThreePanels\n  title: tuned\n  lines: [optimizer, clipping]\n"
    )
    plan = read_plan(path)
    made = make(plan, *ended(runs_of(plan, tmp_path)))
    assert len(made.runs) == 9 + 2 * 5  # with those that they were chosen of
    assert "3 seeds each; each the best of 1 to 2 settings tried at seeds 0, 1; 9 runs" in made.caption
    assert b"sgd norm" in made.csv
    assert plan.drawn_as["tuned"] == {"seeds": [0, 1]}


@pytest.mark.parametrize(
    "tuned", ["[0, 1]", "{seeds: 0}", "{seeds: []}", "{seeds: [a]}", "{at: [0]}", "{seeds: [0], metric: [x]}"]
)
def test_a_figure_whose_choice_makes_no_sense(tmp_path, tuned):
    path = tmp_path / "figure.yaml"
    path.write_text(f"experiment: made\ntuned: {tuned}\nfigure: {{_target_: x}}\n")
    with pytest.raises(UserError, match="tuned takes seeds, a list of them, and a metric's name, got"):
        read_plan(path)


def test_a_figure_of_unlike_budgets_is_refused(make_run, tmp_path):
    for clipping, steps in (("no_clip", 40), ("norm", 80)):
        for seed in (*SELECT, *REPORT):
            make_run(0.5, seed=seed, clipping=clipping, settings={"max_steps": steps})
    kind = ThreePanels(title="tuned")
    plan = Plan("tuned", "made", {}, {"seeds": [0, 1]}, {}, (), "", kind)
    with pytest.raises(UserError, match="these runs differ in their max_steps"):
        make(plan, *ended(runs_of(plan, tmp_path)))


def test_a_setting_with_a_failed_run_is_not_chosen(results):
    best = [result for result in results if result.settings["optimizer.lr"] == 0.2]
    for result in best:
        if result.seed == 1 and result.names["clipping"] == "norm":
            result.summary["status"] = "error"
    assert "sgd norm" not in {result.method for result in choose(best, SELECT).tuned}


def test_refused(results):
    with pytest.raises(
        UserError, match=r"no run has the metric 'mc'; these have loss, mcc\. Did you mean 'mcc'"
    ):
        choose(results, SELECT, "mc")
    with pytest.raises(UserError, match="no setting has finished runs at all of the seeds 0, 1, 2 to be"):
        choose(results, (0, 1, 2))
    with pytest.raises(UserError, match="is the best of no_clip, and has runs at no other seeds to report"):
        choose([r for r in results if r.seed in SELECT and r.names["optimizer"] == "sgd"], SELECT)
