"""External models: the weights under timm's names, the logits, and reasons."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from vitnb.analysis.comparison import ratio_table, time_table
from vitnb.errors import UserError, VariantError
from vitnb.measure import comparison, external
from vitnb.study import PEERS, load_study


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.proj = (
            heads,
            nn.Linear(dim, 3 * dim),
            nn.Linear(dim, dim),
        )

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int, hidden: int, heads: int, norm):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = (
            norm(dim),
            Attention(dim, heads),
            norm(dim),
            nn.Module(),
        )
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """A pre-norm ViT written by hand, with timm's names and arguments."""

    def __init__(
        self,
        img_size,
        patch_size,
        in_chans,
        num_classes,
        global_pool,
        embed_dim,
        depth,
        num_heads,
        mlp_ratio,
        qkv_bias,
        norm_layer,
    ):
        super().__init__()
        assert global_pool == "token" and qkv_bias
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(
            torch.zeros(1, (img_size // patch_size) ** 2 + 1, embed_dim)
        )
        hidden = int(embed_dim * mlp_ratio)
        self.blocks = nn.Sequential(
            *(Block(embed_dim, hidden, num_heads, norm_layer) for _ in range(depth))
        )
        self.norm, self.head = norm_layer(embed_dim), nn.Linear(embed_dim, num_classes)

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


@pytest.fixture
def timm(monkeypatch):
    """A stand-in for the package, that has the ViT above."""
    module = ModuleType("timm.models.vision_transformer")
    module.VisionTransformer = VisionTransformer
    monkeypatch.setitem(sys.modules, "timm.models.vision_transformer", module)
    return module


@pytest.fixture(scope="module")
def plain():
    """A transformers ViT whose every number matters.

    Nothing is zero or one, and the norms' epsilon is large.
    """
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=80,
        image_size=24,
        patch_size=8,
        num_labels=7,
        layer_norm_eps=0.01,
    )
    model = ViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def pixels():
    return torch.randn(5, 3, 24, 24, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_the_weights_under_timms_names_give_the_same_logits(plain, pixels, timm):
    found = external.timm_vit(plain)
    assert isinstance(found, VisionTransformer) and not found.training
    wanted = plain(pixel_values=pixels).logits
    assert wanted.std() > 0.1
    torch.testing.assert_close(found(pixels), wanted, atol=1e-5, rtol=0)
    assert external.timm_vit(plain.to(torch.float64)).head.weight.dtype == torch.float64
    plain.float()


@torch.no_grad()
def test_the_real_timm_gives_the_same_logits(plain, pixels):
    pytest.importorskip("timm.models.vision_transformer", exc_type=ImportError)
    torch.testing.assert_close(
        external.timm_vit(plain)(pixels),
        plain(pixel_values=pixels).logits,
        atol=1e-5,
        rtol=0,
    )


def test_weights_without_a_place_are_refused(plain, timm):
    plain.vit.embeddings.mask_token = nn.Parameter(torch.zeros(1, 1, 48))
    try:
        with pytest.raises(VariantError, match="do not fit timm's ViT"):
            external.timm_vit(plain)
    finally:
        del plain.vit.embeddings.mask_token
    other = SimpleNamespace(config=SimpleNamespace(model_type="vit", hidden_act="relu"))
    with pytest.raises(VariantError, match="no place for a vit with relu"):
        external.timm_vit(other)


def test_a_package_that_is_missing_or_broken_is_a_reason(plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.models.vision_transformer", None)
    with pytest.raises(
        VariantError, match=r"^timm\.models\.vision_transformer cannot be imported: "
    ):
        external.timm_vit(plain)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(
        VariantError, match=r"^torchao\.quantization cannot be imported: "
    ):
        external.quantize_float8(plain)


def test_linears_that_torchao_passes_over_are_noticed(plain, timm, monkeypatch):
    """It leaves shapes that its kernels do not take as they are, without a word."""

    def quantize(model, settings):
        assert settings == "a row"
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.in_features != 80:
                module.weight = type("Fp8", (nn.Parameter,), {})(
                    module.weight.data, False
                )

    ao = ModuleType("torchao.quantization")
    ao.PerRow, ao.quantize_ = lambda: "a row", quantize
    ao.Float8DynamicActivationFloat8WeightConfig = lambda granularity: granularity
    monkeypatch.setitem(sys.modules, "torchao.quantization", ao)
    with pytest.raises(VariantError, match="left 3 of the blocks' 12 Linears"):
        external.quantize_float8(external.timm_vit(plain))


def test_other_answers_are_another_computation():
    kind = external.EXTERNAL_MODELS["timm-compile"]
    plain = torch.eye(8).repeat(25, 1) * 10  # 200 images, range 10
    assert external.check_agreement(plain + 0.4, plain, kind) == {
        "spread": pytest.approx(0.04),
        "agree": 1.0,
    }
    with pytest.raises(
        VariantError, match=r"differ by 0\.060 of their range \(at most 0\.05\)"
    ):
        external.check_agreement(plain + 0.6, plain, kind)
    near = torch.tensor([[1.0, 1.01, 0.0, 10.0]]).repeat(200, 1)
    near[:, 3] = torch.where(torch.arange(200) < 100, 10.0, 0.0)
    for flips, passes in (
        (2, True),
        (3, False),
    ):  # among 200, of which at least 99% must agree
        found = near.clone()
        found[100 : 100 + flips, 0] += 0.02
        if passes:
            assert external.check_agreement(found, near, kind)[
                "agree"
            ] == pytest.approx(0.99)
        else:
            with pytest.raises(VariantError, match=r"agrees on 0\.985 of the images"):
                external.check_agreement(found, near, kind)
    assert (
        external.check_agreement(
            near[100:101] + torch.tensor([0.02, 0, 0, 0]), near[100:101], kind
        )["agree"]
        == 0
    )
    with pytest.raises(VariantError, match="something else"):
        external.check_agreement(plain * float("nan"), plain, kind)


def test_a_peer_is_timed_once_its_answers_are_those_of_the_plain_model(
    mini, timm, monkeypatch
):
    """All but the compiler is real. A timm whose blocks lack a half is refused."""
    compiled = []
    monkeypatch.setattr(external, "check_gpu", lambda device: None)
    monkeypatch.setattr(external, "version", lambda name: f"{name} 1")
    monkeypatch.setattr(
        torch, "compile", lambda model, **options: compiled.append(options) or model
    )
    variant = external.load_external_variant(mini, "timm-compile", "cpu")
    # In one piece or not at all.
    options = {"mode": "reduce-overhead", "dynamic": False, "fullgraph": True}
    assert compiled == [options]
    assert torch._dynamo.config.fail_on_recompile_limit_hit
    assert torch._dynamo.config.recompile_limit >= 1024
    described = variant.describe()
    assert described["versions"] == {"timm": "timm 1"} and described["spread"] < 0.05
    answers, images = variant.expected[external.CHECKED], len(variant.split)
    assert len(answers) <= images < external.CHECKED
    assert len(answers.unique(dim=0)) == len(answers), "no image twice"
    assert described["agree"] >= 1 - 1 / len(answers)
    assert isinstance(variant.loaded.model, VisionTransformer)
    warmed = variant.warm_up(3)
    assert warmed["first_seconds"] > 0 and warmed["engine_ran"] == "compile"
    assert len(variant.time_block(3, 2)) == 2 and min(variant.time_block(3, 2)) > 0
    engine = variant.loaded.engine

    def without_graph(pixels):
        counters["inductor"]["cudagraph_skips"] += 1
        return timm.VisionTransformer.forward(variant.loaded.model, pixels)

    engine.model = without_graph
    with pytest.raises(VariantError, match="left out a CUDA graph"):
        variant.warm_up(2)
    engine.model = lambda pixels: torch.full((len(pixels), 4), float("nan"))
    with pytest.raises(VariantError, match="of 4 images are not finite"):
        variant.first_forward(4)
    engine.model = lambda pixels: (
        1 - timm.VisionTransformer.forward(variant.loaded.model, pixels)
    )
    with pytest.raises(VariantError, match="computes something else"):
        variant.warm_up(1)
    monkeypatch.setattr(Block, "forward", lambda self, x: x + self.attn(self.norm1(x)))
    with pytest.raises(VariantError, match="computes something else"):
        external.load_external_variant(mini, "timm-compile", "cpu")


def test_on_a_cpu_a_peer_says_why_not(mini):
    with pytest.raises(
        VariantError, match=r"^peers run as CUDA graphs: they need an NVIDIA GPU$"
    ):
        external.load_external_variant(mini, "timm-compile", "cpu")


def test_a_study_names_its_peers(mini_yaml, tmp_path):
    assert set(external.EXTERNAL_MODELS) == set(PEERS)
    assert load_study(str(mini_yaml)).peers == []
    path = tmp_path / "with.yaml"
    path.write_text(mini_yaml.read_text() + "peers: [timm-compile]\n")
    assert load_study(str(path)).peers == ["timm-compile"]
    path.write_text(mini_yaml.read_text() + "peers: [tim-compile]\n")
    with pytest.raises(
        UserError, match=r"unknown peer 'tim-compile': did you mean 'timm-compile'\?"
    ):
        load_study(str(path))


def test_a_peer_that_cannot_run_keeps_its_place_with_blanks(mini):
    """In processes of their own, beside a variant, on a CPU."""
    study = replace(
        mini, variants=["fp32-sdpa"], batch_sizes=[1], peers=["timm-compile"]
    )
    found = comparison.measure_comparison(study, "cpu")
    assert found["failed"] == {
        "timm-compile": "peers run as CUDA graphs: they need an NVIDIA GPU"
    }
    record = {"asked": {"variants": study.variants, "peers": study.peers}} | found
    times, ratios = time_table(record), ratio_table(record)
    assert list(times.variant) == ["fp32-sdpa", "timm-compile"] and list(
        times.samples
    ) == [20, 0]
    assert times.p50_ms.isna().tolist() == [False, True]
    assert (
        ratios[["a", "b"]].values.tolist() == [["timm-compile", "fp32-sdpa"]]
        and ratios.ratio.isna().all()
    )
