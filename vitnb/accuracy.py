"""Accuracy: predictions of a variant on a split, the scores that follow, and how two variants answer the same images."""

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import confusion_matrix, f1_score

from vitnb import data, intervals, records, studies, variants
from vitnb.errors import UserError
from vitnb.models import Loaded

BATCH_SIZE = 64


def logits(loaded: Loaded, split: data.Split, batch_size: int = BATCH_SIZE) -> torch.Tensor:
    """Logits of every image of a split, float32 [images, classes], in the split's order."""
    found = []
    with loaded.running() as model:
        for pixels, _ in data.batches(data.Pixels(split, loaded.processor), batch_size):
            found.append(model(pixel_values=loaded.to_input(pixels)).logits.float().cpu())
    return torch.cat(found)


def top(scores: torch.Tensor, k: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and class indices of the k likeliest classes, [images, k] each, likeliest first."""
    return scores.softmax(-1).topk(min(k, scores.shape[1]), dim=-1)


def predict(loaded: Loaded, split: data.Split) -> tuple[dict[str, list], np.ndarray]:
    """Labels and the five likeliest classes of every image, the raw material of all scores; and the logits.

    Raises UserError if the checkpoint was trained on other classes than the split's, and for a split without labels.
    """
    if not split.labels:
        raise UserError(f"the images of {split.folder} have no labels: take those of data.scored(study)")
    if split.class_names != loaded.class_names:
        raise UserError(f"the checkpoint's classes are not those of {split.root}: run finetune on this data first")
    found = logits(loaded, split)
    return {"labels": split.labels, "top5": top(found)[1].tolist()}, found.numpy()


def right(predictions: dict[str, list], k: int = 1) -> np.ndarray:
    """Whether the true class is among the k likeliest, bool [images]."""
    return (np.asarray(predictions["top5"])[:, :k] == np.asarray(predictions["labels"])[:, None]).any(axis=1)


def interval(predictions: dict[str, list]) -> tuple[float, float]:
    """Wilson's 95% interval of the top-1."""
    return intervals.wilson(right(predictions).sum(), len(predictions["labels"]))


def kl(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL divergence of each image's answer from the reference's, in nats: logits [images, classes] x 2 -> [images]."""
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def six_digits(values: torch.Tensor) -> list[float]:
    """Numbers as a record keeps them for every image."""
    return [float(f"{value:.6g}") for value in values.tolist()]


def scores(predictions: dict[str, list]) -> dict[str, float]:
    """Top-1, top-5 and weighted F1 (scikit-learn), each between 0 and 1."""
    labels, predicted = predictions["labels"], [row[0] for row in predictions["top5"]]
    return {
        "images": len(labels),
        "top1": float(right(predictions).mean()),
        "top5": float(right(predictions, 5).mean()),
        "f1": float(f1_score(labels, predicted, average="weighted", zero_division=0)),
    }


def confusion(predictions: dict[str, list], classes: int) -> np.ndarray:
    """Counts [classes, classes]: row the true class, column the predicted one."""
    predicted = [row[0] for row in predictions["top5"]]
    return confusion_matrix(predictions["labels"], predicted, labels=range(classes))


def kept_logits(study: studies.Study) -> dict[str, torch.Tensor]:
    """The logits of every variant on the test images as evaluate kept them, float32 [images, classes]."""
    return {
        record["asked"]["variant"]: torch.from_numpy(np.load(study.outputs / record["logits"]))
        for record in records.load(study)
        if record["notebook"] == "evaluate" and record["status"] == "ok" and not record["asked"].get("batch_size")
    }


def answers(found: dict[str, torch.Tensor]) -> dict[str, dict]:
    """How the answers of each variant differ from the baseline's, by logits [images, classes]: {variant: {kl_by_image}}."""
    if variants.BASELINE not in found:
        return {}
    reference = found[variants.BASELINE]
    return {name: {"kl_by_image": six_digits(kl(reference, logits))} for name, logits in found.items()}


def engines(found: dict[str, torch.Tensor]) -> list[dict]:
    """Whether the engines of one variant give the same answers, by logits [images, classes]: a row for each beside eager.

    Returns:
        a, b: the eager variant and the other; images; largest: the largest absolute difference of a logit; spacing: how far
        two 16-bit numbers lie apart where the largest logits are (0 for fp32), as nothing in 16 bits can agree better;
        changed: images with another first class; gap: the largest lead of a's first class over b's among these, 0 if none.
    """
    rows = []
    for name in (name for name in variants.REGISTRY if name in found):
        of = variants.get(name)
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


COMPARED = [
    "variant", "images", "top1", "low", "high", "points", "points_low", "points_high",
    "only_baseline_right", "only_variant_right", "p", "p_corrected", "top5_points", "top5_points_low", "top5_points_high",
    "kl", "kl_low", "kl_high", "kl_control_p_corrected", "verdict",
]  # fmt: skip


def compared(evaluated: list[dict], record: dict | None) -> pd.DataFrame:
    """Every variant's answers beside the baseline's on the same images: Wilson's interval, McNemar's test, KL.

    P-values are corrected for the number of variants (Holm). ``kl_control_p_corrected`` is the paired t-test that a
    variant moves the answers further than 16-bit computing alone (bf16-sdpa) does.
    """
    found = {r["asked"]["variant"]: r["predictions"] for r in evaluated if r["status"] == "ok"}
    if variants.BASELINE not in found:
        return pd.DataFrame(columns=COMPARED)
    correct = {name: right(predictions) for name, predictions in found.items()}
    moved = {name: np.asarray(a["kl_by_image"]) for name, a in (record or {}).get("answers", {}).items()}
    base, control = correct[variants.BASELINE], moved.get(variants.CONTROL)
    rows = []
    for name in (name for name in variants.REGISTRY if name in found):
        low, high = interval(found[name])
        row = {"variant": name, "images": len(base), "top1": correct[name].mean(), "low": low, "high": high}
        if name != variants.BASELINE:
            only_base, only_variant, p = intervals.mcnemar(base, correct[name])
            row |= {"only_baseline_right": only_base, "only_variant_right": only_variant, "p": p}
            for score, k in (("points", 1), ("top5_points", 5)):
                both = [right(found[which], k) for which in (name, variants.BASELINE)]
                row |= dict(zip((score, f"{score}_low", f"{score}_high"), intervals.paired_points(*both), strict=True))
            if name in moved:
                row |= dict(zip(("kl", "kl_low", "kl_high"), intervals.mean(moved[name]), strict=True))
                if control is not None and name != variants.CONTROL and variants.get(name).weights != "fp32":
                    row["kl_control_p"] = intervals.farther(moved[name], control)
        rows.append(row)
    table = pd.DataFrame(rows).reindex(columns=[*COMPARED, "kl_control_p"])
    for column, corrected in (("p", "p_corrected"), ("kl_control_p", "kl_control_p_corrected")):
        known = table[column].notna()
        table.loc[known, corrected] = intervals.holm(table.loc[known, column].tolist())
    table["verdict"] = [_verdict(row) for _, row in table.iterrows()]
    return table[COMPARED]


def _verdict(row: pd.Series) -> str:
    """In words, and never better or worse inside the noise."""
    if row.variant == variants.BASELINE:
        return "the baseline"
    if row.p_corrected < 1 - intervals.LEVEL:
        return f"{'better' if row.points > 0 else 'worse'} than {variants.BASELINE}: {row.points:+.1f} points"
    return "no difference beyond noise"
