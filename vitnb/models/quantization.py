"""Weight quantization: which Linears are quantized, how, and how many bytes they take.

- NF4 is 4-bit NormalFloat with double quantization (QLoRA, arXiv:2305.14314), by
  bitsandbytes.
- int8 is LLM.int8 (arXiv:2208.07339), by bitsandbytes.
- fp8 is float8 e4m3 (FP8 formats, arXiv:2209.05433) with one scale for each row, by
  this module. Weights and activations are both quantized, so that the tensor cores
  multiply 8-bit numbers, at twice their 16-bit rate on Hopper.

The classification head is never quantized: it is small, it was just trained, and its
size fits no 4-bit block.
"""

from collections.abc import Callable, Iterable

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import BitsAndBytesConfig

from vitnb import devices
from vitnb.errors import UserError, VariantError
from vitnb.models import layers, nf4

OUTLIER_THRESHOLD = 6.0  # LLM.int8 multiplies larger activations in 16 bits, by column


def check_float8(on: torch.device) -> None:
    """Raise VariantError on a GPU without float8 units.

    A CPU is accepted: it computes the same numbers slowly.
    """
    if on.type == "cuda" and torch.cuda.get_device_capability(on) < (8, 9):
        raise VariantError(
            "fp8 needs a GPU of SM89 or newer (Ada, Hopper): use int8 or nf4"
        )


def float8_product(
    x, x_scale, weight, weight_scale, bias=None, dtype=torch.bfloat16
) -> torch.Tensor:
    """Multiply float8 rows by float8 weights.

    Args:
        x: float8 [rows, in].
        x_scale: float32 [rows, 1].
        weight: float8 [out, in].
        weight_scale: float32 [out, 1].
        bias: [out], or None.
        dtype: the type of the result.

    Returns:
        [rows, out] in ``dtype``.
    """
    if x.is_cuda:
        return torch._scaled_mm(
            x,
            weight.t(),
            x_scale,
            weight_scale.t(),
            bias,
            out_dtype=dtype,
            use_fast_accum=True,
        )
    out = (x.float() @ weight.float().t()) * x_scale * weight_scale.t()
    if bias is not None:
        out = out + bias.float()
    return out.to(dtype)


class Float8Linear(nn.Linear):
    """A Linear with float8 weights that quantizes its input row by row.

    Args:
        quantize_rows: ``quantize_rows`` of ``fused.operations``. No lookup may stand in
            a forward that is timed.
    """

    def __init__(self, linear: nn.Linear, quantize_rows: Callable):
        has_bias = linear.bias is not None
        super().__init__(
            linear.in_features, linear.out_features, has_bias, device="meta"
        )
        self.quantize_rows = quantize_rows
        weight, scale = self.quantize_rows(linear.weight.data)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None
        if has_bias:
            self.bias = nn.Parameter(linear.bias.data, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out] in the type of ``x``."""
        rows, row_scale = self.quantize_rows(x.reshape(-1, self.in_features))
        out = float8_product(
            rows, row_scale, self.weight, self.scale, self.bias, x.dtype
        )
        return out.view(*x.shape[:-1], -1)


QUANTIZED = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt, Float8Linear)


def modules_to_skip(model: nn.Module, prefixes: Iterable[str] = ()) -> list[str]:
    """Return the full names of the Linears to keep in 16 bits.

    The names come from the model itself, because the loader ignores a pattern that
    matches nothing without a word.

    Args:
        model: a model with a classification head, which is always kept.
        prefixes: names of Linears, or of modules whose Linears are all kept.

    Raises:
        UserError: a prefix adds no Linear.
    """
    kept = {layers.head_name(model)}
    for prefix in prefixes:
        matched = {
            name
            for name in layers.linears(model)
            if name == prefix or name.startswith(f"{prefix}.")
        }
        if not matched - kept:
            raise UserError(
                f"keeping '{prefix}' changes nothing: "
                "no quantized Linear has a name that starts so"
            )
        kept |= matched
    return sorted(kept)


def bnb_config(
    weights: str, kept: list[str], compute_dtype: torch.dtype = torch.bfloat16
) -> BitsAndBytesConfig:
    """Return the loader's configuration for ``nf4`` or ``int8`` weights.

    Args:
        weights: ``nf4`` or ``int8``.
        kept: full names of the Linears to keep in 16 bits; see ``modules_to_skip``.
        compute_dtype: the type that NF4 weights are unpacked to for a product.
    """
    if weights == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
            llm_int8_skip_modules=kept,
        )
    return BitsAndBytesConfig(
        load_in_8bit=True,
        llm_int8_threshold=OUTLIER_THRESHOLD,
        llm_int8_skip_modules=kept,
    )


def quantized_copy(
    linear: nn.Linear, bits: int, compute_dtype: torch.dtype
) -> nn.Module:
    """Return a quantized copy of a Linear, on its device, as the loader makes it.

    It has the bits of an export, which quantizes 16-bit weights: a float32 weight is
    rounded to the device's 16-bit type first. What a CPU packs in an export, it packs
    in a copy; see ``nf4``.

    Args:
        linear: the Linear to copy.
        bits: 4 (NF4 with double quantization) or 8 (LLM.int8).
        compute_dtype: the type that a 4-bit copy computes in.
    """
    device = linear.weight.device
    weight = linear.weight.data.clone()
    if weight.dtype == torch.float32:
        weight = weight.to(devices.half_dtype(device))
    size = (linear.in_features, linear.out_features)
    has_bias = linear.bias is not None
    if bits == 4:
        kind = {"quant_type": "nf4", "compress_statistics": True}
        copy = bnb.nn.Linear4bit(
            *size, bias=has_bias, compute_dtype=compute_dtype, **kind
        )
        copy.weight = bnb.nn.Params4bit(weight, requires_grad=False, **kind)
        nf4.allow_cpu_packing(copy, compute_dtype)
    else:
        copy = bnb.nn.Linear8bitLt(
            *size, bias=has_bias, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD
        )
        copy.weight = bnb.nn.Int8Params(
            weight, requires_grad=False, has_fp16_weights=False
        )
    if has_bias:
        copy.bias = nn.Parameter(linear.bias.data.clone(), requires_grad=False)
    return copy.to(device).eval()


def to_fp8(model: nn.Module, quantize_rows: Callable) -> nn.Module:
    """Replace every Linear but the head by a ``Float8Linear``, in place."""
    for name, module in layers.quantizable(model).items():
        model.set_submodule(name, Float8Linear(module, quantize_rows))
    return model


def disable_outliers(model: nn.Module) -> nn.Module:
    """Multiply every activation of an int8 model in int8.

    LLM.int8 multiplies columns with outliers in 16 bits. Threshold 0 turns that off.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            module.state.threshold = 0.0
    return model


def set_compute_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Make a loaded model compute in ``dtype``, whatever its checkpoint holds.

    transformers (5.23) leaves the weights of a quantized checkpoint in the file's
    bfloat16 where float32 is asked for, while biases come in float32. So every
    floating-point parameter is cast here.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = dtype
    nf4.allow_cpu_packing(model, dtype)


def count_linears(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of quantized and of other Linears, read from the model."""
    modules = layers.linears(model).values()
    quantized = sum(isinstance(module, QUANTIZED) for module in modules)
    return quantized, len(modules) - quantized


def check_counts(
    model: nn.Module, quantized: bool, planned: dict[str, int] | None = None
) -> tuple[int, int]:
    """Check that all Linears but the head are quantized, or none; return the counts.

    Args:
        model: the model as loaded.
        quantized: whether its Linears should be quantized.
        planned: {full name: bits}, the Linears that a plan keeps in 16 or 8 bits. Each
            is looked up by its name. All others should be in 4 bits.

    Returns:
        The numbers of quantized and of other Linears.

    Raises:
        VariantError: another number is quantized, the head is, or a planned Linear has
            another width.
    """
    planned = planned or {}
    modules = layers.linears(model)
    counts = count_linears(model)
    kept = sum(bits == 16 for bits in planned.values())
    expected = (len(modules) - 1 - kept, 1 + kept) if quantized else (0, len(modules))
    head_is_quantized = isinstance(modules[layers.head_name(model)], QUANTIZED)
    if counts != expected or head_is_quantized:
        raise VariantError(
            f"{counts[0]} Linears are quantized and {counts[1]} kept; "
            f"expected {expected[0]} and {expected[1]}, the head kept"
        )
    types = {16: nn.Linear, 8: bnb.nn.Linear8bitLt}
    for name, bits in planned.items():
        if type(modules.get(name)) is not types[bits]:
            raise VariantError(
                f"the plan has {name} in {bits} bits, and the model does not: "
                "make the plan again"
            )
    return counts


def num_parameters(model: nn.Module) -> int:
    """Return the number of weights, whatever type they are stored in.

    A 4-bit parameter stores two weights in a byte, so its own size says too little.
    """
    return sum(
        parameter.quant_state.shape.numel()
        if getattr(parameter, "quant_state", None)
        else parameter.numel()
        for parameter in model.parameters()
    )


def resident_bytes(model: nn.Module) -> int:
    """Return the bytes that a loaded model holds in memory.

    Counted are parameters, buffers and quantization state. Shared storage counts once.
    NF4 weights count as they are: call ``nf4.pack_for_cpu`` before, or a CPU that packs
    them in the first forward holds other bytes afterwards.
    """
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            tensors += _state_tensors(getattr(module.weight, "quant_state", None))
        elif isinstance(module, bnb.nn.Linear8bitLt):
            state = module.state
            scales = (state.CB, state.SCB, getattr(module.weight, "SCB", None))
            tensors += [tensor for tensor in scales if tensor is not None]
    sizes = {t.data_ptr(): t.numel() * t.element_size() for t in tensors}
    return sum(sizes.values())


def _state_tensors(state) -> list[torch.Tensor]:
    """Return the tensors of a 4-bit quantization state, the nested state's included.

    The state of packed weights has no nested one.
    """
    if state is None:
        return []
    own = [
        tensor
        for tensor in (state.absmax, state.code, state.offset)
        if isinstance(tensor, torch.Tensor)
    ]
    return own + _state_tensors(getattr(state, "state2", None))
