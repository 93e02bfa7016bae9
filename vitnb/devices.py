"""Devices: which one to run on, and in which type to compute there."""

import gc
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from vitnb.errors import UserError

if TYPE_CHECKING:
    from vitnb.study import Study


def select_device(asked: str | None = None) -> torch.device:
    """Return the device that was asked for; without a wish the GPU if PyTorch sees one.

    Args:
        asked: ``cpu``, ``cuda`` or None.

    Raises:
        UserError: another name, or a GPU that is not there.
    """
    if asked not in (None, "cpu", "cuda"):
        raise UserError(f"device must be cpu or cuda, got '{asked}'")
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device cuda was asked for, and PyTorch sees no NVIDIA GPU: "
            "leave it out, or ask for cpu"
        )
    return torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))


def half_dtype(device: torch.device) -> torch.dtype:
    """Return the 16-bit type of a device.

    It is bfloat16, and float16 on GPUs below SM80, which have no bfloat16 units.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return torch.bfloat16


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a type as records hold it, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def has_half_units(device: torch.device) -> bool:
    """Tell whether the hardware multiplies 16-bit matrices itself.

    A CPU without AVX512-BF16 and AMX emulates every 16-bit product, which takes four to
    eight times as long as float32.
    """
    if device.type == "cuda":
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the type that quantized variants compute in on a device.

    It is the 16-bit type where the hardware has units for it, else float32.
    """
    return half_dtype(device) if has_half_units(device) else torch.float32


def autocast(device: torch.device):
    """Autocast to 16 bits where the hardware has units for it, else change nothing."""
    if has_half_units(device):
        return torch.autocast(device.type, half_dtype(device))
    return nullcontext()


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work. On a CPU, return at once."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def free_memory(device: torch.device) -> None:
    """Free what earlier work has left on a GPU: garbage, workspaces, cached blocks.

    Live tensors stay. On a CPU, only garbage is collected.
    """
    gc.collect()  # modules refer to each other in circles
    if device.type == "cuda":
        torch.cuda.synchronize()
        # cuBLAS keeps a workspace for each stream that it has ever run on.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def check_requirements(study: "Study") -> None:
    """Raise UserError if the study needs a GPU and there is none."""
    if study.requires == "gpu" and not torch.cuda.is_available():
        raise UserError(
            f"study '{study.name}' needs an NVIDIA GPU, and PyTorch sees none: "
            "run it on a GPU machine"
        )
