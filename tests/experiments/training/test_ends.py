"""Every way that a run can end, and what the same command does next."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from PIL import Image
from torch._utils import ExceptionWrapper

from experiments import runs
from experiments.errors import UserError
from experiments.runs import STATUSES, Run, find_runs
from experiments.tasks.base import EpochSampler
from experiments.tasks.quadratic import Quadratic
from experiments.training.state import State
from experiments.training.stop import Stop

RUN = ["run", "task=quadratic", "max_steps=30", "eval_every=10", "log_every=3", "quiet=true"]


def the_run() -> Run:
    (run,) = find_runs("results")
    return run


def at_step(monkeypatch, step: int, do) -> None:
    """Do something in the forward of a step."""
    forward, steps = Quadratic.forward, []

    def forwarded(task, model, batch):
        steps.append(1)
        if len(steps) == step:
            do()
        return forward(task, model, batch)

    monkeypatch.setattr(Quadratic, "forward", forwarded)


def interrupt():
    raise KeyboardInterrupt


def allocate():
    torch.empty(2**60)


def allocate_on_a_device():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 EiB\nmore")


def allocate_in_a_worker():
    in_a_worker(allocate)


def fail():
    raise RuntimeError("no such luck")


UNREADABLE = "cannot read the picture n01/7.JPEG: it ends too soon"


def find_bad_data():
    raise UserError(UNREADABLE)


def find_bad_data_in_a_worker():
    in_a_worker(find_bad_data)


def in_a_worker(do):
    """Raise what a data loader raises when a worker process of it meets an error."""
    try:
        do()
    except Exception:
        sent = ExceptionWrapper(where="in DataLoader worker process 0")
    sent.reraise()


# What happens at step 15 -> status, exit code, words of the message, whether the same command goes on.
ENDS = {
    "ok": (lambda: None, "ok", 0, "best", False),
    "SIGTERM": (lambda: signal.raise_signal(signal.SIGTERM), "killed", 143, "SIGTERM after step 15", True),
    "SIGINT": (lambda: signal.raise_signal(signal.SIGINT), "killed", 130, "SIGINT after step 15", True),
    "interrupted at once": (interrupt, "killed", 130, "goes on from its last checkpoint", True),
    "no memory": (allocate, "oom", 1, "lower task.batch_size", False),
    "no device memory": (allocate_on_a_device, "oom", 1, "2.00 EiB; lower task.batch_size", False),
    "no memory in a worker": (allocate_in_a_worker, "oom", 1, "can't allocate memory", False),
    "exception": (fail, "error", 1, "RuntimeError: no such luck", False),
    "bad data": (find_bad_data, "error", 1, UNREADABLE, False),
    "bad data in a worker": (find_bad_data_in_a_worker, "error", 1, UNREADABLE, False),
}


@pytest.mark.parametrize("end", ENDS)
def test_every_end_has_its_status_and_its_way_on(end, clipbench, monkeypatch, capsys):
    do, status, code, words, goes_on = ENDS[end]
    with monkeypatch.context() as patch:
        at_step(patch, 15, do)
        assert clipbench(*RUN) == code
    told, complaints = capsys.readouterr()
    assert told.startswith(f"{status}: ")
    assert words in told.splitlines()[0]
    assert ("Traceback" in complaints) == (end == "exception")
    run = the_run()
    if "bad data" in end:
        assert complaints == f"clipbench: {UNREADABLE}\n"
        assert run.status["message"] == UNREADABLE
    assert run.status["status"] == run.summary()["status"] == status
    steps = run.records()["step"].max()
    before = (run.path / "status.json").read_bytes()
    if goes_on:
        assert steps == (15 if "SIG" in end else 12)
        assert clipbench(*RUN) == 0
        assert run.records()["lr"].count() == 30
        return
    assert clipbench(*RUN) == code
    assert f"already {status}" in capsys.readouterr().out
    assert (run.path / "status.json").read_bytes() == before
    assert clipbench(*RUN, "force=true") == 0
    assert (run.status["status"], run.records()["lr"].count()) == ("ok", 30)


def test_a_picture_that_a_worker_cannot_read_is_named_in_the_middle_of_training(clipbench, capsys):
    for split in ("train", "val"):
        for place in range(32):
            path = Path("pictures", split, "dark" if place < 16 else "light", f"{place:02}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (32, 32), 8 * place).save(path)
    *_, last = EpochSampler(32, 4, seed=0)
    (path,) = Path("pictures/train").rglob(f"{last[0]:02}.png")
    path.write_bytes(path.read_bytes()[:40])
    argv = ["run", "task=imagenet", "preset=mini", "data_dir=pictures", "task.batch_size=4", "quiet=true"]
    assert clipbench(*argv, "task.num_workers=1", "max_steps=8", "eval_every=8", "log_every=1") == 1
    told, complaints = capsys.readouterr()
    run = the_run()
    message = run.status["message"]
    assert message.startswith(f"cannot read the picture {path}: ")
    assert complaints == f"clipbench: {message}\n"
    assert told == f"error: {message}\n{run.path}\n"
    assert run.status["status"] == "error"
    assert run.records()["step"].tolist() == [1, 2, 3, 4, 5, 6, 7]


def out_of_memory(*args, **kwargs):
    raise MemoryError


def out_of_device_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 EiB")


def compiled_by(backend):
    """A ``torch.nn.Module.compile`` that does."""
    whole = torch.nn.Module.compile
    return lambda model: whole(model, backend=backend)


# Before the first step: what fails, and how -> status, words of the message.
STARTS = {
    "data": (Quadratic, "load", out_of_memory, "oom", "MemoryError; shrink the model or its data"),
    "model": (Quadratic, "build_model", lambda task: torch.empty(2**60), "oom", "can't allocate memory"),
    "optimizer": (torch.optim.SGD, "__init__", out_of_device_memory, "oom", "2.00 EiB; shrink the model"),
    "compile": (torch.nn.Module, "compile", compiled_by(out_of_memory), "oom", "MemoryError"),
    "defect": (Quadratic, "build_model", lambda task: fail(), "error", "RuntimeError: no such luck"),
}


@pytest.mark.parametrize("start", STARTS)
def test_what_fails_before_the_first_step_is_told_by_the_runs_folder(start, clipbench, monkeypatch, capsys):
    where, name, instead, status, words = STARTS[start]
    argv = [*RUN, f"compile={str(start == 'compile').lower()}"]
    with monkeypatch.context() as patch:
        patch.setattr(where, name, instead)
        assert clipbench(*argv) == 1
    told, complaints = capsys.readouterr()
    run = the_run()
    first, second = told.splitlines()
    assert first.startswith(f"{status}: ")
    assert words in first
    assert second == str(run.path)
    assert ("Traceback" in complaints) == (status == "error")
    assert run.status["status"] == run.summary()["status"] == status
    assert f"{status}: {run.status['message']}" == first
    assert (run.last_step(), run.summary()["final"], len(run.records())) == (0, {}, 0)
    assert clipbench(*argv) == 1
    assert "failed before" in capsys.readouterr().out
    assert clipbench("list", "runs") == 0
    assert clipbench(*RUN, "force=true") == 0
    found = {run.status["status"] for run in find_runs("results")}
    assert found == ({"ok", "oom"} if start == "compile" else {"ok"})


def test_a_failure_before_the_first_step_takes_nothing_from_what_was_reached(clipbench, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_step(patch, 15, lambda: signal.raise_signal(signal.SIGTERM))
        clipbench(*RUN)
    run = the_run()
    for where, name in [(Quadratic, "load"), (State, "load_state_dict")]:
        with monkeypatch.context() as patch:
            patch.setattr(where, name, out_of_memory)
            assert clipbench(*RUN) == 1
        assert "oom: MemoryError; shrink" in capsys.readouterr().out
        assert (run.status["status"], run.records()["step"].max()) == ("killed", 15)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", out_of_memory)
        assert clipbench(*RUN) == 2
    assert "memory has run out reading the checkpoint" in capsys.readouterr().err
    assert clipbench(*RUN) == 0
    assert run.records()["lr"].count() == 30
    with monkeypatch.context() as patch:
        patch.setattr(Quadratic, "load", out_of_memory)
        assert clipbench(*RUN, "force=true") == 1
    assert (run.status["status"], run.records()["lr"].count()) == ("ok", 30)


def test_a_run_out_of_time_goes_on_until_it_is_done(clipbench, capsys, monkeypatch):
    clock = [0.0]
    now = {"now": lambda: clock[0]}
    monkeypatch.setattr(Stop, "__init__", lambda self, limit, **options: init(self, limit, **now, **options))
    at_step(monkeypatch, 7, lambda: clock.__setitem__(0, 60.0))
    assert clipbench(*RUN, "max_seconds=60") == 1
    assert "timeout: max_seconds were over after step 7; the same command goes on" in capsys.readouterr().out
    assert the_run().status["status"] == "timeout"
    assert clipbench(*RUN, "max_seconds=60") == 0
    assert the_run().records()["lr"].count() == 30


init = Stop.__init__


def test_a_diverged_run_stands(clipbench, capsys):
    argv = [*RUN, "clipping=no_clip", "optimizer.lr=1e30", "clipping.nonfinite=propagate"]
    assert clipbench(*argv) == 0
    assert "diverged" in capsys.readouterr().out
    assert the_run().status["status"] == "diverged"
    assert clipbench(*argv) == 0
    assert "already diverged" in capsys.readouterr().out


def test_every_status_has_been_seen():
    seen = {status for _, status, *_ in ENDS.values()}
    assert seen | {"timeout", "diverged", "running"} == set(STATUSES)  # running: test_runs.py


def test_a_second_interrupt_does_not_wait():
    stop = Stop(None)
    before = signal.getsignal(signal.SIGINT)
    with stop:
        signal.raise_signal(signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def full_disk(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullFile:
    """Takes what fits, and then nothing."""

    def __init__(self, file, room):
        self._file, self._room = file, room

    def write(self, content):
        self._room -= len(content)
        return self._file.write(content) if self._room >= 0 else full_disk()

    def __getattr__(self, name):
        return getattr(self._file, name)


@pytest.mark.parametrize("what", ["records", "checkpoint", "half a checkpoint", "end"])
def test_a_full_disk_loses_nothing_and_the_same_command_goes_on(what, clipbench, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        if what == "records":
            at_step(patch, 15, lambda: patch.setattr(Run, "append", full_disk))
        elif what == "checkpoint":
            at_step(patch, 15, lambda: patch.setattr(runs.os, "fsync", full_disk))
        elif what == "half a checkpoint":
            save = torch.save
            at_step(patch, 15, lambda: patch.setattr(torch, "save", lambda x, f: save(x, FullFile(f, 500))))
        else:
            at_step(patch, 30, lambda: patch.setattr(Run, "finish", full_disk))
        assert clipbench(*RUN) == 1
    run = the_run()
    told = capsys.readouterr().out
    assert "cannot write the run: No space left on device; once that is mended, the same command" in told
    assert run.status["status"] == "killed"
    kept = run.records()["step"].max()
    assert kept == {"records": 12, "end": 30}.get(what, 20)
    assert not list(run.path.rglob(".*.tmp"))
    assert torch.load(run.checkpoint_path("last"), weights_only=True)["step"] == (20 if what == "end" else 10)
    assert clipbench(*RUN) == 0
    assert run.records()["lr"].count() == 30


def test_another_number_of_threads_is_said(clipbench, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 15, lambda: signal.raise_signal(signal.SIGTERM))
        clipbench(*RUN)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    capsys.readouterr()
    assert clipbench(*RUN) == 0
    assert "goes on with 77, which changes the last bits" in capsys.readouterr().err
    assert the_run().summary()["threads"] == 77


def test_a_damaged_checkpoint_is_named_and_nothing_is_lost(clipbench, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 15, lambda: signal.raise_signal(signal.SIGTERM))
        clipbench(*RUN)
    run = the_run()
    run.checkpoint_path("last").write_bytes(b"PK")
    assert clipbench(*RUN) == 2
    assert "cannot read the checkpoint" in capsys.readouterr().err
    assert run.records()["step"].max() == 15
    assert clipbench(*RUN, "force=true") == 0


KEPT = {
    "none": [],
    "best": ["best"],
    "last": ["last"],
    "all": ["best", "last", "step=10", "step=20", "step=30"],
}


@pytest.mark.parametrize("keep", KEPT)
def test_what_stays_of_the_checkpoints(keep, clipbench, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 15, lambda: signal.raise_signal(signal.SIGTERM))
        clipbench(*RUN, f"keep={keep}")
    run = the_run()
    assert run.checkpoint_path("last").exists()
    assert clipbench(*RUN, f"keep={keep}") == 0
    found = sorted(path.stem for path in run.checkpoints_dir.glob("*"))
    extra = ["step=15"] if keep == "all" else []
    assert found == sorted(KEPT[keep] + extra)
    assert run.checkpoints_dir.exists() == bool(found)
    if "best" in found:
        best = torch.load(run.checkpoint_path("best"), weights_only=True)
        assert {"step": best["step"], "value": best["value"]} == run.summary()["best"]
        assert set(best["model"]) == {"x", "curvature", "recent", "steps"}


def test_best_holds_the_weights_that_were_evaluated(clipbench):
    """SSTM is evaluated at another point than it trains at."""
    assert clipbench(*RUN, "optimizer=sstm", "keep=all", "eval_every=30", "max_steps=30") == 0
    run = the_run()
    best, last = (torch.load(run.checkpoint_path(name), weights_only=True) for name in ("best", "last"))
    assert not torch.equal(best["model"]["x"], last["state"]["model"]["x"])


def test_a_run_that_another_process_finished_meanwhile_is_not_run_again(clipbench, monkeypatch, capsys):
    load = Quadratic.load

    def meanwhile(task):
        load(task)
        monkeypatch.setattr(Quadratic, "load", load)
        GlobalHydra.instance().clear()  # or it would not run within itself
        assert clipbench(*RUN) == 0

    monkeypatch.setattr(Quadratic, "load", meanwhile)
    assert clipbench(*RUN) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[::2]] == ["ok", "already ok"]
