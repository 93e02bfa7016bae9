"""Patch dropout: a Vision Transformer that sees a random part of an image's patches costs that part of the time.

Y. Liu et al., *PatchDropout*, WACV 2023, arXiv:2208.07220. The class token is always kept. Patches get their positions
before some are dropped, so those that stay know where they were, and attention needs no mask.
"""

import torch
from torch import Tensor
from transformers import ViTForImageClassification


def count(model: ViTForImageClassification, share: float) -> int:
    """How many of an image's patches make up `share`, 0 to 1: at least one."""
    return max(1, round(share * model.vit.embeddings.patch_embeddings.num_patches))


def choose(images: int, patches: int, kept: int, generator: torch.Generator) -> Tensor:
    """`kept` of the numbers 0 to `patches` - 1, each at most once, for every image anew: int64 [images, kept]."""
    luck = torch.rand(images, patches, generator=generator, device=generator.device)
    return luck.topk(kept, sorted=False).indices


def logits(model: ViTForImageClassification, pixels: Tensor, kept: Tensor | None = None) -> Tensor:
    """The logits [n, classes] of `pixels` [n, 3, height, width] from the class token and the patches `kept` alone.

    `kept` is int64 [n, k], patches in reading order from 0; None for all, which is the model's own forward.
    """
    hidden = model.vit.embeddings(pixels)
    if kept is not None:
        index = torch.nn.functional.pad(kept + 1, (1, 0))  # the class token is number 0
        hidden = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
    for layer in model.vit.layers:
        hidden = layer(hidden)
    return model.classifier(model.vit.layernorm(hidden[:, 0]))
