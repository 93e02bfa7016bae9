"""Measure accuracy: logits and predictions of a variant, and how two variants differ.

Scores, intervals and paired tests follow in ``analysis.accuracy``.
"""

import numpy as np
import torch

from vitnb import variants
from vitnb.analysis import provenance
from vitnb.data import dataset
from vitnb.data.splits import Split
from vitnb.errors import UserError
from vitnb.models.engines import check_finite
from vitnb.models.loader import LoadedVariant
from vitnb.records.identity import Identity
from vitnb.records.reader import load_array, load_records
from vitnb.study import Study

BATCH_SIZE = 64


def compute_logits(
    loaded: LoadedVariant, split: Split, batch_size: int = BATCH_SIZE
) -> torch.Tensor:
    """Return the logits of every image, float32 [images, classes], in split order.

    Raises VariantError if logits are not finite.
    """
    pixels_of_split = dataset.PixelDataset(split, loaded.processor)
    logits = []
    # Images are read outside of the block: one that cannot be read fails no variant.
    for pixels, _ in dataset.make_batches(pixels_of_split, batch_size):
        with loaded.inference() as model:
            output = model(pixel_values=loaded.prepare(pixels))
            logits.append(output.logits.float().cpu())
    return check_finite(torch.cat(logits))


def predict(loaded: LoadedVariant, split: Split) -> tuple[dict[str, list], np.ndarray]:
    """Predict the classes of every image of a split.

    Returns:
        {labels, top5}: the true class and the five likeliest classes of each image;
        and the logits, float32 [images, classes].

    Raises:
        UserError: the split has no labels, or other classes than the checkpoint.
    """
    if not split.labels:
        raise UserError(
            f"the images of {split.folder} have no labels: "
            "take those of splits.evaluation_split(study)"
        )
    if split.class_names != loaded.class_names:
        raise UserError(
            f"the checkpoint's classes are not those of {split.root}: "
            "run finetune on this data first"
        )
    logits = compute_logits(loaded, split)
    count = min(5, logits.shape[1])
    top5 = logits.softmax(-1).topk(count).indices.tolist()
    return {"labels": split.labels, "top5": top5}, logits.numpy()


def kl_divergence(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return each image's KL divergence from the reference in nats.

    Args:
        reference: logits [images, classes].
        other: logits [images, classes].

    Returns:
        Divergences, float64 [images].
    """
    p = reference.double().log_softmax(-1)
    q = other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def round_significant(values: torch.Tensor) -> list[float]:
    """Round values to six significant digits, as records store them."""
    return [float(f"{value:.6g}") for value in values.tolist()]


def load_logits(study: Study, identity: Identity) -> dict[str, torch.Tensor]:
    """Load the logits that evaluate has stored, {variant: float32 [images, classes]}.

    Logits of other checkpoints, images or devices than those of ``identity`` are left
    out. So are runs with a batch size of their own, arrays that their records do not
    know, and logits of older records that are not finite.
    """
    records = load_records(study)
    outdated = provenance.outdated_reasons(records)
    logits = {}
    for record in records:
        own_size = record["asked"].get("batch_size")
        if record["notebook"] != "evaluate" or record["status"] != "ok" or own_size:
            continue
        if record["name"] in outdated or not _is_of(record, identity):
            continue
        array = load_array(study.outputs, record, record["logits"])
        if array is not None:
            logits[record["asked"]["variant"]] = torch.from_numpy(array)
    return logits


def _is_of(record: dict, identity: Identity) -> bool:
    """Tell whether a record's answers are of an identity's models and device."""
    measured = record["identity"]
    same_models = all(
        identity.checkpoints.get(name, sums) == sums
        for name, sums in measured["checkpoints"].items()
    )
    return same_models and measured["device"] == identity.device


def kl_to_baseline(logits: dict[str, torch.Tensor]) -> dict[str, dict]:
    """Return every variant's divergence from the baseline, {variant: {kl_by_image}}.

    Args:
        logits: {variant: [images, classes]}. Without the baseline the result is empty.
    """
    if variants.BASELINE not in logits:
        return {}
    reference = logits[variants.BASELINE]
    return {
        name: {"kl_by_image": round_significant(kl_divergence(reference, other))}
        for name, other in logits.items()
    }


def engine_agreement(logits: dict[str, torch.Tensor]) -> list[dict]:
    """Compare the logits of each engine with those of the eager engine.

    Args:
        logits: {variant: [images, classes]}.

    Returns:
        A row for each variant with another engine, see ``_compare_engines``.
    """
    rows = []
    for name in variants.sort_names(logits):
        variant = variants.parse(name)
        eager = f"{variant.weights}-{variant.attention}"
        if name != eager and eager in logits:
            row = _compare_engines(logits[eager].double(), logits[name].double())
            if variant.weights == "fp32":
                row["spacing"] = 0.0
            rows.append({"a": eager, "b": name} | row)
    return rows


def _compare_engines(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    """Compare two engines' logits, float64 [images, classes].

    Returns:
        images: how many.
        largest: the largest absolute difference of a logit.
        spacing: the distance of two neighbouring 16-bit numbers at the largest logit.
            No two computations in 16 bits can agree better.
        changed: images with another first class.
        gap: among these images, the largest lead of a's first class over b's; else 0.
    """
    first, other = a.argmax(-1, keepdim=True), b.argmax(-1, keepdim=True)
    lead = (a.gather(-1, first) - a.gather(-1, other))[first != other]
    largest = a.abs().max().to(torch.bfloat16)
    above = torch.nextafter(largest, torch.full_like(largest, torch.inf))
    return {
        "images": len(a),
        "largest": (a - b).abs().max().item(),
        "spacing": (above - largest).item(),
        "changed": len(lead),
        "gap": lead.max().item() if len(lead) else 0.0,
    }
