"""Layer sensitivity: how far a model's answers move when one part of it is quantized.

Each part is measured in two directions: kept in 16 bits while the rest is quantized,
and quantized alone. The distance is the KL divergence to full precision. All
configurations run on one loaded model and on the same images (see ``switchable``).
A run that was killed continues from what it has measured (see ``records.resume``).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from vitnb import devices
from vitnb.analysis import sensitivity
from vitnb.data.splits import Split
from vitnb.mixed_precision.switchable import (
    UNQUANTIZED,
    CachedEvaluator,
    ReferenceAnswers,
    SwitchableModel,
    reference_answers,
)
from vitnb.models import layers
from vitnb.models.loader import LoadedVariant
from vitnb.records.identity import identify
from vitnb.records.parameters import check_parameter
from vitnb.records.resume import ResumeCache


@dataclass(frozen=True)
class Configuration:
    """A choice of the Linears to quantize.

    name: name in the record.
    bits: width of the quantized Linears, 4 or 8.
    kept: prefixes of the Linears that stay in 16 bits.
    direction: ``keep`` starts from the quantized model and keeps little, ``only``
        starts from the 16-bit model and quantizes little.
    """

    name: str
    bits: int
    kept: tuple[str, ...]
    direction: Literal["keep", "only"]


def parts(model: nn.Module, by: str = "layer") -> dict[str, list[str]]:
    """Return the parts to keep or to quantize in turn: {name: prefixes of its Linears}.

    Args:
        model: a Vision Transformer.
        by: ``layer``: every block. ``linear``: besides, every kind of Linear
            (``every q``) and every single Linear.

    Raises:
        UserError: another value of ``by``.
    """
    check_parameter("by", by)
    blocks = layers.transformer_blocks(model)
    chosen = {f"layer {i}": [block] for i, block in enumerate(blocks)}
    if by == "linear":
        for kind, names in layers.linear_kinds(model).items():
            chosen[f"every {kind}"] = names
        chosen |= single_linears(model)
    return chosen


def single_linears(model: nn.Module) -> dict[str, list[str]]:
    """Return every Linear but the head as a part of its own: {name: [full name]}.

    Linears of a block are called ``layer 0 q`` and so on, block by block. Linears
    outside the blocks, as between the stages of Swin, follow under their full names.
    """
    kinds = layers.linear_kinds(model)
    chosen = {}
    for i, block in enumerate(layers.transformer_blocks(model)):
        for kind, names in kinds.items():
            for name in names:
                if name.startswith(f"{block}."):
                    chosen[f"layer {i} {kind}"] = [name]
    inside = {name for (name,) in chosen.values()}
    for name in layers.quantizable(model):
        if name not in inside:
            chosen[sensitivity.OUTSIDE + name] = [name]
    return chosen


def list_configurations(
    model: nn.Module, bits: list[int], by: str = "layer"
) -> list[Configuration]:
    """Return every configuration, width by width, in the order of the record's rows.

    At each width: none kept, all kept, first and last block kept, every part kept in
    turn, and all but one part kept in turn.
    """
    blocks = layers.transformer_blocks(model)
    every = list(layers.quantizable(model))
    kept_parts = parts(model, by)
    listed = []
    for width in bits:
        listed += [
            Configuration("none", width, (), "keep"),
            Configuration("all", width, tuple(every), "only"),
            Configuration("first and last", width, (blocks[0], blocks[-1]), "keep"),
        ]
        for part, prefixes in kept_parts.items():
            listed.append(Configuration(part, width, tuple(prefixes), "keep"))
        for part, prefixes in kept_parts.items():
            others = tuple(name for name in every if not _is_under(name, prefixes))
            name = sensitivity.ONLY + part
            listed.append(Configuration(name, width, others, "only"))
    return listed


def _is_under(name: str, prefixes: list[str]) -> bool:
    """Tell whether a module is one of some others or lies inside one of them."""
    return any(name == one or name.startswith(f"{one}.") for one in prefixes)


def configurations(model: nn.Module, by: str = "layer") -> dict[str, list[str]]:
    """Return what each configuration keeps in 16 bits: {name: prefixes}.

    Names and prefixes do not depend on the width.
    """
    return {one.name: list(one.kept) for one in list_configurations(model, [4], by)}


def measure_sensitivity(
    loaded: LoadedVariant,
    split: Split,
    bits: list[int],
    dtype: torch.dtype | None = None,
    by: str = "layer",
    folder: Path | None = None,
) -> list[dict]:
    """Measure top-1 and KL to full precision of every configuration.

    All configurations answer the same images. A line is printed for each.

    Args:
        loaded: the full-precision variant; its model is changed in place.
        split: images to answer.
        bits: 4, 8 or both.
        dtype: compute type; None: see ``devices.compute_dtype``.
        by: see ``parts``.
        folder: where finished configurations wait until the record is written; None:
            nowhere.

    Returns:
        One row for full precision and one for each configuration: bits, kept (its
        name), linears_quantized, linears_kept, top1, kl (mean, nats), and for each
        image predicted and kl_by_image.
    """
    dtype = dtype or devices.compute_dtype(loaded.device)
    images = reference_answers(loaded, split)
    switchable = SwitchableModel(loaded.model, bits, dtype)
    cache = resume_cache(loaded, images, dtype, folder)
    listed = list_configurations(loaded.model, bits, by)
    rows: dict[Configuration, dict] = {}

    # One evaluator at a time: each stores the outputs of all blocks for all images.
    for width in bits:
        evaluator = CachedEvaluator(switchable, loaded, images, base=width)
        for one in listed:
            if one.direction == "keep" and one.bits == width:
                rows[one] = _measure(one, evaluator, cache)

    evaluator = CachedEvaluator(switchable, loaded, images, base=UNQUANTIZED)
    for one in listed:
        if one.direction == "only":
            rows[one] = _measure(one, evaluator, cache)

    if cache.found_before:
        print(
            f"{cache.found_before} of {len(rows)} were there "
            "from a run that had been ended",
            flush=True,
        )
    switchable.restore()
    full_precision = {
        "bits": 32,
        "kept": "full precision",
        "linears_quantized": 0,
        "linears_kept": loaded.linears_kept,
    }
    first = full_precision | images.scores(images.reference)
    return [first] + [rows[one] for one in listed]


def _measure(
    configuration: Configuration, evaluator: CachedEvaluator, cache: ResumeCache
) -> dict:
    """Return the row of one configuration, read from the cache where it has one."""
    switchable = evaluator.switchable
    widths = dict.fromkeys(switchable.linears, configuration.bits)
    for name in switchable.linears_under(configuration.kept):
        widths[name] = UNQUANTIZED
    scores = cache.get(lambda: evaluator.evaluate(widths), widths=widths)
    print(
        f"{configuration.bits}-bit, kept: {configuration.name:20s} "
        f"top-1 {scores['top1']:.4f}  KL {scores['kl']:.5f}",
        flush=True,
    )
    return {"bits": configuration.bits, "kept": configuration.name} | scores


def resume_cache(
    loaded: LoadedVariant,
    images: ReferenceAnswers,
    dtype: torch.dtype,
    folder: Path | None,
) -> ResumeCache:
    """Return the store of one model's measurements on some images.

    Whatever the answers depend on starts it anew, see ``records.identity``.
    """
    identity = identify(loaded.device).depend_on(loaded)
    return ResumeCache(
        folder, identity.answers_key(), images=images.digest, dtype=str(dtype)
    )
