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
        labels = axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        for label in labels:  # readable where the line at 1 runs behind it
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.4})
        axes.axvline(1.0, color="black", linewidth=0.8, linestyle="--", zorder=0)
        axes.invert_yaxis()
        axes.set_title(f"{panel[0]}, {panel[1]}")
        axes.set_xlabel("ratio (1: torch's own clipping)")
        axes.tick_params(axis="y", labelsize=8)
        axes.margins(x=0.12, y=0.01)
    return figure


def write_price(folder: Path, rows: list[dict[str, Any]], place: dict[str, Any]) -> list[Path]:
    """Write table (Markdown and CSV), bars (PNG and PDF) and where it was measured (JSON) into ``folder``."""
    import pandas as pd

    from experiments.analysis import style
    from experiments.analysis.marks import styled

    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "md": markdown(rows, place),
        "csv": pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"),
        "json": json.dumps({"where": place, "rows": rows}, indent=1) + "\n",
    }
    for suffix, content in contents.items():
        with write_whole(folder / f"bench.{suffix}") as file:
            file.write(content.encode())
    pictures = [folder / f"bench.{suffix}" for suffix in ("png", "pdf")]
    with styled():
        figure = price_figure(rows, place)
        for path in pictures:
            style.save(figure, path)
    return [*(folder / f"bench.{suffix}" for suffix in contents), *pictures]
