"""Layer sensitivity: KL divergence, switching, replay, directions and the verdict."""

import json

import numpy as np
import pytest
import torch
from conftest import killed_at
from scipy import stats
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from vitnb import devices, variants
from vitnb.analysis import sensitivity
from vitnb.data.splits import load_split
from vitnb.errors import UserError
from vitnb.measure import accuracy
from vitnb.mixed_precision import ablation, switchable
from vitnb.models import checkpoints, layers, loader
from vitnb.records.resume import ResumeCache


def test_kl_is_pytorchs():
    torch.manual_seed(0)
    reference, other = torch.randn(2, 40, 9, dtype=torch.float64) * 3
    oracle = torch.nn.functional.kl_div(
        other.log_softmax(-1),
        reference.log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    torch.testing.assert_close(accuracy.kl_divergence(reference, other), oracle)
    assert (accuracy.kl_divergence(reference, other) > 0).all()
    shifted = accuracy.kl_divergence(reference, reference + 4.0)
    assert (shifted.abs() < 1e-12).all(), "softmax does not see a constant"


def test_layers_and_linears_of_a_vit_in_order():
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=12,
        num_attention_heads=1,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
    )
    model = ViTForImageClassification(config)
    assert layers.transformer_blocks(model) == [f"vit.layers.{i}" for i in range(12)]
    found = ablation.configurations(model)
    assert len(found) == 3 + 2 * 12 and found["layer 10"] == ["vit.layers.10"]
    assert found["first and last"] == ["vit.layers.0", "vit.layers.11"]
    every = set(layers.linears(model)) - {"classifier"}
    assert set(found["all but layer 1"]) == {
        name for name in every if ".layers.1." not in name
    }
    kinds = layers.linear_kinds(model)
    assert list(kinds) == ["q", "k", "v", "o", "fc1", "fc2"]
    assert kinds["o"] == [f"vit.layers.{i}.attention.o_proj" for i in range(12)]
    found = ablation.configurations(model, "linear")
    assert len(found) == 3 + 2 * (12 + 6 + 72) and found["layer 11 fc2"] == [
        "vit.layers.11.mlp.fc2"
    ]
    assert set(found["every v"]) == {name for name in every if name.endswith("v_proj")}
    assert every - set(found["all but layer 1 q"]) == {"vit.layers.1.attention.q_proj"}
    with pytest.raises(UserError, match="by must be layer or linear, got 'head'"):
        ablation.configurations(model, "head")


def test_lists_that_hold_no_blocks():
    """Lists of heads, experts, stages, norms and Linears are no lists of blocks."""

    def several(count, make):
        return nn.ModuleList(make() for _ in range(count))

    def linear():
        return nn.Linear(4, 4)

    def block():
        mlp = several(2, lambda: nn.Sequential(linear(), nn.GELU()))
        return nn.ModuleDict(
            {"norm": nn.RMSNorm(4), "heads": several(3, linear), "mlp": mlp}
        )

    def stage(count):
        merge = nn.Sequential(nn.LayerNorm(4), linear())
        return nn.ModuleDict({"inner": several(count, block), "merge": merge})

    beside = {
        "patches": several(5, linear),
        "norms": several(4, lambda: nn.LayerNorm(4)),
    }
    model = nn.ModuleDict(beside | {"stages": nn.ModuleList([stage(1), stage(2)])})
    assert layers.transformer_blocks(model) == [
        "stages.0.inner.0",
        "stages.1.inner.0",
        "stages.1.inner.1",
    ]
    with pytest.raises(
        UserError,
        match="ModuleDict has no transformer blocks: take a base of the ViT family",
    ):
        layers.transformer_blocks(nn.ModuleDict(beside))


def linear_types(model: nn.Module) -> dict[str, str]:
    """Return the class of every Linear by its full name."""
    return {
        name: type(module).__name__ for name, module in layers.linears(model).items()
    }


def switchable_model(study, bits: list[int]) -> switchable.SwitchableModel:
    """Return the mini model, switchable, in the type that quantized variants use."""
    loaded = loader.load_variant(study, variants.parse("fp32-sdpa"))
    dtype = devices.compute_dtype(loaded.device)
    return switchable.SwitchableModel(loaded.model, bits, dtype)


@pytest.mark.parametrize(("bits", "kind"), [(4, "Linear4bit"), (8, "Linear8bitLt")])
def test_a_kept_layer_is_kept_and_the_others_are_not(mini, bits, kind):
    switched = switchable_model(mini, [bits])
    model = switched.model
    original = dict(layers.linears(model))

    def keep(prefixes):
        kept = switched.linears_under(prefixes)
        return switched.switch(dict.fromkeys(kept, switchable.UNQUANTIZED), bits)

    assert keep(["vit.layers.1"]) == (12, 7)
    types = linear_types(model)
    kept = {name for name in types if "layers.1." in name or name == "classifier"}
    assert {name for name, found in types.items() if found == "Linear"} == kept
    assert {found for name, found in types.items() if name not in kept} == {kind}
    assert keep([]) == (18, 1) and keep(["vit.layers.0", "vit.layers.2"]) == (6, 13)
    restored = layers.linears(switched.restore())
    assert all(restored[name] is module for name, module in original.items())


def test_two_widths_at_once(mini):
    switched = switchable_model(mini, [4, 8])
    fc1, q = "vit.layers.0.mlp.fc1", "vit.layers.2.attention.q_proj"
    assert switched.switch({fc1: 8, q: 16}, 4) == (17, 2)
    types = linear_types(switched.model)
    assert (
        types.pop(fc1) == "Linear8bitLt"
        and types.pop(q) == types.pop("classifier") == "Linear"
    )
    assert set(types.values()) == {"Linear4bit"}


def test_keeping_what_is_not_there(mini):
    switched = switchable_model(mini, [4])
    with pytest.raises(UserError, match="changes nothing"):
        switched.linears_under(["encoder.layer.21"])
    with pytest.raises(UserError, match=r"'classifier' changes nothing"):
        switched.switch({"classifier": 16}, 4)


def measured(study, **options) -> list[dict]:
    """Measure the sensitivity of a study's model, as the ablate notebook does."""
    loaded = loader.load_variant(study, variants.parse("fp32-sdpa"))
    valid = load_split(study, "valid")
    return ablation.measure_sensitivity(loaded, valid, [4, 8], **options)


@pytest.fixture(scope="module")
def rows(mini):
    return measured(mini, by="linear")


def test_rows_of_a_sensitivity_study(mini, rows):
    found = {
        (row["bits"], row["kept"]): (row["linears_quantized"], row["linears_kept"])
        for row in rows
    }
    assert len(rows) == len(found) == 1 + 2 * (3 + 2 * (3 + 6 + 18))
    for bits in (4, 8):
        assert found[bits, "none"] == (18, 1) and found[bits, "all"] == (0, 19)
        assert found[bits, "first and last"] == (6, 13) and found[bits, "layer 2"] == (
            12,
            7,
        )
        assert found[bits, "all but layer 2"] == (6, 13) and found[
            bits, "all but layer 2 fc1"
        ] == (1, 18)
        assert found[bits, "every fc1"] == (15, 4) and found[bits, "layer 0 q"] == (
            17,
            2,
        )
    for row in rows:
        assert len(row["predicted"]) == len(row["kl_by_image"]) == 20
        assert row["kl"] == pytest.approx(
            sum(row["kl_by_image"]) / 20, rel=1e-4, abs=1e-12
        )
        labels = load_split(mini, "valid").labels
        assert (
            row["top1"]
            == sum(a == b for a, b in zip(row["predicted"], labels, strict=True)) / 20
        )
    assert rows[0]["kept"] == "full precision" and rows[0]["kl"] == 0


def test_quantizing_moves_the_answers_and_fewer_bits_more(rows):
    kl = {(row["bits"], row["kept"]): row["kl"] for row in rows}
    assert kl[4, "none"] > kl[8, "none"] > 0 and kl[4, "none"] > kl[4, "all"] > 0
    assert kl[4, "all"] == kl[8, "all"], (
        "with nothing quantized the width cannot matter"
    )


def test_none_is_what_the_exported_variant_does(mini, rows):
    """The in-place quantization against the checkpoints that the loader makes."""
    full = loader.load_variant(mini, variants.parse("fp32-sdpa"))
    images = switchable.reference_answers(full, load_split(mini, "valid"))
    for bits, name in ((4, "nf4-sdpa"), (8, "int8-sdpa")):
        exported = loader.load_variant(mini, variants.parse(name))
        logits = switchable.compute_logits(exported, images.pixels, exported.dtype)
        none = next(row for row in rows if (row["bits"], row["kept"]) == (bits, "none"))
        for key, value in images.scores(logits).items():
            assert none[key] == value, key


def test_replaying_the_first_layers_changes_no_bit(mini, rows, monkeypatch):
    monkeypatch.setattr(
        switchable.CachedEvaluator, "_unchanged_blocks", lambda self, changed: []
    )
    assert measured(mini, by="linear") == rows


def test_a_killed_run_goes_on_and_another_checkpoint_starts_anew(
    mini, tmp_path, monkeypatch
):
    """Killed before its 11th configuration, run twice, and run on other weights."""
    evaluated = killed_at(monkeypatch, 11)
    with pytest.raises(KeyboardInterrupt):
        measured(mini, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 10 and all(
        json.loads(p.read_text()) for p in tmp_path.iterdir()
    )
    rows = measured(mini, folder=tmp_path)
    # Evaluated once: "all", which is equal at both widths; and at each width "first and
    # last", which of 3 layers quantizes the middle one, as "all but layer 1" does.
    configurations = 2 * (3 + 2 * 3) - 1 - 2
    assert len(evaluated) == 11 + configurations - 10
    assert (
        rows == measured(mini, folder=tmp_path)
        and len(evaluated) == 11 + configurations - 10
    )
    assert rows == measured(mini), "what was read back is what is measured"
    before = len(evaluated)
    monkeypatch.setattr(checkpoints, "fingerprint", lambda folder: "other weights")
    assert (
        measured(mini, folder=tmp_path) == rows
        and len(evaluated) == before + configurations
    )


def test_what_was_found_depends_on_what_it_was_asked_of(tmp_path):
    made = []

    def make():
        made.append(None)
        return {"kl": 0.1 + 0.2, "number": len(made)}

    one = ResumeCache(tmp_path, checkpoint="a", images="b")
    assert (
        one.get(make, widths={"x": 4})
        == one.get(make, widths={"x": 4})
        == {"kl": 0.1 + 0.2, "number": 1}
    )
    assert one.get(make, widths={"x": 8})["number"] == 2 and one.found_before == 0
    again = ResumeCache(tmp_path, checkpoint="a", images="b")
    assert again.get(make, widths={"x": 8})["number"] == 2 and again.found_before == 1
    for other in (
        {"checkpoint": "c", "images": "b"},
        {"checkpoint": "a", "images": "c"},
    ):
        assert ResumeCache(tmp_path, **other).get(make, widths={"x": 4})["number"] > 2
    assert (
        ResumeCache(None).get(make)["number"] == 5
        and len(list(tmp_path.iterdir())) == 4
    )


def by_hand(by_name: dict, bits: int = 4) -> list[dict]:
    return [
        {"bits": bits, "kept": name, "kl_by_image": list(values)}
        for name, values in by_name.items()
    ]


def test_layers_worth_keeping():
    """A layer helps on every image, one on average alone, one not at all."""
    none = [1.0 + 0.01 * i for i in range(50)]
    noisy = [value + (3.0 if i % 2 else -3.1) for i, value in enumerate(none)]
    helps = [v - 0.5 - 0.001 * (i % 3) for i, v in enumerate(none)]
    rows = by_hand(
        {
            "none": none,
            "layer 0": none,
            "layer 1": helps,
            "layer 2": noisy,
            "layer 1 q": helps,
        }
    )
    effects = sensitivity.part_effects(rows)
    assert (
        sensitivity.most_sensitive_layers(effects, 4) == ["layer 1"]
        and sensitivity.most_sensitive_layers(effects, 4, count=0) == []
    )
    verdict = effects.set_index("part").verdict
    assert (
        verdict["layer 1"] == "sensitive"
        and verdict["layer 2"] == verdict["layer 0"] == "no effect beyond noise"
    )


def test_effects_in_both_directions():
    """Signs, SciPy's paired test, and Holm's correction for all of them."""
    random = np.random.default_rng(1)
    all16, none = random.random(60) / 100, 1 + random.random(60)
    keep, only = (
        none - 0.2 - 0.5 * random.standard_normal(60),
        all16 + 0.02 * random.standard_normal(60) + 0.006,
    )
    rows = by_hand(
        {
            "none": none,
            "all": all16,
            "layer 0": keep,
            "all but layer 0": only,
            "first and last": keep,
        }
    )
    found = sensitivity.part_effects(rows).set_index("direction")
    assert list(found.part) == ["layer 0", "layer 0"]
    assert (
        found.effect["keep"] == pytest.approx((none - keep).mean())
        and found.low["keep"] < found.effect["keep"] < found.high["keep"]
    )
    assert found.effect["only"] == pytest.approx((only - all16).mean())
    p = stats.ttest_rel(only, all16, alternative="greater").pvalue
    assert found.p["only"] == pytest.approx(p)
    assert list(found.verdict[["keep", "only"]]) == [
        "sensitive",
        "no effect beyond noise",
    ]
    first, second = found.sort_values("p").itertuples()
    assert first.p_corrected == pytest.approx(2 * first.p, rel=1e-9, abs=0), (
        "the smaller of two is doubled"
    )
    assert second.p_corrected == pytest.approx(
        max(second.p, 2 * first.p), rel=1e-9, abs=0
    )
