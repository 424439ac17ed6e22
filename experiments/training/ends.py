"""What an exception makes of a run: a status, and a message that says what to do about it."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

import torch_clip
from experiments.errors import UserError, not_installed
from experiments.runs import FAILED
from experiments.training.ranks import Ranks
from experiments.training.recorder import Diverged

T = TypeVar("T")

GOES_ON = "the same command goes on from there"
AT_LAST = GOES_ON.replace("there", "its last checkpoint")
LOWER = "lower task.batch_size and raise accumulate as much, for the same batch a step, or shrink the model"
LOWER_AT_START = "shrink the model or its data (the settings of task), lower task.batch_size, or free memory"
# RuntimeError is all that torch raises on a CPU, and now and then on a device.
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "std::bad_alloc", "ALLOC_FAILED")


class End(NamedTuple):
    """How a run ended."""

    status: str
    message: str | None = None
    signal: int | None = None
    """What ended it, if a signal did."""


def attempt(work: Callable[[], T], ranks: Ranks) -> T | End:
    """What ``work`` makes in each process, or the end of the run that one of them has come to.

    Args:
        work: what comes before the first step.
        ranks: the processes, which all attempt it.

    Raises:
        UserError: ``work`` raised it in one of them, or a package is missing there.
    """
    made: T | None = None
    failure: End | UserError | None = None
    try:
        made = work()
    except UserError as error:
        failure = error
    except ModuleNotFoundError as error:
        failure = not_installed(error)
    except Exception as error:
        failure = agreed_end(error, ranks, LOWER_AT_START)
    failure = next((failure for failure in ranks.gather(failure) if failure is not None), None)
    if isinstance(failure, UserError):
        raise failure
    return made if failure is None else failure


def agreed_end(error: Exception, ranks: Ranks, lower: str = LOWER) -> End:
    """The end that ``error`` makes of a run, or that of another process which failed before this one.

    Of several processes that train together one fails, and what the others meet is that it is gone. What the
    end does not say of ``error`` is printed, by the one that it is about.

    Args:
        error: anything that training, or what comes before it, raises.
        ranks: the processes; none of them is waited for.
        lower: what to do where memory has run out.
    """
    own = end_of(error, lower)
    if not ranks.first and own.status in FAILED and not _says_all(error):
        own = own._replace(message=f"process {ranks.rank}: {own.message}")
    rank, told = ranks.first_told(own)
    if rank == ranks.rank:
        _show(error, own)
    return End(*told)


def end_of(error: Exception, lower: str = LOWER) -> End:
    """The end that ``error`` makes of a run of one process."""
    if isinstance(error, Diverged):
        return End("diverged", str(error))
    if _says_all(error):
        return End("error", str(error))
    if (cause := lack_of_memory(error)) is not None:
        return End("oom", f"{_line(cause)}; {lower}")
    if _is_lost_process(error):
        return End("killed", f"one of its processes died; {AT_LAST}")
    return End("error", f"{type(error).__name__}: {error}")


def lack_of_memory(error: BaseException | None) -> BaseException | None:
    """What says that memory has run out, of the host or of a device: ``error``, or what brought it about."""
    while error is not None and not _says_no_memory(error):
        error = error.__cause__ or error.__context__  # torch.compile raises its own around it
    return error


def _says_no_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):  # of starting a process, say
        return error.errno == errno.ENOMEM
    by_text = isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)
    return by_text or isinstance(error, MemoryError | torch.OutOfMemoryError)


def _show(error: Exception, end: End) -> None:
    if isinstance(error, UserError):
        print(f"clipbench: {error}", file=sys.stderr)
    elif end.status == "error" and not _says_all(error):
        traceback.print_exception(error)


def _says_all(error: Exception) -> bool:
    # NonFiniteGradientError is asked for, by nonfinite=error.
    return isinstance(error, UserError | torch_clip.NonFiniteGradientError)


def _is_lost_process(error: Exception) -> bool:
    """Whether another process that trains this model is gone; over NCCL this one would be ended too."""
    return isinstance(error, RuntimeError) and "gloo" in str(error) and "by peer" in str(error)


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # What a data-loader worker raised comes around its whole traceback, whose last line it is.
    return lines[-1] if lines[0].startswith("Caught ") else lines[0]
