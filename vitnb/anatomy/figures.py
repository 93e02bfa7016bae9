"""Figures of the anatomy lesson: each takes cases and returns a matplotlib Figure. Red is wrong, blue is right."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from vitnb.anatomy.case import Case, told

WRONG, RIGHT = "#b03030", "#0173b2"


def beside(cases: list[Case], columns: int = 3) -> Figure:
    """One panel a case: the wrong number beside the right one, each in the case's own unit."""
    columns = min(columns, len(cases))
    lines = -(-len(cases) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.7 * columns, 2.9 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(cases) :]:
        axis.axis("off")
    for axis, case in zip(axes.flat, cases, strict=False):
        bars = axis.bar(["wrong", "right"], [case.wrong, case.right], color=[WRONG, RIGHT], width=0.6)
        axis.bar_label(bars, [told(case.wrong), told(case.right)], padding=2, fontsize=11)
        axis.margins(y=0.2)
        axis.grid(axis="x", visible=False)
        axis.set_title(f"{case.number}  {case.title}", fontsize=9)
        axis.set_ylabel(case.unit, fontsize=10)
        axis.axhline(0, color="0.3", lw=0.8)
    return figure


def seen(case: Case) -> Figure:
    """One flower as the model sees it after each preprocessing of defect 1, with the top-1 that it gives."""
    figure, axes = plt.subplots(1, len(case.extra["seen"]), figsize=(10, 3), layout="constrained")
    for axis, (name, pixels) in zip(axes, case.extra["seen"].items(), strict=True):
        # Shown as if normalized by mean and std 0.5, which is what this model takes every pixel for.
        axis.imshow((pixels.permute(1, 2, 0).numpy() / 2 + 0.5).clip(0, 1))
        axis.axis("off")
        own = name == next(iter(case.extra["seen"]))
        axis.set_title(f"{name}\ntop-1 {case.extra['by part'][name]:.3f}", fontsize=10, color=RIGHT if own else WRONG)
    return figure


def curves(case: Case) -> Figure:
    """Learning curves of defect 2."""
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for (name, curve), colour in zip(case.extra["curves"].items(), (WRONG, RIGHT), strict=True):
        axis.plot(range(1, len(curve) + 1), curve, "o-", color=colour, label=name)
    axis.set(xlabel="epoch", ylabel="test top-1", title="A head frozen and a head trained", ylim=(0, 1))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize=10)
    return figure


def chance(chosen: Case, layers: Case) -> Figure:
    """Left, defect 13: every draw's chosen head on both sets of images. Right, defect 14: gains on few and other images."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    on_chosen, untouched = np.array(chosen.extra["pairs"]).T
    axes[0].scatter(on_chosen, untouched, s=22, alpha=0.5, color=WRONG)
    ends = [min(untouched.min(), on_chosen.min()) - 0.01, max(untouched.max(), on_chosen.max()) + 0.01]
    axes[0].plot(ends, ends, "--", color="0.4", label="equal")
    axes[0].set(
        xlabel="top-1 on the images that chose the head",
        ylabel="top-1 on the others",
        title="13  Each dot: a best head",
    )
    axes[0].legend(fontsize=10)
    few, others = layers.extra["few"], layers.extra["others"]
    place, counts = np.arange(len(few)), layers.extra["images"]
    axes[1].axhline(0, color="0.3", lw=0.8)
    axes[1].vlines(place, few, others, color="0.8", zorder=0)
    axes[1].scatter(place, few, s=36, color=WRONG, label=f"{counts[0]} images")
    axes[1].scatter(place, others, s=36, color=RIGHT, label=f"{counts[1]} other images")
    axes[1].set(xlabel="layer kept", ylabel="points of top-1 gained", title="14  Layers that are all alike")
    axes[1].legend(fontsize=10)
    return figure


def percentiles(case: Case) -> Figure:
    """Defect 11: where the p99 falls, measurement after measurement, with few and with many samples."""
    figure, axis = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
    drawn = case.extra["p99"]
    edges = np.linspace(1, np.percentile(np.concatenate(list(drawn.values())), 99), 60)
    for (count, values), colour in zip(drawn.items(), (WRONG, RIGHT), strict=True):
        share = np.full(len(values), 1 / len(values))
        axis.hist(values, edges, weights=share, color=colour, alpha=0.6, label=f"p99 of {count} samples")
    axis.set(xlabel="p99 (in medians)", ylabel="share of measurements", title="11  How far the p99 wanders")
    axis.legend(fontsize=10)
    return figure


def operators(case: Case, count: int = 8) -> Figure:
    """Defect 8: the operators that take longest, as means of a call and as totals."""
    rows = case.extra["rows"][:count]
    names = [row.name.replace("aten::", "")[:40] for row in rows]
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    place = np.arange(len(rows))
    axis.barh(place - 0.2, [row.own / row.calls for row in rows], 0.4, color=WRONG, label="mean of a call")
    axis.barh(place + 0.2, [row.own for row in rows], 0.4, color=RIGHT, label="total")
    axis.set_yticks(place, [f"{name} × {row.calls}" for name, row in zip(names, rows, strict=True)], fontsize=9)
    axis.invert_yaxis()
    axis.set(xlabel="own time in one forward (ms)", title="8  Where a forward goes")
    axis.legend(fontsize=10)
    return figure


def megabytes(case: Case) -> Figure:
    """Defect 7: sizes by division in red, measured ones in blue."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 2.8), layout="constrained")
    for axis, (name, sizes) in zip(axes, case.extra["mb"].items(), strict=True):
        bars = axis.barh(list(sizes), list(sizes.values()), color=[WRONG, WRONG, RIGHT, RIGHT])
        axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=10)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set(xlabel="MB", title=f"{name}: fp32 is {case.extra['fp32']:.2f} MB")
        axis.grid(axis="y", visible=False)
    return figure
