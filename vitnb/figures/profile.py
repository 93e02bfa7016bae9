"""Draw one profiled forward by operator, kernel class and part of the model."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from vitnb import variants
from vitnb.analysis import performance
from vitnb.analysis.kernel_classes import CLASSES
from vitnb.figures.style import palette

_DEEP = sns.color_palette("deep", len(CLASSES) - 1)
CLASS_COLOURS = dict(zip(CLASSES, [*_DEEP, "0.7"], strict=True))


def _draw_stacked(axis: Axes, shares: pd.DataFrame) -> None:
    """Draw a horizontal bar for each row, stacked by class."""
    shares = shares.loc[:, (shares > 0).any()]
    shares.iloc[::-1].plot.barh(
        stacked=True, color=CLASS_COLOURS, ax=axis, width=0.7, legend=False
    )
    axis.grid(axis="y", visible=False)


def operators(record: dict, count: int = 10) -> Figure:
    """Draw the operators or kernels that take most of one forward.

    Args:
        record: an evaluate record; its first batch size is drawn.
    """
    trace, variant = record["traces"][0], record["asked"]["variant"]
    longest = pd.Series(trace["operators_ms"]).head(count)
    longest.index = longest.index.str.replace("aten::", "").str.slice(0, 40)
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    colour = palette([variant])[variant]
    sns.barplot(x=longest.values, y=longest.index, color=colour, ax=axis)
    axis.set(
        title=f"Where a forward goes: {variant}, batch {trace['batch_size']}",
        xlabel="own time (ms)",
        ylabel="",
    )
    return figure


def parts_and_classes(trace: dict) -> Figure:
    """Draw one forward by part of the model, stacked by class of kernel."""
    shares = pd.DataFrame(trace["parts_ms"]).T
    figure, axis = plt.subplots(figsize=(7.5, 3), layout="constrained")
    _draw_stacked(axis, shares)
    axis.set(
        title=f"Parts of the model, batch {trace['batch_size']}",
        xlabel="ms of kernels or operators",
    )
    axis.legend(bbox_to_anchor=(1.01, 1), fontsize=8)
    return figure


def kernel_classes(records: list[dict]) -> Figure:
    """Draw the classes of kernels of every variant, in ms and as shares.

    A row of panels for each batch size: stacked bars, and a heat map of shares.

    Args:
        records: evaluate records.
    """
    table = _time_by_class(records)
    sizes = sorted(table.batch.unique())
    figure, axes = plt.subplots(
        len(sizes),
        2,
        figsize=(13.2, 3.3 * len(sizes)),
        squeeze=False,
        layout="constrained",
    )
    for (bars, heat), size in zip(axes, sizes, strict=True):
        times = table[table.batch == size].set_index("variant")[list(CLASSES)]
        _draw_stacked(bars, times)
        bars.set(
            title=f"Classes of kernels, batch {size}",
            xlabel="ms in one profiled forward",
            ylabel="",
        )
        _draw_shares(heat, times, label_classes=bool(size == sizes[-1]))
    names = [Patch(color=CLASS_COLOURS[name], label=name) for name in CLASSES]
    figure.legend(
        handles=names, loc="outside lower center", ncols=len(names), fontsize=9
    )
    return figure


def _time_by_class(records: list[dict]) -> pd.DataFrame:
    """Return ms by class, a row for each variant and batch size, in order."""
    rows = []
    for record in records:
        if record["status"] == "ok":
            for trace in record["traces"]:
                row = {
                    "variant": record["asked"]["variant"],
                    "batch": trace["batch_size"],
                }
                rows.append(row | performance.time_by_class(trace))
    table = pd.DataFrame(rows).drop_duplicates(["variant", "batch"], keep="last")
    order = variants.sort_names(table.variant.unique())
    return table.sort_values("variant", key=lambda names: names.map(order.index))


def _draw_shares(axis: Axes, times: pd.DataFrame, label_classes: bool) -> None:
    """Draw each variant's classes as shares of its time, in percent."""
    sns.heatmap(
        100 * times.div(times.sum(axis=1), axis=0),
        annot=True,
        fmt=".0f",
        cmap="mako_r",
        vmin=0,
        vmax=100,
        cbar=False,
        ax=axis,
        xticklabels=label_classes,
    )
    axis.set(title="the same, % of each variant's time", ylabel="", yticklabels=[])
