"""Defects of conduct: a request was not carried out, and nobody noticed (15 to 19)."""

import pickle
import tempfile
from collections.abc import Callable
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
from vitnb.records.files import MB


def head_too(bench: Bench) -> Case:
    """Reproduce defect 15.

    Wrong: ``skip_modules=[]`` for "fully quantized", which quantizes the head as well,
    while the exports kept it. Right: the list is built from the model's names, and the
    quantized Linears are counted.

    ``extra["refused"]`` is the message of the check for the wrong model.
    """
    wrong = bench.quantized([])
    right = bench.quantized(quantization.modules_to_skip(bench.model))
    refused = ""
    try:
        quantization.check_counts(wrong, quantized=True)
    except VariantError as error:
        refused = str(error)
    return Case(
        number=15,
        title="The head was quantized too",
        what="a 4-bit model, all its Linears counted",
        unit="Linears quantized",
        wrong=quantization.count_linears(wrong)[0],
        right=quantization.check_counts(right, quantized=True)[0],
        lesson="Count what was quantized and what was kept, and print it.",
        extra={"refused": refused},
    )


def nothing_kept(bench: Bench) -> Case:
    """Reproduce defect 16.

    Wrong: "keep the first layer" names the patch convolution, which is never quantized.
    Right: the first block, by its full name; a name that keeps nothing is an error.

    ``extra["refused"]`` is the message of that error.
    """
    convolution = next(
        name
        for name, module in bench.model.named_modules()
        if isinstance(module, nn.Conv2d)
    )
    first = transformer_blocks(bench.model)[0]
    head = quantization.modules_to_skip(bench.model)

    def quantized_linears(kept: list[str]) -> int:
        return quantization.count_linears(bench.quantized(kept))[0]

    none = quantized_linears(head)
    patches = quantized_linears([convolution, *head])
    block = quantized_linears(quantization.modules_to_skip(bench.model, [first]))
    refused = ""
    try:
        quantization.modules_to_skip(bench.model, [convolution])
    except UserError as error:
        refused = str(error)
    return Case(
        number=16,
        title="An option that changes nothing",
        what="keep the first layer of a 4-bit model",
        unit="Linears kept by it",
        wrong=none - patches,
        right=none - block,
        lesson="An option that changes nothing is an error.",
        extra={"refused": refused},
    )


def _row(name: str, model: nn.Module) -> dict:
    """Return a table's row of one variant, measured on a model."""
    quantized, kept = quantization.count_linears(model)
    return {
        "variant": name,
        "status": "ok",
        "quantized": quantized,
        "kept": kept,
        "resident MB": f"{quantization.resident_bytes(model) / MB:.2f}",
        "reason": "",
    }


def swallowed(bench: Bench) -> Case:
    """Reproduce defect 17.

    Wrong: ``try ... except: print`` around a variant, so that its row measures the
    model before. Right: the row stays in the table, failed, with its reason and without
    numbers.

    The third variant keeps a layer that the model does not have. ``extra`` holds both
    tables, and the printed errors.
    """
    blocks = transformer_blocks(bench.model)
    # One beyond the last: counted from 1, as a user would count.
    beyond = blocks[0].rpartition(".")[0] + f".{len(blocks)}"
    requested = {
        "4-bit": [],
        "4-bit, first layer kept": [blocks[0]],
        "4-bit, last layer kept": [beyond],
    }
    careless, printed = _careless_table(bench, requested)
    careful = _careful_table(bench, requested)
    wrong, right = (
        sum(row["status"] == "ok" and row["variant"] in printed for row in rows)
        for rows in (careless, careful)
    )
    return Case(
        number=17,
        title="An error swallowed",
        what=f"{len(requested)} variants asked for, one of them impossible",
        unit="rows of a model not loaded",
        wrong=wrong,
        right=right,
        lesson="A failed row stays in the table, with its reason.",
        extra={
            "careless": pd.DataFrame(careless),
            "careful": pd.DataFrame(careful),
            "printed": printed,
        },
    )


def _load_kept(bench: Bench, prefixes: list[str]) -> nn.Module:
    """Load the 4-bit model with some layers kept in 16 bits."""
    return bench.quantized(quantization.modules_to_skip(bench.model, prefixes))


def _careless_table(
    bench: Bench, requested: dict[str, list[str]]
) -> tuple[list[dict], dict[str, str]]:
    """Measure every variant, and print errors; return rows and printed errors."""
    model = bench.model
    rows = []
    printed = {}
    for name, prefixes in requested.items():
        try:
            model = _load_kept(bench, prefixes)
        except Exception as error:
            # The defect: few read the message, and the loop goes on with the old model.
            printed[name] = str(error)
        rows.append(_row(name, model))
    return rows, printed


def _careful_table(bench: Bench, requested: dict[str, list[str]]) -> list[dict]:
    """Measure every variant, and write an error into the row of its variant."""
    rows = []
    for name, prefixes in requested.items():
        try:
            rows.append(_row(name, _load_kept(bench, prefixes)))
        except UserError as error:
            failed = {"variant": name, "status": "failed", "reason": str(error)}
            rows.append(dict.fromkeys(rows[0], "") | failed)
    return rows


CELLS = (
    "pixels = photographs()",
    "pixels = (pixels - mean) / std",
    "score = top1(pixels)",
)


def run_cells(bench: Bench, order: tuple[int, ...]) -> float:
    """Run the cells of a three-cell notebook in some order and return their score.

    All cells share one namespace, as in a notebook's kernel.
    """

    def photographs() -> torch.Tensor:
        images = bench.test.images
        read = bench.processor(images, do_normalize=False, return_tensors="pt")
        return read["pixel_values"]

    shape = (1, 3, 1, 1)
    namespace = {
        "photographs": photographs,
        "mean": torch.tensor(bench.processor.image_mean).view(shape),
        "std": torch.tensor(bench.processor.image_std).view(shape),
        "top1": bench.top1,
    }
    for index in order:
        exec(CELLS[index], namespace)
    return namespace["score"]


def out_of_order(bench: Bench) -> Case:
    """Reproduce defect 18.

    Wrong: a cell is run a second time, by hand, and the pixels are normalized twice.
    Right: the notebook is run from top to bottom, by a machine.
    """
    return Case(
        number=18,
        title="Cells run out of order",
        what="three cells, run 1 2 2 3 and 1 2 3",
        unit="top-1",
        wrong=run_cells(bench, (0, 1, 1, 2)),
        right=run_cells(bench, (0, 1, 2)),
        lesson="Notebooks run from top to bottom by machine, on every change.",
        extra={"cells": CELLS},
    )


_EXECUTED: list[str] = []  # statements that opening a file has run


def _execute(statement: str) -> None:
    _EXECUTED.append(statement)


class _Surprise:
    """An object whose pickle calls a function when it is opened.

    Any function would do. This one leaves a note.
    """

    def __reduce__(self):
        return _execute, ("whatever the file's author wanted",)


def _foreign_statements(open_file: Callable) -> int:
    """Return how many statements of a file's author run while it is opened."""
    _EXECUTED.clear()
    open_file()
    return len(_EXECUTED)


def pickled(bench: Bench) -> Case:
    """Reproduce defect 19.

    Wrong: weights are stored as a pickle, which can call any function when it is
    opened. Right: safetensors, a format of numbers and nothing else.

    ``extra["refused"]`` is the package's message for a folder with a pickle.
    """
    weights = {"weight": torch.zeros(2, 2)}
    with tempfile.TemporaryDirectory() as folder:
        loose = Path(folder) / "pytorch_model.bin"
        strict = Path(folder) / "model.safetensors"
        content = {"weight": np.zeros((2, 2)), "extra": _Surprise()}
        loose.write_bytes(pickle.dumps(content))
        refused = ""
        try:
            checkpoints.require_safetensors(Path(folder))
        except UserError as error:
            refused = str(error).replace(f"{folder}/", "")
        save_file(weights, strict)
        wrong = _foreign_statements(lambda: pickle.loads(loose.read_bytes()))
        right = _foreign_statements(lambda: load_file(strict))
    return Case(
        number=19,
        title="A file that runs code",
        what="opening a checkpoint",
        unit="foreign statements run",
        wrong=wrong,
        right=right,
        lesson="Only safetensors, never remote code.",
        extra={"refused": refused},
    )
