"""Measure the ceilings of this machine: its fastest products and its fastest copy.

A ceiling is measured here, not taken from a data sheet (Williams et al., *Roofline*,
2009). Each kind of product has its own: float8 numbers are multiplied by other units
than bfloat16 numbers. All kinds are measured together, once a study, in turns: what
slows the machine for a moment then spoils one sample and not one kind.
"""

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from vitnb import devices
from vitnb.errors import one_line
from vitnb.records.identity import identify
from vitnb.records.reader import read_record
from vitnb.records.run import Run
from vitnb.study import Study

ROUNDS = 3  # turns of every product and of the copy
SLICE_S = 0.03  # of one turn; three runs where one takes longer
BURST_S = 0.01  # runs between two looks at the clock: a look costs microseconds
LONGEST_S = 0.25  # of one run; larger products are left out on a slow machine

# Rows, inner size and columns of the products. The first is small, and tells how long
# the others will take. The others are a square one, and one as tall as that of an MLP.
SHAPES = {
    "cpu": [(512, 512, 512), (1536, 1536, 1536), (4096, 512, 1024)],
    "cuda": [(1024, 1024, 1024), (8192, 8192, 8192), (32768, 1024, 4096)],
}
COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}

# Fields of an identity that a ceiling depends on, beside the version of PyTorch.
DEPENDS_ON = ("host", "device", "device_id", "driver", "cores", "threads")


def load_or_measure(study: Study, device: torch.device) -> dict:
    """Return the record of this machine's ceilings, measured if the study has none.

    Returns:
        The record; its ``ceilings`` are those of ``measure_ceilings``.
    """
    # The device is named only where it is not this machine's first choice.
    named = None if device == devices.select_device() else device.type
    asked = {"machine": _machine_digest(device), "device": named}
    run = Run("ceilings", study, asked)
    if run.path.is_file():
        record = read_record(run.path, "delete it and run this again")
        if record["status"] == "ok":
            return record
    return run.save(device=device.type, ceilings=measure_ceilings(device))


def _machine_digest(device: torch.device) -> str:
    """Return a name for this machine and device: equal names have equal ceilings."""
    identity = identify(device).as_record()
    values = [identity[name] for name in DEPENDS_ON] + [torch.__version__]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]


def measure_ceilings(device: torch.device) -> dict[str, object]:
    """Measure every kind of product that this device has, and a copy in memory.

    Returns:
        products: {kind: {shape: samples}}, 10^12 operations a second, 2 for a
            multiply-add. Kinds are ``float32`` (no TensorFloat-32), the 16-bit type,
            ``float8`` and ``int8``.
        copy_gbs: samples, 10^9 bytes read and written a second.
        missing: {kind: reason} of the kinds that have no product of their own here.
    """
    missing = missing_kinds(device)
    kinds = [
        "float32",
        devices.dtype_name(devices.half_dtype(device)),
        "float8",
        "int8",
    ]
    kinds = [kind for kind in kinds if kind not in missing]
    products = {kind: {} for kind in kinds}
    copies = []
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        for turn in range(ROUNDS):
            for kind in kinds:
                if kind in missing:
                    continue
                try:
                    _sample_products(products[kind], kind, device, first=turn == 0)
                except torch.OutOfMemoryError:
                    raise  # a RuntimeError, too
                except RuntimeError as error:
                    del products[kind]
                    missing[kind] = f"no {kind} product here: {one_line(error)}"
            copies.append(_sample_copy(device))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    return {"products": products, "copy_gbs": copies, "missing": missing}


def missing_kinds(device: torch.device) -> dict[str, str]:
    """Return {kind: reason} of the kinds that this device has no hardware for."""
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (8, 9):
            return {"float8": "a GPU below SM89 has no float8 units"}
        return {}
    reasons = {"float8": "a CPU multiplies float8 weights in float32"}
    if not devices.has_half_units(device):
        name = devices.dtype_name(devices.half_dtype(device))
        reasons[name] = f"this CPU has no 16-bit units, and emulates {name} products"
    # bitsandbytes (0.50) asks the same before it takes PyTorch's int8 product.
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        reasons["int8"] = "this CPU multiplies int8 weights in float32"
    return reasons


def _sample_products(
    samples: dict[str, list[float]], kind: str, device: torch.device, first: bool
) -> None:
    """Add one sample of each shape, in 10^12 operations a second.

    Args:
        samples: {shape: samples} so far.
        first: whether this is the first turn, which chooses the shapes.
    """
    for shape in SHAPES[device.type]:
        name = " x ".join(map(str, shape))
        operations = 2 * math.prod(shape)
        if first and samples:
            fastest = max(max(values) for values in samples.values())
            if operations / (fastest * 1e12) > LONGEST_S:
                continue
        elif not first and name not in samples:
            continue
        seconds = best_seconds(_make_product(kind, shape, device), device)
        samples.setdefault(name, []).append(operations / seconds / 1e12)


def _make_product(
    kind: str, shape: tuple[int, int, int], device: torch.device
) -> Callable[[], torch.Tensor]:
    """Return a product of random matrices, laid out as a Linear's are."""
    rows, inner, columns = shape
    # A seed of its own: a measurement must not move the generators of a study.
    random = torch.Generator(device).manual_seed(0)
    left = torch.randn(rows, inner, device=device, generator=random)
    right = torch.randn(columns, inner, device=device, generator=random)
    if kind == "int8":
        left, right = (m.mul_(40).clamp_(-127, 127).char() for m in (left, right))
        return functools.partial(torch._int_mm, left, right.t())
    if kind == "float8":
        left, right = (m.to(torch.float8_e4m3fn) for m in (left, right))
        one = torch.ones((), device=device)
        return functools.partial(
            torch._scaled_mm,
            left,
            right.t(),
            one,
            one,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    dtype = getattr(torch, kind)
    return functools.partial(F.linear, left.to(dtype), right.to(dtype))


def _sample_copy(device: torch.device) -> float:
    """Return 10^9 bytes read and written a second by a large copy in memory."""
    size = COPY_BYTES[device.type]
    source = torch.full((size,), 7, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    seconds = best_seconds(functools.partial(target.copy_, source), device)
    return 2 * size / seconds / 1e9


@torch.inference_mode()
def best_seconds(
    run: Callable[[], object], device: torch.device, limit: float = SLICE_S
) -> float:
    """Return the shortest time of one run: a ceiling is the machine's best.

    Short runs are timed many at once. Runs repeat for ``limit`` seconds.
    """
    _time_runs(run, 1, device)  # the first run sets up libraries
    best = _time_runs(run, 1, device)
    count = max(1, round(BURST_S / best))
    end = time.perf_counter() + limit
    while time.perf_counter() < end:
        best = min(best, _time_runs(run, count, device))
    return best


def _time_runs(run: Callable[[], object], count: int, device: torch.device) -> float:
    """Return seconds of one run, of ``count`` runs in a row."""
    devices.synchronize(device)
    begin = time.perf_counter()
    for _ in range(count):
        run()
    devices.synchronize(device)
    return (time.perf_counter() - begin) / count
