"""Pretrain a ViT from scratch on drawn flowers, as the base model of studies.

The model learns 800 species of the synthetic garden, none of which is in a study. Every
image is drawn for one step, on the device that trains. So the model cannot learn images
by heart, and its accuracy is measured on fresh drawings. The number of steps sets the
length of the training, so that other machines can repeat it. The result is a checkpoint
without a classifier, with a model card.
"""

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import ViTForImageClassification

from vitnb import devices
from vitnb.data import garden
from vitnb.errors import UserError
from vitnb.models import checkpoints
from vitnb.records import run as records_run
from vitnb.records.files import check_new_folder
from vitnb.study import Pretrain
from vitnb.training import pretrain_vit
from vitnb.training.model_card import model_card

WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1

SETTLED = 10  # steps after which the speed is steady
TIMED = 30  # steps after which the speed is judged for the first time
# Images that are drawn at once. A drawing takes hundreds of small GPU kernels, and few
# images would not keep a GPU busy.
DRAWN_TOGETHER = 1024


def pretrain_for_study(study_name: str) -> Path:
    """Pretrain the base of a study, write the record ``pretrain``; return its folder.

    Raises:
        UserError: a study without a ``pretrain`` section, and as ``pretrain`` does.
    """
    run = records_run.begin("pretrain", study_name)
    study = run.study
    if study.pretrain is None:
        raise UserError(
            f"study '{study.name}' has no pretrain section: its base is {study.base}"
        )
    results = pretrain(
        study.own_base,
        study.pretrain,
        seed=run.seed,
        device=devices.select_device(),
        command=f"python -m vitnb pretrain {study.typed}",
    )
    run.save(**results, base_sha256=checkpoints.fingerprint(study.own_base))
    return study.own_base


def pretrain(
    folder: str | Path,
    settings: Pretrain | None = None,
    *,
    seed: int = 0,
    device: str | torch.device = "cuda",
    command: str = "",
    compile: bool = True,
) -> dict:
    """Train a ViT from scratch and save it; return the results, see ``train_base``.

    The folder gets the backbone (float16), ``preprocessor_config.json`` and a model
    card, whole or not at all.

    Args:
        settings: None for those of the base that comes with this repository.
        command: to make the base again, for the model card.

    Raises:
        UserError: the folder holds something already or cannot be written (before any
            work), or the steps would take more than ``settings.minutes``.
    """
    folder = Path(folder)
    settings = settings or Pretrain()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists: remove it, or name another folder")
    check_new_folder(folder, pretrain_vit.BASE)
    model, results = train_base(settings, seed=seed, device=device, compile=compile)
    command = command or (
        f"python -m vitnb pretrain --steps {settings.steps} "
        f"--batch-size {settings.batch_size} --seed {seed}"
    )
    card = model_card(
        settings,
        results,
        seed=seed,
        command=command,
        weight_decay=WEIGHT_DECAY,
        label_smoothing=LABEL_SMOOTHING,
    )
    pretrain_vit.save_base(model, card, folder)
    return results


@contextmanager
def tensor_float32() -> Iterator[None]:
    """Multiply float32 in TensorFloat-32 where a GPU can; restore the setting after."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@tensor_float32()
def train_base(
    settings: Pretrain,
    *,
    seed: int = 0,
    device: str | torch.device = "cuda",
    compile: bool = True,
) -> tuple[ViTForImageClassification, dict]:
    """Train a ViT in bfloat16 autocast.

    Args:
        compile: use torch.compile on a GPU; eager where compilation fails.

    Returns:
        The model and its results: the learning curve ``history``, the last ``loss``,
        ``held_out_top1`` (0 to 1) and what the model card tells.

    Raises:
        UserError: the steps turn out to take more than ``settings.minutes``.
    """
    device = torch.device(device)
    torch.manual_seed(seed)
    progress = Progress(settings, device)
    model = pretrain_vit.build_vit(settings).to(device)
    patches = model.vit.embeddings.patch_embeddings.num_patches
    kept = pretrain_vit.num_kept(model, settings.keep_tokens)
    if compile and device.type == "cuda":
        subset_size = kept if kept < patches else None
        pretrain_vit.compile_layers(model, settings.batch_size, subset_size)
    optimizer, schedule = make_optimizer(model, settings)
    generator = torch.Generator(device).manual_seed(seed)
    drawings = drawn_batches(settings, generator, seed, mirror=True)
    other_generator = torch.Generator(device).manual_seed(seed + 1_000_003)
    held_out = drawn_batches(settings, other_generator, seed)
    full_cost = (patches + 1) / (kept + 1)  # of a step with all tokens

    for step in range(1, settings.steps + 1):
        pixels, labels = next(drawings)
        subset = None
        if kept < patches and step <= settings.steps - settings.full_steps:
            subset = pretrain_vit.sample_patches(len(pixels), patches, kept, generator)
        loss = _training_loss(model, pixels, labels, subset)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.add(step, loss.detach(), full_cost)
        if progress.is_due(step):
            progress.show(step, held_out_top1(model, held_out, 1))
    return model, _results(model, settings, held_out, progress)


def _training_loss(
    model: ViTForImageClassification,
    pixels: Tensor,
    labels: Tensor,
    kept: Tensor | None,
) -> Tensor:
    """Return the cross-entropy with label smoothing, from the kept patches alone."""
    with torch.autocast(pixels.device.type, torch.bfloat16):
        logits = pretrain_vit.forward_subset(model, pixels, kept)
    return functional.cross_entropy(
        logits.float(), labels, label_smoothing=LABEL_SMOOTHING
    )


def _results(
    model: ViTForImageClassification,
    settings: Pretrain,
    held_out: Iterator[tuple[Tensor, Tensor]],
    progress: "Progress",
) -> dict:
    """Measure the trained model; return the results for the record and the card."""
    minutes = progress.minutes()
    on_gpu = model.device.type == "cuda"
    batches = 16 if settings.steps >= 1000 else 4
    results = {
        "history": progress.history,
        "loss": progress.history[-1]["loss"],
        "held_out_top1": held_out_top1(model, held_out, batches),
        "held_out_images": batches * settings.batch_size,
        "minutes": minutes,
        "warmup_steps": num_warmup_steps(settings),
        "parameters": sum(p.numel() for p in model.vit.parameters()),
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
    }
    print(
        f"held-out top-1 {results['held_out_top1']:.4f} "
        f"on {results['held_out_images']:,} fresh drawings",
        flush=True,
    )
    return results


class Progress:
    """The learning curve, a row for about every 25th of the steps, and the time used.

    Attributes:
        history: rows of step, loss (mean of the last steps, at most 100),
            held_out_top1, images_per_second and minutes.
    """

    def __init__(self, settings: Pretrain, device: torch.device):
        self.settings = settings
        self.device = device
        self.losses = deque(maxlen=min(settings.steps, 100))
        self.every = max(self.losses.maxlen, settings.steps // 25)
        self.history: list[dict] = []
        self.last_step = 0
        self.begin = self.settled = self.last_time = self._now()

    def minutes(self) -> float:
        return (self._now() - self.begin) / 60

    def is_due(self, step: int) -> bool:
        """Tell whether a row of the learning curve is due after a step."""
        return step % self.every == 0 or step == self.settings.steps

    def add(self, step: int, loss: Tensor, full_cost: float) -> None:
        """Keep the loss of a step, and raise UserError if the time will not do."""
        self.losses.append(loss)
        if step == SETTLED:
            self.settled = self._now()
        if step == TIMED or step % self.every == 0:
            now = self._now()
            check_time_budget(
                self.settings, full_cost, step, now - self.begin, now - self.settled
            )

    def show(self, step: int, top1: float) -> None:
        """Add a row to the learning curve and print it."""
        now = self._now()
        images = (step - self.last_step) * self.settings.batch_size
        row = {
            "step": step,
            "loss": torch.stack([*self.losses]).mean().item(),
            "held_out_top1": top1,
            "images_per_second": images / (now - self.last_time),
            "minutes": (now - self.begin) / 60,
        }
        self.history.append(row)
        print(
            f"step {step}/{self.settings.steps}  loss {row['loss']:.4f}  "
            f"held-out top-1 {row['held_out_top1']:.4f}  "
            f"{row['images_per_second']:,.0f} images/s  {row['minutes']:.2f} min",
            flush=True,
        )
        self.last_step = step
        self.last_time = self._now()

    def _now(self) -> float:
        """Return seconds on a clock, after all work of the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def num_warmup_steps(settings: Pretrain) -> int:
    """Return the number of steps until the peak learning rate, at most a quarter.

    A peak above 3e-4 makes the loss climb now and then.
    """
    return max(1, min(settings.warmup_steps, settings.steps // 4))


def make_optimizer(
    model: ViTForImageClassification, settings: Pretrain
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return AdamW and its schedule: linear to the peak rate, then a cosine to 0."""
    parameters = list(model.parameters())
    weights = [p for p in parameters if p.ndim in (2, 4)]
    others = [p for p in parameters if p.ndim not in (2, 4)]  # biases, norms, tokens
    optimizer = torch.optim.AdamW(
        [
            {"params": weights, "weight_decay": WEIGHT_DECAY},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
        fused=model.device.type == "cuda",
    )
    warmup = num_warmup_steps(settings)
    decay = max(1, settings.steps - warmup)

    def share_of_peak(step: int) -> float:
        cosine = 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / decay)
        return min((step + 1) / warmup, cosine)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)


@torch.inference_mode()
def held_out_top1(
    model: ViTForImageClassification,
    drawings: Iterator[tuple[Tensor, Tensor]],
    batches: int,
) -> float:
    """Return the top-1, 0 to 1, on the next batches of drawings, with all patches."""
    correct = 0
    images = 0
    model.eval()
    # The shapes differ from those of the training. Compiling again would take longer.
    with torch.compiler.set_stance("force_eager"):
        for _ in range(batches):
            pixels, labels = next(drawings)
            with torch.autocast(pixels.device.type, torch.bfloat16):
                logits = pretrain_vit.forward_subset(model, pixels)
            correct += (logits.argmax(-1) == labels).sum()
            images += len(labels)
    model.train()
    return float(correct) / images


def check_time_budget(
    settings: Pretrain, full_cost: float, step: int, spent: float, steady: float
) -> None:
    """Raise UserError if the remaining steps would end after ``settings.minutes``.

    The message says how many steps would fit.

    Args:
        full_cost: the time of a step with all tokens, relative to one with the kept
            tokens.
        step: number of steps that are done.
        spent: seconds since the begin.
        steady: seconds since step ``SETTLED``.
    """

    def cost_after(step: int) -> float:
        """Return the cost of the steps after one, in steps with the kept tokens."""
        full_steps = min(settings.full_steps, settings.steps - step)
        return settings.steps - step - full_steps + full_cost * full_steps

    if not settings.minutes or step <= SETTLED or step == settings.steps:
        return
    seconds_per_step = steady / (cost_after(SETTLED) - cost_after(step))
    needed = spent + seconds_per_step * cost_after(step)
    excess = needed - 60 * settings.minutes
    if excess > 0:
        possible = max(0, int(settings.steps - excess / seconds_per_step))
        raise UserError(
            f"{settings.steps} steps would take {needed / 60:.1f} minutes, "
            f"more than {settings.minutes:g}: about {possible} would fit"
        )


def drawn_batches(
    settings: Pretrain, generator: torch.Generator, seed: int, mirror: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw fresh images without end.

    Args:
        generator: of species and poses; its device draws.
        seed: of the garden, which decides what the species look like.
        mirror: mirror half of the images.

    Yields:
        Pixels as ``to_pixels`` returns them, and labels int64 [batch].
    """
    size = settings.batch_size
    count = size * max(1, DRAWN_TOGETHER // size)
    while True:
        images, labels = garden.pretraining_batch(
            count, generator, settings.drawn_size, seed
        )
        if mirror:
            chances = torch.rand(
                count, 1, 1, 1, generator=generator, device=generator.device
            )
            images = torch.where(chances < 0.5, images.flip(2), images)
        batches = zip(images.split(size), labels.split(size), strict=True)
        for batch, batch_labels in batches:
            yield to_pixels(batch, settings.image_size), batch_labels


def to_pixels(images: Tensor, side: int) -> Tensor:
    """Resize and normalize drawings as the saved preprocessor does.

    The filter is Pillow's bilinear one, to within one grey level of 255: Pillow rounds
    once more, between rows and columns.

    Args:
        images: uint8 [n, height, width, 3].

    Returns:
        float32 [n, 3, side, side], in [-1, 1].
    """
    pixels = images.permute(0, 3, 1, 2).float()
    if pixels.shape[-1] != side:
        pixels = functional.interpolate(
            pixels, (side, side), mode="bilinear", antialias=True
        ).round()
    return pixels / 127.5 - 1.0
