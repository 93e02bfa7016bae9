"""Compare the times of forwards with the ceilings of the machine they ran on.

A machine has one ceiling for each kind of product, and one for a copy in memory: the
largest of all measurements in a study's records. No forward can be faster than its
ceilings allow. If one was, a ceiling is too low, and nobody knows which of those that
the forward used. Then none of these counts, and shares of them are blank. A share is
never cut off at 1, and never of the ceiling of another kind.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from vitnb.analysis import latency

COPY = "copy"
REFUTED = "a forward was faster than the {} allows"

Machine = tuple[str, str]  # host and device


@dataclass(frozen=True)
class Ceiling:
    """The ceiling of one kind of product, or of a copy, on one machine.

    Attributes:
        rate: operations a second, or bytes read and written a second; None if there is
            no ceiling.
        samples: all measurements, in the same unit.
        reason: why there is no ceiling; empty if there is one.
    """

    rate: float | None
    samples: tuple[float, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Forward:
    """One forward beside the ceilings.

    Attributes:
        operations: {kind of product: operations}.
        resident_bytes: bytes of the loaded weights.
        seconds: its median time.
    """

    operations: dict[str, int]
    resident_bytes: int
    seconds: float


# --- Ceilings ---


def machine_of(record: dict) -> Machine:
    """Return the host and the device that a record was measured on."""
    return record["identity"]["host"], record["identity"]["device"]


def study_ceilings(records: list[dict]) -> dict[Machine, dict[str, Ceiling]]:
    """Return the ceilings of every machine of a study, by kind.

    Args:
        records: all of a study's, in any order.
    """
    forwards: dict[Machine, list[Forward]] = {}
    measured: dict[Machine, list[dict]] = {}
    for record in records:
        if record["status"] != "ok":
            continue
        if "ceilings" in record:
            measured.setdefault(machine_of(record), []).append(record["ceilings"])
        if record["notebook"] == "evaluate":
            own = forwards.setdefault(machine_of(record), [])
            own += [forward_of(record, timing) for timing in record["timings"]]
    return {
        machine: refute(join(parts), forwards.get(machine, []))
        for machine, parts in measured.items()
    }


def join(measured: list[dict]) -> dict[str, Ceiling]:
    """Return the largest of several measurements on one machine, by kind.

    Args:
        measured: the ``ceilings`` entries of records.
    """
    samples: dict[str, list[float]] = {}
    reasons: dict[str, str] = {}
    for part in measured:
        reasons |= part["missing"]
        for kind, by_shape in part["products"].items():
            rates = [1e12 * tflops for values in by_shape.values() for tflops in values]
            samples.setdefault(kind, []).extend(rates)
        samples.setdefault(COPY, []).extend(1e9 * gbs for gbs in part["copy_gbs"])
    known = {kind: Ceiling(max(rates), tuple(rates)) for kind, rates in samples.items()}
    blank = {kind: Ceiling(None, (), why) for kind, why in reasons.items()}
    return known | {kind: blank[kind] for kind in blank if kind not in known}


def refute(
    ceilings: dict[str, Ceiling], forwards: Iterable[Forward]
) -> dict[str, Ceiling]:
    """Return ceilings without those that a forward was faster than."""
    wrong = {}
    for forward in forwards:
        arithmetic, reading = shortest_times(forward, ceilings)
        if arithmetic is not None and arithmetic > forward.seconds:
            wrong |= dict.fromkeys(forward.operations, "largest product measured")
        if reading is not None and reading > forward.seconds:
            wrong[COPY] = "fastest copy measured"
    return ceilings | {
        kind: Ceiling(None, ceilings[kind].samples, REFUTED.format(what))
        for kind, what in wrong.items()
    }


# --- Shares ---


def forward_of(record: dict, timing: dict) -> Forward:
    """Return the forward of an evaluate record at the batch size of a timing."""
    return make_forward(record["roofline"], record["resident_bytes"], timing)


def make_forward(roof: dict, resident_bytes: int, timing: dict) -> Forward:
    """Return the median forward of a timing.

    Args:
        roof: the ``roofline`` entry of an evaluate record.
        timing: an element of its ``timings``.
    """
    median_ms = float(np.median(latency.device_samples(timing)))
    operations = roof["flops"][str(timing["batch_size"])]
    return Forward(operations, resident_bytes, median_ms / 1e3)


def shortest_times(
    forward: Forward, ceilings: dict[str, Ceiling]
) -> tuple[float | None, float | None]:
    """Return the shortest possible seconds of the arithmetic, and of the reading.

    The arithmetic is that of every kind of product at its own ceiling, one after the
    other. The reading is one of the resident weights at the rate of a copy. Either is
    None if it needs a ceiling that there is not.
    """
    missing = _blank_reason(forward.operations, ceilings)
    arithmetic = None
    if not missing:
        arithmetic = sum(
            number / ceilings[kind].rate for kind, number in forward.operations.items()
        )
    copy = ceilings.get(COPY)
    reading = forward.resident_bytes / copy.rate if copy and copy.rate else None
    return arithmetic, reading


def roofline_shares(forward: Forward, ceilings: dict[str, Ceiling]) -> dict:
    """Compare the time of a forward with the ceilings of its machine.

    The roofline is the longer of the two times of ``shortest_times``.

    Returns:
        tflops, 10^12 operations a second; matmul_share and roofline_share, the shortest
        possible time over the measured one, None without a ceiling; share_reason, why a
        share is None, else empty.
    """
    arithmetic, reading = shortest_times(forward, ceilings)
    shares = {
        "tflops": sum(forward.operations.values()) / forward.seconds / 1e12,
        "matmul_share": None,
        "roofline_share": None,
        "share_reason": _blank_reason([*forward.operations, COPY], ceilings),
    }
    if arithmetic is not None:
        shares["matmul_share"] = arithmetic / forward.seconds
        if reading is not None:
            shares["roofline_share"] = max(arithmetic, reading) / forward.seconds
    return shares


def _blank_reason(kinds: Iterable[str], ceilings: dict[str, Ceiling]) -> str:
    """Say which of the kinds have no ceiling, and why; empty if all have one."""
    unknown = Ceiling(None, (), "not measured on this machine")
    found = {kind: ceilings.get(kind, unknown) for kind in kinds}
    return "; ".join(
        f"{kind}: {ceiling.reason}"
        for kind, ceiling in found.items()
        if ceiling.rate is None
    )


# --- Tables ---


def roofline_table(
    measured: dict, roof: dict, resident_bytes: int, timings: list[dict]
) -> pd.DataFrame:
    """Tabulate the median time of each batch size beside this machine's ceilings.

    Args:
        measured: the ``ceilings`` entry of a record of this machine.
        roof, timings: those of an evaluate record.
    """
    forwards = [make_forward(roof, resident_bytes, timing) for timing in timings]
    ceilings = refute(join([measured]), forwards)
    rows = []
    for timing, forward in zip(timings, forwards, strict=True):
        shares = roofline_shares(forward, ceilings)
        rows.append(
            {
                "batch": timing["batch_size"],
                "GFLOP": ", ".join(
                    f"{number / 1e9:.2f} in {kind}"
                    for kind, number in forward.operations.items()
                ),
                "TFLOP/s": f"{shares['tflops']:.3f}",
                "of the product's peak": _percent(shares["matmul_share"]),
                "of the roofline": _percent(shares["roofline_share"]),
                "why blank": shares["share_reason"],
            }
        )
    table = pd.DataFrame(rows).set_index("batch")
    if (table["why blank"] == "").all():
        return table.drop(columns="why blank")
    return table


def ceilings_table(ceilings: dict[Machine, dict[str, Ceiling]]) -> pd.DataFrame:
    """Tabulate the ceilings of machines: the largest sample, and the smallest."""
    return pd.DataFrame(
        {
            "device": device,
            "host": host,
            "ceiling of": kind if kind == COPY else f"{kind} product",
            "largest": _rate(kind, ceiling.rate),
            "samples": len(ceiling.samples),
            "smallest": _rate(kind, min(ceiling.samples, default=None)),
            "why blank": ceiling.reason,
        }
        for (host, device), kinds in ceilings.items()
        for kind, ceiling in kinds.items()
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _rate(kind: str, rate: float | None) -> str:
    if rate is None:
        return ""
    if kind == COPY:
        return f"{rate / 1e9:.1f} GB/s"
    return f"{rate / 1e12:.3f} TFLOP/s"
