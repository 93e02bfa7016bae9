"""What a forward consists of: operators, classes of kernels, parts of the model."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from vitnb import variants
from vitnb.analysis import kernel_classes, performance
from vitnb.figures.style import palette

CLASS_COLOURS = dict(zip(kernel_classes.CLASSES, [*sns.color_palette("deep", len(kernel_classes.CLASSES) - 1), "0.7"], strict=True))


def _stacked(axis, shares: pd.DataFrame) -> None:
    """Horizontal bars, a row each, stacked by class."""
    shares = shares.loc[:, (shares > 0).any()]
    shares.iloc[::-1].plot.barh(stacked=True, color=CLASS_COLOURS, ax=axis, width=0.7, legend=False)
    axis.grid(axis="y", visible=False)


def operators(record: dict, count: int = 10) -> Figure:
    """The operators or kernels that take most of one forward, for the first batch size of an evaluate record."""
    trace = record["traces"][0]
    longest = pd.Series(trace["operators_ms"]).head(count)
    longest.index = longest.index.str.replace("aten::", "").str.slice(0, 40)
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    sns.barplot(x=longest.values, y=longest.index, color=palette([record["asked"]["variant"]])[record["asked"]["variant"]], ax=axis)
    axis.set(
        title=f"Where a forward goes: {record['asked']['variant']}, batch {trace['batch_size']}",
        xlabel="own time (ms)",
        ylabel="",
    )
    return figure


def parts_and_classes(trace: dict) -> Figure:
    """One forward by part of the model, stacked by class of kernel."""
    shares = pd.DataFrame(trace["parts_ms"]).T
    figure, axis = plt.subplots(figsize=(7.5, 3), layout="constrained")
    _stacked(axis, shares)
    axis.set(title=f"Parts of the model, batch {trace['batch_size']}", xlabel="ms of kernels or operators")
    axis.legend(bbox_to_anchor=(1.01, 1), fontsize=8)
    return figure


def kernel_classes(records: list[dict]) -> Figure:
    """Stacked bars of kernel classes by variant, and beside each the same as a heat map of shares. One row a batch size."""
    rows = [
        {"variant": record["asked"]["variant"], "batch": trace["batch_size"]} | performance.time_by_class(trace)
        for record in records if record["status"] == "ok" for trace in record["traces"]
    ]  # fmt: skip
    table = pd.DataFrame(rows).drop_duplicates(["variant", "batch"], keep="last")
    order = variants.sort_names(table.variant.unique())
    table = table.sort_values("variant", key=lambda names: names.map(order.index))
    sizes = sorted(table.batch.unique())
    figure, axes = plt.subplots(len(sizes), 2, figsize=(13.2, 3.3 * len(sizes)), squeeze=False, layout="constrained")
    for (bars, heat), size in zip(axes, sizes, strict=True):
        shown = table[table.batch == size].set_index("variant")[list(kernel_classes.CLASSES)]
        _stacked(bars, shown)
        bars.set(title=f"Classes of kernels, batch {size}", xlabel="ms in one profiled forward", ylabel="")
        shares = 100 * shown.div(shown.sum(axis=1), axis=0)
        sns.heatmap(
            shares,
            annot=True,
            fmt=".0f",
            cmap="mako_r",
            vmin=0,
            vmax=100,
            cbar=False,
            ax=heat,
            xticklabels=bool(size == sizes[-1]),
        )
        heat.set(title="the same, % of each variant's time", ylabel="", yticklabels=[])
    names = [Patch(color=CLASS_COLOURS[name], label=name) for name in kernel_classes.CLASSES]
    figure.legend(handles=names, loc="outside lower center", ncols=len(names), fontsize=9)
    return figure
