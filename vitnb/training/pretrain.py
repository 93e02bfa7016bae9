"""Pretraining of a base model: a ViT learns 800 species of the synthetic garden, from scratch.

None of them is a species of a study. The images are drawn while it trains, on the same device, and never twice; so it
cannot learn them by heart, and what it has learned is measured on fresh drawings. The number of steps sets the length,
not the clock, so that it can be repeated. What comes out is a checkpoint folder without a classifier: the study puts
its own head on it.

Drawn flowers as a model reads them: fresh ones without end, resized as the saved preprocessor resizes pictures.

The model card of a base that was pretrained on the garden: what it is, how it was made, how to make it again.
"""

import math
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import ViTForImageClassification

from vitnb import devices
from vitnb.data import garden
from vitnb.errors import UserError
from vitnb.models import checkpoints
from vitnb.records import run as records_run
from vitnb.study import Pretrain
from vitnb.training import pretrain_vit

WEIGHT_DECAY, LABEL_SMOOTHING = 0.05, 0.1


SETTLED, TIMED = 10, 30  # steps after which the speed is taken for steady, and after which it is first judged


def pretrain_for_study(asked: str) -> Path:
    """Make the base that a study pretrains itself, and its record `pretrain`; returns the base's folder.

    Raises UserError for a study without a `pretrain` section, and as `pretrain` does.
    """
    run = records_run.begin("pretrain", asked)
    study = run.study
    if study.pretrain is None:
        raise UserError(f"study '{study.name}' has no pretrain section: its base is {study.base}")
    command = f"python -m vitnb pretrain {study.typed}"
    found = pretrain(study.own_base, study.pretrain, seed=run.seed, device=devices.select_device(), command=command)
    run.save(**found, base_sha256=checkpoints.fingerprint(study.own_base))
    return study.own_base


def pretrain(out: str | Path, asked: Pretrain | None = None, *, seed: int = 0, device: str | torch.device = "cuda",
             command: str = "", compile: bool = True) -> dict:  # fmt: skip
    """Train a ViT from scratch on the pretraining species, save it to `out`, and return what `train` found.

    `out` gets the backbone (fp16), `preprocessor_config.json` and a model card, whole or not at all. Without `asked` it
    is the embedded base. `command` is what the card says makes it again.

    Raises:
        UserError: there is something at `out` (before any work), or the steps would take more than `asked.minutes`.
    """
    out, asked = Path(out), asked or Pretrain()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists: remove it, or name another folder")
    model, found = train_base(asked, seed=seed, device=device, compile=compile)
    command = command or f"python -m vitnb pretrain --steps {asked.steps} --batch-size {asked.batch_size} --seed {seed}"
    pretrain_vit.save_base(
        model, model_card(asked, found, seed=seed, command=command, decay=WEIGHT_DECAY, smoothing=LABEL_SMOOTHING), out
    )
    return found


def train_base(asked: Pretrain, *, seed: int = 0, device: str | torch.device = "cuda",
          compile: bool = True) -> tuple[ViTForImageClassification, dict]:  # fmt: skip
    """Train as `asked` and return the model and, for a record, its learning curve and its held-out top-1 (0 to 1).

    In bf16 autocast. `compile` speeds up a GPU with torch.compile, and falls back to eager where that fails. Raises
    UserError as soon as the steps turn out to take more than `asked.minutes`.
    """
    on, begin = torch.device(device), time.perf_counter()
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")  # tf32
    model = pretrain_vit.build_vit(asked).to(on)
    patches, kept = model.vit.embeddings.patch_embeddings.num_patches, pretrain_vit.num_kept(model, asked.keep_tokens)
    if compile and on.type == "cuda":
        pretrain_vit.compile_layers(model, asked.batch_size, None if kept == patches else kept)
    optimizer, schedule = make_optimizer(model, asked)
    generator = torch.Generator(on).manual_seed(seed)
    pictures = drawn_batches(asked, generator, seed, mirror=True)
    other_poses = torch.Generator(on).manual_seed(seed + 1_000_003)
    held_out = drawn_batches(asked, other_poses, seed)
    losses, history = deque(maxlen=min(asked.steps, 100)), []
    every, settled = max(losses.maxlen, asked.steps // 25), begin
    since, counted = begin, 0
    for step in range(1, asked.steps + 1):
        pixels, labels = next(pictures)
        part = None
        if kept < patches and step <= asked.steps - asked.full_steps:
            part = pretrain_vit.sample_patches(asked.batch_size, patches, kept, generator)
        with torch.autocast(on.type, torch.bfloat16):
            logits = pretrain_vit.forward_subset(model, pixels, part)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        if step == SETTLED:
            settled = _now(on)
        if step == TIMED or step % every == 0:
            check_time_budget(asked, (patches + 1) / (kept + 1), step, _now(on) - begin, _now(on) - settled)
        if step % every == 0 or step == asked.steps:
            now = _now(on)
            row = {"step": step, "loss": torch.stack([*losses]).mean().item(), "held_out_top1": held_out_top1(model, held_out, 1),
                   "images_per_second": (step - counted) * asked.batch_size / (now - since),
                   "minutes": (now - begin) / 60}  # fmt: skip
            print(f"step {step}/{asked.steps}  loss {row['loss']:.4f}  held-out top-1 {row['held_out_top1']:.4f}  "
                  f"{row['images_per_second']:,.0f} images/s  {row['minutes']:.2f} min", flush=True)  # fmt: skip
            history.append(row)
            since, counted = _now(on), step
    minutes, batches = (_now(on) - begin) / 60, 16 if asked.steps >= 1000 else 4
    found = {
        "history": history, "loss": history[-1]["loss"], "held_out_top1": held_out_top1(model, held_out, batches),
        "held_out_images": batches * asked.batch_size, "minutes": minutes, "warmup_steps": num_warmup_steps(asked),
        "parameters": sum(p.numel() for p in model.vit.parameters()),
        "device": torch.cuda.get_device_name() if on.type == "cuda" else "CPU",
    }  # fmt: skip
    print(f"held-out top-1 {found['held_out_top1']:.4f} on {found['held_out_images']:,} fresh drawings", flush=True)
    return model, found


def num_warmup_steps(asked: Pretrain) -> int:
    """The steps until the peak rate; beyond a rate of 3e-4 the loss climbs now and then."""
    return max(1, min(asked.warmup_steps, asked.steps // 4))


def make_optimizer(
    model: ViTForImageClassification, asked: Pretrain
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW, and its learning rate over the steps: linear to the peak, then a cosine to 0."""
    groups = ([], [])  # weights decay; biases, norms and tokens do not
    for parameter in model.parameters():
        groups[parameter.ndim not in (2, 4)].append(parameter)
    optimizer = torch.optim.AdamW([{"params": groups[0], "weight_decay": WEIGHT_DECAY},
                                   {"params": groups[1], "weight_decay": 0.0}],
                                  lr=asked.learning_rate, betas=(0.9, 0.98), fused=model.device.type == "cuda")  # fmt: skip
    warmup = num_warmup_steps(asked)
    decay = max(1, asked.steps - warmup)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, s - warmup) / decay))
    )
    return optimizer, schedule


@torch.inference_mode()
def held_out_top1(model: ViTForImageClassification, pictures: Iterator[tuple[Tensor, Tensor]], batches: int) -> float:
    """Top-1 in [0, 1] on the next `batches` of drawings, with all of their patches."""
    model.eval()
    right, of = 0, 0
    with torch.compiler.set_stance("force_eager"):  # another compilation would take longer
        for _ in range(batches):
            pixels, labels = next(pictures)
            with torch.autocast(pixels.device.type, torch.bfloat16):
                right += (pretrain_vit.forward_subset(model, pixels).argmax(-1) == labels).sum()
            of += len(labels)
    model.train()
    return float(right) / of


def check_time_budget(asked: Pretrain, full: float, step: int, spent: float, steady: float) -> None:
    """Raise UserError, with the steps that fit, if those after `step` would end later than `asked.minutes`.

    Args:
        full: how many times longer a step with all tokens takes.
        spent: seconds since the begin.
        steady: seconds of these since step SETTLED.
    """

    def left(step: int) -> float:
        """What remains after a step, in steps of the shorter kind."""
        whole = min(asked.full_steps, asked.steps - step)
        return asked.steps - step - whole + full * whole

    if not asked.minutes or step <= SETTLED or step == asked.steps:
        return
    pace = steady / (left(SETTLED) - left(step))
    needed = spent + pace * left(step)
    if needed > 60 * asked.minutes:
        fit = max(0, int(asked.steps - (needed - 60 * asked.minutes) / pace))
        raise UserError(f"{asked.steps} steps would take {needed / 60:.1f} minutes, more than {asked.minutes:g}: "
                        f"about {fit} would fit")  # fmt: skip


def _now(on: torch.device) -> float:
    """Seconds on a clock, once the device is done."""
    if on.type == "cuda":
        torch.cuda.synchronize(on)
    return time.perf_counter()


TOGETHER = 1024  # images drawn at once: a drawing is hundreds of small kernels, which few images would not fill


def drawn_batches(asked: Pretrain, generator: torch.Generator, seed: int,
            mirror: bool = False) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Fresh drawings without end, in batches as `to_pixels` returns them, with labels int64 [batch]; `mirror`: half of them."""
    size, on = asked.batch_size, generator.device
    together = size * max(1, TOGETHER // size)
    while True:
        images, labels = garden.pretraining_batch(together, generator, asked.drawn_size, seed)
        if mirror:
            images = torch.where(
                torch.rand(together, 1, 1, 1, generator=generator, device=on) < 0.5, images.flip(2), images
            )
        for some, named in zip(images.split(size), labels.split(size), strict=True):
            yield to_pixels(some, asked.image_size), named


def to_pixels(images: Tensor, side: int) -> Tensor:
    """uint8 [n, h, w, 3] to float32 [n, 3, side, side] in [-1, 1], as the saved preprocessor does.

    Pillow's bilinear filter to within one grey level of 255: it rounds once more, between rows and columns.
    """
    pixels = images.permute(0, 3, 1, 2).float()
    if pixels.shape[-1] != side:
        pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True).round()
    return pixels / 127.5 - 1.0


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


def model_card(asked: Pretrain, found: dict, *, seed: int, command: str, decay: float, smoothing: float) -> str:
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
