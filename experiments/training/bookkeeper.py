"""Writes down what the loop yields, and says how it ended."""

from __future__ import annotations

import contextlib
import signal
import traceback
from collections.abc import Iterable, Iterator
from typing import Any

import torch

import torch_clip
from experiments.runs import Run
from experiments.training.checkpoint import Checkpoints
from experiments.training.progress import Progress
from experiments.training.recorder import Diverged
from experiments.training.state import State
from experiments.training.stop import Stop
from experiments.training.summary import Results
from experiments.training.train import Moment

GOES_ON = "the same command goes on from there"
LOWER = "lower task.batch_size and raise accumulate as much, for the same batch a step, or shrink the model"
# RuntimeError is all that torch raises on a CPU.
NO_MEMORY = ("can't allocate memory", "not enough memory")


class DiskError(Exception):
    """The run's folder cannot be written any more; what is in it stays true."""


class Bookkeeper:
    """Keeps the books of one run.

    Args:
        place: the run, locked.
        checkpoints: of the run.
        state: of the training. Only the first of its processes writes and shows anything.
        results: grow with the records, and are saved too.
        progress: shows them.
        max_steps: of the run.
        facts: saved in the checkpoints, to compare when one is loaded.
    """

    def __init__(
        self,
        place: Run,
        checkpoints: Checkpoints,
        state: State,
        results: Results,
        progress: Progress,
        max_steps: int,
        facts: dict[str, Any],
    ) -> None:
        self._place = place
        self._checkpoints = checkpoints
        self._state = state
        self._results = results
        self._progress = progress
        self._max_steps = max_steps
        self._facts = facts

    def follow(self, moments: Iterable[Moment], stop: Stop) -> tuple[str, str | None]:
        """Write down all ``moments``; return how that ended, as status and message.

        Raises:
            DiskError: writing failed.
        """
        try:
            for moment in moments:
                self.write(moment)
        except DiskError:
            raise
        except Diverged as diverged:
            return "diverged", str(diverged)
        except KeyboardInterrupt:
            stop.signal = signal.SIGINT
            return "killed", f"interrupted; {GOES_ON.replace('there', 'its last checkpoint')}"
        except torch_clip.NonFiniteGradientError as error:  # asked for, by nonfinite=error
            return "error", str(error)
        except Exception as error:
            if _is_out_of_memory(error):
                return "oom", f"{_first_line(error)}; {LOWER}"
            traceback.print_exc()
            return "error", f"{type(error).__name__}: {error}"
        step = self._state.step
        if step == self._max_steps:
            return "ok", None
        if stop.signal is not None:
            return "killed", f"stopped by {signal.Signals(stop.signal).name} after step {step}; {GOES_ON}"
        return "timeout", f"max_seconds were over after step {step}; {GOES_ON}"

    def write(self, moment: Moment) -> None:
        """Write down one moment."""
        self._results.add(moment.records)
        if not self._state.ranks.first:
            return
        with writing():
            self._place.append(moment.records)
            if moment.evaluated and self._results.at_best:
                best = {**self._results.best, "model": self._state.model.state_dict()}
                self._checkpoints.save_best(best)
            if moment.state is not None:
                step = self._state.step
                content = {
                    "step": step,
                    "state": moment.state,
                    "results": self._results.state_dict(),
                    "facts": self._facts,
                }
                self._checkpoints.save_last(step, content, final=step == self._max_steps)
        if moment.records:
            self._progress.show(moment.records)


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Around what is written to the run's folder."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"cannot write the run: {error.strerror or error}") from error


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
