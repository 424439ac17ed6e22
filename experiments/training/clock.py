"""Where the time of a step goes, without making the host wait for the device."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch

PARTS = ("data", "forward", "backward", "clip+step")


class Clock(Protocol):
    """Splits time into parts: ``start`` begins a stretch, each ``lap`` ends a part of it."""

    seconds: dict[str, float]

    def start(self) -> None: ...

    def lap(self, part: str) -> None: ...

    def settle(self) -> None: ...


class HostClock:
    """For devices whose work the host waits for anyway.

    Args:
        now: seconds; a test gives its own.
    """

    def __init__(self, now: Any = time.perf_counter) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._now = now
        self._last = now()

    def start(self) -> None:
        self._last = self._now()

    def lap(self, part: str) -> None:
        now = self._now()
        self.seconds[part] += now - self._last
        self._last = now

    def settle(self) -> None:
        pass


class CudaClock:
    """Marks the device's own queue; the marks are read when somebody waits for the device anyway."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._marks: list[tuple[str | None, torch.cuda.Event]] = []

    def start(self) -> None:
        self._mark(None)

    def lap(self, part: str) -> None:
        self._mark(part)

    def _mark(self, part: str | None) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((part, event))

    def settle(self) -> None:
        if not self._marks:
            return
        self._marks[-1][1].synchronize()
        for (_, before), (part, after) in zip(self._marks, self._marks[1:], strict=False):
            if part is not None:
                self.seconds[part] += before.elapsed_time(after) / 1e3
        del self._marks[:-1]


def clock_for(device: torch.device) -> Clock:
    return CudaClock() if device.type == "cuda" else HostClock()
