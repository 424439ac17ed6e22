"""Tuning that is fair by construction, from the experiment's file to the table of the best."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from experiments.sweeps import Sweep, find_sweeps
from experiments.training.presets import conf_dir
from experiments.trials import trials_of

METHODS = "hydra.sweeper.methods=[no_clip,norm,auto_clip]"
SEEDS = ["hydra.sweeper.select_seeds=[0,1]", "hydra.sweeper.report_seeds=[7,8]"]
QUICK = ["run", "experiment=tune_quadratic", "device=cpu", "max_steps=20", "eval_every=10", METHODS, *SEEDS]
TUNE = [*QUICK, "hydra.sweeper.n_trials=2"]


@pytest.fixture(autouse=True)
def _nothing_drawn(monkeypatch):
    monkeypatch.setattr("experiments.analysis.draw.draw_curves", lambda run: None)


@pytest.fixture
def mine(tmp_path):
    """Write an experiment of one's own that searches a space by a grid; returns its settings."""

    def mine(space: str, n_trials: int) -> list[str]:
        folder = tmp_path / "conf/experiment"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "mine.yaml").write_text(
            "# @package _global_\ndefaults:\n  - override /task: quadratic\n"
            "  - override /hydra/sweeper: tuning\n"
            f"hydra:\n  sweeper:\n    space: {space}\n    sampler: grid\n    n_trials: {n_trials}\n"
        )
        return ["run", "-m", "experiment=mine", "--config-dir", "conf", *QUICK[2:]]

    return mine


def the_sweep(root: str = "results") -> Sweep:
    (sweep,) = find_sweeps(root)
    return sweep


def test_every_method_gets_the_same(clipbench, capsys):
    assert clipbench(*TUNE) == 0
    sweep = the_sweep()
    jobs = sweep.jobs()
    spent = {"select": Counter(), "report": Counter(), "default": Counter()}
    seeds = {phase: set() for phase in spent}
    for job in jobs:
        assert job.choices["clipping"] == job.trial["method"]
        spent[job.trial["phase"]][job.trial["method"]] += 1
        seeds[job.trial["phase"]].add(job.config["seed"])
    same = dict.fromkeys(("no_clip", "norm", "auto_clip"), 2)
    assert spent == {"select": {name: 4 for name in same}, "report": same, "default": same}
    assert seeds == {"select": {0, 1}, "report": {7, 8}, "default": {7, 8}}

    # The learning rates are the same too, and each method has what it can set.
    by_method = {
        name: [t for t in trials_of(sweep) if t.method == name and t.phase == "select"] for name in same
    }
    rates = {tuple(trial.values["optimizer.lr"] for trial in trials) for trials in by_method.values()}
    assert len(rates) == 1
    keys = {name: [*trials[0].values] for name, trials in by_method.items()}
    assert keys["no_clip"] == ["optimizer.lr"]
    assert keys["norm"] == ["optimizer.lr", "clipping.threshold"]
    assert keys["auto_clip"] == ["optimizer.lr", "clipping.percentile"]

    # The best of each was reported, and its defaults are the preset's.
    for name, trials in by_method.items():
        best = min(trials, key=lambda trial: trial.mean)
        (report,) = [t for t in trials_of(sweep) if t.method == name and t.phase == "report"]
        assert report.values == best.values
        (default,) = [t for t in trials_of(sweep) if t.method == name and t.phase == "default"]
        assert {job.config["optimizer"]["lr"] for job in default.jobs} == {0.03}

    best = pd.read_csv(sweep.path / "best.csv").set_index("method")
    for trial in trials_of(sweep):
        column = {"report": "tuned", "default": "default"}.get(trial.phase)
        if column is not None:
            assert best.loc[trial.method, column] == pytest.approx(trial.mean, rel=1e-12)
    every = pd.read_csv(sweep.path / "tuning.csv")
    assert len(every) == 3 * (2 + 2)
    curves = pd.read_csv(sweep.path / "best_of_k.csv")
    norm = curves[(curves["line"] == "norm") & (curves["kind"] == "best of")].set_index("k")["value"]
    means = sorted(trial.mean for trial in by_method["norm"])
    assert norm[1] == pytest.approx(sum(means) / 2)
    assert norm[2] == pytest.approx((3 * means[0] + means[1]) / 4)
    assert (sweep.path / "best_of_k.png").stat().st_size > 10_000
    assert "| norm |" in (sweep.path / "best.md").read_text()
    assert (sweep.path / "comparison.png").exists()
    assert f"tuned: {sweep.path / 'best.md'}" in capsys.readouterr().out


def test_another_metric_may_decide(clipbench, monkeypatch, tmp_path, capsys):
    """The regression is judged by its distance; by the evaluated loss another learning rate is the best."""
    for module in ("tuned.write_tuning", "compare.write_comparison"):
        monkeypatch.setattr(f"experiments.analysis.{module}", lambda *given: None)
    of_regression = [*QUICK[2:], "hydra.sweeper.n_trials=2", "hydra.sweeper.methods=[norm]"]
    argv = ["run", "-m", "experiment=regression", *of_regression]
    for metric in ("distance", "loss"):
        assert clipbench(*argv, f"hydra.sweeper.metric={metric}", f"results_dir={metric}") == 0
        trials = [trial for trial in trials_of(the_sweep(metric)) if trial.phase == "select"]
        for trial in trials:
            finals = [the_sweep(metric).run(job).summary()["final"][f"val/{metric}"] for job in trial.jobs]
            assert trial.mean == pytest.approx(sum(finals) / 2)
            assert trial.results[0].metric == metric
    capsys.readouterr()
    assert clipbench(*argv, "hydra.sweeper.metric=los", "results_dir=misspelt") == 2
    assert "has no metric 'los'; it has" in capsys.readouterr().err
    assert clipbench(*argv, "hydra.sweeper.metric=3", "results_dir=number") == 2
    assert "hydra.sweeper.metric must be the name of a metric, or null, got 3" in capsys.readouterr().err


def test_the_report_has_the_defaults_of_the_preset_that_the_experiment_names(clipbench, mine, tmp_path):
    """Trials and report are composed at different times; the device's preset has another scheduler."""
    argv = mine("{optimizer.lr: [0.01, 0.1]}", 2)
    mini = (conf_dir() / "preset/quadratic/mini.yaml").read_text()
    for path, text in (
        ("preset/quadratic/other.yaml", mini.replace("scheduler: constant", "scheduler: linear")),
        (
            "experiment/mine.yaml",
            (tmp_path / "conf/experiment/mine.yaml")
            .read_text()
            .replace("quadratic\n", "quadratic\n  - override /preset: quadratic/other\n"),
        ),
    ):
        (tmp_path / "conf" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / path).write_text(text)
    assert clipbench(*argv, "hydra.sweeper.methods=[norm]") == 0
    jobs = the_sweep().jobs()
    assert {job.trial["phase"] for job in jobs} == {"select", "report", "default"}
    assert {(job.choices["preset"], job.choices["scheduler"]) for job in jobs} == {
        ("quadratic/other", "linear")
    }


def test_more_trials_report_again_only_what_is_another_best(clipbench, monkeypatch):
    for module in ("tuned.write_tuning", "compare.write_comparison"):
        monkeypatch.setattr(f"experiments.analysis.{module}", lambda *given: None)
    one = [*QUICK, "hydra.sweeper.methods=[norm]"]
    assert clipbench(*one, "hydra.sweeper.n_trials=2") == 0
    first = the_sweep().jobs()
    assert clipbench(*one, "hydra.sweeper.n_trials=4") == 0
    assert the_sweep().jobs()[: len(first)] == first
    trials = trials_of(the_sweep())
    tried = [trial for trial in trials if trial.phase == "select"]
    best = min(tried, key=lambda trial: trial.mean)
    assert len(tried) == 4
    assert best.number in [trial.number for trial in trials if trial.phase == "report"]
    assert [trial.phase for trial in trials].count("default") == 1


def test_a_best_value_on_the_edge_warns_by_name(clipbench, capsys, mine):
    """In 20 steps from far away the largest learning rate is the best: so it is planted."""
    one = ["hydra.sweeper.methods=[norm]", "hydra.sweeper.select_seeds=[0]", "hydra.sweeper.report_seeds=[7]"]
    assert clipbench(*mine("{optimizer.lr: [0.001, 0.01, 0.1]}", 3), *one) == 0
    told = capsys.readouterr().out
    assert "warning: norm is best where optimizer.lr=0.1 is the largest of its choices" in told
    best = pd.read_csv(the_sweep().path / "best.csv").set_index("method")
    assert "largest" in best.loc["norm", "on the edge"]

    # Not where there is more beyond it.
    more = mine("{optimizer.lr: [0.001, 0.1, 0.7, 30]}", 4)
    assert clipbench(*more, *one, "results_dir=b") == 0
    assert "warning: norm" not in capsys.readouterr().out


def test_a_method_that_always_diverges_stays_in_the_table(clipbench, mine):
    far = [*mine("{optimizer.lr: [1e+30, 1e+31]}", 2), "hydra.sweeper.methods=[no_clip]"]
    assert clipbench(*far) == 0
    best = pd.read_csv(the_sweep().path / "best.csv").set_index("method")
    assert best.loc["no_clip", "tuned"] == math.inf
    assert math.isfinite(best.loc["no_clip", "default"])
    every = pd.read_csv(the_sweep().path / "tuning.csv")
    assert set(every.loc[(every["method"] == "no_clip") & (every["phase"] == "select"), "diverged"]) == {2}
    assert (the_sweep().path / "best_of_k.png").exists()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["hydra.sweeper.report_seeds=[1,7]"], "select_seeds and report_seeds share 1"),
        (["hydra.sweeper.n_trials={norm:8,no_clip:4}"], "the same for every method"),
        (["hydra.sweeper.methods=[norm,nrm]"], "there is no clipping 'nrm'"),
        (["hydra.sweeper.methods=[norm,norm]"], "each once"),
        (["hydra.sweeper.sampler=tpe"], "must be sobol or grid, got 'tpe'"),
        (["clipping=norm"], "clipping=norm: hydra/sweeper=tuning chooses"),
        (["seed=0,1"], "seed: hydra/sweeper=tuning chooses"),
        (["hydra.sweeper.sampler=grid"], "has an interval"),
    ],
)
def test_refusals(clipbench, capsys, settings, told):
    assert clipbench(*TUNE, *settings) == 2
    assert told in capsys.readouterr().err
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ("{optimizer.lr: [0.1,1],clipping.threshold: [0.1,1]}", "must have infinity"),
        ("{optimizer.lr: [0.1,1],clipping.threshold: 'tag(log,interval(0.1,10))'}", "must have infinity"),
        ("{clipping.threshold: [0.1,.inf]}", "no_clip, auto_clip has none of the settings"),
        ("{optimizer.lr: [0.1,0.3,1],clipping.threshold: [1,.inf]}", "no_clip 3, norm 6, auto_clip 3"),
        (
            "{optimizer.lr: [0.1,0.3,1],clipping.thresold: [1,.inf]}",
            "no method has a setting clipping.thresold",
        ),
    ],
)
def test_unfair_spaces_are_refused(clipbench, capsys, mine, space, told):
    assert clipbench(*mine(space, 3)) == 2
    assert told in capsys.readouterr().err
    assert not Path("results").exists()


@pytest.mark.parametrize("task", ["quadratic", "cola", "imagenet", "voc", "reddit"])
def test_the_experiments_are_fair_and_complete(clipbench, capsys, task):
    """Each is composed to its last job, which checks it, and nothing is run."""
    assert (
        clipbench("run", f"experiment=tune_{task}", "device=cpu", "--dry-run", "hydra.sweeper.n_trials=1")
        == 0
    )
    assert "missing; " in capsys.readouterr().out
