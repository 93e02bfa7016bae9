"""Engines give the same logits, and say why when they cannot be had."""

from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import bitsandbytes as bnb
import pytest
import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters
from transformers.modeling_outputs import ImageClassifierOutput

from vitnb import variants
from vitnb.data import dataset
from vitnb.data.splits import load_split
from vitnb.models import engines, fused, loader, quantization

WITHOUT_TRITON = (
    "fused, in PyTorch's operators",
    "no Triton and no CUDA graph: they need an NVIDIA GPU",
)
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
    ran, reason = ("fused", None) if torch.cuda.is_available() else WITHOUT_TRITON
    assert record["engine_ran"] == {"3": ran}
    assert record["engine_reason"].get("3") == reason
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
    assert record["engine_ran"] == {"3": "eager"}
    assert record["engine_reason"] == {"3": "no CUDA graph: they need an NVIDIA GPU"}
    assert torch.equal(logits, wanted)


def test_a_compiler_that_fails_leaves_eager_and_its_reason(mini, monkeypatch):
    def refuse(model, **_):
        def call(**_):
            raise RuntimeError("no C++ compiler\nand more")

        return call

    monkeypatch.setattr(torch, "compile", refuse)
    logits, loaded = compute_logits(mini, "fp32-sdpa-compile")
    record = loaded.as_record()
    assert record["engine_ran"] == {"3": "eager"}
    assert record["engine_reason"] == {"3": "torch.compile: no C++ compiler"}
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
    assert record["engine_ran"] == {"2": "compile"} and record["engine_reason"] == {}
    assert list(record["engine_seconds"]) == ["2"]


def test_an_engine_that_fell_back_replays_nothing_even_without_a_reason():
    engine = engines.Graph("graph", torch.nn.Linear(1, 1))
    one, other = torch.Size([1, 3, 4, 4]), torch.Size([2, 3, 4, 4])
    assert engine.replays(one) and engine.replays(other)
    engine.fall_back(one, "")
    assert not engine.replays(one) and engine.replays(other)
    assert engine.as_record()["engine_ran"] == {"1": "eager"}


class Tiny(torch.nn.Module):
    """A model of one Linear, with the call of a classifier of transformers."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, pixel_values):
        return ImageClassifierOutput(logits=self.linear(pixel_values))


class InPieces(Tiny):
    """A model that asks a number back from the device, which dynamo cannot compile."""

    def forward(self, pixel_values):
        logits = self.linear(pixel_values)
        if logits.sum().item() > 1e9:
            return ImageClassifierOutput(logits=-logits)
        return ImageClassifierOutput(logits=logits)


@pytest.fixture
def compiled_calls(monkeypatch):
    """Compile without inductor; gives a growing list of runs of compiled graphs.

    Dynamo's own settings come back afterwards.
    """
    torch._dynamo.reset()
    calls = []

    def backend(graph, inputs):
        def run(*arguments):
            calls.append(len(arguments))
            return graph.forward(*arguments)

        return run

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    with dynamo_config.patch(
        recompile_limit=8,
        accumulated_recompile_limit=256,
        fail_on_recompile_limit_hit=False,
    ):
        yield calls
    torch._dynamo.reset()


@torch.inference_mode()
def test_every_batch_size_is_compiled_however_many_there_are(compiled_calls):
    """By default, torch.compile runs a ninth one eagerly, and a twelfth one."""
    model = Tiny()
    engine = engines.Compiled("compile", model)
    for size in range(1, 13):
        pixels = torch.randn(size, 2)
        for runs in (1, 2):
            compiled_calls.clear()
            logits = engine(pixel_values=pixels).logits
            assert len(compiled_calls) == 1, f"batch {size}, forward {runs}"
        assert torch.equal(logits, model.linear(pixels))
    record = engine.as_record()
    assert record["engine_ran"] == {str(size): "compile" for size in range(1, 13)}
    assert record["engine_reason"] == {}


@torch.inference_mode()
def test_beyond_the_limit_a_batch_size_falls_back_alone(compiled_calls, monkeypatch):
    monkeypatch.setattr(engines, "RECOMPILE_LIMIT", 2)
    model = Tiny()
    engine = engines.Compiled("compile", model)
    for size in (1, 4, 16, 1, 4, 16):
        pixels = torch.randn(size, 2)
        compiled_calls.clear()
        assert torch.equal(engine(pixel_values=pixels).logits, model.linear(pixels))
        assert len(compiled_calls) == (size != 16)
        assert engine.replays(pixels.shape) == (size != 16)
    record = engine.as_record()
    ran = {"1": "compile", "4": "compile", "16": "eager"}
    assert record["engine_ran"] == ran
    assert list(record["engine_reason"]) == ["16"]
    assert "more than 2 input shapes" in record["engine_reason"]["16"]
    assert list(record["engine_seconds"]) == ["1", "4"]


@torch.inference_mode()
def test_what_cannot_be_compiled_in_one_piece_says_so(compiled_calls):
    engine = engines.Compiled("compile", InPieces())
    engine(pixel_values=torch.randn(3, 2))
    assert compiled_calls
    record = engine.as_record()
    assert record["engine_ran"] == {"3": "compile, in pieces"}
    assert record["engine_reason"]["3"].startswith("torch.compile: ")
    assert engine.replays(torch.Size([3, 2]))


@torch.inference_mode()
def test_a_cuda_graph_that_torch_compile_leaves_out_is_said(monkeypatch):
    def compiled(model, **_):
        def call(pixel_values):
            counters["inductor"]["cudagraph_skips"] += len(pixel_values) == 2
            return model(pixel_values=pixel_values)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    engine = engines.Compiled("compile", Tiny())
    for size in (1, 2, 1):
        engine(pixel_values=torch.randn(size, 2))
    record = engine.as_record()
    ran = {"1": "compile", "2": "compile, without a graph"}
    assert record["engine_ran"] == ran
    assert list(record["engine_reason"]) == ["2"]


@torch.inference_mode()
def test_a_compiled_shape_that_fails_later_is_no_other_engine(monkeypatch):
    """Times were taken under its name: the rest must not be those of eager."""
    calls = []

    def compiled(model, **_):
        def call(pixel_values):
            calls.append(1)
            if len(calls) > 1:
                raise RuntimeError("device-side assert")
            return model(pixel_values=pixel_values)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    engine = engines.Compiled("compile", Tiny())
    engine(pixel_values=torch.randn(1, 2))
    with pytest.raises(RuntimeError, match="device-side assert"):
        engine(pixel_values=torch.randn(1, 2))
    assert engine.as_record()["engine_ran"] == {"1": "compile"}


class FakeGraph(engines.Graph):
    """A graph engine whose captures need no GPU and fail at batch 4."""

    replayed: ClassVar[list] = []

    def _capture(self, pixels):
        if len(pixels) == 4:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        logits = self.model(pixel_values=pixels).logits
        graph = SimpleNamespace(replay=lambda: self.replayed.append(len(pixels)))
        self.graphs[pixels.shape] = (pixels.clone(), graph, logits)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "reason", "fallback"),
    [
        ("graph", "", "eager"),
        ("fused", "", "fused, without a graph"),
        ("fused, in PyTorch's operators", "no Triton", "in PyTorch's operators, alone"),
    ],
)
def test_a_batch_size_that_cannot_be_captured_falls_back_alone(name, reason, fallback):
    engine = FakeGraph(name, Tiny(), reason, fallback)
    engine.replayed.clear()
    for size in (1, 4, 8, 4, 1):
        engine(pixel_values=torch.randn(size, 2))
        assert engine.replays(torch.Size([size, 2])) == (size != 4)
    assert engine.replayed == [1, 8, 1]
    record = engine.as_record()
    assert record["engine_ran"] == {"1": name, "4": fallback, "8": name}
    assert "operation not permitted" in record["engine_reason"]["4"]
    before = {"1": reason, "8": reason} if reason else {}
    assert {k: v for k, v in record["engine_reason"].items() if k != "4"} == before
    assert reason in record["engine_reason"]["4"]


def test_a_fused_forward_is_never_called_eager(monkeypatch):
    """Without Triton, without a graph, or both: it still is the rearranged forward."""
    cuda = torch.device("cuda")
    model = SimpleNamespace(ran="fused", reason="")
    engine = engines.make_engine("fused", model, cuda)
    assert isinstance(engine, engines.Graph)
    assert (engine.name, engine.fallback) == ("fused", "fused, without a graph")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    stand_in, reason = fused.describe_operations(cuda)
    assert stand_in == "in PyTorch's operators" and "not installed" in reason
    assert fused.operations(cuda) is fused.reference
    monkeypatch.setattr(fused, "find_spec", lambda name: object())
    assert fused.describe_operations(cuda) == ("", "")
    assert fused.describe_operations(torch.device("cpu")) == (
        "in PyTorch's operators",
        WITHOUT_TRITON[1],
    )
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert fused.describe_operations(cuda)[0] == "in Triton's interpreter"


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
