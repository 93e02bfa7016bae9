"""LoRA: what is trained, and an export that is what was trained."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from vitnb import devices, variants
from vitnb.data import dataset
from vitnb.errors import UserError, VariantError
from vitnb.models import (
    checkpoints,
    export,
    layers,
    loader,
    plans,
    pretrained,
    quantization,
)
from vitnb.records.files import MARKER
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


def unfinished(study) -> list[str]:
    """Return what stands beside the checkpoints for a moment only."""
    return [path.name for path in study.outputs.iterdir() if path.name[0] == "."]


@pytest.fixture
def own(mini, tmp_path, monkeypatch):
    """The mini study with checkpoints of its own, which a test may replace."""
    shutil.copytree(mini.outputs / "checkpoints", tmp_path / "mini" / "checkpoints")
    monkeypatch.setenv("VITNB_OUTPUTS", str(tmp_path))
    assert mini.outputs == tmp_path / "mini"
    return mini


def test_plans_of_the_fine_tuning_before_are_kept_and_said_to_be_old(
    own, shapes, capsys
):
    """And are refused, as they are of another model."""
    kept = layers.quantizable(loader.load_baseline(own).model)
    folder = export.export_plan(own, "small", [*list(kept)[:2], "classifier"])
    merged = checkpoints.fingerprint(own.checkpoint("merged"))
    plan = plans.Plan("small", 0.1, {}, *[0] * 2, *[0.0] * 5, 9, merged)
    plans.write_plan(own, plan)
    variant = variants.parse("plan:small-sdpa")
    files_before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(VariantError, match="Linears"):  # the plan above is empty
        loader.load_variant(own, variant)

    model, _ = fit(own, shapes, seed=7)
    lora.export_checkpoints(model, own, shapes[2], shapes[0].class_names)
    line = capsys.readouterr().out.splitlines()[-1]
    assert "small" in line and f"python -m vitnb plan {own.typed}" in line
    assert files_before == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert checkpoints.fingerprint(own.checkpoint("merged")) != merged
    with pytest.raises(UserError, match="made for another model") as told:
        loader.load_variant(own, variant)
    command = f"python -m vitnb plan {own.typed} --name small"
    assert command in str(told.value) and len(str(told.value).splitlines()) == 1
    assert unfinished(own) == []


def test_checkpoints_of_an_older_version_are_replaced(own, shapes):
    (own.outputs / "checkpoints" / MARKER).unlink()
    lora.check_request(own)
    model, _ = fit(own, shapes, seed=7)
    lora.export_checkpoints(model, own, shapes[2], shapes[0].class_names)
    assert (own.outputs / "checkpoints" / MARKER).exists() and unfinished(own) == []


@pytest.mark.parametrize("left", ["thesis.tex", "other/config.json", "merged/a/b"])
def test_somebody_elses_checkpoints_stay(own, shapes, left):
    """They are refused before a training, too."""
    folder = own.outputs / "checkpoints"
    (folder / MARKER).unlink()
    (folder / left).parent.mkdir(exist_ok=True)
    (folder / left).write_text("years of work")
    with pytest.raises(UserError, match="move it away"):
        lora.check_request(own)
    model = lora.add_adapters(own, shapes[0].class_names)
    with pytest.raises(UserError, match="move it away"):
        lora.export_checkpoints(model, own, shapes[2], shapes[0].class_names)
    assert (folder / left).read_text() == "years of work"


def test_the_base_may_not_lie_in_the_checkpoints(own):
    """Else the fine-tuned model would take the place of its own base."""
    study = replace(own, base=str(own.checkpoint("merged")))
    with pytest.raises(UserError, match="one lies in the other"):
        lora.check_request(study)


def test_a_request_is_checked_before_a_training(own):
    lora.check_request(own, "attention, fc1")
    with pytest.raises(UserError, match="did you mean 'q_proj'"):
        lora.check_request(own, "q_prj")
    with pytest.raises(UserError, match="alpha must be at least 1"):
        lora.add_adapters(own, ["a", "b"], alpha=0)


def test_the_marker_is_no_part_of_a_checkpoint(own):
    """It counts no bytes, and plain transformers load the folder with it."""
    folder = export.export_plan(own, "small", ["classifier"])
    sizes = {p.name: p.stat().st_size for p in folder.iterdir()}
    assert sizes.pop(MARKER) > 0
    assert checkpoints.disk_bytes(folder) == sum(sizes.values())
    assert AutoModelForImageClassification.from_pretrained(folder).num_labels == 4
