"""What ``clipbench tails`` found: a report in words, as JSON and CSV, and its pictures."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from experiments.analysis.figures.tails import KINDS, has_tail, samples
from experiments.analysis.render import render
from experiments.runs import Run, write_whole
from torch_clip.tails import Tails, examine


def report(run: Run) -> str:
    """Write into the folder of a measurement what its norms say, unless it is there; return it in words."""
    path = run.report_dir / "tails.txt"
    if path.exists():
        return path.read_text()
    records, summary = run.records(), run.summary()
    title = _title(summary)
    measured = samples(records)
    found = {name: examine(values) for name, values in measured.items() if has_tail(values)}
    lines = [_headline(title, records, summary)]
    lines += [_in_words(name, values, found.get(name)) for name, values in measured.items()]
    content = {"title": title, "summary": summary, "found": _plain(found)}
    files = {
        "tails.json": json.dumps(content, indent=2).encode(),
        "tails.csv": _csv(pd.DataFrame(_rows(found))),
    }
    for name, kind in KINDS.items() if found else ():
        drawn = kind(title=title)
        csv = _csv(drawn.table(records))
        pictures = render(drawn, csv, _caption(summary))
        files |= {f"{name}.csv": csv, **{f"{name}.{suffix}": content for suffix, content in pictures.items()}}
    text = "\n".join(lines)
    files["tails.txt"] = text.encode()  # last: it says that all is there
    run.report_dir.mkdir(exist_ok=True)
    for name, content in files.items():
        with write_whole(run.report_dir / name) as file:
            file.write(content)
    return text


def _title(summary: dict[str, Any]) -> str:
    weights = "initial weights"
    if summary["checkpoint"] is not None:
        weights = f"{summary['weights']}, step {summary['checkpoint_step']}"
    what = ", ".join(filter(None, (f"{summary['task']} {summary['preset']}", summary["settings"])))
    return f"{what}: gradients at {weights}"


def _headline(title: str, records: pd.DataFrame, summary: dict[str, Any]) -> str:
    mean, noise = summary["mean_grad_norm"], records["noise_norm"].median()
    return (
        f"{title}; {_measured(summary)}\n"
        f"norm of the mean gradient {mean:.3g}, median norm of the noise {noise:.3g}"
    )


def _measured(summary: dict[str, Any]) -> str:
    lost = f", {summary['not_finite']} of them not finite and left out" if summary["not_finite"] else ""
    size = f" of {summary['batch_size']}" if summary["batch_size"] else ""
    what = f"{summary['parameters']:,} parameters, seed {summary['seed']}"
    return f"n = {summary['steps']:,} mini-batches{size}{lost}, {what}"


def _caption(summary: dict[str, Any]) -> str:
    return f"{_measured(summary)}; frozen weights, training mode; noise = gradient - mean of all gradients"


def _in_words(name: str, values: np.ndarray, tails: Tails | None) -> str:
    if tails is None:
        return f"{name}\n  no tail to look at: all lie between {values.min():.3g} and {values.max():.3g}"
    return f"{name}\n{textwrap.indent(str(tails), '  ')}"


def _rows(found: dict[str, Tails]) -> Iterator[dict[str, Any]]:
    """A row for each estimate of each sample."""
    for name, tails in found.items():
        told = {"sample": name, "n": tails.n, "verdict": tails.verdict}
        for share, alpha in tails.hill.items():
            yield {**told, "estimate": f"Hill alpha, largest {share:.0%}", **alpha._asdict()}
        if tails.block is not None:
            yield {**told, "estimate": "block alpha", **tails.block._asdict()}
        yield {**told, "estimate": "skewness", **tails.skewness._asdict()}
        if tails.lognormal is not None:
            for what in ("log_ratio", "p", "vuong_p"):
                value = getattr(tails.lognormal, what)
                yield {**told, "estimate": f"power law against lognormal, {what}", "value": value}
        yield {**told, "estimate": "whole sample lognormal, p", "value": tails.lognormal_p}


def _csv(table: pd.DataFrame) -> bytes:
    return table.to_csv(index=False, lineterminator="\n").encode()


def _plain(value: Any) -> Any:
    """What JSON can hold: named tuples as objects, numbers that are not finite as null."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
