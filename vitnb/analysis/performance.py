"""TODO."""

import numpy as np
import pandas as pd

from vitnb.analysis import kernel_classes, latency

MEMORY_DEFINITIONS = {
    "disk": "bytes of all files of the checkpoint",
    "resident": "bytes of parameters, buffers and quantization state of the loaded model, counted tensor by tensor",
    "allocator peak": "the most that PyTorch's allocator held at once during a forward, weights included",
    "driver peak": "how far what the driver (on a CPU: the operating system) counts for a fresh process rose, "
    "from before the model was loaded to its highest point",
}


def memory_table(disk_bytes: int, peaks: list[dict[str, int]]) -> pd.DataFrame:
    """Megabytes (2^20 bytes) at each batch size, with what each number counts."""
    columns = {"disk": [disk_bytes] * len(peaks)} | {
        name: [row[f"{name.replace(' ', '_')}_bytes"] for row in peaks] for name in list(MEMORY_DEFINITIONS)[1:]
    }
    found = pd.DataFrame(columns, index=[f"MB, batch {row['batch_size']}" for row in peaks]).T / 2**20
    return found.round(2).assign(counts=MEMORY_DEFINITIONS)


def roofline_shares(roof: dict, resident_bytes: int, batch_size: int, milliseconds: float) -> dict[str, float]:
    """What a time of a batch amounts to: tflops, its share of the measured product peak, and of the roofline.

    The roofline is the longer of two times: the arithmetic at the product's peak, and reading the resident weights once
    at the copy's peak (which counts bytes read and written).
    """
    operations, seconds = roof["flops"][str(batch_size)], milliseconds / 1e3
    arithmetic = operations / (roof["matmul_tflops"] * 1e12)
    reading = resident_bytes / (roof["copy_gbs"] * 1e9)
    return {
        "tflops": operations / seconds / 1e12,
        "matmul_share": arithmetic / seconds,
        "roofline_share": max(arithmetic, reading) / seconds,
    }


def roofline_table(roof: dict, resident_bytes: int, timings: list[dict]) -> pd.DataFrame:
    """The typical time of each batch size beside this machine's ceilings."""
    rows = []
    for timing in timings:
        found = roofline_shares(roof, resident_bytes, timing["batch_size"], float(np.median(latency.device_samples(timing))))
        rows.append({
            "batch": timing["batch_size"], "GFLOP": f"{roof['flops'][str(timing['batch_size'])] / 1e9:.2f}",
            "TFLOP/s": f"{found['tflops']:.3f}", "of the product's peak": f"{found['matmul_share']:.0%}",
            "of the roofline": f"{found['roofline_share']:.0%}",
        })  # fmt: skip
    print(f"ceilings here: product {roof['matmul_tflops']:.3f} TFLOP/s, copy {roof['copy_gbs']:.1f} GB/s")
    return pd.DataFrame(rows).set_index("batch")


def describe_profile(trace: dict) -> str:
    """A trace in two lines."""
    took = "" if trace["attention_ms"] is None else f"{trace['attention_ms']:.2f} ms of "
    return (
        f"{trace['attention_ran']} ran: {took}{trace['total_ms']:.2f} ms in one profiled forward\n"
        f"{trace['launches']} launches; busy {trace['busy_ms']:.2f} ms, idle between them {trace['idle_ms']:.2f} ms"
    )


def time_by_class(trace: dict) -> dict[str, float]:
    """Milliseconds of each class of kernels over all parts."""
    return {kind: sum(classes[kind] for classes in trace["parts_ms"].values()) for kind in kernel_classes.CLASSES}


def time_by_part(trace: dict) -> dict[str, float]:
    """Milliseconds of each part of the model over all classes."""
    return {part: sum(classes.values()) for part, classes in trace["parts_ms"].items()}
