"""``clipbench tails``. How heavy the tails of the gradient noise are, at frozen weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from experiments.commands.composing import composed
from experiments.errors import UserError, writing

TAILS_HELP = """\
clipbench tails [KEY=VALUE ...]: at frozen weights, how gradient norms and gradient noise are distributed.

  clipbench tails task=quadratic                    heavy: its noise is Student's t, 1.5 degrees of freedom
  clipbench tails task=quadratic task.noise=gaussian
  clipbench tails task=cola samples=1000
  clipbench tails checkpoint=results/runs/adhoc/cola-mini/adamw-norm/0123456789ab/seed=0

groups   task preset (clipbench list GROUP shows the options)
keys     samples checkpoint seed precision device data_dir results_dir out force quiet
into     any setting of the task: task.batch_size=16

Two passes over the same mini-batches: one for their mean gradient, one for the norm of each gradient, of its
difference from the mean (the noise), and the noise along one random direction. The model is in training mode.
With checkpoint=, a run's folder (its best, else its last) or a file in its checkpoints/, the weights are that
run's, and so are task, preset and settings of the task unless they are given; else they are initial weights.

Printed and written into report/ of the folder at the end: the tail index by Hill and by blocks, a power law
against a lognormal, skewness, all with intervals; a verdict, heavy, not heavy or undecided, with the reason;
histogram, survival function, Hill plot and QQ plot as PNG and PDF with what they draw as CSV.
A finished measurement is not made again; force=true does. out=FOLDER publishes report/ there as well.
"""


class Asked(NamedTuple):
    """What a command line asks for."""

    config: dict[str, Any]
    choices: dict[str, str]
    """Name of the option of each group."""
    told: str
    """Settings of the task that are not those of its preset."""
    line: str
    """Which preset was chosen, and why."""


def main(argv: list[str]) -> int:
    if "-h" in argv or "--help" in argv:
        print(TAILS_HELP, end="")
        return 0
    from experiments.analysis.tails import report
    from experiments.training.tails import collect

    asked = _asked(_settings(argv))
    if not asked.config["quiet"]:
        print(asked.line, flush=True)
    out = asked.config.pop("out")
    if out is not None and Path(str(out)).is_file():
        raise UserError(f"out must be a folder, got the file {out}")
    outcome = collect(asked.config, asked.choices, asked.told)
    state = outcome.status if outcome.fresh else f"already {outcome.status}"
    print(f"{state}: {outcome.message}", flush=True)
    if outcome.status == "ok":
        print(report(outcome.run))
        if out is not None:
            _publish(outcome.run.report_dir, str(out))
    print(outcome.run.path)
    return 0 if outcome.status in ("ok", "diverged") else 1


def _publish(report: Path, out: str) -> None:
    import shutil

    with writing("out", out):
        shutil.copytree(report, out, dirs_exist_ok=True)


def _settings(argv: list[str]) -> dict[str, str]:
    for arg in argv:
        if "=" not in arg or arg.startswith(("-", "~", "+")):
            raise UserError(f"tails takes KEY=VALUE, got {arg!r}; clipbench tails --help shows the keys")
    return dict(arg.split("=", 1) for arg in argv)


def _asked(given: dict[str, str]) -> Asked:
    from experiments.analysis.methods import flatten
    from experiments.runs import find_checkpoint
    from experiments.training.presets import Presets
    from experiments.training.tails import as_trained

    checkpoint = given.get("checkpoint", "null")
    checkpoint = None if checkpoint == "null" else checkpoint
    trained = {} if checkpoint is None else find_checkpoint(checkpoint)[1].config()
    names = {name: value for name, value in trained.get("names", {}).items() if name in ("task", "preset")}
    settings = {**names, **given}
    if names and settings["task"] != names["task"]:
        raise UserError(f"the checkpoint is of task={names['task']}, got task={settings['task']}")
    presets = Presets(settings.get("preset"), settings)
    # Hydra's grammar has no "=" in a value, as there is in the path of a run.
    overrides = {key: value for key, value in settings.items() if key != "checkpoint"}
    config, choices = composed("tails", overrides, presets)
    config["checkpoint"] = checkpoint
    line = presets.line(choices)
    own = {key: value for key, value in given.items() if key.startswith("task.")}
    if names and settings["preset"] == names["preset"]:
        preset = flatten(config["task"], "task")
        config["task"] = as_trained(config["task"], trained["task"], given)
        theirs = flatten(config["task"], "task")
        own |= {key: value for key, value in theirs.items() if value != preset[key]}
        line = f"task={names['task']} preset={names['preset']}: that of the checkpoint"
    told = ", ".join(f"{key.removeprefix('task.')}={value}" for key, value in own.items())
    return Asked(config, choices, told, line)
