"""The machine: what it is, which code and packages run on it, and in which state it is at this moment."""

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from vitnb.study import ROOT

PACKAGES = (
    "torch", "transformers", "bitsandbytes", "flash-attn", "peft", "accelerate", "scikit-learn", "scipy", "numpy", "pillow",
)  # fmt: skip


# What keeps a GPU's clocks down, bit by bit (NVML, nvmlClocksEventReasons).
THROTTLE = (
    "idle", "application clocks", "software power cap", "hardware slowdown", "sync boost", "software thermal",
    "hardware thermal", "hardware power brake", "display clocks",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that move the numbers; '-' for one that is not installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "-"
    return found | {"cuda": torch.version.cuda or "-"}


def _output_of(*words: str) -> str:
    """What a program prints, or nothing if it is missing or fails."""
    try:
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def smi(*fields: str) -> dict[str, str]:
    """What the driver says of the GPU that PyTorch uses; nothing where there is none."""
    if not torch.cuda.is_available():
        return {}
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    line = _output_of("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", f"--id={uuid}")
    values = [value.strip() for value in line.split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def _cpuinfo() -> list[tuple[str, str]]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in lines)]


def code_sha256() -> str:
    """SHA-256 of the package's sources: which code ran, also where there is no repository or changes are not committed."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "vitnb").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def describe_machine() -> dict[str, object]:
    """The processor, the GPU and its driver, and the commit of the code: what does not change while a run lasts."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "cpu": dict(_cpuinfo()).get("model name", platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu.name if gpu else None,
        "gpu_uuid": f"GPU-{gpu.uuid}" if gpu else None,
        "gpu_capability": f"{gpu.major}.{gpu.minor}" if gpu else None,
        "driver": smi("driver_version").get("driver_version") if gpu else None,
        "platform": platform.platform(terse=True),
        "commit": _output_of("git", "rev-parse", "HEAD"),
        "dirty": bool(_output_of("git", "status", "--porcelain")),
        "code_sha256": code_sha256(),
    }


def _number(text: str | None) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def throttle_reasons(mask: str | None) -> list[str] | None:
    """The reasons that a bit mask such as ``0x0000000000000004`` holds, by name; None if the driver gives no mask."""
    try:
        bits = int(mask, 16)
    except (TypeError, ValueError):
        return None
    return [name for i, name in enumerate(THROTTLE) if bits >> i & 1]


def machine_state() -> dict[str, object]:
    """Clocks (MHz), power (W), temperature (C) and throttle reasons now, None where nobody says; and how busy the CPU is."""
    clocks = [float(value) for key, value in _cpuinfo() if key == "cpu MHz"]
    found = {
        "cpu_mhz": round(sum(clocks) / len(clocks)) if clocks else None,
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    if torch.cuda.is_available():
        fields = {
            "gpu_mhz": "clocks.sm",
            "gpu_memory_mhz": "clocks.mem",
            "gpu_watts": "power.draw",
            "gpu_celsius": "temperature.gpu",
        }
        said = smi(*fields.values())
        found |= {name: _number(said.get(field)) for name, field in fields.items()}
        # The driver renamed the field in 2023 and knows one of the two names.
        masks = [next(iter(smi(f"clocks_{word}_reasons.active").values()), None) for word in ("event", "throttle")]
        found["gpu_throttled"] = next((r for r in map(throttle_reasons, masks) if r is not None), None)
    return found
