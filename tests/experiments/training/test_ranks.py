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
from experiments.training.presets import conf_dir
from experiments.training.ranks import Ranks

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

QUADRATIC = ["run", "task=quadratic", "max_steps=40", "eval_every=20", "clipping=linear_rand_norm"]
COLA = [
    *("run", "task=cola", "task.num_train=320", "task.num_val=60", "task.batch_size=16", "warmup_steps=0"),
    *("max_steps=8", "eval_every=4", "optimizer=sgd", "optimizer.lr=0.05", "clipping=auto_clip"),
]
QUIET = ["quiet=true", "keep=last"]


def ran(root: str) -> Run:
    (run,) = find_runs(root)
    return run


def weights(root: str) -> dict[str, torch.Tensor]:
    return torch.load(ran(root).checkpoint_path("last"), weights_only=True)["state"]["model"]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize("argv", [QUADRATIC, COLA], ids=["quadratic", "cola"])
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
def test_torchrun_starts_the_same_run(clipbench, tmp_path):
    Path("main.py").write_text("from experiments.cli import main\nmain()\n")
    assert clipbench(*COLA, *QUIET, "results_dir=own", "nproc=2") == 0
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "main.py"]
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


def test_batch_norm_sees_the_whole_batch_on_cuda_and_keeps_its_own_on_a_cpu():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    keys = list(model.state_dict())
    assert Ranks(0, 2, torch.device("cpu")).prepare(model) is model
    assert Ranks(0, 1, torch.device("cuda")).prepare(model) is model
    assert isinstance(model[1], torch.nn.BatchNorm1d)
    made = Ranks(0, 2, torch.device("cuda")).prepare(model)
    assert isinstance(made[1], torch.nn.SyncBatchNorm)
    assert list(made.state_dict()) == keys
