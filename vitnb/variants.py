"""Variants: points in weights x attention x engine, each a frozen value with a name.

The five variants of the source study keep their names: ``fp32-sdpa`` (the baseline),
``nf4-sdpa``, ``int8-sdpa``, ``nf4-fa2`` and ``int8-fa2``. ``bf16-sdpa`` and
``fp32-math`` stand beside them as controls: quantized variants compute in 16 bits, and
PyTorch's own choice of attention is often a flash kernel already.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from vitnb.errors import UserError, suggest

# How the weights of the Linears are stored -> the checkpoint that they come from.
CHECKPOINTS = {
    "fp32": "merged",
    "bf16": "merged",
    "nf4": "nf4",
    "int8": "int8",
    "w8a8": "int8",
    "fp8": "merged",
}
ATTENTIONS = ("sdpa", "math", "fa2", "eager", "mem-efficient", "flash", "cudnn")
ENGINES = ("eager", "graph", "compile", "fused")
PLAN = "plan:"  # begins the weights that a plan describes
PLAN_NAME = re.compile("[A-Za-z0-9_][A-Za-z0-9_.]*")

BASELINE = "fp32-sdpa"
# The control for computing in 16 bits, as quantized variants do.
CONTROL = "bf16-sdpa"
# The source study's variants, and the controls.
SOURCE_STUDY = [
    "fp32-sdpa",
    "bf16-sdpa",
    "fp32-math",
    "nf4-sdpa",
    "nf4-fa2",
    "int8-sdpa",
    "int8-fa2",
]


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    weights:
        ``fp32``; ``bf16`` (16-bit: fp16 on GPUs below SM80);
        ``nf4`` (4-bit NormalFloat with double quantization, QLoRA, arXiv:2305.14314);
        ``int8`` (LLM.int8 with outlier threshold 6, arXiv:2208.07339);
        ``w8a8`` (int8 weights, and every activation in int8: threshold 0);
        ``fp8`` (float8 e4m3 weights and activations, one scale a row);
        ``plan:NAME`` (NF4, but for the Linears that the study's plan of this name keeps
        in 16 or 8 bits: see ``models.plans``).
        All but ``fp32`` and ``bf16`` compute in 16 bits where the hardware multiplies
        16-bit matrices, else in float32: see ``devices.compute_dtype``.
    attention:
        ``sdpa`` (PyTorch's own choice); ``math`` (the reference); ``fa2``
        (FlashAttention-2; PyTorch's own flash kernel where flash-attn cannot be had);
        ``eager``, ``mem-efficient``, ``flash`` or ``cudnn``: see ``models.attention``.
    engine:
        ``eager`` (operator by operator); ``graph`` (CUDA graphs); ``compile``
        (torch.compile); ``fused`` (rearranged, with kernels of its own, in CUDA
        graphs): see ``models.engines``.
    """

    weights: str
    attention: str
    engine: str = "eager"

    @property
    def name(self) -> str:
        """Return ``weights-attention``, and ``-engine`` unless it is eager."""
        return f"{self.weights}-{self.attention}" + (
            f"-{self.engine}" if self.engine != "eager" else ""
        )

    @property
    def file(self) -> str:
        """Return the name for file names: not every system takes a colon."""
        return self.name.replace(":", "-")

    @property
    def quantized(self) -> bool:
        """Tell whether the Linears are stored in 4 or 8 bits."""
        return self.weights not in ("fp32", "bf16")

    @property
    def plan(self) -> str:
        """Return the name of the plan that says which Linears are kept, or nothing."""
        return self.weights.removeprefix(PLAN) if self.weights.startswith(PLAN) else ""

    @property
    def checkpoint(self) -> str:
        """Return the folder under ``checkpoints/`` with this variant's weights."""
        return f"plan-{self.plan}" if self.plan else CHECKPOINTS[self.weights]


def parse(name: str) -> Variant:
    """Return the variant of this name.

    A plan's variant needs no plan yet: a study says which plans there are.

    Raises:
        UserError: no variant has this name; the nearest right name is given.
    """
    weights, _, rest = str(name).partition("-")
    if weights.startswith(PLAN):
        choice = _split(rest)
        if choice is None or not PLAN_NAME.fullmatch(weights.removeprefix(PLAN)):
            raise UserError(
                f"unknown variant '{name}': a plan's is plan:NAME-attention or "
                "plan:NAME-attention-engine, such as plan:NAME-sdpa"
            )
        return Variant(weights, *choice)
    choice = _split(rest)
    if weights not in CHECKPOINTS or choice is None:
        every = sorted(every_variant(), key=sort_key)
        raise UserError(
            f"unknown variant '{name}': {suggest(name, [v.name for v in every])}"
        )
    return Variant(weights, *choice)


def _split(rest: str) -> tuple[str, str] | None:
    """Split ``attention`` or ``attention-engine``; None where either is unknown.

    Names of attentions hold dashes themselves, and ``-eager`` is never written out.
    """
    for engine in ENGINES:
        attention = rest if engine == "eager" else rest.removesuffix(f"-{engine}")
        if attention in ATTENTIONS and (engine == "eager" or attention != rest):
            return attention, engine
    return None


def every_variant() -> list[Variant]:
    """Return every variant but those of plans."""
    return [Variant(*choice) for choice in product(CHECKPOINTS, ATTENTIONS, ENGINES)]


def sort_key(variant: Variant) -> tuple:
    """Order variants in tables and figures.

    The source study's come first, then all others weights by weights, then plans.
    """
    if variant.name in SOURCE_STUDY:
        return 0, SOURCE_STUDY.index(variant.name)
    choice = ATTENTIONS.index(variant.attention), ENGINES.index(variant.engine)
    if variant.plan:
        return 2, variant.plan, *choice
    return 1, list(CHECKPOINTS).index(variant.weights), *choice


def sort_names(names: Iterable[str]) -> list[str]:
    """Sort names of variants by ``sort_key``."""
    return sorted(names, key=lambda name: sort_key(parse(name)))
