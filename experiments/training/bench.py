"""The price of clipping: one optimizer step with and without, interleaved in one process."""

from __future__ import annotations

import functools
import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

import torch_clip
from torch_clip.methods import CLIPPINGS
from torch_clip.norms import Grads, tensor_norms

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": functools.partial(SGD, lr=1e-4, momentum=0.9, fused=True),
    "adamw": functools.partial(AdamW, lr=1e-6, fused=True),
}
PLAIN, NORM_ALONE, TORCH = "plain fused", "norm alone", "clip_grad_norm_ + fused"


def mlp() -> list[tuple[int, ...]]:
    """Five layers of a small MLP: 10 tensors, 12,000 parameters."""
    sizes = (20, 64, 64, 64, 32, 10)
    return [shape for i, o in itertools.pairwise(sizes) for shape in ((o, i), (o,))]


def resnet18() -> list[tuple[int, ...]]:
    """torchvision's ResNet18: 62 tensors, 11.7 million parameters."""
    from torchvision.models import resnet18 as build

    with torch.device("meta"):
        return [tuple(p.shape) for p in build().parameters()]


def bert_base() -> list[tuple[int, ...]]:
    """BERT-base with its pooler: 199 tensors, 109 million parameters."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        return [tuple(p.shape) for p in BertModel(BertConfig()).parameters()]


MODELS: dict[str, Callable[[], list[tuple[int, ...]]]] = {
    "mlp": mlp,
    "resnet18": resnet18,
    "bert-base": bert_base,
}


METHODS = tuple(CLIPPINGS)
# What a method does to the gradients besides the one read for their norm and what the optimizer does.
NOTES = {
    "layer_wise": "writes the tensors that it clips, as each has a factor of its own",
    "coordinate_wise": "clamps, and reads again what it clamped for the share and the norm after",
    "layer_wise_autoclip": "as layer_wise; sorts the last norms of each tensor",
    "agc": "reads the parameters too, for the norms of their rows, and writes the rows that it clips",
    "adagc": "as layer_wise",
    "spam": "reads and writes an average beside each element, and clamps",
    "adaclip": "reads for the largest elements, and where it clips reads and writes again",
    "adagn": "writes every tensor, as each has a factor of its own",
    "stable_spam": "adaclip and then adagn, with the norms taken for each",
    "uclip": "adds a carry beside each element, clamps, and writes the carry, with norms before and after",
    "spike_guard": "only the read; some 30 operations on single numbers",
}


class Row(NamedTuple):
    """Time of one way to step, for one model and optimizer."""

    model: str
    optimizer: str
    contender: str
    milliseconds: float
    """Median of one step."""
    to_plain: float
    """Median ratio to the plain fused step of the same round."""
    to_torch: float
    """Median ratio to ``clip_grad_norm_`` and the fused step of the same round."""
    to_floor: float
    """Median ratio to the norm alone plus the plain fused step of the same round."""


def bench(
    models: list[str],
    optimizers: list[str],
    methods: list[str],
    *,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    warm_up: int = 3,
) -> tuple[list[Row], dict[str, Any]]:
    """Time one step of every contender, in turn, ``rounds`` times.

    All contenders of a model share parameters and gradients; the gradients are put back before each step,
    because fused optimizers write the clipped ones over them. Every method is timed where it clips and where
    it does not.

    Returns:
        Rows, and where they were measured.
    """
    rows = []
    for model in models:
        torch.manual_seed(0)
        params = [torch.randn(shape, device=device, dtype=dtype) for shape in MODELS[model]()]
        master = [torch.randn_like(param) * 1e-2 for param in params]
        for param, grad in zip(params, master, strict=True):
            param.grad = grad.clone()
        for optimizer in optimizers:
            steps = _contenders(params, OPTIMIZERS[optimizer], methods)
            times = _interleave(steps, params, master, device, warm_up, rounds)
            rows += [_row(model, optimizer, name, times) for name in steps]
    place = {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {platform.machine()}",
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": rounds,
        "notes": {method: NOTES[method] for method in methods if method in NOTES},
    }
    return rows, place


def _contenders(
    params: list[Tensor], make: Callable[..., Optimizer], methods: list[str]
) -> dict[str, Callable[[], Any]]:
    norms = tensor_norms(Grads(params))
    total = float(torch.linalg.vector_norm(norms))
    plain = make(params)

    def optimizer() -> Optimizer:
        other = make(params)
        other.state = plain.state  # what is in it costs no time, but a copy for each would fill the memory
        return other

    stock = optimizer()

    def norm_alone() -> None:
        float(torch.linalg.vector_norm(tensor_norms(Grads(params))))

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 0.5 * total)
        stock.step()

    steps = {PLAIN: plain.step, NORM_ALONE: norm_alone, TORCH: clip_and_step}
    for method in methods:
        for clips in (True, False):
            clipping = _tuned(method, clips, norms)
            if clipping is not None:
                name = f"{method}, {'clipped' if clips else 'not clipped'}"
                steps[name] = torch_clip.clip(optimizer(), clipping).step
    if "coordinate_wise" in methods:
        clipping = CLIPPINGS["coordinate_wise"](5e-3, measure=False, nonfinite="propagate")
        steps["coordinate_wise (measure=False), clipped"] = torch_clip.clip(optimizer(), clipping).step
    if "auto_clip" in methods:
        for recorded in (1_000, 1_000_000):
            clipping = _tuned("auto_clip", True, norms, recorded)
            steps[f"auto_clip, {recorded:,} norms"] = torch_clip.clip(optimizer(), clipping).step
    return steps


def _tuned(method: str, clips: bool, norms: Tensor, recorded: int = 100) -> torch_clip.Transform | None:
    """The method with settings under which it clips about everything, or nothing; None if it cannot.

    Args:
        method: a key of ``CLIPPINGS``.
        clips: whether it shall clip.
        norms: of the gradients that it will meet.
        recorded: norms in the history of the auto methods.
    """
    make, total = CLIPPINGS[method], float(torch.linalg.vector_norm(norms))
    if method in ("no_clip", "spike_guard"):
        return None if clips else make()
    if method in ("adagn", "normalized"):
        return make() if clips else None
    share = 0.25 if clips else 10.0  # of the norms to come, what the method remembers
    if method == "agc":
        return make(1e-6 if clips else math.inf, exclude=None)
    if method == "spam":
        return make(theta=1e-9 if clips else 5000.0, warmup=1)
    clipping = make()
    if "auto" in method:
        clipping = make(percentile=0.25 if clips else 1.0)
        # A past in which three of four norms were half as long.
        past = torch.linspace(0.5, 1.0 if clips else 0.5, recorded, dtype=torch.float64)
        per_tensor = method == "layer_wise_autoclip"
        past = norms.cpu()[:, None] * past if per_tensor else past * total
        state = {"history": past, "window": recorded if per_tensor else None}
    elif method == "zclip":
        state = {"recorded": 25.0, "mean": share * total, "variance": (0.01 * total) ** 2}
    elif method == "adagc":
        state = {"warmup_steps": 100.0, "average": share * norms.cpu()}
    elif method in ("adaclip", "stable_spam"):
        largest = torch.full((len(norms),), 1e-3 if clips else 1e3)
        state = {"largest": largest, "filled": torch.ones(len(norms))}
        if method == "stable_spam":
            clipping.clippings[0].recall(state)
            return clipping
    else:
        threshold = {"layer_wise": 0.5 * float(norms.median()), "coordinate_wise": 5e-3, "uclip": 5e-3}
        return make(threshold.get(method, 0.5 * total) if clips else math.inf)
    clipping.recall(state)
    return clipping


def _interleave(
    steps: dict[str, Callable[[], Any]],
    params: list[Tensor],
    master: list[Tensor],
    device: torch.device,
    warm_up: int,
    rounds: int,
) -> dict[str, list[float]]:
    grads = [param.grad for param in params]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(warm_up + rounds):
        for name, step in steps.items():
            torch._foreach_copy_(grads, master)
            seconds = _timed(step, device)
            if round_ >= warm_up:
                times[name].append(seconds)
    return times


def _timed(step: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _row(model: str, optimizer: str, name: str, times: dict[str, list[float]]) -> Row:
    own, plain, norm, stock = (times[key] for key in (name, PLAIN, NORM_ALONE, TORCH))
    floor = [n + p for n, p in zip(norm, plain, strict=True)]
    to_plain, to_torch, to_floor = (
        statistics.median(a / b for a, b in zip(own, other, strict=True)) for other in (plain, stock, floor)
    )
    return Row(model, optimizer, name, statistics.median(own) * 1e3, to_plain, to_torch, to_floor)
