"""The variants: points in weights x attention, each a frozen value with a name.

The five variants of the source study keep their names: ``fp32-sdpa`` (the baseline), ``nf4-sdpa``, ``int8-sdpa``,
``nf4-fa2`` and ``int8-fa2``. ``bf16-sdpa`` and ``fp32-math`` stand beside them as controls: quantized variants compute
in 16 bits, and PyTorch's own choice of attention is often a flash kernel already.
"""

from dataclasses import dataclass

from vitnb.errors import UserError, nearest

# How the weights of the Linear layers are held -> the checkpoint that they are loaded from.
CHECKPOINTS = {"fp32": "merged", "bf16": "merged", "nf4": "nf4", "int8": "int8"}


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    weights: ``fp32``, ``bf16`` (16-bit: fp16 on GPUs below SM80), ``nf4`` (4-bit NormalFloat with double quantization,
        QLoRA, arXiv:2305.14314) or ``int8`` (LLM.int8 with outlier threshold 6, arXiv:2208.07339).
    attention: ``sdpa`` (PyTorch's own choice), ``math`` (the reference) or ``fa2`` (FlashAttention-2,
        arXiv:2307.08691; PyTorch's own flash kernel, forced, where flash-attn cannot be had).
    """

    weights: str
    attention: str

    @property
    def name(self) -> str:
        return f"{self.weights}-{self.attention}"

    @property
    def quantized(self) -> bool:
        return self.weights in ("nf4", "int8")

    @property
    def checkpoint(self) -> str:
        """The folder under ``checkpoints/`` that holds this variant's weights."""
        return CHECKPOINTS[self.weights]


BASELINE = "fp32-sdpa"
CONTROL = "bf16-sdpa"  # what computing in 16 bits does by itself: quantized variants compute so

REGISTRY = {
    variant.name: variant
    for variant in (
        Variant("fp32", "sdpa"),
        Variant("bf16", "sdpa"),
        Variant("fp32", "math"),
        Variant("nf4", "sdpa"),
        Variant("nf4", "fa2"),
        Variant("int8", "sdpa"),
        Variant("int8", "fa2"),
    )
}


def get(name: str) -> Variant:
    """Return the variant called ``name``; raises UserError with the nearest right name."""
    if name not in REGISTRY:
        raise UserError(f"unknown variant '{name}': {nearest(name, REGISTRY)}")
    return REGISTRY[name]
