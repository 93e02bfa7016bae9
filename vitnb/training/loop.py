"""Training of adapters and head: one loop, for one process or for a team that shares every batch (see ``launch``).

A team learns from the same batches as one process: each takes its part of every batch, the gradients are averaged over the
batch's images, and what the images of an epoch look like depends on the seed alone. More GPUs change the time, not the question.
"""

import gc
import math
import time
from dataclasses import replace

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from torch.utils.data import Dataset, Subset

from vitnb import devices
from vitnb.data import dataset
from vitnb.data.splits import Split
from vitnb.errors import UserError
from vitnb.study import Study

SILENCE = 60.0  # seconds in which a training says nothing, at most a batch more


def _gather(team: Accelerator | None, value: float) -> list[float]:
    """A number of every process, by rank, in each of them."""
    if team is None:
        return [value]
    return team.gather(torch.tensor([value], dtype=torch.float64, device=team.device)).tolist()


@torch.no_grad()
def validation_top1(model: nn.Module, pixels: Dataset, on: torch.device, team: Accelerator | None = None) -> float:
    """Share of right answers on a split, in evaluation mode; leaves the model in training mode.

    ``team``: the processes that share the split, each image counted once.
    """
    model.eval()
    right, mine = 0, pixels
    if team is not None:
        mine = Subset(pixels, range(team.process_index, len(pixels), team.num_processes))
    with devices.autocast(on):
        for images, labels in dataset.make_batches(mine, 128):
            right += (model(pixel_values=images.to(on)).logits.argmax(-1).cpu() == labels).sum().item()
    model.train()
    return sum(_gather(team, right)) / len(pixels)


def train(
    model: PeftModel,
    study: Study,
    processor,
    train: Split,
    valid: Split,
    *,
    seed=0,
    epochs=None,
    team: Accelerator | None = None,
) -> list[dict]:
    """Train adapters and head; keep the epoch with the best validation top-1; return the learning curve, a row an epoch.

    AdamW under a one-cycle schedule, random crops and flips, early stop after ``study.finetune.patience`` epochs
    without a better one. fp16 (GPUs below SM80) trains with gradient scaling.

    Args:
        epochs: None for the study's own.
        team: the processes that share every batch, of which this is one; None for this process alone.

    Returns:
        Rows of epoch, loss (mean over the training images), valid_top1, seconds, and peak_bytes: the most that PyTorch's
        allocator has held on a GPU since the training began, where it held most; None on a CPU.

    Raises UserError for fewer than one epoch, and for a loss that is not finite.
    """
    budget = replace(study.finetune, epochs=study.finetune.epochs if epochs is None else epochs)
    if budget.epochs < 1:
        raise UserError(f"epochs must be at least 1, got {budget.epochs}")
    rank, processes = (0, 1) if team is None else (team.process_index, team.num_processes)
    on = next(model.parameters()).device
    images = dataset.PixelDataset(train, processor, seed, budget.crop_scale)
    held_out = dataset.CachedDataset(dataset.PixelDataset(valid, processor))
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(learned.values(), lr=budget.learning_rate, weight_decay=0.01)
    steps = -(-len(images) // budget.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, budget.learning_rate, total_steps=steps * budget.epochs, pct_start=0.2
    )
    scaler = torch.amp.GradScaler(on.type, enabled=devices.half_dtype(on) == torch.float16)
    forward = model if team is None else team.prepare(model)  # PyTorch's DDP: the mean of their gradients
    history, best, kept = [], -1.0, {}
    if on.type == "cuda":
        gc.collect()  # what earlier work has left would count as memory of the training
        torch.cuda.reset_peak_memory_stats(on)
    model.train()
    started = heard = time.perf_counter()
    for epoch in range(budget.epochs):
        begin, total = time.perf_counter(), 0.0
        images.epoch = epoch
        batches = dataset.make_batches(images, budget.batch_size, seed * 10_000 + epoch, part=(rank, processes))
        for step, (pixels, labels) in enumerate(batches):
            # The last batch may be uneven, or too small for some (who then get an image that does not count): a part
            # weighs as much as it has images.
            whole = min(budget.batch_size, len(images) - step * budget.batch_size)
            mine = len(range(rank, whole, processes))
            with devices.autocast(on):
                logits = forward(pixel_values=pixels.to(on)).logits
            loss = nn.functional.cross_entropy(logits.float(), labels.to(on), label_smoothing=budget.label_smoothing)
            optimizer.zero_grad()
            scaler.scale(loss * (mine * processes / whole)).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            total += loss.item() * mine
            if time.perf_counter() - heard > SILENCE:
                heard, done = time.perf_counter(), epoch * steps + step + 1
                left = (heard - started) / done * (steps * budget.epochs - done) / 60
                _tell(
                    rank,
                    f"epoch {epoch + 1:2d}/{budget.epochs}  batch {step + 1} of {steps}, at most {left:.0f} min left",
                )
        row = {"epoch": epoch + 1, "loss": sum(_gather(team, total)) / len(images)}
        if not math.isfinite(row["loss"]):
            raise UserError(f"the loss of epoch {epoch + 1} is {row['loss']}: lower finetune: learning_rate")
        row["valid_top1"] = validation_top1(model, held_out, on, team)
        row["seconds"] = round(time.perf_counter() - begin, 1)
        row["peak_bytes"] = None
        if on.type == "cuda":
            row["peak_bytes"] = int(max(_gather(team, torch.cuda.max_memory_allocated(on))))
        history.append(row)
        progress = f"epoch {epoch + 1:2d}/{budget.epochs}  loss {row['loss']:.3f}  valid top-1 {row['valid_top1']:.3f}"
        _tell(rank, f"{progress}  {row['seconds']:.0f} s")
        heard = time.perf_counter()
        if row["valid_top1"] > best:
            best, kept = row["valid_top1"], {name: p.detach().clone() for name, p in learned.items()}
        elif epoch + 1 - max(history, key=lambda r: r["valid_top1"])["epoch"] >= budget.patience:
            _tell(rank, f"stopped early: no better epoch for {budget.patience}")
            break
    with torch.no_grad():
        for name, parameter in learned.items():
            parameter.copy_(kept[name])
    return history


def _tell(rank: int, line: str) -> None:
    if rank == 0:
        print(line, flush=True)
