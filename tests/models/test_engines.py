"""Engines give the same logits, and say why when they cannot be had."""

import bitsandbytes as bnb
import pytest
import torch

from vitnb import variants
from vitnb.data import dataset
from vitnb.data.splits import load_split
from vitnb.models import engines, loader, quantization

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")


def logits(mini, name, size=3):
    loaded = loader.load_variant(mini, variants.parse(name))
    pixels = loaded.prepare(dataset.first_batch(load_split(mini, "test"), loaded.processor, size))
    with loaded.inference() as model:
        return model(pixel_values=pixels).logits.float(), loaded


@pytest.mark.parametrize("weights", ["fp32", "bf16", "nf4", "fp8"])
def test_fused_gives_the_same_logits(mini, weights):
    wanted, _ = logits(mini, f"{weights}-sdpa")
    found, loaded = logits(mini, f"{weights}-sdpa-fused")
    assert loaded.as_record()["engine_ran"] == "fused" and loaded.as_record()["engine_reason"] == ""
    torch.testing.assert_close(found, wanted, atol=1e-5 if weights == "fp32" else 1e-2, rtol=0)
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))


def test_w8a8_has_no_outliers(mini):
    """The weights of int8, and every activation in int8: columns beyond the threshold no longer stay in 16 bits."""
    (int8, mixed), (w8a8, plain) = (logits(mini, f"{weights}-sdpa") for weights in ("int8", "w8a8"))
    thresholds = {
        loaded.variant.weights: {
            m.state.threshold for m in loaded.model.modules() if isinstance(m, bnb.nn.Linear8bitLt)
        }
        for loaded in (mixed, plain)
    }
    assert thresholds == {"int8": {quantization.OUTLIER_THRESHOLD}, "w8a8": {0.0}}
    assert plain.as_record()["checkpoint_sha256"] == mixed.as_record()["checkpoint_sha256"]
    assert (w8a8 - int8).abs().max() < 0.05 * int8.abs().max()


@on_cpu
def test_no_graph_without_a_gpu(mini):
    wanted, _ = logits(mini, "nf4-sdpa")
    found, loaded = logits(mini, "nf4-sdpa-graph")
    assert loaded.as_record()["engine_ran"] == "eager" and "NVIDIA GPU" in loaded.as_record()["engine_reason"]
    assert torch.equal(found, wanted)


def test_a_compiler_that_fails_leaves_eager_and_its_reason(mini, monkeypatch):
    def refuse(model, **_):
        def call(**_):
            raise RuntimeError("no C++ compiler\nand more")

        return call

    monkeypatch.setattr(torch, "compile", refuse)
    found, loaded = logits(mini, "fp32-sdpa-compile")
    assert loaded.as_record()["engine_ran"] == "eager"
    assert loaded.as_record()["engine_reason"].startswith("torch.compile: no C++ compiler")
    assert torch.equal(found, logits(mini, "fp32-sdpa")[0])


def test_compiled_logits_are_not_overwritten_and_the_compile_time_is_kept(mini, monkeypatch):
    buffer = {}

    def compiled(model, **options):
        assert options["dynamic"] is False

        def call(pixel_values):  # as CUDA graphs do: one buffer for every result
            out = model(pixel_values=pixel_values)
            out.logits = buffer.setdefault("logits", torch.empty_like(out.logits)).copy_(out.logits)
            return out

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    loaded = loader.load_variant(mini, variants.parse("fp32-sdpa-compile"))
    pixels = loaded.prepare(dataset.first_batch(load_split(mini, "test"), loaded.processor, 4))
    with loaded.inference() as model:
        first = model(pixel_values=pixels[:2]).logits
        kept = first.clone()
        model(pixel_values=pixels[2:])
    assert torch.equal(first, kept)
    assert loaded.as_record()["engine_ran"] == "compile" and list(loaded.as_record()["engine_seconds"]) == ["2"]


def test_every_engine_is_known():
    with pytest.raises(Exception, match="unknown variant"):
        variants.parse("nf4-sdpa-turbo")
    assert {v.engine for v in variants.REGISTRY.values()} == set(variants.ENGINES)
    assert variants.parse("nf4-fa2").engine == "eager"
    assert variants.parse("bf16-mem-efficient-graph") == variants.Variant("bf16", "mem-efficient", "graph")
    assert isinstance(engines.make_engine("eager", torch.nn.Linear(1, 1), torch.device("cpu")), engines.Engine)
