"""Tabulate memory and profile of one evaluated variant.

All functions take parts of an evaluate record.
"""

import pandas as pd

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
