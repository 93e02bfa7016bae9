"""TODO."""

import numpy as np
import pandas as pd

from vitnb import statistics, variants
from vitnb.analysis import comparison

GAIN, TOTAL, KL = (
    ("gain", "gain_low", "gain_high"),
    ("total_gain", "total_low", "total_high"),
    ("kl", "kl_low", "kl_high"),
)


COLUMNS = [
    "ladder", "step", "variant", "techniques", "batch_size", "p50_ms", *GAIN, "over", *TOTAL, *KL, "changed",
    "resident_mb", "scratch_mb", "engine_ran", "reason",
]  # fmt: skip


def _gain(before: list[list[float]], after: list[list[float]], names: tuple[str, str, str]) -> dict[str, float]:
    found = comparison.pair_ratio(before, after)
    return dict(zip(names, (found.ratio, found.low, found.high), strict=True))


def _costs(found: dict, baseline: dict) -> dict[str, object]:
    """What a step costs at any batch size: accuracy against the baseline, memory; and which engine ran."""
    row = {"resident_mb": found["resident_bytes"] / 2**20, "scratch_mb": found["scratch_bytes"] / 2**20}
    row |= {"engine_ran": found["engine_ran"], "reason": found["engine_reason"]}
    if "kl_by_image" in found:
        row |= dict(zip(KL, statistics.bootstrap_mean(found["kl_by_image"]), strict=True))
        row["changed"] = float(np.mean(np.not_equal(found["first_class"], baseline["first_class"])))
    return row


def gain_verdict(row) -> str:
    """A row's gain in a word: ``faster``, ``slower``, ``no difference``; nothing where there is nothing to compare with."""
    if row.gain != row.gain:
        return ""
    if not statistics.outside_margin(row.gain_low, row.gain_high):
        return "no difference"
    return "faster" if row.gain > 1 else "slower"


def waterfall_table(record: dict) -> pd.DataFrame:
    """A row for every step of every ladder at every batch size, those that failed included, from the record alone.

    ``gain``: the time of the last step before that ran, ``over``, divided by this one's, with its interval at
    intervals.PAIR_LEVEL; ``total_gain``: the same of the ladder's first step. ``kl``: mean divergence in nats from the
    baseline's answers, with its 95% interval; ``changed``: share of images with another first class, 0 to 1.
    """
    rows, baseline = [], record["steps"].get(variants.BASELINE, {})
    for ladder, steps in record["ladders"].items():
        for size, blocks in record["blocks_ms"].items():
            before = None
            for step in steps:
                name = step["name"]
                row = {"ladder": ladder, "step": step["technique"], "variant": step["variant"], "batch_size": int(size)}
                row["techniques"] = ", ".join(step["techniques"] or [])
                row |= _costs(record["steps"][name], baseline) if name in record["steps"] else {}
                if name in blocks:
                    row["p50_ms"] = float(np.median(np.concatenate(blocks[name])))
                    if before:
                        row |= _gain(blocks[before], blocks[name], GAIN) | {"over": before}
                    if steps[0]["name"] in blocks:
                        row |= _gain(blocks[steps[0]["name"]], blocks[name], TOTAL)
                    before = name
                else:
                    row["reason"] = record["failed"][size].get(name, "")
                rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)


# What each technique is, for people.
TECHNIQUE_NOTES = {
    "fp32, operator by operator": "full precision (TensorFloat-32 off), every operator launched by Python: where each ladder begins",
    "16 bits": "bfloat16 weights and activations: half of the bytes, and the tensor cores",
    "4 bits, NF4": "NF4 weights by bitsandbytes, unpacked to 16 bits before each product",
    "8 bits, LLM.int8": "int8 weights by bitsandbytes, threshold 6: outlier columns of the activations are multiplied in 16 bits",
    "int8 activations": "the same int8 weights with threshold 0: no outliers are looked for",
    "float8 in place of int8": "weights and activations in float8 (e4m3), one scale a row",
    "CUDA graph": "the launches of a forward are recorded once and replayed together: the GPU no longer waits for Python",
    "rearranged": "the forward that the rows below change, in plain operations and a CUDA graph: where their gains begin",
    "one pass": "NF4 weights of a block are unpacked by one kernel in two launches, into a scratch that all blocks share",
    "patches": "the patch convolution as a copy and a product",
    "qkv": "query, key and value as one product",
    "stream": "what a block adds to the residual stream is added by the product itself",
    "norm": "residual and layer norm in one pass over memory",
    "gelu": "the exact GELU in place, by a kernel of its own",
    "class token": "behind the attention of the last block only the class token is computed",
    "all of the fused forward": "everything that the other ladders add behind the CUDA graph, at once",
}  # fmt: skip
