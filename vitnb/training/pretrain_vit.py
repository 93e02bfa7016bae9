"""The ViT of the pretraining: build, compile and save it, and run it on some patches.

Training on a random part of the patches costs that part of the time (patch dropout: Y.
Liu et al., *PatchDropout*, WACV 2023, arXiv:2208.07220). The class token is always
kept. Positions are added before patches are dropped, so a kept patch has its right
position. Dropped patches are removed, so attention needs no mask.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from vitnb.data import garden
from vitnb.errors import one_line
from vitnb.models import attention
from vitnb.records.files import new_folder
from vitnb.study import Pretrain

BASE = "a base model"  # what the marker of its folder says, see ``files.new_folder``


def build_vit(settings: Pretrain) -> ViTForImageClassification:
    """Return the untrained model, in float32.

    Every block adds its output to the stream of hidden states. With random weights,
    many blocks add much noise. With ``residual_scale`` 0, the Linears that write to the
    stream start at zero. Each block is then the identity at first, and a deep model
    learns from the first step (SkipInit, arXiv:2002.10444; Fixup, arXiv:1901.09321).
    """
    config = ViTConfig(
        image_size=settings.image_size,
        patch_size=settings.patch_size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=4 * settings.hidden_size,
        qkv_bias=True,
        num_labels=garden.PRETRAINING_SPECIES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = ViTForImageClassification(config)
    # This implementation passes no mask. A mask would rule out flash kernels.
    model.set_attn_implementation(attention.implementation("sdpa"))
    with torch.no_grad():
        for layer in model.vit.layers:
            layer.attention.o_proj.weight.mul_(settings.residual_scale)
            layer.mlp.fc2.weight.mul_(settings.residual_scale)
    return model


def compile_layers(
    model: ViTForImageClassification,
    batch_size: int,
    kept: int | None,
    backend="inductor",
) -> None:
    """Compile each block in place; leave the model eager if compilation fails.

    All blocks have the same shapes, so one compilation serves all of them. It runs
    once, forward and backward, to see that it works.

    Args:
        kept: number of patches that a step sees; None for all.
    """
    size = model.config.image_size
    device = model.device
    subset = None
    if kept is not None:
        subset = torch.arange(kept, device=device).expand(batch_size, kept)
    try:
        for layer in model.vit.layers:
            layer.compile(dynamic=False, backend=backend)
        pixels = torch.zeros(batch_size, 3, size, size, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            forward_subset(model, pixels, subset).float().sum().backward()
    except (
        Exception
    ) as error:  # a compiler may raise anything, and eager is only slower
        print(f"torch.compile failed ({one_line(error)}): eager", flush=True)
        for layer in model.vit.layers:
            layer._compiled_call_impl = None
    model.zero_grad(set_to_none=True)


def save_base(model: ViTForImageClassification, card: str, folder: Path) -> None:
    """Write backbone (float16), preprocessor and card to a folder, all or nothing.

    Args:
        card: the README.md of the checkpoint.
    """
    backbone = {
        name: weight.detach().cpu().half().contiguous()
        for name, weight in model.state_dict().items()
        if not name.startswith("classifier.")
    }
    # The labels of the pretraining leave together with the head. The config still says
    # float32, the type to compute in.
    model.config.num_labels = 2
    # A name that transformers knows without this package.
    model.set_attn_implementation("sdpa")
    with new_folder(folder, BASE) as part:
        model.save_pretrained(part, state_dict=backbone)
        _processor(model.config.image_size).save_pretrained(part)
        (part / "README.md").write_text(card)
        for path in part.iterdir():
            path.chmod(0o644)  # safetensors writes for the owner alone


def _processor(side: int) -> ViTImageProcessorPil:
    """Return a preprocessor to ``side`` x ``side`` pixels in [-1, 1]."""
    return ViTImageProcessorPil(
        do_resize=True,
        size={"height": side, "width": side},
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def num_kept(model: ViTForImageClassification, share: float) -> int:
    """Return the number of patches that make up a share, 0 to 1: at least one."""
    return max(1, round(share * model.vit.embeddings.patch_embeddings.num_patches))


def sample_patches(
    images: int, patches: int, kept: int, generator: torch.Generator
) -> Tensor:
    """Choose patches at random for each image, each patch at most once.

    Returns:
        Indices from 0 to ``patches`` - 1, int64 [images, kept].
    """
    scores = torch.rand(images, patches, generator=generator, device=generator.device)
    return scores.topk(kept, sorted=False).indices


def forward_subset(
    model: ViTForImageClassification, pixels: Tensor, kept: Tensor | None = None
) -> Tensor:
    """Return the logits from the class token and the kept patches alone.

    Args:
        pixels: [images, 3, height, width].
        kept: indices of patches in reading order, from 0, int64 [images, kept]. None
            keeps all patches, as the model's own forward does.

    Returns:
        [images, classes].
    """
    hidden = model.vit.embeddings(pixels)
    if kept is not None:
        tokens = functional.pad(kept + 1, (1, 0))  # the class token is number 0
        width = hidden.shape[-1]
        hidden = hidden.gather(1, tokens[..., None].expand(-1, -1, width))
    for layer in model.vit.layers:
        hidden = layer(hidden)
    return model.classifier(model.vit.layernorm(hidden[:, 0]))
