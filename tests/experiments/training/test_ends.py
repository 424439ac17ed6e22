"""Every way that a run can end, and what the same command does next."""

from __future__ import annotations

import errno
import os
import signal

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from experiments import runs
from experiments.runs import STATUSES, Run, find_runs
from experiments.tasks.quadratic import Quadratic
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


def fail():
    raise RuntimeError("no such luck")


# What happens at step 15 -> status, exit code, words of the message, whether the same command goes on.
ENDS = {
    "ok": (lambda: None, "ok", 0, "best", False),
    "SIGTERM": (lambda: signal.raise_signal(signal.SIGTERM), "killed", 143, "SIGTERM after step 15", True),
    "SIGINT": (lambda: signal.raise_signal(signal.SIGINT), "killed", 130, "SIGINT after step 15", True),
    "interrupted at once": (interrupt, "killed", 130, "goes on from its last checkpoint", True),
    "no memory": (allocate, "oom", 1, "lower task.batch_size", False),
    "no device memory": (allocate_on_a_device, "oom", 1, "2.00 EiB; lower task.batch_size", False),
    "exception": (fail, "error", 1, "RuntimeError: no such luck", False),
}


@pytest.mark.parametrize("end", ENDS)
def test_every_end_has_its_status_and_its_way_on(end, clipbench, monkeypatch, capsys):
    do, status, code, words, goes_on = ENDS[end]
    with monkeypatch.context() as patch:
        at_step(patch, 15, do)
        assert clipbench(*RUN) == code
    told = capsys.readouterr().out
    assert told.startswith(f"{status}: ")
    assert words in told
    run = the_run()
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


def test_a_run_out_of_time_goes_on_until_it_is_done(clipbench, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(Stop, "__init__", lambda self, limit: init(self, limit, lambda: clock[0]))
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
