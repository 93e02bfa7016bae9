"""Weight quantization with bitsandbytes: what is quantized, what is kept, and how many bytes it holds.

NF4 is 4-bit NormalFloat with double quantization (QLoRA, arXiv:2305.14314); int8 is LLM.int8 (arXiv:2208.07339).
The classification head is never quantized: it is small, it was just trained, and its size fits no 4-bit block.

Float8 products: activations and weights in e4m3 with one scale for each row (FP8 formats, arXiv:2209.05433).

Both sides are quantized, so that the tensor cores multiply 8-bit numbers: twice their 16-bit rate on Hopper.
"""

from collections.abc import Iterable

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import BitsAndBytesConfig

from vitnb.errors import UserError, VariantError
from vitnb.models import layers
from vitnb.models.nf4 import NF4_BLOCK

PACKED_ROWS = 32  # of a 4-bit weight that bitsandbytes packs together on a CPU


OUTLIER_THRESHOLD = 6.0  # LLM.int8: columns of activations beyond it are multiplied in 16 bits




def modules_to_skip(model: nn.Module, prefixes: Iterable[str] = ()) -> list[str]:
    """Full names of the Linears to keep in 16 bits: those under ``prefixes``, and always the head.

    Built from the model's own names, because a pattern that matches nothing is ignored in silence by the loader.
    Raises UserError for a prefix that matches no Linear.
    """
    kept = {layers.head_name(model)}
    for prefix in prefixes:
        matched = {name for name in layers.linears(model) if name == prefix or name.startswith(f"{prefix}.")}
        if not matched - kept:
            raise UserError(f"keeping '{prefix}' changes nothing: no quantized Linear has a name that starts so")
        kept |= matched
    return sorted(kept)


def bnb_config(weights: str, kept: list[str], compute_dtype: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """The loader's configuration for ``nf4`` or ``int8``, with the Linears to keep by their full names."""
    if weights == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
            llm_int8_skip_modules=kept,
        )
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=OUTLIER_THRESHOLD, llm_int8_skip_modules=kept)


def count_linears(model: nn.Module) -> tuple[int, int]:
    """(quantized, kept): the numbers of Linears, read from the model as it is."""
    modules = layers.linears(model).values()
    quantized = sum(isinstance(module, QUANTIZED) for module in modules)
    return quantized, len(modules) - quantized


def num_parameters(model: nn.Module) -> int:
    """The number of weights, whatever they are stored in (a 4-bit parameter holds two to a byte)."""
    return sum(
        p.quant_state.shape.numel() if getattr(p, "quant_state", None) else p.numel() for p in model.parameters()
    )


def check_counts(model: nn.Module, quantized: bool, planned: dict[str, int] | None = None) -> tuple[int, int]:
    """The counts, once it is sure that all Linears but the head are quantized, or none is; else VariantError.

    ``planned``: Linears that a plan has in 16 or 8 bits ({full name: bits}), the others being in 4; looked up one by one.
    """
    found, planned = count_linears(model), planned or {}
    total, kept = sum(found), sum(bits == 16 for bits in planned.values())
    wanted = (total - 1 - kept, 1 + kept) if quantized else (0, total)
    if found != wanted or isinstance(layers.linears(model)[layers.head_name(model)], QUANTIZED):
        raise VariantError(
            f"{found[0]} Linears are quantized and {found[1]} kept; expected {wanted[0]} and {wanted[1]}, the head kept"
        )
    modules, kinds = layers.linears(model), {16: nn.Linear, 8: bnb.nn.Linear8bitLt}
    for name, bits in planned.items():
        if type(modules.get(name)) is not kinds[bits]:
            raise VariantError(f"the plan has {name} in {bits} bits, and the model does not: make the plan again")
    return found


def quantized_copy(linear: nn.Linear, bits: int, compute_dtype: torch.dtype) -> nn.Module:
    """A 4-bit (NF4, double quantization) or 8-bit copy of a Linear, on its device, as the loader would make it."""
    shape, bias = (linear.in_features, linear.out_features), linear.bias is not None
    if bits == 4:
        copy = bnb.nn.Linear4bit(
            *shape, bias=bias, compute_dtype=compute_dtype, quant_type="nf4", compress_statistics=True
        )
        copy.weight = bnb.nn.Params4bit(
            linear.weight.data.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        copy.support_avx512bf16_for_cpu = False
    else:
        copy = bnb.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD)
        copy.weight = bnb.nn.Int8Params(linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    if bias:
        copy.bias = nn.Parameter(linear.bias.data.clone(), requires_grad=False)
    return copy.to(linear.weight.device).eval()


def disable_outliers(model: nn.Module) -> nn.Module:
    """Multiply every activation of an int8 model in int8: LLM.int8 without its 16-bit columns of outliers (threshold 0)."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            module.state.threshold = 0.0
    return model


def to_fp8(model: nn.Module) -> nn.Module:
    """Replace every Linear of a 16-bit model but the head by its float8 form."""
    kept = modules_to_skip(model)
    for name, module in layers.linears(model).items():
        if name not in kept:
            model.set_submodule(name, Float8Linear(module))
    return model


def disable_cpu_packing(model: nn.Module, only_uneven: bool = False) -> nn.Module:
    """Turn off the repacking of 4-bit weights on CPUs with AVX512-BF16, for models that are trained or saved.

    The first evaluation forward repacks in place; after it training crashes and a save differs (bitsandbytes 0.50).
    ``only_uneven``: only what cannot be packed, rows that are no whole number of blocks of 64 weights (as Swin-T's of 96), or
    not 32 together.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit) and (
            not only_uneven or module.in_features % NF4_BLOCK or module.out_features % PACKED_ROWS
        ):
            module.support_avx512bf16_for_cpu = False
    return model


def _state_tensors(state) -> Iterable[torch.Tensor]:
    """The tensors of a (nested) 4-bit quantization state."""
    if state is not None:
        yield from (tensor for tensor in (state.absmax, state.code, state.offset) if isinstance(tensor, torch.Tensor))
        yield from _state_tensors(state.state2)


def resident_bytes(model: nn.Module) -> int:
    """Bytes that the loaded model holds: parameters, buffers and quantization state, shared storage counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            tensors += _state_tensors(getattr(module.weight, "quant_state", None))
        elif isinstance(module, bnb.nn.Linear8bitLt):
            tensors += [
                t for t in (module.state.CB, module.state.SCB, getattr(module.weight, "SCB", None)) if t is not None
            ]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def check_float8(on: torch.device) -> None:
    """Raise VariantError on a GPU without float8 units; a CPU computes the same numbers slowly."""
    if on.type == "cuda" and torch.cuda.get_device_capability(on) < (8, 9):
        raise VariantError("fp8 needs a GPU of SM89 or newer (Ada, Hopper): use int8 or nf4")


def float8_product(x, x_scale, weight, weight_scale, bias=None, dtype=torch.bfloat16) -> torch.Tensor:
    """float8 [rows, in] x float8 [out, in] with scales [rows, 1] and [out, 1] -> [rows, out] in ``dtype``."""
    if x.is_cuda:
        return torch._scaled_mm(x, weight.t(), x_scale, weight_scale.t(), bias, out_dtype=dtype, use_fast_accum=True)
    out = (x.float() @ weight.float().t()) * x_scale * weight_scale.t()
    return (out if bias is None else out + bias.float()).to(dtype)


class Float8Linear(nn.Linear):
    """A Linear with float8 weights that quantizes its input row by row."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        from vitnb.models.fused import operations  # late: most models have no float8

        # Chosen once: no lookup stands in a forward that is timed.
        self.quantize_rows = operations(linear.weight.device).quantize_rows
        weight, scale = self.quantize_rows(linear.weight.data)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.data, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.quantize_rows(x.reshape(-1, self.in_features))
        return float8_product(*rows, self.weight, self.scale, self.bias, x.dtype).view(*x.shape[:-1], -1)


QUANTIZED = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt, Float8Linear)
