"""Published figures: table, pictures and sidecar in one folder, and whether they still are what they say."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.analysis.chosen import Chosen, choose
from experiments.analysis.figures import base
from experiments.analysis.figures.plan import Plan
from experiments.analysis.methods import Result, identify
from experiments.analysis.render import PICTURES, drawn_with, read_table, render
from experiments.errors import UserError
from experiments.runs import Run, find_runs, write_whole

PARTS_OF_A_PATH = 5  # of a run: experiment, task, optimizer and clipping, digest, seed
SIDECAR = {"files": dict, "drawn_as": dict, "caption": str, "versions": dict, "runs": dict, "seconds": float}
"""What a check asks of it."""
CLOSE = 1e-9
"""Relative: what another version of NumPy or SciPy may change."""


@dataclass(frozen=True)
class Made:
    """What runs gave for a figure."""

    csv: bytes
    caption: str
    runs: dict[str, str]
    """Path below runs/ -> status and digest of what is in it: those drawn, and those these were chosen of."""
    seeds: str
    codes: list[str]
    """Versions of the code that made the runs."""
    torch: list[str]
    """Versions of PyTorch in which they ran."""
    device: str
    seconds: float
    """What all these runs took, one after the other."""
    unfinished: list[str]


def runs_of(plan: Plan, results_dir: Path) -> list[Run]:
    """The runs of a figure's experiments, before any is selected."""
    return [run for name in plan.experiments for run in find_runs(results_dir / "runs" / name)]


def make(plan: Plan, results: Sequence[Result], others: Sequence[Result]) -> Made:
    """Make the table of a figure.

    Args:
        plan: of the figure; says which of the runs it draws.
        results: runs that came to an end.
        others: those that did not.

    Raises:
        UserError: there are none, or they do not belong into one figure.
    """
    if not results:
        raise UserError(
            f"no finished runs of {' or '.join(plan.experiments)}; "
            f"clipbench figures {plan.name} --run makes them"
        )
    wanted = {"experiment": plan.experiments, **plan.runs}
    results = base.select(results, wanted)
    unfinished = [
        f"{result.run.path}: {result.summary['status']}"
        for result in others
        if all(base.has(result, path, values) for path, values in wanted.items())
    ]
    _refuse_mixtures(results)
    tried, how = [], ""
    if plan.tuned:
        identify(results, allow_mixed=False)
        chosen = choose(results, plan.tuned["seeds"], plan.tuned.get("metric"))
        results, tried, how = chosen.tuned, chosen.tried, _how_chosen(chosen, plan.tuned)
    table = plan.kind.table(results)
    seeds = seeds_of(results)
    summaries = [result.summary for result in [*results, *tried]]
    return Made(
        csv=table.to_csv(index=False, lineterminator="\n").encode(),
        caption=_caption(plan, results, seeds, how, unfinished),
        runs={path_of(result.run): _content(result) for result in [*results, *tried]},
        seeds=seeds,
        codes=sorted({summary["code"] or "unknown" for summary in summaries}),
        torch=sorted({summary["versions"]["torch"] for summary in summaries}),
        device=where_of([*results, *tried]),
        seconds=round(sum(summary["seconds"] for summary in summaries), 3),
        unfinished=unfinished,
    )


def _refuse_mixtures(results: Sequence[Result]) -> None:
    for name, value in (
        ("preset", lambda result: result.names["preset"]),
        ("device_type", lambda result: result.settings["device_type"]),
    ):
        found = sorted({value(result) for result in results})
        if len(found) > 1:
            raise UserError(f"runs of {name} {' and '.join(found)} share no figure: select one under runs:")


def _how_chosen(chosen: Chosen, tuned: Mapping[str, Any]) -> str:
    least, most = min(chosen.tries), max(chosen.tries)
    settings = f"{most} settings" if least == most else f"{least} to {most} settings"
    seeds = ", ".join(map(str, tuned["seeds"]))
    by = f" by {tuned['metric']}" if tuned.get("metric") else ""
    return f"each the best of {settings} tried at seeds {seeds}{by}"


def path_of(run: Run) -> str:
    """Its path below runs/, wherever that lies."""
    return "/".join(run.path.absolute().parts[-PARTS_OF_A_PATH:])


def _content(result: Result) -> str:
    """Status, and a digest of all numbers a run gave, times apart."""
    records = result.run.records()
    digest = hashlib.sha256()
    for column in sorted(records):
        digest.update(column.encode() + records[column].to_numpy(np.float64).tobytes())
    said = {key: result.summary.get(key) for key in ("metric", "steps", "final", "best", "clip_fraction")}
    digest.update(json.dumps(said, sort_keys=True).encode())
    return f"{result.summary['status']} {digest.hexdigest()[:16]}"


def seeds_of(results: Iterable[Result]) -> str:
    """How many seeds each setting has, in words."""
    counts = Counter(result.run.names["digest"] for result in results).values()
    least, most = min(counts), max(counts)
    return f"{most} seed{'s' if most > 1 else ''}" if least == most else f"{least} to {most} seeds"


def _caption(plan: Plan, results: Sequence[Result], seeds: str, how: str, unfinished: Sequence[str]) -> str:
    """What was run, on which data, how often, where."""
    tasks = dict.fromkeys(f"{result.names['task']} ({result.names['preset']} preset)" for result in results)
    data = "generated data" if any(r.settings.get("task.source") == "embedded" for r in results) else ""
    lost = Counter(filter(None, map(base.lost, results)))
    parts = [
        ", ".join(tasks) + (f": {plan.note or data}" if plan.note or data else ""),
        f"{seeds} each",
        *([how] if how else []),
        ", ".join([f"{len(results)} runs", *(f"{count} {status}" for status, count in lost.items())]),
        *([f"{len(unfinished)} more not finished and not drawn"] if unfinished else []),
        where_of(results),
    ]
    return "; ".join(parts)


def where_of(results: Iterable[Result]) -> str:
    """What the runs were made on, in words."""
    places = {}
    for summary in (result.summary for result in results):
        threads = f", {summary['threads']} thread{'s' if summary['threads'] > 1 else ''}"
        places[summary["device"] + (threads if summary["device"].startswith("cpu") else "")] = None
    return " and ".join(places)


@dataclass(frozen=True)
class Findings:
    """What a check found."""

    problems: list[str]
    """What is wrong, a line each."""
    notes: list[str]
    """What could not be compared, and why; all else is as it should be."""


class Published:
    """The files of a figure in a folder of results.

    Args:
        plan: of the figure.
        out: the folder of results, ``results`` in a clone.
    """

    def __init__(self, plan: Plan, out: Path) -> None:
        self.plan = plan
        folder = out / plan.experiment
        self.paths = {suffix: folder / f"{plan.name}.{suffix}" for suffix in (*PICTURES, "csv", "json")}

    def write(self, made: Made) -> None:
        """Draw it; the sidecar, which says what the other files are, comes last."""
        files = {"csv": made.csv, **render(self.plan.kind, made.csv, made.caption)}
        sidecar = {
            "command": f"clipbench figures {self.plan.name}",
            "runs_made_by": [f"clipbench run -m {sweep}" for sweep in self.plan.sweeps],
            "drawn_as": self.plan.drawn_as,
            "caption": made.caption,
            "seeds": made.seeds,
            "versions": {
                "python": platform.python_version(),
                "torch-clip": importlib.metadata.version("torch-clip"),
                **drawn_with(),
            },
            "code": made.codes,
            "torch": made.torch,
            "device": made.device,
            "seconds": made.seconds,
            "files": {suffix: _sha256(content) for suffix, content in files.items()},
            "runs": made.runs,
        }
        files["json"] = (json.dumps(sidecar, indent=1, ensure_ascii=False) + "\n").encode()
        self.paths["csv"].parent.mkdir(parents=True, exist_ok=True)
        for suffix, content in files.items():
            with write_whole(self.paths[suffix]) as file:
                file.write(content)

    def sidecar(self) -> dict[str, Any]:
        """What `write` said of it.

        Raises:
            UserError: it is not what `write` writes.
        """
        try:
            sidecar = json.loads(self.paths["json"].read_bytes())
        except ValueError as error:
            raise UserError(f"{self.paths['json']} is no JSON: {error}") from None
        known = sidecar if isinstance(sidecar, dict) else {}
        lacking = [name for name, kind in SIDECAR.items() if not isinstance(known.get(name), kind)]
        if lacking:
            raise UserError(f"{self.paths['json']} is no sidecar: it lacks {', '.join(lacking)}")
        return sidecar

    def check(self, results_dir: Path | None = None) -> Findings:
        """Hold its files to one another and to its plan; with a folder of results, to the runs in it too."""
        missing = [path for path in self.paths.values() if not path.is_file()]
        if len(missing) == len(self.paths):
            folder = missing[0].parent
            return Findings([f"not published in {folder}; clipbench figures {self.plan.name} draws it"], [])
        if missing:
            return Findings([f"{path} is missing" for path in missing], [])
        try:
            sidecar, table = self.sidecar(), self._table()
        except UserError as error:
            return Findings([str(error)], [])
        problems, notes = self._problems_of_files(sidecar)
        if results_dir is not None:
            of_runs, notes_of_runs = self._problems_of_runs(sidecar, table, results_dir)
            problems, notes = problems + of_runs, notes + notes_of_runs
        return Findings(problems, notes)

    def _table(self) -> pd.DataFrame:
        try:
            return read_table(self.paths["csv"].read_bytes())
        except ValueError as error:
            raise UserError(f"{self.paths['csv']} holds no table: {error}") from None

    def _problems_of_files(self, sidecar: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        problems = [
            f"{self.paths[suffix]} is not the file that was drawn: its digest differs from the sidecar's"
            for suffix in (*PICTURES, "csv")
            if _sha256(self.paths[suffix].read_bytes()) != sidecar["files"].get(suffix)
        ]
        now = json.loads(json.dumps(self.plan.drawn_as))
        changed = [key for key, value in now.items() if value != sidecar["drawn_as"].get(key)]
        if changed:
            told = f"conf/figure/{self.plan.name}.yaml says another {', '.join(changed)} than was drawn"
            return [*problems, told], []
        if other := other_versions(sidecar["versions"]):
            return problems, [f"picture not compared: {other}"]
        return problems + self._differences_of_redrawing(sidecar["caption"]), []

    def _differences_of_redrawing(self, caption: str) -> list[str]:
        try:
            again = render(self.plan.kind, self.paths["csv"].read_bytes(), caption)
        except Exception as error:  # the table may hold anything by now
            return [f"{self.paths['csv']} cannot be drawn: {type(error).__name__}: {error}"]
        return [
            f"{self.paths[suffix]} is not what its CSV gives when it is drawn again"
            for suffix, content in again.items()
            if self.paths[suffix].read_bytes() != content
        ]

    def _problems_of_runs(
        self, sidecar: Mapping[str, Any], table: pd.DataFrame, results_dir: Path
    ) -> tuple[list[str], list[str]]:
        then = sidecar["runs"]
        try:
            made = make(self.plan, *base.ended(runs_of(self.plan, results_dir)))
        except UserError as error:
            return [f"its {len(then)} runs: {error}"], []
        problems = [f"run {path} is missing" for path in then if path not in made.runs]
        problems += [
            f"run {path} has changed: {then[path]} was drawn, {content} is there"
            for path, content in made.runs.items()
            if path in then and then[path] != content
        ]
        problems += [f"run {path} is there and was not drawn" for path in made.runs if path not in then]
        now = read_table(made.csv)
        difference = first_difference(table, now)
        if not difference:
            return problems, []
        # The same runs with other times have been made again, and seconds have no second time.
        again = not problems and made.seconds != sidecar["seconds"] and isinstance(self.plan.kind, base.Timed)
        if again and not first_difference(*map(self.plan.kind.repeatable, (table, now))):
            return [], ["times not compared: the same runs were made again, and took others"]
        return [*problems, f"{self.paths['csv']} is not what the runs give: {difference}"], []


def other_versions(then: Mapping[str, str]) -> str:
    """Why pictures drawn with these versions cannot be compared byte by byte here; empty if they can."""
    now = drawn_with()
    return ", ".join(
        f"{name} is {now[name]} here and was {then.get(name)}" for name in now if now[name] != then.get(name)
    )


def first_difference(then: pd.DataFrame, now: pd.DataFrame) -> str:
    """Say where two tables differ by more than `CLOSE`; empty if they do not."""
    if list(then) != list(now):
        return f"it has the columns {', '.join(then)}, now they are {', '.join(now)}"
    if len(then) != len(now):
        return f"it has {len(then)} rows, now there are {len(now)}"
    for column in then:
        one, other = then[column], now[column]
        if pd.api.types.is_numeric_dtype(one) and pd.api.types.is_numeric_dtype(other):
            same = np.isclose(one.to_numpy(float), other.to_numpy(float), rtol=CLOSE, atol=0, equal_nan=True)
        else:
            same = (one == other).to_numpy()
        if not same.all():
            row = int(np.argmin(same))
            return f"{column} of row {row + 2} is {one[row]}, now {other[row]}"
    return ""


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
