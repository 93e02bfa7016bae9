"""The identity of a result: all that it depends on, as one value.

Answers (classes, KL) depend on checkpoints, data, code, packages, dtype and the kind of
device. Times depend on the same and on host, cores, threads, device and driver. An
identity is taken when a model is loaded, not when its record is written: a checkpoint
may be replaced in between. It keys unfinished work (``resume``), and it says which
records belong together (``analysis.provenance``).
"""

import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

import torch

from vitnb import devices
from vitnb.records import machine

# Fields that answers depend on. Times depend on all.
ANSWERS = ("checkpoints", "data", "code", "packages", "dtype", "device_kind")


class Dependency(Protocol):
    """What a result may depend on: a ``LoadedVariant``, or a ``Split``."""

    def as_dependency(self) -> dict[str, object]:
        """Return fields of an Identity, such as ``{"dtype": "float32"}``."""
        ...


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints that a result depends on, {export: SHA-256}."""

    sums: dict[str, str]

    def as_dependency(self) -> dict[str, object]:
        """Return what an identity holds of them."""
        return {"checkpoints": self.sums}


@dataclass(frozen=True)
class Identity:
    """All that a result depends on.

    Attributes:
        checkpoints: {export: SHA-256}, see ``checkpoints.fingerprint``.
        data: {split: SHA-256} of the images' bytes, their order and their labels.
        code: SHA-256 of the sources that measure, see ``machine.code_sha256``.
        packages: {package: version}.
        dtype: the type of computing; empty where several variants differ in it.
        device_kind: ``cpu`` with its matrix units, or ``cuda`` with its capability.
        host: a digest of the host's name, as records are published.
        cores: processor cores that this process may use.
        threads: of PyTorch.
        device: the name of the CPU or GPU.
        device_id: the GPU's own number; empty for a CPU.
        driver: of the GPU; empty for a CPU.
    """

    checkpoints: dict[str, str] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    code: str = ""
    packages: dict[str, str] = field(default_factory=dict)
    dtype: str = ""
    device_kind: str = ""
    host: str = ""
    cores: int = 0
    threads: int = 0
    device: str = ""
    device_id: str = ""
    driver: str = ""

    def depend_on(self, *things: Dependency) -> "Identity":
        """Return this identity with further checkpoints and data, or another dtype."""
        whole = self
        for thing in things:
            fields = dict(thing.as_dependency())
            for name in ("checkpoints", "data"):
                fields[name] = getattr(whole, name) | fields.get(name, {})
            whole = replace(whole, **fields)
        return whole

    def as_record(self) -> dict[str, object]:
        """Return the entry of a record."""
        return asdict(self)

    def answers_key(self) -> str:
        """Return a digest of all that answers depend on."""
        values = self.as_record()
        return _digest({name: values[name] for name in ANSWERS})

    def times_key(self) -> str:
        """Return a digest of all that times depend on."""
        return _digest(self.as_record())


def identify(device: torch.device, about: dict | None = None) -> Identity:
    """Return the identity of results that this process gets on a device.

    Args:
        about: what ``machine.describe_machine`` has told; None to ask it, which reads
            all sources and runs git.
    """
    about = about or machine.describe_machine()
    on_gpu = device.type == "cuda"
    return Identity(
        code=about["code_sha256"],
        packages=machine.versions(),
        device_kind=device_kind(device),
        host=hashlib.sha256(platform.node().encode()).hexdigest()[:12],
        cores=len(os.sched_getaffinity(0)),
        threads=about["threads"],
        device=about["gpu"] if on_gpu else about["cpu"],
        device_id=about["gpu_uuid"] if on_gpu else "",
        driver=(about["driver"] or "") if on_gpu else "",
    )


def device_kind(device: torch.device) -> str:
    """Return the kind of a device: equal kinds compute with the same instructions."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"cuda {major}.{minor}"
    units = "16-bit units" if devices.has_half_units(device) else "no 16-bit units"
    return f"cpu {torch.backends.cpu.get_cpu_capability()}, {units}"


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
