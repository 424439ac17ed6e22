"""``clipbench <command>``. Imports nothing heavy before it knows what is asked."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from datetime import datetime
from pathlib import Path

from experiments.errors import UserError, nearest

HELP = """\
clipbench: train with clipped optimizers, and see what clipping did.

  clipbench run task=cola clipping=auto_clip          one run, into results/runs/
  clipbench run -m clipping=norm,auto_clip seed=0,1   a sweep: every combination
  clipbench list clipping                             what there is to choose: task, optimizer, clipping
  clipbench list runs                                 runs so far, with status and best metric
  clipbench run --help                                more of run
  clipbench bench --models resnet18                   what one clipped optimizer step costs
  clipbench check norm                                hold a clipping to the laws; also my_module.MyClip
"""

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

LIST_HELP = """\
clipbench list task|optimizer|clipping|scheduler|preset|experiment   the options, one line each
clipbench list runs [--results-dir DIR]                              runs with status and best metric
"""

GROUPS = ("task", "optimizer", "clipping", "scheduler", "preset", "experiment")


def main() -> None:
    """Entry point of the ``clipbench`` command."""
    sys.exit(_dispatch(sys.argv[1:]))


def _dispatch(argv: list[str]) -> int:
    commands = {"run": _run, "list": _list, "bench": _bench, "check": _check}
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if argv else 2
    try:
        if argv[0] not in commands:
            raise UserError(
                f"there is no command {argv[0]!r}; choose one of {', '.join(commands)}."
                f"{nearest(argv[0], commands)}"
            )
        return commands[argv[0]](argv[1:])
    except UserError as error:
        return _complain(error)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("experiments", "torch_clip"):
            raise
        print(
            f"clipbench needs {error.name}, which its extra brings: pip install '.[bench]' in the clone",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130


def _complain(error: UserError) -> int:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # torchrun's other processes meet the same
        print(f"clipbench: {error}", file=sys.stderr)
    return 2


def _run(argv: list[str]) -> int:
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
            codes.append(_complain(error))
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


def _list(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(LIST_HELP, end="")
        return 0 if argv else 2
    what, options = argv[0], argv[1:]
    if what == "runs":
        return _list_runs(options)
    if what not in GROUPS:
        choices = (*GROUPS, "runs")
        raise UserError(f"cannot list {what!r}; choose one of {', '.join(choices)}.{nearest(what, choices)}")
    if options:
        raise UserError(f"clipbench list {what} takes nothing more, got {' '.join(options)}")
    from experiments.training.presets import conf_dir

    folder = conf_dir() / what
    paths = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.yaml")}
    width = max(map(len, paths), default=0)
    for name, path in sorted(paths.items()):
        comments = [line for line in path.read_text().splitlines() if line.startswith("# ")]
        told = [line for line in comments if not line.startswith("# @")]
        print(f"{name:<{width}}  {told[0][2:] if told else ''}")
    return 0


def _list_runs(options: list[str]) -> int:
    import argparse

    from experiments.analysis.tables import format_table, grid, markdown_grid, runs_table, write_grid
    from experiments.runs import FINISHED, find_runs

    parser = argparse.ArgumentParser(prog="clipbench list runs")
    parser.add_argument("--results-dir", default="results", help="where runs/ lies (default: results)")
    parser.add_argument("--experiment", help="only the runs of this one")
    parser.add_argument(
        "--rows", help="a grid of medians over seeds: its rows, as in clipping,clipping.threshold"
    )
    parser.add_argument("--columns", default="optimizer.lr", help="of the grid (default: %(default)s)")
    parser.add_argument("--out", help="folder to write the grid into, as CSV and Markdown")
    args = parser.parse_args(options)
    root = Path(args.results_dir) / "runs"
    found = [run for run in find_runs(root) if args.experiment in (None, run.names["experiment"])]
    if not found:
        print(f"no runs in {root}; 'clipbench run' makes one, --results-dir looks elsewhere")
        return 0
    if args.rows is None:
        print(format_table(runs_table(found)))
        return 0
    finished = [run for run in found if (run.status or {}).get("status") in FINISHED]
    table = grid(finished, args.rows.split(","), args.columns.split(","))
    print(markdown_grid(table))
    if args.out:
        print(*write_grid(Path(args.out), table), sep="\n")
    return 0


def _bench(argv: list[str]) -> int:
    import argparse

    import torch

    from experiments.analysis.price import markdown, write_price
    from experiments.training.bench import METHODS, MODELS, OPTIMIZERS, bench

    parser = argparse.ArgumentParser(
        prog="clipbench bench",
        description="Time one optimizer step with and without clipping, interleaved in one process.",
    )
    for name, choices in (("models", MODELS), ("optimizers", OPTIMIZERS), ("methods", METHODS)):
        parser.add_argument(f"--{name}", default=",".join(choices), help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--rounds", type=int, default=21, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's")
    parser.add_argument(
        "--out", default="results/bench", help="folder of table and chart (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    asked = {}
    for name, choices in (("models", MODELS), ("optimizers", OPTIMIZERS), ("methods", METHODS)):
        asked[name] = getattr(args, name).split(",")
        for word in asked[name]:
            if word not in choices:
                raise UserError(f"--{name} takes {', '.join(choices)}, got {word!r}.{nearest(word, choices)}")
    for name in ("rounds", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.device != "cpu" and not (args.device.startswith("cuda") and torch.cuda.is_available()):
        raise UserError(f"--device takes cpu, or cuda where there is one, got {args.device!r}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    rows, place = bench(
        **asked, device=torch.device(args.device), dtype=getattr(torch, args.dtype), rounds=args.rounds
    )
    rows = [row._asdict() for row in rows]
    paths = write_price(Path(args.out), rows, place)
    print(markdown(rows, place))
    print(*paths, sep="\n")
    return 0


def _check(argv: list[str]) -> int:
    import argparse

    from torch_clip.methods import CLIPPINGS
    from torch_clip.testing import LAWS, SLOW, check

    parser = argparse.ArgumentParser(
        prog="clipbench check",
        description="Hold clippings to the laws: ours by name, any other as my_module.MyClip.",
    )
    parser.add_argument("name", nargs="*", default=list(CLIPPINGS), help="default: every method of ours")
    parser.add_argument("--fast", action="store_true", help="leave out the laws that start processes")
    args = parser.parse_args(argv)
    laws = [law for law in LAWS if not (args.fast and law in SLOW)]
    failed = False
    for name, make in [(name, _clipping_class(name)) for name in args.name]:
        try:
            verdicts = check(make, laws)
        except (TypeError, ValueError) as error:
            raise UserError(f"{name}: {error}") from None
        print(name)
        for verdict in verdicts:
            told = verdict.message or LAWS[verdict.law].__doc__.splitlines()[0]
            print(f"  {verdict.status:<11}  {verdict.law:<18}  {told}", flush=True)
            failed = failed or verdict.status == "failed"
    return int(failed)


def _clipping_class(name: str):
    """A method of ours by its name, or what a dotted path names; modules are looked for here first."""
    import importlib

    from torch_clip.methods import CLIPPINGS

    if name in CLIPPINGS:
        return CLIPPINGS[name]
    module, _, attribute = name.rpartition(".")
    if not module:
        raise UserError(
            f"there is no clipping {name!r}; choose one of {', '.join(CLIPPINGS)}, or give my_module.MyClip."
            f"{nearest(name, CLIPPINGS)}"
        )
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise UserError(f"{name}: there is no module {error.name!r} here or installed") from None
    except AttributeError:
        raise UserError(f"{name}: {module} has no {attribute!r}") from None
