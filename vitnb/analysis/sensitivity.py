"""Find the layers that quantization hurts most, and test two claims about depth.

First the effect of each part of the model on the KL divergence to full precision, from
the rows of an ablate record. Then two claims of the source study, which says that late
layers (20 to 23 of 24) are the sensitive ones, and that keeping the first and the last
layer changes nothing. The source study argues from top-1, by differences of a few
images; here both claims are tested on the KL of the same images.
"""

from itertools import combinations
from math import comb

import numpy as np
import pandas as pd

from vitnb import statistics

ONLY = "all but "  # prefix of a configuration that quantizes one part alone
OUTSIDE = "outside "  # prefix of a Linear that lies in no block
RAW = ("predicted", "kl_by_image")  # values of a row by image
NOISE = "no effect beyond noise"

LATE_SHARE = 6  # the last sixth is late: layers 20 to 23 of 24
# Keeping two layers that saves a smaller share of the KL, to the end of its interval,
# has no effect worth keeping them for.
NEGLIGIBLE = 0.1
MAX_SETS = 20_000  # sets of layers to compare; beyond, as many are drawn at random

# --- Effects of parts ---


def part_effects(rows: list[dict]) -> pd.DataFrame:
    """Measure the effect of each part on the KL, in both directions.

    Args:
        rows: of an ablate record.

    Returns:
        A row for each part, direction and width. ``effect``, in nats: the mean KL that
        keeping the part saves (direction ``keep``: none kept minus this part kept), or
        the mean KL that quantizing the part alone costs (``only``: this part quantized
        minus none quantized), with its 95% bootstrap interval. ``p``: paired t-test
        that the effect is above 0, one-sided; ``p_corrected``: for the number of rows
        (Holm). ``verdict``: ``sensitive`` or NOISE.
    """
    kl = {(row["bits"], row["kept"]): np.asarray(row["kl_by_image"]) for row in rows}
    lines = []
    for (bits, kept), values in kl.items():
        part = kept.removeprefix(ONLY)
        if not part.startswith(("layer ", "every ", OUTSIDE)):
            continue
        if kept.startswith(ONLY):
            direction, more, less = "only", values, kl[bits, "all"]
        else:
            direction, more, less = "keep", kl[bits, "none"], values
        effect, low, high = statistics.bootstrap_mean(more - less)
        p = statistics.paired_t_pvalue(more, less)
        lines.append((bits, direction, part, effect, low, high, p))
    columns = ["bits", "direction", "part", "effect", "low", "high", "p"]
    table = pd.DataFrame(lines, columns=columns)
    table["p_corrected"] = statistics.holm(table.p.tolist())
    significant = table.p_corrected < 1 - statistics.LEVEL
    table["verdict"] = np.where(significant, "sensitive", NOISE)
    return table


def most_sensitive_layers(table: pd.DataFrame, bits: int, count: int = 3) -> list[str]:
    """Return the layers that are most worth keeping in 16 bits, best first.

    Args:
        table: see ``part_effects``; only layers that lower the KL beyond noise count.
    """
    chosen = table[(table.bits == bits) & (table.direction == "keep")]
    chosen = chosen[chosen.verdict == "sensitive"]
    whole = chosen[chosen.part.str.fullmatch(r"layer \d+")]
    return list(whole.sort_values("effect", ascending=False).part[:count])


def effects_by_kind(table: pd.DataFrame) -> pd.DataFrame:
    """Tabulate the effects of the kinds of Linears for people.

    The table is empty if kinds were not measured.
    """
    kinds = table[table.part.str.startswith("every ")]
    lines = [
        {
            "bits": row.bits,
            "direction": row.direction,
            "part": row.part,
            "effect, nats (95%)": f"{row.effect:.2g} ({row.low:.2g} to {row.high:.2g})",
            "in words": row.verdict,
        }
        for row in kinds.itertuples()
    ]
    return pd.DataFrame(lines)


def sensitivity_table(rows: list[dict]) -> pd.DataFrame:
    """Return the rows of an ablate record without values by image."""
    return pd.DataFrame(rows).drop(columns=list(RAW))


# --- Claims about depth ---


def _kl_by_configuration(rows: list[dict], bits: int) -> dict[str, np.ndarray]:
    """Return the KL of each configuration at one width, [images] each."""
    return {
        row["kept"]: np.asarray(row["kl_by_image"])
        for row in rows
        if row["bits"] == bits
    }


def _saved_by_layer(kl: dict[str, np.ndarray]) -> np.ndarray:
    """Return the KL that keeping each layer saves, [layers, images]."""
    prefix = "layer "
    count = sum(
        name.startswith(prefix) and name.removeprefix(prefix).isdigit() for name in kl
    )
    return np.stack([kl["none"] - kl[f"layer {i}"] for i in range(count)])


def late_layers(rows: list[dict], bits: int) -> dict:
    """Test whether the last sixth of the layers is more sensitive than the others.

    There are two uncertainties. Images are many: ``difference``, the mean KL saved by
    keeping a late layer minus that of another layer, has a bootstrap interval over
    images (low, high). Layers are few: ``as_large`` is the share of all sets of as many
    layers whose mean is at least as large (an exact permutation test).

    Returns:
        bits, images, layers (their number), late (layer numbers), of_late and of_others
        (nats saved by one layer), difference, low, high, as_large, least (the smallest
        as_large that so few layers can give), verdict.
    """
    saved = _saved_by_layer(_kl_by_configuration(rows, bits))
    count, images = saved.shape
    number = max(1, round(count / LATE_SHARE))
    by_image = saved[-number:].mean(0) - saved[:-number].mean(0)
    difference, low, high = statistics.bootstrap_mean(by_image)
    means = saved.mean(1)
    result = {
        "bits": bits,
        "layers": count,
        "late": list(range(count - number, count)),
        "of_late": float(means[-number:].mean()),
        "of_others": float(means[:-number].mean()),
        "difference": difference,
        "low": low,
        "high": high,
        "as_large": _share_of_sets_as_large(means, number),
        "least": 1 / comb(count, number),
        "images": images,
    }
    return result | {"verdict": _late_verdict(result)}


def _share_of_sets_as_large(means: np.ndarray, number: int) -> float:
    """Return the share of sets of ``number`` layers whose mean is at least the last's.

    Args:
        means: by layer, [layers].
    """
    count = len(means)
    if comb(count, number) <= MAX_SETS:
        sets = np.array(list(combinations(range(count), number)))
    else:
        drawn = np.random.default_rng(0).random((MAX_SETS, count))
        drawn_sets = drawn.argsort(1)[:, :number]
        sets = np.concatenate([[range(count - number, count)], drawn_sets])
    late = means[-number:].mean()
    return float((means[sets].mean(1) >= late - 1e-15).mean())


def _late_verdict(result: dict) -> str:
    """Describe ``late_layers``; inside the noise no layer is more or less sensitive."""
    if result["high"] < 0:
        return (
            "the claim does not hold here: late layers are less sensitive than the "
            "others on average"
        )
    if result["low"] <= 0:
        return (
            "the claim is not confirmed here: no difference beyond noise between late "
            "layers and the others"
        )
    if result["least"] > 1 - statistics.LEVEL:
        return (
            "late layers are more sensitive than the others on average, but "
            f"{result['layers']} layers are too few to tell whether lateness is why: "
            f"even the best of all sets would be one in {round(1 / result['least'])}"
        )
    if result["as_large"] <= 1 - statistics.LEVEL:
        return "the claim holds here: late layers are more sensitive than the others"
    return (
        "late layers are more sensitive than the others on average, but other sets of "
        "layers are as much: lateness explains nothing"
    )


def first_and_last(rows: list[dict], bits: int) -> dict:
    """Test whether keeping the first and the last layer matters.

    Returns:
        bits; saved (nats of KL by keeping both), low, high (95%, bootstrap over
        images); share (of the KL with none kept); two_others (nats that two other
        layers save on average, one by one); verdict.
    """
    kl = _kl_by_configuration(rows, bits)
    by_layer = _saved_by_layer(kl)
    saved, low, high = statistics.bootstrap_mean(kl["none"] - kl["first and last"])
    whole = float(kl["none"].mean())
    verdict = "does not hold here: it matters"
    if high < 0:
        verdict = "does not hold here: it moves the answers further away"
    elif low <= 0 and high <= NEGLIGIBLE * whole:
        verdict = f"holds here: no effect beyond noise, at most {high / whole:.0%}"
    elif low <= 0:
        verdict = (
            "cannot be judged here: no effect beyond noise, but the images are too few "
            f"to exclude {high / whole:.0%}"
        )
    others = float(2 * by_layer[1:-1].mean()) if len(by_layer) > 2 else 0.0
    return {
        "bits": bits,
        "saved": saved,
        "low": low,
        "high": high,
        "share": saved / whole,
        "two_others": others,
        "verdict": f"the claim {verdict}",
    }


def claim_sentences(rows: list[dict], bits: list[int]) -> list[str]:
    """Describe both claims in one sentence each, for each width."""
    sentences = []
    for width in bits:
        late, ends = late_layers(rows, width), first_and_last(rows, width)
        sentences += [_describe_late(late), _describe_ends(ends)]
    return sentences


def _describe_late(late: dict) -> str:
    numbers = ", ".join(map(str, late["late"]))
    return (
        f"Late layers ({numbers} of {late['layers']}) at {late['bits']} bits: keeping "
        f"one of them saves {late['of_late']:.2g} nats of KL, one of the others "
        f"{late['of_others']:.2g}; the difference is {late['difference']:+.2g} "
        f"({late['low']:+.2g} to {late['high']:+.2g}, over {late['images']} images), "
        f"and {late['as_large']:.0%} of all sets of as many layers save as much. "
        f"In words: {late['verdict']}."
    )


def _describe_ends(ends: dict) -> str:
    return (
        f"First and last at {ends['bits']} bits: keeping both saves "
        f"{ends['saved']:.2g} nats ({ends['low']:.2g} to {ends['high']:.2g}), "
        f"{ends['share']:.0%} of the KL; two other layers save "
        f"{ends['two_others']:.2g}. In words: {ends['verdict']}."
    )
