"""Checkpoints load in plain transformers, keep their bits and are safe to open."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from vitnb import devices, variants
from vitnb.errors import UserError, VariantError
from vitnb.models import checkpoints, layers, loader, pretrained, quantization
from vitnb.study import ROOT, Study

PLAIN = """
import json, sys, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1]).eval()
processor = AutoImageProcessor.from_pretrained(sys.argv[1])
image = Image.open(sys.argv[2]).convert("RGB")
inputs = processor(image, return_tensors="pt").to(model.device, model.dtype)
with torch.inference_mode():
    logits = model(**inputs).logits[0].float()
assert "vitnb" not in sys.modules
types = {type(module).__name__ for module in model.modules()}
print(json.dumps({
    "names": model.config.id2label,
    "size": list(inputs["pixel_values"].shape),
    "finite": bool(logits.isfinite().all()),
    "types": sorted(name for name in types if "Linear" in name),
}))
"""


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("merged", ["Linear"]),
        ("nf4", ["Linear", "Linear4bit"]),
        ("int8", ["Linear", "Linear8bitLt"]),
    ],
)
def test_an_export_loads_without_this_package(mini, tmp_path, name, types):
    picture = next((ROOT / mini.data / "test" / "ring").iterdir())
    words = [sys.executable, "-c", PLAIN, str(mini.checkpoint(name)), str(picture)]
    elsewhere = [
        path
        for path in os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if Path(path) != ROOT
    ]
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": os.pathsep.join(elsewhere)}
    ended = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert list(result["names"].values()) == ["circle", "cross", "ring", "square"]
    assert result["size"] == [1, 3, 32, 32] and result["finite"]
    assert result["types"] == types


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_quantized_export_is_bit_identical_after_a_reload(mini, name):
    """Saving and loading changes neither weights nor quantization state."""
    half = devices.half_dtype(devices.select_device())
    made = AutoModelForImageClassification.from_pretrained(
        mini.checkpoint("merged"),
        dtype=half,
        quantization_config=quantization.bnb_config(name, ["classifier"], half),
    )
    loaded = AutoModelForImageClassification.from_pretrained(mini.checkpoint(name))
    before, after = made.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert any("quant_state" in key or "SCB" in key for key in before)
    for key, tensor in before.items():
        if isinstance(tensor, torch.Tensor):
            assert tensor.dtype == after[key].dtype and torch.equal(
                tensor, after[key]
            ), key
        else:
            assert tensor == after[key], key


def test_nf4_holds_the_merged_weights(mini):
    """The loader quantizes the merged weights, in 16 bits, as bitsandbytes does."""
    from bitsandbytes import functional

    half = devices.half_dtype(devices.select_device())
    merged = AutoModelForImageClassification.from_pretrained(
        mini.checkpoint("merged"), dtype=half
    )
    small = AutoModelForImageClassification.from_pretrained(mini.checkpoint("nf4"))
    plain = layers.linears(merged.to(small.device))
    counted = 0
    for name, module in layers.linears(small).items():
        if isinstance(module, quantization.bnb.nn.Linear4bit):
            oracle = functional.quantize_4bit(
                plain[name].weight.data, quant_type="nf4", compress_statistics=True
            )
            assert torch.equal(
                functional.dequantize_4bit(
                    module.weight.data, module.weight.quant_state
                ),
                functional.dequantize_4bit(*oracle),
            )
            counted += 1
        else:
            assert torch.equal(module.weight, plain[name].weight)
    assert counted == 18


def test_what_is_kept_and_what_is_quantized(mini):
    merged = load_file(mini.checkpoint("merged") / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    half = devices.half_dtype(devices.select_device())
    for name, weights in (("nf4", torch.uint8), ("int8", torch.int8)):
        tensors = load_file(mini.checkpoint(name) / "model.safetensors")
        assert tensors["classifier.weight"].dtype == half
        small = [
            key
            for key, tensor in tensors.items()
            if key.endswith(".weight") and tensor.dtype == weights
        ]
        assert len(small) == 18 and not [
            key for key in small if "norm" in key or "classifier" in key
        ]


def test_a_variant_tells_what_was_loaded(mini):
    full, small = (
        loader.load_variant(mini, variants.parse(name))
        for name in ("fp32-sdpa", "nf4-sdpa")
    )
    weights = load_file(mini.checkpoint("merged") / "model.safetensors")
    parameters = sum(tensor.numel() for tensor in weights.values())
    assert full.parameters == small.parameters == parameters
    assert (full.linears_quantized, full.linears_kept) == (0, 19)
    assert (small.linears_quantized, small.linears_kept) == (18, 1)
    assert full.dtype == torch.float32
    assert small.dtype == devices.compute_dtype(small.device)
    assert small.class_names == ["circle", "cross", "ring", "square"]
    files = [path.stat().st_size for path in mini.checkpoint("nf4").iterdir()]
    assert small.disk_bytes == sum(files) < full.disk_bytes
    assert small.resident_bytes < full.resident_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["nf4-sdpa", "int8-sdpa"])
def test_every_parameter_has_the_type_that_the_variant_computes_in(
    mini, monkeypatch, name, dtype
):
    """transformers leaves some in the file's bfloat16 where float32 is asked for."""
    monkeypatch.setattr(devices, "compute_dtype", lambda device: dtype)
    loaded = loader.load_variant(mini, variants.parse(name))
    assert loaded.dtype == dtype
    types = {
        name: parameter.dtype
        for name, parameter in loaded.model.named_parameters()
        if parameter.is_floating_point()
    }
    assert "classifier.weight" in types and "vit.layers.0.mlp.fc1.bias" in types
    assert {name: kind for name, kind in types.items() if kind != dtype} == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_weights_are_packed_only_to_compute_in_bfloat16(mini, monkeypatch, dtype):
    """bitsandbytes multiplies packed weights in bfloat16, whatever is asked for."""
    monkeypatch.setattr(quantization.bnb.nn.modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(devices, "compute_dtype", lambda device: dtype)
    loaded = loader.load_variant(mini, variants.parse("nf4-sdpa"))
    packed = {
        module.support_avx512bf16_for_cpu
        for module in loaded.model.modules()
        if isinstance(module, quantization.bnb.nn.Linear4bit)
    }
    assert packed == {dtype == torch.bfloat16}


@pytest.mark.parametrize("name", ["nf4-sdpa", "nf4-sdpa-fused", "int8-sdpa"])
def test_resident_bytes_are_those_of_the_model_that_has_run(mini, machine, name):
    """A CPU that packs NF4 weights has packed them when the model is loaded."""
    loaded = loader.load_variant(mini, variants.parse(name))
    before = {key: p.clone() for key, p in loaded.model.named_parameters()}
    with loaded.inference() as engine:
        engine(pixel_values=loaded.prepare(torch.randn(2, 3, 32, 32)))
    assert loaded.resident_bytes == quantization.resident_bytes(loaded.model)
    for key, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, before[key]), key


def test_whatever_a_library_raises_is_the_variant_s_reason(mini, monkeypatch):
    """While a variant is loaded and in its block; elsewhere a mistake is a mistake."""

    def broken(*arguments, **options):
        raise ImportError("undefined symbol\nand more")

    loaded = loader.load_variant(mini, variants.parse("fp32-sdpa"))
    with (
        pytest.raises(VariantError, match=r"^RuntimeError: no kernel image$") as told,
        loaded.inference(),
    ):
        raise RuntimeError("no kernel image\nand more")
    assert isinstance(told.value.__cause__, RuntimeError), "its trace is not lost"
    for known in (UserError("as it is"), VariantError("as it is")):
        with (
            pytest.raises(type(known), match=r"^as it is$") as told,
            loaded.inference(),
        ):
            raise known
        assert told.value is known
    with pytest.raises(KeyboardInterrupt), loaded.inference():
        raise KeyboardInterrupt
    with (
        pytest.raises(VariantError, match=r"^out of memory: lower batch_size"),
        loaded.inference(),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(NameError):
        undefined + 1  # noqa: F821
    monkeypatch.setattr(loader, "_read_model", broken)
    with pytest.raises(VariantError, match=r"^ImportError: undefined symbol$"):
        loader.load_variant(mini, variants.parse("fp32-sdpa"))


def test_a_checkpoint_that_is_not_what_the_variant_needs(mini):
    with pytest.raises(VariantError, match="not quantized"):
        loader.load_variant(mini, variants.parse("nf4-sdpa"), mini.checkpoint("merged"))
    with pytest.raises(VariantError, match="Linears are quantized"):
        loader.load_variant(mini, variants.parse("bf16-sdpa"), mini.checkpoint("nf4"))


def test_a_checkpoint_that_lacks_a_tensor_is_refused(mini, tmp_path):
    """transformers would fill it with random numbers and go on."""
    shutil.copytree(mini.checkpoint("merged"), tmp_path / "part")
    weights = load_file(tmp_path / "part" / "model.safetensors")
    del weights["vit.encoder.layer.1.intermediate.dense.weight"]
    save_file(
        weights, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(
        UserError, match=r"1 missing keys, such as vit.layers.1.mlp.fc1.weight"
    ):
        loader.load_variant(mini, variants.parse("fp32-sdpa"), tmp_path / "part")


def test_full_precision_is_full(mini):
    """TensorFloat-32 would make it 19 bits."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    loader.load_variant(mini, variants.parse("fp32-sdpa"))
    assert (
        not torch.backends.cuda.matmul.allow_tf32
        and not torch.backends.cudnn.allow_tf32
    )


def test_the_preprocessing_of_the_base_travels_with_every_export(mini):
    wanted = AutoImageProcessor.from_pretrained(pretrained.find_base(mini)).to_dict()
    for name in ("merged", "nf4", "int8"):
        assert (
            AutoImageProcessor.from_pretrained(mini.checkpoint(name)).to_dict()
            == wanted
        )


def test_pickles_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoints.require_safetensors(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin is a pickle"):
        checkpoints.require_safetensors(tmp_path)


def test_a_missing_checkpoint_names_the_command(mini):
    with pytest.raises(
        UserError, match=f"python -m vitnb run finetune -p study {mini.typed}"
    ):
        loader.load_variant(mini, variants.parse("nf4-sdpa"), mini.outputs / "nowhere")


def test_a_precision_that_is_not_there(mini):
    with pytest.raises(UserError, match="base_precision must be"):
        pretrained.load_base(mini, ["a", "b"], "fp8")


def test_the_fresh_head_is_the_same_in_every_precision(mini):
    """So that LoRA and QLoRA start alike."""
    heads = []
    for weights in ("fp32", "nf4"):
        torch.manual_seed(3)
        heads.append(
            pretrained.load_base(mini, ["a", "b", "c"], weights)
            .classifier.weight.detach()
            .clone()
        )
    assert torch.equal(*heads) and heads[0].shape == (3, 64)


def test_the_base_of_another_study_is_asked_for_by_the_command_that_makes_it():
    with pytest.raises(UserError, match="python -m vitnb pretrain nowhere"):
        pretrained.find_base(
            Study("one", "t", "q", "garden", base="outputs/nowhere/base")
        )
