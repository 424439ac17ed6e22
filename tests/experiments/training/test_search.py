"""Sweeps that choose: Sobol, TPE and successive halving, extended, killed and resumed."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import sys
import time
from pathlib import Path

import pytest
import torch

from experiments import cli
from experiments.runs import find_runs
from experiments.sweeps import Sweep, find_sweeps
from experiments.training.samplers import best_of, steps_of
from experiments.training.sweep import standing
from experiments.trials import Result, Trial, trials_of

QUICK = ["run", "-m", "task=quadratic", "eval_every=10", "max_steps=40", "quiet=true", "device=cpu"]
LR = "optimizer.lr=tag(log,interval(1e-3,1))"
SOBOL = [*QUICK, LR, "hydra/sweeper=sobol", "seed=0,1"]
TPE = [*QUICK, LR, "clipping=norm,no_clip", "hydra/sweeper=tpe", "hydra.sweeper.startup_trials=2"]
HALVING = [*QUICK, LR, "hydra/sweeper=halving", "hydra.sweeper.rungs=2", "hydra.sweeper.factor=2"]

TUNE = [
    *("run", "experiment=tune_quadratic", "device=cpu", "max_steps=40", "eval_every=10"),
    *("hydra.sweeper.methods=[no_clip,norm]", "hydra.sweeper.n_trials=2"),
    *("hydra.sweeper.select_seeds=[0]", "hydra.sweeper.report_seeds=[7]"),
]


@pytest.fixture(autouse=True)
def _nothing_drawn(monkeypatch):
    monkeypatch.setattr("experiments.analysis.draw.draw_curves", lambda run: None)


def the_sweep(root: str = "results") -> Sweep:
    (sweep,) = find_sweeps(root)
    return sweep


def asked(sweep: Sweep) -> list[tuple]:
    return [(job.trial["number"], job.trial["values"], job.until, job.run) for job in sweep.jobs()]


def outcomes(sweep: Sweep) -> list[tuple]:
    return [(trial.number, trial.values, trial.until, trial.mean) for trial in trials_of(sweep)]


@contextlib.contextmanager
def forked(argv: list[str]):
    """Start clipbench in a process of its own, which ends with the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # those of a parent do not survive a fork
    process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(cli._dispatch(argv)))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()
        torch.set_num_threads(threads)


def kill_when(argv: list[str], reached) -> None:
    """SIGKILL clipbench once ``reached``."""
    with forked(argv) as process:
        while process.is_alive() and not reached():
            time.sleep(0.005)
        assert process.is_alive(), "it was done before it could be killed"


def steps_so_far(root: str) -> int:
    return sum(run.last_step() or 0 for run in find_runs(Path(root, "runs")))


def test_more_sobol_trials_keep_the_first_and_their_runs(clipbench, capsys):
    assert clipbench(*SOBOL, "hydra.sweeper.n_trials=2") == 0
    first, runs = asked(the_sweep()), [run.path for run in find_runs("results/runs")]
    assert len(first) == len(runs) == 4
    times = [path.joinpath("status.json").stat().st_mtime_ns for path in runs]
    assert clipbench(*SOBOL, "hydra.sweeper.n_trials=3") == 0
    sweep = the_sweep()
    assert asked(sweep)[:4] == first
    assert len(sweep.jobs()) == 6
    assert [path.joinpath("status.json").stat().st_mtime_ns for path in runs] == times
    assert all(row.done for row in standing(sweep))
    # With fewer, what is there stays.
    capsys.readouterr()
    assert clipbench(*SOBOL, "hydra.sweeper.n_trials=2") == 0
    assert "6 jobs: 6 ok" in capsys.readouterr().out
    assert clipbench("sweep", "status") == 0
    told = capsys.readouterr().out
    best = min(trials_of(sweep), key=lambda trial: trial.mean)
    assert f"best so far: trial {best.number}, optimizer.lr={best.values['optimizer.lr']}" in told


def test_a_finished_search_composes_nothing_again(clipbench, monkeypatch):
    searches = [
        [*command, "hydra.sweeper.n_trials=2", "max_steps=20", f"results_dir=r{number}"]
        for number, command in enumerate((SOBOL, TPE, HALVING))
    ]
    assert [clipbench(*search) for search in searches] == [0, 0, 0]
    monkeypatch.setattr("experiments.commands.launch._composer", None)
    assert [clipbench(*search) for search in searches] == [0, 0, 0]


def test_a_killed_tpe_goes_on_as_if_it_had_not_been(clipbench):
    command = [*TPE, "hydra.sweeper.n_trials=5"]
    assert clipbench(*command, "results_dir=a") == 0
    # In the second trial, which is random, and in the fourth, which is not.
    kill_when([*command, "results_dir=b"], lambda: steps_so_far("b") >= 60)
    assert 1 <= len(the_sweep("b").jobs()) <= 3
    kill_when([*command, "results_dir=b"], lambda: steps_so_far("b") >= 140)
    assert clipbench("sweep", "resume", "--results-dir", "b") == 0
    assert asked(the_sweep("b")) == asked(the_sweep("a"))
    assert outcomes(the_sweep("b")) == outcomes(the_sweep("a"))
    assert len(asked(the_sweep("a"))) == 5

    # Each was told once; the last need not be.
    import optuna

    for root in ("a", "b"):
        study = optuna.load_study(
            study_name="sweep", storage=f"sqlite:///{the_sweep(root).path.absolute() / 'study.db'}"
        )
        told = [(trial.params["clipping"], trial.value) for trial in study.get_trials()]
        trials = trials_of(the_sweep(root))[:4]
        assert told == [(trial.values["clipping"], -trial.mean) for trial in trials]


def test_tpe_learns(clipbench):
    """After trials that tell, it stays where they were good: as it could not without them."""
    from experiments.training import tpe
    from experiments.training.space import Dimension

    space = [Dimension("lr", [], 1e-4, 1.0, False, True)]

    def asked_after(good: float) -> list[float]:
        trials = []
        for number in range(16):
            lr = 10 ** (-4 + number / 4)
            result = Result("loss", (math.log10(lr) - math.log10(good)) ** 2, False)
            trials.append(Trial(number, {"lr": f"{lr}"}, "", "", None, [], [result]))
        folder = Path(f"study-{good}")
        folder.mkdir()
        told = tpe.tell(trials, space, folder)
        return [float(v["lr"]) for v in tpe.ask(told, space, 8, (0, 16), 4)]

    assert sum(lr < 1e-2 for lr in asked_after(1e-3)) >= 6
    assert sum(lr > 1e-2 for lr in asked_after(1e-1)) >= 6


def test_a_diverged_trial_is_told_as_the_worst(clipbench):
    command = [*QUICK, "optimizer.lr=choice(1e+30,0.1)", "hydra/sweeper=tpe", "clipping=no_clip", "seed=0,1"]
    assert clipbench(*command, "hydra.sweeper.n_trials=6") == 0
    sweep = the_sweep()
    by_lr = {trial.values["optimizer.lr"]: trial for trial in trials_of(sweep)}
    assert by_lr["1e+30"].mean == math.inf
    assert by_lr["1e+30"].score == -math.inf
    assert math.isfinite(by_lr["0.1"].mean)
    import optuna

    storage = f"sqlite:///{sweep.path.absolute() / 'study.db'}"
    told = optuna.load_study(study_name="sweep", storage=storage).get_trials()
    assert len(told) == 5
    assert {trial.value for trial in told if trial.params["optimizer.lr"] == "1e+30"} == {-math.inf}


def test_halving_stops_in_order_and_the_best_go_on(clipbench, capsys):
    assert clipbench(*HALVING, "hydra.sweeper.n_trials=4", "checkpoint_every=40") == 0
    sweep = the_sweep()
    rungs = trials_of(sweep)
    assert [trial.until for trial in rungs] == [20] * 4 + [None] * 2
    best = sorted(rungs[:4], key=lambda trial: trial.mean)[:2]
    assert [trial.number for trial in rungs[4:]] == [trial.number for trial in best]
    assert "2 pruned" in capsys.readouterr().out
    gone_on = {job.run for trial in rungs[4:] for job in trial.jobs}
    for trial in rungs[:4]:
        run = sweep.run(trial.jobs[0])
        if trial.jobs[0].run in gone_on:
            assert run.status["status"] == "ok"
            # What it was chosen by is what it was at then, not what it came to.
            records = run.records().dropna(subset="val/loss")
            assert records["step"].tolist() == [10, 20, 30, 40]
            assert trial.mean == records["val/loss"].iloc[1] != records["val/loss"].iloc[3]
        else:
            assert run.status["status"] == "killed"
            assert "stopped after step 20" in run.status["message"]
            assert run.last_step() == 20
            assert run.checkpoint_path("last").exists()
    # By itself one of them goes on from there, to what it would have been.
    pruned = next(trial for trial in rungs[:4] if trial.jobs[0].run not in gone_on)
    lr = f"optimizer.lr={pruned.values['optimizer.lr']}"
    capsys.readouterr()
    alone = [*QUICK[2:], lr, "checkpoint_every=40"]
    assert clipbench("run", *[word for word in alone if word != "quiet=true"]) == 0
    assert "going on from step 20" in capsys.readouterr().out
    assert clipbench("run", *alone, "results_dir=whole") == 0
    resumed, whole = sweep.run(pruned.jobs[0]), find_runs("whole/runs")[0]
    assert resumed.summary()["final"] == whole.summary()["final"]


def expect_the_same(root: str, other: str) -> None:
    assert asked(the_sweep(root)) == asked(the_sweep(other))
    assert outcomes(the_sweep(root)) == outcomes(the_sweep(other))
    assert all(row.done for row in standing(the_sweep(root)))


def test_a_killed_halving_goes_on_as_if_it_had_not_been(clipbench):
    command = [*HALVING, "hydra.sweeper.n_trials=4"]
    assert clipbench(*command, "results_dir=a") == 0
    kill_when([*command, "results_dir=b"], lambda: steps_so_far("b") >= 30)
    kill_when([*command, "results_dir=b"], lambda: steps_so_far("b") >= 85)  # of 80 in the first rung
    assert clipbench("sweep", "resume", "--results-dir", "b") == 0
    expect_the_same("b", "a")


@pytest.mark.slow
def test_halving_is_the_same_in_several_processes(clipbench):
    command = [*HALVING, "hydra.sweeper.n_trials=4"]
    assert clipbench(*command, "results_dir=a") == 0
    assert clipbench(*command, "results_dir=b", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2") == 0
    expect_the_same("b", "a")


def test_a_killed_tuning_goes_on_in_both_phases(clipbench, monkeypatch):
    for module in ("tuned.write_tuning", "compare.write_comparison"):
        monkeypatch.setattr(f"experiments.analysis.{module}", lambda *given: None)
    assert clipbench(*TUNE, "results_dir=a") == 0
    select = 2 * 2 * 40
    kill_when([*TUNE, "results_dir=b"], lambda: steps_so_far("b") >= select // 2)
    kill_when([*TUNE, "results_dir=b"], lambda: steps_so_far("b") >= select + 60)
    assert clipbench("sweep", "resume", "--results-dir", "b") == 0
    expect_the_same("b", "a")
    assert len(the_sweep("b").jobs()) == 2 * (2 + 2)


def test_two_launches_ask_for_each_trial_once(clipbench):
    command = [*TPE, "hydra.sweeper.n_trials=5", "seed=0,1"]
    with forked([*command, "results_dir=b"]) as one, forked([*command, "results_dir=b"]) as other:
        for process in (one, other):
            process.join()
            assert process.exitcode == 0
    assert clipbench(*command, "results_dir=a") == 0
    assert asked(the_sweep("b")) == asked(the_sweep("a"))


def test_trials_to_come_are_not_made_of_a_config_edited_meanwhile(clipbench, tmp_path, capsys):
    folder = tmp_path / "conf/experiment"
    folder.mkdir(parents=True)
    mine = folder / "mine.yaml"
    mine.write_text("# @package _global_\noptimizer:\n  momentum: 0.5\n")
    command = [*TPE, "experiment=mine", "--config-dir", "conf"]
    assert clipbench(*command, "hydra.sweeper.n_trials=1") == 0
    sweep = the_sweep()
    facts = sweep.facts()
    sweep.rewrite(facts | {"search": facts["search"] | {"n_trials": 2}})
    mine.write_text("# @package _global_\noptimizer:\n  momentum: 0.9\n")
    assert clipbench("sweep", "resume") == 2
    assert "the configuration has changed since" in capsys.readouterr().err
    mine.write_text("# @package _global_\noptimizer:\n  momentum: 0.5\n")
    assert clipbench("sweep", "resume") == 0
    assert [job.config["optimizer"]["momentum"] for job in sweep.jobs()] == [0.5, 0.5]


def test_the_best_are_finite_and_equals_keep_their_order():
    def trial(number: int, value: float | None) -> Trial:
        result = None if value is None else Result("loss", value, False)
        return Trial(number, {}, "", "", None, [], [result])

    trials = [trial(0, 2.0), trial(1, 1.0), trial(2, None), trial(3, math.inf), trial(4, 1.0)]
    assert [best.number for best in best_of(trials, 5)] == [1, 4, 0]
    assert [best.number for best in best_of(trials, 1)] == [1]


def test_where_halving_compares():
    assert steps_of(3, 3, 900, 100) == [100, 300, None]
    assert steps_of(2, 2, 2000, 200) == [1000, None]
    assert steps_of(1, 3, 10, 10) == [None]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ([LR], "hydra/sweeper=sobol, tpe and halving"),
        (["hydra/sweeper=sobol", "seed=0,1"], "no setting has several"),
        (["hydra/sweeper=sobol", LR, "seed=interval(0,9)"], "seed=0,1,2"),
        (["hydra/sweeper=sobol", LR, "hydra.sweeper.n_trials=0"], "n_trials must be a whole number from 1"),
        (["hydra/sweeper=sobol", LR, "hydra.sweeper.by=last"], "by must be final or best, got 'last'"),
        (["hydra/sweeper=tpe", "clipping.threshold=tag(or_inf,interval(1,2))"], "give choices"),
        (["hydra/sweeper=halving", LR, "eval_every=40"], "evaluates too seldom"),
        (["hydra/sweeper=soboll", LR], "grid, halving"),
        (["hydra/sweeper=sobol", "task=quadratic,regression"], "one task a launch"),
    ],
)
def test_refusals(clipbench, capsys, settings, told):
    assert clipbench(*QUICK, *settings) == 2
    assert told in capsys.readouterr().err
    assert not Path("results").exists()
