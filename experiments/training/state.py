"""All that changes while a run trains: saved in the middle and loaded, it goes on bit for bit."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from experiments.training.batches import Batches
from experiments.training.clock import Clock
from experiments.training.ranks import Ranks
from experiments.training.recorder import Recorder


class State:
    """What the loop works on, the global random generators included.

    Args:
        model: on its device.
        optimizer: with a clipping attached, whose memory is saved with it.
        scheduler: of the learning rate.
        scaler: of the loss; not enabled where the precision needs none.
        batches: where the data is.
        recorder: of steps.
        clock: says where the time went.
        ranks: the processes that train together; each has its own random generators and tally.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        scaler: GradScaler,
        batches: Batches,
        recorder: Recorder,
        clock: Clock,
        ranks: Ranks,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.scaler = scaler
        self.batches = batches
        self.recorder = recorder
        self.clock = clock
        self.ranks = ranks
        self.step = 0
        """Optimizer steps done."""
        self.tally: Tensor | int = 0
        """Of the training batches since the last evaluation."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, containers of them, alike in all processes; true until the next step."""
        tally = self.tally.cpu() if isinstance(self.tally, Tensor) else self.tally
        return {
            **{name: part.state_dict() for name, part in self._parts().items()},
            "step": self.step,
            "bad_losses": self.recorder.bad_losses,
            "seconds": dict(self.clock.seconds),
            "of_rank": self.ranks.gather({"tally": tally, "random": random_state(self._device)}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where ``state`` was taken."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step = state["step"]
        own = state["of_rank"][self.ranks.rank]
        tally = own["tally"]
        self.tally = tally.to(self._device) if isinstance(tally, Tensor) else tally
        self.recorder.bad_losses = state["bad_losses"]
        self.clock.seconds.update(state["seconds"])
        # Last: an iterator over the data, opened above, has drawn from them.
        set_random_state(own["random"], self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _parts(self) -> dict[str, Any]:
        names = ("model", "optimizer", "scheduler", "scaler", "batches")
        return {name: getattr(self, name) for name in names}


def seed_everything(seed: int) -> None:
    """Set all global random generators."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  the global one, which data sets may draw from
    torch.manual_seed(seed)


def random_state(device: torch.device) -> dict[str, Any]:
    """Where the global random generators are, that of ``device`` among them."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put the global random generators there."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
