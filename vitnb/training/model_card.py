"""Write the model card of a pretrained base: what it is, and how to make it again."""

import torch
import transformers

from vitnb.data import garden
from vitnb.study import Pretrain

CARD = """\
---
tags: [image-classification, vit, synthetic]
---
# garden-vit, {millions:.1f}M parameters: a base model of vitnb

**Synthetic data only.** This Vision Transformer has seen no photograph: it was trained from scratch on flowers drawn
by `vitnb.data.garden`, of {species} invented species, none of which is among the {study} species of the study. It is a
stand-in for a pretrained ViT, made to be fine-tuned and quantized offline; it knows nothing of real flowers.

| | |
|---|---|
| architecture | ViT, {layers} layers, hidden {hidden}, {heads} heads, MLP {intermediate}, patch {patch}, {image} px |
| parameters | {parameters:,} without the classifier; stored in fp16 |
| data | {species} species, {seen:,} images drawn once each{drawn}, half mirrored (seed {seed}, variation {variation}) |
| steps x batch | {steps:,} x {batch}{tokens} |
| optimizer | AdamW, peak learning rate {rate:g}, weight decay {decay:g}, warm-up {warmup} steps, then cosine to 0 |
| initialization | transformers' own{residual} |
| loss | cross-entropy, label smoothing {smoothing:g}; {loss:.4f} at the end |
| held-out top-1 | {accuracy:.2%} on {held_out:,} fresh drawings of the {species} species |
| made on | {device}, bf16 autocast, in {minutes:.1f} minutes |
| software | torch {torch}, transformers {transformers} |

Make it again: `{command}`
"""  # noqa: E501


def model_card(
    settings: Pretrain,
    results: dict,
    *,
    seed: int,
    command: str,
    weight_decay: float,
    label_smoothing: float,
) -> str:
    """Return the model card in Markdown.

    Args:
        results: of ``pretrain.train_base``.
        command: makes the base again.
    """
    drawn = tokens = residual = ""
    if settings.drawn_size != settings.image_size:
        drawn = f" at {settings.drawn_size} px and resized"
    if settings.keep_tokens < 1:
        tokens = (
            f"; {settings.keep_tokens:.0%} of the patches kept at random, "
            f"all of them in the last {settings.full_steps:,} steps"
        )
    if settings.residual_scale != 1:
        residual = (
            f", but {settings.residual_scale:g} times in the last Linear of each branch"
        )
    return CARD.format(
        millions=results["parameters"] / 1e6,
        parameters=results["parameters"],
        layers=settings.layers,
        hidden=settings.hidden_size,
        heads=settings.heads,
        intermediate=4 * settings.hidden_size,
        patch=settings.patch_size,
        image=settings.image_size,
        species=garden.PRETRAINING_SPECIES,
        study=garden.STUDY_SPECIES,
        seen=settings.steps * settings.batch_size,
        drawn=drawn,
        seed=seed,
        variation=garden.VARIATION,
        steps=settings.steps,
        batch=settings.batch_size,
        tokens=tokens,
        rate=settings.learning_rate,
        decay=weight_decay,
        warmup=results["warmup_steps"],
        smoothing=label_smoothing,
        residual=residual,
        loss=results["loss"],
        accuracy=results["held_out_top1"],
        held_out=results["held_out_images"],
        device=results["device"],
        minutes=results["minutes"],
        torch=torch.__version__,
        transformers=transformers.__version__,
        command=command,
    )
