"""Load external baselines: other packages' models with the same fine-tuned weights.

``timm-compile`` is timm's ViT in 16 bits. ``torchao-fp8-compile`` is timm's ViT with
the blocks' Linears in 8-bit floating point (torchao: dynamic, one scale a row). Both
are compiled with CUDA graphs (``reduce-overhead``). Both must give the plain model's
logits before they are timed. timm and torchao are optional: a baseline whose package is
missing fails with this reason.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.metadata import version

import torch
from torch import nn

from vitnb import devices, variants
from vitnb.data.splits import Split
from vitnb.errors import VariantError, one_line
from vitnb.measure.worker import LocalVariant, load_local_variant
from vitnb.models import engines
from vitnb.models.loader import LoadedVariant
from vitnb.study import Study

CHECKED = 64  # images at most whose logits are compared before anything is compiled

# transformers' names (5.9 or newer, in memory) -> timm's, replaced in this order.
# Query, key and value are one Linear in timm.
NAMES = {
    "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
    "vit.embeddings.position_embeddings": "pos_embed",
    "vit.embeddings.": "",
    "vit.layernorm": "norm",
    "vit.layers": "blocks",
    "classifier": "head",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.q_proj": "attn.qkv",
    "attention.o_proj": "attn.proj",
}


def timm_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a ViTForImageClassification's weights under timm's names.

    Query, key and value are joined. A weight that NAMES does not cover keeps its own
    name, so that a strict load refuses it.
    """
    state = model.state_dict()
    renamed = {}
    for name, tensor in state.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            parts = [name.replace("q_proj", f"{part}_proj") for part in "qkv"]
            tensor = torch.cat([state[part] for part in parts])
        for theirs, timms in NAMES.items():
            name = name.replace(theirs, timms)
        renamed[name] = tensor
    return renamed


def _import_optional(name: str):
    """Import an optional module; raise VariantError if it is missing or broken."""
    try:
        return import_module(name)
    except Exception as error:
        # A package that was built for another PyTorch can fail in any way.
        raise VariantError(f"{name} cannot be imported: {one_line(error)}") from None


def timm_vit(model: nn.Module) -> nn.Module:
    """Build timm's VisionTransformer with the shape and weights of a transformers ViT.

    Device and type are those of the given model.

    Raises:
        VariantError: timm is missing, or the model is no ViT with timm's parts.
    """
    config = model.config
    timm = _import_optional("timm.models.vision_transformer")
    if config.model_type != "vit" or config.hidden_act != "gelu":
        raise VariantError(
            f"timm's ViT has no place for a {config.model_type} with "
            f"{config.hidden_act}"
        )
    built = timm.VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        in_chans=config.num_channels,
        num_classes=config.num_labels,
        global_pool="token",
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        qkv_bias=config.qkv_bias,
        norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
    )
    try:
        built.load_state_dict(timm_state(model))
    except RuntimeError as error:
        raise VariantError(
            f"the weights do not fit timm's ViT: {one_line(error)}"
        ) from None
    return built.to(model.device, model.dtype).eval()


def quantize_float8(model: nn.Module) -> nn.Module:
    """Quantize the Linears of a timm ViT's blocks in place, and return the model.

    Weights and activations are e4m3 with one scale a row. The head stays in 16 bits.

    Raises:
        VariantError: torchao is missing, or left a Linear of the blocks unquantized.
    """
    # torchao warns about missing kernels of its own, which it can do without.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    ao = _import_optional("torchao.quantization")
    settings = ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())
    ao.quantize_(model.blocks, settings)
    linears = [m for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    if left := sum(type(linear.weight) is nn.Parameter for linear in linears):
        raise VariantError(
            f"torchao left {left} of the blocks' {len(linears)} Linears in 16 bits"
        )
    return model


def timm_vit_float8(model: nn.Module) -> nn.Module:
    """Build timm's ViT from a transformers ViT, its Linears in 8-bit floating point."""
    return quantize_float8(timm_vit(model))


@dataclass(frozen=True)
class ExternalModel:
    """How to build an external model, and how far its logits may differ.

    build: makes the external model from the plain one.
    packages: the packages whose versions are recorded.
    max_spread: the largest difference of a logit, as a share of the logits' range.
    min_agree: the share of images with the same first class. A single image may always
        differ, as two classes can be equally likely.
    """

    build: Callable[[nn.Module], nn.Module]
    packages: tuple[str, ...]
    max_spread: float
    min_agree: float


# The plain model computes in the same 16 bits. Other kernels round in other places; FP8
# keeps three bits of the mantissa.
EXTERNAL_MODELS = {
    "timm-compile": ExternalModel(timm_vit, ("timm",), max_spread=0.05, min_agree=0.99),
    "torchao-fp8-compile": ExternalModel(
        timm_vit_float8, ("timm", "torchao"), max_spread=0.15, min_agree=0.95
    ),
}


def check_agreement(
    logits: torch.Tensor, plain: torch.Tensor, external: ExternalModel
) -> dict[str, float]:
    """Compare an external model's logits with the plain model's, [images, classes].

    Returns:
        spread, agree: see ``ExternalModel``.

    Raises:
        VariantError: the logits are too far apart to be of one computation.
    """
    logits, plain = logits.float().cpu(), plain.float().cpu()
    spread = ((logits - plain).abs().max() / (plain.max() - plain.min())).item()
    differ = (logits.argmax(-1) != plain.argmax(-1)).sum().item()
    agree = 1 - differ / len(plain)
    may_differ = max(1, (1 - external.min_agree) * len(plain))
    # Comparisons with NaN are false, so NaN is refused as well.
    if not (spread <= external.max_spread and differ <= may_differ):
        raise VariantError(
            f"the peer computes something else: logits differ by {spread:.3f} of "
            f"their range (at most {external.max_spread}), the first class agrees on "
            f"{agree:.3f} of the images (at least {external.min_agree})"
        )
    return {"spread": spread, "agree": agree}


class _ExternalEngine(engines.Engine):
    """An engine that passes pixels without a name, as timm's models take them.

    A model that cannot be compiled fails. Nothing stands in for it.
    """

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.shape not in self._ran:
            self._keep(pixel_values.shape)
        return self.model(pixel_values)


def check_gpu(device: str | None) -> None:
    """Raise VariantError unless the device is a GPU, as CUDA graphs need one."""
    if devices.select_device(device).type != "cuda":
        raise VariantError("peers run as CUDA graphs: they need an NVIDIA GPU")


def distinct_logits(
    loaded: LoadedVariant, pixels: torch.Tensor, images: int
) -> torch.Tensor:
    """Return the logits of a batch, float32 [images, classes], without repeated images.

    A batch larger than the split repeats images (see ``dataset.first_batch``). An image
    with two equally likely classes must count once. The CPU gets a copy of the logits,
    as the next run of a CUDA graph overwrites them.

    Args:
        images: images of the split that the batch was taken from.

    Raises:
        VariantError: logits are not finite.
    """
    step = math.ceil(len(pixels) / images)
    with loaded.inference() as model:
        output = model(pixel_values=pixels)
        logits = getattr(output, "logits", output)[::step].float().cpu()
    return engines.check_finite(logits)


class ExternalVariant(LocalVariant):
    """A compiled external model, with the logits that it must give.

    Args:
        expected: the plain model's logits, {batch size: [images, classes]}.
        agreement: how far the external model was from them before it was compiled.
    """

    def __init__(
        self,
        loaded: LoadedVariant,
        split: Split,
        pixels: dict[int, torch.Tensor],
        external: ExternalModel,
        expected: dict[int, torch.Tensor],
        agreement: dict[str, float],
    ):
        super().__init__(loaded, split, pixels)
        self.external = external
        self.expected = expected
        self.agreement = agreement

    def describe(self) -> dict:
        """Describe how far the logits are from the plain model's, and the packages."""
        packages = {name: version(name) for name in self.external.packages}
        return self.agreement | {"versions": packages}

    def first_forward(self, batch_size: int) -> None:
        """Compile for a batch size.

        Raises:
            VariantError: torch.compile leaves out a CUDA graph.
        """
        left_out = engines.count_graphs_left_out()
        super().first_forward(batch_size)
        if engines.count_graphs_left_out() > left_out:
            raise VariantError("torch.compile left out a CUDA graph")

    def warm_up(self, batch_size: int) -> dict:
        """Warm up as a LocalVariant does, then compare the logits once more.

        Now they come from the CUDA graph.
        """
        warmed = super().warm_up(batch_size)
        pixels = self.batch(batch_size)
        logits = distinct_logits(self.loaded, pixels, len(self.split))
        check_agreement(logits, self.expected[batch_size], self.external)
        return warmed


def load_external_variant(
    study: Study, name: str, device: str | None = None
) -> ExternalVariant:
    """Build an external model from the plain 16-bit model, check it, and compile it.

    Raises:
        VariantError: there is no GPU, a package is missing, or the logits differ.
    """
    check_gpu(device)
    external = EXTERNAL_MODELS[name]
    plain = load_local_variant(study, variants.CONTROL, device)
    images = len(plain.split)
    expected = {
        size: distinct_logits(plain.loaded, plain.batch(size), images)
        for size in {CHECKED, *study.batch_sizes}
    }
    model = external.build(plain.loaded.model)
    eager = replace(plain.loaded, model=model, engine=_ExternalEngine("compile", model))
    logits = distinct_logits(eager, plain.batch(CHECKED), images)
    agreement = check_agreement(logits, expected[CHECKED], external)
    compiled = engines.compile_whole(model, mode="reduce-overhead")
    return ExternalVariant(
        replace(eager, engine=_ExternalEngine("compile", compiled)),
        plain.split,
        plain.pixels,
        external,
        expected,
        agreement,
    )
