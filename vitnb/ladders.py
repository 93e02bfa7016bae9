"""Ladders: from fp32 down, each step with one technique more than the step before. ``waterfall`` measures them."""

from dataclasses import dataclass

from vitnb import variants
from vitnb.fused.vit import TECHNIQUES

# What each technique is, for people.
TOLD = {
    "fp32, operator by operator": "full precision (TensorFloat-32 off), every operator launched by Python: where each ladder begins",
    "16 bits": "bfloat16 weights and activations: half of the bytes, and the tensor cores",
    "4 bits, NF4": "NF4 weights by bitsandbytes, unpacked to 16 bits before each product",
    "8 bits, LLM.int8": "int8 weights by bitsandbytes, threshold 6: outlier columns of the activations are multiplied in 16 bits",
    "int8 activations": "the same int8 weights with threshold 0: no outliers are looked for",
    "float8 in place of int8": "weights and activations in float8 (e4m3), one scale a row",
    "CUDA graph": "the launches of a forward are recorded once and replayed together: the GPU no longer waits for Python",
    "rearranged": "the forward that the rows below change, in plain operations and a CUDA graph: where their gains begin",
    "one pass": "NF4 weights of a block are unpacked by one kernel in two launches, into a scratch that all blocks share",
    "patches": "the patch convolution as a copy and a product",
    "qkv": "query, key and value as one product",
    "stream": "what a block adds to the residual stream is added by the product itself",
    "norm": "residual and layer norm in one pass over memory",
    "gelu": "the exact GELU in place, by a kernel of its own",
    "class token": "behind the attention of the last block only the class token is computed",
    "all of the fused forward": "everything that the other ladders add behind the CUDA graph, at once",
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One rung of a ladder: the technique that it adds, and what runs then.

    techniques: those of the fused engine, see ``fused.vit``; None for all of them, and for another engine.
    """

    technique: str
    variant: str
    techniques: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """What runs: equal names are one model."""
        return self.variant + ("" if self.techniques is None else f": {', '.join(self.techniques) or 'none'}")


def _fused(variant: str, names: list[str]) -> list[Step]:
    return [
        Step("rearranged", variant, ()),
        *(Step(name, variant, tuple(names[: i + 1])) for i, name in enumerate(names)),
    ]


FIRST = Step("fp32, operator by operator", variants.BASELINE)
LADDERS = {
    "16 bits": [
        FIRST, Step("16 bits", "bf16-sdpa"), Step("CUDA graph", "bf16-sdpa-graph"),
        *_fused("bf16-sdpa-fused", [name for name in TECHNIQUES if name != "one pass"]),
    ],
    "4 bits": [
        FIRST, Step("4 bits, NF4", "nf4-sdpa"), Step("CUDA graph", "nf4-sdpa-graph"), *_fused("nf4-sdpa-fused", [*TECHNIQUES]),
    ],
    "8 bits": [
        FIRST, Step("8 bits, LLM.int8", "int8-sdpa"), Step("int8 activations", "w8a8-sdpa"), Step("CUDA graph", "w8a8-sdpa-graph"),
        Step("float8 in place of int8", "fp8-sdpa-graph"), Step("all of the fused forward", "fp8-sdpa-fused"),
    ],
}  # fmt: skip
