"""``clipbench <command>``. Imports nothing heavy before it knows what is asked."""

from __future__ import annotations

import importlib
import sys

from experiments.errors import UserError, complain, nearest, not_installed

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

COMMANDS = ("run", "list", "bench", "check")


def main() -> None:
    """Entry point of the ``clipbench`` command."""
    sys.exit(_dispatch(sys.argv[1:]))


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if argv else 2
    command, *rest = argv
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
