"""Accuracy: predictions of a variant on a split, the scores that follow, and how two variants answer the same images."""

import numpy as np
import torch

from vitnb import variants
from vitnb.data import dataset
from vitnb.data.splits import Split
from vitnb.errors import UserError
from vitnb.inference import top_k
from vitnb.models.loader import LoadedVariant
from vitnb.records.reader import load_records
from vitnb.study import Study

BATCH_SIZE = 64


def compute_logits(loaded: LoadedVariant, split: Split, batch_size: int = BATCH_SIZE) -> torch.Tensor:
    """Logits of every image of a split, float32 [images, classes], in the split's order."""
    found = []
    with loaded.inference() as model:
        for pixels, _ in dataset.make_batches(dataset.PixelDataset(split, loaded.processor), batch_size):
            found.append(model(pixel_values=loaded.prepare(pixels)).logits.float().cpu())
    return torch.cat(found)


def predict(loaded: LoadedVariant, split: Split) -> tuple[dict[str, list], np.ndarray]:
    """Labels and the five likeliest classes of every image, the raw material of all scores; and the logits.

    Raises UserError if the checkpoint was trained on other classes than the split's, and for a split without labels.
    """
    if not split.labels:
        raise UserError(f"the images of {split.folder} have no labels: take those of data.scored(study)")
    if split.class_names != loaded.class_names:
        raise UserError(f"the checkpoint's classes are not those of {split.root}: run finetune on this data first")
    found = compute_logits(loaded, split)
    return {"labels": split.labels, "top5": top_k(found)[1].tolist()}, found.numpy()


def kl_divergence(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL divergence of each image's answer from the reference's, in nats: logits [images, classes] x 2 -> [images]."""
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def round_significant(values: torch.Tensor) -> list[float]:
    """Numbers as a record keeps them for every image."""
    return [float(f"{value:.6g}") for value in values.tolist()]


def load_logits(study: Study) -> dict[str, torch.Tensor]:
    """The logits of every variant on the test images as evaluate kept them, float32 [images, classes]."""
    return {
        record["asked"]["variant"]: torch.from_numpy(np.load(study.outputs / record["logits"]))
        for record in load_records(study)
        if record["notebook"] == "evaluate" and record["status"] == "ok" and not record["asked"].get("batch_size")
    }


def kl_to_baseline(found: dict[str, torch.Tensor]) -> dict[str, dict]:
    """How the answers of each variant differ from the baseline's, by logits [images, classes]: {variant: {kl_by_image}}."""
    if variants.BASELINE not in found:
        return {}
    reference = found[variants.BASELINE]
    return {name: {"kl_by_image": round_significant(kl_divergence(reference, logits))} for name, logits in found.items()}


def engine_agreement(found: dict[str, torch.Tensor]) -> list[dict]:
    """Whether the engines of one variant give the same answers, by logits [images, classes]: a row for each beside eager.

    Returns:
        a, b: the eager variant and the other; images; largest: the largest absolute difference of a logit; spacing: how far
        two 16-bit numbers lie apart where the largest logits are (0 for fp32), as nothing in 16 bits can agree better;
        changed: images with another first class; gap: the largest lead of a's first class over b's among these, 0 if none.
    """
    rows = []
    for name in variants.sort_names(found):
        of = variants.parse(name)
        plain = f"{of.weights}-{of.attention}"
        if name == plain or plain not in found:
            continue
        a, b = found[plain].double(), found[name].double()
        first, other = a.argmax(-1, keepdim=True), b.argmax(-1, keepdim=True)
        lead = (a.gather(-1, first) - a.gather(-1, other))[first != other]
        largest = a.abs().max().to(torch.bfloat16)
        above = torch.nextafter(largest, torch.full_like(largest, torch.inf))
        rows.append({
            "a": plain, "b": name, "images": len(a), "largest": (a - b).abs().max().item(),
            "spacing": 0.0 if of.weights == "fp32" else (above - largest).item(),
            "changed": len(lead), "gap": lead.max().item() if len(lead) else 0.0,
        })  # fmt: skip
    return rows
