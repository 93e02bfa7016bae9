"""LoRA: what is trained, and an export that is what was trained."""

import pytest
import torch
from safetensors.torch import load_file

from vitnb import devices
from vitnb.data import dataset
from vitnb.errors import UserError
from vitnb.models import checkpoints, pretrained, quantization
from vitnb.training import loop, lora


def fit(mini, shapes, seed=0, **options):
    train, valid, processor = shapes
    torch.manual_seed(seed)
    model = lora.add_adapters(mini, train.class_names, **options)
    return model, loop.train(model, mini, processor, train, valid, seed=seed)


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("precision", ["fp32", "nf4", "int8"])
def test_adapters_and_head_are_trained_and_nothing_else(mini, shapes, precision):
    train, valid, processor = shapes
    torch.manual_seed(0)
    model = lora.add_adapters(mini, train.class_names, base_precision=precision)
    before = snapshot(model)
    loop.train(model, mini, processor, train, valid)
    changed = {
        name for name, p in model.named_parameters() if not torch.equal(p, before[name])
    }
    head = {name for name in before if "classifier.modules_to_save" in name}
    adapters = {name for name in before if "lora_" in name}
    assert len(head) == 2 and len(adapters) == 2 * 18
    assert changed == head | adapters
    counts = lora.count_trained(model)
    assert counts["head"] == 64 * 4 + 4 and counts["linears"] == 3 * 6
    inputs_and_outputs = 4 * (64 + 64) + (64 + 128) + (128 + 64)
    assert counts["adapters"] == 3 * 8 * inputs_and_outputs


def test_targets_by_name(mini):
    model = pretrained.load_base(mini, ["a", "b"])
    count = {
        asked: len(lora.find_targets(model, asked))
        for asked in ("all", "attention", "mlp", "q_proj,v_proj", "fc1")
    }
    assert count == {"all": 18, "attention": 12, "mlp": 6, "q_proj,v_proj": 6, "fc1": 3}
    with pytest.raises(UserError, match="did you mean 'q_proj'"):
        lora.find_targets(model, "q_prj")
    assert "classifier" not in lora.find_targets(model, "all")


def test_the_merged_model_answers_like_the_adapters(mini, shapes):
    model, _ = fit(mini, shapes)
    pixels = dataset.first_batch(shapes[0], shapes[2], 8).to(devices.select_device())
    with torch.inference_mode():
        adapted = model.eval()(pixel_values=pixels).logits
        merged = lora.merge_adapters(model, mini, shapes[0].class_names)(
            pixel_values=pixels
        ).logits
        model.disable_adapter_layers()
        bare = model(pixel_values=pixels).logits
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=1e-4)
    assert (bare - adapted).abs().max() > 1e-2, (
        "the adapters must do something, or this test shows nothing"
    )


def test_qlora_adapters_are_merged_into_full_precision(mini, shapes):
    model, _ = fit(mini, shapes, base_precision="nf4")
    merged = lora.merge_adapters(model, mini, shapes[0].class_names)
    assert quantization.count_linears(merged) == (0, 19)
    base = pretrained.load_base(mini, shapes[0].class_names)
    name = "vit.layers.1.mlp.fc1"
    layer = model.get_base_model().get_submodule(name)
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * (32 / 8)
    torch.testing.assert_close(
        merged.get_submodule(name).weight,
        base.get_submodule(name).weight + delta,
        atol=1e-6,
        rtol=1e-5,
    )


def test_gradient_checkpointing_gives_the_same_gradients(mini, shapes):
    train, _, processor = shapes
    pixels, found = (
        dataset.first_batch(train, processor, 4).to(devices.select_device()),
        [],
    )
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = lora.add_adapters(
            mini, train.class_names, dropout=0.0, gradient_checkpointing=checkpointing
        )
        torch.nn.functional.cross_entropy(
            model(pixel_values=pixels).logits, torch.arange(4, device=pixels.device)
        ).backward()
        found.append(
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        )
    assert found[0].keys() == found[1].keys() and len(found[0]) == 38
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name])


def test_a_rank_that_makes_no_sense(mini):
    with pytest.raises(UserError, match="rank must be at least 1"):
        lora.add_adapters(mini, ["a", "b"], rank=0)


def test_an_export_is_whole_or_leaves_the_old_one(mini, shapes):
    model, _ = fit(mini, shapes, seed=5)
    before = {
        path: path.read_bytes()
        for path in (mini.outputs / "checkpoints").rglob("*")
        if path.is_file()
    }
    calls = []

    class Broken:
        def save_pretrained(self, folder):
            calls.append(folder)
            if len(calls) == 3:
                raise OSError("no space left")
            shapes[2].save_pretrained(folder)

    with pytest.raises(OSError, match="no space left"):
        lora.export_checkpoints(model, mini, Broken(), shapes[0].class_names)
    assert {
        path: path.read_bytes()
        for path in (mini.outputs / "checkpoints").rglob("*")
        if path.is_file()
    } == before
    assert [
        path.name for path in mini.outputs.iterdir() if path.name.startswith(".")
    ] == []


def test_export_sizes_are_those_of_the_files(mini):
    weights = load_file(mini.checkpoint("merged") / "model.safetensors")
    assert checkpoints.disk_bytes(mini.checkpoint("merged")) > 4 * sum(
        tensor.numel() for tensor in weights.values()
    )
