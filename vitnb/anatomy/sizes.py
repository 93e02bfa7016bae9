"""Defects of sizes: a division instead of a measurement, and a crowded peak (7, 10)."""

import subprocess
import sys

from vitnb.anatomy.bench import Bench
from vitnb.anatomy.case import Case
from vitnb.models import checkpoints
from vitnb.records.files import MB

# A process that loads the weights of several checkpoints, one after the other, and
# keeps all of them, as a notebook does that leaves every variant in a variable. The
# peak is reset before each.
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
    """Reproduce defect 7.

    Wrong: the 4-bit size is the fp32 size over 4, and the int8 size the fp32 size over
    2. Right: bytes on disk of real exports, beside the bytes resident once loaded.

    ``extra["mb"]`` holds for each variant both sizes, the study's division, and the
    division by the bits, by 8 or 4.
    """
    full = checkpoints.disk_bytes(bench.exports["fp32"]) / MB
    sizes = {}
    for name, wrong, by_bits in (("nf4-sdpa", 4, 8), ("int8-sdpa", 2, 4)):
        loaded = bench.loaded(name)
        sizes[name.removesuffix("-sdpa")] = {
            f"fp32 / {wrong} (the study)": full / wrong,
            f"fp32 / {by_bits} (by the bits)": full / by_bits,
            "on disk": loaded.disk_bytes / MB,
            "resident": loaded.resident_bytes / MB,
        }
    return Case(
        number=7,
        title="A size by division",
        what=f"the 4-bit checkpoint of a model of {full:.2f} MB",
        unit="MB",
        wrong=full / 4,
        right=sizes["nf4"]["on disk"],
        lesson="Bytes on disk, bytes resident, allocator peak: measured, side by side.",
        extra={"mb": sizes, "fp32": full},
    )


def peak(bench: Bench, *weights: str) -> float:
    """Return the peak in MB while a fresh process loads the last of some checkpoints.

    The process has loaded the others before.
    """
    paths = [str(bench.exports[name] / "model.safetensors") for name in weights]
    process = subprocess.run(
        [sys.executable, "-c", PROCESS, *paths],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(process.stdout) / MB


def crowded(bench: Bench) -> Case:
    """Reproduce defect 10.

    Wrong: variants are measured one after the other in one process, so the peak of the
    second holds the weights of the first. Right: a fresh process for each variant.
    """
    return Case(
        number=10,
        title="A peak that holds the variant before",
        what="peak memory while the 4-bit weights are loaded",
        unit="MB",
        wrong=peak(bench, "fp32", "nf4"),
        right=peak(bench, "nf4"),
        lesson="A fresh process for each variant.",
    )
