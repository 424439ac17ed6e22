"""What a task needs: where it lies, what is missing, and whether all of it can be read."""

from __future__ import annotations

from tqdm import tqdm

from experiments.tasks.base import Task
from experiments.tasks.needs import Need


def told(need: Need) -> str:
    """Where it lies; or what is missing, where it was looked for, and the ways on."""
    if need.problem is None:
        return f"{need.what}: {need.place}"
    if need.fetch is None:
        return f"missing: {need.problem}"
    return (
        f"missing: {need.what}, {need.problem}; looked in {need.place}. Ways on: clipbench prepare without "
        f"--check, which fetches it from {need.source}, or {need.give}"
    )


def read_through(task: Task) -> str:
    """Read what a run reads in an epoch, an evaluation and its model; say what that was.

    Raises:
        UserError: something cannot be read; the message names it.
    """
    task.load()
    task.build_model()
    loader = task.train_loader(seed=0)
    loader.set_epoch(0)
    shapes: dict[str, tuple[int, ...]] = {}
    for batch in tqdm(loader, "to train on", disable=None, leave=False):
        shapes = shapes or {name: tuple(tensor.shape) for name, tensor in batch.items()}
    first = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    read = f"batches to train on: {len(loader)}, the first of {first}"
    try:
        evaluation = task.eval_loader()
    except NotImplementedError:  # it evaluates on what it has loaded, in one piece
        return read
    count = sum(1 for _ in tqdm(evaluation, "to evaluate on", disable=None, leave=False))
    return f"{read}; to evaluate on: {count}"
