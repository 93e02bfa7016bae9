"""Checkpoints of the ViT family, small and random: each goes from fine-tuning to naming images, and computes what transformers does."""

from functools import partial

import pytest
import torch
from conftest import write_shapes
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2Model,
    SwinConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from vitnb import (
    ablate,
    accuracy,
    bases,
    blocks,
    checkpoints,
    data,
    finetune,
    floors,
    infer,
    kernels,
    latency,
    models,
    quantize,
    roofline,
    studies,
    switchboard,
    training,
    variants,
)  # fmt: skip
from vitnb.errors import UserError, VariantError

STUDY = """
title: a family
question: does it go through?
data: {folder}/shapes
base: {base}
finetune: {{epochs: 1, batch_size: 8}}
latency: {{samples: 20, seconds: 0.05}}
"""
VIT = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "image_size": 32, "patch_size": 8,
    "num_labels": 7,
}  # fmt: skip
CONFIGS = {
    "vit, old names": ViTConfig(**VIT),
    "vit, new names": ViTConfig(**VIT),
    "deit": DeiTConfig(**VIT, architectures=["DeiTForImageClassification"]),
    "swin": SwinConfig(image_size=32, patch_size=2, embed_dim=48, depths=[2, 1], num_heads=[2, 4], window_size=4, num_labels=7),
    "dinov2": Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=48, patch_size=8),
    "beit": BeitConfig(**VIT, use_relative_position_bias=True),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    write_shapes(folder / "shapes", {"train": 3, "valid": 2, "test": 3})
    return folder


def base(name: str, folder):
    """A checkpoint with large random weights, so that whatever is left out shows; its preprocessing gives 32 x 32 pixels."""
    torch.manual_seed(1)
    model = AutoModelForImageClassification.from_config(CONFIGS[name])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter += (1.0 if "relative_position_bias" in key else 0.1) * torch.randn_like(parameter)
    if name == "dinov2":  # as its authors give it: no head at all
        whole, model = model, Dinov2Model(model.config)
        model.load_state_dict(whole.dinov2.state_dict())
    if name == "deit":  # a base may come in 16 bits
        model.half()
    model.save_pretrained(folder)
    saved = load_file(folder / "model.safetensors")
    if name == "vit, new names":
        save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    assert ("vit.encoder.layer.0.attention.attention.query.weight" in saved) == name.startswith("vit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def study(name: str, folder):
    path = folder / f"{name.replace(', ', '-').replace(' ', '-')}.yaml"
    base(name, folder / path.stem)
    path.write_text(STUDY.format(folder=folder, base=folder / path.stem))
    return studies.load(str(path))


@pytest.mark.parametrize("name", CONFIGS)
def test_from_fine_tuning_to_naming_images(name, place, outputs, capsys):
    made = study(name, place)
    train, valid, test = (data.split(made, part) for part in data.SPLITS)
    processor = checkpoints.processor(bases.find(made))
    torch.manual_seed(0)
    model = finetune.with_adapters(made, train.class_names)
    said = "the base's head, for 7 classes, is replaced by a new one for 4"
    assert (said in capsys.readouterr().out) == (name != "dinov2")
    training.train(model, made, processor, train, valid)
    finetune.export(model, made, processor, train.class_names)
    pixels, found = torch.stack([p for p, _ in data.Pixels(test, processor)]), {}
    asked = {
        "fp32-sdpa": 1e-4,
        "fp32-eager": 1e-4,
        "nf4-sdpa": 1.0,
        "int8-fa2": 0.3,
    }  # how far from plain transformers, in spreads
    if models.device().type == "cuda" and name in ("swin", "beit"):  # flash-attn has no place for their position bias
        with pytest.raises(VariantError, match="use an sdpa variant"):
            accuracy.predict(models.load(made, variants.get("int8-fa2")), test)
        asked["int8-sdpa"] = asked.pop("int8-fa2")
    for variant in asked:
        loaded = models.load(made, variants.get(variant))
        assert loaded.linears_kept == (1 if loaded.variant.quantized else loaded.linears_kept)
        predictions, logits = accuracy.predict(loaded, test)
        found[variant] = torch.from_numpy(logits)
        assert loaded.class_names == train.class_names and predictions["labels"] == test.labels
        ran = kernels.trace(loaded, pixels[:2])["attention_ran"]
        assert (ran == "eager") == (variant == "fp32-eager") and (
            ran in ("eager", "flash-cpu") or loaded.device.type == "cuda"
        )
        latency.sweep(loaded, test, [1], made.latency)
        rows, _ = infer.classify(loaded, test.paths, test.root)
        assert [row["top1"] for row in rows] == [train.class_names[i] for i in found[variant].argmax(1)]
    assert roofline.flops(loaded.model.config, 2, (32, 32)) > 1e6
    plain = AutoModelForImageClassification.from_pretrained(
        made.checkpoint("merged"), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        wanted = plain(pixel_values=pixels).logits
    spread = wanted.std().item()
    for variant, off in asked.items():
        assert (found[variant] - wanted).abs().mean() < off * spread, variant
    if "vit," not in name:
        with pytest.raises(VariantError, match="the fused engine knows ViT"):
            models.load(made, variants.get("bf16-sdpa-fused"))
    assert 0 <= floors.measure(made, train, test, processor)["probe"] <= 1


@pytest.mark.parametrize("name", CONFIGS)
def test_every_block_can_be_kept_alone(name, place, outputs, monkeypatch):
    """The blocks against those that ran, 16 bits against a model that was never switched, replaying against computing."""
    made = study(name, place)
    model = bases.load(made, [*"abcdefg"])
    model.set_attn_implementation("sdpa")
    model.save_pretrained(made.checkpoint("merged"))
    checkpoints.processor(bases.find(made)).save_pretrained(made.checkpoint("merged"))
    split, ran = data.split(made, "test"), []
    monkeypatch.setattr(switchboard, "BATCH_SIZE", 5)  # of 12 images: the last batch is smaller

    def load():
        return models.load(made, variants.get("fp32-sdpa"))

    plain = load()
    images = switchboard.look(plain, split)
    for path, module in plain.model.named_modules():
        if type(module).__name__.endswith("Layer"):
            module.register_forward_hook(lambda *_, path=path: ran.append(path))
    plain.model.to(torch.bfloat16)
    halved = accuracy.kl(images.reference, switchboard.logits(plain, images.pixels, torch.bfloat16))
    layers = blocks.layers(plain.model)
    assert ran == 3 * layers and len(layers) == (3 if name == "swin" else 2)
    every = set(quantize.linears(plain.model)) - {"classifier"}
    assert {linear for (linear,) in ablate.singles(plain.model).values()} == every

    rows = ablate.sensitivity(load(), split, [4], torch.bfloat16, by="linear")
    found = {row["kept"]: row for row in rows}
    assert found["none"]["linears_quantized"] == len(every) and found["all"]["linears_quantized"] == 0
    assert found["all"]["kl"] == halved.mean().item() < found["none"]["kl"]
    for i in range(len(layers)):
        assert found[f"layer {i}"]["linears_kept"] == 7 and found[f"all but layer {i}"]["linears_quantized"] == 6
        assert found[f"all but layer {i}"]["kl"] != found["all"]["kl"]
    assert sum(part.startswith("outside ") for part in found) == (name == "swin")
    monkeypatch.setattr(ablate, "Walk", partial(switchboard.Walk, replay=False))
    assert ablate.sensitivity(load(), split, [4], torch.bfloat16, by="linear") == rows


def test_old_and_new_names_are_one_model(place, outputs):
    logits = []
    for name in ("vit, old names", "vit, new names"):
        torch.manual_seed(0)
        model = bases.load(study(name, place / "twice"), ["a", "b", "c", "d", "e", "f", "g"])
        with torch.no_grad():
            logits.append(model.eval()(pixel_values=torch.ones(1, 3, 32, 32, device=model.device)).logits)
    assert torch.equal(*logits)


def test_a_base_that_does_not_fit_its_config_or_its_preprocessing_is_refused(place, outputs):
    made = study("vit, old names", place / "wrong")
    folder = place / "wrong" / "vit-old-names"
    ViTImageProcessorPil(size={"height": 40, "width": 32}).save_pretrained(folder)
    with pytest.raises(UserError, match=r"does not take images of 40 x 32 pixels.*preprocessor_config.json"):
        bases.load(made, ["a", "b"])
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "layer.1.output" not in k}, folder / "model.safetensors", {"format": "pt"}
    )
    wrong = r"config and weights do not fit: 2 missing keys, such as vit\.layers\.1\.mlp\.fc2\.bias"
    with pytest.raises(UserError, match=wrong):
        bases.load(made, ["a", "b"])


def test_a_head_of_the_right_size_is_kept(place, outputs):
    made = study("vit, old names", place / "right")
    kept = ViTForImageClassification.from_pretrained(place / "right" / "vit-old-names").classifier.weight
    model = bases.load(made, [*"abcdefg"])
    assert model.replaced_classes == 0 and torch.equal(model.classifier.weight.cpu(), kept)
