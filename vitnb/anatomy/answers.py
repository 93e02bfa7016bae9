"""Defects of the answers: the model is good, and the number or the name that is reported of it is not (1, 2, 3, 12)."""

import tempfile
from collections import OrderedDict
from copy import deepcopy
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from transformers import AutoConfig

from vitnb.anatomy.bench import Bench
from vitnb.anatomy.case import Case
from vitnb.data import dataset
from vitnb.models.layers import transformer_blocks
from vitnb.training import lora

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def center_crop(image: Image.Image, side: int) -> Image.Image:
    """Resize to 256/224 of ``side`` and cut out the middle: what an ImageNet recipe does, at this model's size."""
    large = round(side * 256 / 224)
    edge = (large - side) // 2
    return image.resize((large, large), Image.Resampling.BILINEAR).crop((edge, edge, edge + side, edge + side))


def preprocessing(bench: Bench) -> Case:
    """Defect 1. Done wrong: evaluated with another resize, crop, mean and std than the model was trained with.
    Done instead: the preprocessing that travels with the checkpoint.

    ``extra["by part"]`` holds the top-1 with only the crop, and with only the mean and std, changed.
    """
    images, own = bench.test.images, bench.processor
    cropped = [center_crop(image, own.size["height"]) for image in images]
    ways = {
        "the checkpoint's own": bench.test.pixels,
        "another crop": dataset.to_pixels(cropped, own),
        "another mean and std": own(images, return_tensors="pt", **IMAGENET)["pixel_values"],
        "both": own(cropped, return_tensors="pt", **IMAGENET)["pixel_values"],
    }
    found = {name: bench.top1(pixels) for name, pixels in ways.items()}
    return Case(
        1, "Another preprocessing", f"{len(images)} test images, one model", "top-1",
        found["both"], found["the checkpoint's own"], "One preprocessing, saved with the checkpoint, used by all.",
        {"by part": found, "seen": {name: pixels[0] for name, pixels in ways.items()}},
    )  # fmt: skip


def _curve(bench: Bench, modules_to_save: list[str] | None, epochs: int) -> tuple[list[float], int]:
    """Test top-1 after each epoch of LoRA on a linear map of the frozen features, and the head's trained weights."""
    features, tested = (torch.tensor(bench.features[name], dtype=torch.float32) for name in ("train", "test"))
    labels, width = torch.tensor(bench.train.labels), features.shape[1]
    torch.manual_seed(bench.seed)
    body, head = nn.Linear(width, width, bias=False), nn.Linear(width, len(bench.class_names))
    nn.init.eye_(body.weight)  # before training the adapted map changes nothing
    settings = LoraConfig(r=8, lora_alpha=32, target_modules=["body"], modules_to_save=modules_to_save)
    model = get_peft_model(nn.Sequential(OrderedDict(body=body, head=head)), settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    curve = []
    for _ in range(epochs):
        for chosen in torch.randperm(len(features)).split(32):
            loss = nn.functional.cross_entropy(model(features[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.inference_mode():
            curve.append(float((model(tested).argmax(-1).numpy() == bench.test.labels).mean()))
    return curve, lora.count_trained(model)["head"]


def frozen_head(bench: Bench, epochs: int = 6) -> Case:
    """Defect 2. Done wrong: LoRA without ``modules_to_save``, so the new classifier keeps its random weights.
    Done instead: the head is trained with the adapter, for as many epochs and at the same rate.

    ``extra`` holds both learning curves and the number of head weights that were trained.
    """
    frozen, none = _curve(bench, None, epochs)
    trained, weights = _curve(bench, ["head"], epochs)
    return Case(
        2, "A head that was never trained", f"{len(bench.test.labels)} test images, {epochs} epochs of LoRA", "top-1",
        frozen[-1], trained[-1], "Train the head; show the curve.",
        {"curves": {"head frozen": frozen, "head trained": trained},
         "head weights trained": {"head frozen": none, "head trained": weights}},
    )  # fmt: skip


def loose_loading(bench: Bench) -> Case:
    """Defect 3. Done wrong: ``load_state_dict(strict=False)`` of weights whose keys have another library's names.
    Done instead: strict loading, which refuses such a file; and a golden logit, which tells a wrong model at once.

    ``extra`` holds the share of the weights that kept random values, strict loading's message, and the golden logits.
    """
    weights = bench.model.state_dict()
    blocks = transformer_blocks(bench.model)[0].rpartition(".")[0]
    foreign = {name.replace(f"{blocks}.", "blocks."): value for name, value in weights.items()}
    torch.manual_seed(bench.seed)
    strict = type(bench.model)(bench.model.config).to(bench.device).eval()
    loose = deepcopy(strict)
    missing = loose.load_state_dict(foreign, strict=False).missing_keys  # returned, and seldom looked at
    refused = ""
    try:
        strict.load_state_dict(foreign)
    except RuntimeError as error:
        refused = str(error).splitlines()[0]
    strict.load_state_dict(weights)
    pixels = bench.test.pixels
    return Case(
        3, "Loading that forgives", f"{len(pixels)} test images, keys renamed", "top-1",
        bench.top1(pixels, loose), bench.top1(pixels, strict), "Strict loading, and a golden logit for each checkpoint.",
        {"left random": sum(weights[name].numel() for name in missing) / sum(w.numel() for w in weights.values()),
         "missing keys": len(missing), "refused": refused,
         "golden logit": {"loose": float(bench.logits(pixels[:1], loose)[0, 0]),
                          "strict": float(bench.logits(pixels[:1], strict)[0, 0])}},
    )  # fmt: skip


def folder_numbers(bench: Bench) -> Case:
    """Defect 12. Done wrong: a class index is taken for the number of its folder. Done instead: the names travel with
    the checkpoint in the order of training, which is that of words: "1", "10", "100", "101" ...

    The folders are really made and sorted, and the names really go through a checkpoint's ``config.json``.
    """
    name_of = {str(number): name for number, name in enumerate(bench.class_names, start=1)}
    with tempfile.TemporaryDirectory() as folder:
        for number in name_of:
            (Path(folder) / number).mkdir()
        trained = sorted(path.name for path in Path(folder).iterdir())  # as every reader of image folders does
        meant = [name_of[number] for number in trained]
        type(bench.model.config)(id2label=dict(enumerate(meant))).save_pretrained(folder)
        travelled = AutoConfig.from_pretrained(folder).id2label
    told = [name_of.get(str(index)) for index in range(len(trained))]
    return Case(
        12, "An index is not a name", f"{len(trained)} folders called 1 to {len(trained)}", "classes named rightly",
        sum(a == b for a, b in zip(told, meant, strict=True)), sum(travelled[i] == name for i, name in enumerate(meant)),
        "Names travel with the checkpoint, in the order of training.",
        {"order": trained, "told": told, "meant": meant},
    )  # fmt: skip
