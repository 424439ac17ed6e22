"""Which runs are one method on one task, and which must not share a comparison."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from experiments.errors import UserError
from experiments.runs import FINISHED, Run, identity, unusable

# Parts of a config whose settings belong to a named choice: they count where that choice is the same.
CHOICES = ("clipping", "optimizer", "scheduler")
# No part of a method: `task` makes another task, `preset` only repeats what other parts hold, and data and
# device are asked for elsewhere.
NO_METHOD = ("task", "preset", "fingerprint", "device_type")
# What a comparison asks of every run, of its summary and of its config.
SAID = ("task", "preset", *CHOICES, "status", "seed", "metric", "higher_is_better", "steps", "final", "code")
SET = ("max_steps", "eval_every", "device_type", "fingerprint")


class Mixed(UserError):
    """Runs differ in what must agree where they are compared."""


@dataclass
class Result:
    """A finished run, and what it is compared as."""

    run: Run
    names: dict[str, str]
    """``task preset optimizer clipping scheduler``."""
    summary: dict[str, Any]
    settings: dict[str, Any] = field(repr=False)
    """Dotted path -> value, of all that changes the numbers."""
    task: str = ""
    """Its name, and what tells it from others of that name."""
    method: str = ""
    """Clipping, and what else tells it from others on the same tasks."""
    details: dict[str, str] = field(default_factory=dict)
    """Path of a setting -> ``lr=0.1`` and the like: what ``method`` has beside optimizer and clipping."""

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.summary["seed"]

    @property
    def diverged(self) -> bool:
        """Whether it did."""
        return self.summary["status"] == "diverged"


class Unfinished(NamedTuple):
    """A run that gave no result."""

    run: Run
    status: str

    def __str__(self) -> str:
        return f"{self.run.path}: {self.status}"

    @property
    def failed(self) -> bool:
        """Whether it has ended: by an error, out of memory, a kill or its time limit."""
        return self.status not in ("not started", "running")


def finished(runs: Iterable[Run]) -> tuple[list[Result], list[Unfinished]]:
    """Return the finished ones among runs, and the others, each once.

    Raises:
        UserError: a run lacks what its summary or its config should say.
    """
    results: dict[tuple[str, ...], Result] = {}
    settings: dict[str, dict[str, Any]] = {}  # shared by the seeds of a digest
    others = {}
    for run in sorted(runs, key=lambda run: run.path):
        place = run.path.absolute().parts[-4:]  # what an experiment is called makes no other run
        status = (run.status or {}).get("status", "not started")
        if status not in FINISHED:
            others[place] = Unfinished(run, status)
            continue
        summary, digest = run.summary(), run.names["digest"]
        if digest not in settings:
            settings[digest] = flatten(identity(run.config()))
        missing = [name for name in SAID if name not in summary]
        missing += [name for name in SET if name not in settings[digest]]
        if missing:
            raise unusable(run, f"its summary and config do not say {', '.join(missing)}")
        names = {name: summary[name] for name in ("task", "preset", *CHOICES)}
        results[place] = Result(run, names, summary, settings[digest])
    return list(results.values()), [other for place, other in others.items() if place not in results]


def flatten(node: Any, path: str = "") -> dict[str, Any]:
    """Leaves of nested containers by dotted path; a list of plain values is one leaf.

    Example:
        >>> flatten({"optimizer": {"lr": 0.1, "betas": [0.9, 0.99]}, "seed": 1})
        {'optimizer.lr': 0.1, 'optimizer.betas': [0.9, 0.99], 'seed': 1}
    """
    if isinstance(node, dict):
        parts = node
    elif isinstance(node, list) and any(isinstance(value, dict | list) for value in node):
        parts = dict(enumerate(node))
    else:
        return {path: node}
    dot = f"{path}." if path else ""
    return {
        name: leaf for key, value in parts.items() for name, leaf in flatten(value, f"{dot}{key}").items()
    }


def identify(results: Sequence[Result], *, allow_mixed: bool) -> None:
    """Name the task and the method of each result by what tells them apart.

    What differs in a task's own settings makes another task. What else differs makes another method: a
    setting of a clipping, an optimizer or a scheduler where it differs between runs of the same one, any
    other wherever it differs between runs on the same task.

    Raises:
        Mixed: runs differ in what must agree.
        UserError: two of one method have the same seed.
    """
    for group in _split(results, lambda result: result.names["task"]):
        _name_tasks(group)
    if not allow_mixed:
        _refuse_mixtures(results)
    _name_methods(results)
    for group in _split(results, lambda result: (result.task, result.method, result.seed)):
        if len(group) > 1:
            _refuse_twins(group[0], group[1])


def _name_tasks(results: list[Result]) -> None:
    """Name the tasks of results whose task has one name."""
    presets = {result.names["preset"] for result in results}
    differing = _differing(_split(results, lambda result: result.names["preset"]), "task.")
    fingerprints = {result.settings["fingerprint"] for result in results}
    for result in results:
        words = [
            result.names["task"] if len(presets) == 1 else f"{result.names['task']}-{result.names['preset']}"
        ]
        words += _words(result, differing).values()
        if len(fingerprints) > 1:
            words.append(f"data={(result.settings['fingerprint'] or 'generated')[:6]}")
        result.task = " ".join(words)


def _refuse_mixtures(results: Sequence[Result]) -> None:
    """Raise ``Mixed`` where runs differ in what must agree: everywhere, or within their task."""
    everywhere: dict[str, Callable[[Result], Any]] = {
        "preset": lambda result: result.names["preset"],
        "code version": lambda result: result.summary["code"],
        "device": lambda result: result.summary["device"],
    }
    for what, value in everywhere.items():
        _refuse_if_mixed(results, what, value)
    for group in _split(results, lambda result: result.names["task"]):
        _refuse_if_mixed(group, "fingerprint of the data", lambda result: result.settings["fingerprint"])
    for group in _split(results, lambda result: result.task):
        for key in ("max_steps", "eval_every"):
            _refuse_if_mixed(group, key, lambda result, key=key: result.settings[key])


def _refuse_if_mixed(results: Iterable[Result], what: str, value: Callable[[Result], Any]) -> None:
    first = {}
    for result in results:
        first.setdefault(value(result), result)
    if len(first) > 1:
        found = "; ".join(f"{value} in {result.run.path}" for value, result in first.items())
        raise Mixed(
            f"these runs differ in their {what}: {found}. Compare them apart, or with "
            "clipbench compare --allow-mixed"
        )


def _name_methods(results: Sequence[Result]) -> None:
    tasks = _split(results, lambda result: result.task)
    named = [
        choice for choice in CHOICES if _differ(tasks, lambda result, choice=choice: result.names[choice])
    ]
    own: dict[tuple[str, str], list[str]] = {}  # settings of a choice by its name, as of clipping=norm
    for choice in CHOICES:
        for of_choice in _split(results, lambda result, choice=choice: result.names[choice]):
            groups = _split(of_choice, lambda result: result.task)
            own[choice, of_choice[0].names[choice]] = _differing(groups, f"{choice}.")
    rest = [name for name in _differing(tasks, "") if name.split(".")[0] not in (*CHOICES, *NO_METHOD)]
    told = _without_echoes(results, [*itertools.chain(*own.values()), *rest])
    for result in results:
        names = [*itertools.chain(*(own[choice, result.names[choice]] for choice in CHOICES)), *rest]
        scheduler = {"scheduler": f"scheduler={result.names['scheduler']}"} if "scheduler" in named else {}
        optimizer = [result.names["optimizer"]] if "optimizer" in named else []
        result.details = scheduler | _words(result, [name for name in names if name in told])
        result.method = " ".join([*optimizer, result.names["clipping"], *result.details.values()])


def _differ(groups: Iterable[list[Result]], value: Callable[[Result], Hashable]) -> bool:
    """Whether a value differs within one of the groups."""
    return any(len({value(result) for result in group}) > 1 for group in groups)


def _split(results: Iterable[Result], key: Callable[[Result], Hashable]) -> list[list[Result]]:
    groups = defaultdict(list)
    for result in results:
        groups[key(result)].append(result)
    return list(groups.values())


def _differing(groups: Sequence[list[Result]], prefix: str) -> list[str]:
    """Paths of the settings that have more than one value within one of the groups."""
    paths = dict.fromkeys(
        path for group in groups for result in group for path in result.settings if path.startswith(prefix)
    )
    return [
        path for path in paths if _differ(groups, lambda result, path=path: _text(result.settings.get(path)))
    ]


def _without_echoes(results: Sequence[Result], names: list[str]) -> list[str]:
    """Leave out what only repeats another setting, as a scheduler's number of steps repeats the budget."""
    kept = {}
    for name in sorted(names, key=lambda name: (name.count("."), names.index(name))):
        values = tuple(_text(result.settings.get(name)) for result in results)
        kept.setdefault(values, name)
    return [name for name in names if name in kept.values()]


def _words(result: Result, names: list[str]) -> dict[str, str]:
    """``lr=0.1`` and the like of each setting the result has; the whole path where two settings end alike."""
    ends = [name.rpartition(".")[2] for name in names]
    return {
        name: f"{end if ends.count(end) == 1 else name}={_text(result.settings[name])}"
        for name, end in zip(names, ends, strict=True)
        if name in result.settings
    }


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "null" if value is None else str(value)
    return f"{value:.12g}"  # 1 and 1.0 are one value


def _refuse_twins(one: Result, other: Result) -> None:
    names = sorted(set(one.settings) | set(other.settings))
    differ = [name for name in names if one.settings.get(name) != other.settings.get(name)]
    raise UserError(
        f"two runs of {one.method} on {one.task} have seed {one.seed} and differ only in "
        f"{', '.join(differ) or 'their schema'}: {one.run.path} and {other.run.path}. "
        "Name one of their folders"
    )


def natural(text: str) -> list[str | float]:
    """Sort key by which numbers in a text are in their order.

    Example:
        >>> sorted(["norm lr=10", "norm lr=2", "norm lr=1e-3"], key=natural)
        ['norm lr=1e-3', 'norm lr=2', 'norm lr=10']
    """
    parts = re.split(r"(\d+\.?\d*(?:e[+-]?\d+)?)", text)  # text and numbers in turn
    return [float(part) if number % 2 else part for number, part in enumerate(parts)]
