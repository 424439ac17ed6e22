"""From a config to a finished run folder. Joins the parts; the only place that instantiates."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import torch_clip
from experiments import runs
from experiments.errors import UserError
from experiments.runs import Run
from experiments.tasks.base import Task, TrainLoader
from experiments.training import settings
from experiments.training.batches import Batches
from experiments.training.bookkeeper import GOES_ON, Bookkeeper, DiskError, writing
from experiments.training.checkpoint import Checkpoints
from experiments.training.clock import clock_for
from experiments.training.compiled import compile_or_say
from experiments.training.launch import launch
from experiments.training.precision import Precision
from experiments.training.progress import Progress
from experiments.training.ranks import Ranks, joined, world_of_torchrun
from experiments.training.recorder import Recorder
from experiments.training.state import State, seed_everything
from experiments.training.stop import Stop
from experiments.training.summary import Results, code_version, cost, headline, versions
from experiments.training.train import train

CHOICES = ("task", "preset", "optimizer", "clipping", "scheduler", "experiment")


class Outcome(NamedTuple):
    """What became of a run."""

    run: Run
    status: str
    message: str
    fresh: bool
    """Whether it was trained just now."""
    signal: int | None = None
    """What ended it, if anything did."""


class Job(NamedTuple):
    """A run to be: checked, but nothing of it is read or built."""

    cfg: DictConfig
    config: dict[str, Any]
    """``cfg``, resolved, with all that the run's identity needs."""
    task: Task
    device: torch.device
    place: Run


def run(cfg: DictConfig, choices: dict[str, str]) -> Outcome:
    """Train what ``cfg`` describes, or go on with it, unless that is done already.

    Args:
        cfg: composed from conf/run.yaml.
        choices: name of the option chosen for each group of ``CHOICES``.

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
            return _work(ranks, config, choices)[0]
    if config["nproc"] == 1:
        return _work(Ranks(0, 1, settings.device(config["device"], 1)), config, choices)[0]
    job = _job(config, choices, config["nproc"])
    if done := _already(job.place, config["force"]):
        return done
    outcome, heard = launch(config["nproc"], job.device.type, _work, config, choices)
    if outcome is None:
        status = job.place.status or {"status": "error"}
        outcome = Outcome(job.place, status["status"], f"its first process died; {GOES_ON}", fresh=True)
    return outcome._replace(signal=heard or outcome.signal)


def _job(config: dict[str, Any], choices: dict[str, str], world: int) -> Job:
    device = settings.device(config["device"], world)
    cfg = OmegaConf.create(config)
    task: Task = _construct(cfg.task, "task")
    if config["data_dir"] is not None and "data_dir" not in config["task"]:
        raise UserError(
            f"task {choices['task']} has no data that data_dir={config['data_dir']} could replace"
        )
    names = {name: choices[name] for name in CHOICES} | {"preset": Path(choices["preset"]).name}
    frozen = {**config, "names": names, "device_type": device.type, "world_size": world}
    files = task.input_files()
    frozen["fingerprint"] = runs.fingerprint(files)
    place = Run.locate(
        config["results_dir"],
        **{name: names[name] for name in ("experiment", "task", "preset", "optimizer", "clipping")},
        digest=runs.digest(_without_paths(frozen, files)),
        seed=config["seed"],
    )
    return Job(cfg, frozen, task, device, place)


def _work(ranks: Ranks, config: dict[str, Any], choices: dict[str, str]) -> tuple[Outcome, bool]:
    """The part of one process in a run; what became of it, and whether all is well."""
    stop = Stop(config["max_seconds"])
    job = _job(config, choices, ranks.world)
    place, task, force = job.place, job.task, config["force"]
    if done := ranks.from_first(lambda: _already(place, force)):
        return done, True

    # Everything that can be wrong with the input shows here, before there is a folder.
    task.load()
    precision = Precision(config["precision"], ranks.device)
    state = _build(job, precision, ranks)
    facts = {"code": code_version(), "threads": torch.get_num_threads()}
    if config["compile"]:
        loader = _train_loader(job, ranks)
        facts["compiled"] = compile_or_say(state.model, task, loader, precision, ranks.device)
    checkpoints = Checkpoints(place, config["keep"])
    results = Results(task.metric, task.higher_is_better)
    with contextlib.ExitStack() as held:
        done, saved = ranks.from_first(lambda: _begin(job, checkpoints, facts, held))
        if done:  # by another process, while this one read its data
            return done, True
        held.enter_context(stop)
        quiet = config["quiet"] or not ranks.first
        if saved is not None:
            state.load_state_dict(saved["state"])
            results.load_state_dict(saved["results"])
            _say_resumed(saved, facts, quiet)
        max_steps = config["max_steps"]
        progress = Progress(max_steps, task.metric, results, quiet=quiet)
        held.callback(progress.close)
        books = Bookkeeper(place, checkpoints, state, results, progress, max_steps, facts)
        budget = settings.budget(config)
        try:
            moments = train(task, state, budget, precision, device=ranks.device, should_stop=stop)
            status, message = books.follow(moments, stop)
            summary = _summary(job, status, state, results, facts, ranks)
            if ranks.first:
                with writing():
                    place.finish(status, summary, message)
                    checkpoints.tidy(status)
        except DiskError as error:
            # Its status stays "running", which without a lock reads as killed.
            message = f"{error}; once that is mended, {GOES_ON}"
            return Outcome(place, "killed", message, fresh=True), False
    outcome = Outcome(place, status, message or headline(summary), fresh=True, signal=stop.signal)
    return outcome, status not in ("oom", "error")


def _begin(
    job: Job, checkpoints: Checkpoints, facts: dict[str, Any], held: contextlib.ExitStack
) -> tuple[Outcome | None, dict[str, Any] | None]:
    """Lock the run's folder and make it ready: the outcome that stands there, or the checkpoint to load."""
    place, force = job.place, job.config["force"]
    with _writable():
        held.enter_context(place.lock())
    if done := _already(place, force):
        return done, None
    saved = None if force or place.status is None else checkpoints.load_last()
    with _writable():
        if saved is None:
            place.start(job.config, **facts)
        else:
            place.resume(saved["step"], **facts)
    return None, saved


def _summary(
    job: Job, status: str, state: State, results: Results, facts: dict[str, Any], ranks: Ranks
) -> dict[str, Any]:
    clipping = state.optimizer.clipping
    return {
        **job.config["names"],
        "status": status,
        "seed": job.config["seed"],
        "metric": job.task.metric,
        "higher_is_better": job.task.higher_is_better,
        **results.as_dict(),
        "clip_unit": clipping.unit,
        "skipped_steps": clipping.state_dict()["skipped_steps"],
        **cost(state.clock, results.steps, ranks.device),
        **facts,
        "versions": versions(),
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
    if name in ("oom", "error"):
        message = f"failed before: {status.get('message')}; force=true runs it anew"
        return Outcome(place, name, message, fresh=False)
    return None  # killed, timeout: goes on; running: the lock tells


def _build(job: Job, precision: Precision, ranks: Ranks) -> State:
    """All that the loop works on, at step 0."""
    cfg, config = job.cfg, job.config
    seed_everything(config["seed"])
    model = ranks.prepare(job.task.build_model()).to(ranks.device)
    if not ranks.first:  # or all processes would drop the same units
        seed_everything(config["seed"] + 65_537 * ranks.rank)
    optimizer = _construct(cfg.optimizer, "optimizer")(params=_trainable(model))
    clipping = _construct(cfg.clipping, "clipping")
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
    scheduler = _construct(cfg.scheduler, "scheduler")(optimizer=optimizer)
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


def _construct(node: DictConfig, what: str) -> Any:
    """Instantiate a config node; what its constructor refuses is the user's to mend."""
    try:
        made = instantiate(node)
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise cause from None
        settings = {name: value for name, value in node.items() if not str(name).startswith("_")}
        raise UserError(f"{what}: {_one_line(cause)}{_given(settings)}") from None
    return functools.partial(_call, made, what) if isinstance(made, functools.partial) else made


def _call(made: functools.partial, what: str, **objects: Any) -> Any:
    try:
        return made(**objects)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{what}: {_one_line(error)}{_given(made.keywords)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _given(settings: dict[str, Any]) -> str:
    told = ", ".join(f"{name}={value}" for name, value in settings.items())
    return f"; given {told}" if told else ""


def _trainable(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    # Named, so that messages about a gradient say whose it is.
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]


def _without_paths(node: Any, files: list[Path]) -> Any:
    """``node`` with each path to an input file, or a folder of one, replaced: their content counts."""
    folders = {Path(folder) for folder in {os.path.dirname(os.path.abspath(file)) for file in files}}
    inputs = {parent for folder in folders for parent in (folder, *folder.parents)}
    inputs |= {Path(os.path.abspath(file)) for file in files}

    def walk(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: walk(value) for key, value in node.items()}
        if isinstance(node, list):
            return [walk(value) for value in node]
        is_input = isinstance(node, str) and Path(os.path.abspath(os.path.expanduser(node))) in inputs
        return "<input>" if is_input else node

    return walk(node)
