"""``clipbench run``. One run, or a sweep: the command line to Hydra, and what came of it."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from experiments.errors import UserError, complain, not_installed

RUN_HELP = """\
clipbench run [-m] [KEY=VALUE ...]: train one run, or with -m every combination of comma-separated values.

  clipbench run task=cola clipping=auto_clip
  clipbench run clipping=norm clipping.threshold=0.5 optimizer=sgd optimizer.lr=0.1 seed=3
  clipbench run max_steps=50 eval_every=25 device=cpu quiet=true
  clipbench run -m clipping=norm,auto_clip,no_clip seed=0,1
  clipbench run -m clipping=norm,auto_clip 'seed=range(5)' --dry-run       what it would run, and how long
  clipbench run -m clipping=norm,auto_clip seed=0,1 hydra/launcher=joblib hydra.launcher.n_jobs=2
  clipbench run -m hydra/sweeper=sobol 'optimizer.lr=tag(log,interval(1e-3,1))' hydra.sweeper.n_trials=8
  clipbench run clipping=auto_clip logger=tensorboard      also wandb, mlflow: a copy of the records there
  clipbench run clipping=auto_clip --cfg job        show the config, run nothing

groups   task optimizer clipping scheduler preset logger (clipbench list GROUP shows the options)
keys     seed max_steps eval_every warmup_steps precision compile accumulate device nproc data_dir
         results_dir log_every checkpoint_every keep max_seconds force quiet
into     any setting of a chosen option: optimizer.lr=0.1 clipping.percentile=0.25 task.batch_size=16

The run's folder is printed at the end: config.yaml, metrics.parquet, summary.json, curves.png.
A finished run is not run again; force=true does. One that was stopped, or killed, goes on from its last
checkpoint when the same command is given again.

A sweep freezes all its jobs before the first one runs; the same command again runs what is missing, and
clipbench sweep (status, resume, retry --failed, prune) works on it. It runs one job after the other;
hydra/launcher=joblib runs several, submitit_slurm and ray run them on other machines.
hydra/sweeper=sobol, tpe and halving choose n_trials of the values instead of running every combination;
experiment=tune_quadratic, tune_cola and so on tune every method alike and report it next to its defaults.
"""

MULTIRUN = ("-m", "--multirun")


def main(argv: list[str]) -> int:
    if "-h" in argv or "--help" in argv:
        print(RUN_HELP, end="")
        return 0
    flags, given = _settings(argv)
    if any(flag in MULTIRUN for flag in flags) or "--dry-run" in flags or _is_sweep(flags, given):
        from experiments.commands.launch import launch

        return launch(argv, [flag for flag in flags if flag not in MULTIRUN], given)
    return _single(flags, given)


def _settings(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Flags, and the settings given as KEY=VALUE."""
    for arg in argv:
        if arg.startswith("~"):
            raise UserError(f"{arg}: nothing can be taken out of the config; give KEY=VALUE")
    settings = [arg for arg in argv if "=" in arg and not arg.startswith("-")]
    flags = [arg for arg in argv if arg not in settings]
    return flags, dict(arg.split("=", 1) for arg in settings)


def _is_sweep(flags: list[str], given: dict[str, str]) -> bool:
    """Whether the settings ask for a sweep without ``-m``, as the file of an experiment may."""
    from experiments.training.presets import added_conf, conf_dir

    if "hydra.mode" in given:
        return given["hydra.mode"].upper() == "MULTIRUN"
    own, _ = added_conf(flags)
    folders = (conf_dir(), *([] if own is None else [Path(own)]))
    paths = [folder / "experiment" / f"{given.get('experiment', 'adhoc')}.yaml" for folder in folders]
    text = next((path.read_text() for path in paths if path.is_file()), "")
    if "MULTIRUN" not in text:
        return False
    import yaml

    return (yaml.safe_load(text).get("hydra") or {}).get("mode") == "MULTIRUN"


def _single(flags: list[str], given: dict[str, str]) -> int:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    from experiments.complaints import explain
    from experiments.training.presets import Presets, added_conf, conf_dir, for_hydra

    presets = Presets(given.get("preset"), given, added_conf(flags)[0])
    presets.register()
    codes = []

    def job(cfg: DictConfig) -> None:
        try:
            codes.append(_one_run(cfg, dict(HydraConfig.get().runtime.choices), presets))
        except UserError as error:
            codes.append(complain(error))
        except ModuleNotFoundError as error:
            codes.append(complain(not_installed(error)))
        except Exception:  # not to Hydra, which would add its own
            traceback.print_exc()
            codes.append(1)

    # Hydra's own reporting ends with a hint at a traceback; ours names choices instead.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Hydra's parser takes overrides in one piece only, not on both sides of a flag.
    sys.argv = ["clipbench run", *flags, *for_hydra(given)]
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="run")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise presets.complaint or explain(error, given) from None
    return max(codes, default=0)


def _one_run(cfg, choices: dict[str, str], presets) -> int:
    from experiments.analysis.draw import draw_curves
    from experiments.training.run import run

    first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes
    if first and not cfg.quiet:
        print(presets.line(choices), flush=True)
    outcome = run(cfg, choices)
    if first:
        if outcome.status in ("ok", "diverged") and not outcome.run.curves_path.exists():
            draw_curves(outcome.run)
        state = outcome.status if outcome.fresh else f"already {outcome.status}"
        print(f"{state}: {outcome.message}\n{outcome.run.path}", flush=True)
    if outcome.signal is not None:
        raise SystemExit(128 + outcome.signal)
    return 0 if outcome.status in ("ok", "diverged") else 1
