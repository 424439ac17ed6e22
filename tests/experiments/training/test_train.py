"""The loop's parts: time, records, divergence, what a person sees."""

from __future__ import annotations

import io
import math

import pytest
import torch

import torch_clip
from experiments.tasks.cola import CoLA
from experiments.tasks.quadratic import Quadratic
from experiments.training import loop_cost
from experiments.training.batches import Batches
from experiments.training.clock import PARTS, CudaClock, HostClock
from experiments.training.precision import Precision
from experiments.training.progress import SECONDS_BETWEEN_LINES, Progress
from experiments.training.ranks import Ranks
from experiments.training.recorder import DIVERGED_AFTER, Diverged, Recorder
from experiments.training.state import State
from experiments.training.summary import Results
from experiments.training.train import Budget, train
from torch_clip import ClippedSGD
from torch_clip.methods import LinearRandAutoClip


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


def show(stream: io.StringIO, *, quiet: bool = False, metric: str = "mcc", first: int = 0) -> str:
    time = FakeTime()
    results = Results(metric, higher_is_better=True)
    results.steps = first
    progress = Progress(first + 8, metric, results, quiet=quiet, stream=stream, now=time)
    for seconds, records in (
        (0.0, [step_record(first + 1, 1.0), step_record(first + 2, 0.0)]),
        (SECONDS_BETWEEN_LINES, [step_record(first + 3, 0.0), step_record(first + 4, 0.0)]),
        (0.0, [{"step": first + 4, "epoch": 0.2, f"val/{metric}": 0.25}]),
        (SECONDS_BETWEEN_LINES - 1, [step_record(first + 5, 0.0)]),
    ):
        time.now += seconds
        results.add(records)
        progress.show(records)
    progress.close()
    return stream.getvalue()


def test_progress_prints_lines_without_a_terminal_a_bar_with_one_and_nothing_when_quiet():
    lines = show(io.StringIO()).splitlines()
    assert lines == [
        "step 4/8  loss 0.5  lr 0.01  clipped 25.0%  30 s, 30 s left",
        "step 4/8  loss 0.5  lr 0.01  clipped 25.0%  mcc 0.25  30 s, 30 s left",
    ]
    bar = show(Terminal())
    assert "5/8" in bar
    assert "mcc 0.25" in bar
    assert "clipped 20.0%" in bar
    assert show(io.StringIO(), quiet=True) == show(Terminal(), quiet=True) == ""
    assert "loss 0.5  lr 0.01  clipped 25.0%  val loss 0.25" in show(io.StringIO(), metric="loss")


def test_the_time_left_of_a_resumed_run_follows_from_its_own_steps():
    line = show(io.StringIO(), first=100).splitlines()[0]
    assert line.startswith("step 104/108")
    assert line.endswith("30 s, 30 s left")
    assert "100/108" in show(Terminal(), first=100).split("step/s")[0]


@pytest.mark.parametrize(("higher_is_better", "step"), [(True, 6), (False, 4)])
def test_best_is_the_largest_or_the_smallest_and_never_nan(higher_is_better, step):
    values = {2: math.nan, 4: 0.25, 6: 0.75, 8: 0.5}
    results = Results("distance", higher_is_better)
    results.add([step_record(1, 1.0)])
    better = {}
    for at, value in values.items():
        results.add([{"step": at, "epoch": 0.1, "val/distance": value}])
        assert results.best == {} or not math.isnan(results.best["value"])
        better[at] = results.at_best
    assert results.as_dict()["best"] == {"step": step, "value": values[step]}
    assert results.as_dict()["final"]["val/distance"] == 0.5
    assert better == {at: at in ((4, 6) if higher_is_better else (4,)) for at in values}


def test_results_go_on_where_they_were_saved():
    whole, first, second = (Results("distance", higher_is_better=True) for _ in range(3))
    head = [step_record(1, 1.0), {"step": 1, "epoch": 0.1, "val/distance": 0.5}]
    tail = [step_record(2, 0.0), {"step": 2, "epoch": 0.2, "val/distance": 0.25}]
    whole.add(head + tail)
    first.add(head)
    second.load_state_dict(first.state_dict())
    second.add(tail)
    assert second.as_dict() == whole.as_dict()
    assert second.clip_fraction == 0.5


@pytest.mark.parametrize("every", [1, 7, 100])
def test_records_end_where_the_run_diverged_however_often_one_looks(every):
    recorder, records = recorded([]), []
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = ClippedSGD([weight], lr=0.1)

    def train() -> None:
        for step, loss in enumerate([1.0] * 5 + [math.nan] * 100, start=1):
            weight.grad = torch.tensor([2.0])
            optimizer.step()
            recorder.add({"step": step}, torch.tensor(loss), optimizer)
            if step % every == 0:
                records.extend(recorder.flush())
                recorder.check(records[-1]["step"], last=False)

    with pytest.raises(Diverged, match=f"up to step {5 + DIVERGED_AFTER} are"):
        train()
    assert [record["step"] for record in records] == list(range(1, 6 + DIVERGED_AFTER))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_between_two_looks_the_host_never_waits_for_the_device(monkeypatch):
    device = torch.device("cuda")
    task = Quadratic()
    model = task.build_model().to(device)
    optimizer = torch_clip.clip(torch.optim.AdamW(model.parameters(), fused=True), LinearRandAutoClip())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0)
    precision, recorder, flush = Precision("fp32", device), Recorder(20, device), Recorder.flush
    batches, clock = Batches(task.train_loader(0)), CudaClock()
    scaler, ranks = precision.scaler(), Ranks(0, 1, device)
    state = State(model, optimizer, schedule, scaler, batches, recorder, clock, ranks)

    def looks(recorder):
        torch.cuda.set_sync_debug_mode("default")
        return flush(recorder)

    monkeypatch.setattr(Recorder, "flush", looks)
    moments = train(task, state, Budget(100, 100, 20, 100), precision, device=device)
    next(moments)  # what is made once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(next(moments).records) == 20
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_loop_cost_times_all_contenders_on_the_same_batches(monkeypatch):
    seen, forward = {}, CoLA.forward

    def noted(task, model, batch):
        seen.setdefault(id(model), []).append(batch["labels"].tolist())
        return forward(task, model, batch)

    monkeypatch.setattr(CoLA, "forward", noted)
    monkeypatch.setattr(loop_cost, "STEPS", 2)
    told = loop_cost.loop_cost(torch.device("cpu"), rounds=2, warm_up=1)
    assert list(told) == ["by hand", "runner", "runner, recording nothing"]
    assert all(milliseconds > 0 and ratio > 0 for milliseconds, ratio in told.values())
    assert told["by hand"][1] == 1.0
    by_hand, *others = seen.values()
    assert len(by_hand) == 6
    assert all(other == by_hand for other in others)
