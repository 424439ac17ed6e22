"""A run that was stopped anywhere and goes on has the numbers of one that was not, bit for bit."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import random
import signal
import time
from multiprocessing.process import BaseProcess

import pandas as pd
import pytest
import torch

import torch_clip
from experiments import cli
from experiments.runs import Run, find_runs
from experiments.tasks import cola
from experiments.tasks.base import EpochLoader, as_is
from experiments.tasks.quadratic import Quadratic
from experiments.tasks.samples.cola import generate
from experiments.training.batches import Batches
from experiments.training.clock import HostClock
from experiments.training.precision import Precision
from experiments.training.presets import conf_dir
from experiments.training.ranks import Ranks
from experiments.training.recorder import Recorder
from experiments.training.state import State, seed_everything
from experiments.training.train import Budget, train

CPU = torch.device("cpu")
STEPS = 40
SHORT = ["task=quadratic", f"max_steps={STEPS}", "eval_every=10", "log_every=3", "quiet=true", "keep=last"]


class Killed(BaseException):
    """Nothing between here and the test may catch it, as nothing catches SIGKILL."""


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def same(a: object, b: object) -> bool:
    """Whether nested containers hold the same bits."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
    return a == b or (a != a and b != b)


def outcome(run: Run) -> tuple[pd.DataFrame, dict]:
    """Records, and all that the last checkpoint holds but the time it took."""
    saved = torch.load(run.checkpoint_path("last"), weights_only=True)
    del saved["state"]["seconds"]
    return run.records(), saved


def expect_same(run: Run, whole: Run) -> None:
    assert run.status["status"] == whole.status["status"] == "ok"
    (records, saved), (wanted, expected) = outcome(run), outcome(whole)
    pd.testing.assert_frame_equal(records, wanted, check_exact=True)
    assert same(saved, expected)
    timed = {"seconds", "steps_per_second", "time", "peak_memory_bytes"}
    summary, other = ({k: v for k, v in r.summary().items() if k not in timed} for r in (run, whole))
    assert summary == other


def the_run(root: str) -> Run:
    (run,) = find_runs(root)
    return run


@pytest.fixture
def kill_at(monkeypatch):
    """Make the run die at the n-th time that it touches its folder while it trains."""

    def arm(n: int) -> None:
        left = n
        append, checkpoint = Run.append, Run.write_checkpoint

        def touch() -> None:
            nonlocal left
            left -= 1
            if not left:
                monkeypatch.setattr(Run, "append", append)
                monkeypatch.setattr(Run, "write_checkpoint", checkpoint)
                raise Killed

        @contextlib.contextmanager
        def checkpointed(run, name):
            touch()
            with checkpoint(run, name) as file:
                yield file
                touch()  # written, but without its name yet

        def appended(run, records):
            touch()
            append(run, records)

        monkeypatch.setattr(Run, "append", appended)
        monkeypatch.setattr(Run, "write_checkpoint", checkpointed)

    return arm


def interrupted(clipbench, kill_at, n: int, *argv: str) -> None:
    kill_at(n)
    with pytest.raises(Killed):
        clipbench(*argv)
    assert the_run("b").status["status"] == "killed"
    assert clipbench(*argv) == 0


@pytest.mark.parametrize("name", torch_clip.CLIPPINGS)
def test_every_clipping_goes_on_bit_for_bit(name):
    stop = random.Random(name).randrange(1, STEPS)

    def leg(steps: int, saved: io.BytesIO | None = None) -> tuple[list, State]:
        seed_everything(3)
        task = Quadratic()
        model = task.build_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, fused=True)
        torch_clip.clip(optimizer, torch_clip.CLIPPINGS[name]())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / 100)
        precision = Precision("fp32", CPU)
        batches = Batches(task.train_loader(3))
        state = State(
            model,
            optimizer,
            schedule,
            precision.scaler(),
            batches,
            Recorder(5, CPU),
            HostClock(),
            Ranks(0, 1, CPU),
        )
        if saved is not None:
            saved.seek(0)
            state.load_state_dict(torch.load(saved, weights_only=True))
        moments = train(task, state, Budget(steps, 10, 5, 1), precision, device=CPU)
        records = [record for moment in moments for record in moment.records if "lr" in record]
        return records, state

    wanted, whole = leg(STEPS)
    head, first = leg(stop)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    tail, second = leg(STEPS, file)
    assert head + tail == wanted
    ends = [state.state_dict() for state in (whole, second)]
    for end in ends:
        del end["seconds"]
    assert same(*ends)


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in ("scheduler", "optimizer") for name in options(group)]
)
def test_every_scheduler_and_optimizer_goes_on_bit_for_bit(group, name, clipbench, kill_at):
    argv = ["run", *SHORT, "checkpoint_every=4", "warmup_steps=9", "clipping=linear_rand_norm"]
    argv.append(f"{group}={name}")
    assert clipbench(*argv, "results_dir=a") == 0
    interrupted(clipbench, kill_at, random.Random(name).randrange(8, 30), *argv, "results_dir=b")
    expect_same(the_run("b"), the_run("a"))


def test_killed_wherever_it_writes_and_however_often(clipbench, kill_at):
    argv = ["run", "clipping=linear_rand_autoclip", *SHORT, "checkpoint_every=8", "max_steps=20"]
    assert clipbench(*argv, "results_dir=a") == 0
    for n in range(1, 100):
        kill_at(n)
        try:
            assert clipbench(*argv, "results_dir=b") == 0
        except Killed:
            run = the_run("b")
            assert run.status["status"] == "killed"
            assert (run.last_step() or 0) <= 20
        else:
            break
    assert n > 8
    expect_same(the_run("b"), the_run("a"))
    assert not list(the_run("b").path.rglob(".*.tmp"))


def test_records_after_the_checkpoint_are_dropped_and_written_again(clipbench, kill_at):
    argv = ["run", *SHORT, "log_every=1", "checkpoint_every=15", "results_dir=b"]
    kill_at(24)
    with pytest.raises(Killed):
        clipbench(*argv)
    run = the_run("b")
    saved = torch.load(run.checkpoint_path("last"), weights_only=True)
    assert saved["step"] == 15
    assert run.last_step() > 15
    assert clipbench(*argv) == 0
    steps = run.records().dropna(subset="lr")["step"]
    assert steps.tolist() == list(range(1, STEPS + 1))


DROPOUT = [
    *("task=cola", "task.num_train=200", "task.num_val=60", "task.batch_size=16", "max_steps=30"),
    *("preset.model.config.hidden_dropout_prob=0.3", "eval_every=10", "checkpoint_every=7", "log_every=3"),
    *("quiet=true", "keep=last", "clipping=quadratic_rand_norm", "warmup_steps=4"),
]


def test_dropout_and_the_middle_of_an_epoch_go_on_bit_for_bit(clipbench, kill_at):
    assert clipbench("run", *DROPOUT, "results_dir=a") == 0
    interrupted(clipbench, kill_at, 19, "run", *DROPOUT, "results_dir=b")
    expect_same(the_run("b"), the_run("a"))


@pytest.mark.parametrize("body", ["frozen", "cached"])
def test_the_head_of_a_frozen_body_goes_on_bit_for_bit(body, clipbench, kill_at, tmp_path):
    """With published files: made of the embedded sentences."""
    folder = tmp_path / "cola_public"
    (folder / "raw").mkdir(parents=True)
    for name, sentences in zip(cola.FILES, (generate(200, 20)[0], *[generate(1, 20)[1]] * 2), strict=True):
        (folder / name).write_text("".join(f"own\t{s.label}\t\t{s.text}\n" for s in sentences))
    argv = ["run", *DROPOUT, f"task.body={body}", "task.split=holdout", f"data_dir={folder}"]
    assert clipbench(*argv, "results_dir=a") == 0
    interrupted(clipbench, kill_at, 19, *argv, "results_dir=b")
    expect_same(the_run("b"), the_run("a"))


def test_fp16_goes_on_with_its_scale(clipbench, kill_at):
    argv = ["run", *DROPOUT, "precision=fp16", "accumulate=2", "max_steps=12"]
    assert clipbench(*argv, "results_dir=a") == 0
    interrupted(clipbench, kill_at, 9, *argv, "results_dir=b")
    expect_same(the_run("b"), the_run("a"))
    scaler = outcome(the_run("a"))[1]["state"]["scaler"]
    assert scaler["scale"] != 65536.0 or scaler["_growth_tracker"] == 12


class Numbers(torch.utils.data.Dataset):
    def __init__(self):
        self.read = []

    def __len__(self):
        return 12

    def __getitems__(self, indices):
        self.read.append(indices)
        return {"x": torch.tensor(indices)}


@pytest.mark.parametrize("consumed", range(1, 10))
def test_batches_already_taken_are_not_read_again(consumed):
    def stream() -> tuple[Batches, Numbers]:
        numbers = Numbers()
        return Batches(EpochLoader(numbers, 4, seed=5, collate_fn=as_is)), numbers

    whole, _ = stream()
    wanted = [next(whole)["x"].tolist() for _ in range(12)]
    first, _ = stream()
    for _ in range(consumed):
        next(first)
    second, numbers = stream()
    second.load_state_dict(first.state_dict())
    assert second.epochs == consumed / 3
    assert [next(second)["x"].tolist() for _ in range(12 - consumed)] == wanted[consumed:]
    assert numbers.read == wanted[consumed:]


def test_processes_that_load_pictures_change_neither_numbers_nor_name(clipbench, capsys):
    argv = ["run", "task=imagenet", "preset=mini", "task.num_train=48", "task.num_val=16", "quiet=true"]
    argv += ["task.batch_size=8", "max_steps=9", "eval_every=9", "log_every=1", "keep=last"]
    assert clipbench(*argv, "results_dir=a") == 0
    assert clipbench(*argv, "task.num_workers=2", "results_dir=b") == 0
    expect_same(the_run("b"), the_run("a"))
    assert clipbench(*argv, "task.num_workers=2", "results_dir=a") == 0
    assert capsys.readouterr().out.splitlines()[-2].startswith("already ok")


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start a process of one thread that runs clipbench: forked, it is there at once; spawned, all new."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("experiments.analysis.draw.draw_curves", lambda run: None)  # of the forked
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # those of a parent do not survive a fork
    started = []

    def start(method: str, argv: list[str], root: str) -> BaseProcess:
        arguments = (["run", *argv, f"results_dir={root}"],)
        process = multiprocessing.get_context(method).Process(target=cli._dispatch, args=arguments)
        process.start()
        started.append(process)
        return process

    yield start
    torch.set_num_threads(threads)
    for process in started:
        process.kill()
        process.join()
        process.close()


def kill_until_done(start, method: str, argv: list[str], root: str, kills: int, most: int) -> int:
    """Start, SIGKILL at most so many new steps later, start again, a few times; return how often."""
    chance, killed = random.Random(1), 0
    while True:
        steps = reached(root) + chance.randrange(1, most)
        process = start(method, argv, root)
        while killed < kills and process.is_alive():
            if reached(root) >= steps:
                process.kill()
                break
            time.sleep(0.002)
        process.join()
        if process.exitcode != -signal.SIGKILL:
            return killed
        killed += 1


def reached(root: str) -> int:
    found = find_runs(root)
    return (found[0].last_step() or 0) if found else 0


def test_a_process_killed_at_random_points_ends_with_the_same_bits(start):
    argv = ["task=quadratic", "clipping=quadratic_rand_autoclip", "optimizer=adamw", "scheduler=step"]
    argv += ["max_steps=1500", "eval_every=100", "checkpoint_every=30", "log_every=7"]
    argv += ["keep=last", "quiet=true"]
    start("fork", argv, "a").join()
    assert kill_until_done(start, "fork", argv, "b", kills=4, most=300) >= 2
    expect_same(the_run("b"), the_run("a"))


@pytest.mark.slow
@pytest.mark.parametrize("task", options("task"))
def test_every_task_killed_at_random_points_ends_with_the_same_bits(task, start):
    argv = [f"task={task}", "preset=mini", "max_steps=100", "eval_every=40", "checkpoint_every=4"]
    argv += ["log_every=2", "keep=last", "quiet=true", "clipping=auto_clip"]
    start("spawn", argv, "a").join()
    assert kill_until_done(start, "spawn", argv, "b", kills=2, most=15) >= 1
    expect_same(the_run("b"), the_run("a"))
