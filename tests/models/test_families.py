"""Small random checkpoints of the ViT family go from fine-tuning to naming images.

Each one must give the logits of plain transformers.
"""

from functools import partial

import pytest
import torch
from conftest import write_shapes
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    BitImageProcessorPil,
    DeiTConfig,
    Dinov2Config,
    Dinov2Model,
    SwinConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from vitnb import devices, variants
from vitnb.data import dataset
from vitnb.data.splits import SPLITS, load_split
from vitnb.errors import UserError, VariantError
from vitnb.inference import classify
from vitnb.measure import accuracy, latency, profiler, roofline
from vitnb.mixed_precision import ablation, switchable
from vitnb.models import checkpoints, inspection, loader, pretrained
from vitnb.models.layers import linears, transformer_blocks
from vitnb.study import load_study
from vitnb.training import baselines, loop, lora

STUDY = """
title: a family
question: does it go through?
data: {folder}/shapes
base: {base}
finetune: {{epochs: 1, batch_size: 8}}
latency: {{samples: 20, seconds: 0.05}}
"""
VIT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 7,
}
CONFIGS = {
    "vit, old names": ViTConfig(**VIT),
    "vit, new names": ViTConfig(**VIT),
    "deit": DeiTConfig(**VIT, architectures=["DeiTForImageClassification"]),
    "swin": SwinConfig(
        image_size=32,
        patch_size=2,
        embed_dim=48,
        depths=[2, 1],
        num_heads=[2, 4],
        window_size=4,
        num_labels=7,
    ),
    "dinov2": Dinov2Config(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=48,
        patch_size=8,
    ),
    "beit": BeitConfig(**VIT, use_relative_position_bias=True),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    write_shapes(folder / "shapes", {"train": 3, "valid": 2, "test": 3})
    return folder


def write_base(name: str, folder):
    """Write a checkpoint whose preprocessing gives 32 x 32 pixels.

    Its random weights are large, so that a part that is left out shows.
    """
    torch.manual_seed(1)
    model = AutoModelForImageClassification.from_config(CONFIGS[name])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            scale = 1.0 if "relative_position_bias" in key else 0.1
            parameter += scale * torch.randn_like(parameter)
    if name == "dinov2":  # as its authors give it: no head at all
        whole, model = model, Dinov2Model(model.config)
        model.load_state_dict(whole.dinov2.state_dict())
    if name == "deit":  # a base may come in 16 bits
        model.half()
    model.save_pretrained(folder)
    saved = load_file(folder / "model.safetensors")
    if name == "vit, new names":
        save_file(
            model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"}
        )
    assert (
        "vit.encoder.layer.0.attention.attention.query.weight" in saved
    ) == name.startswith("vit")
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    if name == "dinov2":  # as its authors give it: resized by the shortest edge, cut
        processor = BitImageProcessorPil(
            size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}
        )
    processor.save_pretrained(folder)


def study(name: str, folder):
    path = folder / f"{name.replace(', ', '-').replace(' ', '-')}.yaml"
    write_base(name, folder / path.stem)
    path.write_text(STUDY.format(folder=folder, base=folder / path.stem))
    return load_study(str(path))


@pytest.mark.parametrize("name", CONFIGS)
def test_from_fine_tuning_to_naming_images(name, place, outputs, capsys):
    made = study(name, place)
    train, valid, test = (load_split(made, part) for part in SPLITS)
    processor = checkpoints.load_processor(pretrained.find_base(made))
    torch.manual_seed(0)
    model = lora.add_adapters(made, train.class_names)
    said = "the base's head, for 7 classes, is replaced by a new one for 4"
    assert (said in capsys.readouterr().out) == (name != "dinov2")
    loop.train(model, made, processor, train, valid)
    lora.export_checkpoints(model, made, processor, train.class_names)
    pixels = torch.stack([p for p, _ in dataset.PixelDataset(test, processor)])
    # Variant -> largest mean distance to plain transformers, in standard deviations.
    limits = {"fp32-sdpa": 1e-4, "fp32-eager": 1e-4, "nf4-sdpa": 1.0, "int8-fa2": 0.3}
    if devices.select_device().type == "cuda" and name in ("swin", "beit"):
        # flash-attn has no place for their position bias
        loaded = loader.load_variant(made, variants.parse("int8-fa2"))
        with pytest.raises(VariantError, match="use an sdpa variant"):
            accuracy.predict(loaded, test)
        limits["int8-sdpa"] = limits.pop("int8-fa2")
    logits = {}
    for variant in limits:
        loaded = loader.load_variant(made, variants.parse(variant))
        if loaded.variant.quantized:
            assert loaded.linears_kept == 1
        predictions, values = accuracy.predict(loaded, test)
        logits[variant] = torch.from_numpy(values)
        assert loaded.class_names == train.class_names
        assert predictions["labels"] == test.labels
        ran = profiler.profile_forward(loaded, pixels[:2])["attention_ran"]
        assert (ran == "eager") == (variant == "fp32-eager")
        assert ran in ("eager", "flash-cpu") or loaded.device.type == "cuda"
        latency.time_batch_sizes(loaded, test, [1], made.latency)
        rows, _ = classify(loaded, test.paths, test.root)
        names = [train.class_names[i] for i in logits[variant].argmax(1)]
        assert [row["top1"] for row in rows] == names
    for export in ("merged", "nf4", "int8"):
        lines = inspection.inspect_checkpoint(made.checkpoint(export))
        assert lines[3].startswith("preprocessing 32x32, mean")
    assert roofline.count_flops(loaded.model.config, 2, (32, 32)) > 1e6
    plain = AutoModelForImageClassification.from_pretrained(
        made.checkpoint("merged"), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        wanted = plain(pixel_values=pixels).logits
    spread = wanted.std().item()
    for variant, limit in limits.items():
        assert (logits[variant] - wanted).abs().mean() < limit * spread, variant
    if "vit," not in name:
        with pytest.raises(VariantError, match="the fused engine knows ViT"):
            loader.load_variant(made, variants.parse("bf16-sdpa-fused"))
    assert 0 <= baselines.measure_baselines(made, train, test, processor)["probe"] <= 1


@pytest.mark.parametrize("name", CONFIGS)
def test_every_block_can_be_kept_alone(name, place, outputs, monkeypatch):
    """The blocks are those that ran; a switched model is like one never switched.

    Replaying cached activations gives what computing everything gives.
    """
    made = study(name, place)
    model = pretrained.load_base(made, [*"abcdefg"])
    model.set_attn_implementation("sdpa")
    model.save_pretrained(made.checkpoint("merged"))
    checkpoints.load_processor(pretrained.find_base(made)).save_pretrained(
        made.checkpoint("merged")
    )
    split = load_split(made, "test")
    ran = []
    # There are 12 images, so the last batch is smaller.
    monkeypatch.setattr(switchable, "BATCH_SIZE", 5)

    def load():
        return loader.load_variant(made, variants.parse("fp32-sdpa"))

    plain = load()
    images = switchable.reference_answers(plain, split)
    for path, module in plain.model.named_modules():
        if type(module).__name__.endswith("Layer"):
            module.register_forward_hook(lambda *_, path=path: ran.append(path))
    plain.model.to(torch.bfloat16)
    halved = accuracy.kl_divergence(
        images.reference,
        switchable.compute_logits(plain, images.pixels, torch.bfloat16),
    )
    layers = transformer_blocks(plain.model)
    assert ran == 3 * layers and len(layers) == (3 if name == "swin" else 2)
    every = set(linears(plain.model)) - {"classifier"}
    single = ablation.single_linears(plain.model).values()
    assert {linear for (linear,) in single} == every

    rows = ablation.measure_sensitivity(load(), split, [4], torch.bfloat16, by="linear")
    rows_by_kept = {row["kept"]: row for row in rows}
    assert rows_by_kept["none"]["linears_quantized"] == len(every)
    assert rows_by_kept["all"]["linears_quantized"] == 0
    assert (
        rows_by_kept["all"]["kl"] == halved.mean().item() < rows_by_kept["none"]["kl"]
    )
    for i in range(len(layers)):
        assert rows_by_kept[f"layer {i}"]["linears_kept"] == 7
        assert rows_by_kept[f"all but layer {i}"]["linears_quantized"] == 6
        assert rows_by_kept[f"all but layer {i}"]["kl"] != rows_by_kept["all"]["kl"]
    assert sum(part.startswith("outside ") for part in rows_by_kept) == (name == "swin")
    monkeypatch.setattr(
        ablation, "CachedEvaluator", partial(switchable.CachedEvaluator, replay=False)
    )
    assert (
        ablation.measure_sensitivity(load(), split, [4], torch.bfloat16, by="linear")
        == rows
    )


def test_old_and_new_names_are_one_model(place, outputs):
    logits = []
    for name in ("vit, old names", "vit, new names"):
        torch.manual_seed(0)
        model = pretrained.load_base(
            study(name, place / "twice"), ["a", "b", "c", "d", "e", "f", "g"]
        )
        with torch.no_grad():
            pixels = torch.ones(1, 3, 32, 32, device=model.device)
            logits.append(model.eval()(pixel_values=pixels).logits)
    assert torch.equal(*logits)


def test_a_base_that_does_not_fit_its_config_or_its_preprocessing_is_refused(
    place, outputs
):
    made = study("vit, old names", place / "wrong")
    folder = place / "wrong" / "vit-old-names"
    ViTImageProcessorPil(size={"height": 40, "width": 32}).save_pretrained(folder)
    with pytest.raises(
        UserError,
        match=r"does not take images of 40 x 32 pixels.*preprocessor_config.json",
    ):
        pretrained.load_base(made, ["a", "b"])
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "layer.1.output" not in k},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    wrong = (
        r"config and weights do not fit: 2 missing keys, "
        r"such as vit\.layers\.1\.mlp\.fc2\.bias"
    )
    with pytest.raises(UserError, match=wrong):
        pretrained.load_base(made, ["a", "b"])


def test_a_head_of_the_right_size_is_kept(place, outputs):
    made = study("vit, old names", place / "right")
    kept = ViTForImageClassification.from_pretrained(
        place / "right" / "vit-old-names"
    ).classifier.weight
    model = pretrained.load_base(made, [*"abcdefg"])
    assert model.replaced_classes == 0 and torch.equal(
        model.classifier.weight.cpu(), kept
    )
