"""Which preset a launch uses, and what a preset chooses by default: resolvers for conf/run.yaml."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.errors import UserError, nearest


def conf_dir() -> Path:
    """The folder of YAML: inside the package where it is installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def for_hydra(given: Mapping[str, str]) -> list[str]:
    """Settings as overrides, with ``preset=NAME`` as the option that Hydra looks for."""
    for key, value in given.items():
        if value == "null" and (conf_dir() / key).is_dir():
            raise UserError(f"{key}=null: name an option; clipbench list {key} shows them")
    return [
        f"{key}=${{task}}/{value}" if key == "preset" else f"{key}={value}" for key, value in given.items()
    ]


def added_conf(flags: list[str]) -> tuple[str | None, list[str]]:
    """The folder that ``--config-dir`` names, and the other flags."""
    folder, others, rest = None, [], iter(flags)
    for flag in rest:
        name, _, value = flag.partition("=")
        if name not in ("--config-dir", "-cd"):
            others.append(flag)
            continue
        folder = value or next(rest, "")
        if not Path(folder).is_dir():
            raise UserError(f"{name} must be a folder, got {folder!r}")
    return folder, others


OVERRIDE_PRESET = "override /preset"


class Presets:
    """The presets of one launch: chosen on the command line, or once for the task.

    Args:
        chosen: name given on the command line, or None.
        given: settings of the command line, which may say where data and weights are.
        config_dir: one more folder of YAML.
    """

    def __init__(
        self, chosen: str | None, given: Mapping[str, str], config_dir: str | Path | None = None
    ) -> None:
        self.chosen = chosen
        self._folders = [conf_dir(), *([] if config_dir is None else [Path(config_dir)])]
        self.given = {key: value for key, value in given.items() if value != "null"}
        self.complaint: UserError | None = None
        """What was raised here, which Hydra does not pass on."""

    def register(self) -> None:
        """Let conf/run.yaml ask this launch's presets."""
        from omegaconf import OmegaConf

        resolvers = {"default_preset": lambda task: self.name(task)[0], "preset_default": self.value}
        for name, resolver in resolvers.items():
            OmegaConf.register_new_resolver(name, resolver, replace=True)

    @functools.cache  # noqa: B019  one object a launch
    def name(self, task: str) -> tuple[str, str]:
        """Preset for ``task``, and why."""
        if self.chosen is not None:
            return self.chosen, "as asked"
        if (of_experiment := self._of_experiment(task)) is not None:
            return of_experiment, f"experiment={self.given['experiment']} says so"
        names = self._names(task)
        if not names:
            self.complaint = self._no_names(task)
            raise self.complaint
        if "paper" not in names:
            return names[0], "the only one of this task"
        import torch

        if not torch.cuda.is_available():
            return "mini", "there is no CUDA device; preset=paper runs the full one on any device"
        try:
            missing = self._missing_for_paper(task)
        except UserError as error:
            self.complaint = error
            raise
        if missing:
            return "mini", f"preset=paper is out of reach: {missing}"
        return "paper", "there is a CUDA device and the data is at hand; preset=mini runs in seconds"

    def line(self, choices: Mapping[str, str]) -> str:
        """Say which preset was chosen for a task, and why."""
        task, preset = choices["task"], Path(choices["preset"]).name
        return f"task={task} preset={preset}: {self.name(task)[1]}"

    def value(self, key: str, task: str) -> Any:
        """What the launch's preset of ``task`` says of ``key``, before Hydra composes it."""
        import yaml

        name = self.name(task)[0]
        if name not in (choices := self._names(task)):
            self.complaint = no_preset(task, name, choices)
            raise self.complaint
        return yaml.safe_load(self._file("preset", task, f"{name}.yaml").read_text())[key]

    def _names(self, task: str) -> list[str]:
        return sorted(
            {path.stem for folder in self._folders for path in folder.glob(f"preset/{task}/*.yaml")}
        )

    def _no_names(self, task: str) -> UserError:
        tasks = sorted(path.stem for folder in self._folders for path in folder.glob("task/*.yaml"))
        if task not in tasks:
            return UserError(
                f"there is no task {task!r}; choose one of {', '.join(tasks)}.{nearest(task, tasks)}"
            )
        return UserError(
            f"task {task} has no preset: preset/{task}/mini.yaml beside task/{task}.yaml gives one"
        )

    def _of_experiment(self, task: str) -> str | None:
        """The preset of ``task`` that the experiment's own file names as ``TASK/NAME``; None without one."""
        import yaml

        try:
            path = self._file("experiment", f"{self.given['experiment']}.yaml")
            defaults = yaml.safe_load(path.read_text())["defaults"]
            named = [one.get(OVERRIDE_PRESET) for one in defaults if isinstance(one, dict)]
        except (KeyError, StopIteration, TypeError, yaml.YAMLError):  # Hydra says what is wrong with it
            return None
        names = [str(name).removeprefix(f"{task}/") for name in named if str(name).startswith(f"{task}/")]
        return names[-1] if names else None

    def _file(self, *parts: str) -> Path:
        return next(path for folder in self._folders if (path := folder.joinpath(*parts)).is_file())

    def _missing_for_paper(self, task: str) -> str | None:
        """What the task's paper preset needs that is neither there nor can be fetched; looked for at launch.

        Of several values of one setting the first counts.
        """
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from omegaconf import OmegaConf

        from experiments.training.job import task_of

        config = OmegaConf.load(conf_dir() / "run.yaml")
        config.task = OmegaConf.load(self._file("task", f"{task}.yaml"))
        config.preset = OmegaConf.load(self._file("preset", task, "paper.yaml"))
        about_data = [
            f"{k}={v}" for k, v in self.given.items() if k == "data_dir" or k.startswith(("task.", "preset."))
        ]
        for setting in OverridesParser.create().parse_overrides(about_data):
            several = setting.is_sweep_override()
            value = next(setting.sweep_iterator()) if several else setting.value()
            OmegaConf.update(config, setting.key_or_group, value)
        resolved = {"task": OmegaConf.to_container(config.task, resolve=True), "data_dir": config.data_dir}
        for need in task_of(resolved, task).needs():
            try:
                need.check()
            except UserError as error:
                return str(error)
        return None


def no_preset(task: str, name: str, choices: Sequence[str]) -> UserError:
    """What to say of a preset that a task does not have, ``choices`` being those it has."""
    return UserError(
        f"task {task} has no preset {name!r}; it has {', '.join(choices)}.{nearest(name, choices)}"
    )
