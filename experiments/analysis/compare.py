"""Which method is better, how sure that is, and at what cost: runs in, tables and pictures out."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.analysis import style
from experiments.analysis.chosen import choose
from experiments.analysis.entries import Entry, by_task, curves, load_entries
from experiments.analysis.figures.comparison import comparison_figure
from experiments.analysis.marks import styled
from experiments.analysis.methods import Result, Unfinished, finished, identify, natural
from experiments.analysis.tables import Table, write_tables
from experiments.analysis.tuning import tuning_table
from experiments.analysis.verdicts import (
    Target,
    across_table,
    notes_on_missing,
    raw_table,
    runs_table,
    task_table,
)
from experiments.errors import UserError, nearest
from experiments.runs import Run, write_whole

NO_CLIPPING = "no_clip"


@dataclass(frozen=True)
class Comparison:
    """Methods next to each other."""

    entries: list[Entry]
    """By task and method."""
    tables: list[Table]
    """Raw numbers, verdicts task by task; where there is something to say, across tasks and on tuning."""
    runs: Table
    """The run behind every number."""


def compare(
    runs: Iterable[Run],
    *,
    reference: str | None = None,
    metric: str | None = None,
    targets: Mapping[str | None, float] | None = None,
    seeds: Collection[int] | None = None,
    tuned_at: Collection[int] = (),
    allow_mixed: bool = False,
) -> Comparison:
    """Compare the methods of finished runs.

    Args:
        runs: in any order; those that are not finished are named and counted, and left out.
        reference: method, or clipping where that says it, that others are compared with. By default
            ``no_clip`` with the same optimizer.
        metric: other than the tasks' own.
        targets: metric to reach by task; None is any other task. By default the reference's median.
        seeds: to compare, all by default. If the reference has others, they alone set the target.
        tuned_at: seeds to choose the best setting of each method by, which is compared at the others; next to
            it settings that were run at the others only, untuned.
        allow_mixed: compare runs that differ in what must agree.

    Raises:
        UserError: there is nothing to compare, or it must not be.
    """
    results, unfinished = finished(runs)
    if not results:
        told = f", but {'; '.join(map(str, unfinished))}" if unfinished else ""
        raise UserError(f"there is no finished run to compare{told}")
    identify(results, allow_mixed=allow_mixed)
    chosen, lost = results, unfinished
    if seeds is not None:
        chosen = [result for result in results if result.seed in {*seeds, *tuned_at}]
        lost = _at(unfinished, {*seeds, *tuned_at})
    if not chosen:
        known = sorted({result.seed for result in results})
        raise UserError(f"--seeds: no run has one of {_listed(seeds)}; there are {_listed(known)}")
    if tuned_at:
        return _compare_tuned(chosen, tuned_at, lost, reference, metric, targets or {})
    entries = load_entries(chosen, metric, lost)
    references = _references(entries, reference)
    spare = load_entries([result for result in results if seeds and result.seed not in seeds], metric)
    goals = _targets(entries, references, spare, targets or {})
    tables = [
        raw_table(entries, goals, notes_on_missing(lost, chosen)),
        task_table(entries, references),
        across_table(entries, references, goals),
        tuning_table(entries),
    ]
    return Comparison(entries, [table for table in tables if table], runs_table(entries))


def _compare_tuned(
    results: Sequence[Result],
    tuned_at: Collection[int],
    unfinished: Sequence[Unfinished],
    reference: str | None,
    metric: str | None,
    targets: Mapping[str | None, float],
) -> Comparison:
    """Compare each method at its best setting, and apart from that each as it comes."""
    chosen = choose(results, tuned_at, metric)
    selecting = _at(unfinished, tuned_at)
    reporting = [one for one in unfinished if one not in selecting]
    tuned, untuned = (load_entries(part, metric, reporting) for part in (chosen.tuned, chosen.untuned))
    tried = load_entries(chosen.tried, metric)
    references = _references(tuned, reference)
    goals = _targets(tuned, references, [], targets)
    tables = [
        raw_table([*tuned, *untuned], goals, notes_on_missing(unfinished, results)),
        task_table(tuned, references),
        across_table(tuned, references, goals),
    ]
    if untuned:
        there = any(reference in (entry.method, entry.names["clipping"]) for entry in untuned)
        as_they_are = task_table(untuned, _references(untuned, reference if there else None))
        tables.append(replace(as_they_are, name="untuned", title="Settings that nobody tuned"))
    tables.append(tuning_table(tried, by_mean=True))
    every_run = runs_table([*tuned, *untuned, *tried])
    return Comparison(tuned, [table for table in tables if table], every_run)


def _at(unfinished: Iterable[Unfinished], seeds: Iterable[int]) -> list[Unfinished]:
    """Those of the seeds, as the path says: a run that never trained may say nothing else."""
    wanted = set(map(str, seeds))
    return [one for one in unfinished if one.run.names["seed"] in wanted]


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _references(entries: Sequence[Entry], asked: str | None) -> dict[Entry, Entry]:
    """Entry -> its reference, for those that have one; a reference has itself."""
    found = {}
    for of_task in by_task(entries).values():
        for entry in of_task:
            reference = _named(of_task, asked) if asked else _unclipped(of_task, entry)
            if reference is not None:
                found[entry] = reference
    if asked and not found:
        known = sorted({entry.method for entry in entries}, key=natural)
        raise UserError(
            f"--reference: {asked!r} is not the name of one method; choose one of {'; '.join(known)}."
            f"{nearest(asked, known)}"
        )
    return found


def _named(entries: Sequence[Entry], name: str) -> Entry | None:
    exact = [entry for entry in entries if entry.method == name]
    loose = exact or [entry for entry in entries if entry.names["clipping"] == name]
    return loose[0] if len(loose) == 1 else None


def _unclipped(entries: Sequence[Entry], entry: Entry) -> Entry | None:
    """The entry without clipping and the same otherwise; or else the only one with the same optimizer."""
    plain = [
        other
        for other in entries
        if other.names["clipping"] == NO_CLIPPING and other.names["optimizer"] == entry.names["optimizer"]
    ]
    candidates = [other for other in plain if other.surroundings == entry.surroundings] or plain
    return candidates[0] if len(candidates) == 1 else None


def _targets(
    entries: Sequence[Entry],
    references: Mapping[Entry, Entry],
    spare: Sequence[Entry],
    asked: Mapping[str | None, float],
) -> dict[str, Target]:
    """Task -> target, for those that have one."""
    tasks = by_task(entries)
    for name in asked:
        if name is not None and name not in tasks:
            raise UserError(
                f"--target: there is no task {name!r} here; choose one of {', '.join(tasks)}."
                f"{nearest(name, tasks)}"
            )
    goals = {}
    for task, of_task in tasks.items():
        fixed = asked.get(task, asked.get(None))
        known = [references[entry] for entry in of_task if entry in references]
        if fixed is not None:
            goals[task] = Target(fixed, "as given")
        elif known:
            reference = (max if known[0].higher_is_better else min)(known, key=lambda entry: entry.median)
            apart = [entry for entry in spare if (entry.task, entry.method) == (task, reference.method)]
            source = apart[0] if apart else reference
            where = f"seeds {_listed(source.seeds)}" if apart else "the seeds compared"
            if math.isfinite(source.median):
                goals[task] = Target(source.median, f"the median of {source.method} on {where}")
    return goals


def write_comparison(runs: Iterable[Run], folder: Path) -> list[Path]:
    """Compare finished runs; write tables and figures into a folder, and say where they are."""
    return write(compare(runs), folder)


def write(comparison: Comparison, folder: Path, *, drawn: bool = True) -> list[Path]:
    """Write the tables as ``compare*``, and the curves of each task as ``comparison*.{png,pdf,csv}``.

    Args:
        comparison: to write.
        folder: made if need be.
        drawn: False for the tables only.
    """
    paths = write_tables(folder, "compare", comparison.tables, for_programs=[comparison.runs])
    tasks = by_task(comparison.entries) if drawn else {}
    for task, entries in tasks.items():
        name = "comparison" if len(tasks) == 1 else "comparison-" + re.sub(r"[^\w.=-]+", "_", task)
        with styled():
            figure, table = comparison_figure(
                curves(entries),
                metric=entries[0].metric,
                higher_is_better=entries[0].higher_is_better,
                title=f"{task}, {entries[0].names['preset']} preset",
            )
            paths += [style.save(figure, folder / f"{name}.{suffix}") for suffix in ("png", "pdf")]
        paths.append(folder / f"{name}.csv")
        with write_whole(paths[-1]) as file:
            file.write(table.to_csv(index=False).encode())
    return paths
