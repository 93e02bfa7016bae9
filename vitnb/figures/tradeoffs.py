"""Draw accuracy, time, size and memory of the variants against each other."""

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from vitnb import variants
from vitnb.analysis import comparison, latency
from vitnb.figures.style import MARKERS, palette, panels


def accuracy_latency(
    summary: pd.DataFrame, ratios: pd.DataFrame | None = None
) -> Figure:
    """Draw top-1 against time with the Pareto front, a panel for each batch size.

    Args:
        summary: see ``analysis.summary``.
        ratios: times over the baseline's (``comparison.ratios_to_baseline``); None: the
            p50 of forwards that were timed one variant after another.
    """
    points = _measured(summary)
    if ratios is None:
        labels = ("latency p50 (ms)", "top-1", "Accuracy and latency")
        return _scatter(points, "latency_p50_ms", "top1", labels, is_time=True)
    points = points.merge(ratios, on=["variant", "batch_size"])
    labels = ("time over the baseline's", "top-1", "Accuracy and time")
    return _scatter(points, "ratio", "top1", labels, is_time=True, ends=("low", "high"))


def accuracy_size(summary: pd.DataFrame) -> Figure:
    """Draw top-1 against the checkpoint's size, with the Pareto front."""
    points = _measured(summary)
    smallest_batch = points[points.batch_size == points.batch_size.min()]
    labels = ("checkpoint on disk (MB)", "top-1", "Accuracy and size")
    return _scatter(smallest_batch, "disk_mb", "top1", labels, is_time=False)


def _measured(summary: pd.DataFrame) -> pd.DataFrame:
    return summary[summary.status == "ok"]


def _scatter(
    points: pd.DataFrame,
    x: str,
    y: str,
    labels: tuple[str, str, str],
    is_time: bool,
    ends: tuple = (),
) -> Figure:
    """Draw variants as points, with the Pareto front of low x and high y.

    A panel for each batch size; each point has the interval of its top-1.

    Args:
        labels: of x, of y, and the title.
        is_time: x is a time, on a logarithmic axis.
        ends: columns of the interval of x.
    """
    sizes = sorted(points.batch_size.unique())
    figure, axes = panels(len(sizes))
    for axis, size in zip(axes, sizes, strict=True):
        panel = points[points.batch_size == size]
        _draw_points(axis, panel, x, y, ends)
        best = comparison.pareto_front(panel, x, y)
        axis.plot(best[x], best[y], "--", color="0.5", zorder=0)
        if is_time:
            _set_logarithmic(axis, panel[x])
        axis.margins(x=0.2, y=0.25)
        title = f"{labels[2]}, batch {size}" if len(sizes) > 1 else labels[2]
        axis.set(xlabel=labels[0], ylabel=labels[1], title=title)
    _add_legend(figure, points)
    return figure


def _draw_points(axis: Axes, panel: pd.DataFrame, x: str, y: str, ends: tuple) -> None:
    spread = {"yerr": (panel[y] - panel.top1_low, panel.top1_high - panel[y])}
    if ends:
        spread["xerr"] = (panel[x] - panel[ends[0]], panel[ends[1]] - panel[x])
    axis.errorbar(panel[x], panel[y], **spread, fmt="none", ecolor="0.75", zorder=1)
    sns.scatterplot(
        panel,
        x=x,
        y=y,
        hue="variant",
        style="attention",
        markers=MARKERS,
        palette=palette(panel.variant),
        s=130,
        ax=axis,
        legend=False,
    )


def _set_logarithmic(axis: Axes, times: pd.Series) -> None:
    # On this axis, a tenth of the time is as far away as ten times as much.
    axis.set_xscale("log")
    wide = times.max() > 5 * times.min()
    ticks = (1, 2, 5) if wide else (1, 1.5, 2, 3, 5, 7)
    axis.xaxis.set_major_locator(LogLocator(subs=ticks))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _add_legend(figure: Figure, points: pd.DataFrame) -> None:
    first = points.drop_duplicates("variant")
    colours = palette(first.variant)
    handles = [
        Line2D(
            [],
            [],
            color=colours[name],
            marker=MARKERS[attention],
            linestyle="",
            markersize=9,
            label=name,
        )
        for name, attention in zip(first.variant, first.attention, strict=True)
    ]
    front = Line2D([], [], color="0.5", linestyle="--", label="Pareto front")
    figure.legend(handles=[*handles, front], loc="outside right center", fontsize=9)


def size_memory(summary: pd.DataFrame) -> Figure:
    """Draw megabytes on disk, resident and at the peak, by variant and batch size."""
    parts = {"disk_mb": "on disk", "resident_mb": "resident", "peak_mb": "peak"}
    long = _measured(summary).melt(["variant", "batch_size"], list(parts), "what", "MB")
    long = long.replace({"what": parts})
    sizes = sorted(long.batch_size.unique())
    figure, axes = panels(len(sizes))
    for axis, size in zip(axes, sizes, strict=True):
        panel = long[long.batch_size == size]
        sns.barplot(panel, y="variant", x="MB", hue="what", palette="crest", ax=axis)
        axis.set(title=f"Size and memory, batch {size}", ylabel="")
        axis.legend(title="")
    return figure


def latency_distribution(records: list[dict]) -> Figure:
    """Draw all samples of every variant as box plots, a panel for each batch size.

    Whiskers stand at the 5th and 95th percentile.

    Args:
        records: evaluate records.
    """
    long = pd.DataFrame(
        {
            "variant": record["asked"]["variant"],
            "batch": timing["batch_size"],
            "ms": sample,
        }
        for record in records
        if record["status"] == "ok"
        for timing in record["timings"]
        for sample in latency.device_samples(timing)
    )
    order = variants.sort_names(long.variant.unique())
    long = long.sort_values(
        "variant", key=lambda names: names.map(order.index), kind="stable"
    )
    sizes = sorted(long.batch.unique())
    figure, axes = panels(len(sizes))
    for axis, size in zip(axes, sizes, strict=True):
        sns.boxplot(
            long[long.batch == size],
            y="variant",
            x="ms",
            hue="variant",
            palette=palette(order),
            whis=(5, 95),
            showfliers=False,
            ax=axis,
        )
        axis.set(
            title=f"Latency of one forward, batch {size}",
            xlabel="ms (box: quartiles, whiskers: p5 and p95)",
            ylabel="",
        )
        axis.set_xlim(left=0)
    return figure
