"""The model card of a base that was pretrained on the garden: what it is, how it was made, how to make it again."""

import torch
import transformers

from vitnb import garden, studies

CARD = """\
---
tags: [image-classification, vit, synthetic]
---
# garden-vit, {millions:.1f}M parameters: a base model of vitnb

**Synthetic data only.** This Vision Transformer has seen no photograph: it was trained from scratch on flowers drawn
by `vitnb.garden`, of {species} invented species, none of which is among the {study} species of the study. It is a
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
"""


def text(asked: studies.Pretrain, found: dict, *, seed: int, command: str, decay: float, smoothing: float) -> str:
    """The card in Markdown, from what was asked and what `pretrain.train` found."""
    share = (
        f"; {asked.keep_tokens:.0%} of the patches kept at random, all of them in the last {asked.full_steps:,} steps"
    )
    return CARD.format(
        millions=found["parameters"] / 1e6, parameters=found["parameters"], layers=asked.layers, hidden=asked.hidden_size,
        heads=asked.heads, intermediate=4 * asked.hidden_size, patch=asked.patch_size, image=asked.image_size,
        species=garden.PRETRAINING_SPECIES, study=garden.STUDY_SPECIES, seen=asked.steps * asked.batch_size, seed=seed,
        drawn="" if asked.drawn_size == asked.image_size else f" at {asked.drawn_size} px and resized",
        variation=garden.VARIATION, steps=asked.steps, batch=asked.batch_size, tokens=share if asked.keep_tokens < 1 else "",
        rate=asked.learning_rate, decay=decay, warmup=found["warmup_steps"], smoothing=smoothing, loss=found["loss"],
        residual="" if asked.residual_scale == 1 else f", but {asked.residual_scale:g} times in the last Linear of each branch",
        accuracy=found["held_out_top1"], held_out=found["held_out_images"], device=found["device"],
        minutes=found["minutes"], torch=torch.__version__, transformers=transformers.__version__, command=command,
    )  # fmt: skip
