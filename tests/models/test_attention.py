"""Attention against the formula, and the kernel that ran against a profiler."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import profile
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from vitnb import variants
from vitnb.data import dataset
from vitnb.data.splits import load_split
from vitnb.errors import VariantError
from vitnb.measure import profiler
from vitnb.models import attention, loader


@pytest.fixture
def qkv() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 3, 17, 64) for _ in range(3)]


def formula(query, key, value, scale, bias=0.0) -> torch.Tensor:
    """softmax(q k^T scale + bias) v in float64, as [batch, tokens, heads, head]."""
    weights = (query.double() @ key.double().transpose(-1, -2) * scale + bias).softmax(
        -1
    )
    return (weights @ value.double()).transpose(1, 2)


@pytest.mark.parametrize("backend", ["sdpa", "math", "torch-flash"])
@pytest.mark.parametrize("scale", [1 / 8, 0.3])
def test_attention_is_the_formula_whatever_mask_is_given(qkv, backend, scale):
    mask = torch.zeros(2, 1, 17, 17, dtype=torch.bool)
    mask[..., 0] = True  # would let every token see the first one alone
    with attention.force_backend(backend):
        out, weights = attention._sdpa(None, *qkv, attention_mask=mask, scaling=scale)
    torch.testing.assert_close(out.double(), formula(*qkv, scale), atol=1e-5, rtol=1e-5)
    assert weights is None and out.shape == (2, 17, 3, 64)


@pytest.mark.parametrize("function", [attention._sdpa, attention._eager])
def test_what_a_model_adds_to_its_scores_stays(qkv, function):
    """Swin and BEiT add a bias, maybe of another floating-point type."""
    bias = torch.randn(1, 3, 17, 17, dtype=torch.float64)
    result, _ = function(None, *qkv, attention_mask=bias.float(), scaling=0.3)
    torch.testing.assert_close(
        result.double(), formula(*qkv, 0.3, bias), atol=1e-5, rtol=1e-5
    )
    with attention.force_backend("math"):
        half, _ = function(
            None, *(t.bfloat16() for t in qkv), attention_mask=bias.float(), scaling=0.3
        )
    torch.testing.assert_close(
        half.double(), formula(*qkv, 0.3, bias), atol=0.05, rtol=0.05
    )


def test_flash_attn_refuses_what_it_cannot_add(qkv, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=None)
    )
    with pytest.raises(VariantError, match="flash-attn has no place for the bias"):
        attention._flash_attn(None, *qkv, attention_mask=torch.zeros(1, 3, 17, 17))


@pytest.mark.parametrize(
    ("backend", "kernel"), [("math", "math"), ("torch-flash", "flash-cpu")]
)
def test_a_forced_kernel_is_the_one_that_runs(qkv, backend, kernel):
    with attention.force_backend(backend), profile() as profiled:
        attention._sdpa(None, *qkv, attention_mask=None)
    names = {event.key for event in profiled.key_averages()}
    assert attention.kernel_in_trace(names) == kernel


def test_forcing_shuts_the_other_kernels_out():
    """A CPU runs the flash kernel anyway, so look at what PyTorch may choose from."""
    flags = torch.backends.cuda
    with attention.force_backend("torch-flash"):
        assert flags.flash_sdp_enabled()
        assert not flags.math_sdp_enabled()
        assert not flags.mem_efficient_sdp_enabled()
    with attention.force_backend("math"):
        assert flags.math_sdp_enabled()
        assert not flags.flash_sdp_enabled()
        assert not flags.cudnn_sdp_enabled()
    with attention.force_backend("sdpa"):
        assert flags.math_sdp_enabled() and flags.flash_sdp_enabled()


def test_flash_attn_gets_its_own_layout_and_the_scale(qkv, monkeypatch):
    """A stand-in has the package's layout, [batch, tokens, heads, head]."""

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None):
        assert dropout_p == 0.0 and q.shape == (2, 17, 3, 64)
        return formula(*(tensor.transpose(1, 2) for tensor in (q, k, v)), softmax_scale)

    monkeypatch.setitem(
        sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash_attn_func)
    )
    result, _ = attention._flash_attn(None, *qkv, attention_mask=None, scaling=0.3)
    torch.testing.assert_close(result, formula(*qkv, 0.3))


def test_transformers_knows_both_functions_and_builds_no_mask_for_them():
    for backend, function in (
        ("sdpa", attention._sdpa),
        ("math", attention._sdpa),
        ("flash-attn", attention._flash_attn),
    ):
        name = attention.implementation(backend)
        assert AttentionInterface()[name] is function
        build_mask = AttentionMaskInterface()[name]
        assert build_mask(batch_size=2, q_length=17, kv_length=17) is None


@pytest.mark.parametrize(
    "name", ["fp32-sdpa", "fp32-math", "fp32-flash", "fp32-sdpa-fused"]
)
def test_no_mask_reaches_the_kernel(mini, monkeypatch, name):
    """Not even one that is given to the model; transformers' own attention takes it."""
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, **kwargs):
        seen.append(kwargs.get("attn_mask", args[3] if len(args) > 3 else None))
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    # On a CPU: a GPU's flash kernel takes no float32.
    cpu = torch.device("cpu")
    loaded = loader.load_variant(mini, variants.parse(name), on=cpu)
    pixels = loaded.prepare(
        dataset.first_batch(load_split(mini, "test"), loaded.processor, 2)
    )
    mask = torch.zeros(2, 17, dtype=torch.bool, device=loaded.device)
    mask[:, 0] = True
    with loaded.inference() as model:
        free = model(pixel_values=pixels).logits
        assert seen and all(mask is None for mask in seen)
        if name.endswith("fused"):  # it takes no mask at all
            return
        masked = model(pixel_values=pixels, attention_mask=mask).logits
        assert all(mask is None for mask in seen) and torch.equal(free, masked)
    with torch.inference_mode():
        loaded.model.set_attn_implementation("sdpa")
        loaded.model(pixel_values=pixels, attention_mask=mask)
    assert any(mask is not None for mask in seen), "the spy must be able to see a mask"


def test_eager_attention_is_the_formula_and_ignores_a_mask(qkv, mini):
    result = attention.FUNCTIONS["vitnb-eager"](
        None, *qkv, torch.zeros(17, 17, dtype=torch.bool), scaling=0.3
    )[0]
    torch.testing.assert_close(
        result.double(), formula(*qkv, 0.3), atol=1e-5, rtol=1e-5
    )
    loaded = loader.load_variant(mini, variants.parse("fp32-eager"))
    traced = profiler.profile_forward(
        loaded, dataset.first_batch(load_split(mini, "test"), loaded.processor, 2)
    )
    assert (
        traced["attention_ran"] == "eager"
        and 0 < traced["attention_ms"] < traced["total_ms"]
    )


def test_launch_on_a_cpu():
    cpu = torch.device("cpu")
    assert [
        attention.resolve_backend(name, cpu) for name in ("sdpa", "math", "fa2")
    ] == ["sdpa", "math", "torch-flash"]


def test_fa2_on_a_gpu_that_is_too_old(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(VariantError, match="SM75"):
        attention.resolve_backend("fa2", torch.device("cuda"))


@pytest.mark.parametrize(
    ("there", "backend"), [(True, "flash-attn"), (False, "torch-flash")]
)
def test_fa2_on_a_new_gpu(monkeypatch, there, backend):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(
        attention, "find_spec", lambda name: object() if there else None
    )
    package = SimpleNamespace(flash_attn_func=None)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    assert attention.resolve_backend("fa2", torch.device("cuda")) == backend


def test_a_flash_attn_that_cannot_be_imported_is_a_reason(monkeypatch, tmp_path):
    """It was built for another PyTorch: it is there, and its import fails."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    (tmp_path / "flash_attn.py").write_text(
        "raise ImportError('undefined symbol: _ZN3c104cuda\\nand more')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    with pytest.raises(
        VariantError, match=r"cannot be imported \(undefined symbol"
    ) as e:
        attention.resolve_backend("fa2", torch.device("cuda"))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("backend", "kernel"),
    [
        ("math", "flash-cpu"),
        ("torch-flash", "math"),
        ("flash-attn", "flash"),
        ("flash-attn", "cudnn"),
        ("torch-flash", "cudnn"),
    ],
)
def test_another_kernel_than_the_name_allows_is_an_error(backend, kernel):
    with pytest.raises(VariantError, match="was asked for"):
        attention.check_kernel(backend, kernel)


def test_kernels_that_names_allow():
    for backend, kernel in [
        ("sdpa", "cudnn"),
        ("sdpa", "math"),
        ("math", "math"),
        ("torch-flash", "flash"),
        ("flash-attn", "flash-attn"),
    ]:
        attention.check_kernel(backend, kernel)


@pytest.mark.parametrize(
    "operators",
    [
        set(),
        {"aten::addmm"},
        {"aten::_scaled_dot_product_attention_math", "flash_attn::_flash_attn_forward"},
    ],
)
def test_a_trace_must_show_one_kernel(operators):
    with pytest.raises(VariantError, match="one was expected"):
        attention.kernel_in_trace(operators)


def test_a_kernel_that_pytorch_lacks_is_told_as_a_failed_variant():
    with (
        pytest.raises(VariantError, match="no torch-flash attention kernel"),
        attention.force_backend("torch-flash"),
    ):
        raise RuntimeError("No available kernel. Aborting execution.")
    with (
        pytest.raises(RuntimeError, match="something else"),
        attention.force_backend("math"),
    ):
        raise RuntimeError("something else")
