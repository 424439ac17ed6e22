"""From a config to a finished run folder. Joins the parts; the only place that instantiates."""

from __future__ import annotations

import contextlib
import functools
import os
import traceback
from collections.abc import Callable
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
from experiments.tasks.base import Task
from experiments.training.clock import clock_for
from experiments.training.progress import Progress
from experiments.training.summary import code_version, cost, headline, results, versions
from experiments.training.train import Budget, Diverged, Record, train

LARGEST = 2**31 - 1
CHOICES = ("task", "preset", "optimizer", "clipping", "scheduler", "experiment")


class Outcome(NamedTuple):
    """What became of a run."""

    run: Run
    status: str
    message: str
    fresh: bool
    """Whether it was trained just now."""


def run(cfg: DictConfig, choices: dict[str, str]) -> Outcome:
    """Train what ``cfg`` describes, unless that is done already.

    Args:
        cfg: composed from conf/run.yaml.
        choices: name of the option chosen for each group of ``CHOICES``.

    Raises:
        UserError: the input is bad; no run folder was made.
    """
    config = OmegaConf.to_container(cfg, resolve=True)
    budget = _budget(config)
    device = _device(config["device"])
    task: Task = _construct(cfg.task, "task")
    names = {name: choices[name] for name in CHOICES} | {"preset": Path(choices["preset"]).name}
    frozen = {**config, "names": names, "device_type": device.type, "world_size": 1}
    frozen["fingerprint"] = runs.fingerprint(task.input_files())
    place = Run.locate(
        config["results_dir"],
        **{name: names[name] for name in ("experiment", "task", "preset", "optimizer", "clipping")},
        digest=runs.digest(_without_paths(frozen, task.input_files())),
        seed=config["seed"],
    )
    done = _already(place, config["force"])
    if done:
        return done

    # Everything that can be wrong with the input shows here, before there is a folder.
    task.load()
    torch.manual_seed(config["seed"])
    model = task.build_model().to(device)
    optimizer = _construct(cfg.optimizer, "optimizer")(params=_trainable(model))
    clipping = _construct(cfg.clipping, "clipping")
    try:
        torch_clip.clip(optimizer, clipping)
    except (TypeError, ValueError) as error:  # some optimizers do not take every clipping
        raise UserError(f"clipping: {error}") from None
    scheduler = _construct(cfg.scheduler, "scheduler")(optimizer=optimizer)

    facts = {"code": code_version(), "threads": torch.get_num_threads()}
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(place.lock())
            place.start(frozen, **facts)
        except OSError as error:
            raise UserError(f"results_dir: cannot write {error.filename}: {error.strerror}") from None
        clock = clock_for(device)
        steps = functools.partial(
            train, task, model, optimizer, scheduler, budget, seed=config["seed"], device=device, clock=clock
        )
        progress = Progress(budget.max_steps, task.metric, quiet=config["quiet"])
        try:
            status, message, records = _record(steps, place, progress)
        finally:
            progress.close()
        summary = {
            **names,
            "status": status,
            "seed": config["seed"],
            "metric": task.metric,
            **results(records, task.metric),
            "clip_unit": clipping.unit,
            "skipped_steps": int(clipping.telemetry.skipped_steps) if clipping.telemetry else 0,
            **cost(clock, records, device),
            **facts,
            "versions": versions(),
        }
        place.finish(status, summary, message)
    return Outcome(place, status, message or headline(summary), fresh=True)


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
    return None  # killed, timeout: again; running: the lock tells


def _record(steps: Callable[[], Any], place: Run, progress: Progress) -> tuple[str, str | None, list[Record]]:
    """Train and write down; return status, message and all records."""
    kept: list[Record] = []
    try:
        for records in steps():
            place.append(records)
            kept += records
            if records:
                progress.show(records)
    except Diverged as diverged:
        return "diverged", str(diverged), kept
    except KeyboardInterrupt:
        return "killed", "interrupted; the same command starts it again", kept
    except torch.OutOfMemoryError as error:
        hint = "lower task.batch_size or choose a smaller model"
        return "oom", f"{str(error).splitlines()[0]}; {hint}", kept
    except torch_clip.NonFiniteGradientError as error:  # asked for, by nonfinite=error
        return "error", str(error), kept
    except Exception as error:
        traceback.print_exc()
        return "error", f"{type(error).__name__}: {error}", kept
    return "ok", None, kept


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
    except (TypeError, ValueError) as error:
        raise UserError(f"{what}: {_one_line(error)}{_given(made.keywords)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _given(settings: dict[str, Any]) -> str:
    told = ", ".join(f"{name}={value}" for name, value in settings.items())
    return f"; given {told}" if told else ""


def _trainable(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    # Named, so that messages about a gradient say whose it is.
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]


def _budget(config: dict[str, Any]) -> Budget:
    for key, least in (("max_steps", 1), ("eval_every", 1), ("log_every", 1), ("seed", 0)):
        value = config[key]
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= LARGEST:
            raise UserError(f"{key} must be a whole number from {least} to {LARGEST}, got {value!r}")
    results_dir = config["results_dir"]
    if not isinstance(results_dir, str) or not results_dir:
        raise UserError(f"results_dir must be a folder, got {results_dir!r}")
    place = Path(results_dir).absolute()
    there = next(path for path in (place, *place.parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"results_dir: cannot write {place}: {there} is no folder")
    for key in ("force", "quiet"):
        if not isinstance(config[key], bool):
            raise UserError(f"{key} must be true or false, got {config[key]!r}")
    max_steps = config["max_steps"]
    return Budget(max_steps, config["eval_every"], min(config["log_every"], max_steps))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device={name}: there are {torch.cuda.device_count()} CUDA devices here; try device=cpu"
        )
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    return device


def _without_paths(node: Any, files: list[Path]) -> Any:
    """``node`` with each path to an input file, or a folder of one, replaced: their content counts."""
    if isinstance(node, dict):
        return {key: _without_paths(value, files) for key, value in node.items()}
    if isinstance(node, list):
        return [_without_paths(value, files) for value in node]
    if isinstance(node, str) and os.path.exists(os.path.expanduser(node)):
        path = Path(node).expanduser().resolve()
        if any(path == file.resolve() or path in file.resolve().parents for file in files):
            return "<input>"
    return node
