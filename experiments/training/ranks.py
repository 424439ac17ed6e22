"""Several processes that train one model, each on its part of every batch; one alone is the same code."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from experiments.errors import UserError

T = TypeVar("T")

# The others wait this long for the first to evaluate.
PATIENCE = timedelta(hours=1)


class Ranks:
    """This process among those that train together.

    Args:
        rank: of this process; the first is 0, which alone reads and writes the run's folder.
        world: processes.
        device: of this process.
        store: where the processes met; None for one alone.
    """

    def __init__(
        self, rank: int, world: int, device: torch.device, store: torch.distributed.Store | None = None
    ) -> None:
        self.rank = rank
        self.world = world
        self.device = device
        self._store = store

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.world == 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model with batch norms that see the whole batch, which torch has on CUDA only."""
        if self.alone or self.device.type != "cuda":
            return model
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def replicate(self, model: nn.Module, accumulates: bool) -> nn.Module:
        """What to call in place of ``model``: its gradients are the mean over all processes.

        Parameters that get none (of an encoder cut short, say) are found once and for all, or, since torch
        cannot have that and ``exchange_gradients`` too, at every step.
        """
        if self.alone:
            return model
        warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")  # and there are none
        return nn.parallel.DistributedDataParallel(
            model, static_graph=not accumulates, find_unused_parameters=accumulates
        )

    def exchange_gradients(self, replica: nn.Module, now: bool) -> None:
        """Whether the next backward of ``replica`` exchanges gradients, or only adds to those of here."""
        if not self.alone:
            replica.require_backward_grad_sync = now  # what its no_sync() sets

    def mean(self, x: Tensor) -> Tensor:
        """Mean over all processes."""
        return x if self.alone else self._reduced(x, torch.distributed.ReduceOp.SUM) / self.world

    def sum(self, x: Tensor | int) -> Tensor | int:
        """Sum over all processes."""
        if self.alone or not isinstance(x, Tensor):
            return x
        return self._reduced(x, torch.distributed.ReduceOp.SUM)

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process; the host waits for the device."""
        if self.alone:
            return flag
        return bool(
            self._reduced(torch.tensor(int(flag), device=self.device), torch.distributed.ReduceOp.MAX)
        )

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, by rank."""
        if self.alone:
            return [value]
        values = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make`` returns in the first process, or the ``UserError`` that it raises there."""
        if self.alone:
            return make()
        told: list[Any] = [None, None]
        if self.first:
            try:
                told[0] = make()
            except UserError as error:
                told[1] = str(error)
        torch.distributed.broadcast_object_list(told, device=self.device)
        if told[1] is not None:
            raise UserError(told[1])
        return told[0]

    def first_told(self, message: Any) -> tuple[int, Any]:
        """Rank and message of the process that called this first; none is waited for, and one may be gone.

        Args:
            message: numbers, strings, lists of them.
        """
        told = json.dumps([self.rank, message])
        if self._store is not None:
            told = self._store.compare_set("first told", "", told)
        rank, message = json.loads(told)
        return rank, message

    def _reduced(self, x: Tensor, operation: Any) -> Tensor:
        x = x.clone()
        torch.distributed.all_reduce(x, operation)
        return x


def world_of_torchrun() -> int | None:
    """Processes that torchrun has started, or None if it was not torchrun."""
    world = os.environ.get("WORLD_SIZE")
    return int(world) if world and "MASTER_ADDR" in os.environ else None


@contextlib.contextmanager
def joined(device_type: str, store: torch.distributed.Store | None = None, **place: int) -> Iterator[Ranks]:
    """Join the other processes.

    Args:
        device_type: of the training.
        store: where they meet; None where torchrun's environment says it, with ``place``.
        place: ``rank`` and ``world_size``.
    """
    if store is None:
        store, place["rank"], place["world_size"] = next(torch.distributed.rendezvous("env://"))
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", place["rank"])))
        torch.cuda.set_device(device)
    backend = "nccl" if device_type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=store, timeout=PATIENCE, **place)
    try:
        yield Ranks(place["rank"], place["world_size"], device, store)
    finally:
        torch.distributed.destroy_process_group()
