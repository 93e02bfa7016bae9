"""Operations by the closed form of a ViT, and by kind of product."""

import pytest
import torch
from transformers import ViTConfig

from vitnb import variants
from vitnb.measure import roofline
from vitnb.models import layers, loader, quantization

TOKENS, HIDDEN, INNER, LAYERS, CLASSES = 17, 64, 128, 3, 4  # of the mini study


def vit_flops(c: ViTConfig, batch: int) -> int:
    """Count 2 for a multiply-add: patches, q k v o, scores, values, MLP, head."""
    patches = (c.image_size // c.patch_size) ** 2
    tokens, hidden = patches + 1, c.hidden_size
    block = (
        4 * tokens * hidden**2
        + 2 * tokens**2 * hidden
        + 2 * tokens * hidden * c.intermediate_size
    )
    embedding = patches * hidden * c.num_channels * c.patch_size**2
    return 2 * batch * (embedding + c.num_hidden_layers * block + hidden * c.num_labels)


def linear_flops(batch: int) -> int:
    """Count the Linears of the mini study's blocks: all but the head."""
    return 2 * batch * LAYERS * TOKENS * (4 * HIDDEN**2 + 2 * HIDDEN * INNER)


@pytest.mark.parametrize("batch", [1, 5])
def test_operations_by_the_closed_form(batch):
    config = ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
    )
    config.num_labels = 7
    assert roofline.count_flops(config, batch) == vit_flops(config, batch)


def test_vit_large_is_123_gflop_an_image():
    config = ViTConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
    )
    config.num_labels = 102
    assert roofline.count_flops(config, 1) == pytest.approx(123e9, rel=0.01)


def test_a_quantized_model_counts_what_it_stands_for(mini):
    full, small = (
        loader.load_variant(mini, variants.parse(name)).model.config
        for name in ("fp32-sdpa", "nf4-fa2")
    )
    assert roofline.count_flops(small, 3) == roofline.count_flops(full, 3)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("fp32-sdpa", None),
        ("bf16-sdpa", None),
        ("nf4-sdpa", None),  # unpacked, and multiplied in the type of the rest
        ("int8-sdpa", "int8"),
        ("w8a8-sdpa", "int8"),
        ("fp8-sdpa", "float8"),
    ],
)
def test_eight_bit_linears_count_as_their_own_kind(mini, name, kind):
    """The head, attention and the patches stay in the type of the rest."""
    cpu = torch.device("cpu")
    loaded = loader.load_variant(mini, variants.parse(name), on=cpu)
    found = roofline.count_by_kind(loaded, [1, 3])["flops"]
    dtype = str(loaded.dtype).removeprefix("torch.")
    assert list(found) == ["1", "3"]
    for size in (1, 3):
        total = vit_flops(loaded.model.config, size)
        own = {} if kind is None else {kind: linear_flops(size)}
        assert found[str(size)] == {dtype: total - sum(own.values())} | own


def test_a_plan_counts_each_linear_by_its_own_width(mini):
    loaded = loader.load_variant(mini, variants.parse("nf4-sdpa"))
    name = next(n for n in layers.linears(loaded.model) if n.endswith("1.mlp.fc2"))
    full = loader.load_variant(mini, variants.parse("fp32-sdpa"))
    own = quantization.quantized_copy(layers.linears(full.model)[name], 8, loaded.dtype)
    loaded.model.set_submodule(name, own)
    (found,) = roofline.count_by_kind(loaded, [2])["flops"].values()
    assert found["int8"] == 2 * 2 * TOKENS * HIDDEN * INNER
    assert sum(found.values()) == vit_flops(loaded.model.config, 2)


@pytest.mark.parametrize(
    ("name", "kind"), [("nf4-sdpa-fused", None), ("fp8-sdpa-fused", "float8")]
)
def test_what_the_fused_forward_leaves_out_is_not_counted(mini, name, kind):
    """The last block's tokens but one: their output and MLP are never computed."""
    cpu = torch.device("cpu")
    loaded = loader.load_variant(mini, variants.parse(name), on=cpu)
    (found,) = roofline.count_by_kind(loaded, [3])["flops"].values()
    left_out = 2 * 3 * (TOKENS - 1) * (HIDDEN**2 + 2 * HIDDEN * INNER)
    total = vit_flops(loaded.model.config, 3)
    dtype = str(loaded.dtype).removeprefix("torch.")
    if kind is None:
        assert found == {dtype: total - left_out}
    else:
        linears = linear_flops(3)
        assert found == {dtype: total - linears, kind: linears - left_out}
