"""The waterfall: from fp32 down, one technique after the other: what each gains, and what it costs in accuracy and memory.

The models of all steps (see ``ladders``) stand in one process and are asked in turn, so a gain is a ratio of times from the
same rounds. A step that loses, or cannot run here, keeps its row.

Ladders: from fp32 down, each step with one technique more than the step before. ``waterfall`` measures them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from vitnb import devices, variants
from vitnb.analysis import waterfall
from vitnb.data import dataset
from vitnb.data.splits import load_split
from vitnb.errors import UserError, VariantError, one_line
from vitnb.measure import accuracy, comparison, latency
from vitnb.models import checkpoints, loader
from vitnb.models.fused.vit import TECHNIQUES
from vitnb.records.files import write_file
from vitnb.records.run import begin
from vitnb.study import Study


@dataclass(frozen=True)
class Step:
    """One rung of a ladder: the technique that it adds, and what runs then.

    techniques: those of the fused engine, see ``fused.vit``; None for all of them, and for another engine.
    """

    technique: str
    variant: str
    techniques: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """What runs: equal names are one model."""
        return self.variant + ("" if self.techniques is None else f": {', '.join(self.techniques) or 'none'}")


def _fused(variant: str, names: list[str]) -> list[Step]:
    return [
        Step("rearranged", variant, ()),
        *(Step(name, variant, tuple(names[: i + 1])) for i, name in enumerate(names)),
    ]


FIRST = Step("fp32, operator by operator", variants.BASELINE)


LADDERS = {
    "16 bits": [
        FIRST, Step("16 bits", "bf16-sdpa"), Step("CUDA graph", "bf16-sdpa-graph"),
        *_fused("bf16-sdpa-fused", [name for name in TECHNIQUES if name != "one pass"]),
    ],
    "4 bits": [
        FIRST, Step("4 bits, NF4", "nf4-sdpa"), Step("CUDA graph", "nf4-sdpa-graph"), *_fused("nf4-sdpa-fused", [*TECHNIQUES]),
    ],
    "8 bits": [
        FIRST, Step("8 bits, LLM.int8", "int8-sdpa"), Step("int8 activations", "w8a8-sdpa"), Step("CUDA graph", "w8a8-sdpa-graph"),
        Step("float8 in place of int8", "fp8-sdpa-graph"), Step("all of the fused forward", "fp8-sdpa-fused"),
    ],
}  # fmt: skip


IMAGES, TOGETHER = 204, 32  # images whose answers are compared, and how many of them in one forward


WARM_UP = 3  # forwards before the turns; the first may compile or capture


@contextmanager
def _failing_alone() -> Iterator[None]:
    """Whatever goes wrong with one step is a VariantError, so that the others go on; a user's error stays one."""
    try:
        yield
    except (UserError, VariantError):
        raise
    except torch.OutOfMemoryError as error:
        raise VariantError(f"out of memory ({one_line(error)[:80]})") from None
    except Exception as error:  # a kernel that does not compile, say
        raise VariantError(f"{type(error).__name__}: {one_line(error)}") from None


class TimedModel:
    """A step's model, ready in this process; ``turns.take`` asks it as it asks a worker."""

    def __init__(self, study: Study, step: Step, on: torch.device):
        techniques = None if step.techniques is None else frozenset(step.techniques)
        with _failing_alone():
            self.loaded = loader.load_variant(study, variants.parse(step.variant), on=on, techniques=techniques)

    def ask(self, name: str, **options):
        """Call the method ``name``; any failure is a VariantError."""
        with _failing_alone():
            return getattr(self, name)(**options)

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels, float32 [images, 3, height, width], to logits, float32 [images, classes] on the CPU."""
        with self.loaded.inference() as model:
            parts = [
                model(pixel_values=self.loaded.prepare(some)).logits.float().cpu() for some in pixels.split(TOGETHER)
            ]
        return torch.cat(parts)

    def prepare(self, pixels: torch.Tensor) -> None:
        """Take the pixels of the blocks to come, and a few forwards with them."""
        self.pixels = self.loaded.prepare(pixels)
        with self.loaded.inference() as model:
            latency.time_device(self.loaded, model, self.pixels, WARM_UP)

    def block(self, batch_size: int, forwards: int) -> list[float]:
        """Milliseconds of some forwards in a row, after one that is not counted: another model had the caches."""
        with self.loaded.inference() as model:
            return latency.time_device(self.loaded, model, self.pixels, 1 + forwards)[1:]

    def found(self) -> dict[str, object]:
        """What a record keeps of the model; after the turns, as an engine may fall back in them."""
        sizes = {"resident_bytes": self.loaded.resident_bytes, "scratch_bytes": self.loaded.scratch_bytes}
        return self.loaded.engine.as_record() | sizes


def measure_waterfall(study: Study, on: torch.device) -> dict:
    """Load every step, compare their answers, and let them take turns at each batch size of ``study.waterfall``.

    Returns:
        ladders: {ladder: [step as a mapping, with its name]}; steps: {step: what ``Held.found`` gives, and by image
        kl_by_image and first_class}; blocks_ms: {batch size: {step: [rounds][forwards] milliseconds}}; failed: {batch size:
        {step: reason}}; images; checkpoint_sha256.

    Raises:
        UserError: a checkpoint is missing, or no step at all can run here.
    """
    steps = {step.name: step for ladder in LADDERS.values() for step in ladder}
    held, failed = {}, {}
    for name, step in steps.items():
        try:
            held[name] = TimedModel(study, step, on)
        except VariantError as error:
            failed[name] = one_line(error)
    if not held:
        raise UserError(f"no step of the waterfall can run here: {failed[FIRST.name]}")
    split, processor = load_split(study, "valid"), next(iter(held.values())).loaded.processor
    pixels, answers = dataset.first_batch(split, processor, min(IMAGES, len(split))), {}
    for name, one in list(held.items()):
        try:
            answers[name] = one.ask("logits", pixels=pixels)
        except VariantError as error:
            failed[name] = one_line(error)
            del held[name]
    print(f"{len(held)} of {len(steps)} steps answered {len(pixels)} images", flush=True)
    blocks, failed_at = {}, {}
    for size in study.waterfall:
        ready, here = dict(held), failed_at.setdefault(str(size), dict(failed))
        pixels = dataset.first_batch(split, processor, size)
        for name, one in held.items():
            try:
                one.ask("prepare", pixels=pixels)
            except VariantError as error:
                here[name] = one_line(error)
                del ready[name]
        blocks[str(size)] = comparison.time_interleaved(
            {name: [one] for name, one in ready.items()}, size, study.compare, study.seed, here
        )
        rounds = len(next(iter(blocks[str(size)].values()), []))
        print(f"batch {size}: {len(blocks[str(size)])} steps in turns, {rounds} rounds", flush=True)
    found = {name: one.found() for name, one in held.items()}
    for name in found:
        found[name]["first_class"] = answers[name].argmax(-1).tolist()
        if FIRST.name in answers:
            found[name]["kl_by_image"] = accuracy.round_significant(accuracy.kl_divergence(answers[FIRST.name], answers[name]))
    used = sorted({variants.parse(step.variant).checkpoint for step in steps.values()})
    return {
        "ladders": {ladder: [asdict(step) | {"name": step.name} for step in several] for ladder, several in LADDERS.items()},
        "steps": found, "blocks_ms": blocks, "failed": failed_at, "images": min(IMAGES, len(split)),
        "checkpoint_sha256": {name: checkpoints.fingerprint(study.checkpoint(name)) for name in used},
    }  # fmt: skip


def run_waterfall(study: Study, device: str | None = None) -> Path:
    """Measure a study's waterfall; write ``records/waterfall.json`` and ``waterfall.csv``, whose path is returned.

    Raises UserError for a study without one, and as ``measure`` does.
    """
    if not study.waterfall:
        raise UserError(f"study '{study.name}' has no waterfall: give it batch sizes, such as 'waterfall: [1, 32]'")
    started = begin("waterfall", study.typed, batch_sizes=study.waterfall, device=device)
    record = started.save(**measure_waterfall(study, devices.select_device(device)))
    path = study.outputs / "waterfall.csv"
    write_file(path, waterfall.waterfall_table(record).to_csv(index=False, lineterminator="\n"))
    return path
