"""Figures of the anatomy lesson: each takes cases and returns a matplotlib Figure.

Red is wrong, blue is right.
"""

import math

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitnb.anatomy.case import Case, format_number

WRONG, RIGHT = "#b03030", "#0173b2"


def beside(cases: list[Case], columns: int = 3) -> Figure:
    """Draw a panel for each case: the wrong number beside the right one."""
    columns = min(columns, len(cases))
    rows = math.ceil(len(cases) / columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(3.7 * columns, 2.9 * rows),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(cases) :]:
        axis.axis("off")
    for axis, case in zip(axes.flat, cases, strict=False):
        bars = axis.bar(
            ["wrong", "right"],
            [case.wrong, case.right],
            color=[WRONG, RIGHT],
            width=0.6,
        )
        labels = [format_number(case.wrong), format_number(case.right)]
        axis.bar_label(bars, labels, padding=2, fontsize=11)
        axis.margins(y=0.2)
        axis.grid(axis="x", visible=False)
        axis.set_title(f"{case.number}  {case.title}", fontsize=9)
        axis.set_ylabel(case.unit, fontsize=10)
        axis.axhline(0, color="0.3", lw=0.8)
    return figure


def seen(case: Case) -> Figure:
    """Draw one flower as the model sees it after each preprocessing of defect 1."""
    pictures = case.extra["seen"]
    own = next(iter(pictures))
    figure, axes = plt.subplots(1, len(pictures), figsize=(10, 3), layout="constrained")
    for axis, (name, pixels) in zip(axes, pictures.items(), strict=True):
        # This model takes every pixel as normalized by mean and std 0.5.
        axis.imshow((pixels.permute(1, 2, 0).numpy() / 2 + 0.5).clip(0, 1))
        axis.axis("off")
        title = f"{name}\ntop-1 {case.extra['by part'][name]:.3f}"
        axis.set_title(title, fontsize=10, color=RIGHT if name == own else WRONG)
    return figure


def curves(case: Case) -> Figure:
    """Draw the learning curves of defect 2."""
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    named = case.extra["curves"].items()
    for (name, curve), colour in zip(named, (WRONG, RIGHT), strict=True):
        axis.plot(range(1, len(curve) + 1), curve, "o-", color=colour, label=name)
    axis.set(
        xlabel="epoch",
        ylabel="test top-1",
        title="A head frozen and a head trained",
        ylim=(0, 1),
    )
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize=10)
    return figure


def chance(chosen: Case, layers: Case) -> Figure:
    """Draw defects 13 and 14: what chance gives to the best of many."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    _chosen_heads(left, chosen)
    _layer_gains(right, layers)
    return figure


def _chosen_heads(axis: Axes, case: Case) -> None:
    """Draw the chosen head of every draw, judged on both sets of images."""
    choosing, untouched = np.array(case.extra["pairs"]).T
    axis.scatter(choosing, untouched, s=22, alpha=0.5, color=WRONG)
    low = min(untouched.min(), choosing.min()) - 0.01
    high = max(untouched.max(), choosing.max()) + 0.01
    axis.plot([low, high], [low, high], "--", color="0.4", label="equal")
    axis.set(
        xlabel="top-1 on the images that chose the head",
        ylabel="top-1 on the others",
        title="13  Each dot: a best head",
    )
    axis.legend(fontsize=10)


def _layer_gains(axis: Axes, case: Case) -> None:
    """Draw the gain of every layer, on few images and on the others."""
    few, others = case.extra["few"], case.extra["others"]
    place, counts = np.arange(len(few)), case.extra["images"]
    axis.axhline(0, color="0.3", lw=0.8)
    axis.vlines(place, few, others, color="0.8", zorder=0)
    axis.scatter(place, few, s=36, color=WRONG, label=f"{counts[0]} images")
    axis.scatter(place, others, s=36, color=RIGHT, label=f"{counts[1]} other images")
    axis.set(
        xlabel="layer kept",
        ylabel="points of top-1 gained",
        title="14  Layers that are all alike",
    )
    axis.legend(fontsize=10)


def percentiles(case: Case) -> Figure:
    """Draw defect 11: the p99 of many measurements, with few and with many samples."""
    figure, axis = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
    drawn = case.extra["p99"]
    most = np.percentile(np.concatenate(list(drawn.values())), 99)
    edges = np.linspace(1, most, 60)
    for (count, values), colour in zip(drawn.items(), (WRONG, RIGHT), strict=True):
        share = np.full(len(values), 1 / len(values))
        label = f"p99 of {count} samples"
        axis.hist(values, edges, weights=share, color=colour, alpha=0.6, label=label)
    axis.set(
        xlabel="p99 (in medians)",
        ylabel="share of measurements",
        title="11  How far the p99 wanders",
    )
    axis.legend(fontsize=10)
    return figure


def operators(case: Case, count: int = 8) -> Figure:
    """Draw defect 8: the longest operators, as means of a call and as totals."""
    rows = case.extra["rows"][:count]
    names = [f"{row.name.replace('aten::', '')[:40]} × {row.calls}" for row in rows]
    means = [row.own / row.calls for row in rows]
    totals = [row.own for row in rows]
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    place = np.arange(len(rows))
    axis.barh(place - 0.2, means, 0.4, color=WRONG, label="mean of a call")
    axis.barh(place + 0.2, totals, 0.4, color=RIGHT, label="total")
    axis.set_yticks(place, names, fontsize=9)
    axis.invert_yaxis()
    axis.set(xlabel="own time in one forward (ms)", title="8  Where a forward goes")
    axis.legend(fontsize=10)
    return figure


def megabytes(case: Case) -> Figure:
    """Draw defect 7: sizes by division in red, measured sizes in blue."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 2.8), layout="constrained")
    for axis, (name, sizes) in zip(axes, case.extra["mb"].items(), strict=True):
        colours = [WRONG, WRONG, RIGHT, RIGHT]
        bars = axis.barh(list(sizes), list(sizes.values()), color=colours)
        axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=10)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set(xlabel="MB", title=f"{name}: fp32 is {case.extra['fp32']:.2f} MB")
        axis.grid(axis="y", visible=False)
    return figure
