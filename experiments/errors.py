"""What the user can mend: one message, exit code 2, no traceback."""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path


class UserError(Exception):
    """Bad input. The message names the value, what is allowed or looked for, and the way on."""

    def __init__(self, message: str) -> None:
        # A data-loader worker hands its error on around the traceback, which ends with the message.
        kind = type(self)
        super().__init__(message.rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip())


def nearest(name: str, choices: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the choice closest to ``name``, or an empty string."""
    by_lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f" Did you mean '{by_lower[close[0]]}'?" if close else ""


@contextlib.contextmanager
def writing(option: str, path: str | Path) -> Iterator[None]:
    """Around what is written where an option says: a disk that refuses is the user's to mend."""
    try:
        yield
    except OSError as error:
        where, why = error.filename or path, error.strerror or error
        raise UserError(f"{option}: cannot write {where}: {why}") from None


def complain(error: UserError) -> int:
    """Print the message; return the exit code."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # torchrun's other processes meet the same
        print(f"clipbench: {error}", file=sys.stderr)
    return 2


def not_installed(error: ModuleNotFoundError) -> UserError:
    """What to do about a package that is missing; one of our own modules is a defect, and raised."""
    name = (error.name or "experiments").split(".")[0]
    if name in ("experiments", "torch_clip"):
        raise error
    extra = "tune" if name == "optuna" else "bench"
    return UserError(
        f"this needs {error.name}, which an extra of torch-clip brings: pip install '.[{extra}]' in the clone"
    )
