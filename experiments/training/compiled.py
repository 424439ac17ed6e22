"""``torch.compile``, where it works."""

from __future__ import annotations

import copy
import sys

import torch
from torch import nn

from experiments.tasks.base import Task, TrainLoader, to_device
from experiments.training.ends import lack_of_memory
from experiments.training.precision import Precision
from experiments.training.state import random_state, set_random_state


def compile_or_say(
    model: nn.Module, task: Task, loader: TrainLoader, precision: Precision, device: torch.device
) -> bool:
    """Compile ``model`` in place; say so, and leave it as it was, where its first batch fails compiled.

    The trial leaves no trace in weights, buffers or random generators.

    Args:
        model: on ``device``.
        task: gives its loss.
        loader: a new one, for the trial alone.
        precision: of the training.
        device: of the model.

    Returns:
        Whether ``model`` is compiled.
    """
    random, weights = random_state(device), copy.deepcopy(model.state_dict())
    loader.set_epoch(0)
    batch = to_device(next(iter(loader)), device)
    try:
        model.compile()
        with precision.autocast():
            loss = task.forward(model, batch).loss
        loss.backward()
        return True
    except Exception as error:  # tracing, code generation and the C++ compiler each raise their own
        if lack_of_memory(error) is not None:  # and would without compiling
            raise
        model._compiled_call_impl = None  # what compile() has set
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        print(f"clipbench: torch.compile fails, going on without it: {reason}", file=sys.stderr)
        return False
    finally:
        model.zero_grad()
        model.load_state_dict(weights)
        set_random_state(random, device)
