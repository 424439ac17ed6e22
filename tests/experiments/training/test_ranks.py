"""Processes that train together reach what one does; the first writes, and all stop and go on together."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.runs import Run, find_runs
from experiments.tasks.base import EpochLoader, as_is
from experiments.tasks.reddit import Reddit
from experiments.tasks.regression import Regression
from experiments.training.presets import conf_dir
from experiments.training.ranks import Ranks

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

QUADRATIC = ["run", "task=quadratic", "max_steps=40", "eval_every=20", "clipping=linear_rand_norm"]
COLA = [
    *("run", "task=cola", "task.num_train=320", "task.num_val=60", "task.batch_size=16", "warmup_steps=0"),
    *("max_steps=8", "eval_every=4", "optimizer=sgd", "optimizer.lr=0.05", "clipping=auto_clip"),
]
REGRESSION = ["run", "task=regression", "max_steps=40", "eval_every=20", "clipping=norm"]  # of 5 rows each
EXPECTATION = ["run", "task=expectation", "max_steps=40", "eval_every=20", "clipping=auto_clip"]
REDDIT = [
    *("run", "task=reddit", "task.num_nodes=1000", "task.batch_size=17", "task.fan_out=[4,3]"),
    *("max_steps=45", "eval_every=15", "optimizer=sgd", "optimizer.lr=0.1", "clipping=auto_clip"),
]
SLOWER = [REGRESSION, EXPECTATION, REDDIT]
QUIET = ["quiet=true", "keep=last"]


def ran(root: str) -> Run:
    (run,) = find_runs(root)
    return run


def weights(root: str) -> dict[str, torch.Tensor]:
    return torch.load(ran(root).checkpoint_path("last"), weights_only=True)["state"]["model"]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize(
    "argv",
    [QUADRATIC, COLA, *(pytest.param(argv, marks=pytest.mark.slow) for argv in SLOWER)],
    ids=lambda argv: argv[1].removeprefix("task="),
)
def test_two_processes_reach_what_one_does_at_the_same_batch(argv, clipbench):
    assert clipbench(*argv, *QUIET, "results_dir=one") == 0
    assert clipbench(*argv, *QUIET, "results_dir=two", "nproc=2") == 0
    expect_close()


@pytest.mark.slow
def test_two_processes_that_accumulate_reach_what_one_does(clipbench):
    argv = [*COLA, *QUIET, "accumulate=2", "task.batch_size=8"]
    assert clipbench(*argv, "results_dir=one") == 0
    assert clipbench(*argv, "results_dir=two", "nproc=2") == 0
    expect_close()


def expect_close() -> None:
    one, two = ran("one"), ran("two")
    assert one.path.parent.name != two.path.parent.name  # the world size counts
    torch.testing.assert_close(weights("two"), weights("one"), rtol=1e-4, atol=1e-6)
    assert two.records().columns.tolist() == one.records().columns.tolist()
    np.testing.assert_allclose(two.records(), one.records(), rtol=1e-3)
    assert two.status["status"] == two.summary()["status"] == "ok"
    state = torch.load(two.checkpoint_path("last"), weights_only=True)["state"]
    assert len(state["of_rank"]) == 2


FAILS = """
import os, signal, time
import torch
from torch import distributed
from experiments.errors import UserError
from experiments.tasks.quadratic import Quadratic

def fail(how, rank):
    if distributed.is_initialized() and distributed.get_rank() == rank:
        match how:
            case "memory": torch.empty(2**60)
            case "defect": raise RuntimeError("no such luck")
            case "input": raise UserError("nothing to be read here")
            case "death": os.kill(os.getpid(), signal.SIGKILL)

class Fails(Quadratic):
    def __init__(self, how, rank=1, stuck=False, **settings):
        super().__init__(**settings)
        self.how, self.rank, self.stuck, self.steps = how, rank, stuck, 0

    def forward(self, model, batch):
        self.steps += 1
        if self.steps == 15:
            fail(self.how, self.rank)
            if self.stuck:
                time.sleep(600)
        return super().forward(model, batch)

class FailsAtStart(Fails):
    def load(self):
        fail(self.how, self.rank)
"""
FAILING = ["run", "task=quadratic", "max_steps=30", "eval_every=10", "log_every=3", "quiet=true", "nproc=2"]


@pytest.fixture
def failing(clipbench, tmp_path, monkeypatch, capfd):
    """Run in two processes, one of which fails; returns exit code, run or None, and what was told."""
    (tmp_path / "fails.py").write_text(FAILS)
    monkeypatch.syspath_prepend(tmp_path)

    def run(target: str, **settings) -> tuple[int, Run | None, str, str]:
        argv = [f"task._target_=fails.{target}", *(f"+task.{key}={value}" for key, value in settings.items())]
        code = clipbench(*FAILING, *argv)
        return code, *(find_runs("results") or [None]), *capfd.readouterr()

    return run


# What one process meets -> exit code, status, words of the message.
FAILURES = {
    "memory": (1, "oom", "can't allocate memory", "lower task.batch_size"),
    "defect": (1, "error", "RuntimeError: no such luck", ""),
    "input": (1, "error", "nothing to be read here", ""),
    "death": (1, "killed", "one of its processes died", "goes on from its last checkpoint"),
}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "how", ["memory", *(pytest.param(how, marks=pytest.mark.slow) for how in FAILURES if how != "memory")]
)
def test_a_process_that_fails_ends_the_run_with_its_own_message(how, rank, failing):
    code, status, *words = FAILURES[how]
    if (how, rank) == ("death", 0):
        words = ["its first process died", "goes on from there"]
    found, run, told, complaints = failing("Fails", how=how, rank=rank)
    assert (found, run.status["status"]) == (code, status)
    message = told.splitlines()[0].removeprefix(f"{status}: ")
    assert all(word in message for word in words)
    assert message.startswith("process 1: ") == (rank == 1 and how in ("memory", "defect"))
    if how != "death":
        assert run.status["message"] == message
        assert run.summary()["status"] == status
    assert run.records()["step"].max() == 12
    assert complaints.count("Traceback") == (how == "defect")
    assert complaints.count("nothing to be read here") == (how == "input")
    assert ("closed by peer" in complaints, "SIGKILL" in complaints) == (False, how == "death")


@pytest.mark.slow
def test_a_process_that_hangs_is_ended_and_the_other_ones_message_is_the_runs(failing, monkeypatch):
    monkeypatch.setattr("experiments.training.launch.GRACE", 1.0)
    code, run, told, _ = failing("Fails", how="memory", stuck="true")
    assert (code, run.status["status"], run.summary()["status"]) == (1, "oom", "oom")
    assert told.startswith("oom: process 1: ")
    assert (run.last_step(), run.records()["step"].max()) == (12, 12)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["memory", "defect", "input"])
def test_a_process_that_fails_before_the_first_step_ends_all(how, failing):
    code, run, told, complaints = failing("FailsAtStart", how=how)
    if how == "input":
        assert (code, run) == (2, None)
        assert complaints == "clipbench: nothing to be read here\n"
        return
    _, status, words, _ = FAILURES[how]
    assert (code, run.status["status"]) == (1, status)
    assert told.startswith(f"{status}: process 1: ")
    assert words in run.status["message"]
    assert complaints.count("Traceback") == (how == "defect")


@pytest.mark.slow
def test_what_is_wrong_in_the_processes_is_said_once_and_leaves_nothing(clipbench, capfd, tmp_path):
    assert clipbench(*COLA, *QUIET, "task.batch_size=15", "nproc=2") == 2
    told = capfd.readouterr().err
    assert told.count("batch_size must be a multiple of 2, the processes that share it, got 15") == 1
    assert "Traceback" not in told
    assert list(tmp_path.iterdir()) == []


def command(*argv: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    return subprocess.Popen(
        [sys.executable, *argv], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
CLIPBENCH = ("-c", "from experiments.cli import main; main()")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_processes_that_were_stopped_go_on_bit_for_bit(number, clipbench):
    dropout = ["preset.model.config.hidden_dropout_prob=0.3", "max_steps=60", "checkpoint_every=5"]
    argv = [*COLA, *QUIET, *dropout, "log_every=1", "nproc=2"]
    assert clipbench(*argv, "results_dir=whole") == 0
    process = command(*CLIPBENCH, *argv, "results_dir=stopped")
    while not (found := find_runs("stopped")) or (found[0].last_step() or 0) < 7:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    out, _ = process.communicate()
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    deadline = time.monotonic() + 60
    while ran("stopped").status["status"] == "running":  # the orphans hear of it too
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert ran("stopped").status["status"] == "killed"
    if number != signal.SIGKILL:
        assert "the same command goes on from there" in out
    assert ran("stopped").last_step() < 60
    assert clipbench(*argv, "results_dir=stopped") == 0
    assert ran("stopped").records().equals(ran("whole").records())
    wanted = weights("whole")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights("stopped").items())


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(path.stem for path in (conf_dir() / "task").glob("*.yaml")))
def test_every_task_trains_in_two_processes(task, clipbench):
    argv = ["run", f"task={task}", "preset=mini", "max_steps=4", "eval_every=2", "quiet=true", "nproc=2"]
    # A U-Net with its encoder cut short has parameters without gradient, which DDP must be told of.
    for accumulate in (1, 2) if task == "voc" else (1,):
        assert clipbench(*argv, f"accumulate={accumulate}", f"results_dir=by{accumulate}") == 0
        assert ran(f"by{accumulate}").records()["train/loss"].notna().sum() == 4


@pytest.mark.slow
@pytest.mark.parametrize("start", [["--no-python", "clipbench"], ["-m", "experiments.cli"]], ids=" ".join)
def test_torchrun_starts_the_same_run(start, clipbench, monkeypatch):
    if start[-1] == "clipbench":
        bin_folder = Path(sys.executable).parent
        if not (bin_folder / "clipbench").exists():
            pytest.skip("clipbench is not installed")
        monkeypatch.setenv("PATH", str(bin_folder), prepend=os.pathsep)
    assert clipbench(*COLA, *QUIET, "results_dir=own", "nproc=2") == 0
    torchrun = [*TORCHRUN, *start]
    process = command(*torchrun, *COLA, *QUIET, "results_dir=torchrun")
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    assert [line.split(":")[0] for line in out.splitlines()] == ["ok", str(ran("torchrun").path)]
    assert ran("torchrun").path.parent.name == ran("own").path.parent.name
    assert ran("torchrun").records().equals(ran("own").records())
    process = command(*torchrun, *COLA, *QUIET, "results_dir=torchrun")
    assert process.communicate()[0].startswith("already ok")
    process = command(*torchrun, *COLA, *QUIET, "results_dir=torchrun", "optimizer.lr=-1")
    assert process.communicate()[1].count("Invalid learning rate: -1") == 1
    assert process.returncode != 0


@pytest.mark.slow
def test_under_torchrun_too_a_process_that_fails_ends_the_run_with_its_own_message(tmp_path, monkeypatch):
    (tmp_path / "fails.py").write_text(FAILS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    argv = ["run", "task=quadratic", "quiet=true", "task._target_=fails.Fails", "+task.how=memory"]
    process = command(*TORCHRUN, "-m", "experiments.cli", *argv)
    out, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    assert out.startswith("oom: process 1: ")
    assert ran("results").status["message"] in out


class Indices(torch.utils.data.Dataset):
    def __len__(self):
        return 20

    def __getitems__(self, indices):
        return indices


def test_each_process_reads_its_equal_part_of_every_batch():
    def loader() -> EpochLoader:
        return EpochLoader(Indices(), 6, seed=1, collate_fn=as_is)

    whole, parts = list(loader()), []
    for rank in range(3):
        part = loader()
        part.split(rank, 3)
        parts.append(list(part))
    assert [len(batch) for batch in parts[0]] == [2, 2, 2]
    together = [sorted(itertools.chain(*batches)) for batches in zip(*parts, strict=True)]
    assert together == [sorted(batch) for batch in whole]


TASKS = {
    "regression": lambda: Regression(batch_size=5),
    # 600 nodes to learn from: the last batch is of one.
    "reddit": lambda: Reddit(
        model={"hidden": 8, "aggr": "add"}, num_nodes=1000, batch_size=599, fan_out=[3, 2]
    ),
}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", TASKS)
def test_parts_that_are_not_equal_make_up_the_batch(name, world):
    task = TASKS[name]()
    task.load()
    torch.manual_seed(0)
    model = task.build_model()

    def step(batch) -> tuple[torch.Tensor, ...]:
        output = task.forward(model, batch)
        grads = torch.autograd.grad(output.loss, list(model.parameters()))
        return output.loss.detach(), torch.cat([grad.flatten() for grad in grads]), output.tally

    def batches(rank=None):
        loader = task.train_loader(seed=3)
        if rank is not None:
            loader.split(rank, world)
        loader.set_epoch(1)
        *_, before, last = loader
        return before, last

    for batch, *parts in zip(batches(), *map(batches, range(world)), strict=True):
        loss, grad, tally = step(batch)
        losses, grads, tallies = zip(*map(step, parts), strict=True)
        torch.testing.assert_close(torch.stack(losses).mean(), loss)
        torch.testing.assert_close(torch.stack(grads).mean(0), grad)
        assert task.metrics(sum(tallies)) == pytest.approx(task.metrics(tally))
        sizes = [len(part.get("labels", part.get("targets"))) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert sum(sizes) == len(batch.get("labels", batch.get("targets")))
    if name == "reddit":
        assert min(sizes) == 0
        assert len(parts[0]["inner"]) < len(batch["inner"]) + len(batch["outer"])


def test_batch_norm_sees_the_whole_batch_on_cuda_and_keeps_its_own_on_a_cpu():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    keys = list(model.state_dict())
    assert Ranks(0, 2, torch.device("cpu")).prepare(model) is model
    assert Ranks(0, 1, torch.device("cuda")).prepare(model) is model
    assert isinstance(model[1], torch.nn.BatchNorm1d)
    made = Ranks(0, 2, torch.device("cuda")).prepare(model)
    assert isinstance(made[1], torch.nn.SyncBatchNorm)
    assert list(made.state_dict()) == keys
