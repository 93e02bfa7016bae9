"""Operations by the closed form of a ViT, and times against given peaks."""

import time

import pytest
import torch
from transformers import ViTConfig

from vitnb import variants
from vitnb.analysis import performance
from vitnb.measure import roofline
from vitnb.models import loader


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


def test_shares_of_given_ceilings():
    """40 GFLOP in 20 ms are 2 TFLOP/s, of 8.

    Reading 90 MB at 9 GB/s takes 10 ms, longer than the arithmetic's 5.
    """
    roof = {"matmul_tflops": 8.0, "copy_gbs": 9.0, "flops": {"4": 40e9}}
    assert performance.roofline_shares(roof, 90_000_000, 4, 20.0) == pytest.approx(
        {"tflops": 2.0, "matmul_share": 0.25, "roofline_share": 0.5}
    )
    assert performance.roofline_shares(roof, 9_000_000, 4, 20.0)[
        "roofline_share"
    ] == pytest.approx(0.25)


def test_peaks_are_no_less_than_what_a_product_reaches():
    """One product, timed by hand, is at most twice as fast as the measured peak."""
    found = roofline.measure_peaks(torch.device("cpu"), torch.float32)
    a = torch.randn(1536, 1536)
    begin = time.perf_counter()
    a @ a
    assert (
        2 * 1536**3 / (time.perf_counter() - begin) / 1e12 < 2 * found["matmul_tflops"]
    )
    assert 0.1 < found["copy_gbs"] < 10_000
