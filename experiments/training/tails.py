"""Gradient norms and gradient noise at frozen weights, over many mini-batches; into a run folder."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from experiments import runs
from experiments.errors import UserError
from experiments.runs import Run
from experiments.tasks.base import Task, TrainLoader, to_device
from experiments.training import settings
from experiments.training.batches import Batches
from experiments.training.checkpoint import weights_of
from experiments.training.ends import End, attempt
from experiments.training.job import inputs_of, task_of, without_paths
from experiments.training.precision import Precision
from experiments.training.ranks import Ranks
from experiments.training.recorder import Diverged, Record
from experiments.training.run import Outcome
from experiments.training.state import seed_everything
from experiments.training.summary import versions
from experiments.training.version import code_version

INITIAL = "initial"
RECORDS_AT_ONCE = 100


class Gradients:
    r"""Gradients of the first mini-batches of a run at fixed weights, the same whenever they are asked for.

    The model is in training mode, so that what dropout and the statistics of a batch add to the noise is in
    them as it is in training; what it draws for a batch depends on the seed and the batch alone.

    Args:
        task: loaded.
        model: on ``device``; its buffers change, its weights do not.
        loader: of training batches; epochs follow each other as in a run.
        seed: of the run.
        samples: how many.
        precision: of the forward pass.
        device: of the model.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        loader: TrainLoader,
        *,
        seed: int,
        samples: int,
        precision: Precision,
        device: torch.device,
    ) -> None:
        self._task = task
        self._model = model
        self._params = [param for param in model.parameters() if param.requires_grad]
        self._samples = samples
        self._loader = loader
        self._seed = seed
        self._precision = precision
        self._device = device

    def __len__(self) -> int:
        return self._samples

    def __iter__(self) -> Iterator[Gradient]:
        self._model.train()
        batches = Batches(self._loader)
        for number in range(self._samples):
            batch = to_device(next(batches), self._device)
            torch.manual_seed(self._seed * 1_000_003 + number)
            with self._precision.autocast():
                loss = self._task.forward(self._model, batch).loss
            parts = torch.autograd.grad(loss, self._params, allow_unused=True, materialize_grads=True)
            yield Gradient(batches.epochs, loss.detach(), parts)


class Gradient(NamedTuple):
    """Of one mini-batch."""

    epoch: float
    """Epochs so far."""
    loss: Tensor
    parts: tuple[Tensor, ...]
    """One of each trained parameter."""


class Mean(NamedTuple):
    """The mean gradient, of the batches whose gradient is finite."""

    parts: list[Tensor]
    norm: float
    finite: int
    """Batches that it is a mean of."""


def mean_gradient(gradients: Iterable[Gradient]) -> Mean:
    """Add gradients up in float64; beside the sum no more than one is held."""
    total: list[Tensor] = []
    finite = 0
    for gradient in gradients:
        if not total:
            total = [torch.zeros_like(part, dtype=torch.float64) for part in gradient.parts]
        if math.isfinite(get_total_norm(gradient.parts)):
            torch._foreach_add_(total, gradient.parts)
            finite += 1
    if finite == 0:
        raise Diverged("no batch gave a finite gradient")
    torch._foreach_div_(total, finite)
    parts = [part.to(like.dtype) for part, like in zip(total, gradient.parts, strict=True)]
    return Mean(parts, get_total_norm(total).item(), finite)


def noise(gradients: Iterable[Gradient], mean: Mean, seed: int) -> Iterator[Record]:
    r"""What each batch's gradient :math:`g_i` and its noise :math:`g_i - \bar g` measure.

    The mean is of the same batches, and so a little nearer to each than the true gradient is: of n batches
    the noise looks shorter by a factor of :math:`\sqrt{1 - 1/n}`.

    Args:
        gradients: those of the mean, once more.
        mean: of them.
        seed: of the direction of the projection.

    Yields:
        Records: with the two norms, and in ``noise_projection`` the noise along one random direction, the
        same for all: a sample of both signs whose index is that of the noise where that is stable.
    """
    direction = _direction(mean.parts, seed)
    for number, gradient in enumerate(gradients, start=1):
        parts = torch._foreach_sub(gradient.parts, mean.parts)
        projection = sum(torch.sum(part * along) for part, along in zip(parts, direction, strict=True))
        values = (gradient.loss, get_total_norm(gradient.parts), get_total_norm(parts), projection)
        loss, norm, length, projected = torch.stack([value.double() for value in values]).tolist()
        yield {
            "step": number,
            "epoch": gradient.epoch,
            "train/loss": loss,
            "grad_norm": norm,
            "noise_norm": length,
            "noise_projection": projected,
        }


def _direction(like: list[Tensor], seed: int) -> list[Tensor]:
    """A random unit vector, in parts."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(part.shape, generator=generator).to(part) for part in like]
    torch._foreach_div_(parts, get_total_norm(parts).item())
    return parts


class Plan(NamedTuple):
    """A measurement to be: checked, but nothing of it is read or built."""

    config: dict[str, Any]
    """Resolved, with all that the identity of the measurement needs."""
    task: Task
    checkpoint: Path | None
    device: torch.device
    place: Run


def collect(config: dict[str, Any], choices: Mapping[str, str], told: str = "") -> Outcome:
    """Measure what ``config`` describes, unless that is done already; what was cut short begins anew.

    Args:
        config: composed from conf/tails.yaml, resolved.
        choices: name of the option chosen for ``task`` and ``preset``.
        told: settings of the task that are not those of its preset, for people.

    Raises:
        UserError: the input is bad; no folder was made.
    """
    plan = _plan(config, choices)
    place, ranks = plan.place, Ranks(0, 1, plan.device)
    if done := _already(place, config["force"]):
        return done
    ready = attempt(lambda: _gradients(plan), ranks)
    if isinstance(ready, End):
        return Outcome(place, ready.status, ready.message, fresh=True)
    gradients, step = ready
    facts = {"code": code_version(), "threads": torch.get_num_threads()}
    try:
        with place.lock():
            if done := _already(place, config["force"]):  # by another process meanwhile
                return done
            place.start(plan.config, **facts)
            measured = attempt(lambda: _measure(place, gradients, config), ranks)
            end, found = (measured, {}) if isinstance(measured, End) else (End("ok"), measured)
            summary = {
                **plan.config["names"],
                "status": end.status,
                "seed": config["seed"],
                "steps": len(gradients),
                "batch_size": config["task"].get("batch_size"),
                "settings": told,
                "checkpoint": None if plan.checkpoint is None else str(plan.checkpoint),
                "checkpoint_step": step,
                **found,
                **facts,
                "versions": versions(),
            }
            message = end.message or _headline(summary)
            place.finish(end.status, summary, message)
    except OSError as error:
        raise UserError(f"results_dir: cannot write {error.filename}: {error.strerror}") from None
    return Outcome(place, end.status, message, fresh=True)


def _plan(config: dict[str, Any], choices: Mapping[str, str]) -> Plan:
    settings.check(config)
    if config["precision"] == "fp16":
        raise UserError("precision must be fp32 or bf16 here, got fp16, in which small gradients vanish")
    device = settings.device(config["device"], 1)
    task = task_of(config, choices["task"])
    files, fingerprint = inputs_of(task)
    names = {"task": choices["task"], "preset": Path(choices["preset"]).name, "weights": INITIAL}
    measured = {
        **{key: config[key] for key in ("task", "samples", "precision")},
        "device_type": device.type,
        "fingerprint": fingerprint,
        "weights": None,
    }
    checkpoint = None
    if config["checkpoint"] is not None:
        checkpoint, run = runs.find_checkpoint(config["checkpoint"])
        names["weights"] = _name(checkpoint, run)
        measured["weights"] = runs.fingerprint([checkpoint])
    place = Run.locate_tails(
        config["results_dir"],
        **names,
        digest=runs.digest(without_paths(measured, files)),
        seed=config["seed"],
    )
    return Plan({**config, **measured, "names": names}, task, checkpoint, device, place)


def as_trained(task: dict[str, Any], trained: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, Any]:
    """Settings of a task as a run had them, but for those that the command line gives.

    Args:
        task: node of the config.
        trained: that of the run.
        given: settings of the command line.
    """

    def merged(node: Mapping[str, Any], theirs: Mapping[str, Any], path: str) -> dict[str, Any]:
        return {key: chosen(value, theirs.get(key, value), f"{path}.{key}") for key, value in node.items()}

    def chosen(value: Any, theirs: Any, name: str) -> Any:
        if isinstance(value, dict) and isinstance(theirs, dict):
            return merged(value, theirs, name)
        kept = name in given or (name == "task.data_dir" and "data_dir" in given)
        return value if kept else theirs

    return merged(task, trained, "task")


def _gradients(plan: Plan) -> tuple[Gradients, int]:
    """Everything that can be wrong with the input shows here; and the step that the weights are of."""
    config, task = plan.config, plan.task
    task.load()
    seed_everything(config["seed"])
    model, step = task.build_model(), 0
    if plan.checkpoint is not None:
        weights, step = weights_of(plan.checkpoint)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines()]
            raise UserError(
                f"checkpoint={config['checkpoint']}: its weights do not fit this model ({lines[-1]}); give "
                "task, preset and the settings of task.model as they were when it was trained"
            ) from None
    gradients = Gradients(
        task,
        model.to(plan.device),
        task.train_loader(config["seed"]),
        seed=config["seed"],
        samples=config["samples"],
        precision=Precision(config["precision"], plan.device),
        device=plan.device,
    )
    return gradients, step


def _measure(place: Run, gradients: Gradients, config: dict[str, Any]) -> dict[str, Any]:
    """Two passes over the batches, the first for their mean; records into the run, what else was found."""
    from tqdm import tqdm

    began = time.perf_counter()
    shown = {"disable": config["quiet"] or None, "unit": "batch", "dynamic_ncols": True}  # None: no terminal
    mean = mean_gradient(tqdm(gradients, "mean gradient", **shown))
    records: list[Record] = []
    for record in noise(tqdm(gradients, "noise", **shown), mean, config["seed"]):
        records.append(record)
        if len(records) == RECORDS_AT_ONCE:
            place.append(records)
            records = []
    place.append(records)
    return {
        "mean_grad_norm": mean.norm,
        "not_finite": len(gradients) - mean.finite,
        "parameters": sum(part.numel() for part in mean.parts),
        "seconds": time.perf_counter() - began,
    }


def _already(place: Run, force: bool) -> Outcome | None:
    status = place.status
    if force or status is None or status["status"] not in runs.FINISHED:
        return None
    told, code = status["message"], status.get("code")
    if code and code != (now := code_version()):
        told += f" (made by code {code}, this is {now}; force=true measures anew)"
    return Outcome(place, status["status"], told, fresh=False)


def _name(file: Path, run: Run) -> str:
    """What the folder of a measurement is called, for the weights."""
    if run.status is None:  # a file from elsewhere
        return "checkpoint"
    return f"{run.names['optimizer']}-{run.names['clipping']}-{file.stem}"


def _headline(summary: Mapping[str, Any]) -> str:
    where = "the initial weights"
    if summary["checkpoint"] is not None:
        where = f"the weights of step {summary['checkpoint_step']}"
    lost = f", {summary['not_finite']} of them not finite" if summary["not_finite"] else ""
    return f"{summary['steps']} gradients at {where}{lost}, in {summary['seconds']:.1f} s"
