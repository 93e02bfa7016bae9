"""Inspect a checkpoint: is it whole, does it fit its config, can it run here?"""

import json
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForImageClassification

from vitnb import devices
from vitnb.errors import UserError, VariantError, one_line
from vitnb.models import attention, checkpoints, quantization
from vitnb.records.files import MB


def inspect_checkpoint(folder: str | Path) -> list[str]:
    """Inspect a checkpoint and return one line for each part of it.

    Raises:
        UserError: the first thing that is wrong.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"no folder {folder}: "
            "name a checkpoint, such as outputs/embedded/checkpoints/nf4"
        )
    names, size = _read_tensors(checkpoints.require_safetensors(folder))
    _check_index(folder, names)
    config = checkpoints.read_config(folder)
    declared = getattr(config, "quantization_config", None)
    model = _load_plainly(folder)
    quantized, kept = quantization.count_linears(model)
    # First, as a model without the weights that its config declares cannot run.
    quantized_line = _inspect_quantization(names, declared)
    return [
        f"safetensors   whole: {len(names)} tensors, {size / MB:.1f} MB",
        f"config        fits the weights; {quantized} Linears quantized, {kept} kept",
        _inspect_classes(config),
        _inspect_preprocessing(folder, model),
        quantized_line,
        _inspect_machine(),
    ]


def _read_tensors(folder: Path) -> tuple[set[str], int]:
    """Return the names of all tensors and the bytes of their files.

    Every tensor is read, so that a file that was cut is noticed.
    """
    names = set()
    size = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open has no iterator)
                    file.get_tensor(name)
                    names.add(name)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is cut or damaged ({one_line(error)}): make or copy it again"
            ) from None
        size += path.stat().st_size
    return names, size


def _check_index(folder: Path, names: set[str]) -> None:
    """Raise UserError if the index of a divided checkpoint names other tensors."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return
    try:
        missing = set(json.loads(index.read_text())["weight_map"]) - names
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{index} is no index of weights: "
            "copy it again, or delete it if one file holds all"
        ) from None
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} tensors that its index names, "
            f"such as {min(missing)}: copy all its files"
        )


def _load_plainly(folder: Path) -> nn.Module:
    """Load the model as plain transformers does and check that all weights fit."""
    try:
        model, info = AutoModelForImageClassification.from_pretrained(
            folder,
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            device_map={"": devices.select_device()},
            **checkpoints.SAFE,
        )
    except Exception as error:  # transformers may raise anything
        raise UserError(f"{folder} does not load: {one_line(error)}") from None
    if misfits := checkpoints.describe_misfits(info):
        raise UserError(misfits)
    return model


def _inspect_classes(config) -> str:
    """Check that every class has a name of its own."""
    names = [config.id2label.get(i) for i in range(config.num_labels)]
    default_names = [f"LABEL_{i}" for i in range(len(names))]
    if None in names or len(set(names)) != len(names) or names == default_names:
        raise UserError(
            "config.json has no class names of its own (id2label): "
            "export it with 'python -m vitnb run finetune'"
        )
    return f"classes       {len(names)}, from {names[0]} to {names[-1]}"


def _inspect_preprocessing(folder: Path, model: nn.Module) -> str:
    """Check that the model takes the images that the preprocessing gives."""
    processor = checkpoints.load_processor(folder)
    # The file's 16 bits would take minutes on a CPU that emulates them.
    quantization.set_compute_dtype(model, devices.compute_dtype(model.device))
    checkpoints.check_image_size(model, processor, folder)
    height, width = checkpoints.image_sides(processor)
    mean, std = list(processor.image_mean), list(processor.image_std)
    return f"preprocessing {height}x{width}, mean {mean}, std {std}"


def _inspect_quantization(names: set[str], declared) -> str:
    """Check that the tensors are quantized as the config declares.

    Args:
        names: the names of all tensors.
        declared: the config's ``quantization_config``, or None.
    """
    if declared is None:
        return "quantization  none declared, none found"
    if not isinstance(declared, dict):
        declared = declared.to_dict()
    method = declared.get("quant_method")
    if method != "bitsandbytes":
        raise UserError(
            f"config.json declares weights quantized by {method}: "
            "only bitsandbytes is known here"
        )
    if declared.get("load_in_4bit"):
        width, marker = "4-bit", "quant_state"
    else:
        width, marker = "8-bit", "SCB"
    if not any(marker in name for name in names):
        raise UserError(
            f"config.json declares {width} weights and none are there: "
            "export it again with 'python -m vitnb run finetune'"
        )
    kept = ", ".join(declared.get("llm_int8_skip_modules") or ["nothing"])
    return f"quantization  {width}, as declared; kept: {kept}"


def _inspect_machine() -> str:
    """Say on which device this machine would run the checkpoint, and how."""
    device = devices.select_device()
    try:
        fa2 = attention.resolve_backend("fa2", device)
    except VariantError as error:
        fa2 = f"no ({one_line(error)})"
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    if find_spec("bitsandbytes"):
        bnb = "with bitsandbytes"
    else:
        bnb = "without bitsandbytes: quantized variants cannot run"
    dtype = devices.compute_dtype(device)
    return f"this machine  {name}, {dtype} compute, {bnb}; fa2 runs as {fa2}"
