"""Tabulate memory, roofline and profile of one evaluated variant.

All functions take parts of an evaluate record.
"""

import numpy as np
import pandas as pd

from vitnb.analysis import latency
from vitnb.analysis.kernel_classes import CLASSES
from vitnb.records.files import MB

# --- Memory ---

MEMORY_DEFINITIONS = {
    "disk": "bytes of all files of the checkpoint",
    "resident": "bytes of parameters, buffers and quantization state of the loaded "
    "model, counted tensor by tensor",
    "allocator peak": "the most that PyTorch's allocator held at once during a "
    "forward, weights included",
    "driver peak": "how far what the driver (on a CPU: the operating system) counts "
    "for a fresh process rose, from before the model was loaded to its highest point",
}


def memory_table(disk_bytes: int, peaks: list[dict[str, int]]) -> pd.DataFrame:
    """Tabulate megabytes (2^20 bytes) at each batch size, with their definitions."""
    columns = {"disk": [disk_bytes for _ in peaks]}
    for name in list(MEMORY_DEFINITIONS)[1:]:
        columns[name] = [row[f"{name.replace(' ', '_')}_bytes"] for row in peaks]
    headings = [f"MB, batch {row['batch_size']}" for row in peaks]
    table = pd.DataFrame(columns, index=headings).T / MB
    return table.round(2).assign(counts=MEMORY_DEFINITIONS)


# --- Roofline ---


def roofline_shares(
    roof: dict, resident_bytes: int, batch_size: int, milliseconds: float
) -> dict[str, float]:
    """Compare the time of one batch with this machine's ceilings.

    The roofline is the longer of two times. One is the arithmetic at the peak rate of a
    matrix product. The other is one read of the resident weights at the peak rate of a
    copy (which counts bytes read and written).

    Returns:
        tflops; matmul_share, of the product's peak; roofline_share.
    """
    operations = roof["flops"][str(batch_size)]
    seconds = milliseconds / 1e3
    arithmetic = operations / (roof["matmul_tflops"] * 1e12)
    reading = resident_bytes / (roof["copy_gbs"] * 1e9)
    return {
        "tflops": operations / seconds / 1e12,
        "matmul_share": arithmetic / seconds,
        "roofline_share": max(arithmetic, reading) / seconds,
    }


def roofline_table(
    roof: dict, resident_bytes: int, timings: list[dict]
) -> pd.DataFrame:
    """Tabulate the median time of each batch size beside this machine's ceilings."""
    rows = []
    for timing in timings:
        size = timing["batch_size"]
        median_ms = float(np.median(latency.device_samples(timing)))
        shares = roofline_shares(roof, resident_bytes, size, median_ms)
        rows.append(
            {
                "batch": size,
                "GFLOP": f"{roof['flops'][str(size)] / 1e9:.2f}",
                "TFLOP/s": f"{shares['tflops']:.3f}",
                "of the product's peak": f"{shares['matmul_share']:.0%}",
                "of the roofline": f"{shares['roofline_share']:.0%}",
            }
        )
    print(
        f"ceilings here: product {roof['matmul_tflops']:.3f} TFLOP/s, "
        f"copy {roof['copy_gbs']:.1f} GB/s"
    )
    return pd.DataFrame(rows).set_index("batch")


# --- Profile ---


def describe_profile(trace: dict) -> str:
    """Describe a trace in two lines."""
    attention = ""
    if trace["attention_ms"] is not None:
        attention = f"{trace['attention_ms']:.2f} ms of "
    return (
        f"{trace['attention_ran']} ran: {attention}{trace['total_ms']:.2f} ms in one "
        "profiled forward\n"
        f"{trace['launches']} launches; busy {trace['busy_ms']:.2f} ms, "
        f"idle between them {trace['idle_ms']:.2f} ms"
    )


def time_by_class(trace: dict) -> dict[str, float]:
    """Return milliseconds of each class of kernels over all parts of the model."""
    parts = trace["parts_ms"].values()
    return {kind: sum(classes[kind] for classes in parts) for kind in CLASSES}


def time_by_part(trace: dict) -> dict[str, float]:
    """Return milliseconds of each part of the model over all classes."""
    return {part: sum(classes.values()) for part, classes in trace["parts_ms"].items()}
