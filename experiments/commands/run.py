"""``clipbench run``. One run, or a sweep: the command line to Hydra, and what came of it."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from datetime import datetime
from pathlib import Path

from experiments.errors import UserError, complain, not_installed

RUN_HELP = """\
clipbench run [-m] [KEY=VALUE ...]: train one run, or with -m every combination of comma-separated values.

  clipbench run task=cola clipping=auto_clip
  clipbench run clipping=norm clipping.threshold=0.5 optimizer=sgd optimizer.lr=0.1 seed=3
  clipbench run max_steps=50 eval_every=25 device=cpu quiet=true
  clipbench run -m clipping=norm,auto_clip,no_clip seed=0,1
  clipbench run clipping=auto_clip --cfg job        show the config, run nothing

groups   task optimizer clipping scheduler preset (clipbench list GROUP shows the options)
keys     seed max_steps eval_every warmup_steps precision compile accumulate device nproc data_dir
         results_dir log_every checkpoint_every keep max_seconds force quiet
into     any setting of a chosen option: optimizer.lr=0.1 clipping.percentile=0.25 task.batch_size=16

The run's folder is printed at the end: config.yaml, metrics.parquet, summary.json, curves.png.
A finished run is not run again; force=true does. One that was stopped, or killed, goes on from its last
checkpoint when the same command is given again.
"""


def main(argv: list[str]) -> int:
    if "-h" in argv or "--help" in argv:
        print(RUN_HELP, end="")
        return 0
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from experiments.complaints import explain
    from experiments.training.presets import Presets, conf_dir

    flags, given = _settings(argv)
    presets = Presets(given.get("preset"), given)
    sweep = SweepFolder()
    resolvers = {
        "default_preset": lambda task: presets.name(task)[0],
        "preset_default": presets.value,
        "sweep_dir": sweep.under,
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)
    codes = []

    def job(cfg: DictConfig) -> None:
        try:
            codes.append(_one_run(cfg, dict(HydraConfig.get().runtime.choices), presets))
        except UserError as error:
            codes.append(complain(error))
        except ModuleNotFoundError as error:
            codes.append(complain(not_installed(error)))
        except Exception:  # in a sweep the other jobs go on
            traceback.print_exc()
            codes.append(1)

    # Hydra's own reporting ends with a hint at a traceback; ours names choices instead.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Hydra's parser takes overrides in one piece only, not on both sides of a flag.
    sys.argv = ["clipbench run", *flags, *(f"{key}={value}" for key, value in _for_hydra(given).items())]
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="run")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise presets.complaint or explain(error, given) from None
    except OSError as error:
        raise UserError(f"results_dir: cannot write {error.filename}: {error.strerror}") from None
    finally:
        sweep.clean(keep=any(code != 2 for code in codes))
    return max(codes, default=0)


def _settings(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Flags, and the settings given as KEY=VALUE."""
    for arg in argv:
        if arg.startswith("~"):
            raise UserError(f"{arg}: nothing can be taken out of the config; give KEY=VALUE")
    settings = [arg for arg in argv if "=" in arg and not arg.startswith("-")]
    flags = [arg for arg in argv if arg not in settings]
    given = dict(arg.split("=", 1) for arg in settings)
    multirun = "-m" in flags or "--multirun" in flags
    if multirun and any(flag == "-c" or flag.startswith("--cfg") for flag in flags):
        raise UserError("--cfg shows the config of one run: leave out -m")
    if "," in given.get("preset", ""):
        raise UserError(f"one preset a launch, got preset={given['preset']}: presets never share a table")
    return flags, given


def _for_hydra(given: dict[str, str]) -> dict[str, str]:
    """``preset=NAME`` as the option that Hydra looks for."""
    return {key: "${task}/" + value if key == "preset" else value for key, value in given.items()}


class SweepFolder:
    """The folder that Hydra makes for a sweep before it looks at the first job."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._made: list[Path] = []

    def under(self, results_dir: str) -> str:
        """Name the folder of this launch."""
        if self._path is None:
            self._path = Path(results_dir) / "sweeps" / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
            self._made = [path for path in (self._path, *self._path.parents) if not path.exists()]
        return str(self._path)

    def clean(self, keep: bool) -> None:
        """Unless jobs ran: leave nothing behind that this launch has made."""
        if keep or self._path is None or self._path not in self._made:
            return
        with contextlib.suppress(OSError):  # never made, or not empty
            (self._path / "multirun.yaml").unlink(missing_ok=True)
            for folder in self._made:
                folder.rmdir()


def _one_run(cfg, choices: dict[str, str], presets) -> int:
    from experiments.analysis.draw import draw_curves
    from experiments.training.run import run

    task = choices["task"]
    first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes
    if first and not cfg.quiet:
        name, why = Path(choices["preset"]).name, presets.name(task)[1]
        print(f"task={task} preset={name}: {why}", flush=True)
    outcome = run(cfg, choices)
    if first:
        if outcome.status in ("ok", "diverged") and not outcome.run.curves_path.exists():
            draw_curves(outcome.run)
        state = outcome.status if outcome.fresh else f"already {outcome.status}"
        print(f"{state}: {outcome.message}\n{outcome.run.path}", flush=True)
    if outcome.signal is not None:  # ends a sweep too
        raise SystemExit(128 + outcome.signal)
    return 0 if outcome.status in ("ok", "diverged") else 1
