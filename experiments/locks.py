"""Locks on files: held by one process, and free again however that process ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

_held: set[int] = set()


def _close_inherited() -> None:
    # A forked data loader worker that outlives a killed run would otherwise keep that run "running".
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_close_inherited)


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold the lock of this file alone, creating it; raises ``BlockingIOError`` if somebody else has it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _acquire(handle)
    except BaseException:
        os.close(handle)
        raise
    _held.add(handle)
    try:
        yield
    finally:
        if handle in _held:  # not so in a forked child, which has closed its copy
            _held.remove(handle)
            os.close(handle)


def _acquire(handle: int) -> None:
    # `is_held` holds a shared lock for microseconds: try again before calling it taken.
    for attempt in range(5):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.01 * attempt)
    return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_held(path: Path) -> bool:
    """Whether a process, this one included, holds the lock of this file."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
