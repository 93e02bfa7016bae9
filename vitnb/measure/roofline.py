"""Count the operations of a forward, by the kind of product that they run in.

Together with the ceilings of the machine they give the shortest time that the
arithmetic of a forward can take (Williams et al., *Roofline*, 2009).
"""

from collections import Counter

import bitsandbytes as bnb
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification

from vitnb import devices
from vitnb.models import checkpoints, layers
from vitnb.models.loader import LoadedVariant
from vitnb.models.quantization import Float8Linear


def count_flops(config, batch_size: int, sides: tuple[int, int] | None = None) -> int:
    """Count the floating-point operations of one forward, 2 for a multiply-add.

    Products of matrices, attention and convolution count. A quantized variant counts as
    its unquantized model.

    Args:
        sides: height and width of the images in pixels; None: those of the config.
    """
    return _count_by_linear(config, batch_size, sides)[0]


def count_by_kind(
    loaded: LoadedVariant, batch_sizes: list[int]
) -> dict[str, dict[str, dict[str, int]]]:
    """Count the operations of a forward at each batch size, by kind of product.

    Kinds are those of ``ceilings.measure_ceilings``. A 4-bit weight is unpacked and
    multiplied in the type that the model computes in. The columns that LLM.int8
    multiplies in 16 bits count as int8. Operations that a fused forward leaves out do
    not count as done.

    Returns:
        flops: {batch size: {kind: operations}}.
    """
    sides = checkpoints.image_sides(loaded.processor)
    dtype = devices.dtype_name(loaded.dtype)
    flops = {}
    for size in batch_sizes:
        total, by_linear = _count_by_linear(loaded.model.config, size, sides)
        kinds = _linear_kinds(loaded, list(by_linear))
        counted = Counter({dtype: total})
        for name, kind in kinds.items():
            counted[dtype] -= by_linear[name]
            counted[kind] += by_linear[name]
        if hasattr(loaded.model, "flops_left_out"):
            # They belong to quantized Linears, if any are.
            kind = next(iter(kinds.values()), dtype)
            counted[kind] -= loaded.model.flops_left_out(size)
        flops[str(size)] = dict(counted)
    return {"flops": flops}


def _count_by_linear(
    config, batch_size: int, sides: tuple[int, int] | None
) -> tuple[int, dict[str, int]]:
    """Return the operations of a forward, and those of each Linear by its full name.

    PyTorch counts them on a model without memory.
    """
    settings = config.to_dict()
    settings.pop("quantization_config", None)
    if sides is None:
        side = config.image_size
        sides = tuple(side) if isinstance(side, (list, tuple)) else (side, side)
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(
            type(config).from_dict(settings),
            attn_implementation="eager",
            dtype=torch.float32,
        ).eval()
        pixels = torch.empty(batch_size, config.num_channels, *sides)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values=pixels)
    counts = counter.get_flop_counts()
    by_linear = {
        name: sum(counts.get(f"{type(model).__name__}.{name}", {}).values())
        for name in layers.linears(model)
    }
    return counter.get_total_flops(), by_linear


def _linear_kinds(loaded: LoadedVariant, names: list[str]) -> dict[str, str]:
    """Return {full name: kind} of the Linears with 8-bit products.

    Args:
        names: of all Linears; the head is the last.
    """
    if loaded.variant.engine == "fused":  # its Linears were joined, all but the head
        return dict.fromkeys(names[:-1], "float8") if _is_float8(loaded) else {}
    linears = layers.linears(loaded.model)
    return {name: kind for name in names if (kind := _kind(linears[name]))}


def _is_float8(loaded: LoadedVariant) -> bool:
    return loaded.variant.weights == "fp8"


def _kind(linear: nn.Linear) -> str:
    """Return the kind of an 8-bit Linear's product; nothing for another Linear."""
    if isinstance(linear, bnb.nn.Linear8bitLt):
        return "int8"
    return "float8" if isinstance(linear, Float8Linear) else ""
