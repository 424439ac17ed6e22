"""Finished runs, made up: every number in them is known."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest

from experiments.runs import Run, digest

BUDGET, EVAL_EVERY = 40, 10
METRICS = {"cola": ("mcc", True), "voc": ("miou", True), "quadratic": ("loss", False)}


def make(
    results: Path,
    final: float,
    *,
    task: str = "cola",
    preset: str = "mini",
    optimizer: str = "sgd",
    clipping: str = "no_clip",
    seed: int = 0,
    status: str = "ok",
    curve: list[float] | None = None,
    experiment: str = "made",
    settings: dict | None = None,
    trained: bool = True,
    **summary,
) -> Run:
    # `curve`: metric of all evaluations; by default `final` times 1/4, 2/4, 3/4, 1, of a loss over them.
    # `trained`: whether the metric is recorded in training too.
    # `settings`: dotted path -> value, of the config. `summary`: to replace in it.
    metric, higher_is_better = METRICS[task]
    config = {
        "task": {"_target_": f"experiments.tasks.{task}", "noise": "none"},
        "preset": {"lr": {"sgd": 0.1}},
        "optimizer": {"_target_": f"torch.optim.{optimizer}", "lr": 0.1},
        "scheduler": {"_target_": "constant"},
        "clipping": {"_target_": f"torch_clip.methods.{clipping}", "seed": seed},
        **{"seed": seed, "max_steps": BUDGET, "eval_every": EVAL_EVERY, "precision": "fp32"},
        **{"device_type": "cpu", "world_size": 1, "fingerprint": None, "results_dir": str(results)},
    }
    for path, value in (settings or {}).items():
        *parents, last = path.split(".")
        node = config
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    names = {"task": task, "preset": preset, "optimizer": optimizer, "clipping": clipping}
    run = Run.locate(results, experiment=experiment, **names, digest=digest(config), seed=seed)
    run.start(config)
    steps, every = config["max_steps"], config["eval_every"]
    evaluations = range(every, steps + 1, every)
    shares = [(number + 1) / len(evaluations) for number in range(len(evaluations))]
    curve = curve or [final * share if higher_is_better else final / share for share in shares]
    records = []
    for step in range(1, steps + 1):
        loss = 2.0 / step + 0.01 * seed
        epoch = (step - 1) / EVAL_EVERY
        records.append({"step": step, "epoch": epoch, "train/loss": loss, "lr": 0.1, "clipped": 0.5})
        if step in evaluations:
            value = curve[step // every - 1]
            train = {} if metric == "loss" or not trained else {f"train/{metric}": value}
            record = {"step": step, "epoch": epoch, **train, "val/loss": 1.0}
            records.append(record | {f"val/{metric}": value})
    run.append(records)
    known = {
        **names,
        **{"scheduler": "constant", "experiment": experiment, "status": status, "seed": seed},
        **{"metric": metric, "higher_is_better": higher_is_better, "steps": steps},
        "final": {"step": steps, "val/loss": 1.0, f"val/{metric}": final, f"train/{metric}": final},
        "best": {"step": steps, "value": final},
        **{"clip_fraction": 0.25, "clip_unit": "steps", "skipped_steps": 0, "seconds": 0.1 * steps},
        "time": {"data": 0.0, "forward": 1.0, "backward": 2.0, "clip+step": 1.0},
        **{"peak_memory_bytes": 2**30, "device": "cpu, x86_64", "code": "c0ffee", "threads": 1},
        "versions": {"python": "3.11.7", "torch": "2.15.0"},
    }
    run.finish(status, known | summary)
    return run


def make_several(results: Path, finals: list[float], **options) -> list[Run]:
    return [
        make(results, final, seed=seed, status="ok" if math.isfinite(final) else "diverged", **options)
        for seed, final in enumerate(finals)
    ]


@pytest.fixture
def make_run(tmp_path):
    """Return a function that makes one run."""
    return functools.partial(make, tmp_path)


@pytest.fixture
def make_runs(tmp_path):
    """Return a function that makes one run for each of several final metrics, seeds from 0 on."""
    return functools.partial(make_several, tmp_path)


@pytest.fixture(scope="session")
def two_tasks(tmp_path_factory):
    """On cola norm is better, and auto_clip diverges; on the quadratic both are better."""
    runs = functools.partial(make_several, tmp_path_factory.mktemp("two_tasks"))
    return (
        *runs([0.50, 0.52, 0.48, 0.51, 0.49]),
        *runs([0.60, 0.63, 0.58, 0.60, 0.60], clipping="norm"),
        *runs([0.55, math.nan, 0.50, math.inf, 0.53], clipping="auto_clip"),
        *runs([0.4, 0.5, 0.3, 9.0, 0.4], task="quadratic"),
        *runs([0.03, 0.04, 0.02, 0.1, 0.03], task="quadratic", clipping="norm"),
        *runs([0.3, 0.4, 0.21, 6.0, 0.31], task="quadratic", clipping="auto_clip"),
    )
