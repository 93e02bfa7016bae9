"""The variants: points in weights x attention x engine, each a frozen value with a name.

The five variants of the source study keep their names: ``fp32-sdpa`` (the baseline), ``nf4-sdpa``, ``int8-sdpa``,
``nf4-fa2`` and ``int8-fa2``. ``bf16-sdpa`` and ``fp32-math`` stand beside them as controls: quantized variants compute
in 16 bits, and PyTorch's own choice of attention is often a flash kernel already.
"""

import re
from dataclasses import dataclass
from itertools import product

from vitnb.errors import UserError, nearest

# How the weights of the Linear layers are held -> the checkpoint that they are loaded from.
CHECKPOINTS = {"fp32": "merged", "bf16": "merged", "nf4": "nf4", "int8": "int8", "w8a8": "int8", "fp8": "merged"}
ATTENTIONS = ("sdpa", "math", "fa2", "eager", "mem-efficient", "flash", "cudnn")
ENGINES = ("eager", "graph", "compile", "fused")
PLAN = "plan:"  # begins the weights that a plan describes
PLAN_NAME = re.compile("[A-Za-z0-9_][A-Za-z0-9_.]*")


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    weights: ``fp32``, ``bf16`` (16-bit: fp16 on GPUs below SM80), ``nf4`` (4-bit NormalFloat with double quantization,
        QLoRA, arXiv:2305.14314), ``int8`` (LLM.int8 with outlier threshold 6, arXiv:2208.07339), ``w8a8`` (the same int8
        weights with every activation in int8, threshold 0), ``fp8`` (float8 e4m3 weights and activations, one scale a row) or
        ``plan:NAME`` (NF4 but for what the study's plan of this name keeps in 16 or 8 bits: see ``plans``).
    attention: ``sdpa`` (PyTorch's own choice), ``math`` (the reference), ``fa2`` (FlashAttention-2; PyTorch's own flash
        kernel where flash-attn cannot be had), ``eager``, ``mem-efficient``, ``flash`` or ``cudnn``: see ``attention``.
    engine: how the forward is launched: ``eager`` (operator by operator), ``graph`` (CUDA graphs), ``compile``
        (torch.compile) or ``fused`` (rearranged, with kernels of its own, in CUDA graphs): see ``engines``.
    """

    weights: str
    attention: str
    engine: str = "eager"

    @property
    def name(self) -> str:
        """``weights-attention``, and ``-engine`` unless it is eager."""
        return f"{self.weights}-{self.attention}" + (f"-{self.engine}" if self.engine != "eager" else "")

    @property
    def file(self) -> str:
        """The name in file names: not every system takes a colon."""
        return self.name.replace(":", "-")

    @property
    def quantized(self) -> bool:
        return self.weights not in ("fp32", "bf16")

    @property
    def plan(self) -> str:
        """The name of the plan that says what is kept, or nothing."""
        return self.weights.removeprefix(PLAN) if self.weights.startswith(PLAN) else ""

    @property
    def checkpoint(self) -> str:
        """The folder under ``checkpoints/`` that holds this variant's weights."""
        return f"plan-{self.plan}" if self.plan else CHECKPOINTS[self.weights]


BASELINE = "fp32-sdpa"
CONTROL = "bf16-sdpa"  # what computing in 16 bits does by itself: quantized variants compute so
# What the source study ran, and the controls.
SOURCE = ["fp32-sdpa", "bf16-sdpa", "fp32-math", "nf4-sdpa", "nf4-fa2", "int8-sdpa", "int8-fa2"]

_EVERY = {v.name: v for v in (Variant(*choice) for choice in product(CHECKPOINTS, ATTENTIONS, ENGINES))}
# Every variant there is, in the order of tables and figures: the source study's, then weights by weights.
REGISTRY = {name: _EVERY[name] for name in (*SOURCE, *_EVERY)}


def get(name: str) -> Variant:
    """Return the variant called ``name``; raises UserError with the nearest right name.

    A plan's variant enters the registry when it is first named, after all others: which plans there are is for the studies to say.
    """
    if name not in REGISTRY and str(name).startswith(PLAN):
        plan, _, rest = name.removeprefix(PLAN).partition("-")
        like = _EVERY.get(f"nf4-{rest}")
        if not like or not PLAN_NAME.fullmatch(plan):
            raise UserError(
                f"unknown variant '{name}': a plan's is plan:NAME-attention or plan:NAME-attention-engine, such as plan:NAME-sdpa"
            )
        REGISTRY[name] = Variant(PLAN + plan, like.attention, like.engine)
    if name not in REGISTRY:
        raise UserError(f"unknown variant '{name}': {nearest(name, REGISTRY)}")
    return REGISTRY[name]
