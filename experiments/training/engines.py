"""Hydra's launchers, handed jobs of a sweep as often as there are some to run."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from experiments.errors import UserError
from experiments.training.presets import conf_dir

HERE = ("basic", "joblib", "submitit_local")
"""Launchers that run jobs on this machine only."""


class Launcher(NamedTuple):
    """One of Hydra's launchers."""

    name: str
    """Its option of ``hydra/launcher``."""
    settings: dict[str, Any]
    """Its node, not resolved."""
    batch: int | None = None
    """Jobs to hand over at a time, ``hydra.sweeper.max_batch_size``; None for all."""

    @property
    def in_process(self) -> bool:
        """Whether jobs run in the process that launches them."""
        return self.name == "basic"

    @property
    def watches(self) -> bool:
        """Whether jobs run in processes of this machine that are told when their launch is over."""
        return self.name in ("joblib", "submitit_local", "ray")

    @property
    def at_once(self) -> int:
        """Jobs that run at the same time, as far as the settings tell."""
        wanted = {
            "joblib": lambda: self.settings["n_jobs"],
            "submitit_local": lambda: -1,
            "submitit_slurm": lambda: self.settings["array_parallelism"],
            "ray": lambda: self.settings["ray"]["init"].get("num_cpus") or -1,
        }.get(self.name, lambda: 1)()
        jobs = wanted if wanted > 0 else max(1, cores() + 1 + wanted)
        return jobs if self.batch is None else min(jobs, self.batch)

    def limited(self, jobs: int) -> Launcher:
        """The same launcher that runs so many jobs at the same time."""
        settings = copy.deepcopy(self.settings)
        if self.name == "joblib":
            settings["n_jobs"] = jobs
        elif self.name == "submitit_slurm":
            settings["array_parallelism"] = jobs
        elif self.name == "ray":
            settings["ray"]["init"]["num_cpus"] = jobs
        elif self.name == "submitit_local":
            return self._replace(batch=jobs)
        elif jobs != 1:
            raise UserError(f"launcher {self.name} runs one job at a time, got {jobs}; joblib runs several")
        return self._replace(settings=settings)


def launcher_of(name: str) -> Launcher:
    """The launcher of that name with its own defaults."""
    from omegaconf import OmegaConf

    node = _composed([f"hydra/launcher={name}"])[0].hydra.launcher
    return Launcher(name, OmegaConf.to_container(node, resolve=False))


class Engine:
    """A launcher that is ready.

    Args:
        launcher: which.
        folder: of the sweep, which takes the launcher's own files.
        task: what a job does, called in the job's process with a config of conf/sweep_job.yaml; importable
            there, as whatever it returns is here.
    """

    def __init__(self, launcher: Launcher, folder: Path, task: Callable[[Any], Any]) -> None:
        from hydra._internal.callbacks import Callbacks
        from hydra.core.override_parser.types import Quote, QuotedString
        from hydra.core.plugins import Plugins
        from hydra.types import HydraContext
        from omegaconf import OmegaConf, open_dict

        self.launcher = launcher
        quoted = QuotedString(str(folder.absolute()), Quote.single).with_quotes()
        cfg, loader = _composed([f"hydra.sweep.dir={quoted}"])
        settings = dict(launcher.settings)
        if settings.get("batch_size") == "auto":  # joblib's guess leaves workers idle where jobs are long
            settings["batch_size"] = "1"
        with open_dict(cfg.hydra):
            cfg.hydra.launcher = OmegaConf.create(settings)
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=HydraContext(config_loader=loader, callbacks=Callbacks(cfg)),
            task_function=task,
            config=cfg,
        )

    @property
    def batch(self) -> int | None:
        """Jobs to hand over at a time; None for all."""
        if self.launcher.name == "submitit_local":  # which starts all that it is handed
            return self.launcher.at_once
        return self.launcher.batch

    def launch(self, jobs: list[list[str]]) -> list[Any]:
        """Run jobs to their end; returns what each returned.

        Args:
            jobs: overrides of conf/sweep_job.yaml for each.

        Raises:
            Exception: of the launcher, whatever it raises where a job's process has died.
        """
        from hydra.core.utils import env_override

        with env_override({} if self.launcher.in_process else self._environment()):
            returned = self._launcher.launch(jobs, initial_job_idx=0)
        return [job.return_value for job in returned]

    def _environment(self) -> dict[str, str]:
        """What shares the cores between the processes, where the user has not."""
        threads = max(1, cores() // self.launcher.at_once)
        shared = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        return {name: os.environ.get(name, value) for name, value in shared.items()}


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _composed(overrides: list[str]) -> tuple[Any, Any]:
    """conf/sweep_job.yaml, and what loads it again for each job."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    with initialize_config_dir(str(conf_dir()), job_name="clipbench", version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        return hydra.compose_config("sweep_job", overrides, run_mode=RunMode.MULTIRUN), hydra.config_loader
