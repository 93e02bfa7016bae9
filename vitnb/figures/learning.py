"""Draw learning curves and confusion matrices."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure


def _loss_and_top1(
    history: list[dict], x: str, top1: str, label: str, size: tuple[float, float]
) -> Figure:
    """Draw training loss, and a top-1 beside it."""
    curve = pd.DataFrame(history)
    figure, axes = plt.subplots(1, 2, figsize=size, layout="constrained")
    for axis, y, name in zip(
        axes, ("loss", top1), ("training loss", label), strict=True
    ):
        sns.lineplot(curve, x=x, y=y, marker="o", ax=axis)
        axis.set(ylabel=name)
    return figure


def learning_curve(history: list[dict]) -> Figure:
    """Draw training loss and validation top-1 by epoch."""
    figure = _loss_and_top1(
        history, "epoch", "valid_top1", "validation top-1", (9, 3.2)
    )
    for axis in figure.axes:
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


def pretraining_curve(history: list[dict]) -> Figure:
    """Draw a base's training loss, and its top-1 on fresh drawings, by step."""
    return _loss_and_top1(history, "step", "held_out_top1", "held-out top-1", (7, 2.6))


def confusion(counts: np.ndarray) -> Figure:
    """Draw a confusion matrix as a heat map, each row normalized."""
    figure, axis = plt.subplots(figsize=(6, 5), layout="constrained")
    share = counts / counts.sum(axis=1, keepdims=True).clip(1)
    sns.heatmap(
        share,
        cmap="mako_r",
        vmin=0,
        vmax=1,
        square=True,
        ax=axis,
        cbar_kws={"label": "share of the true class"},
        xticklabels=False,
        yticklabels=False,
    )
    axis.set(xlabel="predicted class", ylabel="true class", title="Confusion matrix")
    return figure
