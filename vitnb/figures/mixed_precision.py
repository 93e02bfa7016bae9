"""Sensitivity of parts, and what bytes buy: the trade-off curve of plans."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitnb.analysis import plan_validation
from vitnb.figures.style import panels


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


NATS = "KL to full precision (nats)"


COLOURS = {"kept in 16 bits": "#0173b2", "kept in 8 or 16 bits": "#029e73"}


def layer_effects(effects: pd.DataFrame) -> Figure:
    """What each layer does to the KL in both directions, with 95% intervals, a panel a width; hollow: inside the noise."""
    whole = effects[effects.part.str.fullmatch(r"layer \d+")]
    widths = sorted(whole.bits.unique())
    figure, axes = panels(len(widths), height=3.6)
    labels = {"keep": "saved by keeping it alone", "only": "cost of quantizing it alone"}
    for axis, bits in zip(axes, widths, strict=True):
        for shift, (direction, label), colour in zip(
            (-0.12, 0.12), labels.items(), ("#0173b2", "#de8f05"), strict=True
        ):
            rows = whole[(whole.bits == bits) & (whole.direction == direction)]
            at = rows.part.str.removeprefix("layer ").astype(int) + shift
            axis.errorbar(
                at, rows.effect, (rows.effect - rows.low, rows.high - rows.effect), fmt="none", ecolor=colour, alpha=0.6
            )
            filled = (rows.verdict == "sensitive").to_numpy()
            axis.scatter(
                at, rows.effect, s=45, edgecolor=colour, color=np.where(filled, colour, "white"), label=label, zorder=3
            )
        axis.axhline(0, color="0.4", lw=1)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set(title=f"{bits}-bit", xlabel="layer", ylabel=NATS)
        axis.legend(fontsize=8)
    return figure


def linears_map(record: dict) -> Figure:
    """KL that quantizing every Linear of a block alone costs, block by kind, from a plan's record; what the plan keeps has a frame."""
    plain = next(row["kl_by_image"] for row in record["curve"] if row["name"] == plan_validation.BF16)
    rows = []
    for linear, part in record["parts"].items():
        if not part.startswith("layer "):  # it lies between blocks
            continue
        layer, kind = part.removeprefix("layer ").split(" ", 1)
        rows.append(
            {
                "layer": int(layer),
                "kind": kind,
                "cost": np.mean(record["alone"][linear]) - np.mean(plain),
                "kept": linear in record["plan"]["widths"],
            }
        )
    table, kinds = pd.DataFrame(rows), list(dict.fromkeys(row["kind"] for row in rows))
    grid = table.pivot(index="kind", columns="layer", values="cost").reindex(kinds)
    figure, axis = plt.subplots(figsize=(1.6 + 0.5 * grid.shape[1], 3), layout="constrained")
    sns.heatmap(grid.clip(lower=0), cmap="mako_r", ax=axis, cbar_kws={"label": NATS})
    for row in table[table.kept].itertuples():
        axis.add_patch(plt.Rectangle((row.layer, kinds.index(row.kind)), 1, 1, fill=False, edgecolor="#d55e00", lw=2))
    axis.set(title="Quantized alone to NF4 (framed: kept by the plan)", ylabel="")
    return figure


def _point(axis: Axes, row, marker: str, colour: str, label: str) -> None:
    """One choice of a trade-off (a row of ``proof.trade_off``): its KL at its bytes, with the 95% interval."""
    spread = [[row.kl - row.low], [row.high - row.kl]]
    axis.errorbar([row.extra], [row.kl], spread, fmt=marker, ms=8, color=colour, label=label)


def plan_curve(record: dict) -> Figure:
    """KL against bytes: on the images that chose, every budget, measured and predicted; on those that prove, the plan among random ones."""
    plan = record["plan"]
    curve = plan_validation.trade_off(record["curve"], plan["uniform_bytes"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4), layout="constrained", width_ratios=(3, 2))
    for name, rows in curve[curve.curve != ""].groupby("curve", sort=False):
        rows = pd.concat([curve[:1], rows])  # every curve begins at uniform NF4
        left.plot(rows.extra, rows.predicted_kl, ":", color=COLOURS[name], lw=1)
        spread = (rows.kl - rows.low, rows.high - rows.kl)
        left.errorbar(rows.extra, rows.kl, spread, fmt="o-", ms=5, color=COLOURS[name], label=name)
    for row, marker in zip(curve[curve.curve == ""].itertuples(), "sD^v", strict=True):
        _point(left, row, marker, "0.35", row.name)
    left.plot([], [], ":", color="0.4", label="predicted: costs add")
    left.axvline(plan["budget"], color="#d55e00", lw=1, ls="--", label="the plan's budget")
    left.set(title="Chosen: validation images", xlabel="bytes beyond uniform NF4", ylabel=NATS, ylim=(0, None))
    left.xaxis.set_major_formatter(lambda value, _: f"+{value:.0%}")
    left.legend(fontsize=8)
    tested = plan_validation.trade_off(record["proof"], plan["uniform_bytes"]).set_index("name")
    chance = tested[tested.index.str.startswith("random ")]
    right.scatter(chance.extra, chance.kl, s=28, color="0.6", label=f"{len(chance)} random plans")
    for name, marker, colour in ((plan_validation.NF4, "s", "0.35"), ("plan", "o", "#d55e00")):
        _point(right, tested.loc[name], marker, colour, f"plan {plan['name']}" if name == "plan" else name)
    right.set(
        title=f"Proven: {plan_validation.validation_images(record)}", xlabel="bytes beyond uniform NF4", ylabel=NATS, ylim=(0, None)
    )
    right.xaxis.set_major_formatter(lambda value, _: f"+{value:.1%}")
    right.xaxis.set_major_locator(MaxNLocator(5))
    right.margins(x=0.2)
    right.legend(fontsize=8)
    return figure
