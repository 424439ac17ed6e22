"""A report of an experiment: one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from experiments.analysis.compare import NO_CLIPPING, compare
from experiments.analysis.figures import base
from experiments.analysis.figures.base import Kind
from experiments.analysis.figures.cost import CostAnatomy
from experiments.analysis.figures.curves import Curves
from experiments.analysis.figures.plan import Plan
from experiments.analysis.figures.three_panels import ThreePanels
from experiments.analysis.marks import DPI
from experiments.analysis.methods import Result, identify, natural
from experiments.analysis.publish import Made, make, path_of, seeds_of, where_of
from experiments.analysis.render import render
from experiments.analysis.stats import to_scores
from experiments.analysis.tables import Table
from experiments.errors import UserError
from experiments.runs import FINISHED, Run
from experiments.sweeps import Sweep

MOST_LINES = 12
"""Methods in one figure; of more, the best setting of the best clippings."""
MANY_ROWS = 45
"""From which a table is folded."""
MOST_VALUES = 12
"""Of a setting that are listed."""
SCREEN_DPI = 100
LONG = 48
"""Characters from which a cell may break."""
VERDICTS = ("better", "worse")
TELEMETRY = {
    "grad_norm": "gradient norm before clipping",
    "threshold": "threshold in use",
    "clipped": "share clipped (of steps, tensors or elements)",
}


class Picture(NamedTuple):
    """A figure as the page shows it."""

    name: str
    title: str
    png: str
    """In base 64."""
    width: int
    """At which its letters are as large as those of the page's notes."""
    caption: str


@dataclass(frozen=True)
class HtmlTable:
    """A table as the page shows it."""

    title: str
    heads: list[tuple[str, bool]]
    """Heading, and whether the column is aligned to the right."""
    rows: list[list[tuple[str, str]]]
    """Text, and its class."""
    notes: Sequence[str] = ()

    @property
    def folded(self) -> bool:
        """Whether it is long."""
        return len(self.rows) > MANY_ROWS

    @classmethod
    def of(cls, table: Table) -> HtmlTable:
        """The columns that people read."""
        right = table.to_the_right()
        rows = [
            [(text, _class(text, to_the_right)) for text, to_the_right in zip(line, right, strict=True)]
            for line in table.cells()
        ]
        return cls(table.title, list(zip(table.columns, right, strict=True)), rows, table.notes)

    @classmethod
    def plain(cls, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> HtmlTable:
        """A table of text."""
        cells = [[(text, _class(text, False)) for text in row] for row in rows]
        return cls("", [(head, False) for head in heads], cells)


def _class(text: str, right: bool) -> str:
    if text in VERDICTS:
        return text
    return "right" if right else "long" if len(text) > LONG else ""


def report(title: str, runs: Sequence[Run], plans: Sequence[Plan], sweeps: Sequence[Sweep]) -> str:
    """Write the page.

    Args:
        title: heading of the page.
        runs: all that it is about.
        plans: of figures, drawn where these runs have what they need, beside the comparison of each task.
        sweeps: that made the runs.

    Raises:
        UserError: none of the runs has come to an end.
    """
    results, others = base.ended(runs)
    if not results:
        raise UserError("none of these runs has come to an end")
    tables, refusal = _tables(runs, sweeps)
    pictures, not_drawn = _pictures(results, others, plans)
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    ).get_template("report.html")
    return page.render(
        title=title,
        lead=_lead(results),
        refusal=refusal,
        tables=tables,
        figures=pictures,
        not_drawn=not_drawn,
        settings=_settings(results),
        counts=_counts([*results, *others]),
        ended_badly=_ended_badly([*results, *others]),
        all_runs=_all_runs([*results, *others]),
        commands=_commands(plans, sweeps),
        made_with=_made_with(results),
    )


def _tables(runs: Sequence[Run], sweeps: Sequence[Sweep]) -> tuple[list[HtmlTable], str]:
    """The comparison's tables, or why there is none. Where all sweeps tuned, each method is at its best."""
    searches = [sweep.facts().get("search") or {} for sweep in sweeps]
    seeds = {tuple(map(int, search.get("select_seeds", ()))) for search in searches}
    metrics = {search.get("metric") for search in searches}
    alike = len(seeds) == len(metrics) == 1 and all(
        search.get("by", "final") == "final" for search in searches
    )
    tuned = {"tuned_at": seeds.pop(), "metric": metrics.pop()} if alike else {}
    try:
        tables = compare(runs, **tuned).tables
    except UserError as error:
        return [], str(error)
    # What a reader wants first: verdicts, those of a table that one can overlook before others.
    order = sorted(tables, key=lambda table: (len(table.rows) > MANY_ROWS, table.name == "raw"))
    return [HtmlTable.of(table) for table in order], ""


def _pictures(
    results: list[Result], others: list[Result], plans: Sequence[Plan]
) -> tuple[list[Picture], list[str]]:
    """The figures that can be drawn, and why others cannot."""
    pictures, not_drawn = [], []
    own = [(plan, results, others) for plan in plans]
    kinds = {type(plan.kind) for plan in plans}
    usual = [(plan, of_task, []) for plan, of_task in _usual_plans(results) if type(plan.kind) not in kinds]
    for plan, *runs in own + usual:
        try:
            pictures.append(_picture(plan, make(plan, *runs)))
        except UserError as error:
            not_drawn.append(f"{plan.name}: {error}")
    return pictures, not_drawn


def _picture(plan: Plan, made: Made) -> Picture:
    png = render(plan.kind, made.csv, caption="")["png"]
    width = int.from_bytes(png[16:20], "big") * SCREEN_DPI // DPI  # as the file's header says
    return Picture(plan.name, plan.kind.title, base64.b64encode(png).decode(), width, made.caption)


def _usual_plans(results: list[Result]) -> Iterator[tuple[Plan, list[Result]]]:
    """What any experiment can show of each task, with the runs for it."""
    named = [replace(result) for result in results if result.summary["status"] in FINISHED]
    try:
        identify(named, allow_mixed=True)
    except UserError:  # two runs of one method have the same seed: the tables have said so
        return
    for task, of_task in _grouped(named, lambda result: result.task).items():
        name = re.sub(r"[^\w.=-]+", "-", task)
        chosen, note = _best_settings(of_task)
        lines = {"lines": ("method",)}
        yield _plan(f"comparison-{name}", chosen, ThreePanels(title=task, **lines), note), chosen
        telemetry = Curves(
            title=f"{task}: what the methods do to the gradient",
            panels=TELEMETRY,
            log=("grad_norm", "threshold"),
            shares=("clipped",),
            centre="median",
            points=100,
            **lines,
        )
        yield _plan(f"clipping-{name}", chosen, telemetry, note), chosen
        cost = CostAnatomy(title=f"{task}: where a step's time goes", **lines)
        yield _plan(f"cost-{name}", chosen, cost, note), chosen


def _plan(name: str, results: Sequence[Result], kind: Kind, note: str) -> Plan:
    experiments = sorted({result.run.names["experiment"] for result in results})
    return Plan(name, experiments[0], {"experiment": experiments}, {}, {}, (), note, kind)


def _best_settings(results: list[Result]) -> tuple[list[Result], str]:
    """All runs of a task; of more methods than one can tell apart the best of each optimizer and clipping."""
    methods = _grouped(results, lambda result: result.method)
    if len(methods) <= MOST_LINES:
        return results, ""
    best: dict[tuple[str, str], list[Result]] = {}
    for group in methods.values():
        key = group[0].names["optimizer"], group[0].names["clipping"]
        if key not in best or _median_score(group) > _median_score(best[key]):
            best[key] = group
    # No clipping is what the others are looked at beside.
    by_score = sorted(best.values(), key=_median_score, reverse=True)
    order = sorted(by_score, key=lambda group: group[0].names["clipping"] != NO_CLIPPING)[:MOST_LINES]
    note = f"of {len(methods)} settings those of the {len(order)} best clippings, chosen on these same runs"
    return [result for group in order for result in group], note


def _median_score(results: Sequence[Result]) -> float:
    higher_is_better = results[0].summary["higher_is_better"]
    return float(np.median(to_scores([base.final(result) for result in results], higher_is_better)))


def _grouped(results: Iterable[Result], key: Callable[[Result], str]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return groups


def _lead(results: Sequence[Result]) -> str:
    tasks = dict.fromkeys(f"{result.names['task']} ({result.names['preset']} preset)" for result in results)
    return (
        f"{len(results)} runs, {seeds_of(results)} of each setting: {', '.join(tasks)}. {where_of(results)}."
    )


def _settings(results: Sequence[Result]) -> list[tuple[str, HtmlTable, HtmlTable]]:
    """Of each task the settings that its runs share, and those that differ with their values."""
    tables = []
    for task, of_task in _grouped(results, lambda result: result.names["task"]).items():
        known = [
            {**result.names, **{path: value for path, value in result.settings.items() if _is_told(path)}}
            for result in of_task
        ]
        common, differing = [], []
        for path in dict.fromkeys(path for of_run in known for path in of_run):
            counts = Counter(_text(of_run[path]) if path in of_run else "-" for of_run in known)
            if len(counts) == 1:
                common.append((path, *counts))
            else:
                differing.append((path, _listed(counts)))
        seeds = sorted({result.seed for result in of_task})
        differing.append(("seed", ", ".join(map(str, seeds))))
        tables.append(
            (
                task,
                HtmlTable.plain(("differs", "values"), differing),
                HtmlTable.plain(("the same in all", "value"), common),
            )
        )
    return tables


def _listed(counts: Counter[str]) -> str:
    values = sorted(counts, key=natural)
    told = [f"{value} ({counts[value]} runs)" for value in values[:MOST_VALUES]]
    return ", ".join(told + [f"and {len(values) - MOST_VALUES} more"] * (len(values) > MOST_VALUES))


def _is_told(path: str) -> bool:
    # A preset's values are repeated where they are used.
    return not path.startswith("preset.") and path.rpartition(".")[2] not in ("_partial_", "_convert_")


def _text(value: Any) -> str:
    return "null" if value is None else base.text(value)


def _counts(results: Sequence[Result]) -> str:
    counts = Counter(result.summary["status"] for result in results)
    return f"{len(results)} runs: {', '.join(f'{count} {status}' for status, count in counts.items())}."


def _ended_badly(results: Sequence[Result]) -> HtmlTable | None:
    bad = [result for result in results if result.summary["status"] != "ok"]
    rows = [
        (result.summary["status"], path_of(result.run), str((result.run.status or {}).get("message") or ""))
        for result in bad
    ]
    return HtmlTable.plain(("status", "run", "what it said"), rows) if rows else None


def _all_runs(results: Sequence[Result]) -> HtmlTable:
    rows = []
    for result in results:
        value = (result.summary.get("final") or {}).get(f"val/{result.summary.get('metric')}")
        told = "-" if value is None else f"{result.summary['metric']} {value:.4g}"
        rows.append((path_of(result.run), result.summary["status"], told))
    return HtmlTable.plain(("run", "status", "final"), rows)


def _commands(plans: Sequence[Plan], sweeps: Sequence[Sweep]) -> list[str]:
    """What was typed; where no sweep says it, what makes the runs of the figures."""
    typed = dict.fromkeys(sweep.facts()["command"] for sweep in sweeps)
    return list(typed) or list(
        dict.fromkeys(f"clipbench run -m {sweep}" for plan in plans for sweep in plan.sweeps)
    )


def _made_with(results: Sequence[Result]) -> HtmlTable:
    told: dict[str, dict[str, None]] = {}
    for result in results:
        facts = {name: result.summary.get(name) for name in ("device", "threads", "code")}
        for name, value in {**facts, **result.summary["versions"]}.items():
            told.setdefault(name, {})[str(value)] = None
    return HtmlTable.plain(("made with", ""), [(name, ", ".join(values)) for name, values in told.items()])
