"""The source study's ablation, redone: its two claims on depth, tested with their uncertainty.

It says that late layers, 20 to 23 of 24, are the sensitive ones, and that keeping the first and the last changes nothing: from
top-1, by differences of a few images. Here the question goes to the KL divergence on the same images.
"""

from itertools import combinations
from math import comb

import numpy as np

from vitnb import intervals

SHARE = 6  # the last sixth is late: layers 20 to 23 of 24
SETS = 20_000  # at most so many sets of layers are compared; beyond, as many drawn at random


def _moved(rows: list[dict], bits: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """KL that keeping each layer saves, [layers, images]; and of every configuration by its name, [images]."""
    kl = {row["kept"]: np.asarray(row["kl_by_image"]) for row in rows if row["bits"] == bits}
    count = sum(name.startswith("layer ") and name.removeprefix("layer ").isdigit() for name in kl)
    return np.stack([kl["none"] - kl[f"layer {i}"] for i in range(count)]), kl


def late(rows: list[dict], bits: int) -> dict:
    """Are the last sixth of the layers more sensitive than the others?

    Two uncertainties, as there are two things to generalize over. Images are many: ``difference``, mean KL saved by keeping a
    late layer minus that of another, has a bootstrap interval over images (low, high). Layers are few: ``as_large`` is the share
    of all sets of as many layers whose mean is at least as large (an exact permutation test).

    Returns:
        layers, late (their numbers), of_late and of_others (nats saved by one layer), difference, low, high, as_large, verdict.
    """
    saved, _ = _moved(rows, bits)
    count = len(saved)
    number = max(1, round(count / SHARE))
    last = saved[-number:].mean(0) - saved[:-number].mean(0)
    difference, low, high = intervals.mean(last)
    means = saved.mean(1)
    if comb(count, number) <= SETS:
        sets = np.array(list(combinations(range(count), number)))
    else:
        drawn = np.random.default_rng(0).random((SETS, count))
        sets = np.concatenate([[range(count - number, count)], drawn.argsort(1)[:, :number]])
    of_sets = means[sets].mean(1)
    as_large = float((of_sets >= means[-number:].mean() - 1e-15).mean())
    found = {
        "bits": bits, "layers": count, "late": list(range(count - number, count)), "of_late": float(means[-number:].mean()),
        "of_others": float(means[:-number].mean()), "difference": difference, "low": low, "high": high, "as_large": as_large,
        "images": saved.shape[1],
    }  # fmt: skip
    return found | {"verdict": _late_verdict(found)}


def _late_verdict(found: dict) -> str:
    """In words; nothing is called more or less sensitive inside the noise of the images."""
    if found["high"] < 0:
        return "the claim does not hold here: late layers are less sensitive than the others on average"
    if found["low"] <= 0:
        return "the claim does not hold here: no difference beyond noise between late layers and the others"
    if found["as_large"] <= 1 - intervals.LEVEL:
        return "the claim holds here: late layers are more sensitive than the others"
    return "late layers are more sensitive than the others on average, but other sets of layers are as much: lateness explains nothing"


def ends(rows: list[dict], bits: int) -> dict:
    """Does keeping the first and the last layer matter?

    Returns:
        saved (nats of KL by keeping both), low, high (95%, bootstrap over images), share (of the KL with none kept), two_others
        (nats that two other layers save on average, one by one), verdict.
    """
    by_layer, kl = _moved(rows, bits)
    saved, low, high = intervals.mean(kl["none"] - kl["first and last"])
    verdict = "holds here: no effect beyond noise" if low <= 0 <= high else "does not hold here: it matters"
    if high < 0:
        verdict = "does not hold here: it moves the answers further away"
    others = float(2 * by_layer[1:-1].mean()) if len(by_layer) > 2 else 0.0
    return {
        "bits": bits, "saved": saved, "low": low, "high": high, "share": saved / float(kl["none"].mean()), "two_others": others,
        "verdict": f"the claim {verdict}",
    }  # fmt: skip


def answers(rows: list[dict], bits: list[int]) -> list[str]:
    """Both claims in sentences, for each width."""
    said = []
    for width in bits:
        a, b = late(rows, width), ends(rows, width)
        numbers = ", ".join(map(str, a["late"]))
        said.append(
            f"Late layers ({numbers} of {a['layers']}) at {width} bits: keeping one of them saves {a['of_late']:.2g} nats of KL, one of "
            f"the others {a['of_others']:.2g}; the difference is {a['difference']:+.2g} ({a['low']:+.2g} to {a['high']:+.2g}, over "
            f"{a['images']} images), and {a['as_large']:.0%} of all sets of as many layers save as much. In words: {a['verdict']}."
        )
        said.append(
            f"First and last at {width} bits: keeping both saves {b['saved']:.2g} nats ({b['low']:.2g} to {b['high']:.2g}), "
            f"{b['share']:.0%} of the KL; two other layers save {b['two_others']:.2g}. In words: {b['verdict']}."
        )
    return said
