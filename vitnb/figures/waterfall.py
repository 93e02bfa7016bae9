"""The waterfall: one technique a row."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from vitnb import variants
from vitnb.analysis.waterfall import gain_verdict, waterfall_table

# By what a row's gain is judged to be; nothing: there is no row to compare with.
COLOURS = {"faster": "#0173b2", "no difference": "0.6", "slower": "#d55e00", "": "0.35"}


ROW = 0.29  # inches


def three(value: float) -> str:
    """A number with three digits; nothing for nan."""
    return "" if value != value else f"{value:.3g}" if value < 100 else f"{value:,.0f}"


# What stands beside the bars: heading -> where it begins, in inches, and the text of a row.
ASIDE = {
    "KL to fp32": (0.05, lambda row: "" if row.kl != row.kl else f"{row.kl:.2g}"),
    "changed": (0.95, lambda row: "" if row.changed != row.changed else f"{row.changed:.1%}"),
    "MB": (1.7, lambda row: three(row.resident_mb) + (f" + {three(row.scratch_mb)} scratch" if row.scratch_mb > 0 else "")),
}  # fmt: skip


def _label(row) -> str:
    """The technique, and the engine that ran where it is not the one that was asked for."""
    ran, asked = row.engine_ran, variants.parse(row.variant).engine
    return row.step + (f" (ran {ran})" if isinstance(ran, str) and ran != asked else "")


def _bars(axis: Axes, panel: pd.DataFrame) -> None:
    """One bar a step, p50 in milliseconds from 0, its gain beside it; a step without a time says so."""
    for y, row in enumerate(panel.itertuples()):
        word, failed = gain_verdict(row), row.p50_ms != row.p50_ms
        end, text, style = row.p50_ms, f"{three(row.p50_ms)} ms", {"color": "0.25"}
        if failed:
            end, text, style = 0, "did not run here", {"color": "0.5", "style": "italic"}
        elif word in ("faster", "slower"):
            text, style = f"{text}   {row.gain:.2f}x", {"color": COLOURS[word], "weight": "bold"}
        elif word:
            text = f"{text}   {word}"
        axis.barh(y, end, color=COLOURS[word], height=0.72)
        axis.annotate(text, (end, y), (4, 0), textcoords="offset points", va="center", fontsize=8.5, **style)
    axis.set_yticks(range(len(panel)), [_label(row) for row in panel.itertuples()], fontsize=9)
    axis.set(ylim=(len(panel) - 0.5, -0.5), xlim=(0, 2.2 * panel.p50_ms.max() if panel.p50_ms.notna().any() else 1))
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", alpha=0.4)
    axis.tick_params(axis="x", labelsize=8)


def _costs(axis: Axes, panel: pd.DataFrame) -> None:
    """What each row costs, as text to the right of its bars: it does not depend on the batch size."""
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center", "fontsize": 8}
    for heading, (x, text) in ASIDE.items():
        axis.annotate(heading, (1, -0.85), (72 * x, 0), weight="bold", annotation_clip=False, **place)
        for y, row in enumerate(panel.itertuples()):
            axis.annotate(text(row), (1, y), (72 * x, 0), color="0.3", **place)


def _title(panel: pd.DataFrame, ladder: str, size: str) -> str:
    """The ladder, the batch size, and what all techniques gain together."""
    whole = panel.total_gain[panel.p50_ms.notna()]
    return f"{ladder}, batch {size}" + (f": {whole.iloc[-1]:.2f}x in all" if whole.notna().any() else "")


def waterfall(record: dict) -> Figure:
    """A waterfall record: a row of panels for each ladder, a panel for each batch size, a bar for each technique.

    Bars are p50 milliseconds from 0, on a scale of their own in each panel, with the gain over the last row that ran. Beside
    them what a row costs at any batch size: KL, share of images with another first class, resident megabytes.
    """
    table = waterfall_table(record)
    ladders, sizes = list(record["ladders"]), list(record["blocks_ms"])
    rows = [len(record["ladders"][name]) for name in ladders]
    figure, axes = plt.subplots(
        len(ladders), len(sizes), figsize=(4.6 + 2.7 * len(sizes), ROW * sum(rows) + 0.75 * len(rows) + 0.4), squeeze=False,
        height_ratios=rows, sharey="row", layout="constrained",
    )  # fmt: skip
    for line, ladder in zip(axes, ladders, strict=True):
        for axis, size in zip(line, sizes, strict=True):
            panel = table[(table.ladder == ladder) & (table.batch_size == int(size))]
            _bars(axis, panel)
            axis.set_title(_title(panel, ladder, size), fontsize=10, loc="left")
        _costs(line[-1], panel)
    figure.supxlabel(
        "p50 of one forward (ms); the number beside a bar is its gain over the last row that ran", fontsize=9
    )
    patches = [Patch(color=colour, label=name or "nothing to compare with") for name, colour in COLOURS.items()]
    figure.legend(handles=patches, loc="outside upper center", ncols=4, fontsize=9)
    return figure
