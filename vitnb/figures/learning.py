"""Training, layer sensitivity, and pictures with their names."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from PIL import Image


def _curves(history: list[dict], x: str, top1: str, label: str, size: tuple[float, float]) -> Figure:
    """Training loss, and beside it a top-1, as they went."""
    curve = pd.DataFrame(history)
    figure, axes = plt.subplots(1, 2, figsize=size, layout="constrained")
    for axis, y, name in zip(axes, ("loss", top1), ("training loss", label), strict=True):
        sns.lineplot(curve, x=x, y=y, marker="o", ax=axis)
        axis.set(ylabel=name)
    return figure


def learning_curve(history: list[dict]) -> Figure:
    """Training loss and validation top-1 by epoch."""
    figure = _curves(history, "epoch", "valid_top1", "validation top-1", (9, 3.2))
    for axis in figure.axes:
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


def pretraining_curve(history: list[dict]) -> Figure:
    """Training loss and top-1 on fresh drawings of a base by step."""
    return _curves(history, "step", "held_out_top1", "held-out top-1", (7, 2.6))


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
        single = group[group.index.str.fullmatch(r"layer \d+")]
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
