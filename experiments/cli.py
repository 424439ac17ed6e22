"""``clipbench <command>``. Imports nothing heavy before it knows what is asked."""

from __future__ import annotations

import importlib
import os
import sys

from experiments.errors import UserError, complain, nearest, not_installed

HELP = """\
clipbench: train with clipped optimizers, and see what clipping did.

  clipbench run task=cola clipping=auto_clip          one run, into results/runs/
  clipbench run -m clipping=norm,auto_clip seed=0,1   a sweep: every combination
  clipbench sweep status                              how it stands; also resume, retry --failed, prune
  clipbench prepare task=voc --check                  what is there of its data; without --check, fetch it
  clipbench list clipping                             what there is to choose: task, optimizer, clipping
  clipbench list runs                                 runs so far, with status and best metric
  clipbench compare --experiment adhoc                which clipping is better, how sure that is, at what cost
  clipbench run --help                                more of run
  clipbench tails task=quadratic                      is its gradient noise heavy-tailed? at frozen weights
  clipbench figures                                   every figure of conf/figure from runs; --check, --run
  clipbench report adhoc                              one page of an experiment: verdicts, figures, settings
  clipbench bench --models resnet18                   what one clipped optimizer step costs
  clipbench check norm                                hold a clipping to the laws; also my_module.MyClip
"""

COMMANDS = ("run", "sweep", "prepare", "tails", "list", "compare", "figures", "report", "bench", "check")


def main() -> None:
    """Entry point of the ``clipbench`` command."""
    try:
        try:
            code = _dispatch(sys.argv[1:])
        except SystemExit as stop:  # of argparse, or of a run that a signal stopped
            code = stop.code
        sys.stdout.flush()
    except BrokenPipeError:  # who read the output, such as head, has seen enough
        # What is flushed at exit must go somewhere, or that fails too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if argv else 2
    command, *rest = argv
    if "" not in sys.path:
        sys.path.insert(0, "")  # a _target_ may name a module that lies here
    try:
        if command not in COMMANDS:
            raise UserError(
                f"there is no command {command!r}; choose one of {', '.join(COMMANDS)}."
                f"{nearest(command, COMMANDS)}"
            )
        return importlib.import_module(f"experiments.commands.{command}").main(rest)
    except UserError as error:
        return complain(error)
    except ModuleNotFoundError as error:
        return complain(not_installed(error))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    main()
