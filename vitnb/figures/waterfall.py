"""Draw the waterfall: a bar for each technique, with its gain and its cost."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from vitnb import variants
from vitnb.analysis.waterfall import TOO_FEW, gain_verdict, waterfall_table

# Colour by verdict on the gain; a first row has no verdict.
COLOURS = {
    "faster": "#0173b2",
    "no difference": "0.6",
    "slower": "#d55e00",
    TOO_FEW: "0.85",
    "": "0.35",
}
ROW_INCHES = 0.29


def waterfall(record: dict) -> Figure:
    """Draw a waterfall record.

    A row of panels for each ladder, a panel for each batch size, a bar for each
    technique. Bars are p50 milliseconds from 0, on a scale of their own in each panel,
    with the gain over the last row that ran. Texts on the right give the cost at any
    batch size: KL, share of images with another first class, resident megabytes.
    """
    table = waterfall_table(record)
    ladders, sizes = list(record["ladders"]), list(record["blocks_ms"])
    rows = [len(record["ladders"][name]) for name in ladders]
    width = 4.6 + 2.7 * len(sizes)
    height = ROW_INCHES * sum(rows) + 0.75 * len(rows) + 0.4
    figure, axes = plt.subplots(
        len(ladders),
        len(sizes),
        figsize=(width, height),
        squeeze=False,
        height_ratios=rows,
        sharey="row",
        layout="constrained",
    )
    for line, ladder in zip(axes, ladders, strict=True):
        for axis, size in zip(line, sizes, strict=True):
            of_size = table.batch_size == int(size)
            panel = table[(table.ladder == ladder) & of_size]
            _draw_bars(axis, panel)
            axis.set_title(_title(panel, ladder, size), fontsize=10, loc="left")
        _write_costs(line[-1], panel)
    figure.supxlabel(
        "p50 of one forward (ms); the number beside a bar is its gain over the last "
        "row that ran",
        fontsize=9,
    )
    patches = [
        Patch(color=colour, label=verdict or "nothing to compare with")
        for verdict, colour in COLOURS.items()
    ]
    figure.legend(
        handles=patches, loc="outside upper center", ncols=len(patches), fontsize=9
    )
    return figure


def _draw_bars(axis: Axes, panel: pd.DataFrame) -> None:
    """Draw one bar for each step, with its time and gain beside it."""
    for y, row in enumerate(panel.itertuples()):
        verdict, failed = gain_verdict(row), pd.isna(row.p50_ms)
        end = 0 if failed else row.p50_ms
        text, style = _bar_text(row, verdict, failed)
        axis.barh(y, end, color=COLOURS[verdict], height=0.72)
        axis.annotate(
            text,
            (end, y),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            **style,
        )
    labels = [_step_label(row) for row in panel.itertuples()]
    axis.set_yticks(range(len(panel)), labels, fontsize=9)
    longest = panel.p50_ms.max() if panel.p50_ms.notna().any() else 1 / 2.2
    axis.set(ylim=(len(panel) - 0.5, -0.5), xlim=(0, 2.2 * longest))
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", alpha=0.4)
    axis.tick_params(axis="x", labelsize=8)


def _bar_text(row, verdict: str, failed: bool) -> tuple[str, dict]:
    """Return the text beside a bar, and its style."""
    if failed:
        return "did not run here", {"color": "0.5", "style": "italic"}
    time = f"{_three_digits(row.p50_ms)} ms"
    if verdict in ("faster", "slower"):
        style = {"color": COLOURS[verdict], "weight": "bold"}
        return f"{time}   {row.gain:.2f}x", style
    return f"{time}   {verdict}" if verdict else time, {"color": "0.25"}


def _step_label(row) -> str:
    """Return the technique, and the engine that ran if it is not the one named."""
    named = variants.parse(row.variant).engine
    if isinstance(row.engine_ran, str) and row.engine_ran != named:
        return f"{row.step} (ran {row.engine_ran})"
    return row.step


def _title(panel: pd.DataFrame, ladder: str, size: str) -> str:
    """Return the ladder, the batch size, and the gain of all techniques together."""
    gains = panel.total_gain[panel.p50_ms.notna()]
    if gains.notna().any():
        return f"{ladder}, batch {size}: {gains.iloc[-1]:.2f}x in all"
    return f"{ladder}, batch {size}"


def _write_costs(axis: Axes, panel: pd.DataFrame) -> None:
    """Write the costs of each step to the right of its bars."""
    # Heading: where it begins, in inches, and the text of a row.
    columns = {
        "KL to fp32": (0.05, lambda row: _format(row.kl, "{:.2g}")),
        "changed": (0.95, lambda row: _format(row.changed, "{:.1%}")),
        "MB": (1.7, _megabytes),
    }
    style = {
        "xycoords": ("axes fraction", "data"),
        "textcoords": "offset points",
        "va": "center",
        "fontsize": 8,
    }
    for heading, (inches, text) in columns.items():
        offset = (72 * inches, 0)
        axis.annotate(
            heading, (1, -0.85), offset, weight="bold", annotation_clip=False, **style
        )
        for y, row in enumerate(panel.itertuples()):
            axis.annotate(text(row), (1, y), offset, color="0.3", **style)


def _megabytes(row) -> str:
    resident = _three_digits(row.resident_mb)
    if row.scratch_mb > 0:
        return f"{resident} + {_three_digits(row.scratch_mb)} scratch"
    return resident


def _format(value: float, template: str) -> str:
    """Return a number as text; nothing for nan."""
    return "" if pd.isna(value) else template.format(value)


def _three_digits(value: float) -> str:
    """Return a number with three digits; nothing for nan."""
    return _format(value, "{:.3g}" if value < 100 else "{:,.0f}")
