"""Tabulate a waterfall: the gain and the cost of each technique, in order."""

import numpy as np
import pandas as pd

from vitnb import statistics, variants
from vitnb.analysis import comparison
from vitnb.records.files import MB

GAIN = ("gain", "gain_low", "gain_high")
TOTAL = ("total_gain", "total_low", "total_high")
KL = ("kl", "kl_low", "kl_high")

COLUMNS = [
    *("ladder", "step", "variant", "techniques", "batch_size", "p50_ms"),
    *(*GAIN, "over", *TOTAL),
    *(*KL, "changed"),
    *("resident_mb", "scratch_mb", "engine_ran", "reason"),
]

FASTER, SLOWER = "faster", "slower"
NO_DIFFERENCE, TOO_FEW = "no difference", "too few rounds"

# Each technique, described for readers of the report.
TECHNIQUE_NOTES = {
    "fp32, operator by operator": "full precision (TensorFloat-32 off), every operator "
    "launched by Python: where each ladder begins",
    "16 bits": "bfloat16 weights and activations: half of the bytes, and the tensor "
    "cores",
    "4 bits, NF4": "NF4 weights by bitsandbytes, unpacked to 16 bits before each "
    "product",
    "8 bits, LLM.int8": "int8 weights by bitsandbytes, threshold 6: outlier columns of "
    "the activations are multiplied in 16 bits",
    "int8 activations": "the same int8 weights with threshold 0: no outliers are "
    "looked for",
    "float8 in place of int8": "weights and activations in float8 (e4m3), one scale a "
    "row",
    "CUDA graph": "the launches of a forward are recorded once and replayed together: "
    "the GPU no longer waits for Python",
    "rearranged": "the forward that the rows below change, in plain operations and a "
    "CUDA graph: where their gains begin",
    "one pass": "NF4 weights of a block are unpacked by one kernel in two launches, "
    "into a scratch that all blocks share",
    "patches": "the patch convolution as a copy and a product",
    "qkv": "query, key and value as one product",
    "stream": "what a block adds to the residual stream is added by the product itself",
    "norm": "residual and layer norm in one pass over memory",
    "gelu": "the exact GELU in place, by a kernel of its own",
    "class token": "behind the attention of the last block only the class token is "
    "computed",
    "all of the fused forward": "everything that the other ladders add behind the CUDA "
    "graph, at once",
}


def waterfall_table(record: dict) -> pd.DataFrame:
    """Return a row for every step of every ladder at every batch size.

    Steps that failed have a row, too.

    Returns:
        Columns COLUMNS. ``gain``: time of ``over``, the last step before this one that
        ran, divided by this step's time, with the interval at statistics.PAIR_LEVEL,
        which holds the noise of the rounds and no difference between processes.
        ``total_gain``: the gain over the ladder's first step. ``kl``: mean divergence
        in nats from the baseline's answers, with its 95% interval. ``changed``: share
        of images with another first class, 0 to 1.
    """
    rows = []
    for ladder, steps in record["ladders"].items():
        for size in record["blocks_ms"]:
            rows += _ladder_rows(record, ladder, steps, size)
    return pd.DataFrame(rows, columns=COLUMNS)


def _ladder_rows(record: dict, ladder: str, steps: list[dict], size: str) -> list[dict]:
    """Return the rows of one ladder at one batch size."""
    blocks, costs = record["blocks_ms"][size], record["steps"]
    baseline, first, before = costs.get(variants.BASELINE, {}), steps[0]["name"], None
    rows = []
    for step in steps:
        name = step["name"]
        row = {
            "ladder": ladder,
            "step": step["technique"],
            "variant": step["variant"],
            "techniques": ", ".join(step["techniques"] or []),
            "batch_size": int(size),
        }
        if name in costs:
            row |= _costs(costs[name], baseline)
        if name in blocks:
            row["engine_ran"] = costs[name]["engine_ran"][size]
            row["reason"] = costs[name]["engine_reason"].get(size, "")
            row["p50_ms"] = float(np.median(np.concatenate(blocks[name])))
            if before:
                row |= _gain(blocks[before], blocks[name], GAIN) | {"over": before}
            if first in blocks:
                row |= _gain(blocks[first], blocks[name], TOTAL)
            before = name
        else:
            row["reason"] = record["failed"][size].get(name, "")
        rows.append(row)
    return rows


def _gain(
    before: list[list[float]], after: list[list[float]], names: tuple[str, str, str]
) -> dict[str, float]:
    """Return how many times shorter the blocks became, with the interval."""
    ratio = comparison.pair_ratio(before, after)
    return dict(zip(names, (ratio.ratio, ratio.low, ratio.high), strict=True))


def _costs(step: dict, baseline: dict) -> dict[str, object]:
    """Return the memory and the accuracy cost of a step, at any batch size."""
    row = {
        "resident_mb": step["resident_bytes"] / MB,
        "scratch_mb": step["scratch_bytes"] / MB,
    }
    if "kl_by_image" in step:
        row |= dict(
            zip(KL, statistics.bootstrap_mean(step["kl_by_image"]), strict=True)
        )
        changed = np.not_equal(step["first_class"], baseline["first_class"])
        row["changed"] = float(np.mean(changed))
    return row


def gain_verdict(row) -> str:
    """Classify a row's gain: FASTER, SLOWER, NO_DIFFERENCE or TOO_FEW.

    All steps run in one process. Another process would place them elsewhere in memory,
    so a gain within statistics.SINGLE_MARGIN is no difference.

    A row without a step before it has no verdict: an empty text.
    """
    if pd.isna(row.gain):
        return ""
    if not row.gain_low:  # no interval of so few rounds can exclude anything
        return TOO_FEW
    if not statistics.outside_margin(row.gain_low, row.gain_high, df=0):
        return NO_DIFFERENCE
    return FASTER if row.gain > 1 else SLOWER


def describe_gain(row) -> str:
    """Describe a row's verdict in full, see ``gain_verdict``."""
    verdict = gain_verdict(row)
    if verdict == NO_DIFFERENCE:
        return "no difference beyond what one process can show"
    return verdict
