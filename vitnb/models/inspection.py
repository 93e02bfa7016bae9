"""Checks of a checkpoint folder: what is in it, whether it is whole, and what this machine can run of it."""

import json
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForImageClassification

from vitnb import devices
from vitnb.errors import UserError, VariantError, one_line
from vitnb.models import attention, checkpoints, quantization


def inspect_checkpoint(folder: str | Path) -> list[str]:
    """Look through a checkpoint; return what was found, a line each. Raises UserError at the first thing wrong."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: name a checkpoint, such as outputs/embedded/checkpoints/nf4")
    names, size = _weights(checkpoints.require_safetensors(folder))
    lines = [f"safetensors   whole: {len(names)} tensors, {size / 2**20:.1f} MB"]
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # whatever transformers trips over
        raise UserError(f"{folder / 'config.json'} cannot be read: {one_line(error)}") from None
    lines += [_fits(folder), _classes(config), _preprocessing(folder, config)]
    declared = getattr(config, "quantization_config", None)
    lines += [_quantization(folder, declared), "this machine  " + _machine(declared)]
    return lines


def _weights(folder: Path) -> tuple[set[str], int]:
    """Names of all tensors and the bytes of their files; reads every tensor, so that a cut file is found."""
    names, size = set(), 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open has no iterator)
                    file.get_tensor(name)
                    names.add(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is cut or damaged ({one_line(error)}): make or copy it again") from None
        size += path.stat().st_size
    index = folder / "model.safetensors.index.json"
    try:
        missing = set(json.loads(index.read_text())["weight_map"]) - names if index.exists() else set()
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{index} is no index of weights: copy it again, or delete it if one file holds all") from None
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} tensors that its index names, such as {min(missing)}: copy all its files"
        )
    return names, size


def _fits(folder: Path) -> str:
    """Load it as transformers does, and let no key be missing, left over or of another shape."""
    try:
        model, found = AutoModelForImageClassification.from_pretrained(
            folder,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            device_map={"": devices.select_device()},
        )
    except Exception as error:  # whatever transformers trips over
        raise UserError(f"{folder} does not load: {one_line(error)}") from None
    if wrong := checkpoints.describe_misfits(found):
        raise UserError(wrong)
    quantized, kept = quantization.count_linears(model)
    return f"config        fits the weights; {quantized} Linears quantized, {kept} kept"


def _classes(config) -> str:
    names = [config.id2label.get(i) for i in range(config.num_labels)]
    if None in names or len(set(names)) != len(names) or names == [f"LABEL_{i}" for i in range(len(names))]:
        raise UserError(
            "config.json has no class names of its own (id2label): export it with 'python -m vitnb run finetune'"
        )
    return f"classes       {len(names)}, from {names[0]} to {names[-1]}"


def _preprocessing(folder: Path, config) -> str:
    processor = checkpoints.load_processor(folder)
    size = (processor.size["height"], processor.size["width"])
    expected = config.image_size if isinstance(config.image_size, (list, tuple)) else (config.image_size,) * 2
    if tuple(expected) != size:
        raise UserError(
            f"preprocessing makes {size} pixels and the model takes {tuple(expected)}: "
            "copy the preprocessor_config.json that it was trained with"
        )
    return f"preprocessing {size[0]}x{size[1]}, mean {list(processor.image_mean)}, std {list(processor.image_std)}"


def _quantization(folder: Path, declared) -> str:
    if declared is None:
        return "quantization  none declared, none found"
    declared = declared if isinstance(declared, dict) else declared.to_dict()
    if declared.get("quant_method") != "bitsandbytes":
        raise UserError(
            f"config.json declares weights quantized by {declared.get('quant_method')}: only bitsandbytes is known here"
        )
    wanted = "4-bit" if declared.get("load_in_4bit") else "8-bit"
    marks = {"4-bit": "quant_state", "8-bit": "SCB"}
    names, _ = _weights(folder)
    if not any(marks[wanted] in name for name in names):
        raise UserError(
            f"config.json declares {wanted} weights and none are there: export it again with 'python -m vitnb run finetune'"
        )
    return (
        f"quantization  {wanted}, as declared; kept: {', '.join(declared.get('llm_int8_skip_modules') or ['nothing'])}"
    )


def _machine(declared) -> str:
    on = devices.select_device()
    try:
        fa2 = attention.resolve_backend("fa2", on)
    except VariantError as error:
        fa2 = f"no ({one_line(error)})"
    name = torch.cuda.get_device_name() if on.type == "cuda" else "CPU"
    bnb = "with bitsandbytes" if find_spec("bitsandbytes") else "without bitsandbytes: quantized variants cannot run"
    return f"{name}, {devices.compute_dtype(on)} compute, {bnb}; fa2 runs as {fa2}"
