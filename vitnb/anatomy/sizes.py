"""Defects of sizes: a division instead of a measurement, and a peak that holds the variant before (7, 10)."""

import subprocess
import sys

from vitnb.anatomy.bench import Bench
from vitnb.anatomy.case import Case
from vitnb.models import checkpoints

MB = 2**20


# One process that loads the weights of each checkpoint named to it, one after the other, and keeps them, as a notebook
# does that leaves every variant in a variable. Its peak is reset before each.
PROCESS = """
import sys, tracemalloc
import numpy as np
tracemalloc.start()
variants = []
for path in sys.argv[1:]:
    tracemalloc.reset_peak()
    variants.append(np.fromfile(path, np.uint8))
    peak = tracemalloc.get_traced_memory()[1]
print(peak)
"""


def divided(bench: Bench) -> Case:
    """Defect 7. Done wrong: the 4-bit size is the fp32 size over 4, and the int8 size that over 2. Done instead: bytes
    on disk of real exports, and beside them the bytes that are resident once loaded.

    ``extra["mb"]`` holds, for each variant, all of these and the division by 8 (or 4) that would have been meant.
    """
    full = checkpoints.disk_bytes(bench.exports["fp32"]) / MB
    sizes = {}
    for name, wrong, meant in (("nf4-sdpa", 4, 8), ("int8-sdpa", 2, 4)):
        loaded = bench.loaded(name)
        sizes[name.removesuffix("-sdpa")] = {
            f"fp32 / {wrong} (the study)": full / wrong, f"fp32 / {meant} (by the bits)": full / meant,
            "on disk": loaded.disk_bytes / MB, "resident": loaded.resident_bytes / MB,
        }  # fmt: skip
    return Case(
        7, "A size by division", f"the 4-bit checkpoint of a model of {full:.2f} MB", "MB",
        full / 4, sizes["nf4"]["on disk"],
        "Bytes on disk, bytes resident, allocator peak: measured, side by side.", {"mb": sizes, "fp32": full},
    )  # fmt: skip


def peak(bench: Bench, *weights: str) -> float:
    """The peak in MB while the last of these checkpoints is loaded by a fresh process that loaded the others first."""
    paths = [str(bench.exports[name] / "model.safetensors") for name in weights]
    ended = subprocess.run([sys.executable, "-c", PROCESS, *paths], capture_output=True, text=True, check=True)
    return int(ended.stdout) / MB


def crowded(bench: Bench) -> Case:
    """Defect 10. Done wrong: variants are measured one after the other in one process, so the peak of the second holds
    the weights of the first. Done instead: a fresh process for each variant.
    """
    return Case(
        10, "A peak that holds the variant before", "peak memory while the 4-bit weights are loaded", "MB",
        peak(bench, "fp32", "nf4"), peak(bench, "nf4"), "A fresh process for each variant.",
    )  # fmt: skip
