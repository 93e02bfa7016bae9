"""Draw the sensitivity of layers, and the bytes against KL of plans."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitnb.analysis import plan_validation
from vitnb.figures.style import NATS, panels

BLUE, ORANGE, RED, GREEN = "#0173b2", "#de8f05", "#d55e00", "#029e73"
CURVE_COLOURS = {"kept in 16 bits": BLUE, "kept in 8 or 16 bits": GREEN}

# --- Ablation ---


def ablation_layers(rows: list[dict]) -> Figure:
    """Draw KL and top-1 when one layer is kept in 16 bits, a column for each width.

    Lines show the values with no layer kept (dashed) and with all kept (dotted).
    """
    table = pd.DataFrame(rows)
    widths = sorted(table[table.bits < 32].bits.unique())
    figure, axes = plt.subplots(
        2,
        len(widths),
        figsize=(5.6 * len(widths), 5.4),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    for column, bits in zip(axes.T, widths, strict=True):
        group = table[table.bits == bits].set_index("kept")
        single = group[group.index.str.fullmatch(r"layer \d+")]
        layer = single.index.str.removeprefix("layer ").astype(int)
        for axis, y, label in zip(
            column, ("kl", "top1"), (NATS, "validation top-1"), strict=True
        ):
            sns.scatterplot(x=layer, y=single[y], s=70, color=BLUE, ax=axis)
            axis.axhline(group.loc["none", y], ls="--", color="0.4", label="none kept")
            axis.axhline(
                group.loc["all", y], ls=":", color="0.4", label="all kept (16 bits)"
            )
            axis.set(ylabel=label, xlabel="layer kept in 16 bits")
        column[0].set_title(f"{bits}-bit")
        column[0].legend(fontsize=8)
    return figure


def ablation_ends(rows: list[dict]) -> Figure:
    """Draw KL with no layer kept, with the first and the last kept, and with all."""
    table = pd.DataFrame(rows)
    table = table[table.kept.isin(["none", "first and last", "all"])]
    table = table.assign(width=table.bits.astype(str) + "-bit")
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    sns.barplot(table, x="kl", y="kept", hue="width", palette="crest", ax=axis)
    axis.set(
        xlabel=NATS,
        ylabel="kept in 16 bits",
        title="Do the first and the last layer matter?",
    )
    axis.legend(title="")
    return figure


def layer_effects(effects: pd.DataFrame) -> Figure:
    """Draw each layer's effect on the KL in both directions, a panel for each width.

    Bars are 95% intervals; hollow points lie inside the noise.
    """
    whole = effects[effects.part.str.fullmatch(r"layer \d+")]
    widths = sorted(whole.bits.unique())
    figure, axes = panels(len(widths), height=3.6)
    for axis, bits in zip(axes, widths, strict=True):
        of_width = whole[whole.bits == bits]
        kept = of_width[of_width.direction == "keep"]
        _draw_effects(axis, kept, -0.12, BLUE, "saved by keeping it alone")
        only = of_width[of_width.direction == "only"]
        _draw_effects(axis, only, 0.12, ORANGE, "cost of quantizing it alone")
        axis.axhline(0, color="0.4", lw=1)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set(title=f"{bits}-bit", xlabel="layer", ylabel=NATS)
        axis.legend(fontsize=8)
    return figure


def _draw_effects(
    axis: Axes, rows: pd.DataFrame, shift: float, colour: str, label: str
) -> None:
    """Draw the effects of one direction, shifted sideways."""
    x = rows.part.str.removeprefix("layer ").astype(int) + shift
    spread = (rows.effect - rows.low, rows.high - rows.effect)
    axis.errorbar(x, rows.effect, spread, fmt="none", ecolor=colour, alpha=0.6)
    sensitive = (rows.verdict == "sensitive").to_numpy()
    fill = np.where(sensitive, colour, "white")
    axis.scatter(
        x, rows.effect, s=45, edgecolor=colour, color=fill, label=label, zorder=3
    )


# --- Plans ---


def linears_map(record: dict) -> Figure:
    """Draw the KL that quantizing every Linear alone costs, by block and kind.

    Linears between blocks are left out. What the plan keeps has a frame.

    Args:
        record: of a plan.
    """
    table = _cost_of_linears(record)
    kinds = list(dict.fromkeys(table.kind))
    grid = table.pivot(index="kind", columns="layer", values="cost").reindex(kinds)
    figure, axis = plt.subplots(
        figsize=(1.6 + 0.5 * grid.shape[1], 3), layout="constrained"
    )
    sns.heatmap(grid.clip(lower=0), cmap="mako_r", ax=axis, cbar_kws={"label": NATS})
    for row in table[table.kept].itertuples():
        corner = (row.layer, kinds.index(row.kind))
        frame = plt.Rectangle(corner, 1, 1, fill=False, edgecolor=RED, lw=2)
        axis.add_patch(frame)
    axis.set(title="Quantized alone to NF4 (framed: kept by the plan)", ylabel="")
    return figure


def _cost_of_linears(record: dict) -> pd.DataFrame:
    """Return layer, kind, cost (nats) and kept for every Linear of a block."""
    in_16_bits = next(
        row["kl_by_image"]
        for row in record["curve"]
        if row["name"] == plan_validation.BF16
    )
    rows = []
    for linear, part in record["parts"].items():
        if part.startswith("layer "):
            layer, kind = part.removeprefix("layer ").split(" ", 1)
            rows.append(
                {
                    "layer": int(layer),
                    "kind": kind,
                    "cost": np.mean(record["alone"][linear]) - np.mean(in_16_bits),
                    "kept": linear in record["plan"]["widths"],
                }
            )
    return pd.DataFrame(rows)


def plan_curve(record: dict) -> Figure:
    """Draw KL against bytes for a plan.

    On the left, the images that chose: every budget, measured and predicted. On the
    right, the images that did not choose: the plan among random plans.
    """
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11.5, 4), layout="constrained", width_ratios=(3, 2)
    )
    _draw_budgets(left, record)
    _draw_validation(right, record)
    for axis in (left, right):
        axis.set(xlabel="bytes beyond uniform NF4", ylabel=NATS, ylim=(0, None))
        axis.legend(fontsize=8)
    return figure


def _draw_budgets(axis: Axes, record: dict) -> None:
    plan = record["plan"]
    curve = plan_validation.trade_off(record["curve"], plan["uniform_bytes"])
    for name, rows in curve[curve.curve != ""].groupby("curve", sort=False):
        rows = pd.concat([curve[:1], rows])  # every curve begins at uniform NF4
        colour = CURVE_COLOURS[name]
        axis.plot(rows.extra, rows.predicted_kl, ":", color=colour, lw=1)
        spread = (rows.kl - rows.low, rows.high - rows.kl)
        axis.errorbar(
            rows.extra, rows.kl, spread, fmt="o-", ms=5, color=colour, label=name
        )
    others = curve[curve.curve == ""]
    for row, marker in zip(others.itertuples(), "sD^v", strict=True):
        _draw_choice(axis, row, marker, "0.35", row.name)
    axis.plot([], [], ":", color="0.4", label="predicted: costs add")
    axis.axvline(plan["budget"], color=RED, lw=1, ls="--", label="the plan's budget")
    axis.set_title("Chosen: validation images")
    axis.xaxis.set_major_formatter(lambda value, _: f"+{value:.0%}")


def _draw_validation(axis: Axes, record: dict) -> None:
    plan = record["plan"]
    table = plan_validation.trade_off(record["proof"], plan["uniform_bytes"])
    table = table.set_index("name")
    chance = table[table.index.str.startswith("random ")]
    label = f"{len(chance)} random plans"
    axis.scatter(chance.extra, chance.kl, s=28, color="0.6", label=label)
    uniform = plan_validation.NF4
    _draw_choice(axis, table.loc[uniform], "s", "0.35", uniform)
    _draw_choice(axis, table.loc["plan"], "o", RED, f"plan {plan['name']}")
    axis.set_title(f"Proven: {plan_validation.validation_images(record)}")
    axis.xaxis.set_major_formatter(lambda value, _: f"+{value:.1%}")
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.margins(x=0.2)


def _draw_choice(axis: Axes, row, marker: str, colour: str, label: str) -> None:
    """Draw one row of ``plan_validation.trade_off``, with its 95% interval."""
    spread = [[row.kl - row.low], [row.high - row.kl]]
    axis.errorbar(
        [row.extra], [row.kl], spread, fmt=marker, ms=8, color=colour, label=label
    )
