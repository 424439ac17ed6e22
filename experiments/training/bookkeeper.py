"""Writes down what the loop yields, and says how it ended."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterable, Iterator
from typing import Any

from experiments.runs import Run
from experiments.training.checkpoint import Checkpoints
from experiments.training.ends import AT_LAST, GOES_ON, End, agreed_end
from experiments.training.loggers import Logger
from experiments.training.progress import Progress
from experiments.training.state import State
from experiments.training.stop import Stop
from experiments.training.summary import Results
from experiments.training.train import Moment


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
        logger: gets a copy of what is written.
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
        logger: Logger,
        max_steps: int,
        facts: dict[str, Any],
    ) -> None:
        self._place = place
        self._checkpoints = checkpoints
        self._state = state
        self._results = results
        self._progress = progress
        self._logger = logger
        self._max_steps = max_steps
        self._facts = facts

    def follow(self, moments: Iterable[Moment], stop: Stop) -> End:
        """Write down all ``moments``; return how that ended.

        Raises:
            DiskError: writing failed.
        """
        try:
            for moment in moments:
                self.write(moment)
        except DiskError:
            raise
        except KeyboardInterrupt:
            return End("killed", f"interrupted; {AT_LAST}", signal.SIGINT)
        except Exception as error:
            self._progress.close()  # or what is printed would follow its bar
            return agreed_end(error, self._state.ranks)
        step = self._state.step
        if step == self._max_steps:
            return End("ok")
        if stop.signal is not None:
            name = signal.Signals(stop.signal).name
            return End("killed", f"stopped by {name} after step {step}; {GOES_ON}", stop.signal)
        if stop.reached(step):
            return End("killed", f"stopped after step {step}, where its sweep compares trials; {GOES_ON}")
        return End("timeout", f"max_seconds were over after step {step}; {GOES_ON}")

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
            self._logger.log(moment.records)


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Around what is written to the run's folder."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"cannot write the run: {error.strerror or error}") from error
