"""Accuracy, time, size and memory of the variants against each other."""

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from vitnb import variants
from vitnb.analysis import latency
from vitnb.figures.style import MARKERS, palette, panels


def pareto_front(points: pd.DataFrame, cost: str, value: str) -> pd.DataFrame:
    """The rows that no other row beats: none costs no more and is worth more, or costs less and is worth no less."""
    kept = []
    for _, row in points.iterrows():
        beaten = ((points[cost] <= row[cost]) & (points[value] > row[value])) | (
            (points[cost] < row[cost]) & (points[value] >= row[value])
        )
        if not beaten.any():
            kept.append(row)
    return pd.DataFrame(kept, columns=points.columns).sort_values(cost)


def _scatter(
    points: pd.DataFrame, x: str, y: str, labels: tuple[str, str, str], times: bool, ends: tuple = ()
) -> Figure:
    """Variants as points with the interval of their top-1, and the Pareto front of low x and high y. One panel a batch size.

    ``times``: x is a time, and has a logarithmic axis; ``ends``: columns of the interval of x.
    """
    sizes = sorted(points.batch_size.unique())
    figure, axes = panels(len(sizes))
    for axis, size in zip(axes, sizes, strict=True):
        panel = points[points.batch_size == size]
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
        best = pareto_front(panel, x, y)
        axis.plot(best[x], best[y], "--", color="0.5", zorder=0)
        if times:
            axis.set_xscale("log")  # a tenth of the time is as far from the same as ten times of it
            ticks = (1, 2, 5) if panel[x].max() > 5 * panel[x].min() else (1, 1.5, 2, 3, 5, 7)
            axis.xaxis.set_major_locator(LogLocator(subs=ticks))
            axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(x=0.2, y=0.25)
        axis.set(
            xlabel=labels[0], ylabel=labels[1], title=f"{labels[2]}, batch {size}" if len(sizes) > 1 else labels[2]
        )
    shown = points.drop_duplicates("variant")
    points_of = [
        Line2D([], [], color=palette([v])[v], marker=MARKERS[a], linestyle="", markersize=9, label=v)
        for v, a in zip(shown.variant, shown.attention, strict=True)
    ]
    line = Line2D([], [], color="0.5", linestyle="--", label="Pareto front")
    figure.legend(handles=[*points_of, line], loc="outside right center", fontsize=9)
    return figure


def _measured(summary: pd.DataFrame) -> pd.DataFrame:
    return summary[summary.status == "ok"]


def accuracy_latency(summary: pd.DataFrame, ratios: pd.DataFrame | None = None) -> Figure:
    """Top-1 against time with the Pareto front, a panel for each batch size.

    ``ratios``: every variant's time over the baseline's, taken in turns (``compare.against``); without it, the p50 of forwards
    that were timed one variant after another.
    """
    points = _measured(summary)
    if ratios is None:
        return _scatter(points, "latency_p50_ms", "top1", ("latency p50 (ms)", "top-1", "Accuracy and latency"), True)
    points = points.merge(ratios, on=["variant", "batch_size"])
    return _scatter(
        points, "ratio", "top1", ("time over the baseline's", "top-1", "Accuracy and time"), True, ("low", "high")
    )


def _smallest_batch(summary: pd.DataFrame) -> pd.DataFrame:
    points = _measured(summary)
    return points[points.batch_size == points.batch_size.min()]


def accuracy_size(summary: pd.DataFrame) -> Figure:
    """Top-1 against the checkpoint's size, with the Pareto front."""
    return _scatter(
        _smallest_batch(summary), "disk_mb", "top1", ("checkpoint on disk (MB)", "top-1", "Accuracy and size"), False
    )


def size_memory(summary: pd.DataFrame) -> Figure:
    """On disk, resident and peak megabytes side by side for every variant and batch size."""
    parts = {"disk_mb": "on disk", "resident_mb": "resident", "peak_mb": "peak"}
    long = _measured(summary).melt(["variant", "batch_size"], list(parts), "what", "MB").replace({"what": parts})
    sizes = sorted(long.batch_size.unique())
    figure, axes = panels(len(sizes))
    for axis, size in zip(axes, sizes, strict=True):
        sns.barplot(long[long.batch_size == size], y="variant", x="MB", hue="what", palette="crest", ax=axis)
        axis.set(title=f"Size and memory, batch {size}", ylabel="")
        axis.legend(title="")
    return figure


def latency_distribution(records: list[dict]) -> Figure:
    """All samples of every variant as box plots (whiskers at the 5th and 95th percentile), a panel a batch size."""
    long = pd.DataFrame(
        {"variant": record["asked"]["variant"], "batch": timing["batch_size"], "ms": sample}
        for record in records if record["status"] == "ok" for timing in record["timings"] for sample in latency.device_samples(timing)
    )  # fmt: skip
    order = variants.sort_names(long.variant.unique())
    long = long.sort_values("variant", key=lambda names: names.map(order.index), kind="stable")
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
            title=f"Latency of one forward, batch {size}", xlabel="ms (box: quartiles, whiskers: p5 and p95)", ylabel=""
        )
        axis.set_xlim(left=0)
    return figure
