"""The tables of a comparison: raw numbers, then verdicts task by task, then across tasks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.analysis import stats
from experiments.analysis.entries import Entry, by_task, floor
from experiments.analysis.methods import Result, Unfinished
from experiments.analysis.stats import Interval
from experiments.analysis.tables import Row, Show, Table, cell

REFERENCE = "reference"
DIFFERENCE = ("difference", "difference_low", "difference_high")
RATIO = ("ratio", "ratio_low", "ratio_high")
JUDGED = ("test", "p", "p_holm", "detectable", "decidable", "wins", "improvement")
MEGABYTE = 2**20


class Target(NamedTuple):
    """What the metric is to reach on a task."""

    value: float
    why: str


def runs_table(entries: Iterable[Entry]) -> Table:
    """One row a run: where it lies, and its part in the comparison."""
    rows = [
        {
            "task": entry.task,
            "method": entry.method,
            "seed": result.seed,
            "status": result.summary["status"],
            "metric": entry.metric,
            "final": float(final),
            "best": float(best),
            "steps": result.summary["steps"],
            "seconds": result.summary["seconds"],
            "digest": result.run.names["digest"],
            "code": result.summary["code"],
            "path": str(result.run.path),
        }
        for entry in entries
        for result, final, best in zip(entry.results, entry.final, entry.best, strict=True)
    ]
    return Table("runs", "The runs compared", rows, {key: key for key in rows[0]})


def raw_table(entries: Sequence[Entry], targets: Mapping[str, Target], missing: Sequence[str]) -> Table:
    """One row a task and method: what was measured, nothing inferred; ``missing`` are notes on the rest."""
    rows = [_raw_row(entry, targets.get(entry.task)) for entry in entries]
    names = ("task", "preset", "optimizer", "clipping", "settings", "seeds", "diverged", "failed")
    columns: dict[str, str | Show] = {
        **{name: name for name in names},
        "metric": lambda row: f"{row['metric']} ({row['better']})",
        "final [range]": lambda row: _ranged(row["final"], row["final_min"], row["final_max"]),
        "best": "best",
        "reached": lambda row: "-" if row["target"] is None else f"{row['reached']}/{row['seeds']}",
        "steps": lambda row: _censored(row["steps_to_target"], row["budget"]),
        "seconds": lambda row: _censored(row["seconds_to_target"], row["budget_seconds"]),
        "clipped": lambda row: f"{100 * row['clip_fraction']:.3g}% of {row['clip_unit']}",
        "ms/step (p95)": lambda row: f"{row['ms_per_step']:.3g} ({row['ms_per_step_p95']:.3g})",
    }
    if not any(row["settings"] for row in rows):
        del columns["settings"]
    notes = [
        "final, best, clipped and ms/step: median over seeds; a diverged run counts as worse than any number "
        "in final",
        *_targets_told(by_task(entries), targets),
        f"ms/step: mean over the training steps of a run; p95 over seeds; {_hardware(entries)}",
        *_survivors(entries),
        *missing,
    ]
    return Table("raw", "What was measured", rows, columns, tuple(notes))


def notes_on_missing(unfinished: Sequence[Unfinished], results: Iterable[Result]) -> list[str]:
    """What to say of runs that are not among the results."""
    known = {result.run.names["digest"] for result in results}
    lost = [one for one in unfinished if one.failed and one.run.names["digest"] not in known]
    counts = Counter("/".join(one.run.path.parts[-4:-1]) for one in lost)
    notes = []
    if counts:
        told = ", ".join(f"{name} ({count})" for name, count in counts.items())
        notes.append(f"all runs failed, so there is no row: {told}")
    if unfinished:
        notes.append(f"not finished, so not compared: {'; '.join(map(str, unfinished))}")
    return notes


def _survivors(entries: Iterable[Entry]) -> list[str]:
    """Warnings of methods whose numbers are those of the runs that were not lost."""
    return [
        f"{entry.task}: of {entry.failed + len(entry.seeds)} runs of {entry.method} {entry.failed} failed, "
        "by an error, lack of memory, a kill or a time limit: its mean and all else is over the survivors"
        for entry in entries
        if entry.failed
    ]


def _targets_told(tasks: Mapping[str, list[Entry]], targets: Mapping[str, Target]) -> list[str]:
    told = [
        f"target on {task}: {of_task[0].metric} {cell(targets[task].value)}, {targets[task].why}; evaluated "
        f"every {_each(result.settings['eval_every'] for entry in of_task for result in entry.results)} steps"
        for task, of_task in tasks.items()
        if task in targets
    ]
    if told:
        told.append(
            "reached, steps, seconds: seeds that reached the target, and the median time (Kaplan-Meier): "
            "a run that did not is censored at its budget, and > says that less than half did"
        )
    return told


def _raw_row(entry: Entry, target: Target | None) -> Row:
    summaries = [result.summary for result in entry.results]
    milliseconds = 1e3 * entry.seconds_per_step
    row = {
        "task": entry.task,
        **{name: entry.names[name] for name in ("preset", "optimizer", "clipping")},
        "settings": " ".join(entry.details.values()) or None,
        "method": entry.method,
        "seeds": len(entry.seeds),
        "diverged": entry.diverged,
        "failed": entry.failed,
        "metric": entry.metric,
        "better": "higher" if entry.higher_is_better else "lower",
        "final": entry.median,
        "final_min": float(entry.final.min()),
        "final_max": float(entry.final.max()),
        "best": float(np.median(entry.best)),
        "target": None,
        "reached": None,
        "steps_to_target": None,
        "steps_to_target_mean": None,
        "seconds_to_target": None,
        "budget": int(max(entry.budgets)),
        "budget_seconds": float(max(entry.budgets * entry.seconds_per_step)),
        "clip_fraction": float(np.median([summary["clip_fraction"] for summary in summaries])),
        "clip_unit": summaries[0]["clip_unit"],
        "ms_per_step": float(np.median(milliseconds)),
        "ms_per_step_p95": float(np.quantile(milliseconds, 0.95)),
        "clip_and_step_share": float(np.median([_share(summary["time"]) for summary in summaries])),
        "peak_memory_mb": float(np.median([s["peak_memory_bytes"] for s in summaries]) / MEGABYTE),
    }
    if target is None:
        return row
    steps, seconds = entry.steps_to(target.value), entry.seconds_to(target.value)
    return row | {
        "target": target.value,
        "reached": steps.reached,
        "steps_to_target": steps.median,
        "steps_to_target_mean": steps.restricted_mean,
        "seconds_to_target": seconds.median,
    }


def _share(seconds: Mapping[str, float]) -> float:
    return seconds["clip+step"] / sum(seconds.values())


def _hardware(entries: Iterable[Entry]) -> str:
    summaries = [result.summary for entry in entries for result in entry.results]
    devices, threads = ({summary[key] for summary in summaries} for key in ("device", "threads"))
    warning = ": times do not compare" if len(devices) > 1 or len(threads) > 1 else ""
    return f"{_each(devices)}, {_each(threads)} {'thread' if threads == {1} else 'threads'}{warning}"


def _each(values: Iterable[Any]) -> str:
    return " or ".join(map(str, sorted(set(values))))


def task_table(entries: Sequence[Entry], references: Mapping[Entry, Entry]) -> Table:
    """Verdict of each method against its reference, on the seeds that both have."""
    rows = [row for of_task in by_task(entries).values() for row in _task_rows(of_task, references)]
    columns: dict[str, str | Show] = {
        **{name: name for name in ("task", "method", "verdict")},
        "mean [95%]": lambda row: _ranged(row["mean"], row["mean_low"], row["mean_high"]),
        "n": _counted,
        "to reference [95%]": _against_reference,
        "pairs": "pairs",
        "p (Holm)": lambda row: "-" if row["p_holm"] is None else f"{row['p_holm']:.2g}",
        "detectable": lambda row: f"{_times(row)}{cell(row['detectable'])}",
        "wins": lambda row: _percent(row["wins"]),
        "P(better)": lambda row: _percent(row["improvement"]),
    }
    notes = [
        *_who_is_compared(entries, references),
        *_survivors(entries),
        *_undecidable(rows),
        "to reference: difference paired by seed, or ratio (x) where lower is better, with t-intervals; p of "
        "its t-test, or of a rank test where a run diverged and there is no mean; Holm over the methods of a "
        f"task; verdict at {stats.ALPHA:g}",
        f"detectable: true difference or ratio that these seeds would find with probability {stats.POWER:g}",
        "wins: share of pairs in which the method is better; P(better): that any run of it beats any of the "
        "reference's",
    ]
    return Table("tasks", "Task by task", rows, columns, tuple(notes))


def _undecidable(rows: Iterable[Row]) -> list[str]:
    """A warning of methods of which so few seeds tell nothing."""
    told = [f"{row['method']} on {row['task']}" for row in rows if row["decidable"] is False]
    if not told:
        return []
    return [
        f"too few seeds for any verdict on {', '.join(told)}: the same values, had all of the method's been "
        "better or all been worse, would not have passed the test"
    ]


def judged_against(
    entries: Sequence[Entry], references: Mapping[Entry, Entry]
) -> dict[Entry, stats.Judgement]:
    """What to say of the entries of one task that have a reference other than themselves."""
    others = [entry for entry in entries if references.get(entry, entry) is not entry]
    pairs = []
    for entry in others:
        shared = sorted(set(entry.seeds) & set(references[entry].seeds))
        pairs.append((entry.at(shared), references[entry].at(shared)))
    return dict(zip(others, stats.judge(pairs, entries[0].higher_is_better), strict=True))


def _task_rows(entries: Sequence[Entry], references: Mapping[Entry, Entry]) -> list[Row]:
    judged = judged_against(entries, references)
    return [_task_row(entry, references.get(entry), judged.get(entry)) for entry in entries]


def _task_row(entry: Entry, reference: Entry | None, judged: stats.Judgement | None) -> Row:
    mean, low, high = stats.mean_interval(entry.final)
    row = {
        "task": entry.task,
        "method": entry.method,
        "reference": reference.method if reference else None,
        "metric": entry.metric,
        "seeds": len(entry.seeds),
        "diverged": entry.diverged,
        "failed": entry.failed,
        "mean": mean,
        "mean_low": low,
        "mean_high": high,
        "verdict": REFERENCE if reference is entry else None,
        **dict.fromkeys(("pairs", *DIFFERENCE, *RATIO, *JUDGED)),
    }
    if judged:
        row |= {"verdict": judged.verdict, "pairs": judged.seeds}
        row |= zip(DIFFERENCE, judged.difference, strict=True)
        row |= zip(RATIO, judged.ratio, strict=True)
        row |= {name: getattr(judged, name) for name in JUDGED}
    return _without_nan(row)


def _who_is_compared(entries: Sequence[Entry], references: Mapping[Entry, Entry]) -> list[str]:
    """What to say of references that are not plain: of several, of none, of no seed in common."""
    notes = []
    for task, of_task in by_task(entries).items():
        named = {references[entry].method for entry in of_task if entry in references}
        if len(named) > 1:
            notes.append(
                f"{task}: each method is compared with the reference of its own optimizer and settings"
            )
        without = [entry.method for entry in of_task if entry not in references]
        if without:
            told = f"{task}: no verdict, as there is nothing to compare {', '.join(without)} with"
            notes.append(f"{told}; --reference names a method")
        for entry in of_task:
            if entry in references and not set(entry.seeds) & set(references[entry].seeds):
                notes.append(f"{task}: {entry.method} shares no seed with {references[entry].method}")
    return notes


def across_table(
    entries: Sequence[Entry], references: Mapping[Entry, Entry], targets: Mapping[str, Target]
) -> Table | None:
    """Methods over all tasks; None where there are no two methods that are on all of two tasks or more."""
    tasks = by_task(entries)
    methods = _on_every_task(tasks)
    if len(tasks) < 2 or len(methods) < 2:
        return None
    timed = [task for task in tasks if task in targets]
    scores, scaled = _scores(methods, references)
    ranks = _ranks(methods)
    times = [[of[task].steps_to(targets[task].value).median for of in methods.values()] for task in timed]
    ratios = stats.time_ratios(np.reshape(times, (len(timed), len(methods))))  # also of no task
    rows = []
    for method, score, rank, ratio in zip(methods, scores, ranks, ratios.T, strict=True):
        row = {"method": method, "tasks": len(tasks)}
        row |= {"score": score.value, "score_low": score.low, "score_high": score.high}
        row |= {"rank": rank.value, "rank_low": rank.low, "rank_high": rank.high}
        row |= {"profile": stats.profile_score(ratio) if timed else None}
        row |= {f"time ratio on {task}": float(value) for task, value in zip(timed, ratio, strict=True)}
        rows.append(_without_nan(row))
    columns: dict[str, str | Show] = {
        "method": "method",
        "score [95%]": lambda row: _ranged(row["score"], row["score_low"], row["score_high"]),
        "rank [95%]": lambda row: _ranged(row["rank"], row["rank_low"], row["rank_high"]),
        "profile": "profile",
        **{f"time on {task}": f"time ratio on {task}" for task in timed},
    }
    fewest = min(len(entry.seeds) for of in methods.values() for entry in of.values())
    notes = [
        "score: interquartile mean over tasks and seeds of the way from learning nothing, 0, to the "
        "reference's median, 1, in decades where lower is better; a diverged run has 0"
        + _missing(scaled, tasks),
        "rank: mean over seeds, then tasks; 1 is best, ties are averaged",
        "intervals: bootstrap, stratified by task"
        + (f"; approximate, as some have {fewest} seeds" if fewest < stats.EXACT_FROM else ""),
        "time: median steps to target over the best method's; profile: area under the share of tasks within "
        f"1 to {stats.HORIZON:g} times the best, from 0 to 1" + _missing(timed, tasks),
    ]
    left_out = dict.fromkeys(entry.method for entry in entries if entry.method not in methods)
    if left_out:
        notes.append(f"not on every task, so not here: {', '.join(left_out)}")
    return Table("across", f"Across {len(tasks)} tasks", rows, columns, tuple(notes))


def _on_every_task(tasks: Mapping[str, list[Entry]]) -> dict[str, dict[str, Entry]]:
    """Method -> task -> entry, of the methods that are on all tasks."""
    methods: dict[str, dict[str, Entry]] = {}
    for task, of_task in tasks.items():
        for entry in of_task:
            methods.setdefault(entry.method, {})[task] = entry
    return {method: of for method, of in methods.items() if len(of) == len(tasks)}


def _scores(
    methods: Mapping[str, Mapping[str, Entry]], references: Mapping[Entry, Entry]
) -> tuple[list[Interval], list[str]]:
    """Score of each method, and the tasks that could be scaled to a reference."""
    scaled: dict[str, list[np.ndarray]] = {}
    for task in next(iter(methods.values())):
        of_task = [of[task] for of in methods.values()]
        lowest = floor(of_task)
        found = [
            stats.progress(entry.final, lowest, references[entry].median, entry.higher_is_better)
            for entry in of_task
            if entry in references
        ]
        if len(found) == len(of_task) and not any(np.isnan(scores).any() for scores in found):
            scaled[task] = found
    if not scaled:
        return [Interval(math.nan, math.nan, math.nan)] * len(methods), []
    return [stats.interquartile_mean(groups) for groups in zip(*scaled.values(), strict=True)], list(scaled)


def _ranks(methods: Mapping[str, Mapping[str, Entry]]) -> list[Interval]:
    """Mean rank of each method on the seeds that all methods have."""
    tasks = []
    for task in next(iter(methods.values())):
        of_task = [of[task] for of in methods.values()]
        shared = sorted(set.intersection(*(set(entry.seeds) for entry in of_task)))
        columns = [stats.to_scores(entry.at(shared), entry.higher_is_better) for entry in of_task]
        tasks.append(np.stack(columns, axis=1))
    if not all(len(scores) for scores in tasks):
        return [Interval(math.nan, math.nan, math.nan)] * len(methods)
    return stats.mean_ranks(tasks)


def _missing(used: Sequence[str], tasks: Iterable[str]) -> str:
    """What to say of tasks that a column leaves out."""
    out = [task for task in tasks if task not in used]
    return f"; without {', '.join(out)}, which has nothing to scale it by" if out else ""


def _ranged(value: float | None, low: float | None, high: float | None) -> str:
    """A number and, if there is one, its interval."""
    return cell(value) if low is None else f"{cell(value)} [{cell(low)}, {cell(high)}]"


def _counted(row: Row) -> str:
    """How many seeds, and how many of them came to nothing: ``3 (1 diverged), 2 failed``."""
    told = f"{row['seeds']}" + (f" ({row['diverged']} diverged)" if row["diverged"] else "")
    return told + (f", {row['failed']} failed" if row["failed"] else "")


def _against_reference(row: Row) -> str:
    """The difference or the ratio, whichever was tested."""
    return _times(row) + _ranged(*(row[key] for key in (RATIO if row["test"] == "ratio" else DIFFERENCE)))


def _times(row: Row) -> str:
    return "x " if row["test"] == "ratio" else ""


def _censored(value: float | None, budget: float) -> str:
    return f"> {cell(budget)}" if value == math.inf else cell(value)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3g}%"


def _without_nan(row: Row) -> Row:
    return {
        key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()
    }
