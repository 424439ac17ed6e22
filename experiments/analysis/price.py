"""What clipping costs: the rows of ``clipbench bench`` as a table and as bars."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.runs import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = {
    "model": "parameters of",
    "optimizer": "optimizer",
    "contender": "step",
    "milliseconds": "ms",
    "to_plain": "/ plain fused",
    "to_torch": "/ clip_grad_norm_ + fused",
    "to_floor": "/ (norm alone + plain)",
}


def markdown(rows: list[dict[str, Any]], place: dict[str, Any]) -> str:
    """Render a table, with the line that says where it was measured, and what a method does to cost more."""
    said = ("rounds", "notes")
    where = ", ".join(f"{name} {value}" for name, value in place.items() if name not in said)
    lines = [
        f"Median of {place['rounds']} interleaved rounds, ratios paired by round; {where}.",
        "",
        "| " + " | ".join(COLUMNS.values()) + " |",
        "|---|---|---|" + "---:|" * 4,
    ]
    for row in rows:
        numbers = [f"{row['milliseconds']:.3g}", *(f"{row[key]:.2f}" for key in list(COLUMNS)[4:])]
        lines.append("| " + " | ".join([row["model"], row["optimizer"], row["contender"], *numbers]) + " |")
    notes = place.get("notes", {})
    if notes:
        lines += ["", "More than one read of the gradients:", ""]
        lines += [f"- `{method}`: {note}." for method, note in notes.items()]
    return "\n".join(lines) + "\n"


def price_figure(rows: list[dict[str, Any]], place: dict[str, Any]) -> Figure:
    """Draw a bar for each way to step, one panel for each model and optimizer."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    optimizers = list(dict.fromkeys(row["optimizer"] for row in rows))
    panels = [(model, optimizer) for model in models for optimizer in optimizers]
    bars = len(rows) / len(panels)
    size = (7 * len(optimizers), 0.8 + (1 + 0.2 * bars) * len(models))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(
        f"Time of one optimizer step / the same with torch's clip_grad_norm_ + fused\n"
        f"{place['device']}, {place['threads']} threads, {place['dtype']}, torch {place['torch']}"
    )
    grid = figure.subplots(len(models), len(optimizers), squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=True):
        shown = [row for row in rows if (row["model"], row["optimizer"]) == panel]
        colors = [
            "#0072B2" if "clip" not in row["contender"] or "+" in row["contender"] else "#E69F00"
            for row in shown
        ]
        bars = axes.barh(
            [row["contender"] for row in shown], [row["to_torch"] for row in shown], color=colors
        )
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        axes.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
        axes.invert_yaxis()
        axes.set_title(f"{panel[0]}, {panel[1]}")
        axes.set_xlabel("ratio (1: torch's own clipping)")
        axes.tick_params(axis="y", labelsize=8)
        axes.margins(x=0.12)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure


def write_price(folder: Path, rows: list[dict[str, Any]], place: dict[str, Any]) -> list[Path]:
    """Write table (Markdown), bars (PNG) and numbers (JSON) into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"bench.{suffix}" for suffix in ("md", "json", "png")]
    with write_whole(paths[0]) as file:
        file.write(markdown(rows, place).encode())
    with write_whole(paths[1]) as file:
        file.write((json.dumps({"where": place, "rows": rows}, indent=1) + "\n").encode())
    with write_whole(paths[2]) as file:
        price_figure(rows, place).savefig(file, format="png", dpi=110)
    return paths
