"""The training loop of adapters and head, in one process or shared by several.

Several processes share every batch. Each takes some of its images, and the gradients
are averaged over all images of the batch. The augmentation of an image depends on the
seed, the epoch and the image alone. More GPUs therefore shorten a training and do not
change what is learned.
"""

import math
import time
from dataclasses import replace

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from vitnb import devices
from vitnb.data import dataset
from vitnb.data.splits import Split
from vitnb.errors import UserError
from vitnb.models import quantization
from vitnb.records.parameters import check_parameter
from vitnb.study import Finetune, Study

SILENT_SECONDS = 60.0  # the longest time without a line of progress, plus one batch


def train(
    model: PeftModel,
    study: Study,
    processor,
    train_split: Split,
    valid_split: Split,
    *,
    seed: int = 0,
    epochs: int | None = None,
    team: Accelerator | None = None,
) -> list[dict]:
    """Train adapters and head, and return the learning curve.

    The optimizer is AdamW under a one-cycle schedule. Images are cropped and mirrored
    at random. The training stops early after ``study.finetune.patience`` epochs without
    a better validation top-1. The model ends with the weights of its best epoch.

    Args:
        seed: of the order of the images and of their augmentation.
        epochs: how many; None for the study's own number.
        team: the processes that share every batch; None for this process alone.

    Returns:
        One row per epoch: epoch (from 1), loss (mean over the training images),
        valid_top1, seconds, and peak_bytes. The last is the largest amount of memory
        that PyTorch has allocated on any one GPU since the training began, the model
        included and what other work holds there left out. It is None on a CPU.

    Raises:
        UserError: fewer than one epoch, or a loss that is not finite.
    """
    budget = replace(study.finetune, epochs=_num_epochs(study, epochs))
    device = next(model.parameters()).device
    others = _bytes_of_others(model, device)
    images = dataset.PixelDataset(train_split, processor, seed, budget.crop_scale)
    valid_images = dataset.CachedDataset(dataset.PixelDataset(valid_split, processor))
    steps = math.ceil(len(images) / budget.batch_size)
    optimizer = Optimizer(model, budget.learning_rate, steps * budget.epochs)
    best = BestEpoch(model)
    # DistributedDataParallel: every process gets the mean of the gradients.
    forward = model if team is None else team.prepare(model)

    history = []
    model.train()
    progress = Progress(budget.epochs, steps, silent=_rank(team) > 0)
    for epoch in range(1, budget.epochs + 1):
        progress.start_epoch(epoch)
        images.epoch = epoch - 1
        order = seed * 10_000 + epoch - 1
        loss = train_epoch(forward, images, optimizer, budget, order, progress, team)
        if not math.isfinite(loss):
            raise UserError(
                f"the loss of epoch {epoch} is {loss}: lower finetune: learning_rate"
            )
        row = {
            "epoch": epoch,
            "loss": loss,
            "valid_top1": validation_top1(model, valid_images, device, team),
            "seconds": progress.epoch_seconds(),
            "peak_bytes": _peak_bytes(device, team, others),
        }
        history.append(row)
        progress.show_epoch(row)
        best.update(epoch, row["valid_top1"])
        if epoch - best.epoch >= budget.patience:
            progress.show(f"stopped early: no better epoch for {budget.patience}")
            break
    best.restore()
    return history


def train_epoch(
    forward: nn.Module,
    images: dataset.PixelDataset,
    optimizer: "Optimizer",
    budget: Finetune,
    order: int,
    progress: "Progress",
    team: Accelerator | None = None,
) -> float:
    """Take one optimizer step for each batch, and return the mean loss of the images.

    Args:
        forward: the model, or its DistributedDataParallel.
        order: seed of the order of the images.
    """
    rank, processes = _rank(team), _num_processes(team)
    device = next(forward.parameters()).device
    total = 0.0
    batches = dataset.make_batches(
        images, budget.batch_size, order, part=(rank, processes)
    )
    for step, (pixels, labels) in enumerate(batches):
        # The last batch is smaller. Its parts may differ by one image, and a process
        # whose part is empty gets an image that must not count. So the loss of a part
        # is weighted by its number of images.
        batch_images = min(budget.batch_size, len(images) - step * budget.batch_size)
        own_images = len(range(rank, batch_images, processes))
        with devices.autocast(device):
            logits = forward(pixel_values=pixels.to(device)).logits
        loss = nn.functional.cross_entropy(
            logits.float(), labels.to(device), label_smoothing=budget.label_smoothing
        )
        optimizer.step(loss * (own_images * processes / batch_images))
        total += loss.item() * own_images
        progress.show_batch(step + 1)
    return sum(_gather(team, total)) / len(images)


@torch.no_grad()
def validation_top1(
    model: nn.Module,
    images: Dataset,
    device: torch.device,
    team: Accelerator | None = None,
) -> float:
    """Return the share of correct predictions, 0 to 1, in evaluation mode.

    The model is left in training mode.

    Args:
        team: the processes that share the images; each image counts once.
    """
    own_images = images
    if team is not None:
        indices = range(team.process_index, len(images), team.num_processes)
        own_images = Subset(images, indices)
    correct = 0
    model.eval()
    with devices.autocast(device):
        for pixels, labels in dataset.make_batches(own_images, dataset.BATCH_SIZE):
            predictions = model(pixel_values=pixels.to(device)).logits.argmax(-1)
            correct += (predictions.cpu() == labels).sum().item()
    model.train()
    return sum(_gather(team, correct)) / len(images)


class Optimizer:
    """AdamW under a one-cycle schedule.

    GPUs below SM80 compute in float16, whose small gradients would vanish. There the
    loss is scaled up before the backward pass.

    Args:
        steps: length of the schedule.
    """

    def __init__(self, model: nn.Module, learning_rate: float, steps: int):
        weights = list(trainable_weights(model).values())
        device = weights[0].device
        is_fp16 = devices.half_dtype(device) == torch.float16
        self.optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, learning_rate, total_steps=steps, pct_start=0.2
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=is_fp16)

    def step(self, loss: Tensor) -> None:
        """Take one step down the gradient of the loss."""
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()


class BestEpoch:
    """The weights of the epoch with the best validation top-1 so far."""

    def __init__(self, model: nn.Module):
        self.weights = trainable_weights(model)
        self.epoch = 0
        self.top1 = -1.0
        self.copies: dict[str, Tensor] = {}

    def update(self, epoch: int, top1: float) -> None:
        """Copy the weights if this epoch is better than all before."""
        if top1 > self.top1:
            self.epoch = epoch
            self.top1 = top1
            self.copies = {
                name: weight.detach().clone() for name, weight in self.weights.items()
            }

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights of the best epoch back into the model."""
        for name, weight in self.weights.items():
            weight.copy_(self.copies[name])


class Progress:
    """The lines that a training prints: one an epoch, and one a minute in between.

    Args:
        silent: print nothing, in all processes of a team but the first.
    """

    def __init__(self, epochs: int, steps: int, *, silent: bool):
        self.epochs = epochs
        self.steps = steps
        self.silent = silent
        self.epoch = 0
        self.started = self.last_line = time.perf_counter()

    def start_epoch(self, epoch: int) -> None:
        """Start the clock of an epoch."""
        self.epoch = epoch
        self.epoch_started = time.perf_counter()

    def epoch_seconds(self) -> float:
        """Return the seconds since the epoch began."""
        return round(time.perf_counter() - self.epoch_started, 1)

    def show_batch(self, batch: int) -> None:
        """Estimate the time that is left, once the last line is a minute old."""
        if time.perf_counter() - self.last_line <= SILENT_SECONDS:
            return
        self.last_line = time.perf_counter()
        done = (self.epoch - 1) * self.steps + batch
        seconds_per_batch = (self.last_line - self.started) / done
        left = seconds_per_batch * (self.epochs * self.steps - done) / 60
        self.show(
            f"epoch {self.epoch:2d}/{self.epochs}  "
            f"batch {batch} of {self.steps}, at most {left:.0f} min left"
        )

    def show_epoch(self, row: dict) -> None:
        """Print a row of the learning curve."""
        self.show(
            f"epoch {row['epoch']:2d}/{self.epochs}  loss {row['loss']:.3f}  "
            f"valid top-1 {row['valid_top1']:.3f}  {row['seconds']:.0f} s"
        )
        self.last_line = time.perf_counter()

    def show(self, line: str) -> None:
        """Print a line, unless this process is silent."""
        if not self.silent:
            print(line, flush=True)


def trainable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights that a training changes, by their full names."""
    return {
        name: weight
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


def _num_epochs(study: Study, asked: int | None) -> int:
    epochs = study.finetune.epochs if asked is None else asked
    check_parameter("epochs", epochs)
    return epochs


def _rank(team: Accelerator | None) -> int:
    return 0 if team is None else team.process_index


def _num_processes(team: Accelerator | None) -> int:
    return 1 if team is None else team.num_processes


def _gather(team: Accelerator | None, value: float) -> list[float]:
    """Return the values of all processes, by rank, in each process."""
    if team is None:
        return [value]
    own_value = torch.tensor([value], dtype=torch.float64, device=team.device)
    return team.gather(own_value).tolist()


def _bytes_of_others(model: nn.Module, device: torch.device) -> int:
    """Return the bytes that a GPU holds beside the model, and begin a new peak.

    They are what earlier work has left, such as another model that is still in use.
    """
    if device.type != "cuda":
        return 0
    devices.free_memory(device)
    torch.cuda.reset_peak_memory_stats(device)
    others = torch.cuda.memory_allocated(device) - quantization.resident_bytes(model)
    return max(0, others)


def _peak_bytes(
    device: torch.device, team: Accelerator | None, others: int
) -> int | None:
    """Return the most bytes that the training has held on any one GPU."""
    if device.type != "cuda":
        return None
    held = torch.cuda.max_memory_allocated(device) - others
    return int(max(_gather(team, held)))
