"""Hydra's launchers as engines: what they are told, and that they change nothing but the time."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from experiments import cli
from experiments.complaints import LAUNCHERS
from experiments.errors import UserError
from experiments.runs import Run, find_runs
from experiments.training import engines
from experiments.training.engines import Engine, Launcher, launcher_of

PLUGINS = {
    "joblib": "hydra_plugins.hydra_joblib_launcher",
    "submitit_local": "hydra_plugins.hydra_submitit_launcher",
    "submitit_slurm": "hydra_plugins.hydra_submitit_launcher",
    "ray": "hydra_plugins.hydra_ray_launcher",
}
SIX = ["task=quadratic", "clipping=norm,auto_clip", "seed=0,1,2", "keep=last", "log_every=5", "quiet=true"]


def is_there(plugin: str) -> bool:
    try:
        return importlib.util.find_spec(plugin) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("name", PLUGINS)
def test_a_launcher_that_is_not_installed_says_how_to_get_it(name, clipbench, tmp_path, capsys):
    if is_there(PLUGINS[name]):
        assert launcher_of(name).settings["_target_"].startswith(PLUGINS[name])
        return
    assert clipbench("run", "-m", "task=quadratic", f"hydra/launcher={name}") == 2
    assert f"hydra/launcher={name} is not installed: {LAUNCHERS[name]}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_as_many_at_once_as_its_settings_say(monkeypatch):
    monkeypatch.setattr(engines, "cores", lambda: 8)
    joblib, slurm = Launcher("joblib", {"n_jobs": -1}), Launcher("submitit_slurm", {"array_parallelism": 256})
    ray = Launcher("ray", {"ray": {"init": {"num_cpus": 1}}})
    assert Launcher("basic", {}).at_once == 1
    assert (joblib.at_once, joblib._replace(settings={"n_jobs": -2}).at_once) == (8, 7)
    assert (joblib.limited(3).at_once, joblib._replace(batch=2).at_once) == (3, 2)
    assert joblib.settings == {"n_jobs": -1}
    assert (Launcher("submitit_local", {}).at_once, Launcher("submitit_local", {}).limited(3).at_once) == (
        8,
        3,
    )
    assert (slurm.at_once, slurm.limited(4).at_once) == (256, 4)
    assert (ray.at_once, ray.limited(4).at_once) == (1, 4)
    with pytest.raises(UserError, match="basic runs one job at a time, got 2; joblib runs several"):
        Launcher("basic", {}).limited(2)


class Recording:
    """In place of a launcher of Hydra's."""

    def __init__(self):
        self.seen = []

    def launch(self, jobs, initial_job_idx):
        self.seen.append(
            (jobs, {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")})
        )
        return []


@pytest.mark.parametrize(
    ("launcher", "given", "threads"),
    [
        (Launcher("joblib", {"n_jobs": 2}), None, "4"),
        (Launcher("joblib", {"n_jobs": 16}), None, "1"),
        (Launcher("joblib", {"n_jobs": 2}), "3", "3"),  # the user's own wish
        (Launcher("submitit_local", {}, batch=4), None, "2"),
        (Launcher("basic", {}), None, None),
    ],
)
def test_processes_share_the_cores(launcher, given, threads, monkeypatch, tmp_path):
    monkeypatch.setattr(engines, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    engine = Engine.__new__(Engine)
    engine.launcher, engine._launcher = launcher, Recording()
    assert engine.launch([["job=1"]]) == []
    policy = None if launcher.in_process else "PASSIVE"
    assert engine._launcher.seen == [([["job=1"]], {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": policy})]
    assert os.environ.get("OMP_NUM_THREADS") == given
    assert "OMP_WAIT_POLICY" not in os.environ


def test_no_more_jobs_are_handed_over_than_may_run_where_all_would(monkeypatch):
    monkeypatch.setattr(engines, "cores", lambda: 8)
    engine = Engine.__new__(Engine)
    for launcher, batch in {
        "submitit_local": (Launcher("submitit_local", {}), 8),
        "limited": (Launcher("submitit_local", {}, batch=2), 2),
        "joblib": (Launcher("joblib", {"n_jobs": 2}), None),
        "in batches": (Launcher("joblib", {"n_jobs": 2}, batch=10), 10),
    }.values():
        engine.launcher = launcher
        assert engine.batch == batch


def the_numbers(root: str | Path) -> dict[str, pd.DataFrame]:
    return {str(run.path.relative_to(root)): run.records() for run in find_runs(Path(root, "runs"))}


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Start clipbench in a process group of its own."""
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}  # Ray writes there
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    started = []

    def start(*argv: str) -> subprocess.Popen:
        main = ["-c", "from experiments.cli import main; main()"]
        process = subprocess.Popen(
            [sys.executable, *main, *argv],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def expect_same_numbers(root: str, whole: Path) -> None:
    found, wanted = the_numbers(root), the_numbers(whole)
    assert found.keys() == wanted.keys()
    assert len(found) == 6
    for name, records in found.items():
        pd.testing.assert_frame_equal(records, wanted[name], check_exact=True)
    for run in find_runs(Path(root, "runs")):
        path = run.checkpoint_path("last")
        weights, others = (
            torch.load(place, weights_only=True)["state"]["model"]
            for place in (path, whole / path.relative_to(root))
        )
        assert weights.keys() == others.keys()
        assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


SHORT = ["run", "-m", *SIX, "max_steps=60", "eval_every=20", "device=cpu"]
LONG = ["run", "-m", *SIX, "max_steps=2000", "eval_every=500", "checkpoint_every=250", "device=cpu"]
TWO = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Results of both, run in this process with one thread."""
    threads, folder = torch.get_num_threads(), tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.analysis.draw.draw_curves", lambda run: None)
        patch.setattr("experiments.analysis.compare.write_comparison", lambda *runs: None)
        for name, argv in {"short": SHORT, "long": LONG}.items():
            assert cli._dispatch([*argv, f"results_dir={folder / name}"]) == 0
    torch.set_num_threads(threads)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("joblib", ["hydra.launcher.n_jobs=2"]),
        ("submitit_local", ["hydra.sweeper.max_batch_size=2"]),
        ("ray", ["+hydra.launcher.ray.init.num_cpus=2"]),
    ],
)
def test_every_launcher_comes_to_the_same_numbers(name, settings, command, whole):
    pytest.importorskip(PLUGINS[name])
    process = command(*SHORT, "results_dir=b", f"hydra/launcher={name}", *settings)
    told, _ = process.communicate()
    assert process.returncode == 0, told
    assert "6 ok" in told
    expect_same_numbers("b", whole / "short")
    workers = {run.status["pid"] for run in find_runs("b/runs")}
    assert process.pid not in workers
    assert len(workers) == (6 if name == "submitit_local" else 2)  # joblib's and Ray's are used again
    # What is done is known whatever launches.
    told, _ = command(*SHORT, "results_dir=b").communicate()
    assert "6 jobs: 6 ok" in told


def until(process, count: int) -> list[Run]:
    """Wait until so many runs are under way and have a checkpoint; these."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        running = [run for run in find_runs("b/runs") if run.status["status"] == "running"]
        running = [run for run in running if run.checkpoint_path("last").exists()]
        if len(running) == count:
            return running
        time.sleep(0.01)
    raise AssertionError(process.communicate()[0])


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_no_job(command, whole):
    pytest.importorskip(PLUGINS["joblib"])
    process = command(*LONG, *TWO, "results_dir=b")
    os.kill(until(process, 2)[0].status["pid"], signal.SIGKILL)
    told, _ = process.communicate()
    assert process.returncode == 0, told
    assert "its process died; it runs again, by itself" in told
    expect_same_numbers("b", whole / "long")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM", "SIGKILL"])
def test_a_launch_that_ends_takes_its_jobs_with_it_in_order(how, command, whole):
    pytest.importorskip(PLUGINS["joblib"])
    process = command(*LONG, *TWO, "results_dir=b")
    until(process, 2)
    if how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    else:
        process.send_signal(getattr(signal, how))
    process.communicate()  # whose output all workers share: they are gone, too
    assert process.returncode == {"Ctrl-C": 130, "SIGTERM": 143, "SIGKILL": -signal.SIGKILL}[how]
    statuses = [run.status for run in find_runs("b/runs")]
    stopped = [status["message"] for status in statuses if status["status"] == "killed"]
    assert {status["status"] for status in statuses} <= {"killed", "ok"}  # one may have been at its end
    assert 1 <= len(stopped) <= 2
    assert len(statuses) < 6
    assert all("stopped by SIG" in message for message in stopped)
    process = command(*LONG, *TWO, "results_dir=b")
    told, _ = process.communicate()
    assert process.returncode == 0, told
    expect_same_numbers("b", whole / "long")
