"""Figures of the notebooks and of the report: each takes a table or a record and returns a matplotlib Figure."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from PIL import Image

from vitnb import summary as summaries
from vitnb import variants

PALETTE = dict(zip(variants.REGISTRY, sns.color_palette("colorblind", len(variants.REGISTRY)), strict=True))
MARKERS = {"sdpa": "o", "fa2": "^", "math": "s"}
sns.set_theme(
    style="whitegrid", context="notebook", rc={"figure.dpi": 90, "savefig.bbox": "tight", "axes.titleweight": "bold"}
)


def _scatter(points: pd.DataFrame, x: str, y: str, labels: tuple[str, str, str], front: bool) -> Figure:
    """Variants as named points; with the Pareto front, if asked, of low x and high y. One panel a batch size."""
    sizes = sorted(points.batch_size.unique())
    figure, axes = plt.subplots(1, len(sizes), figsize=(5.6 * len(sizes), 4), squeeze=False, layout="constrained")
    for axis, size in zip(axes[0], sizes, strict=True):
        panel = points[points.batch_size == size]
        sns.scatterplot(
            panel,
            x=x,
            y=y,
            hue="variant",
            style="attention",
            markers=MARKERS,
            palette=PALETTE,
            s=130,
            ax=axis,
            legend=False,
        )
        for rank, (_, row) in enumerate(panel.sort_values([x, "variant"]).iterrows()):
            above = rank % 2 == 0  # neighbours lie close: name them above and below in turn
            axis.annotate(
                row.variant,
                (row[x], row[y]),
                xytext=(0, 9 if above else -17),
                ha="center",
                textcoords="offset points",
                fontsize=8,
            )
        if front:
            best = summaries.pareto(panel, x, y)
            axis.plot(best[x], best[y], "--", color="0.5", zorder=0, label="Pareto front")
            axis.legend(loc="best", fontsize=8)
        axis.margins(x=0.2, y=0.25)
        axis.set(
            xlabel=labels[0], ylabel=labels[1], title=f"{labels[2]}, batch {size}" if len(sizes) > 1 else labels[2]
        )
    return figure


def _measured(summary: pd.DataFrame) -> pd.DataFrame:
    return summary[summary.status == "ok"]


def accuracy_latency(summary: pd.DataFrame) -> Figure:
    """Top-1 against p50 latency with the Pareto front, a panel for each batch size."""
    return _scatter(
        _measured(summary), "latency_p50_ms", "top1", ("latency p50 (ms)", "top-1", "Accuracy and latency"), True
    )


def _smallest_batch(summary: pd.DataFrame) -> pd.DataFrame:
    points = _measured(summary)
    return points[points.batch_size == points.batch_size.min()]


def accuracy_size(summary: pd.DataFrame) -> Figure:
    """Top-1 against the checkpoint's size, with the Pareto front."""
    return _scatter(
        _smallest_batch(summary), "disk_mb", "top1", ("checkpoint on disk (MB)", "top-1", "Accuracy and size"), True
    )


def size_memory(summary: pd.DataFrame) -> Figure:
    """On disk, resident and peak megabytes side by side for every variant and batch size."""
    parts = {"disk_mb": "on disk", "resident_mb": "resident", "peak_mb": "peak"}
    long = _measured(summary).melt(["variant", "batch_size"], list(parts), "what", "MB").replace({"what": parts})
    sizes = sorted(long.batch_size.unique())
    figure, axes = plt.subplots(1, len(sizes), figsize=(5.6 * len(sizes), 4), squeeze=False, layout="constrained")
    for axis, size in zip(axes[0], sizes, strict=True):
        sns.barplot(long[long.batch_size == size], y="variant", x="MB", hue="what", palette="crest", ax=axis)
        axis.set(title=f"Size and memory, batch {size}", ylabel="")
        axis.legend(title="")
    return figure


def latency_distribution(records: list[dict]) -> Figure:
    """All samples of every variant as box plots (whiskers at the 5th and 95th percentile), a panel a batch size."""
    long = pd.DataFrame(
        {"variant": record["asked"]["variant"], "batch": timing["batch_size"], "ms": sample}
        for record in records if record["status"] == "ok" for timing in record["timings"] for sample in timing["samples_ms"]
    )  # fmt: skip
    long = long.assign(order=long.variant.map(list(variants.REGISTRY).index)).sort_values("order")
    sizes = sorted(long.batch.unique())
    figure, axes = plt.subplots(1, len(sizes), figsize=(5.6 * len(sizes), 4), squeeze=False, layout="constrained")
    for axis, size in zip(axes[0], sizes, strict=True):
        sns.boxplot(
            long[long.batch == size],
            y="variant",
            x="ms",
            hue="variant",
            palette=PALETTE,
            whis=(5, 95),
            showfliers=False,
            ax=axis,
        )
        axis.set(
            title=f"Latency of one forward, batch {size}", xlabel="ms (box: quartiles, whiskers: p5 and p95)", ylabel=""
        )
        axis.set_xlim(left=0)
    return figure


def operators(record: dict, count: int = 10) -> Figure:
    """The operators or kernels that take most of one forward, for the first batch size of an evaluate record."""
    trace = record["traces"][0]
    longest = pd.Series(trace["operators_ms"]).head(count)
    longest.index = longest.index.str.replace("aten::", "").str.slice(0, 40)
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    sns.barplot(x=longest.values, y=longest.index, color=PALETTE[record["asked"]["variant"]], ax=axis)
    axis.set(
        title=f"Where a forward goes: {record['asked']['variant']}, batch {trace['batch_size']}",
        xlabel="own time (ms)",
        ylabel="",
    )
    return figure


def learning_curve(history: list[dict]) -> Figure:
    """Training loss and validation top-1 by epoch."""
    curve = pd.DataFrame(history)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, y, label in zip(axes, ("loss", "valid_top1"), ("training loss", "validation top-1"), strict=True):
        sns.lineplot(curve, x="epoch", y=y, marker="o", ax=axis)
        axis.set(ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


def confusion(counts: np.ndarray) -> Figure:
    """A confusion matrix as a heat map, each row normalized."""
    figure, axis = plt.subplots(figsize=(6, 5), layout="constrained")
    share = counts / counts.sum(axis=1, keepdims=True).clip(1)
    bar = {"label": "share of the true class"}
    sns.heatmap(
        share, cmap="mako_r", vmin=0, vmax=1, square=True, ax=axis, cbar_kws=bar, xticklabels=False, yticklabels=False
    )
    axis.set(xlabel="predicted class", ylabel="true class", title="Confusion matrix")
    return figure


def ablation_layers(rows: list[dict]) -> Figure:
    """KL to full precision and top-1 when one layer is kept in 16 bits, a column a bit width; dashed: none kept."""
    table = pd.DataFrame(rows)
    widths = sorted(table[table.bits < 32].bits.unique())
    figure, axes = plt.subplots(
        2, len(widths), figsize=(5.6 * len(widths), 5.4), squeeze=False, sharex=True, layout="constrained"
    )
    for column, bits in zip(axes.T, widths, strict=True):
        group = table[table.bits == bits].set_index("kept")
        single = group[group.index.str.startswith("layer ")]
        layer = single.index.str.removeprefix("layer ").astype(int)
        for axis, y, label in zip(
            column, ("kl", "top1"), ("KL to full precision (nats)", "validation top-1"), strict=True
        ):
            sns.scatterplot(x=layer, y=single[y], s=70, color="#0173b2", ax=axis)
            axis.axhline(group.loc["none", y], ls="--", color="0.4", label="none kept")
            axis.axhline(group.loc["all", y], ls=":", color="0.4", label="all kept (16 bits)")
            axis.set(ylabel=label, xlabel="layer kept in 16 bits")
        column[0].set_title(f"{bits}-bit")
        column[0].legend(fontsize=8)
    return figure


def ablation_ends(rows: list[dict]) -> Figure:
    """KL with no layer kept, with the first and the last kept, and with all kept."""
    table = pd.DataFrame(rows)
    chosen = table[table.kept.isin(["none", "first and last", "all"])].assign(
        width=lambda t: t.bits.astype(str) + "-bit"
    )
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    sns.barplot(chosen, x="kl", y="kept", hue="width", palette="crest", ax=axis)
    axis.set(
        xlabel="KL to full precision (nats)", ylabel="kept in 16 bits", title="Do the first and the last layer matter?"
    )
    axis.legend(title="")
    return figure


def gallery(images: list[Image.Image], titles: list[str], right: list[bool] | None = None, columns: int = 6) -> Figure:
    """A grid of pictures with titles; a wrong prediction's title is red."""
    lines = max(1, -(-len(images) // columns))
    figure, axes = plt.subplots(
        lines, columns, figsize=(2.1 * columns, 2.4 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for i, (axis, image, title) in enumerate(zip(axes.flat, images, titles, strict=False)):
        axis.imshow(image)
        axis.set_title(title, fontsize=8, color="#b03030" if right and not right[i] else "0.2", fontweight="normal")
    return figure
