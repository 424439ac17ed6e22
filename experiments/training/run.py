"""From a config to a finished run folder. Joins the parts; the only place that constructs them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf

import torch_clip
from experiments import runs
from experiments.errors import UserError
from experiments.runs import Run
from experiments.tasks.base import TrainLoader
from experiments.training import settings
from experiments.training.batches import Batches
from experiments.training.bookkeeper import Bookkeeper, DiskError, writing
from experiments.training.checkpoint import Checkpoints
from experiments.training.clock import clock_for
from experiments.training.compiled import compile_or_say
from experiments.training.construct import construct
from experiments.training.ends import GOES_ON, End, attempt
from experiments.training.job import Job, job_of
from experiments.training.launch import launch
from experiments.training.loggers import Dispensable, Logger
from experiments.training.precision import Precision
from experiments.training.progress import Progress
from experiments.training.ranks import Ranks, joined, world_of_torchrun
from experiments.training.recorder import Recorder
from experiments.training.state import State, seed_everything
from experiments.training.stop import Stop
from experiments.training.summary import Results, cost, headline, versions
from experiments.training.train import train
from experiments.training.version import code_version


class Outcome(NamedTuple):
    """What became of a run."""

    run: Run
    status: str
    message: str
    fresh: bool
    """Whether it was trained just now."""
    signal: int | None = None
    """What ended it, if a signal did."""
    summary: dict[str, Any] | None = None
    """Of a run that was trained just now."""


def run(cfg: DictConfig, choices: dict[str, str], until: int | None = None) -> Outcome:
    """Train what ``cfg`` describes, or go on with it, unless that is done already.

    Args:
        cfg: composed from conf/run.yaml.
        choices: name of the option chosen for each group of ``job.CHOICES``.
        until: step at which to stop, so that it can go on later; None for the end.

    Raises:
        UserError: the input is bad; no run folder was made.
    """
    config = OmegaConf.to_container(cfg, resolve=True)
    settings.check(config)
    world = world_of_torchrun()
    if world is not None:
        if config["nproc"] not in (1, world):
            raise UserError(
                f"nproc={config['nproc']}, but torchrun has started {world} processes: leave it out"
            )
        device = settings.device(config["device"], world)
        with joined(device.type) as ranks:
            return _work(ranks, config, choices, until)[0]
    if config["nproc"] == 1:
        return _work(Ranks(0, 1, settings.device(config["device"], 1)), config, choices, until)[0]
    job = _job(config, choices, config["nproc"])
    if done := _already(job.place, config["force"]):
        return done
    told, heard = launch(config["nproc"], job.device.type, _work, config, choices, until)
    outcome = told[0] if 0 in told else _without_first(job.place, list(told.values()))
    return outcome._replace(signal=heard or outcome.signal)


def _job(config: dict[str, Any], choices: dict[str, str], world: int) -> Job:
    return job_of(config, choices, settings.device(config["device"], world), world)


def _work(
    ranks: Ranks, config: dict[str, Any], choices: dict[str, str], until: int | None
) -> tuple[Outcome, bool]:
    """The part of one process in a run; what became of it, and whether all is well."""
    stop = Stop(config["max_seconds"], until=until)
    job = _job(config, choices, ranks.world)
    place, task, force = job.place, job.task, config["force"]
    if done := ranks.from_first(lambda: _already(place, force)):
        return done, True

    facts = {"code": code_version(), "threads": torch.get_num_threads()}
    # Everything that can be wrong with the input shows here, before there is a folder.
    ready = attempt(lambda: _set_up(job, facts, ranks), ranks)
    if isinstance(ready, End):
        return _failed_at_start(job, ready, facts, ranks), False
    state, precision = ready
    checkpoints = Checkpoints(place, config["keep"])
    results = Results(task.metric, task.higher_is_better)
    with contextlib.ExitStack() as held:
        done, saved = ranks.from_first(lambda: _claim(job, checkpoints, held))
        if done:  # by another process, while this one read its data
            return done, True
        quiet = config["quiet"] or not ranks.first
        if saved is not None:
            failed = attempt(lambda: state.load_state_dict(saved["state"]), ranks)
            if failed is not None:
                return _failed_at_start(job, failed, facts, ranks), False
            results.load_state_dict(saved["results"])
            _say_resumed(saved, facts, quiet)
        ranks.from_first(lambda: _begin(job, saved, facts))
        held.enter_context(stop)
        max_steps = config["max_steps"]
        progress = Progress(max_steps, task.metric, results, quiet=quiet)
        held.callback(progress.close)
        logger = Dispensable(job.logger if ranks.first else Logger())
        held.callback(logger.close)
        logger.open(place, job.config, state.step)
        books = Bookkeeper(place, checkpoints, state, results, progress, logger, max_steps, facts)
        budget = settings.budget(config)
        try:
            moments = train(task, state, budget, precision, device=ranks.device, should_stop=stop)
            end = books.follow(moments, stop)
            summary = _summary(job, end, results, facts, _measured(state, results, ranks))
            if ranks.first:
                with writing():
                    place.finish(end.status, summary, end.message)
                    checkpoints.tidy(end.status)
                logger.finish(summary)
        except DiskError as error:
            # Its status stays "running", which without a lock reads as killed.
            end = End("killed", f"{error}; once that is mended, {GOES_ON}")
            ranks.first_told(end)  # before the others miss this process
            return Outcome(place, end.status, end.message, fresh=True), False
    # Of several processes the others are sent a signal when one has failed.
    signal = end.signal or (stop.signal if ranks.alone else None)
    message = end.message or headline(summary)
    outcome = Outcome(place, end.status, message, fresh=True, signal=signal, summary=summary)
    return outcome, end.status not in runs.FAILED


def _failed_at_start(job: Job, end: End, facts: dict[str, Any], ranks: Ranks) -> Outcome:
    """The outcome of a run that came to no step. Its folder says so, unless a better one would be lost."""
    place, stands = job.place, job.place.status
    if stands is not None and stands["status"] not in runs.FAILED:
        return Outcome(place, end.status, f"{end.message}; what it had before is kept", fresh=True)
    if ranks.first:
        results = Results(job.task.metric, job.task.higher_is_better)
        with _writable(), place.lock():
            place.start(job.config, **facts)
            place.finish(end.status, _summary(job, end, results, facts, {}), end.message)
    return Outcome(place, end.status, end.message, fresh=True)


def _without_first(place: Run, told: list[Outcome]) -> Outcome:
    """The outcome of a run whose first process died, of what the others told: one of them may have failed."""
    status = (place.status or {"status": "error"})["status"]
    for outcome in told:
        if status == "killed" and outcome.status in runs.FAILED and outcome.summary is not None:
            with _writable(), place.lock():
                place.finish(outcome.status, outcome.summary, outcome.message)
            return outcome
    return Outcome(place, status, f"its first process died; {GOES_ON}", fresh=True)


def _claim(
    job: Job, checkpoints: Checkpoints, held: contextlib.ExitStack
) -> tuple[Outcome | None, dict[str, Any] | None]:
    """Lock the run's folder: the outcome that stands there, or the checkpoint to go on from, if any."""
    place, force = job.place, job.config["force"]
    with _writable():
        held.enter_context(place.lock())
    if done := _already(place, force):
        return done, None
    return None, None if force or place.status is None else checkpoints.load_last()


def _begin(job: Job, saved: dict[str, Any] | None, facts: dict[str, Any]) -> None:
    """Make the run's folder ready, for a new run or to go on."""
    with _writable():
        if saved is None:
            job.place.start(job.config, **facts)
        else:
            job.place.resume(saved["step"], **facts)


def _summary(
    job: Job, end: End, results: Results, facts: dict[str, Any], measured: dict[str, Any]
) -> dict[str, Any]:
    return {
        **job.config["names"],
        "status": end.status,
        "seed": job.config["seed"],
        "metric": job.task.metric,
        "higher_is_better": job.task.higher_is_better,
        **results.as_dict(),
        **measured,
        **facts,
        "versions": versions(),
    }


def _measured(state: State, results: Results, ranks: Ranks) -> dict[str, Any]:
    """What the summary says of the steps, beside their results."""
    clipping = state.optimizer.clipping
    return {
        "clip_unit": clipping.unit,
        "skipped_steps": clipping.state_dict()["skipped_steps"],
        **cost(state.clock, results.steps, ranks.device),
    }


def _already(place: Run, force: bool) -> Outcome | None:
    """The outcome that stands, if the run need not or must not start."""
    status = place.status
    if status is None or force:
        return None
    name = status["status"]
    if name in runs.FINISHED:
        told = status.get("message") or headline(place.summary())
        code = status.get("code")
        if code and code != (now := code_version()):
            told += f" (made by code {code}, this is {now}; force=true runs it anew)"
        return Outcome(place, name, told, fresh=False)
    if name in runs.FAILED:
        message = f"failed before: {status.get('message')}; force=true runs it anew"
        return Outcome(place, name, message, fresh=False)
    return None  # killed, timeout: goes on; running: the lock tells


def _set_up(job: Job, facts: dict[str, Any], ranks: Ranks) -> tuple[State, Precision]:
    """Read the data, and make all that training needs, at step 0."""
    job.task.load()
    precision = Precision(job.config["precision"], ranks.device)
    state = _build(job, precision, ranks)
    if job.config["compile"]:
        loader = _train_loader(job, ranks)
        facts["compiled"] = compile_or_say(state.model, job.task, loader, precision, ranks.device)
    return state, precision


def _build(job: Job, precision: Precision, ranks: Ranks) -> State:
    """All that the loop works on, at step 0."""
    cfg, config = job.cfg, job.config
    seed_everything(config["seed"])
    model = ranks.prepare(job.task.build_model()).to(ranks.device)
    if not ranks.first:  # or all processes would drop the same units
        seed_everything(config["seed"] + 65_537 * ranks.rank)
    optimizer = construct(cfg.optimizer, "optimizer")(params=_trainable(model))
    clipping = construct(cfg.clipping, "clipping", model)
    scaler = precision.scaler()
    if scaler.is_enabled() and clipping.nonfinite != "skip":
        raise UserError(
            f"clipping.nonfinite must be skip with precision={config['precision']}, which overflows now and "
            f"then, got {clipping.nonfinite!r}"
        )
    try:
        torch_clip.clip(optimizer, clipping)
    except (TypeError, ValueError) as error:  # some optimizers do not take every clipping
        raise UserError(f"clipping: {error}") from None
    scheduler = construct(cfg.scheduler, "scheduler")(optimizer=optimizer)
    batches = Batches(_train_loader(job, ranks))
    recorder = Recorder(settings.budget(config).log_every, ranks.device)
    clock = clock_for(ranks.device)
    return State(model, optimizer, scheduler, scaler, batches, recorder, clock, ranks)


def _train_loader(job: Job, ranks: Ranks) -> TrainLoader:
    loader = job.task.train_loader(job.config["seed"])
    if not ranks.alone and hasattr(loader, "split"):
        loader.split(ranks.rank, ranks.world)
    return loader


def _say_resumed(saved: dict[str, Any], facts: dict[str, Any], quiet: bool) -> None:
    if not quiet:
        print(f"going on from step {saved['step']}", flush=True)
    before, now = saved["facts"]["threads"], facts["threads"]
    if before != now:
        print(
            f"clipbench: warning: this run began with {before} threads and goes on with {now}, which changes "
            f"the last bits of its numbers; OMP_NUM_THREADS={before} would not",
            file=sys.stderr,
        )


@contextlib.contextmanager
def _writable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"results_dir: cannot write {error.filename}: {error.strerror}") from None


def _trainable(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    # Named, so that messages about a gradient say whose it is.
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]
