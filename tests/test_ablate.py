"""Layer sensitivity: the divergence, the switching, and the replay."""

from contextlib import contextmanager

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from vitnb import ablate, accuracy, data, models, quantize, variants
from vitnb.errors import UserError


def test_kl_is_pytorchs():
    torch.manual_seed(0)
    reference, other = torch.randn(2, 40, 9, dtype=torch.float64) * 3
    oracle = torch.nn.functional.kl_div(
        other.log_softmax(-1), reference.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(accuracy.kl(reference, other), oracle)
    assert (accuracy.kl(reference, other) > 0).all() and (accuracy.kl(reference, reference + 4.0).abs() < 1e-12).all()


def test_layers_of_a_vit_in_order():
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=12, num_attention_heads=1, intermediate_size=64, image_size=16, patch_size=8
    )
    model = ViTForImageClassification(config)
    assert ablate.layers(model) == [f"vit.layers.{i}" for i in range(12)]
    found = ablate.configurations(model)
    assert (
        len(found) == 15
        and found["first and last"] == ["vit.layers.0", "vit.layers.11"]
        and found["layer 10"] == ["vit.layers.10"]
    )


@pytest.mark.parametrize(("bits", "kind"), [(4, "Linear4bit"), (8, "Linear8bitLt")])
def test_a_kept_layer_is_kept_and_the_others_are_not(mini, bits, kind):
    model = models.load(mini, variants.get("fp32-sdpa")).model
    plain = dict(quantize.linears(model))
    board = ablate.Switchboard(model, bits, torch.bfloat16)
    assert board.keep(["vit.layers.1"]) == (12, 7)
    types = {name: type(module).__name__ for name, module in quantize.linears(model).items()}
    assert {name for name, found in types.items() if found == "Linear"} == {
        n for n in types if "layers.1." in n or n == "classifier"
    }
    assert {found for name, found in types.items() if "layers.1." not in name and name != "classifier"} == {kind}
    assert board.keep([]) == (18, 1) and board.keep(["vit.layers.0", "vit.layers.2"]) == (6, 13)
    restored = quantize.linears(board.restore())
    assert all(restored[name] is module for name, module in plain.items())


def test_keeping_what_is_not_there(mini):
    board = ablate.Switchboard(models.load(mini, variants.get("fp32-sdpa")).model, 4, torch.bfloat16)
    with pytest.raises(UserError, match="changes nothing"):
        board.keep(["encoder.layer.21"])


@pytest.fixture(scope="module")
def rows(mini):
    return ablate.sensitivity(
        models.load(mini, variants.get("fp32-sdpa")), data.split(mini, "valid"), [4, 8], torch.bfloat16
    )


def test_rows_of_a_sensitivity_study(mini, rows):
    found = {(row["bits"], row["kept"]): (row["linears_quantized"], row["linears_kept"]) for row in rows}
    assert len(rows) == len(found) == 1 + 2 * 6
    for bits in (4, 8):
        assert found[bits, "none"] == (18, 1) and found[bits, "all"] == (0, 19)
        assert found[bits, "first and last"] == (6, 13) and found[bits, "layer 2"] == (12, 7)
    for row in rows:
        assert len(row["predicted"]) == len(row["kl_by_image"]) == 20
        assert row["kl"] == pytest.approx(sum(row["kl_by_image"]) / 20, rel=1e-4, abs=1e-12)
        labels = data.split(mini, "valid").labels
        assert row["top1"] == sum(a == b for a, b in zip(row["predicted"], labels, strict=True)) / 20
    assert rows[0]["kept"] == "full precision" and rows[0]["kl"] == 0


def test_quantizing_moves_the_answers_and_fewer_bits_more(rows):
    kl = {(row["bits"], row["kept"]): row["kl"] for row in rows}
    assert kl[4, "none"] > kl[8, "none"] > 0 and kl[4, "none"] > kl[4, "all"] > 0
    assert kl[4, "all"] == kl[8, "all"], "with nothing quantized the width cannot matter"


def test_none_is_what_the_exported_variant_does(mini, rows):
    """The in-place quantization against the checkpoint that the loader makes."""
    exported = models.load(mini, variants.get("nf4-sdpa"))
    quantize.forbid_packing(exported.model)
    full = models.load(mini, variants.get("fp32-sdpa"))
    valid = data.split(mini, "valid")
    oracle = accuracy.kl(accuracy.logits(full, valid).double(), accuracy.logits(exported, valid).double())
    none = next(row for row in rows if (row["bits"], row["kept"]) == (4, "none"))
    assert none["kl"] == pytest.approx(oracle.mean().item(), rel=0.02)


def test_replaying_the_first_layers_changes_no_bit(mini, rows, monkeypatch):
    @contextmanager
    def nothing(model, blocks, outputs):
        yield

    monkeypatch.setattr(ablate, "_replayed", nothing)
    again = ablate.sensitivity(
        models.load(mini, variants.get("fp32-sdpa")), data.split(mini, "valid"), [4, 8], torch.bfloat16
    )
    assert again == rows


def test_layers_worth_keeping():
    """One layer that helps on every image, one on average alone, one that does nothing."""
    none = [1.0 + 0.01 * i for i in range(50)]
    noisy = [value + (3.0 if i % 2 else -3.1) for i, value in enumerate(none)]
    by_name = {
        "none": none,
        "layer 0": none,
        "layer 1": [v - 0.5 - 0.001 * (i % 3) for i, v in enumerate(none)],
        "layer 2": noisy,
    }
    rows = [{"bits": 4, "kept": name, "kl_by_image": values} for name, values in by_name.items()]
    assert ablate.recommended(rows, 4) == ["layer 1"]
    assert ablate.recommended(rows, 4, count=0) == []
