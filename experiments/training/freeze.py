"""The jobs of a sweep, composed as Hydra would, but all of them before the first one runs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from experiments import sweeps
from experiments.errors import UserError
from experiments.tasks.base import Task
from experiments.training import settings
from experiments.training.engines import HERE, Launcher
from experiments.training.job import check_settings, inputs_of, job_of
from experiments.training.presets import Presets, conf_dir, for_hydra
from experiments.training.space import Dimension, dimension


class Composer:
    """Composes what one launch asks for; which preset and which launcher is decided once.

    Args:
        presets: of the launch.
        given: settings of the command line.
        config_dir: one more folder of configuration.

    Raises:
        HydraException: from here and all methods, like the exceptions of OmegaConf, for what is not there.
    """

    def __init__(self, presets: Presets, given: Mapping[str, str], config_dir: str | None = None) -> None:
        presets.register()
        self._presets = presets
        self._inputs: dict[str, tuple[list[Path], str | None]] = {}
        overrides = for_hydra(given)
        if config_dir is not None:
            folder = QuotedString(f"file://{os.path.abspath(config_dir)}", Quote.single).with_quotes()
            overrides.append(f"hydra.searchpath=[{folder}]")
        with initialize_config_dir(str(conf_dir()), job_name="clipbench", version_base="1.3"):
            hydra = GlobalHydra.instance().hydra
            self._loader = hydra.config_loader
            # What is for jobs may not suit the options that are chosen where they say nothing.
            parsed = self._parsed(overrides)
            launching = [one for one in parsed if one.is_hydra_override() or one.key_or_group == "experiment"]
            lines = [one.input_line for one in launching]
            self._master = hydra.compose_config("run", lines, run_mode=RunMode.MULTIRUN)
        self._asked = [one.input_line for one in parsed if not one.is_hydra_override()]
        self.told: dict[str, None] = {}
        """What to say of the jobs, once each."""

    @property
    def choices(self) -> dict[str, str]:
        """The option of each of Hydra's own groups."""
        return OmegaConf.to_container(self._master.hydra.runtime.choices)

    @property
    def launcher(self) -> Launcher:
        """What Hydra is to launch the jobs with."""
        settings = OmegaConf.to_container(self._master.hydra.launcher, resolve=False)
        batch = self._master.hydra.sweeper.get("max_batch_size")
        return Launcher(self.choices["hydra/launcher"], settings, batch)

    @property
    def inputs(self) -> list[Path]:
        """Input files of all jobs so far."""
        return [file for files, _ in self._inputs.values() for file in files]

    @property
    def sweeper(self) -> dict[str, Any]:
        """Settings of ``hydra.sweeper``."""
        return OmegaConf.to_container(self._master.hydra.sweeper, resolve=True, throw_on_missing=True)

    def arguments(self) -> list[Override]:
        """What is asked for: of the command line, or else of ``hydra.sweeper.params``."""
        params = [f"{key}={value}" for key, value in (self._master.hydra.sweeper.params or {}).items()]
        return self._parsed(params + self._asked)

    def space(self, node: Mapping[str, Any]) -> list[Dimension]:
        """The values of settings that are given as on a command line, or as lists."""
        lines = [
            f"{key}={','.join(map(str, value)) if isinstance(value, list) else value}"
            for key, value in node.items()
        ]
        return [dimension(override) for override in self._parsed(lines)]

    def grid(self) -> list[list[str]]:
        """Every combination of the values."""
        arguments = self.arguments()
        for one in arguments:
            if one.is_interval_sweep():
                raise UserError(
                    f"{one.input_line}: no sweep runs every value of an interval; hydra/sweeper=sobol, tpe "
                    "and halving choose some of them, or give a list"
                )
        return BasicSweeper.split_arguments(arguments, max_batch_size=None)[0]

    def options(self, group: str) -> list[str]:
        """Names that can be chosen of a group."""
        return self._loader.get_group_options(group)

    def config(self, overrides: list[str]) -> dict[str, Any]:
        """The config of a job with these overrides, resolved."""
        return self._composed(overrides, 0)[0]

    def _parsed(self, lines: list[str]) -> list[Override]:
        return OverridesParser.create(config_loader=self._loader).parse_overrides(lines)

    def freeze(self, overrides: list[str], number: int, label: str = "") -> sweeps.Job:
        """Compose and check a job.

        Args:
            overrides: of this job, each with one value.
            number: that the config may use as ``hydra.job.num``.
            label: of the job.

        Raises:
            UserError: the input is bad.
        """
        config, choices = self._composed(overrides, number)
        settings.check(config)
        device = self._device(config)
        config |= {"force": False, "device": device.type if config["device"] == "auto" else config["device"]}
        key = json.dumps(config["task"], sort_keys=True)

        def remembered(task: Task) -> tuple[list[Path], str | None]:
            if key not in self._inputs:
                self._inputs[key] = inputs_of(task)
            return self._inputs[key]

        job = job_of(config, choices, device, config["nproc"], remembered)
        check_settings(job)
        self.told[self._presets.line(choices)] = None
        run = os.path.relpath(job.place.path, config["results_dir"])
        return sweeps.Job(overrides, choices, config, run, label)

    def _composed(self, overrides: list[str], number: int) -> tuple[dict[str, Any], dict[str, str]]:
        """The config that Hydra would give to a job, resolved, and its choices."""
        try:
            cfg: DictConfig = self._loader.load_sweep_config(self._master, overrides)
        except HydraException as error:
            error.overrides = overrides  # the job's own, for who explains it
            raise
        before = HydraConfig.instance().cfg
        with open_dict(cfg):
            cfg.hydra.job.num, cfg.hydra.job.id = number, str(number)
            HydraConfig.instance().set_config(cfg)
            choices = OmegaConf.to_container(cfg.hydra.runtime.choices)
            del cfg["hydra"]
        try:
            return OmegaConf.to_container(cfg, resolve=True), choices
        finally:
            HydraConfig.instance().cfg = before

    def _device(self, config: dict[str, Any]) -> torch.device:
        asked = config["device"]
        launcher = self.launcher.name
        if launcher in HERE:
            return settings.device(asked, config["nproc"])
        if asked == "auto":
            raise UserError(
                f"hydra/launcher={launcher} runs jobs on other machines, and device=auto would ask this one: "
                "say device=cuda or device=cpu"
            )
        return torch.device("cuda") if asked == "cuda" else settings.device(asked, config["nproc"])
