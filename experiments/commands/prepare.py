"""``clipbench prepare``. Data and weights of a task: fetched, read through, and where they lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from experiments.commands.composing import composed
from experiments.errors import UserError, complain, nearest

if TYPE_CHECKING:
    from experiments.tasks.needs import Need

PREPARE_HELP = """\
clipbench prepare task=NAME [KEY=VALUE ...] [--check]: fetch what a task needs, read it, say where it lies.

  clipbench prepare task=voc                             fetch VOC2012, and read an epoch of it
  clipbench prepare task=cola preset=reference --check   fetch nothing: what is there, what is missing
  clipbench prepare task=imagenet data_dir=imagenet100   what nobody may fetch for you: check the folder

It takes the settings of clipbench run; the preset is paper unless given. Exit code 0: all is there;
1: something is missing or cannot be read; 2: there is no such task or setting.
"""


def main(argv: list[str]) -> int:
    if not argv or "-h" in argv or "--help" in argv:
        print(PREPARE_HELP, end="")
        return 0 if argv else 2
    check, given = _settings(argv)
    config, preset = _composed(given)

    from experiments.training.job import task_of
    from experiments.training.prepare import read_through, told

    task = task_of(config, given["task"])
    needs = task.needs()
    print(f"task={given['task']} preset={preset}", flush=True)
    if not needs:
        print("brings its own data: nothing to prepare")
        return 0
    if check:
        print(*map(told, needs), sep="\n")
        return int(any(need.problem is not None for need in needs))
    fetched = [_fetch(need) for need in needs]
    for need in task.needs():
        if need.problem is None:
            print(told(need), flush=True)
    if not all(fetched):
        return 1
    try:
        print(f"read {read_through(task)}")
    except UserError as error:
        complain(error)
        return 1
    return 0


def _fetch(need: Need) -> bool:
    """Whether it is there now."""
    if need.problem is not None and need.fetch is not None:
        print(f"fetching {need.what} from {need.source}", flush=True)
    try:
        need.get()
    except UserError as error:
        complain(error)
        return False
    return True


def _settings(argv: list[str]) -> tuple[bool, dict[str, str]]:
    """Whether only to check, and the settings."""
    settings = [arg for arg in argv if "=" in arg and not arg.startswith(("-", "~"))]
    for arg in argv:
        if arg not in settings and arg != "--check":
            raise UserError(
                f"clipbench prepare takes KEY=VALUE and --check, got {arg!r}.{nearest(arg, ['--check'])}"
            )
    given = dict(arg.split("=", 1) for arg in settings)
    if "task" not in given:
        raise UserError(
            f"say which task: clipbench prepare task=NAME; choose one of {', '.join(_options('task'))}"
        )
    return "--check" in argv, given


def _composed(given: dict[str, str]) -> tuple[dict[str, Any], str]:
    """The config that ``clipbench run`` would compose of the settings, and its preset."""
    from experiments.training.presets import Presets

    default = "paper" if "paper" in _options(f"preset/{given['task']}") else None
    presets = Presets(given.get("preset", default), given)
    return composed("run", given, presets)[0], presets.name(given["task"])[0]


def _options(group: str) -> list[str]:
    from experiments.training.presets import conf_dir

    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
