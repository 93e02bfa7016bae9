"""Scores against scikit-learn's own."""

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, top_k_accuracy_score

from vitnb import variants
from vitnb.analysis import accuracy
from vitnb.data import dataset
from vitnb.data.images import read_image
from vitnb.data.splits import load_split
from vitnb.errors import VariantError
from vitnb.inference import top_k
from vitnb.measure.accuracy import compute_logits, engine_agreement, predict
from vitnb.models import loader


def test_scores_are_scikit_learns():
    random = np.random.RandomState(0)
    logits, labels = torch.from_numpy(random.randn(300, 12)), random.randint(0, 12, 300)
    probabilities, top5 = top_k(logits)
    scores = accuracy.scores({"labels": labels.tolist(), "top5": top5.tolist()})
    assert scores["images"] == 300
    assert scores["top1"] == (logits.argmax(1).numpy() == labels).mean()
    assert scores["top5"] == top_k_accuracy_score(
        labels, logits.numpy(), k=5, labels=range(12)
    )
    assert scores["f1"] == f1_score(labels, logits.argmax(1), average="weighted")
    torch.testing.assert_close(
        probabilities,
        torch.exp(logits - logits.logsumexp(1, keepdim=True)).sort(1, descending=True)[
            0
        ][:, :5],
    )


def test_fewer_than_five_classes():
    assert top_k(torch.randn(7, 3))[1].shape == (7, 3)


def test_predictions_are_those_of_plain_transformers(mini):
    """The checkpoint without this package's batching, attention and preprocessing."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    loaded, test = (
        loader.load_variant(mini, variants.parse("fp32-sdpa")),
        load_split(mini, "test"),
    )
    found, logits = predict(loaded, test)
    folder = mini.checkpoint("merged")
    model, processor = (
        AutoModelForImageClassification.from_pretrained(folder).eval(),
        AutoImageProcessor.from_pretrained(folder),
    )
    with torch.inference_mode():
        plain = torch.cat(
            [
                model(**processor(read_image(path), return_tensors="pt")).logits
                for path in test.paths
            ]
        )
    # Sums in another order; on a GPU, of another device as well.
    torch.testing.assert_close(
        compute_logits(loaded, test, batch_size=5), plain, atol=1e-3, rtol=1e-3
    )
    torch.testing.assert_close(torch.from_numpy(logits), plain, atol=1e-3, rtol=1e-3)
    assert [row[0] for row in found["top5"]] == plain.argmax(1).tolist()
    assert [model.config.id2label[label] for label in found["labels"]] == [
        path.parent.name for path in test.paths
    ]


def test_logits_that_are_not_finite_are_no_predictions(mini):
    """One image of the last batch is NaN, and one of the first is infinite."""
    loaded = loader.load_variant(mini, variants.parse("fp32-sdpa"))
    test = load_split(mini, "test")
    seen = []

    def break_two(module, inputs, output):
        seen.append(len(output.logits))
        if len(seen) == 1:
            output.logits[0, 1] = float("inf")
        if sum(seen) == len(test):
            output.logits[-1] = float("nan")

    loaded.model.register_forward_hook(break_two)
    told = f"the logits of 2 of {len(test)} images are not finite"
    with pytest.raises(VariantError, match=told):
        compute_logits(loaded, test, batch_size=5)
    loaded.model._forward_hooks.clear()
    assert compute_logits(loaded, test, batch_size=5).isfinite().all()


def test_an_image_that_cannot_be_read_fails_no_variant(mini, monkeypatch):
    def refuse(path):
        raise OSError("the disk is gone")

    monkeypatch.setattr(dataset, "read_image", refuse)
    loaded = loader.load_variant(mini, variants.parse("fp32-sdpa"))
    with pytest.raises(OSError, match="the disk is gone"):
        compute_logits(loaded, load_split(mini, "test"))


def test_confusion_counts_every_image_once():
    counts = accuracy.confusion_counts(
        {"labels": [0, 1, 2, 2], "top5": [[0], [2], [2], [1]]}, 4
    )
    assert counts.tolist() == [[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]


def record(variant: str, top5: list, labels=(0, 1, 2, 3)) -> dict:
    predictions = {"labels": list(labels) * 25, "top5": top5}
    return {"asked": {"variant": variant}, "status": "ok", "predictions": predictions}


def answers(wrong: int) -> list:
    """Return predictions for 100 images of four classes.

    The first ``wrong`` have the right class second.
    """
    return [[(i + (i < wrong)) % 4, i % 4] for i in range(100)]


def test_variants_are_compared_on_the_same_images():
    """nf4 loses 12 of 100 images, int8 loses 1: only nf4 is called worse."""
    random = np.random.default_rng(0)
    near, far = random.exponential(0.001, 100), random.exponential(0.1, 100)
    kl = {
        "fp32-sdpa": near * 0,
        "bf16-sdpa": near,
        "nf4-sdpa": far,
        "int8-sdpa": near[::-1],
    }
    compared = {name: {"kl_by_image": values.tolist()} for name, values in kl.items()}
    wrong = {"int8-sdpa": 1, "nf4-sdpa": 12, "bf16-sdpa": 0, "fp32-sdpa": 0}
    records = [record(name, answers(count)) for name, count in wrong.items()]
    table = accuracy.paired_comparison(records, {"answers": compared}).set_index(
        "variant"
    )
    assert list(table.index) == ["fp32-sdpa", "bf16-sdpa", "nf4-sdpa", "int8-sdpa"]
    nf4 = table.loc["nf4-sdpa"]
    assert (nf4.only_baseline_right, nf4.only_variant_right, nf4.points) == (12, 0, -12)
    assert nf4.p == 2 * 0.5**12 and nf4.p_corrected == 3 * nf4.p
    assert nf4.points_low < -12 < nf4.points_high < 0 == nf4.top5_points
    assert nf4.verdict == "worse than fp32-sdpa: -12.0 points"
    assert table.loc["int8-sdpa"].verdict == "too few images differ to tell (1)"
    assert table.loc["fp32-sdpa"].verdict == "the baseline"
    assert nf4.kl_low < far.mean() == nf4.kl < nf4.kl_high
    assert (
        nf4.kl_control_p_corrected
        < 0.01
        < table.loc["int8-sdpa"].kl_control_p_corrected
    )
    assert np.isnan(table.loc["bf16-sdpa"].kl_control_p_corrected)


def test_many_comparisons_make_the_same_difference_mean_less():
    """7 of 100 images lost: p = 0.016 alone, beyond 0.05 beside five others."""
    names = ["bf16-sdpa", "nf4-sdpa", "nf4-fa2", "int8-sdpa", "int8-fa2", "fp32-math"]
    few = accuracy.paired_comparison(
        [record("fp32-sdpa", answers(0)), record("nf4-sdpa", answers(7))], None
    )
    many = accuracy.paired_comparison(
        [
            record("fp32-sdpa", answers(0)),
            *(record(name, answers(7)) for name in names),
        ],
        None,
    )
    assert few.set_index("variant").verdict["nf4-sdpa"].startswith("worse")
    assert set(many.set_index("variant").verdict[names]) == {
        "too few images differ to tell (7)"
    }


def mixed_answers(lost: int, won: int) -> list:
    """Return predictions for 100 images beside ``answers(20)``.

    Of the 20 images that it gets wrong, ``won`` are right; ``lost`` others are wrong.
    """
    right = [won > i if i < 20 else i >= 20 + lost for i in range(100)]
    return [[(i + (not ok)) % 4, i % 4] for i, ok in enumerate(right)]


def test_no_finding_where_no_outcome_could_be_one():
    """Two variants: 5 images that differ prove nothing, however they are split.

    With 12 that are split 7 to 5 a test was possible, and found nothing.
    """
    records = [
        record("fp32-sdpa", answers(20)),
        record("nf4-sdpa", mixed_answers(7, 5)),
        record("int8-sdpa", mixed_answers(3, 2)),
        record("fp32-math", answers(20)),
    ]
    table = accuracy.paired_comparison(records, None).set_index("variant")
    counts = table.loc["nf4-sdpa"][["only_baseline_right", "only_variant_right"]]
    assert counts.tolist() == [7, 5]
    assert table.verdict.to_dict() == {
        "fp32-sdpa": "the baseline",
        "nf4-sdpa": "no difference beyond noise",
        "int8-sdpa": "too few images differ to tell (5)",
        "fp32-math": "too few images differ to tell (0)",
    }
    same = table.loc["fp32-math"]
    assert same.points == 0 and same.points_low < -2 and same.points_high > 2


def test_without_a_baseline_nothing_is_compared():
    assert accuracy.paired_comparison([record("nf4-sdpa", answers(3))], None).empty


def test_engines_of_one_variant_beside_each_other():
    """Made by hand: logits up to 6 lie 1/32 apart in bfloat16.

    Two images change their first class, one of them a tie.
    """
    eager = torch.tensor([[6.0, 0.0], [1.0, 0.75], [0.5, 0.5], [0.0, 3.0]])
    fused = torch.tensor([[5.875, 0.0], [0.75, 0.8], [0.5, 0.625], [0.0, 3.0]])
    found = {
        "bf16-sdpa": eager,
        "bf16-sdpa-fused": fused,
        "nf4-sdpa-fused": fused,
        "fp32-sdpa": eager,
    }
    (row,) = engine_agreement(found)
    assert (row["a"], row["b"], row["images"]) == ("bf16-sdpa", "bf16-sdpa-fused", 4)
    assert (row["largest"], row["spacing"], row["changed"], row["gap"]) == (
        0.25,
        1 / 32,
        2,
        0.25,
    )
    assert engine_agreement({"fp32-sdpa": eager, "fp32-sdpa-graph": eager})[0] == {
        "a": "fp32-sdpa",
        "b": "fp32-sdpa-graph",
        "images": 4,
        "largest": 0.0,
        "spacing": 0.0,
        "changed": 0,
        "gap": 0.0,
    }


def test_the_worst_classes_come_first_with_what_they_are_taken_for():
    """Class 0 is never wrong; class 2 is wrong twice, always taken for class 0."""
    predictions = {
        "labels": [0, 0, 1, 1, 1, 1, 2, 2],
        "top5": [[0], [0], [1], [1], [0], [2], [0], [0]],
    }
    table = accuracy.worst_classes(predictions, ["rose", "tulip", "daisy"])
    rows = [tuple(row) for row in table.itertuples(index=False)]
    assert rows == [
        ("daisy", 2, 0, 0.0, "rose (2)"),
        ("tulip", 4, 2, 0.5, "rose (1), daisy (1)"),
    ]
    assert list(accuracy.worst_classes(predictions, count=1)["class"]) == ["class 2"]
