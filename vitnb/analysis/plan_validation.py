"""Evaluate a mixed-precision plan on held-out images, from its record.

A plan is chosen on validation images. Images that chose nothing then show what it is
worth: the record's ``proof`` holds the KL of the plan and of random plans on them.
"""

import numpy as np
import pandas as pd

from vitnb import statistics

# A plan should cut at least this share of uniform NF4's KL, and beat every random plan.
TARGET = 0.25

# A plan that is itself drawn at random beats n others by chance in 1 of n + 1 cases:
# fewer than these prove nothing, even if all are beaten.
FEWEST_RANDOM = 20

# Names of the choices that no budget made.
NF4, INT8 = "uniform NF4", "uniform int8"
BF16, ENDS = "16 bits everywhere", "first and last in 16 bits"

# Images that a plan is validated on.
TEST, HALF = "test images", "validation images that did not choose"

COLUMNS = [
    *("name", "curve", "extra_bytes", "extra", "predicted_kl", "kl", "low", "high"),
    *("cut", "linears_quantized", "linears_kept", "top1"),
]


def trade_off(rows: list[dict], uniform_bytes: int) -> pd.DataFrame:
    """Return bytes against KL, a row for each measured choice.

    Args:
        rows: of a plan record, ``curve`` or ``proof``; the first is uniform NF4.
        uniform_bytes: of uniform NF4.

    Returns:
        Columns COLUMNS. ``extra``: bytes beyond uniform NF4, as a share of them;
        ``kl``, in nats, with its 95% interval; ``cut``: the share of uniform NF4's KL
        that the choice removes.
    """
    uniform_kl = np.mean(rows[0]["kl_by_image"])
    lines = []
    for row in rows:
        kl, low, high = statistics.bootstrap_mean(row["kl_by_image"])
        measured = {"kl": kl, "low": low, "high": high, "cut": 1 - kl / uniform_kl}
        lines.append(row | measured | {"extra": row["extra_bytes"] / uniform_bytes})
    return pd.DataFrame(lines)[COLUMNS]


def kl_reduction(nf4, plan) -> tuple[float, float, float]:
    """Return the share of NF4's mean KL that the plan removes, as (value, low, high).

    Args:
        nf4, plan: KL by image, [images] each; the bootstrap draws images, in pairs.
    """
    nf4, plan = np.asarray(nf4), np.asarray(plan)

    def share(drawn: np.ndarray) -> np.ndarray:
        index = drawn.astype(int)
        return 1 - plan[index].mean(-1) / nf4[index].mean(-1)

    low, high = statistics.bootstrap(np.arange(len(nf4)), share)
    return float(1 - plan.mean() / nf4.mean()), low, high


def validate(record: dict) -> dict:
    """Measure a plan on the images that did not choose it.

    Returns:
        cut, low, high: see ``kl_reduction``; random: the number of random plans of as
        many bytes; beaten: by the mean KL; beyond_noise: beaten by a paired t-test,
        corrected for their number; best_random: the largest cut of a random plan; met:
        TARGET is reached and all are beaten; best, best_extra: the largest cut of a
        plan on the curve, on validation images, and its bytes; images.
    """
    kl = {row["name"]: np.asarray(row["kl_by_image"]) for row in record["proof"]}
    nf4, plan = kl[NF4], kl["plan"]
    chance = [values for name, values in kl.items() if name.startswith("random ")]
    cut, low, high = kl_reduction(nf4, plan)
    beaten = int(sum(plan.mean() < other.mean() for other in chance))
    p_values = statistics.holm(
        [statistics.paired_t_pvalue(other, plan) for other in chance]
    )
    curve = trade_off(record["curve"], record["plan"]["uniform_bytes"])
    best = curve[curve.curve != ""].sort_values("cut").iloc[-1]
    return {
        "cut": cut,
        "low": low,
        "high": high,
        "random": len(chance),
        "beaten": beaten,
        "beyond_noise": sum(p < 1 - statistics.LEVEL for p in p_values),
        "met": bool(cut >= TARGET and beaten == len(chance)),
        "best_random": max(float(1 - kl.mean() / nf4.mean()) for kl in chance),
        "best": float(best.cut),
        "best_extra": float(best.extra),
        "images": len(plan),
    }


def validation_images(record: dict) -> str:
    """Return which images a plan was validated on, in words.

    A record that does not say is older than the choice: it used the test split.
    """
    return record.get("proven_on", TEST)


def describe_plan(record: dict) -> str:
    """Describe a plan's cut, the random plans that it beats, and its target."""
    result, plan, on = validate(record), record["plan"], validation_images(record)
    if on == TEST:
        on = f"{on}, which chose nothing"
    measured = (
        f"plan {plan['name']} holds {plan['extra_bytes'] / plan['uniform_bytes']:.1%} "
        f"more bytes than uniform NF4. On {result['images']} {on}, it cuts the KL to "
        f"fp32 by {result['cut']:.1%} ({result['low']:.1%} to {result['high']:.1%}), "
        f"and beats {result['beaten']} of {result['random']} random plans of the same "
        f"bytes ({result['beyond_noise']} beyond noise; the best of them cuts "
        f"{result['best_random']:.1%})."
    )
    if result["random"] < FEWEST_RANDOM:
        measured += (
            f" So few random plans cannot tell a plan from luck: {FEWEST_RANDOM} or "
            "more can."
        )
    target = f"At least {TARGET:.0%} and every random plan were asked for"
    if result["met"]:
        return f"{measured} {target}: met."
    return (
        f"{measured} {target}: missed. The best that any budget on the curve gives, on "
        f"validation images, is a cut of {result['best']:.1%} for "
        f"{result['best_extra']:.1%} more bytes."
    )


def describe_kept(record: dict) -> str:
    """Name the Linears that a plan keeps in 16 and in 8 bits."""
    names = {16: [], 8: []}
    for linear, bits in record["plan"]["widths"].items():
        names[bits].append(record["parts"][linear])
    return "; ".join(
        f"in {bits} bits: {', '.join(parts)}" for bits, parts in names.items() if parts
    )
