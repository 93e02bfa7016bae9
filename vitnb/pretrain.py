"""Pretraining of the embedded base model: a small ViT learns 800 species of the synthetic garden.

None of them is a species of the study. The images are drawn while it trains, on the same device, and never twice; so it
cannot learn them by heart, and what it has learned is measured on fresh drawings. The number of steps sets the length,
not the clock, so that it can be repeated. What comes out is a checkpoint folder without a classifier: the study puts
its own head on it.
"""

import math
import shutil
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from vitnb import garden
from vitnb.errors import one_line

CARD = """\
---
tags: [image-classification, vit, synthetic]
---
# garden-vit: the embedded base model of vitnb

**Synthetic data only.** This Vision Transformer has seen no photograph: it was trained from scratch on flowers drawn
by `vitnb.garden`, of {species} invented species, none of which is among the {study} species of the study. It is a small
stand-in for a pretrained ViT, made to be fine-tuned and quantized offline; it knows nothing of real flowers.

| | |
|---|---|
| architecture | ViT, {layers} layers, hidden {hidden}, {heads} heads, MLP {intermediate}, patch {patch}, {image} px |
| parameters | {parameters:,} without the classifier; stored in fp16 |
| data | {species} species, {seen:,} images drawn once each, half mirrored (seed {seed}, variation {variation}) |
| steps x batch | {steps:,} x {batch} |
| optimizer | AdamW, peak learning rate {rate:g}, weight decay {decay:g}, warm-up {warmup} steps, then cosine to 0 |
| loss | cross-entropy, label smoothing {smoothing:g}; {loss:.4f} over the last {window} steps |
| held-out top-1 | {accuracy:.2%} on {held_out:,} fresh drawings of the {species} species |
| made on | {device}, {autocast}, in {minutes:.1f} minutes |
| software | torch {torch}, transformers {transformers} |

Make it again: `python -m vitnb pretrain --steps {steps} --batch-size {batch} --seed {seed}`
"""
WEIGHT_DECAY, LABEL_SMOOTHING = 0.05, 0.1


def pretrain(out: str | Path, *, steps: int = 5_000, batch_size: int = 1024, seed: int = 0, device: str = "cuda",
             image_size: int = 64, patch_size: int = 8, hidden_size: int = 128, layers: int = 12, heads: int = 2,
             learning_rate: float = 3e-4, minutes: float | None = None, compile: bool = True) -> float:  # fmt: skip
    """Train a ViT from scratch on the pretraining species, save it to `out`, and return its held-out top-1 (0 to 1).

    `out` gets the backbone (fp16), `preprocessor_config.json` and a model card, whole or not at all; a folder that is
    there already is left alone (FileExistsError, before any work). `minutes` is a limit for borrowed machines: if the
    steps would not be done by then, TimeoutError is raised and nothing is written. `compile` speeds up the model
    on a GPU with torch.compile, and falls back to eager where that fails.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists: remove it, or name another folder")
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")  # tf32
    config = ViTConfig(image_size=image_size, patch_size=patch_size, hidden_size=hidden_size, num_hidden_layers=layers,
                       num_attention_heads=heads, intermediate_size=4 * hidden_size, qkv_bias=True,
                       num_labels=garden.PRETRAINING_SPECIES, hidden_dropout_prob=0.0,
                       attention_probs_dropout_prob=0.0)  # fmt: skip
    model = ViTForImageClassification(config).to(device)
    forward = _compiled(model, batch_size, device) if compile and torch.device(device).type == "cuda" else model
    groups = ([], [])  # weights decay; biases, norms and tokens do not
    for parameter in model.parameters():
        groups[parameter.ndim not in (2, 4)].append(parameter)
    optimizer = torch.optim.AdamW([{"params": groups[0], "weight_decay": WEIGHT_DECAY},
                                   {"params": groups[1], "weight_decay": 0.0}],
                                  lr=learning_rate, betas=(0.9, 0.98))  # fmt: skip
    warmup = max(1, min(1000, steps // 4))  # beyond a rate of 3e-4 the loss climbs now and then

    def rate(step: int) -> float:
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator(device).manual_seed(seed)
    held_out = torch.Generator(device).manual_seed(seed + 1_000_003)  # fresh poses that training does not draw
    window = min(steps, 100)
    every, start, losses = max(window, steps // 25), time.perf_counter(), []
    for step in range(1, steps + 1):
        images, labels = garden.pretraining_batch(batch_size, generator, image_size, seed)
        mirrored = torch.rand(batch_size, 1, 1, 1, generator=generator, device=device) < 0.5
        pixels = normalize(torch.where(mirrored, images.flip(2), images))
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            logits = forward(pixel_values=pixels).logits
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses = [*losses[1 - window :], loss.detach()] if window > 1 else [loss.detach()]
        if step % every == 0 or step == steps:
            mean_loss = torch.stack(losses).mean().item()  # waits for the device
            spent = (time.perf_counter() - start) / 60
            accuracy = held_out_accuracy(model, held_out, min(2048, 4 * batch_size), batch_size, image_size, seed)
            print(f"step {step}/{steps}  loss {mean_loss:.4f}  held-out top-1 {accuracy:.4f}  "
                  f"{step * batch_size / spent / 60:,.0f} images/s  {spent:.2f} min", flush=True)  # fmt: skip
            if minutes is not None and spent * steps / step > minutes:
                raise TimeoutError(f"{steps} steps would take {spent * steps / step:.1f} minutes, "
                                   f"more than {minutes:g}: take fewer steps")  # fmt: skip
    spent = (time.perf_counter() - start) / 60
    count = batch_size * (16 if steps >= 1000 else 4)
    accuracy = held_out_accuracy(model, held_out, count, batch_size, image_size, seed)
    print(f"held-out top-1 {accuracy:.4f} on {count:,} fresh drawings", flush=True)
    name = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "CPU"
    parameters = sum(p.numel() for p in model.vit.parameters())
    card = CARD.format(
        layers=layers,
        hidden=hidden_size,
        heads=heads,
        intermediate=config.intermediate_size,
        patch=patch_size,
        image=image_size,
        parameters=parameters,
        species=garden.PRETRAINING_SPECIES,
        study=garden.STUDY_SPECIES,
        seen=steps * batch_size,
        seed=seed,
        variation=garden.VARIATION,
        steps=steps,
        batch=batch_size,
        rate=learning_rate,
        decay=WEIGHT_DECAY,
        warmup=warmup,
        smoothing=LABEL_SMOOTHING,
        loss=mean_loss,
        window=window,
        accuracy=accuracy,
        held_out=count,
        device=name,
        autocast="bf16 autocast",
        minutes=spent,
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    save(model, card, out)
    return accuracy


def normalize(images: Tensor) -> Tensor:
    """uint8 [n, h, w, 3] to float32 [n, 3, h, w] in [-1, 1], as the saved preprocessor does."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def _compiled(model: ViTForImageClassification, batch_size: int, device: str):
    """`model` through torch.compile, tried once forward and backward; the model itself where that fails."""
    try:
        compiled, size = torch.compile(model), model.config.image_size
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            compiled(pixel_values=torch.zeros(batch_size, 3, size, size, device=device)).logits.float().sum().backward()
        model.zero_grad(set_to_none=True)
        return compiled
    except Exception as error:  # whatever a compiler may raise: eager is only slower
        print(f"torch.compile failed ({one_line(error)}): eager", flush=True)
        return model


@torch.inference_mode()
def held_out_accuracy(model, generator: torch.Generator, count: int, batch_size: int, image_size: int,
                      seed: int) -> float:  # fmt: skip
    """Top-1 in [0, 1] on `count` fresh drawings of the pretraining species, rounded up to whole batches."""
    model.eval()
    correct, batches = 0, -(-count // batch_size)
    for _ in range(batches):
        images, labels = garden.pretraining_batch(batch_size, generator, image_size, seed)
        with torch.autocast(generator.device.type, torch.bfloat16):
            correct += (model(pixel_values=normalize(images)).logits.argmax(-1) == labels).sum()
    model.train()
    return float(correct) / (batches * batch_size)


def save(model: ViTForImageClassification, card: str, out: Path) -> None:
    """Write the fp16 backbone, the preprocessor and the card to the folder `out`, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        backbone = {name: value.detach().cpu().half().contiguous() for name, value in model.state_dict().items()
                    if not name.startswith("classifier.")}  # fmt: skip
        # The 800 labels go with the head, which is left out. The config says float32: fp16 is how it is stored.
        model.config.num_labels = 2
        model.save_pretrained(draft, state_dict=backbone)
        side = model.config.image_size
        processor = ViTImageProcessorPil(
            do_resize=True, size={"height": side, "width": side}, do_rescale=True, rescale_factor=1 / 255,
            do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        )  # fmt: skip
        processor.save_pretrained(draft)
        (draft / "README.md").write_text(card)
        for path in (draft, *draft.iterdir()):  # mkdtemp and safetensors write for the owner only
            path.chmod(0o755 if path.is_dir() else 0o644)
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
