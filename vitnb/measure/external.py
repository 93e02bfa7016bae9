"""Peers: what one would run instead of our variants, with the same fine-tuned weights and in the same turns.

``timm-compile`` is timm's ViT in 16 bits; ``torchao-fp8-compile`` the same with the blocks' Linears in 8-bit floating point
(torchao: dynamic, one scale a row). Both are compiled with CUDA graphs (``reduce-overhead``), and both must give the plain
model's logits before they are timed. timm and torchao are optional: a peer whose package is missing fails with the reason.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version

import torch
from torch import nn

from vitnb import devices, variants
from vitnb.errors import VariantError, one_line
from vitnb.measure import worker
from vitnb.models.engines import Engine
from vitnb.study import Study

CHECKED = 64  # images at most whose answers are compared before anything is compiled


# transformers' names (5.9 or newer, in memory) -> timm's, replaced in this order. q, k and v are one Linear in timm.
NAMES = {
    "vit.embeddings.patch_embeddings.projection": "patch_embed.proj", "vit.embeddings.position_embeddings": "pos_embed",
    "vit.embeddings.": "", "vit.layernorm": "norm", "vit.layers": "blocks", "classifier": "head", "layernorm_before": "norm1",
    "layernorm_after": "norm2", "attention.q_proj": "attn.qkv", "attention.o_proj": "attn.proj",
}  # fmt: skip


def timm_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a transformers ``ViTForImageClassification`` under timm's names, q, k and v joined.

    What the names do not cover keeps its own, so that a strict load refuses it.
    """
    state, found = model.state_dict(), {}
    for name, tensor in state.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            tensor = torch.cat([state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
        for theirs, timms in NAMES.items():
            name = name.replace(theirs, timms)
        found[name] = tensor
    return found


def _package(name: str):
    """An optional module; VariantError where it is missing or broken."""
    try:
        return import_module(name)
    except Exception as error:  # a package that was built for another PyTorch can fail in any way
        raise VariantError(f"{name} cannot be imported: {one_line(error)}") from None


def timm_vit(model: nn.Module) -> nn.Module:
    """timm's ``VisionTransformer`` with the shape and the weights of a transformers ViT, where and in the type that these are.

    Raises VariantError without timm, or for a model that is no ViT with timm's parts.
    """
    config, timm = model.config, _package("timm.models.vision_transformer")
    if config.model_type != "vit" or config.hidden_act != "gelu":
        raise VariantError(f"timm's ViT has no place for a {config.model_type} with {config.hidden_act}")
    found = timm.VisionTransformer(
        img_size=config.image_size, patch_size=config.patch_size, in_chans=config.num_channels, num_classes=config.num_labels,
        global_pool="token", embed_dim=config.hidden_size, depth=config.num_hidden_layers, num_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size, qkv_bias=config.qkv_bias,
        norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
    )  # fmt: skip
    try:
        found.load_state_dict(timm_state(model))
    except RuntimeError as error:
        raise VariantError(f"the weights do not fit timm's ViT: {one_line(error)}") from None
    return found.to(model.device, model.dtype).eval()


def quantize_float8(model: nn.Module) -> nn.Module:
    """Quantize the Linears of a timm ViT's blocks in place: weights and activations e4m3, one scale a row; the head is kept.

    Raises VariantError without torchao, or if it left a Linear of the blocks as it was.
    """
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it warns about kernels of its own that it does without
    ao = _package("torchao.quantization")
    settings = ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())
    ao.quantize_(model.blocks, settings)
    linears = [module for module in model.blocks.modules() if isinstance(module, nn.Linear)]
    if kept := sum(type(linear.weight) is nn.Parameter for linear in linears):
        raise VariantError(f"torchao left {kept} of the blocks' {len(linears)} Linears in 16 bits")
    return model


@dataclass(frozen=True)
class ExternalModel:
    """One kind of peer: how it is built from the plain model, and how far its answers may be from that one's.

    spread: the largest difference of a logit, as a share of the range of all logits. agree: the share of images with the same
    first class; a single image may always differ, as two classes can be equally likely.
    """

    build: Callable[[nn.Module], nn.Module]
    packages: tuple[str, ...]
    spread: float
    agree: float


# The plain model computes in the same 16 bits. Other kernels round in other places; FP8 keeps three bits of the mantissa.
EXTERNAL_MODELS = {
    "timm-compile": ExternalModel(timm_vit, ("timm",), spread=0.05, agree=0.99),
    "torchao-fp8-compile": ExternalModel(lambda model: quantize_float8(timm_vit(model)), ("timm", "torchao"), spread=0.15, agree=0.95),
}


def check_agreement(found: torch.Tensor, plain: torch.Tensor, kind: ExternalModel) -> dict[str, float]:
    """How far logits are from the plain model's, [images, classes] both: spread and agree, see ``Kind``.

    Raises VariantError if that is too far: the peer computes something else.
    """
    found, plain = found.float().cpu(), plain.float().cpu()
    spread = ((found - plain).abs().max() / (plain.max() - plain.min())).item()
    differ = (found.argmax(-1) != plain.argmax(-1)).sum().item()
    agree = 1 - differ / len(plain)
    # Asked this way round, what is not a number is refused, too.
    if not (spread <= kind.spread and differ <= max(1, (1 - kind.agree) * len(plain))):
        raise VariantError(
            f"the peer computes something else: logits differ by {spread:.3f} of their range (at most {kind.spread}), "
            f"the first class agrees on {agree:.3f} of the images (at least {kind.agree})"
        )
    return {"spread": spread, "agree": agree}


class _Launched(Engine):
    """A peer as it is launched: timm's models take pixels without a name. What cannot be compiled fails, nothing stands in."""

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values)


def check_gpu(device: str | None) -> None:
    """Raise VariantError unless the device is a GPU: the peers run as CUDA graphs."""
    if devices.select_device(device).type != "cuda":
        raise VariantError("peers run as CUDA graphs: they need an NVIDIA GPU")


class ExternalServer(worker.VariantServer):
    """What runs in a peer's worker. It asks the plain model for its logits first, and keeps these instead of the model."""

    def __init__(self, study: Study, name: str, device: str | None = None):
        check_gpu(device)
        super().__init__(study, variants.CONTROL, device)
        self.kind = EXTERNAL_MODELS[name]
        self.plain = {size: self._logits(size) for size in {CHECKED, *study.batch_sizes}}
        peer = self.loaded.model = self.kind.build(self.loaded.model)
        self.loaded.engine = _Launched("compile", peer)
        self.found = check_agreement(self._logits(CHECKED), self.plain[CHECKED], self.kind)
        self.loaded.engine.model = torch.compile(peer, mode="reduce-overhead", dynamic=False)

    def _logits(self, size: int) -> torch.Tensor:
        """Float32 [images, classes] on the CPU: a copy, as the next run of a CUDA graph overwrites the last one's output.

        No image twice: a batch that is larger than the split repeats them, and one with two equally likely classes is one.
        """
        with self.loaded.inference() as model:
            found = model(pixel_values=self._batch(size))
        once = slice(None, None, math.ceil(size / len(self.split)))  # see ``data.first_batch``
        return getattr(found, "logits", found)[once].float().cpu()

    def describe(self) -> dict:
        """How far its logits are from the plain model's, not compiled yet, and which packages it is made of."""
        return self.found | {"versions": {name: version(name) for name in self.kind.packages}}

    def warm_up(self, batch_size: int) -> dict:
        """See ``workers.Bench.warm_up``; then the logits are compared once more, as now they come from the CUDA graph."""
        found = super().warm_up(batch_size)
        check_agreement(self._logits(batch_size), self.plain[batch_size], self.kind)
        return found
