"""Training, layer sensitivity, and pictures with their names."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure


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
