"""The loop's parts: time, records, divergence, what a person sees."""

from __future__ import annotations

import io
import math

import pytest
import torch

from experiments.training.clock import PARTS, CudaClock, HostClock
from experiments.training.progress import Progress
from experiments.training.train import DIVERGED_AFTER, Diverged, Recorder
from torch_clip import ClippedSGD


class FakeTime:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_clock_gives_each_part_its_time_and_nothing_between_stretches():
    time = FakeTime()
    clock = HostClock(time)
    for _ in range(3):
        clock.start()
        for seconds, part in zip((1.0, 2.0, 4.0, 8.0), PARTS, strict=True):
            time.now += seconds
            clock.lap(part)
        time.now += 100.0  # an evaluation
    clock.settle()
    assert clock.seconds == dict(zip(PARTS, (3.0, 6.0, 12.0, 24.0), strict=True))


def test_cuda_clock_reads_its_marks_only_when_settled(monkeypatch):
    time, waits = FakeTime(), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = time.now

        def synchronize(self):
            waits.append(time.now)

        def elapsed_time(self, later):
            return 1e3 * (later.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = CudaClock()
    for _ in range(2):
        for _ in range(2):
            clock.start()
            for seconds, part in zip((1.0, 2.0, 4.0, 8.0), PARTS, strict=True):
                time.now += seconds
                clock.lap(part)
            time.now += 100.0
        assert len(waits) == sum(clock.seconds.values()) / 30
        clock.settle()
    clock.settle()
    assert clock.seconds == dict(zip(PARTS, (4.0, 8.0, 16.0, 32.0), strict=True))


def test_rows_that_wait_on_the_device_come_over_as_the_same_records(monkeypatch):
    losses = [0.5, 0.25, math.nan]
    here = recorded(losses).flush()
    for module in ("scalars", "norms"):
        monkeypatch.setattr(f"torch_clip.{module}.on_host", lambda tensor: False)
    there = recorded(losses, host=False)
    assert str(there.flush()) == str(here)
    assert there.flush() == []


def recorded(losses: list[float], *, host: bool = True) -> Recorder:
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = ClippedSGD([weight], lr=0.1)
    recorder = Recorder(len(losses), torch.device("cpu"))
    if not host:  # as on a device, in tensors that happen to lie here
        recorder._host, recorder._device_rows = False, torch.empty(len(losses), len(Recorder.COLUMNS))
    for step, loss in enumerate(losses, 1):
        weight.grad = torch.tensor([2.0])
        optimizer.step()
        recorder.add({"step": step, "epoch": 0.0, "lr": 0.1}, torch.tensor(loss), optimizer)
    return recorder


def test_records_hold_what_the_clipping_did():
    first, second = recorded([0.5, 0.25]).flush()
    assert first == {
        "step": 1,
        "epoch": 0.0,
        "lr": 0.1,
        "train/loss": 0.5,
        "grad_norm": 2.0,
        "threshold": 1.0,
        "clip_coef": 0.5,
        "clipped": 1.0,
    }
    assert second["step"] == 2


@pytest.mark.parametrize(
    ("losses", "last", "diverged"),
    [
        ([math.nan] * DIVERGED_AFTER, False, True),
        ([math.inf] * (DIVERGED_AFTER - 1), False, False),
        ([math.nan] * (DIVERGED_AFTER - 1) + [1.0], True, False),  # a few bad batches, then well
        ([1.0, math.nan], True, True),
    ],
)
def test_many_losses_that_are_not_finite_are_divergence(losses, last, diverged):
    recorder = recorded(losses)
    recorder.flush()
    if diverged:
        with pytest.raises(Diverged, match="not finite"):
            recorder.check(len(losses), last)
    else:
        recorder.check(len(losses), last)
        assert recorder.flush() == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def step_record(step: int, clipped: float) -> dict[str, float]:
    return {"step": step, "epoch": 0.1, "train/loss": 0.5, "lr": 0.01, "clipped": clipped}


def show(stream: io.StringIO, *, quiet: bool = False) -> str:
    time = FakeTime()
    progress = Progress(8, "mcc", quiet=quiet, stream=stream, now=time)
    progress.show([step_record(1, 1.0), step_record(2, 0.0)])
    time.now = 10.0
    progress.show([step_record(3, 0.0), step_record(4, 0.0)])
    progress.show([{"step": 4, "epoch": 0.2, "val/mcc": 0.25}])
    progress.close()
    return stream.getvalue()


def test_progress_prints_lines_without_a_terminal_a_bar_with_one_and_nothing_when_quiet():
    lines = show(io.StringIO()).splitlines()
    assert lines == [
        "step 4/8  loss 0.5  lr 0.01  clipped 25.0%  10 s, 10 s left",
        "step 4/8  loss 0.5  lr 0.01  clipped 25.0%  mcc 0.25  10 s, 10 s left",
    ]
    bar = show(Terminal())
    assert "4/8" in bar
    assert "mcc 0.25" in bar
    assert "clipped 25.0%" in bar
    assert show(io.StringIO(), quiet=True) == show(Terminal(), quiet=True) == ""
