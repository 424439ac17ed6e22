"""What a person sees while a run trains: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from experiments.training.recorder import Record
from experiments.training.summary import Results

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Shows step, loss, metric, learning rate and clip fraction of the records it is given.

    Args:
        max_steps: of the run.
        metric: name of the evaluation metric to show.
        results: of the run; those of the steps before, where it is resumed.
        quiet: show nothing.
        stream: where to; a bar if it is a terminal.
        now: seconds; a test gives its own.
    """

    def __init__(
        self,
        max_steps: int,
        metric: str,
        results: Results,
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_steps = max_steps
        self._metric = metric
        self._results = results
        self._stream = sys.stderr if stream is None else stream
        self._quiet = quiet
        self._now = now
        self._began = self._last_line = now()
        self._first = self._step = results.steps
        self._shown: dict[str, float] = {}
        self._bar = None
        if not quiet and self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=max_steps, initial=self._first, unit="step", file=self._stream, dynamic_ncols=True
            )

    def show(self, records: list[Record]) -> None:
        """Show where the run is after ``records``, which its results know."""
        steps = [record for record in records if "lr" in record]
        ahead, self._step = self._step, records[-1]["step"]
        if steps:
            self._shown |= {"loss": steps[-1]["train/loss"], "lr": steps[-1]["lr"]}
        value = records[-1].get(f"val/{self._metric}")
        if value is not None:
            self._shown["val loss" if self._metric == "loss" else self._metric] = value
        self._shown["clipped"] = self._results.clip_fraction
        if self._bar is not None:
            self._bar.set_postfix_str(self._text(), refresh=False)
            self._bar.update(self._step - ahead)
        elif not self._quiet and (
            value is not None or self._now() - self._last_line >= SECONDS_BETWEEN_LINES
        ):
            self._last_line = self._now()
            seconds = self._last_line - self._began
            left = seconds * (self._max_steps - self._step) / (self._step - self._first)
            print(
                f"step {self._step}/{self._max_steps}  {self._text()}  {seconds:.0f} s, {left:.0f} s left",
                file=self._stream,
                flush=True,
            )

    def close(self) -> None:
        """Leave the last state of a bar standing."""
        if self._bar is not None:
            self._bar.close()

    def _text(self) -> str:
        return "  ".join(
            f"{name} {value:.1%}" if name == "clipped" else f"{name} {value:.4g}"
            for name, value in self._shown.items()
        )
