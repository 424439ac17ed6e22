"""A run to be: what its config asks for and where it lies, before anything of it is read or built."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf

from experiments import runs
from experiments.errors import UserError
from experiments.runs import Run
from experiments.tasks.base import Task
from experiments.training.construct import construct
from experiments.training.loggers import Logger

CHOICES = ("task", "preset", "optimizer", "clipping", "scheduler", "experiment")


class Job(NamedTuple):
    """A run to be: checked, but nothing of it is read or built."""

    cfg: DictConfig
    config: dict[str, Any]
    """``cfg``, resolved, with all that the run's identity needs."""
    task: Task
    logger: Logger
    device: torch.device
    place: Run
    files: list[Path]
    """That it will read."""


def task_of(config: dict[str, Any], name: str) -> Task:
    """The task of a resolved config, whose settings it has checked.

    Raises:
        UserError: they are bad.
    """
    task = construct(OmegaConf.create(config["task"]), "task")
    if config["data_dir"] is not None and "data_dir" not in config["task"]:
        raise UserError(f"task {name} has no data that data_dir={config['data_dir']} could replace")
    return task


def inputs_of(task: Task) -> tuple[list[Path], str | None]:
    """Input files of a task, and their fingerprint."""
    files = task.input_files()
    return files, runs.fingerprint(files)


def job_of(
    config: dict[str, Any],
    choices: dict[str, str],
    device: torch.device,
    world: int,
    inputs_of: Callable[[Task], tuple[list[Path], str | None]] = inputs_of,
) -> Job:
    """Check a config, and say where its run lies.

    Args:
        config: resolved.
        choices: name of the option chosen for each group of ``CHOICES``.
        device: that the run trains on.
        world: processes that it trains in.
        inputs_of: whoever asks for many jobs may remember what it returned.

    Raises:
        UserError: the input is bad.
    """
    cfg = OmegaConf.create(config)
    task = task_of(config, choices["task"])
    logger: Logger = construct(cfg.logger, "logger")
    names = {name: choices[name] for name in CHOICES} | {"preset": Path(choices["preset"]).name}
    frozen = {**config, "names": names, "device_type": device.type, "world_size": world}
    files, frozen["fingerprint"] = inputs_of(task)
    place = Run.locate(
        config["results_dir"],
        **{name: names[name] for name in ("experiment", "task", "preset", "optimizer", "clipping")},
        digest=runs.digest(without_paths(frozen, files)),
        seed=config["seed"],
    )
    return Job(cfg, frozen, task, logger, device, place, files)


def check_settings(job: Job) -> None:
    """Raise ``UserError`` for what optimizer, clipping and scheduler refuse whatever the model is."""
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = construct(job.cfg.optimizer, "optimizer")(params=[("weight", weight)])
    clipping = construct(job.cfg.clipping, "clipping")
    if hasattr(optimizer, "check_clipping"):
        try:
            optimizer.check_clipping(clipping)
        except ValueError as error:
            raise UserError(f"clipping: {error}") from None
    construct(job.cfg.scheduler, "scheduler")(optimizer=optimizer)


def without_paths(node: Any, files: list[Path]) -> Any:
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
