"""Defects of conduct: what was asked for did not happen, and nobody was told (15, 16, 17, 18, 19)."""

import pickle
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vitnb.anatomy.bench import Bench
from vitnb.anatomy.case import Case
from vitnb.errors import UserError, VariantError
from vitnb.models import checkpoints, quantization
from vitnb.models.layers import transformer_blocks

MB = 2**20


def head_too(bench: Bench) -> Case:
    """Defect 15. Done wrong: ``skip_modules=[]`` for "fully quantized", which quantizes the head as well, while the
    exports kept it. Done instead: the list is built from the model's names, and what happened is counted.

    ``extra["refused"]`` is what the check says of the wrong model.
    """
    wrong, right = bench.quantized([]), bench.quantized(quantization.modules_to_skip(bench.model))
    refused = ""
    try:
        quantization.check_counts(wrong, quantized=True)
    except VariantError as error:
        refused = str(error)
    return Case(
        15, "The head was quantized too", "a 4-bit model, all its Linears counted", "Linears quantized",
        quantization.count_linears(wrong)[0], quantization.check_counts(right, quantized=True)[0],
        "Count what was quantized and what was kept, and print it.", {"refused": refused},
    )  # fmt: skip


def nothing_kept(bench: Bench) -> Case:
    """Defect 16. Done wrong: "keep the first layer" names the patch convolution, which is never quantized. Done
    instead: the first block, by its full name; and a name that keeps nothing is an error (``extra["refused"]``).
    """
    convolution = next(name for name, module in bench.model.named_modules() if isinstance(module, nn.Conv2d))
    first, always = transformer_blocks(bench.model)[0], quantization.modules_to_skip(bench.model)
    none, patch, block = (
        quantization.count_linears(bench.quantized(kept))[0]
        for kept in (always, [convolution, *always], quantization.modules_to_skip(bench.model, [first]))
    )
    refused = ""
    try:
        quantization.modules_to_skip(bench.model, [convolution])
    except UserError as error:
        refused = str(error)
    return Case(
        16, "An option that changes nothing", "keep the first layer of a 4-bit model", "Linears kept by it",
        none - patch, none - block, "An option that changes nothing is an error.", {"refused": refused},
    )  # fmt: skip


def _row(name: str, model: nn.Module) -> dict:
    quantized, kept = quantization.count_linears(model)
    size = f"{quantization.resident_bytes(model) / MB:.2f}"
    return {"variant": name, "status": "ok", "quantized": quantized, "kept": kept, "resident MB": size, "reason": ""}


def swallowed(bench: Bench) -> Case:
    """Defect 17. Done wrong: ``try ... except: print`` around a variant, so that the row measures the model that was
    left over. Done instead: the row stays in the table, failed, with its reason and without numbers.

    The third variant keeps a layer that the model does not have. ``extra`` holds both tables, and what was printed.
    """
    blocks = transformer_blocks(bench.model)
    beyond = blocks[0].rpartition(".")[0] + f".{len(blocks)}"  # numbered from 1 by whoever asked
    asked = {"4-bit": [], "4-bit, first layer kept": [blocks[0]], "4-bit, last layer kept": [beyond]}
    model, careless, careful, printed = bench.model, [], [], {}
    for name, prefixes in asked.items():
        try:
            model = bench.quantized(quantization.modules_to_skip(bench.model, prefixes))
        except Exception as error:  # the defect: told where nobody looks, and on with the model that is at hand
            printed[name] = str(error)
        careless.append(_row(name, model))
    for name, prefixes in asked.items():
        try:
            careful.append(_row(name, bench.quantized(quantization.modules_to_skip(bench.model, prefixes))))
        except UserError as error:
            careful.append(dict.fromkeys(careful[0], "") | {"variant": name, "status": "failed", "reason": str(error)})
    wrong, right = (
        sum(row["status"] == "ok" and row["variant"] in printed for row in rows) for rows in (careless, careful)
    )
    return Case(
        17, "An error swallowed", f"{len(asked)} variants asked for, one of them impossible", "rows of a model not loaded",
        wrong, right, "A failed row stays in the table, with its reason.",
        {"careless": pd.DataFrame(careless), "careful": pd.DataFrame(careful), "printed": printed},
    )  # fmt: skip


CELLS = ("pixels = photographs()", "pixels = (pixels - mean) / std", "score = top1(pixels)")


def run_cells(bench: Bench, order: tuple[int, ...]) -> float:
    """Run the cells of a three-cell notebook in some order, as a kernel does, and return the score that it shows."""
    shape = (1, 3, 1, 1)
    namespace = {
        "photographs": lambda: bench.processor(bench.test.images, do_normalize=False, return_tensors="pt")["pixel_values"],
        "mean": torch.tensor(bench.processor.image_mean).view(shape), "std": torch.tensor(bench.processor.image_std).view(shape),
        "top1": bench.top1,
    }  # fmt: skip
    for index in order:
        exec(CELLS[index], namespace)
    return namespace["score"]


def out_of_order(bench: Bench) -> Case:
    """Defect 18. Done wrong: a cell is run a second time, by hand, and the pixels are normalized twice. Done instead:
    the notebook is run from top to bottom, by a machine.
    """
    return Case(
        18, "Cells run out of order", "three cells, run 1 2 2 3 and 1 2 3", "top-1",
        run_cells(bench, (0, 1, 1, 2)), run_cells(bench, (0, 1, 2)),
        "Notebooks run from top to bottom by machine, on every change.", {"cells": CELLS},
    )  # fmt: skip


_OPENED: list[str] = []  # what opening a file has run


def _ran(what: str) -> None:
    _OPENED.append(what)


class _Surprise:
    """Says in its pickle: to make me again, call a function. Any function would do; this one leaves a note."""

    def __reduce__(self):
        return _ran, ("whatever the file's author wanted",)


def _statements(opened) -> int:
    """How many statements of the file's author run while it is opened."""
    _OPENED.clear()
    opened()
    return len(_OPENED)


def pickled(bench: Bench) -> Case:
    """Defect 19. Done wrong: weights are kept as a pickle, which can call any function when it is opened. Done instead:
    safetensors, a format that holds numbers and nothing else; folders with pickles are refused (``extra["refused"]``).
    """
    weights = {"weight": torch.zeros(2, 2)}
    with tempfile.TemporaryDirectory() as folder:
        loose, strict = Path(folder) / "pytorch_model.bin", Path(folder) / "model.safetensors"
        loose.write_bytes(pickle.dumps({"weight": np.zeros((2, 2)), "extra": _Surprise()}))
        refused = ""
        try:
            checkpoints.require_safetensors(Path(folder))
        except UserError as error:
            refused = str(error).replace(f"{folder}/", "")
        save_file(weights, strict)
        wrong, right = _statements(lambda: pickle.loads(loose.read_bytes())), _statements(lambda: load_file(strict))
    return Case(
        19, "A file that runs code", "opening a checkpoint", "foreign statements run",
        wrong, right, "Only safetensors, never remote code.", {"refused": refused},
    )  # fmt: skip
