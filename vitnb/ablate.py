"""Layer sensitivity, in both directions: keep one part in 16 bits and quantize the rest, or quantize one part alone.

How far the answers move is the KL divergence to full precision, on the same images for every configuration. All run on one
loaded model (see ``switchboard``); what a killed run has measured is not measured again (see ``unfinished``).
"""

from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from vitnb import checkpoints, data, intervals, quantize, switchboard
from vitnb.blocks import kinds, layers
from vitnb.errors import UserError
from vitnb.models import Loaded
from vitnb.records import write_whole
from vitnb.switchboard import PLAIN, Switchboard, Walk
from vitnb.unfinished import Unfinished

BY = ("layer", "linear")
ONLY = "all but "  # begins the name of a configuration that quantizes one part alone
OUTSIDE = "outside "  # begins the name of a Linear that lies in no block
RAW = ("predicted", "kl_by_image")  # of a row, by image
NOISE = "no effect beyond noise"


def parts(model: nn.Module, by: str = "layer") -> dict[str, list[str]]:
    """What is kept, or quantized, in turn: {name: prefixes of the Linears under it}.

    ``by``: ``layer``, every block; or ``linear``, besides every kind of Linear (``every q``) and every single one (``singles``).
    Raises UserError for another word.
    """
    if by not in BY:
        raise UserError(f"by must be {' or '.join(BY)}, got '{by}'")
    blocks = layers(model)
    found = {f"layer {i}": [block] for i, block in enumerate(blocks)}
    if by == "linear":
        found |= {f"every {kind}": names for kind, names in kinds(model).items()} | singles(model)
    return found


def singles(model: nn.Module) -> dict[str, list[str]]:
    """Every Linear but the head as a part of its own, block by block: ``layer 0 q`` and so on.

    Then those that lie in no block, as Swin's between its stages: ``outside``, and their full name.
    """
    blocks, of_kind = layers(model), kinds(model)
    found = {
        f"layer {i} {kind}": [name]
        for i, block in enumerate(blocks) for kind, names in of_kind.items() for name in names if name.startswith(f"{block}.")
    }  # fmt: skip
    inside = {name for (name,) in found.values()}
    return found | {OUTSIDE + name: [name] for name in quantize.quantizable(model) if name not in inside}


def configurations(model: nn.Module, by: str = "layer") -> dict[str, list[str]]:
    """What stays in 16 bits in each: none, all, first and last, every part in turn, and all but each part in turn."""
    blocks, every = layers(model), list(quantize.quantizable(model))
    found = {"none": [], "all": every, "first and last": [blocks[0], blocks[-1]]} | parts(model, by)
    for part, prefixes in parts(model, by).items():
        under = tuple(f"{prefix}." for prefix in prefixes)
        found[ONLY + part] = [name for name in every if name not in prefixes and not name.startswith(under)]
    return found


def sensitivity(
    loaded: Loaded,
    split: data.Split,
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
    images, board = switchboard.look(loaded, split), Switchboard(loaded.model, bits, dtype)
    done = findings(loaded, images, dtype, folder)
    rows = [{"bits": 32, "kept": "full precision", "linears_quantized": 0, "linears_kept": loaded.linears_kept}]
    rows[0] |= images.scores(images.reference)
    found = {}
    for base, several in [*((width, [width]) for width in bits), (PLAIN, bits)]:
        # One walk after the other: the outputs under a base are held for all images.
        walk = Walk(board, loaded, images, base)
        for width, name in product(several, choices):
            if (base == PLAIN) != (name == "all" or name.startswith(ONLY)):
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


def findings(loaded: Loaded, images: switchboard.Images, dtype: torch.dtype, folder: Path | None) -> Unfinished:
    """The store of what is found of a model on some images: it depends on weights, pixels, device and 16-bit type."""
    return Unfinished(
        folder, checkpoint=checkpoints.fingerprint(loaded.folder) if folder else "", images=images.digest,
        device=loaded.device.type, dtype=str(dtype),
    )  # fmt: skip


def effects(rows: list[dict]) -> pd.DataFrame:
    """What each part does to the KL, in both directions, on the same images; a row for each part, direction and width.

    ``effect``: mean KL in nats that keeping the part saves (direction ``keep``: none kept minus this kept), or that quantizing
    it alone costs (``only``: this quantized minus none quantized), with its 95% bootstrap interval. ``p``: paired t-test that it
    is above 0, one-sided; ``p_corrected``: for the number of rows (Holm). ``verdict``: ``sensitive``, or NOISE.
    """
    moved = {(row["bits"], row["kept"]): np.asarray(row["kl_by_image"]) for row in rows}
    lines = []
    for (bits, kept), kl in moved.items():
        part = kept.removeprefix(ONLY)
        if part.startswith(("layer ", "every ", OUTSIDE)):
            only = kept.startswith(ONLY)
            more, less = (kl, moved[bits, "all"]) if only else (moved[bits, "none"], kl)
            effect, low, high = intervals.mean(more - less)
            line = {"bits": bits, "direction": "only" if only else "keep", "part": part, "effect": effect}
            lines.append(line | {"low": low, "high": high, "p": intervals.farther(more, less)})
    columns = ["bits", "direction", "part", "effect", "low", "high", "p", "p_corrected", "verdict"]
    table = pd.DataFrame(lines, columns=columns)
    table["p_corrected"] = intervals.holm(table.p.tolist())
    table["verdict"] = np.where(table.p_corrected < 1 - intervals.LEVEL, "sensitive", NOISE)
    return table


def recommended(table: pd.DataFrame, bits: int, count: int = 3) -> list[str]:
    """The layers to keep first: those whose keeping lowers the KL most, of those that lower it beyond noise (``effects``)."""
    chosen = table[(table.bits == bits) & (table.direction == "keep") & (table.verdict == "sensitive")]
    whole = chosen[chosen.part.str.fullmatch(r"layer \d+")]
    return list(whole.sort_values("effect", ascending=False).part[:count])


def by_kind(table: pd.DataFrame) -> pd.DataFrame:
    """The effects of the kinds of Linears as people read them; empty if they were not measured."""
    lines = [
        {"bits": row.bits, "direction": row.direction, "part": row.part,
         "effect, nats (95%)": f"{row.effect:.2g} ({row.low:.2g} to {row.high:.2g})", "in words": row.verdict}
        for row in table[table.part.str.startswith("every ")].itertuples()
    ]  # fmt: skip
    return pd.DataFrame(lines)


def table(rows: list[dict]) -> pd.DataFrame:
    """The rows without the raw values of single images."""
    return pd.DataFrame(rows).drop(columns=list(RAW))


def write_csv(rows: list[dict], path: Path) -> Path:
    """Write the table as CSV, whole or not at all."""
    write_whole(path, table(rows).to_csv(index=False, lineterminator="\n"))
    return path
