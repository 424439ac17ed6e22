"""One job of a sweep, in whatever process a launcher runs it: the frozen config, and nothing else."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.errors import UserError, not_installed
from experiments.runs import RunLocked
from experiments.sweeps import Job, Sweep

if TYPE_CHECKING:
    from experiments.training.run import Outcome

SECONDS_BETWEEN_LOOKS = 0.3


class Ended(NamedTuple):
    """What became of a job, as its process tells it."""

    index: int
    status: str
    """Of the run; or ``refused``: its input is bad, ``elsewhere``: another process has it, ``stopped``: the
    launch was over."""
    message: str
    signal: int | None = None
    """What ended it, if a signal did."""


class Interrupted(BaseException):
    """A signal ends the launch; nothing on the way may take it for an error."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run_job(
    sweep: Sweep,
    launch: str | None,
    job: Job,
    *,
    force: bool,
    quiet: bool | None,
    afterwards: Callable[[Outcome], None],
) -> Ended:
    """Run a job of a sweep, unless another process does.

    Args:
        sweep: that the job is of.
        launch: that the job must not outlive; None where it may.
        job: of its jobs.
        force: run again although finished.
        quiet: print nothing while it trains; None for what its config says.
        afterwards: called with what came of it.
    """
    index = job.index
    if launch is not None:
        _leave_with_parent()
        if not sweep.is_live(launch):
            return Ended(index, "stopped", "its launch is over")
    with _busy(), sweep.claim(index) as mine, contextlib.ExitStack() as held:
        if not mine:
            return Ended(index, "elsewhere", "another process has it")
        try:
            if launch is not None:
                held.enter_context(told_to_stop(sweep, launch))
            outcome = _run(sweep, job, held, force=force, quiet=quiet, alone=launch is None)
            afterwards(outcome)
        except RunLocked as error:
            return Ended(index, "elsewhere", str(error))
        except UserError as error:
            return Ended(index, "refused", str(error))
        except ModuleNotFoundError as error:
            return Ended(index, "refused", str(not_installed(error)))
        except Exception as error:
            traceback.print_exc()
            return Ended(index, "error", f"{type(error).__name__}: {error}")
    status = outcome.status if job.until is None else sweep.status(job)["status"]
    return Ended(index, status, outcome.message, outcome.signal)


def _run(
    sweep: Sweep,
    job: Job,
    held: contextlib.ExitStack,
    *,
    force: bool,
    quiet: bool | None,
    alone: bool,
) -> Outcome:
    from omegaconf import OmegaConf

    from experiments.training import settings
    from experiments.training.job import job_of
    from experiments.training.run import run

    config = job.config | {"force": force}
    if quiet is not None:
        config["quiet"] = quiet
    cwd = Path(sweep.facts()["cwd"])
    results_dir = sweep.results_dir.absolute()
    if (cwd / config["results_dir"]).resolve() != results_dir.resolve():  # moved since
        config["results_dir"] = str(results_dir)
    if cwd.is_dir():
        held.enter_context(contextlib.chdir(cwd))  # of which its other paths are told
    if not alone:
        config["device"] = held.enter_context(device_of(sweep, config))
    found = job_of(config, job.choices, settings.device(config["device"], config["nproc"]), config["nproc"])
    place = sweep.run(job).path
    if found.place.path.resolve() != place.resolve():
        raise UserError(
            f"the run would not be {place} any more: its input files have changed since the sweep was "
            "launched, or clipbench has; experiment=NAME begins a new one"
        )
    return run(OmegaConf.create(config), job.choices, job.until)


@contextlib.contextmanager
def device_of(sweep: Sweep, config: dict[str, Any]) -> Iterator[str]:
    """The device of a config; of several CUDA devices the one that the fewest jobs of the sweep use."""
    if config["device"] != "cuda" or config["nproc"] > 1:
        yield config["device"]
        return
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        yield "cuda"
        return
    with sweep.device(count) as number:
        yield f"cuda:{number}"


_idle = threading.Event()


@contextlib.contextmanager
def _busy() -> Iterator[None]:
    _idle.clear()
    try:
        yield
    finally:
        _idle.set()


@functools.cache
def _leave_with_parent() -> None:
    """End this process, after its job, when that which started it is gone; joblib's would wait for ever."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        _idle.wait()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def told_to_stop(sweep: Sweep, launch: str) -> Iterator[None]:
    """Send SIGTERM to this process, again and again, once its launch is over or somebody else has sent it.

    Training stops in order at the first that it hears. Nothing is raised before: this process may be
    importing what dies of an exception, and the jobs of its siblings with it.
    """
    if threading.current_thread() is not threading.main_thread():  # elsewhere Python refuses
        yield
        return
    heard, over = threading.Event(), threading.Event()

    def watch() -> None:
        while not over.wait(SECONDS_BETWEEN_LOOKS):
            if heard.is_set() or not sweep.is_live(launch):
                os.kill(os.getpid(), signal.SIGTERM)

    # Ctrl-C reaches all processes of a terminal, and what it means for jobs is up to the launch. It stays
    # ignored: a worker that it ended between two jobs would take the others with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.set())
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        signal.signal(signal.SIGTERM, before)
