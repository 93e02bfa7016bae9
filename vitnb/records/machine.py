"""Describe the machine: hardware, versions of code and packages, and present state."""

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import psutil
import torch

from vitnb.study import ROOT

# The packages that can change a result.
PACKAGES = (
    "torch",
    "transformers",
    "bitsandbytes",
    "flash-attn",
    "peft",
    "accelerate",
    "triton",
    "timm",
    "torchao",
    "scikit-learn",
    "scipy",
    "numpy",
    "pillow",
)

# Rooms whose code no measurement depends on.
SHOWING = ("figures", "report", "anatomy")

# Reasons for low clocks of a GPU, from bit 0 on (NVML, nvmlClocksEventReasons).
THROTTLE_REASONS = (
    "idle",
    "application clocks",
    "software power cap",
    "hardware slowdown",
    "sync boost",
    "software thermal",
    "hardware thermal",
    "hardware power brake",
    "display clocks",
)

# Keys of a record and the fields of nvidia-smi that give their values.
GPU_STATE = {
    "gpu_mhz": "clocks.sm",
    "gpu_memory_mhz": "clocks.mem",
    "gpu_watts": "power.draw",
    "gpu_celsius": "temperature.gpu",
}


def versions() -> dict[str, str]:
    """Return the versions of Python, CUDA and the packages; '-' for a missing one."""
    numbers = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            numbers[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            numbers[package] = "-"
    numbers["cuda"] = torch.version.cuda or "-"
    return numbers


def describe_machine() -> dict[str, object]:
    """Return the facts that stay the same during a run.

    They are the processor, the GPU and its driver, and the commit of the code.
    """
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu.name if gpu else None,
        "gpu_uuid": f"GPU-{gpu.uuid}" if gpu else None,
        "gpu_capability": f"{gpu.major}.{gpu.minor}" if gpu else None,
        "driver": smi("driver_version").get("driver_version") if gpu else None,
        "platform": platform.platform(terse=True),
        **_commit_of_code(),
        "code_sha256": code_sha256(),
    }


def _commit_of_code() -> dict[str, str | bool | None]:
    """Return the commit of the code, and whether the code was changed since.

    Both are None where git cannot say: it is missing, it refuses the repository, or no
    repository holds this code. Code that lies unknown in another project's repository,
    as an installed package does, has no commit either.
    """
    commit = _output_of("git", "rev-parse", "HEAD")
    known = _output_of("git", "ls-files", "--error-unmatch", str(Path(__file__)))
    changes = _output_of("git", "status", "--porcelain", "--untracked-files=normal")
    if not commit or not known or changes is None:
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(changes)}


def code_sha256() -> str:
    """Return the SHA-256 of the sources that measure.

    It names the code that ran, also without a repository or with uncommitted changes.
    Rooms that only show what a record holds do not count.
    """
    digest = hashlib.sha256()
    for path in sorted((ROOT / "vitnb").rglob("*.py")):
        name = path.relative_to(ROOT / "vitnb")
        if name.parts[0] not in SHOWING:
            digest.update(name.as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def machine_state() -> dict[str, object]:
    """Return how fast and how busy the machine is at this moment.

    Clocks are in MHz, power is in W and temperature in degrees Celsius. A value is None
    if the system does not give it. The keys of the GPU are missing without a GPU.
    """
    state = {"cpu_mhz": _cpu_mhz(), "load_1min": round(psutil.getloadavg()[0], 2)}
    if not torch.cuda.is_available():
        return state
    values = smi(*GPU_STATE.values())
    for key, field in GPU_STATE.items():
        state[key] = _number(values.get(field))
    state["gpu_throttled"] = _gpu_throttle_reasons()
    return state


def smi(*fields: str) -> dict[str, str]:
    """Return fields of nvidia-smi for the GPU in use; nothing without a GPU."""
    if not torch.cuda.is_available():
        return {}
    line = _output_of(
        "nvidia-smi",
        f"--query-gpu={','.join(fields)}",
        "--format=csv,noheader,nounits",
        f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}",
    )
    values = [value.strip() for value in (line or "").split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def throttle_reasons(mask: str | None) -> list[str] | None:
    """Return the names of the bits of a mask such as ``0x0000000000000004``.

    The result is None if the driver gives no mask.
    """
    try:
        bits = int(mask, 16)
    except (TypeError, ValueError):
        return None
    return [name for i, name in enumerate(THROTTLE_REASONS) if bits >> i & 1]


def _gpu_throttle_reasons() -> list[str] | None:
    # The driver renamed the field in 2023 and knows one of the two names.
    for word in ("event", "throttle"):
        field = f"clocks_{word}_reasons.active"
        reasons = throttle_reasons(smi(field).get(field))
        if reasons is not None:
            return reasons
    return None


def _cpu_model() -> str:
    """Return the name of the processor.

    Linux keeps it in /proc/cpuinfo, which neither psutil nor the standard library read.
    """
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _cpu_mhz() -> int | None:
    """Return the present clock, the mean of all cores; None if it is not known."""
    try:
        clock = psutil.cpu_freq()
    except (AttributeError, NotImplementedError, OSError):  # on some systems
        return None
    return round(clock.current) if clock and clock.current else None


def _output_of(*command: str) -> str | None:
    """Return the output of a program; None if it is missing or fails."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _number(text: str | None) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None
