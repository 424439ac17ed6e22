"""Ending a run before its time, in order."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Says whether to stop: a signal has come, the time is up, or a step is reached.

    While it is entered, SIGTERM and SIGINT only leave word here, so that the step in progress is finished and
    a checkpoint written. A second SIGINT does not wait for that.

    Args:
        max_seconds: from now; None is no limit.
        now: seconds; a test gives its own.
        then: called when a signal has come.
        until: the step; None is no limit.
    """

    def __init__(
        self,
        max_seconds: float | None,
        now: Callable[[], float] = time.monotonic,
        then: Callable[[], None] = lambda: None,
        until: int | None = None,
    ) -> None:
        self.signal: int | None = None
        """The signal that came."""
        self._now = now
        self._then = then
        self._until = math.inf if until is None else until
        self._deadline = math.inf if max_seconds is None else now() + max_seconds
        self._before: dict[int, object] = {}

    def __call__(self, step: int = 0) -> bool:
        return self.signal is not None or self._now() >= self._deadline or self.reached(step)

    def reached(self, step: int) -> bool:
        """Whether it is the step at which to stop."""
        return step >= self._until

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses
            self._before = {number: signal.signal(number, self._heard) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if number == self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        self._then()
