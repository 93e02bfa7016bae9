"""Engines give the same logits, and say why when they cannot be had."""

import bitsandbytes as bnb
import pytest
import torch

from vitnb import variants
from vitnb.data import dataset
from vitnb.data.splits import load_split
from vitnb.models import engines, loader, quantization

on_cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="what happens without a GPU"
)


def compute_logits(mini, name, size=3):
    loaded = loader.load_variant(mini, variants.parse(name))
    pixels = dataset.first_batch(load_split(mini, "test"), loaded.processor, size)
    with loaded.inference() as model:
        logits = model(pixel_values=loaded.prepare(pixels)).logits.float()
    return logits, loaded


@pytest.mark.parametrize("weights", ["fp32", "bf16", "nf4", "fp8"])
def test_fused_gives_the_same_logits(mini, weights):
    wanted, _ = compute_logits(mini, f"{weights}-sdpa")
    logits, loaded = compute_logits(mini, f"{weights}-sdpa-fused")
    record = loaded.as_record()
    assert record["engine_ran"] == "fused" and record["engine_reason"] == ""
    tolerance = 1e-5 if weights == "fp32" else 1e-2
    torch.testing.assert_close(logits, wanted, atol=tolerance, rtol=0)
    assert torch.equal(logits.argmax(-1), wanted.argmax(-1))


def test_w8a8_has_no_outliers(mini):
    """Columns beyond the threshold are in int8 too; the weights are those of int8."""
    int8, mixed = compute_logits(mini, "int8-sdpa")
    w8a8, plain = compute_logits(mini, "w8a8-sdpa")

    def thresholds(loaded):
        return {
            module.state.threshold
            for module in loaded.model.modules()
            if isinstance(module, bnb.nn.Linear8bitLt)
        }

    assert thresholds(mixed) == {quantization.OUTLIER_THRESHOLD}
    assert thresholds(plain) == {0.0}
    checksum = "checkpoint_sha256"
    assert plain.as_record()[checksum] == mixed.as_record()[checksum]
    assert (w8a8 - int8).abs().max() < 0.05 * int8.abs().max()


@on_cpu
def test_no_graph_without_a_gpu(mini):
    wanted, _ = compute_logits(mini, "nf4-sdpa")
    logits, loaded = compute_logits(mini, "nf4-sdpa-graph")
    record = loaded.as_record()
    assert record["engine_ran"] == "eager" and "NVIDIA GPU" in record["engine_reason"]
    assert torch.equal(logits, wanted)


def test_a_compiler_that_fails_leaves_eager_and_its_reason(mini, monkeypatch):
    def refuse(model, **_):
        def call(**_):
            raise RuntimeError("no C++ compiler\nand more")

        return call

    monkeypatch.setattr(torch, "compile", refuse)
    logits, loaded = compute_logits(mini, "fp32-sdpa-compile")
    record = loaded.as_record()
    assert record["engine_ran"] == "eager"
    assert record["engine_reason"].startswith("torch.compile: no C++ compiler")
    assert torch.equal(logits, compute_logits(mini, "fp32-sdpa")[0])


def test_compiled_logits_are_not_overwritten_and_the_compile_time_is_kept(
    mini, monkeypatch
):
    buffer = {}

    def compiled(model, **options):
        assert options["dynamic"] is False

        def call(pixel_values):  # as CUDA graphs do: one buffer for every result
            out = model(pixel_values=pixel_values)
            logits = buffer.setdefault("logits", torch.empty_like(out.logits))
            out.logits = logits.copy_(out.logits)
            return out

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    loaded = loader.load_variant(mini, variants.parse("fp32-sdpa-compile"))
    batch = dataset.first_batch(load_split(mini, "test"), loaded.processor, 4)
    pixels = loaded.prepare(batch)
    with loaded.inference() as model:
        first = model(pixel_values=pixels[:2]).logits
        before = first.clone()
        model(pixel_values=pixels[2:])
    assert torch.equal(first, before)
    record = loaded.as_record()
    assert record["engine_ran"] == "compile" and list(record["engine_seconds"]) == ["2"]


def test_an_engine_that_fell_back_replays_nothing_even_without_a_reason():
    engine = engines.Graph("graph", torch.nn.Linear(1, 1))
    assert engine.replays and not engine.fell_back
    engine.fall_back("")
    assert engine.fell_back and not engine.replays
    assert engine.as_record()["engine_ran"] == "eager"


def test_every_engine_is_known():
    with pytest.raises(Exception, match="unknown variant"):
        variants.parse("nf4-sdpa-turbo")
    known = {variant.engine for variant in variants.every_variant()}
    assert known == set(variants.ENGINES)
    assert variants.parse("nf4-fa2").engine == "eager"
    wanted = variants.Variant("bf16", "mem-efficient", "graph")
    assert variants.parse("bf16-mem-efficient-graph") == wanted
    model = torch.nn.Linear(1, 1)
    engine = engines.make_engine("eager", model, torch.device("cpu"))
    assert isinstance(engine, engines.Engine)
