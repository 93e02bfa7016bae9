"""Measure the waterfall: from fp32 down, the gain and cost of one technique at a time.

A ladder is a list of steps, each with one technique more than the step before. The
models of all steps stand in one process and are timed in interleaved blocks, so a gain
is a ratio of times from the same rounds. A step that loses, or cannot run here, keeps
its row.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from vitnb import devices, variants
from vitnb.analysis.waterfall import waterfall_table
from vitnb.data import dataset
from vitnb.data.splits import Split, load_split
from vitnb.errors import UserError
from vitnb.measure import accuracy, interleaving, latency
from vitnb.measure.interleaving import record_failure
from vitnb.measure.worker import LocalVariant
from vitnb.models import engines, loader
from vitnb.models.fused.vit import TECHNIQUES
from vitnb.records.identity import Checkpoints
from vitnb.records.run import begin
from vitnb.study import Study


@dataclass(frozen=True)
class Step:
    """A step of a ladder.

    technique: the technique that the step adds.
    variant: the variant that runs then.
    techniques: those of the fused engine that are used, see ``fused.vit``; None: all of
        them, or another engine.
    """

    technique: str
    variant: str
    techniques: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """The variant with its techniques. Steps of one name are one model."""
        if self.techniques is None:
            return self.variant
        return f"{self.variant}: {', '.join(self.techniques) or 'none'}"


def _fused_steps(variant: str, techniques: list[str]) -> list[Step]:
    """Return a step without any technique, then steps that add one at a time."""
    steps = [Step("rearranged", variant, ())]
    for i, technique in enumerate(techniques):
        steps.append(Step(technique, variant, tuple(techniques[: i + 1])))
    return steps


FIRST = Step("fp32, operator by operator", variants.BASELINE)

LADDERS = {
    "16 bits": [
        FIRST,
        Step("16 bits", "bf16-sdpa"),
        Step("CUDA graph", "bf16-sdpa-graph"),
        *_fused_steps(
            "bf16-sdpa-fused", [name for name in TECHNIQUES if name != "one pass"]
        ),
    ],
    "4 bits": [
        FIRST,
        Step("4 bits, NF4", "nf4-sdpa"),
        Step("CUDA graph", "nf4-sdpa-graph"),
        *_fused_steps("nf4-sdpa-fused", [*TECHNIQUES]),
    ],
    "8 bits": [
        FIRST,
        Step("8 bits, LLM.int8", "int8-sdpa"),
        Step("int8 activations", "w8a8-sdpa"),
        Step("CUDA graph", "w8a8-sdpa-graph"),
        Step("float8 in place of int8", "fp8-sdpa-graph"),
        Step("all of the fused forward", "fp8-sdpa-fused"),
    ],
}

IMAGES = 204  # images whose logits are compared
IMAGES_AT_ONCE = 32  # images in one forward
WARM_UP = 3  # forwards before the rounds; the first may compile or capture


def _load_steps(
    study: Study,
    steps: dict[str, Step],
    split: Split,
    device: torch.device,
    failed: dict[str, str],
) -> dict[str, LocalVariant]:
    """Load the model of every step; ``failed`` gains the reasons of those that fail.

    Raises:
        UserError: a checkpoint is missing, or no step at all can run here.
    """
    models = {}
    for name, step in steps.items():
        techniques = None if step.techniques is None else frozenset(step.techniques)
        try:
            loaded = loader.load_variant(
                study, variants.parse(step.variant), on=device, techniques=techniques
            )
            models[name] = LocalVariant(loaded, split)
        except Exception as error:
            record_failure(failed, name, error)
    if not models:
        reason = failed[FIRST.name]
        raise UserError(f"no step of the waterfall can run here: {reason}")
    return models


def compute_logits(model: LocalVariant, pixels: torch.Tensor) -> torch.Tensor:
    """Return the logits of images, float32 [images, classes] on the CPU.

    Args:
        pixels: float32 [images, 3, height, width].

    Raises:
        VariantError: logits are not finite.
    """
    logits = []
    with model.loaded.inference() as forward:
        for part in pixels.split(IMAGES_AT_ONCE):
            output = forward(pixel_values=model.loaded.prepare(part))
            logits.append(output.logits.float().cpu())
    return engines.check_finite(torch.cat(logits))


def _compute_all_logits(
    models: dict[str, LocalVariant], pixels: torch.Tensor, failed: dict[str, str]
) -> dict[str, torch.Tensor]:
    """Return the logits of every model; ``failed`` gains the reasons of the others."""
    logits = {}
    for name, model in models.items():
        try:
            logits[name] = compute_logits(model, pixels)
        except Exception as error:
            record_failure(failed, name, error)
    return logits


def start_blocks(model: LocalVariant, pixels: torch.Tensor) -> None:
    """Set the images of the blocks to come, and run a few forwards with them.

    Raises VariantError if the logits are not finite.
    """
    ready = model.loaded.prepare(pixels)
    model.pixels = {len(pixels): ready}
    model.first_forward(len(pixels))
    with model.loaded.inference() as forward:
        latency.time_device(model.loaded, forward, ready, WARM_UP)


def _time_steps(
    models: dict[str, LocalVariant],
    pixels: torch.Tensor,
    study: Study,
    failed: dict[str, str],
) -> dict[str, list[list[float]]]:
    """Time every model in interleaved blocks with a batch of images.

    Returns:
        {step: [rounds][forwards] milliseconds}, without the steps that failed.
    """
    ready = {}
    for name, model in models.items():
        try:
            start_blocks(model, pixels)
            ready[name] = [model]
        except Exception as error:
            record_failure(failed, name, error)
    size = len(pixels)
    blocks = interleaving.time_interleaved(
        ready, size, study.compare, study.seed, failed
    ).blocks
    rounds = len(next(iter(blocks.values()), []))
    print(f"batch {size}: {len(blocks)} steps in turns, {rounds} rounds", flush=True)
    return blocks


def _describe_step(
    model: LocalVariant, logits: torch.Tensor, reference: torch.Tensor | None
) -> dict[str, object]:
    """Describe a step's engine, its memory and its answers, for the record."""
    loaded = model.loaded
    described = loaded.engine.as_record() | {
        "resident_bytes": loaded.resident_bytes,
        "scratch_bytes": loaded.scratch_bytes,
        "first_class": logits.argmax(-1).tolist(),
    }
    if reference is not None:
        divergence = accuracy.kl_divergence(reference, logits)
        described["kl_by_image"] = accuracy.round_significant(divergence)
    return described


def measure_waterfall(study: Study, device: torch.device) -> dict:
    """Load every step, compare the logits, and time all steps in interleaved blocks.

    Returns:
        ladders: {ladder: [step as a mapping, with its name]}.
        steps: {step: engine, bytes, and by image first_class and kl_by_image}.
        blocks_ms: {batch size: {step: [rounds][forwards] milliseconds}}.
        failed: {batch size: {step: reason}}.
        images: how many logits are compared on.
        checkpoint_sha256: of each export when it was loaded.

    Raises:
        UserError: a checkpoint is missing, or no step at all can run here.
    """
    steps = {step.name: step for ladder in LADDERS.values() for step in ladder}
    split = load_split(study, "valid")
    failed: dict[str, str] = {}
    models = _load_steps(study, steps, split, device, failed)
    loaded_from = {
        model.loaded.variant.checkpoint: model.loaded.checkpoint_sha256
        for model in models.values()
    }
    processor = next(iter(models.values())).loaded.processor
    pixels = dataset.first_batch(split, processor, min(IMAGES, len(split)))
    logits = _compute_all_logits(models, pixels, failed)
    models = {name: models[name] for name in logits}
    print(
        f"{len(models)} of {len(steps)} steps answered {len(pixels)} images",
        flush=True,
    )
    blocks, failed_at = {}, {}
    for size in study.waterfall:
        batch = dataset.first_batch(split, processor, size)
        failed_at[str(size)] = dict(failed)
        blocks[str(size)] = _time_steps(models, batch, study, failed_at[str(size)])
    reference = logits.get(FIRST.name)
    # After the rounds, as an engine may fall back in them.
    described = {
        name: _describe_step(model, logits[name], reference)
        for name, model in models.items()
    }
    return {
        "ladders": _ladders_as_record(),
        "steps": described,
        "blocks_ms": blocks,
        "failed": failed_at,
        "images": len(pixels),
        "checkpoint_sha256": loaded_from,
    }


def _ladders_as_record() -> dict[str, list[dict]]:
    """Return the ladders as a record stores them."""
    return {
        ladder: [asdict(step) | {"name": step.name} for step in steps]
        for ladder, steps in LADDERS.items()
    }


def run_waterfall(study: Study, device: str | None = None) -> Path:
    """Measure a study's waterfall, and write it.

    Writes ``records/waterfall.json`` and ``waterfall.csv``.

    Returns:
        The path of the CSV file.

    Raises:
        UserError: the study has no waterfall; and see ``measure_waterfall``.
    """
    if not study.waterfall:
        raise UserError(
            f"study '{study.name}' has no waterfall: give it batch sizes, "
            "such as 'waterfall: [1, 32]'"
        )
    run = begin("waterfall", study.typed, batch_sizes=study.waterfall, device=device)
    measured = measure_waterfall(study, devices.select_device(device))
    loaded_from = Checkpoints(measured["checkpoint_sha256"])
    run.depend_on(loaded_from, load_split(study, "valid"))
    table = run.save_table("waterfall", waterfall_table(run.preview(**measured)))
    run.save(**measured)
    return study.outputs / table
