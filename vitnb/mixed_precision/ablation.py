"""Layer sensitivity, in both directions: keep one part in 16 bits and quantize the rest, or quantize one part alone.

How far the answers move is the KL divergence to full precision, on the same images for every configuration. All run on one
loaded model (see ``switchboard``); what a killed run has measured is not measured again (see ``unfinished``).
"""

from itertools import product
from pathlib import Path

import torch
from torch import nn

from vitnb.analysis import sensitivity
from vitnb.data.splits import Split
from vitnb.errors import UserError
from vitnb.mixed_precision import switchable
from vitnb.mixed_precision.switchable import PLAIN, CachedEvaluator, SwitchableModel
from vitnb.models import checkpoints, layers
from vitnb.models.layers import linear_kinds, transformer_blocks
from vitnb.models.loader import LoadedVariant
from vitnb.records.resume import ResumeCache

BY = ("layer", "linear")


def parts(model: nn.Module, by: str = "layer") -> dict[str, list[str]]:
    """What is kept, or quantized, in turn: {name: prefixes of the Linears under it}.

    ``by``: ``layer``, every block; or ``linear``, besides every kind of Linear (``every q``) and every single one (``singles``).
    Raises UserError for another word.
    """
    if by not in BY:
        raise UserError(f"by must be {' or '.join(BY)}, got '{by}'")
    blocks = transformer_blocks(model)
    found = {f"layer {i}": [block] for i, block in enumerate(blocks)}
    if by == "linear":
        found |= {f"every {kind}": names for kind, names in linear_kinds(model).items()} | single_linears(model)
    return found


def single_linears(model: nn.Module) -> dict[str, list[str]]:
    """Every Linear but the head as a part of its own, block by block: ``layer 0 q`` and so on.

    Then those that lie in no block, as Swin's between its stages: ``outside``, and their full name.
    """
    blocks, of_kind = transformer_blocks(model), linear_kinds(model)
    found = {
        f"layer {i} {kind}": [name]
        for i, block in enumerate(blocks) for kind, names in of_kind.items() for name in names if name.startswith(f"{block}.")
    }  # fmt: skip
    inside = {name for (name,) in found.values()}
    return found | {sensitivity.OUTSIDE + name: [name] for name in layers.quantizable(model) if name not in inside}


def configurations(model: nn.Module, by: str = "layer") -> dict[str, list[str]]:
    """What stays in 16 bits in each: none, all, first and last, every part in turn, and all but each part in turn."""
    blocks, every = transformer_blocks(model), list(layers.quantizable(model))
    found = {"none": [], "all": every, "first and last": [blocks[0], blocks[-1]]} | parts(model, by)
    for part, prefixes in parts(model, by).items():
        under = tuple(f"{prefix}." for prefix in prefixes)
        found[sensitivity.ONLY + part] = [name for name in every if name not in prefixes and not name.startswith(under)]
    return found


def measure_sensitivity(
    loaded: LoadedVariant,
    split: Split,
    bits: list[int],
    dtype: torch.dtype,
    by: str = "layer",
    folder: Path | None = None,
) -> list[dict]:
    """Top-1 and KL to full precision of every configuration, on the same images.

    Args:
        loaded: the full-precision variant; it is changed to ``dtype``, the 16-bit type.
        bits: 4, 8 or both.
        by: see ``parts``.
        folder: where each finished configuration is kept until the record is written; None: nowhere.

    Returns:
        one row a configuration: bits, kept (its name), linears_quantized, linears_kept, top1, kl (mean), and raw by
        image: predicted and kl_by_image.
    """
    choices = configurations(loaded.model, by)
    images, board = switchable.reference_answers(loaded, split), SwitchableModel(loaded.model, bits, dtype)
    done = resume_cache(loaded, images, dtype, folder)
    rows = [{"bits": 32, "kept": "full precision", "linears_quantized": 0, "linears_kept": loaded.linears_kept}]
    rows[0] |= images.scores(images.reference)
    found = {}
    for base, several in [*((width, [width]) for width in bits), (PLAIN, bits)]:
        # One walk after the other: the outputs under a base are held for all images.
        walk = CachedEvaluator(board, loaded, images, base)
        for width, name in product(several, choices):
            if (base == PLAIN) != (name == "all" or name.startswith(sensitivity.ONLY)):
                continue
            widths = dict.fromkeys(board.plain, width) | dict.fromkeys(board.names(choices[name]), PLAIN)
            row = done.get(lambda walk=walk, widths=widths: walk.ask(widths), widths=widths)
            found[width, name] = {"bits": width, "kept": name} | row
            print(f"{width}-bit, kept: {name:20s} top-1 {row['top1']:.4f}  KL {row['kl']:.5f}", flush=True)
    rows += [found[width, name] for width in bits for name in choices]
    if done.found_before:
        print(f"{done.found_before} of {len(found)} were there from a run that had been ended", flush=True)
    board.restore()
    return rows


def resume_cache(loaded: LoadedVariant, images: switchable.ReferenceAnswers, dtype: torch.dtype, folder: Path | None) -> ResumeCache:
    """The store of what is found of a model on some images: it depends on weights, pixels, device and 16-bit type."""
    return ResumeCache(
        folder, checkpoint=checkpoints.fingerprint(loaded.folder) if folder else "", images=images.digest,
        device=loaded.device.type, dtype=str(dtype),
    )  # fmt: skip
