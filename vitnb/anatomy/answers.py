"""Defects of the answers: a good model is reported with a wrong number or name.

These are defects 1, 2, 3 and 12.
"""

import tempfile
from collections import OrderedDict
from copy import deepcopy
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn

from vitnb.anatomy.bench import Bench
from vitnb.anatomy.case import Case
from vitnb.data import dataset
from vitnb.models import checkpoints
from vitnb.models.layers import transformer_blocks
from vitnb.training import lora

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def center_crop(image: Image.Image, side: int) -> Image.Image:
    """Resize to 256/224 of ``side`` and cut out the middle, as ImageNet recipes do."""
    large = round(side * 256 / 224)
    edge = (large - side) // 2
    resized = image.resize((large, large), Image.Resampling.BILINEAR)
    return resized.crop((edge, edge, edge + side, edge + side))


def preprocessing(bench: Bench) -> Case:
    """Reproduce defect 1.

    Wrong: the evaluation uses another resize, crop, mean and std than the training.
    Right: the preprocessing that travels with the checkpoint.

    ``extra["by part"]`` holds the top-1 with only the crop, and with only the mean and
    std, changed.
    """
    images, own = bench.test.images, bench.processor
    cropped = [center_crop(image, own.size["height"]) for image in images]

    def imagenet(pictures: list[Image.Image]) -> torch.Tensor:
        return own(pictures, return_tensors="pt", **IMAGENET)["pixel_values"]

    ways = {
        "the checkpoint's own": bench.test.pixels,
        "another crop": dataset.to_pixels(cropped, own),
        "another mean and std": imagenet(images),
        "both": imagenet(cropped),
    }
    top1 = {name: bench.top1(pixels) for name, pixels in ways.items()}
    return Case(
        number=1,
        title="Another preprocessing",
        what=f"{len(images)} test images, one model",
        unit="top-1",
        wrong=top1["both"],
        right=top1["the checkpoint's own"],
        lesson="One preprocessing, saved with the checkpoint, used by all.",
        extra={
            "by part": top1,
            "seen": {name: pixels[0] for name, pixels in ways.items()},
        },
    )


def _learning_curve(
    bench: Bench, modules_to_save: list[str] | None, epochs: int
) -> tuple[list[float], int]:
    """Train LoRA on a linear map of the frozen features, under a new head.

    Returns:
        Test top-1 after each epoch, and the number of the head's trained weights.
    """
    features = torch.tensor(bench.features["train"], dtype=torch.float32)
    tested = torch.tensor(bench.features["test"], dtype=torch.float32)
    labels, width = torch.tensor(bench.train.labels), features.shape[1]
    torch.manual_seed(bench.seed)
    body = nn.Linear(width, width, bias=False)
    head = nn.Linear(width, len(bench.class_names))
    nn.init.eye_(body.weight)  # before training the adapted map changes nothing
    settings = LoraConfig(
        r=8, lora_alpha=32, target_modules=["body"], modules_to_save=modules_to_save
    )
    network = nn.Sequential(OrderedDict(body=body, head=head))
    model = get_peft_model(network, settings)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=5e-3)
    curve = []
    for _ in range(epochs):
        for batch in torch.randperm(len(features)).split(32):
            loss = nn.functional.cross_entropy(model(features[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.inference_mode():
            predicted = model(tested).argmax(-1).numpy()
        curve.append(float((predicted == bench.test.labels).mean()))
    return curve, lora.count_trained(model)["head"]


def frozen_head(bench: Bench, epochs: int = 6) -> Case:
    """Reproduce defect 2.

    Wrong: LoRA without ``modules_to_save``, so the new classifier keeps its random
    weights. Right: the head is trained with the adapter, for as many epochs and at the
    same rate.

    ``extra`` holds both learning curves and the number of trained head weights.
    """
    frozen, none = _learning_curve(bench, None, epochs)
    trained, weights = _learning_curve(bench, ["head"], epochs)
    return Case(
        number=2,
        title="A head that was never trained",
        what=f"{len(bench.test.labels)} test images, {epochs} epochs of LoRA",
        unit="top-1",
        wrong=frozen[-1],
        right=trained[-1],
        lesson="Train the head; show the curve.",
        extra={
            "curves": {"head frozen": frozen, "head trained": trained},
            "head weights trained": {"head frozen": none, "head trained": weights},
        },
    )


def loose_loading(bench: Bench) -> Case:
    """Reproduce defect 3.

    Wrong: ``load_state_dict(strict=False)`` of weights whose keys have another
    library's names. Right: strict loading, which refuses such a file, and a golden
    logit, which tells a wrong model at once.

    ``extra`` holds the share of the weights that stayed random, strict loading's
    message, and the golden logits.
    """
    weights = bench.model.state_dict()
    blocks = transformer_blocks(bench.model)[0].rpartition(".")[0]
    foreign = {
        name.replace(f"{blocks}.", "blocks."): value for name, value in weights.items()
    }
    torch.manual_seed(bench.seed)
    strict = type(bench.model)(bench.model.config).to(bench.device).eval()
    loose = deepcopy(strict)
    # The missing keys are returned, and few read them.
    missing = loose.load_state_dict(foreign, strict=False).missing_keys
    refused = ""
    try:
        strict.load_state_dict(foreign)
    except RuntimeError as error:
        refused = str(error).splitlines()[0]
    strict.load_state_dict(weights)
    pixels = bench.test.pixels
    random = sum(weights[name].numel() for name in missing)
    return Case(
        number=3,
        title="Loading that forgives",
        what=f"{len(pixels)} test images, keys renamed",
        unit="top-1",
        wrong=bench.top1(pixels, loose),
        right=bench.top1(pixels, strict),
        lesson="Strict loading, and a golden logit for each checkpoint.",
        extra={
            "left random": random / sum(value.numel() for value in weights.values()),
            "missing keys": len(missing),
            "refused": refused,
            "golden logit": {
                "loose": float(bench.logits(pixels[:1], loose)[0, 0]),
                "strict": float(bench.logits(pixels[:1], strict)[0, 0]),
            },
        },
    )


def folder_numbers(bench: Bench) -> Case:
    """Reproduce defect 12.

    Wrong: a class index is taken for the number of its folder. Right: the names travel
    with the checkpoint in the order of training, which is the order of words: "1",
    "10", "100", "101" and so on.

    The folders are really made and sorted, and the names really go through a
    checkpoint's ``config.json``.
    """
    name_of = {str(i): name for i, name in enumerate(bench.class_names, start=1)}
    with tempfile.TemporaryDirectory() as folder:
        for number in name_of:
            (Path(folder) / number).mkdir()
        # Every reader of image folders sorts them so.
        order = sorted(path.name for path in Path(folder).iterdir())
        meant = [name_of[number] for number in order]
        config = type(bench.model.config)(id2label=dict(enumerate(meant)))
        config.save_pretrained(folder)
        travelled = checkpoints.read_config(folder).id2label
    by_number = [name_of.get(str(index)) for index in range(len(order))]
    wrong = sum(a == b for a, b in zip(by_number, meant, strict=True))
    return Case(
        number=12,
        title="An index is not a name",
        what=f"{len(order)} folders called 1 to {len(order)}",
        unit="classes named rightly",
        wrong=wrong,
        right=sum(travelled[i] == name for i, name in enumerate(meant)),
        lesson="Names travel with the checkpoint, in the order of training.",
        extra={"order": order, "told": by_number, "meant": meant},
    )
