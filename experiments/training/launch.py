"""The processes of ``nproc``: started here, waited for, and told to stop when this one is."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from types import FrameType
from typing import Any

import torch
from torch import multiprocessing

from experiments.errors import UserError
from experiments.training.ranks import joined
from experiments.training.stop import SIGNALS

GRACE = 10.0
"""Seconds that the others have to end when one has failed, before they are made to."""

NOT_WELL = 1
"""Exit code of a process that has told why."""

Work = Callable[..., tuple[Any, bool]]
"""Called in each process with its ``Ranks`` first; returns an answer, and whether all is well."""


def launch(nproc: int, device_type: str, work: Work, *arguments: Any) -> tuple[dict[int, Any], int | None]:
    """Call ``work`` in ``nproc`` processes of their own that train together.

    Args:
        nproc: processes.
        device_type: of the training.
        work: importable, as its arguments are picklable.
        arguments: of ``work``, after its ``Ranks``.

    Returns:
        What ``work`` returned, by rank: in the first process, if that did not die, and in those where not all
        was well; and the signal that came meanwhile.

    Raises:
        UserError: ``work`` raised it.
    """
    answers = multiprocessing.get_context("spawn").SimpleQueue()
    threads = max(1, torch.get_num_threads() // nproc)
    with tempfile.TemporaryDirectory() as folder:
        group = multiprocessing.start_processes(
            _process,
            (nproc, f"{folder}/store", device_type, threads, answers, work, arguments),
            nprocs=nproc,
            join=False,
            start_method="spawn",
        )
        heard = _wait(group)
    told = {}
    while not answers.empty():
        rank, answer, complaint = answers.get()
        if complaint is not None:
            raise UserError(complaint)
        told[rank] = answer
    return told, heard


def _wait(group: multiprocessing.ProcessContext) -> int | None:
    """Wait for all processes; the signal that came meanwhile."""
    heard: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        for process in group.processes:
            if process.is_alive():
                # Not SIGINT: a terminal sends that to them itself, and a second one would cut them short.
                os.kill(process.pid, signal.SIGTERM)

    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, pass_on) for number in SIGNALS} if in_main else {}
    try:
        while not group.join(grace_period=GRACE):
            pass
    except multiprocessing.ProcessExitedException as error:
        if error.exit_code != NOT_WELL:  # or it has told why
            print(f"clipbench: {error}", file=sys.stderr)
    except multiprocessing.ProcessRaisedException as error:
        print(f"clipbench: {error}", file=sys.stderr)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return heard[0] if heard else None


def _process(
    rank: int,
    nproc: int,
    store: str,
    device_type: str,
    threads: int,
    answers: SimpleQueue,
    work: Work,
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(threads)
    meeting = torch.distributed.FileStore(store, nproc)
    with joined(device_type, meeting, rank=rank, world_size=nproc) as ranks:
        try:
            answer, well = work(ranks, *arguments)
        except UserError as error:
            answer, well, complaint = None, False, str(error)
        else:
            complaint = None
        if ranks.first or not well:
            answers.put((rank, answer, complaint))
    if not well:
        sys.exit(NOT_WELL)  # so that those who still wait for this one are ended
