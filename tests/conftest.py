"""Share fixtures: a *mini* study, a tiny ViT of random weights on drawn shapes."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from vitnb import devices, notebooks
from vitnb.data.splits import load_split
from vitnb.mixed_precision import switchable
from vitnb.models import checkpoints, pretrained
from vitnb.study import Study, load_study
from vitnb.training import loop, lora

CLASSES = ("circle", "cross", "ring", "square")

STUDY = """
title: A tiny ViT on drawn shapes
question: Does everything work?
data: {folder}/shapes
base: {folder}/base
variants: [fp32-sdpa, nf4-fa2]
batch_sizes: [1, 3]
finetune: {{epochs: 2, batch_size: 8, learning_rate: 0.003}}
latency: {{samples: 24, seconds: 0.3}}
compare: {{rounds: 20, seconds: 1, forwards: 1, processes: 1}}
expected:
  fp32-sdpa top1: [0.0, 1.0]
"""


def shape(kind: str, random: np.random.RandomState, size: int = 40) -> Image.Image:
    """Draw a shape of random colour, place and size on a noisy ground."""
    ground = random.randint(0, 90, (size, size, 3)).astype(np.uint8)
    image = Image.fromarray(ground)
    pen = ImageDraw.Draw(image)
    radius = random.randint(7, 13)
    x, y = random.randint(radius, size - radius, 2)
    box, colour = (
        (x - radius, y - radius, x + radius, y + radius),
        tuple(int(c) for c in random.randint(120, 256, 3)),
    )
    if kind == "circle":
        pen.ellipse(box, fill=colour)
    elif kind == "ring":
        pen.ellipse(box, outline=colour, width=3)
    elif kind == "square":
        pen.rectangle(box, fill=colour)
    else:
        pen.line((x - radius, y, x + radius, y), fill=colour, width=4)
        pen.line((x, y - radius, x, y + radius), fill=colour, width=4)
    return image


def write_shapes(root: Path, per_class: dict[str, int]) -> None:
    random = np.random.RandomState(3)
    for split, count in per_class.items():
        for kind in CLASSES:
            (root / split / kind).mkdir(parents=True)
            for i in range(count):
                shape(kind, random).save(root / split / kind / f"{i:02d}.png")


def write_base(folder: Path) -> None:
    torch.manual_seed(5)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=1,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
        num_labels=2,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(
        size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)


def killed_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[dict]:
    """Return a growing list of the choices that ``CachedEvaluator`` evaluates.

    The evaluation of this number kills the run.
    """
    evaluate = switchable.CachedEvaluator.evaluate
    evaluated = []

    def counted(evaluator, widths):
        evaluated.append(widths)
        if len(evaluated) == number:
            raise KeyboardInterrupt
        return evaluate(evaluator, widths)

    monkeypatch.setattr(switchable.CachedEvaluator, "evaluate", counted)
    return evaluated


def unpack(weight: torch.Tensor, state) -> torch.Tensor:
    """Return the weights, float32 [out, in], that bitsandbytes has packed for a CPU.

    Two neighbours in a row and 32 rows lie together. Of these 64 numbers, the first 32
    are in the low halves of 32 bytes.
    """
    rows, columns = state.shape
    halves = weight.reshape(rows // 32, columns // 2, 32)
    together = torch.cat([halves & 15, halves >> 4], dim=-1)
    indices = together.view(rows // 32, columns // 2, 32, 2).transpose(1, 2)
    scale = state.absmax.T.float().repeat_interleave(state.blocksize, 1)
    return state.code[indices.reshape(rows, columns).int()] * scale


@pytest.fixture
def packing_cpu(monkeypatch) -> None:
    """Plays a CPU with AVX512-BF16: bitsandbytes packs NF4 weights by its own code.

    Only the product of packed weights is written here.
    """

    def multiply(x, weight, out=None, state=None):
        return nn.functional.linear(x, unpack(weight, state).to(x.dtype))

    cpu = torch.device("cpu")
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(bnb.functional, "gemv_4bit", multiply)
    monkeypatch.setattr(devices, "select_device", lambda asked=None: cpu)
    monkeypatch.setattr(devices, "compute_dtype", lambda device: torch.bfloat16)


@pytest.fixture(params=["this machine", "a CPU that packs"])
def machine(request) -> str:
    """Runs a test on this machine as it is, and on a CPU that packs NF4 weights."""
    if request.param == "a CPU that packs":
        request.getfixturevalue("packing_cpu")
    return request.param


@pytest.fixture(scope="session")
def mini_yaml(tmp_path_factory) -> Path:
    """The path of the mini study's YAML, with its images and its base beside it."""
    folder = tmp_path_factory.mktemp("mini")
    write_shapes(folder / "shapes", {"train": 8, "valid": 5, "test": 6})
    write_base(folder / "base")
    path = folder / "mini.yaml"
    path.write_text(STUDY.format(folder=folder))
    return path


@pytest.fixture(scope="session")
def outputs(tmp_path_factory):
    """Give this session's studies an output root, which commands inherit."""
    before, root = os.environ.get("VITNB_OUTPUTS"), tmp_path_factory.mktemp("outputs")
    os.environ["VITNB_OUTPUTS"] = str(root)
    yield root
    if before is None:
        del os.environ["VITNB_OUTPUTS"]
    else:
        os.environ["VITNB_OUTPUTS"] = before


@pytest.fixture(scope="session")
def mini(mini_yaml, outputs) -> Study:
    """The mini study, fine-tuned and exported (no records written)."""
    study = load_study(str(mini_yaml))
    train, valid = load_split(study, "train"), load_split(study, "valid")
    processor = checkpoints.load_processor(pretrained.find_base(study))
    torch.manual_seed(0)
    model = lora.add_adapters(study, train.class_names)
    loop.train(model, study, processor, train, valid)
    lora.export_checkpoints(model, study, processor, train.class_names)
    return study


@pytest.fixture
def shapes(mini):
    """The mini study's images to train and to choose by, and its preprocessing."""
    return (
        load_split(mini, "train"),
        load_split(mini, "valid"),
        checkpoints.load_processor(pretrained.find_base(mini)),
    )


@pytest.fixture
def run_cells() -> Callable[..., None]:
    """Runs a notebook's code, cell by cell, in this process, with some parameters."""

    def run(name: str, **parameters) -> None:
        namespace, found = (
            dict(parameters),
            json.loads((notebooks.FOLDER / f"{name}.ipynb").read_text())["cells"],
        )
        with plt.ioff():
            for cell in found:
                if cell["cell_type"] == "code":
                    exec("".join(cell["source"]), namespace)
                    if "parameters" in cell["metadata"].get("tags", []):
                        namespace |= parameters
        plt.close("all")

    return run
