"""The source study's ablation, redone: its two claims on depth, tested with their uncertainty.

It says that late layers, 20 to 23 of 24, are the sensitive ones, and that keeping the first and the last changes nothing: from
top-1, by differences of a few images. Here the question goes to the KL divergence on the same images.
"""

from itertools import combinations
from math import comb
from pathlib import Path

import numpy as np
import pandas as pd

from vitnb import statistics
from vitnb.records.files import write_file

ONLY = "all but "  # begins the name of a configuration that quantizes one part alone


OUTSIDE = "outside "  # begins the name of a Linear that lies in no block


RAW = ("predicted", "kl_by_image")  # of a row, by image


NOISE = "no effect beyond noise"


def part_effects(rows: list[dict]) -> pd.DataFrame:
    """What each part does to the KL, in both directions, on the same images; a row for each part, direction and width.

    ``effect``: mean KL in nats that keeping the part saves (direction ``keep``: none kept minus this kept), or that quantizing
    it alone costs (``only``: this quantized minus none quantized), with its 95% bootstrap interval. ``p``: paired t-test that it
    is above 0, one-sided; ``p_corrected``: for the number of rows (Holm). ``verdict``: ``sensitive``, or NOISE.
    """
    moved = {(row["bits"], row["kept"]): np.asarray(row["kl_by_image"]) for row in rows}
    lines = []
    for (bits, kept), kl in moved.items():
        part = kept.removeprefix(ONLY)
        if part.startswith(("layer ", "every ", OUTSIDE)):
            only = kept.startswith(ONLY)
            more, less = (kl, moved[bits, "all"]) if only else (moved[bits, "none"], kl)
            effect, low, high = statistics.bootstrap_mean(more - less)
            line = {"bits": bits, "direction": "only" if only else "keep", "part": part, "effect": effect}
            lines.append(line | {"low": low, "high": high, "p": statistics.paired_t_pvalue(more, less)})
    columns = ["bits", "direction", "part", "effect", "low", "high", "p", "p_corrected", "verdict"]
    table = pd.DataFrame(lines, columns=columns)
    table["p_corrected"] = statistics.holm(table.p.tolist())
    table["verdict"] = np.where(table.p_corrected < 1 - statistics.LEVEL, "sensitive", NOISE)
    return table


def layers_to_keep(table: pd.DataFrame, bits: int, count: int = 3) -> list[str]:
    """The layers to keep first: those whose keeping lowers the KL most, of those that lower it beyond noise (``effects``)."""
    chosen = table[(table.bits == bits) & (table.direction == "keep") & (table.verdict == "sensitive")]
    whole = chosen[chosen.part.str.fullmatch(r"layer \d+")]
    return list(whole.sort_values("effect", ascending=False).part[:count])


def effects_by_kind(table: pd.DataFrame) -> pd.DataFrame:
    """The effects of the kinds of Linears as people read them; empty if they were not measured."""
    lines = [
        {"bits": row.bits, "direction": row.direction, "part": row.part,
         "effect, nats (95%)": f"{row.effect:.2g} ({row.low:.2g} to {row.high:.2g})", "in words": row.verdict}
        for row in table[table.part.str.startswith("every ")].itertuples()
    ]  # fmt: skip
    return pd.DataFrame(lines)


def sensitivity_table(rows: list[dict]) -> pd.DataFrame:
    """The rows without the raw values of single images."""
    return pd.DataFrame(rows).drop(columns=list(RAW))


def write_sensitivity_csv(rows: list[dict], path: Path) -> Path:
    """Write the table as CSV, whole or not at all."""
    write_file(path, sensitivity_table(rows).to_csv(index=False, lineterminator="\n"))
    return path


SHARE = 6  # the last sixth is late: layers 20 to 23 of 24


SETS = 20_000  # at most so many sets of layers are compared; beyond, as many drawn at random


def _moved(rows: list[dict], bits: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """KL that keeping each layer saves, [layers, images]; and of every configuration by its name, [images]."""
    kl = {row["kept"]: np.asarray(row["kl_by_image"]) for row in rows if row["bits"] == bits}
    count = sum(name.startswith("layer ") and name.removeprefix("layer ").isdigit() for name in kl)
    return np.stack([kl["none"] - kl[f"layer {i}"] for i in range(count)]), kl


def late_layers(rows: list[dict], bits: int) -> dict:
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
    difference, low, high = statistics.bootstrap_mean(last)
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
    if found["as_large"] <= 1 - statistics.LEVEL:
        return "the claim holds here: late layers are more sensitive than the others"
    return "late layers are more sensitive than the others on average, but other sets of layers are as much: lateness explains nothing"


def first_and_last(rows: list[dict], bits: int) -> dict:
    """Does keeping the first and the last layer matter?

    Returns:
        saved (nats of KL by keeping both), low, high (95%, bootstrap over images), share (of the KL with none kept), two_others
        (nats that two other layers save on average, one by one), verdict.
    """
    by_layer, kl = _moved(rows, bits)
    saved, low, high = statistics.bootstrap_mean(kl["none"] - kl["first and last"])
    verdict = "holds here: no effect beyond noise" if low <= 0 <= high else "does not hold here: it matters"
    if high < 0:
        verdict = "does not hold here: it moves the answers further away"
    others = float(2 * by_layer[1:-1].mean()) if len(by_layer) > 2 else 0.0
    return {
        "bits": bits, "saved": saved, "low": low, "high": high, "share": saved / float(kl["none"].mean()), "two_others": others,
        "verdict": f"the claim {verdict}",
    }  # fmt: skip


def claim_sentences(rows: list[dict], bits: list[int]) -> list[str]:
    """Both claims in sentences, for each width."""
    said = []
    for width in bits:
        a, b = late_layers(rows, width), first_and_last(rows, width)
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
