"""Sweeps that are killed, edited, failed and launched twice, and come out as if nothing had been."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from experiments import cli
from experiments.errors import UserError
from experiments.runs import Run, find_runs
from experiments.sweeps import Job, Sweep, find_sweeps
from experiments.tasks.cola import CoLA
from experiments.tasks.quadratic import Quadratic
from experiments.training.engines import Launcher
from experiments.training.sweep import Driver, seconds_for, standing
from experiments.training.sweep_job import Ended, device_of

QUICK = ["task=quadratic", "eval_every=100", "log_every=5", "keep=last", "quiet=true"]
GRID = ["clipping=norm,linear_rand_autoclip", "seed=range(3)", "optimizer.lr=0.03,0.1"]
STEPS = 200
TWELVE = ["run", "-m", *QUICK, *GRID, f"max_steps={STEPS}", "checkpoint_every=40"]
FOUR = ["run", "-m", *QUICK, "clipping=norm,no_clip", "seed=0,1", "max_steps=20"]


@pytest.fixture(autouse=True)
def _no_comparison(monkeypatch):
    monkeypatch.setattr("experiments.analysis.compare.write_comparison", lambda *runs: None)


def runs(root: str) -> list[Run]:
    return find_runs(Path(root, "runs"))


def the_sweep(root: str = "results") -> Sweep:
    (sweep,) = find_sweeps(root)
    return sweep


def content(run: Run) -> dict[str, tuple[int, bytes]]:
    """Time and bytes of all files of a run."""
    files = sorted(path for path in run.path.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def same(a: object, b: object) -> bool:
    """Whether nested containers hold the same bits."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or (a != a and b != b)


def expect_same(root: str, whole: str) -> None:
    """The same runs with the same records, weights and numbers, bit for bit."""
    found, wanted = runs(root), runs(whole)
    assert [run.path.relative_to(root) for run in found] == [run.path.relative_to(whole) for run in wanted]
    timed = {"seconds", "steps_per_second", "time", "peak_memory_bytes", "process_memory_bytes"}
    for run, other in zip(found, wanted, strict=True):
        assert run.status["status"] == other.status["status"] == "ok"
        pd.testing.assert_frame_equal(run.records(), other.records(), check_exact=True)
        states = [torch.load(r.checkpoint_path("last"), weights_only=True)["state"] for r in (run, other)]
        for state in states:
            del state["seconds"]
        assert same(*states)
        summaries = [{k: v for k, v in r.summary().items() if k not in timed} for r in (run, other)]
        assert same(*summaries)


@pytest.fixture(scope="module")
def _imported(tmp_path_factory):
    """All that a sweep imports, once for all forked processes."""
    place = f"results_dir={tmp_path_factory.mktemp('warm')}"
    assert cli._dispatch(["run", "-m", *QUICK, "max_steps=1", place]) == 0


@pytest.fixture
def start(_imported, tmp_path, monkeypatch):
    """Start a forked process of one thread that runs clipbench; what is patched here is patched there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiments.analysis.draw.draw_curves", lambda run: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # those of a parent do not survive a fork
    started = []

    def start(*argv: str) -> multiprocessing.Process:
        process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(cli._dispatch(argv)))
        process.start()
        started.append(process)
        return process

    yield start
    torch.set_num_threads(threads)
    for process in started:
        process.kill()
        process.join()


def code_of(process) -> int:
    process.join()
    return process.exitcode


def steps_so_far(root: str) -> int:
    return sum(run.last_step() or 0 for run in runs(root))


def kill_at(process, root: str, steps: int) -> None:
    """SIGKILL once the runs together have made so many steps."""
    while process.is_alive() and steps_so_far(root) < steps:
        time.sleep(0.01)
    assert process.is_alive(), "it was done before it could be killed"
    process.kill()
    process.join()


def killed_in_between(start, command: list[str], again: list[str], points: list[int], meanwhile) -> int:
    """Run a command, SIGKILLed at each point, and ``again`` after that; the last exit code."""
    untouched: dict[str, tuple[int, bytes]] = {}
    for number, point in enumerate(points):
        process = start(*(again if number else command), *(() if number else ("results_dir=b",)))
        kill_at(process, "b", point)
        meanwhile(number)
        for run in runs("b"):
            if run.status["status"] == "ok":
                untouched |= content(run)
    assert untouched
    code = code_of(start(*again))
    now = {name: entry for run in runs("b") for name, entry in content(run).items()}
    assert {name: now[name] for name in untouched} == untouched
    return code


def test_killed_at_five_points_it_comes_out_bit_for_bit(start):
    assert code_of(start(*TWELVE, "results_dir=a")) == 0
    assert len(runs("a")) == 12
    points = sorted(random.Random(6).sample(range(1, 12 * STEPS), 5))
    assert killed_in_between(start, TWELVE, [*TWELVE, "results_dir=b"], points, lambda number: None) == 0
    expect_same("b", "a")
    assert not list(Path("b").rglob("*.tmp"))


def test_a_config_edited_meanwhile_leaks_into_nothing(start, tmp_path, capfd):
    folder = tmp_path / "conf/experiment"
    folder.mkdir(parents=True)
    mine = folder / "mine.yaml"
    mine.write_text("# @package _global_\noptimizer:\n  momentum: 0.5\n")
    command = ["run", "-m", *QUICK, "clipping=norm,no_clip", *TWELVE[-2:], "experiment=mine"]
    command += ["--config-dir", "conf"]
    assert code_of(start(*command, "results_dir=a")) == 0

    edited = "# @package _global_\noptimizer:\n  momentum: 0.9\n"
    resume = ["sweep", "resume", "--results-dir", "b"]
    points = [STEPS // 3, STEPS + STEPS // 2]
    assert killed_in_between(start, command, resume, points, lambda number: mine.write_text(edited)) == 0
    expect_same("b", "a")
    assert {run.config()["optimizer"]["momentum"] for run in runs("b")} == {0.5}

    # The command itself now means another sweep, and says what it leaves behind.
    first = the_sweep("b")
    run = Run(first.results_dir / first.job(1).run)
    run.delete()
    capfd.readouterr()
    process = start(*command, "results_dir=b")
    while len(find_sweeps("b")) == 1:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    told = capfd.readouterr().out
    assert "has changed since" in told
    assert "1 of 2 jobs are done" in told
    assert f"clipbench sweep resume {first.path}" in told


def test_an_edit_while_a_job_runs_does_not_reach_the_next(clipbench, tmp_path, monkeypatch):
    folder = tmp_path / "conf/experiment"
    folder.mkdir(parents=True)
    mine = folder / "mine.yaml"
    mine.write_text("# @package _global_\noptimizer:\n  momentum: 0.5\n")
    load = Quadratic.load
    edited = "# @package _global_\noptimizer:\n  momentum: 0.9\n"
    monkeypatch.setattr(Quadratic, "load", lambda task: (mine.write_text(edited), load(task)))
    assert clipbench(*FOUR, "experiment=mine", "--config-dir", "conf") == 0
    assert {run.config()["optimizer"]["momentum"] for run in runs("results")} == {0.5}


def test_an_experiment_may_be_a_sweep_by_itself(clipbench, tmp_path):
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /task: quadratic\nresults_dir: there\n"
        "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      seed: 0,1\n      clipping: norm,no_clip\n"
    )
    command = ["run", "experiment=mine", "--config-dir", "conf", "max_steps=20", *QUICK[1:]]
    assert clipbench(*command, "seed=5") == 0
    assert clipbench(*command, "seed=5") == 0
    assert [run.path.name for run in runs("there")] == ["seed=5", "seed=5"]
    assert {run.names["clipping"] for run in runs("there")} == {"norm", "no_clip"}
    assert the_sweep("there").experiment == "mine"
    assert not Path("results").exists()


def fails_at(monkeypatch, seed: int, what) -> None:
    """Let ``what`` be called in the training of this seed."""
    forward, loader, current = Quadratic.forward, Quadratic.train_loader, []

    def noted(task, its_seed):
        current[:] = [its_seed]
        return loader(task, its_seed)

    def forwarded(task, model, batch):
        if current == [seed]:
            what()
        return forward(task, model, batch)

    monkeypatch.setattr(Quadratic, "train_loader", noted)
    monkeypatch.setattr(Quadratic, "forward", forwarded)


def fail():
    raise RuntimeError("no such luck")


def test_one_failure_leaves_eleven_done(clipbench, monkeypatch, capsys):
    command = ["run", "-m", *QUICK, "seed=range(12)", "max_steps=20"]
    with monkeypatch.context() as patch:
        fails_at(patch, 7, fail)
        assert clipbench(*command) == 1
    told = capsys.readouterr()
    lines = told.out.splitlines()
    (row,) = (line for line in lines if line.startswith("  7  seed=7"))
    assert row.split()[2] == "error"
    assert "RuntimeError: no such luck" in row
    assert row.endswith("seed=7")
    assert any(line.startswith("12 jobs in") and line.endswith(": 11 ok, 1 error") for line in lines)
    assert "clipbench sweep retry --failed" in lines[-2]
    before = [content(run) for run in runs("results") if run.status["status"] == "ok"]
    assert len(before) == 11

    # The same command does not try again; retry does, and only that.
    assert clipbench(*command) == 1
    assert "12 jobs: 11 ok, 1 error" in capsys.readouterr().out
    assert clipbench("sweep", "retry", "--failed") == 0
    assert "12 jobs in" in capsys.readouterr().out
    assert [content(run) for run in runs("results") if run.path.name != "seed=7"] == before
    assert clipbench(*command) == 0


def test_bad_input_that_only_a_run_can_see_stops_no_other(clipbench, monkeypatch, capsys):
    def refuse():
        raise UserError("task.data: seed 1 has none")

    loader = Quadratic.train_loader
    monkeypatch.setattr(
        Quadratic, "train_loader", lambda task, seed: refuse() if seed == 1 else loader(task, seed)
    )
    assert clipbench(*FOUR) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [run.path.name for run in runs("results")] == ["seed=0", "seed=0"]
    rows = [line for line in lines if " refused " in line]
    assert len(rows) == 2
    assert all("task.data: seed 1 has none" in row for row in rows)
    assert any(line.endswith(": 2 ok, 2 refused") for line in lines)


def test_two_launches_at_once_train_each_job_once(start, tmp_path, monkeypatch, capfd):
    begun = tmp_path / "begun.txt"
    begin = Run.start

    def noted(run, *args, **facts):
        with begun.open("a") as file:
            file.write(f"{run.path}\n")
        begin(run, *args, **facts)

    monkeypatch.setattr(Run, "start", noted)
    launches = [start(*TWELVE) for _ in range(2)]
    assert [code_of(launch) for launch in launches] == [0, 0]
    lines = begun.read_text().splitlines()
    assert len(lines) == 12
    assert len(set(lines)) == 12
    assert {run.status["status"] for run in runs("results")} == {"ok"}
    assert len(runs("results")) == 12
    assert len({run.status["pid"] for run in runs("results")}) == 2  # they shared the work
    assert capfd.readouterr().out.count("12 ok") == 2


def test_a_finished_sweep_is_known_before_anything_is_composed(clipbench, monkeypatch):
    monkeypatch.setattr("experiments.analysis.draw.draw_curves", lambda run: run.curves_path.touch())
    command = ["run", "-m", *QUICK, "seed=range(4)", "max_steps=20"]  # of one method: nothing is compared
    assert clipbench(*command) == 0
    before = [content(run) for run in runs("results")]
    for argv in (command, ["sweep", "resume"], ["sweep", "status"]):
        code = (
            f"import sys; sys.argv = ['clipbench', *{argv!r}]; from experiments import cli\n"
            "try: cli.main()\n"
            "except SystemExit as stop: assert stop.code == 0, stop.code\n"
            "print(sorted({'torch', 'hydra', 'omegaconf', 'yaml', 'numpy', 'pandas', 'matplotlib'}"
            " & set(sys.modules)))"
        )
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        if argv != ["sweep", "status"]:
            assert told.splitlines()[-1] == "[]"
        assert "4 jobs: 4 ok" in told
    assert [content(run) for run in runs("results")] == before
    left = {path.name for path in the_sweep().path.rglob("*")}
    assert {"sweep.json", "jobs.jsonl"} <= left
    assert not any(name.startswith(("job-", "launch-")) for name in left)


def test_force_runs_all_again_and_quiet_changes_nothing(clipbench):
    assert clipbench(*FOUR) == 0
    before = [content(run) for run in runs("results")]
    assert clipbench(*FOUR[:-1], "max_steps=20", "hydra/launcher=basic") == 0
    assert [content(run) for run in runs("results")] == before
    assert clipbench(*FOUR, "force=true") == 0
    assert len(find_sweeps("results")) == 1
    for run, earlier in zip(runs("results"), before, strict=True):
        assert all(content(run)[name][0] > entry[0] for name, entry in earlier.items() if ".lock" not in name)


def test_a_dry_run_writes_nothing(clipbench, tmp_path, capsys):
    assert clipbench(*FOUR, "--dry-run") == 0
    told = capsys.readouterr().out
    assert "4 jobs: 4 missing; 4 of them would run" in told
    assert "how long they take is not known" in told
    assert "clipping=no_clip seed=1" in told
    assert list(tmp_path.iterdir()) == []
    assert clipbench("run", *FOUR[2:-3], "clipping=norm", "seed=0", "max_steps=20") == 0
    capsys.readouterr()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert clipbench(*FOUR, "--dry-run") == 0
    assert "4 jobs: 1 ok, 3 missing; 3 of them would run" in (told := capsys.readouterr().out)
    assert "1 at a time: by the median seconds a step of 1 finished runs" in told
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == files


def finished_run(root: Path, seed: int, steps: int, seconds: int, **status: str) -> None:
    names = {"experiment": "adhoc", "task": "quadratic", "preset": "mini", "optimizer": "sgd"}
    run = Run.locate(root, **names, clipping="norm", digest="0123456789ab", seed=seed)
    with run.lock():
        run.start({})
        run.finish("ok", {"steps": steps})
    path = run.path / "status.json"
    times = {"started": "2026-01-01T00:00:00+00:00", "finished": f"2026-01-01T00:00:{seconds:02}+00:00"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **times, **status}))


def test_the_estimate_is_the_median_of_what_a_step_took(tmp_path):
    job = Job([], {"task": "quadratic", "preset": "quadratic/mini"}, {"max_steps": 300}, "runs/x")
    assert seconds_for([job], tmp_path) == (None, 0)
    for seed, seconds in enumerate((10, 20, 50)):
        finished_run(tmp_path, seed, 100, seconds)
    finished_run(tmp_path, 3, 100, 1, resumed="2026-01-01T00:00:01+00:00")  # took longer than it says
    assert seconds_for([job, job._replace(config={"max_steps": 100})], tmp_path) == (80.0, 3)
    other = job._replace(choices={"task": "cola", "preset": "cola/mini"})
    assert seconds_for([job, other], tmp_path) == (None, 0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_in_order_and_the_same_command_goes_on(number, code, start, capfd):
    command = [*FOUR[:-1], "max_steps=400", "checkpoint_every=400", "results_dir=b"]
    process = start(*command)
    while steps_so_far("b") < 500:
        assert process.is_alive()
        time.sleep(0.005)
    os.kill(process.pid, number)
    assert code_of(process) == code
    assert [run.status["status"] for run in runs("b")] == ["ok", "killed"]
    stopped = runs("b")[1]
    assert stopped.checkpoint_path("last").exists()
    assert "1 ok, 1 killed, 2 missing" in capfd.readouterr().out
    assert code_of(start(*command)) == 0
    assert code_of(start(*command[:-1], "results_dir=a")) == 0
    expect_same("b", "a")


@pytest.fixture
def file(tmp_path) -> Path:
    """One of the files of a data set in ``cola``."""
    for name in ("in_domain_train.tsv", "in_domain_dev.tsv", "out_of_domain_dev.tsv"):
        path = tmp_path / "cola/raw" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"gj04\t{k % 2}\t\tsentence number {k} .\n" for k in range(80)))
    return path


ON_FILES = ["run", "-m", "data_dir=cola", "max_steps=2", "eval_every=2", "quiet=true", "seed=0,1"]


def test_a_file_that_changed_since_is_refused(file, clipbench, capsys):
    command, path = ON_FILES, file
    assert clipbench(*command) == 0
    assert len({run.names["digest"] for run in runs("results")}) == 1
    path.write_text(path.read_text().replace("79", "97"))
    capsys.readouterr()
    for argv in (command, ["sweep", "resume"], ["sweep", "retry", "--failed"]):
        assert clipbench(*argv) == 2
        assert f"{path} has changed since results/sweeps/adhoc/" in capsys.readouterr().err
    assert clipbench("sweep", "status") == 0
    assert clipbench(*command, "experiment=adhoc") == 0  # another sweep, of new runs
    assert len({run.names["digest"] for run in runs("results")}) == 2


def test_a_file_that_changes_between_two_jobs_is_noticed(file, clipbench, monkeypatch, capsys):
    load = CoLA.load

    def loaded(task):
        load(task)
        file.write_text(file.read_text().replace("79", "97"))

    monkeypatch.setattr(CoLA, "load", loaded)
    assert clipbench(*ON_FILES) == 1
    assert "its input files have changed since the sweep was launched" in capsys.readouterr().out
    assert [run.path.name for run in runs("results")] == ["seed=0"]


def test_doubles_run_once(clipbench, capsys):
    assert clipbench("run", "-m", *QUICK[:-1], "quiet=false", "seed=0,1,0", "max_steps=20") == 0
    assert "1 jobs are the same run as another and left out" in capsys.readouterr().out
    assert len(the_sweep().jobs()) == 2


def test_status_and_prune(clipbench, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        fails_at(patch, 1, fail)
        assert clipbench(*FOUR, "max_steps=30") == 1
    sweep, jobs = the_sweep(), the_sweep().jobs()
    run = sweep.run(jobs[2])
    with run.lock():
        run.start(jobs[2].config)
    never = Run(Path("results/runs/adhoc/quadratic-mini/sgd-norm/0123456789ab/seed=5"))
    with never.lock():
        pass
    draft = sweep.path.parent / ".0123456789ab.99.tmp"
    draft.mkdir()
    capsys.readouterr()
    assert clipbench("sweep", "status", "adhoc") == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told[1:4]] == ["1", "2", "3"]
    assert told[-2:] == ["4 jobs: 1 ok, 2 error, 1 killed", str(sweep.path)]

    files = {path for path in Path("results").rglob("*")}
    assert clipbench("sweep", "prune", str(sweep.path)) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == ["error", "killed", "error", "never", "half", "5"]
    assert {path for path in Path("results").rglob("*")} == files

    with sweep.run(jobs[1]).lock():
        assert clipbench("sweep", "prune", "--yes") == 0
        told = capsys.readouterr().out
        assert f"kept: {sweep.run(jobs[1]).path} is being run by process {os.getpid()}" in told
        assert "4 folders deleted" in told
    assert [sweep.status(job)["status"] for job in jobs] == ["ok", "error", "missing", "missing"]
    assert not never.path.parent.exists()
    assert not draft.exists()
    assert clipbench("sweep", "retry", "--failed", "adhoc") == 0
    assert clipbench("sweep", "prune") == 0
    assert "nothing to prune" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["status"], "no sweep in results; clipbench run -m launches one"),
        (["status", "adhok"], "'adhok' is no sweep and no experiment with one; results has none"),
        (["resume", "--results-dir", "there", "adhok"], "those in there are adhoc. Did you mean 'adhoc'?"),
        (["resume", "--results-dir", "there", "--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["resume", "--results-dir", "there", "--jobs", "2"], "runs one job at a time, got 2; joblib runs"),
        (["resume", "--results-dir", "there", "--launcher", "jobblib"], "Did you mean 'joblib'?"),
    ],
)
def test_what_sweep_cannot_do_it_says(argv, message, clipbench, capsys):
    there = Sweep.locate("there", "adhoc", "0123456789ab")
    launcher = Launcher("basic", {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"})
    facts = {"inputs": [], "launcher": launcher._asdict()}
    there.create(facts, [Job([], {}, {}, "runs/x")])
    assert clipbench("sweep", *argv) == 2
    assert message in capsys.readouterr().err


class Scripted:
    """An engine that does to each job what a script says; jobs are launched two at a time."""

    batch = 2

    def __init__(self, sweep: Sweep, script, name: str = "joblib") -> None:
        self.sweep, self.script, self.launched = sweep, script, []
        self.launcher = Launcher(name, {})

    def launch(self, jobs: list[list[str]]) -> list[Ended]:
        indices = [int(overrides[0].removeprefix("job=")) for overrides in jobs]
        self.launched.append(indices)
        told = [self.script(self, self.sweep.job(index), len(indices) == 1) for index in indices]
        if not all(told):
            raise RuntimeError("a worker died")
        return told


def done(sweep: Sweep, job: Job, status: str = "ok") -> Ended:
    run = sweep.run(job)
    with run.lock():
        run.start({})
        run.finish(status, {"steps": 1})
    return Ended(job.index, status, "")


def dies(sweep: Sweep, job: Job) -> None:
    """A process claims the job and is killed."""
    pid = os.fork()
    if not pid:
        with sweep.claim(job.index):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)


def sweep_of(tmp_path: Path, count: int) -> Sweep:
    sweep = Sweep.locate(tmp_path, "adhoc", "0123456789ab")
    sweep.create({}, [Job([f"seed={k}"], {}, {}, f"runs/seed={k}") for k in range(count)])
    return sweep


def drive(sweep: Sweep, script, **options) -> tuple[Driver, Scripted]:
    engine = Scripted(sweep, script)
    driver = Driver(sweep, lambda launch: engine, **options)
    assert driver.run() is None
    return driver, engine


def test_who_was_taken_down_with_another_runs_alone_and_the_culprit_fails_at_last(tmp_path, capsys):
    def script(engine, job, alone):
        if job.index == 2 or (job.index == 3 and not alone):  # 2 takes 3 with it
            return dies(engine.sweep, job)
        return done(engine.sweep, job)

    sweep = sweep_of(tmp_path, 6)
    driver, engine = drive(sweep, script)
    assert engine.launched == [[0, 1], [2, 3], [4, 5], [2], [3]]
    rows = standing(sweep, driver.ended)
    assert [row.status for row in rows] == ["ok", "ok", "killed", "ok", "ok", "ok"]
    assert rows[2].message == "its process died (so it did 2 times)"
    assert capsys.readouterr().out.count("it runs again, by itself") == 2


def test_an_engine_that_cannot_start_is_named_and_not_asked_again(tmp_path):
    engine = Scripted(sweep_of(tmp_path, 4), lambda engine, job, alone: None)
    with pytest.raises(UserError, match="hydra/launcher=joblib: a worker died"):
        Driver(engine.sweep, lambda launch: engine).run()
    assert engine.launched == [[0, 1]]


def test_what_a_job_says_is_not_asked_again(tmp_path):
    answers = {0: "timeout", 1: "refused", 2: "killed"}  # killed without a signal: its disk is full

    def script(engine, job, alone):
        return Ended(job.index, answers[job.index], "told so")

    sweep = sweep_of(tmp_path, 3)
    driver, engine = drive(sweep, script)
    assert engine.launched == [[0, 1], [2]]
    assert [(row.status, row.message) for row in standing(sweep, driver.ended)] == [
        ("timeout", "told so"),
        ("refused", "told so"),
        ("killed", "told so"),
    ]


def test_it_waits_for_what_others_run_and_takes_over_what_they_leave(tmp_path, monkeypatch, capsys):
    sweep = sweep_of(tmp_path, 3)
    claims = [sweep.claim(index) for index in (0, 1)]
    for claim in claims:
        claim.__enter__()

    def sleep(seconds):  # the other finishes one, and gives the other up
        done(sweep, sweep.job(0))
        for claim in claims:
            claim.__exit__(None, None, None)

    monkeypatch.setattr("experiments.training.sweep.time.sleep", sleep)
    _, engine = drive(sweep, lambda engine, job, alone: done(engine.sweep, job))
    assert engine.launched == [[2], [1]]
    assert "waiting for 2 jobs that other processes run" in capsys.readouterr().out


def test_jobs_may_be_proposed_one_by_one_from_what_came_of_the_others(tmp_path):
    seen = []

    def propose(sweep: Sweep) -> list[Job]:
        seen.append([sweep.status(job)["status"] for job in sweep.jobs()])
        count = len(sweep.jobs())
        return [Job([f"x={count}"], {}, {}, f"runs/seed={count}")] if count < 3 else []

    script = lambda engine, job, alone: done(engine.sweep, job)  # noqa: E731
    sweep = sweep_of(tmp_path, 0)
    _, engine = drive(sweep, script, propose=propose)
    assert seen == [[], ["ok"], ["ok", "ok"], ["ok", "ok", "ok"]]
    assert engine.launched == [[0], [1], [2]]
    assert [job.overrides for job in sweep.jobs()] == [["x=0"], ["x=1"], ["x=2"]]
    _, engine = drive(sweep, script, propose=propose)
    assert engine.launched == []


def test_workers_spread_over_the_devices_of_a_machine(tmp_path, monkeypatch):
    sweep = sweep_of(tmp_path, 1)
    config = {"device": "cuda", "nproc": 1}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with device_of(sweep, config) as first, device_of(sweep, config) as second:
        assert (first, second) == ("cuda:0", "cuda:1")
        with device_of(sweep, config | {"device": "cpu"}) as device:
            assert device == "cpu"
        with device_of(sweep, config | {"nproc": 2}) as device:
            assert device == "cuda"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with device_of(sweep, config) as device:
        assert device == "cuda"
