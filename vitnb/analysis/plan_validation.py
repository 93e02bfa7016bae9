"""What a plan is worth: from its record alone, the trade-off of bytes and KL, and the proof on images that it was not chosen on."""

import numpy as np
import pandas as pd

from vitnb import statistics

TARGET = 0.25  # a plan should cut at least this share of uniform NF4's KL, and beat every random plan


# Names of the rows that no budget chose:
NF4, INT8, BF16, ENDS = "uniform NF4", "uniform int8", "16 bits everywhere", "first and last in 16 bits"


COLUMNS = [
    "name",
    "curve",
    "extra_bytes",
    "extra",
    "predicted_kl",
    "kl",
    "low",
    "high",
    "cut",
    "linears_quantized",
    "linears_kept",
    "top1",
]


TEST, HALF = "test images", "validation images that did not choose"  # what a proof may be on


def trade_off(rows: list[dict], uniform_bytes: int) -> pd.DataFrame:
    """A row for each choice measured: bytes beyond uniform NF4 (``extra``, as a share of it), KL in nats as predicted and as measured
    with its 95% interval, and ``cut``, the share of the first row's KL (uniform NF4's) that is gone.
    """
    lines = []
    for row in rows:
        line = dict(zip(("kl", "low", "high"), statistics.bootstrap_mean(row["kl_by_image"]), strict=True))
        line |= {"extra": row["extra_bytes"] / uniform_bytes, "cut": 1 - line["kl"] / np.mean(rows[0]["kl_by_image"])}
        lines.append(row | line)
    return pd.DataFrame(lines)[COLUMNS]


def kl_reduction(nf4, plan) -> tuple[float, float, float]:
    """(share of NF4's mean KL that the plan cuts, low, high): KL by image, [images] each; bootstrap over images, in pairs."""
    nf4, plan = np.asarray(nf4), np.asarray(plan)

    def share(drawn: np.ndarray) -> np.ndarray:
        index = drawn.astype(int)
        return 1 - plan[index].mean(-1) / nf4[index].mean(-1)

    return float(1 - plan.mean() / nf4.mean()), *statistics.bootstrap(np.arange(len(nf4)), share)


def validate(record: dict) -> dict:
    """The plan on the images that prove: its cut with the interval, and how many random plans of the same bytes it beats.

    Returns:
        cut, low, high; random (their number), beaten (by the mean KL), beyond_noise (of these by a paired t-test, corrected for their
        number), best_random (the largest cut of one); met (``BAR`` and all beaten); best, best_extra (the largest cut of a plan on
        the curve, on validation images, and its bytes); images.
    """
    by_name = {row["name"]: np.asarray(row["kl_by_image"]) for row in record["proof"]}
    nf4, plan = by_name[NF4], by_name["plan"]
    chance = [kl for name, kl in by_name.items() if name.startswith("random ")]
    value, low, high = kl_reduction(nf4, plan)
    p = statistics.holm([statistics.paired_t_pvalue(kl, plan) for kl in chance])
    beaten = sum(plan.mean() < kl.mean() for kl in chance)
    curve = trade_off(record["curve"], record["plan"]["uniform_bytes"])
    best = curve[curve.curve != ""].sort_values("cut").iloc[-1]
    return {
        "cut": value, "low": low, "high": high, "random": len(chance), "beaten": int(beaten),
        "beyond_noise": sum(one < 1 - statistics.LEVEL for one in p), "met": bool(value >= TARGET and beaten == len(chance)),
        "best_random": max(float(1 - kl.mean() / nf4.mean()) for kl in chance), "best": float(best.cut), "best_extra": float(best.extra),
        "images": len(plan),
    }  # fmt: skip


def validation_images(record: dict) -> str:
    """Which images the proof is on; a record that does not say is from when it was always the test split."""
    return record.get("proven_on", TEST)


def describe_plan(record: dict) -> str:
    """The verdict in one or two sentences: cut by how much, beats how many, and whether that is what a plan should do."""
    found, plan, on = validate(record), record["plan"], validation_images(record)
    said = (
        f"plan {plan['name']} holds {plan['extra_bytes'] / plan['uniform_bytes']:.1%} more bytes than uniform NF4. On {found['images']} "
        f"{on}{', which chose nothing' * (on == TEST)}, it cuts the KL to fp32 by {found['cut']:.1%} "
        f"({found['low']:.1%} to {found['high']:.1%}), and "
        f"beats {found['beaten']} of {found['random']} random plans of the same bytes ({found['beyond_noise']} beyond noise; the best of "
        f"them cuts {found['best_random']:.1%})."
    )
    if found["met"]:
        return f"{said} At least {TARGET:.0%} and every random plan were asked for: met."
    return (
        f"{said} At least {TARGET:.0%} and every random plan were asked for: missed. The best that any budget on the curve gives, on "
        f"validation images, is a cut of {found['best']:.1%} for {found['best_extra']:.1%} more bytes."
    )


def describe_kept(record: dict) -> str:
    """What the plan keeps, in words."""
    names = {bits: [] for bits in (16, 8)}
    for linear, bits in record["plan"]["widths"].items():
        names[bits].append(record["parts"][linear])
    return "; ".join(f"in {bits} bits: {', '.join(parts)}" for bits, parts in names.items() if parts)


def current_plans(found: list[dict], finetuned: dict | None) -> tuple[list[dict], list[dict]]:
    """The plan records that belong to the newest fine-tuning, and the plans that do not."""
    every = [record for record in found if record["notebook"] == "plan" and record["status"] == "ok"]
    merged = finetuned["checkpoint_sha256"]["merged"] if finetuned else None
    fresh = [record for record in every if merged in (None, record["plan"]["merged_sha256"])]
    return fresh, [record["plan"] for record in every if record not in fresh]
