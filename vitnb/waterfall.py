"""The waterfall: from fp32 down, one technique after the other: what each gains, and what it costs in accuracy and memory.

The models of all steps (see ``ladders``) stand in one process and are asked in turn, so a gain is a ratio of times from the
same rounds. A step that loses, or cannot run here, keeps its row.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from vitnb import accuracy, checkpoints, compare, data, intervals, latency, models, records, studies, turns, variants
from vitnb.errors import UserError, VariantError, one_line
from vitnb.ladders import FIRST, LADDERS, Step

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


class Held:
    """A step's model, ready in this process; ``turns.take`` asks it as it asks a worker."""

    def __init__(self, study: studies.Study, step: Step, on: torch.device):
        techniques = None if step.techniques is None else frozenset(step.techniques)
        with _failing_alone():
            self.loaded = models.load(study, variants.get(step.variant), on=on, techniques=techniques)

    def ask(self, name: str, **options):
        """Call the method ``name``; any failure is a VariantError."""
        with _failing_alone():
            return getattr(self, name)(**options)

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels, float32 [images, 3, height, width], to logits, float32 [images, classes] on the CPU."""
        with self.loaded.running() as model:
            parts = [
                model(pixel_values=self.loaded.to_input(some)).logits.float().cpu() for some in pixels.split(TOGETHER)
            ]
        return torch.cat(parts)

    def prepare(self, pixels: torch.Tensor) -> None:
        """Take the pixels of the blocks to come, and a few forwards with them."""
        self.pixels = self.loaded.to_input(pixels)
        with self.loaded.running() as model:
            latency.on_device(self.loaded, model, self.pixels, WARM_UP)

    def block(self, batch_size: int, forwards: int) -> list[float]:
        """Milliseconds of some forwards in a row, after one that is not counted: another model had the caches."""
        with self.loaded.running() as model:
            return latency.on_device(self.loaded, model, self.pixels, 1 + forwards)[1:]

    def found(self) -> dict[str, object]:
        """What a record keeps of the model; after the turns, as an engine may fall back in them."""
        sizes = {"resident_bytes": self.loaded.resident_bytes, "scratch_bytes": self.loaded.scratch_bytes}
        return self.loaded.engine.found() | sizes


def measure(study: studies.Study, on: torch.device) -> dict:
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
            held[name] = Held(study, step, on)
        except VariantError as error:
            failed[name] = one_line(error)
    if not held:
        raise UserError(f"no step of the waterfall can run here: {failed[FIRST.name]}")
    split, processor = data.split(study, "valid"), next(iter(held.values())).loaded.processor
    pixels, answers = data.first_batch(split, processor, min(IMAGES, len(split))), {}
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
        pixels = data.first_batch(split, processor, size)
        for name, one in held.items():
            try:
                one.ask("prepare", pixels=pixels)
            except VariantError as error:
                here[name] = one_line(error)
                del ready[name]
        blocks[str(size)] = turns.take(
            {name: [one] for name, one in ready.items()}, size, study.compare, study.seed, here
        )
        rounds = len(next(iter(blocks[str(size)].values()), []))
        print(f"batch {size}: {len(blocks[str(size)])} steps in turns, {rounds} rounds", flush=True)
    found = {name: one.found() for name, one in held.items()}
    for name in found:
        found[name]["first_class"] = answers[name].argmax(-1).tolist()
        if FIRST.name in answers:
            found[name]["kl_by_image"] = accuracy.six_digits(accuracy.kl(answers[FIRST.name], answers[name]))
    used = sorted({variants.get(step.variant).checkpoint for step in steps.values()})
    return {
        "ladders": {ladder: [asdict(step) | {"name": step.name} for step in several] for ladder, several in LADDERS.items()},
        "steps": found, "blocks_ms": blocks, "failed": failed_at, "images": min(IMAGES, len(split)),
        "checkpoint_sha256": {name: checkpoints.fingerprint(study.checkpoint(name)) for name in used},
    }  # fmt: skip


def run(study: studies.Study, device: str | None = None) -> Path:
    """Measure a study's waterfall; write ``records/waterfall.json`` and ``waterfall.csv``, whose path is returned.

    Raises UserError for a study without one, and as ``measure`` does.
    """
    if not study.waterfall:
        raise UserError(f"study '{study.name}' has no waterfall: give it batch sizes, such as 'waterfall: [1, 32]'")
    started = records.start("waterfall", study.typed, batch_sizes=study.waterfall, device=device)
    record = started.save(**measure(study, models.device(device)))
    path = study.outputs / "waterfall.csv"
    records.write_whole(path, table(record).to_csv(index=False, lineterminator="\n"))
    return path


GAIN, TOTAL, KL = (
    ("gain", "gain_low", "gain_high"),
    ("total_gain", "total_low", "total_high"),
    ("kl", "kl_low", "kl_high"),
)
COLUMNS = [
    "ladder", "step", "variant", "techniques", "batch_size", "p50_ms", *GAIN, "over", *TOTAL, *KL, "changed",
    "resident_mb", "scratch_mb", "engine_ran", "reason",
]  # fmt: skip


def _gain(before: list[list[float]], after: list[list[float]], names: tuple[str, str, str]) -> dict[str, float]:
    found = compare.pair(before, after)
    return dict(zip(names, (found.ratio, found.low, found.high), strict=True))


def _costs(found: dict, baseline: dict) -> dict[str, object]:
    """What a step costs at any batch size: accuracy against the baseline, memory; and which engine ran."""
    row = {"resident_mb": found["resident_bytes"] / 2**20, "scratch_mb": found["scratch_bytes"] / 2**20}
    row |= {"engine_ran": found["engine_ran"], "reason": found["engine_reason"]}
    if "kl_by_image" in found:
        row |= dict(zip(KL, intervals.mean(found["kl_by_image"]), strict=True))
        row["changed"] = float(np.mean(np.not_equal(found["first_class"], baseline["first_class"])))
    return row


def judged(row) -> str:
    """A row's gain in a word: ``faster``, ``slower``, ``no difference``; nothing where there is nothing to compare with."""
    if row.gain != row.gain:
        return ""
    if not intervals.differ(row.gain_low, row.gain_high):
        return "no difference"
    return "faster" if row.gain > 1 else "slower"


def table(record: dict) -> pd.DataFrame:
    """A row for every step of every ladder at every batch size, those that failed included, from the record alone.

    ``gain``: the time of the last step before that ran, ``over``, divided by this one's, with its interval at
    intervals.PAIR_LEVEL; ``total_gain``: the same of the ladder's first step. ``kl``: mean divergence in nats from the
    baseline's answers, with its 95% interval; ``changed``: share of images with another first class, 0 to 1.
    """
    rows, baseline = [], record["steps"].get(FIRST.name, {})
    for ladder, steps in record["ladders"].items():
        for size, blocks in record["blocks_ms"].items():
            before = None
            for step in steps:
                name = step["name"]
                row = {"ladder": ladder, "step": step["technique"], "variant": step["variant"], "batch_size": int(size)}
                row["techniques"] = ", ".join(step["techniques"] or [])
                row |= _costs(record["steps"][name], baseline) if name in record["steps"] else {}
                if name in blocks:
                    row["p50_ms"] = float(np.median(np.concatenate(blocks[name])))
                    if before:
                        row |= _gain(blocks[before], blocks[name], GAIN) | {"over": before}
                    if steps[0]["name"] in blocks:
                        row |= _gain(blocks[steps[0]["name"]], blocks[name], TOTAL)
                    before = name
                else:
                    row["reason"] = record["failed"][size].get(name, "")
                rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)
