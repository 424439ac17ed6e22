"""The contract of a kind of figure, and what kinds share: which runs belong together, and what they gave."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from experiments.analysis.entries import Entry, load_entries
from experiments.analysis.marks import MARKS, Mark, marks
from experiments.analysis.methods import Result, finished, flatten, natural
from experiments.errors import UserError, nearest
from experiments.runs import FAILED, FINISHED, Run, identity
from experiments.trials import judged_by

FAR = 1e5
TEXT = (
    "panel",
    "facet",
    "line",
    "clipping",
    "task",
    "method",
    "part",
    "setting",
    "kind",
    "row",
    "column",
    "curve",
    "verdict",
)
"""Columns of tables that hold text, even where it looks like a number."""


class Kind(Protocol):
    """A kind of figure: a frozen dataclass of settings, with two functions of these and their argument."""

    title: str
    """What stands above it, once it is rendered."""

    def table(self, results: Sequence[Result]) -> pd.DataFrame:
        """All that is drawn of these runs, those that diverged among them."""

    def draw(self, table: pd.DataFrame) -> Figure:
        """The picture of a table, as it comes back from CSV."""


@runtime_checkable
class Timed(Kind, Protocol):
    """A kind that draws seconds, which no run takes twice."""

    def repeatable(self, table: pd.DataFrame) -> pd.DataFrame:
        """What of a table the same runs give again when they are made again."""


def ended(runs: Iterable[Run]) -> tuple[list[Result], list[Result]]:
    """Return the runs that came to an end, failed ones too, and the others, of which there is no summary."""
    runs = list(runs)
    results, _ = finished(runs)
    found = {result.run.path for result in results}
    others = []
    for run in runs:
        status = (run.status or {}).get("status", "not started")
        if run.path in found or status in FINISHED:  # or the same run, in another experiment
            continue
        config = run.config()
        summary = run.summary() if status in FAILED else {"status": status, "seed": config["seed"]}
        result = Result(run, run.names, summary, flatten(identity(config)))
        (results if status in FAILED else others).append(result)
    return results, others


def setting(result: Result, path: str) -> Any:
    """What a run is called or was set to; None if it has no such thing.

    Args:
        result: the run.
        path: ``experiment``, ``seed``, ``clipping`` and other names, ``optimizer.lr`` and other settings, or
            several of these divided by ``|``, of which the first that the run has counts. Of runs that were
            identified also ``method``, and ``task`` is what tells it from others of its name.
    """
    known = {**result.names, "experiment": result.run.names["experiment"], "seed": result.seed}
    if result.method:
        known |= {"task": result.task, "method": result.method}
    for name in path.split("|"):
        value = known.get(name, result.settings.get(name))
        if value is not None:
            return value
    return None


def select(results: Iterable[Result], wanted: Mapping[str, Any]) -> list[Result]:
    """The runs that have these settings, each one value or a list of them.

    Raises:
        UserError: there is none, and which setting is to blame.
    """
    found = list(results)
    for path, values in wanted.items():
        known = dict.fromkeys(setting(result, path) for result in found)
        found = [result for result in found if has(result, path, values)]
        if not found:
            wanted_here = ", ".join(map(text, values)) if isinstance(values, list) else text(values)
            choices = [text(value) or "none" for value in known]
            raise UserError(
                f"no run has {path}={wanted_here}; these have {', '.join(choices)}."
                f"{nearest(wanted_here, choices)}"
            )
    return found


def has(result: Result, path: str, values: Any) -> bool:
    """Whether a run has a setting of this value, or of one in this list."""
    return setting(result, path) in (values if isinstance(values, list) else [values])


def groups(
    results: Iterable[Result], by: Sequence[str], order: Iterable[str] = ()
) -> dict[tuple[Any, ...], list[Result]]:
    """Split runs by settings, which leave nothing open but the seed.

    Args:
        results: the runs.
        by: paths of settings.
        order: of values; others follow in the order of methods and numbers.

    Raises:
        UserError: runs of one group differ in more than their seed.
    """
    found: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        key = tuple(setting(result, path) for path in by)
        group = found.setdefault(key, [])
        if group and group[0].run.names["digest"] != result.run.names["digest"]:
            _refuse_twins(group[0], result, by)
        group.append(result)
    return {key: found[key] for key in in_order(found, order)}


def _refuse_twins(one: Result, other: Result, by: Sequence[str]) -> None:
    names = sorted(set(one.settings) | set(other.settings))
    differ = [name for name in names if one.settings.get(name) != other.settings.get(name)]
    both = ", ".join(f"{path}={text(setting(one, path))}" for path in by)
    raise UserError(
        f"two unlike runs are both of {both}: {one.run.path} and {other.run.path}. They differ in "
        f"{', '.join(differ)}: tell them apart by it, or select one value under runs:"
    )


def in_order(keys: Iterable[tuple[Any, ...]], order: Iterable[str] = ()) -> list[tuple[Any, ...]]:
    """Sort keys of several values by the rank of each; names of several in ``order`` stand as there."""
    order = list(order)

    def place(key: tuple[Any, ...]) -> tuple[list[tuple[Any, ...]], int]:
        ranks = [rank(value, order) for value in key]
        names = [label(key[start:], {}) for start in range(len(key))]
        return next(
            ((ranks[:start], order.index(name)) for start, name in enumerate(names) if name in order),
            (ranks, len(order)),
        )

    return sorted(keys, key=place)


def rank(value: Any, order: Sequence[str] = ()) -> tuple[Any, ...]:
    """Sort key: values as in ``order``, then what is missing, numbers, clippings as in MARKS, other text."""
    if text(value) in order:
        return (0, order.index(text(value)))
    if value is None:
        return (1,)
    if isinstance(value, int | float):
        return (2, value)
    known = list(MARKS)
    return (3, known.index(value)) if value in known else (4, natural(str(value)))


def text(value: Any) -> str:
    """A value as people write it: 0.03, 1, inf; nothing for None."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def label(values: Iterable[Any], labels: Mapping[str, str]) -> str:
    """Name of a line, of the settings that tell it apart; ``labels`` may have a better one."""
    name = " ".join(filter(None, map(text, values)))
    return labels.get(name, name)


def entries(
    results: Iterable[Result],
    lines: Sequence[str],
    labels: Mapping[str, str],
    facets: str = "task",
    metric: str | None = None,
) -> list[Entry]:
    """The finished runs, put together by facet and line, which their ``task`` and ``method`` are set to."""
    finished_ones = [result for result in results if result.summary["status"] in FINISHED]
    if not finished_ones:
        raise UserError("none of these runs has finished")
    named = []
    for key, group in groups(finished_ones, (facets, *lines), labels).items():
        names = {"task": label(key[:1], labels), "method": label(key[1:], labels)}
        named += [replace(result, **names) for result in group]
    order = {(result.task, result.method): None for result in named}
    return sorted(
        load_entries(named, metric), key=lambda entry: list(order).index((entry.task, entry.method))
    )


def worst(result: Result) -> float:
    """What counts for a metric that is no number."""
    return -math.inf if result.summary["higher_is_better"] else math.inf


def final(result: Result) -> float:
    """The metric of the last evaluation; the worst there is where the run diverged."""
    value = result.summary["final"].get(f"val/{result.summary['metric']}", math.nan)
    return value if result.summary["status"] == "ok" and math.isfinite(value) else worst(result)


def lost(result: Result) -> str:
    """What became of a run without a final metric: ``diverged``, ``oom``, ``error``; else nothing."""
    if math.isfinite(final(result)):
        return ""
    return result.summary["status"] if result.summary["status"] != "ok" else "diverged"


def metric_of(results: Sequence[Result], metric: str | None = None) -> tuple[str, bool]:
    """Name of the metric of all these runs, their task's own if None, and whether higher is better.

    Raises:
        UserError: they have several.
    """
    metrics = {judged_by(result.summary, metric) for result in results}
    if len(metrics) > 1:
        names = ", ".join(sorted(name for name, _ in metrics))
        raise UserError(f"these runs have different metrics, {names}: select one task under runs:")
    return metrics.pop()


def marks_of(table: pd.DataFrame) -> dict[str, Mark]:
    """How to draw each line of a table with columns ``line`` and ``clipping``."""
    return marks(zip(table["line"], table["clipping"], strict=True))


def quiet_grid(axes: Axes, axis: str = "y") -> None:
    """Lines to read values by, behind all else."""
    axes.grid(axis=axis, color="black", alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)


def explain(figure: Figure, told: str) -> None:
    """Say how to read the panels; it will stand below them, above the caption."""
    figure.set_label(told)


def log_scale(axes: Axes, axis: str = "y") -> None:
    """Log scale with plain numbers: powers of ten, 1, 2 and 5 times these, or even steps, as it spans."""
    getattr(axes, f"set_{axis}scale")("log", nonpositive="mask")
    of_axis = getattr(axes, f"{axis}axis")
    low, high = getattr(axes, f"get_{axis}lim")()
    digits = (1, 2, 5) if high < 200 * low else (1,)
    few = MaxNLocator(5, steps=[1, 2, 5, 10])
    of_axis.set_major_locator(few if high < 4 * low else LogLocator(subs=digits))
    of_axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    of_axis.set_minor_formatter(NullFormatter())


def legend(figure: Figure, entries: Mapping[str, Mark], *, markers: bool = True, **extra: Line2D) -> None:
    """Name the lines beside the panels, where they cover nothing."""
    handles = [
        Line2D(
            [], [], color=how.color, linestyle=how.linestyle, marker=how.marker if markers else "", label=name
        )
        for name, how in entries.items()
    ]
    figure.legend(handles=[*handles, *extra.values()], loc="outside right center")


def is_wide(values: Iterable[float], ratio: float = 10) -> bool:
    """Whether positive numbers lie so far apart that only a log scale shows them all."""
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) > ratio * min(finite)


def span(values: Iterable[float]) -> tuple[float, float, bool]:
    """Smallest and largest finite value that are worth an axis, and whether it needs a log scale.

    A run on its way to diverge may have any value: what is more than ``FAR`` times the smallest is beyond.
    """
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high, log = min(finite), max(finite), is_wide(finite)
    return low, min(high, FAR * low) if log else high, log
