"""A switched model against the exported variants: the same bits and the same bytes."""

import pytest
import torch
from bitsandbytes import functional

from vitnb import devices, variants
from vitnb.data.splits import load_split
from vitnb.errors import VariantError
from vitnb.mixed_precision import search, switchable
from vitnb.models import checkpoints, export, layers, loader, nf4, quantization
from vitnb.study import Study


def load(study: Study, name: str) -> loader.LoadedVariant:
    return loader.load_variant(study, variants.parse(name))


def switched(study: Study) -> switchable.SwitchableModel:
    full = load(study, "fp32-sdpa")
    dtype = devices.compute_dtype(full.device)
    return switchable.SwitchableModel(full.model, [4, 8], dtype)


def answers(study: Study, loaded: loader.LoadedVariant) -> torch.Tensor:
    """Return the logits of the validation images, in one batch."""
    full = load(study, "fp32-sdpa")
    pixels = switchable.reference_answers(full, load_split(study, "valid")).pixels
    return switchable.compute_logits(loaded, pixels, loaded.dtype)


@pytest.mark.parametrize(("bits", "name"), [(4, "nf4-sdpa"), (8, "int8-sdpa")])
def test_a_switched_model_is_the_exported_variant_bit_for_bit(
    mini, machine, bits, name
):
    exported = load(mini, name)
    full = load(mini, "fp32-sdpa")
    pixels = switchable.reference_answers(full, load_split(mini, "valid")).pixels
    model = switchable.SwitchableModel(full.model, [bits], exported.dtype)
    wanted = switchable.compute_logits(exported, pixels, exported.dtype)
    plain = switchable.compute_logits(full, pixels, exported.dtype)
    for _ in range(2):  # copies are used again and again
        model.switch({}, bits)
        logits = switchable.compute_logits(full, pixels, exported.dtype)
        assert torch.equal(logits, wanted) and not torch.equal(logits, plain)
        model.restore()
        logits = switchable.compute_logits(full, pixels, exported.dtype)
        assert torch.equal(logits, plain)


def test_logits_that_are_not_finite_score_no_choice(mini):
    full = load(mini, "fp32-sdpa")
    images = switchable.reference_answers(full, load_split(mini, "valid"))
    full.model.classifier.weight.data[0, 0] = float("inf")
    count = sum(map(len, images.pixels))
    told = f"the logits of {count} of {count} images are not finite"
    with pytest.raises(VariantError, match=told):
        switchable.compute_logits(full, images.pixels, full.dtype)


def test_a_cpu_that_packs_gives_other_answers(mini, packing_cpu, monkeypatch):
    """So the test above can tell packed copies from copies that are not."""
    packed = answers(mini, load(mini, "nf4-sdpa"))
    monkeypatch.setattr(
        nf4, "allow_cpu_packing", lambda model, dtype: nf4.disable_cpu_packing(model)
    )
    assert not torch.equal(answers(mini, load(mini, "nf4-sdpa")), packed)


def test_bytes_are_those_of_the_variant_that_runs(mini, machine, tmp_path):
    exported = load(mini, "nf4-sdpa")
    answers(mini, exported)
    ran = quantization.resident_bytes(exported.model)
    assert search.PlanSearch(mini, tmp_path).uniform_bytes == ran
    copies = switched(mini).linear_bytes(4)
    for name, module in layers.quantizable(exported.model).items():
        assert copies[name] == quantization.resident_bytes(module), name


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_exports_and_copies_quantize_the_same_numbers(
    mini, tmp_path, monkeypatch, half
):
    """GPUs below SM80 have float16 and no bfloat16."""
    monkeypatch.setattr(devices, "half_dtype", lambda device: half)
    export.save_quantized(
        mini.checkpoint("merged"), tmp_path / "nf4", "nf4", ["classifier"]
    )
    exported = layers.linears(checkpoints.read_model(tmp_path / "nf4"))
    for name, copy in switched(mini).copies[4].items():
        weight, state = copy.weight.data, copy.weight.quant_state
        wanted = exported[name].weight
        assert torch.equal(weight, wanted.data.to(weight.device)), name
        # Some versions of bitsandbytes unpack to this type before every product.
        assert state.dtype == wanted.quant_state.dtype == half
        assert torch.equal(
            functional.dequantize_4bit(weight, state).cpu(),
            functional.dequantize_4bit(wanted.data, wanted.quant_state).cpu(),
        )
