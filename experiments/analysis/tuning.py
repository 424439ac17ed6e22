"""What tuning bought: the best of the settings tried of each clipping, and what fewer tries would give."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.analysis import stats
from experiments.analysis.entries import Entry, floor
from experiments.analysis.tables import Row, Show, Table

BEST_OF = (1, 3, 10)
LR = "optimizer.lr"
FEWEST_WITH_EDGES = 3
"""Of two values the better is always on an edge."""


def tuning_table(entries: Sequence[Entry], *, by_mean: bool = False) -> Table | None:
    """One row for each task, optimizer and clipping with more than one setting; None if there is none.

    Args:
        entries: of all settings.
        by_mean: whether the mean over the seeds counts, as where the best was chosen by it, not the median.
    """
    groups = defaultdict(list)
    for entry in entries:
        groups[entry.task, entry.names["optimizer"], entry.names["clipping"]].append(entry)
    rows = [_row(group, by_mean=by_mean) for group in groups.values() if len(group) > 1]
    if not rows:
        return None
    columns: dict[str, str | Show] = {
        **{name: name for name in ("task", "optimizer", "clipping", "tried", "best settings", "best")},
        **{f"best of {k}": f"best of {k}" for k in BEST_OF},
        "lr sensitivity": "lr sensitivity",
        "usable lr decades": "usable lr decades",
        "best on the edge of": "best on the edge of",
    }
    notes = (
        f"of each setting the {'mean' if by_mean else 'median'} over seeds; the best is chosen on these same "
        "seeds, and flatters itself",
        "best of k: expected best of k of these settings drawn at random; one that diverged counts as a "
        "model that learned nothing",
        "lr sensitivity: mean shortfall from the best over the learning rates; usable: within 5% of the best",
        "edge: the best value is the smallest or largest tried, and a better one may lie beyond",
    )
    return Table("tuning", "Settings tried", rows, columns, notes)


def _row(group: list[Entry], *, by_mean: bool) -> Row:
    """Of entries that differ in their settings only."""
    sign = 1 if group[0].higher_is_better else -1
    nothing = nothing_learned(group)
    values = [entry.mean if by_mean else entry.median for entry in group]
    scores = stats.to_scores(values, group[0].higher_is_better)
    learned = np.maximum(scores, nothing)
    best = group[int(np.argmax(scores))]
    row = {
        **{"task": best.task, "optimizer": best.names["optimizer"], "clipping": best.names["clipping"]},
        **{"metric": best.metric, "tried": len(group)},
        **{"best settings": " ".join(best.details.values()), "best": values[int(np.argmax(scores))]},
        **{f"best of {k}": sign * stats.expected_best_of(learned, k) for k in BEST_OF},
        **dict.fromkeys(("lr sensitivity", "usable lr decades", "best on the edge of")),
    }
    settings = {path: _best_by_value(group, scores, path) for path in best.details}
    numeric = {
        path: by_value
        for path, by_value in settings.items()
        if all(isinstance(v, int | float) for v in by_value)
    }
    edges = [
        path.rpartition(".")[2]
        for path, by_value in numeric.items()
        if len(by_value) >= FEWEST_WITH_EDGES and stats.on_edge(list(by_value), list(by_value.values()))
    ]
    if edges:
        row["best on the edge of"] = ", ".join(edges)
    if rates := numeric.get(LR):
        row["lr sensitivity"] = stats.sensitivity(list(rates.values()), nothing)
        row["usable lr decades"] = stats.usable_decades(list(rates), list(rates.values()), True)
    return row


def nothing_learned(group: Sequence[Entry]) -> float:
    """Score of a model that learned nothing; -inf if that is not known."""
    at_floor = floor(group)
    return -math.inf if math.isnan(at_floor) else at_floor if group[0].higher_is_better else -at_floor


def _best_by_value(group: Sequence[Entry], scores: np.ndarray, path: str) -> dict[Any, float]:
    """Value of a setting -> best score with it, whatever the other settings are."""
    found: dict[Any, float] = {}
    for entry, score in zip(group, scores, strict=True):
        value = entry.settings.get(path)
        value = str(value) if isinstance(value, list) else value
        found[value] = max(found.get(value, -math.inf), float(score))
    return found
