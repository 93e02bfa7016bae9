"""The anatomy lesson: every right number against an oracle or a bound.

Every wrong number is checked against the error that it shows.
"""

import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from vitnb import anatomy, devices, statistics
from vitnb.anatomy import answers, choices, clocks, conduct, figures, sizes, traces
from vitnb.anatomy import case as anatomy_case
from vitnb.anatomy.bench import Bench
from vitnb.anatomy.case import Case, lines, styled
from vitnb.models import layers
from vitnb.records.files import MB


@pytest.fixture(scope="module")
def bench() -> Bench:
    """Return a bench of the embedded study: two test images a class, short timings."""
    return Bench.of("embedded", test_images=204, seconds=0.1)


def test_the_fitted_model_is_scikit_learns(bench):
    """The network, with the scaling in its head, answers as scikit-learn's pipeline."""
    oracle = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    oracle.fit(bench.features["train"], bench.train.labels)
    probabilities = bench.logits(bench.test.pixels).softmax(-1).numpy()
    np.testing.assert_allclose(
        probabilities, oracle.predict_proba(bench.features["test"]), atol=1e-3
    )
    assert np.bincount(bench.test.labels).tolist() == [2] * 102


def test_1_another_preprocessing(bench):
    case = answers.preprocessing(bench)
    image = (
        np.asarray(bench.test.images[0], dtype=np.float64) / 255
    )  # 64 px already: no resize
    mean, std = (
        np.array(answers.IMAGENET[name]) for name in ("image_mean", "image_std")
    )
    for name, wanted in (
        ("another mean and std", (image - mean) / std),
        ("the checkpoint's own", image * 2 - 1),
    ):
        np.testing.assert_allclose(
            case.extra["seen"][name].permute(1, 2, 0), wanted, atol=1e-5
        )
    assert answers.center_crop(bench.test.images[0], 64).size == (64, 64)
    assert case.right > 0.88 and case.wrong < case.right - 0.2
    assert case.wrong < case.extra["by part"]["another crop"] <= case.right


def test_2_a_head_that_was_never_trained(bench):
    case = answers.frozen_head(bench)
    assert case.extra["head weights trained"] == {
        "head frozen": 0,
        "head trained": 102 * (128 + 1),
    }
    assert case.right > 0.85 and 0.3 < case.wrong < case.right - 0.05
    curve = case.extra["curves"]["head frozen"]
    assert curve[-1] == max(curve) and curve[0] < 0.5, (
        "it is still climbing, and that is what makes it hard to see"
    )


def test_3_loading_that_forgives(bench):
    case = answers.loose_loading(bench)
    head = bench.model.classifier
    golden = (
        bench.features["test"][0] @ head.weight[0].detach().cpu().double().numpy()
        + head.bias[0].item()
    )
    assert case.extra["golden logit"]["strict"] == pytest.approx(golden, abs=1e-3)
    assert abs(case.extra["golden logit"]["loose"] - golden) > 0.5
    assert case.right == bench.top1(bench.test.pixels) and case.wrong < 0.05
    blocks = sum(p.numel() for p in bench.model.vit.layers.parameters())
    assert case.extra["left random"] == pytest.approx(
        blocks / sum(p.numel() for p in bench.model.parameters())
    )
    assert (
        case.extra["missing keys"] == 12 * 16
        and "Error(s) in loading" in case.extra["refused"]
    )


def test_4_the_time_of_another_model(bench):
    case = clocks.another_model(bench)
    assert case.wrong > 0 and case.right > 0
    assert (
        case.extra["top1"]["another model"]
        < 0.1
        < 0.8
        < case.extra["top1"]["the 4-bit model"]
    )


def test_5_two_factors_changed(bench):
    case = clocks.two_factors(bench)
    full, half, flash = case.extra["ms"].values()
    assert (case.wrong, case.right) == (
        full / flash,
        half / flash,
    ) and case.wrong != case.right


@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="which kernel sdpa chooses on a GPU depends on the GPU",
)
def test_6_the_same_kernel_under_two_names(bench):
    case = clocks.same_kernel(bench)
    assert case.extra["ran"] == {
        "sdpa": "flash-cpu",
        "torch-flash": "flash-cpu",
        "math": "math",
    }
    assert case.right == case.extra["ms"]["math"] / case.extra["ms"]["torch-flash"]


def test_7_a_size_by_division(bench):
    """Sizes equal a closed form.

    It has half a byte for each weight, a byte for 64 of them and 4 for 256 of those,
    two code books for each Linear (16 and 256 numbers), and 16 bits for all else. Once
    loaded, all else is in the compute type.
    """
    case = sizes.divided(bench)
    files = {
        name: sum(f.stat().st_size for f in folder.iterdir())
        for name, folder in bench.exports.items()
    }
    assert case.wrong == pytest.approx(files["fp32"] / 4 / MB)
    assert case.right == pytest.approx(files["nf4"] / MB)
    linears = layers.linears(bench.model).values()
    weights = sum(linear.weight.numel() for linear in linears)
    weights -= bench.model.classifier.weight.numel()
    others = sum(p.numel() for p in bench.model.parameters()) - weights
    nf4 = weights / 2 + weights / 64 + weights / 64 / 256 * 4 + 72 * (16 + 256) * 4
    on_disk = nf4 + others * 2
    assert 1 < files["nf4"] / on_disk < 1.1, "names and configuration come on top"
    assert files["fp32"] / 8 < files["nf4"] < files["fp32"] / 4
    resident = nf4 + others * devices.compute_dtype(bench.device).itemsize
    assert case.extra["mb"]["nf4"]["resident"] == pytest.approx(
        resident / MB, rel=0.005
    )
    stored = load_file(bench.exports["nf4"] / "model.safetensors")
    assert (
        sum(
            tensor.dtype == torch.uint8 and name.endswith("weight")
            for name, tensor in stored.items()
        )
        == 72
    )


def test_8_means_summed_as_totals(bench):
    case = traces.means_for_totals(bench)
    calls = {row.name: row.calls for row in case.extra["rows"]}
    if bench.device.type == "cpu":
        assert calls["aten::linear"] == len(layers.linears(bench.model))
        assert calls["aten::scaled_dot_product_attention"] == 12
    assert case.wrong < case.right / 3, (
        "most operators run once or more in each of 12 blocks"
    )


def test_9_attention_found_by_its_name(bench):
    case = traces.by_name(bench)
    assert case.wrong == 0 and case.right > 0
    assert (
        bench.device.type == "cuda"
        or "aten::scaled_dot_product_attention" in case.extra["names"]
    )


def test_10_a_peak_that_holds_the_variant_before(bench):
    case = sizes.crowded(bench)
    files = {
        name: (folder / "model.safetensors").stat().st_size / MB
        for name, folder in bench.exports.items()
    }
    assert case.right == pytest.approx(files["nf4"], abs=0.1)
    assert case.wrong == pytest.approx(files["nf4"] + files["fp32"], abs=0.1)


def test_11_a_percentile_without_samples(bench):
    """The range is that of the standard error of an exponential quantile.

    The standard error is sqrt(p (1 - p) / n) / density.
    """
    samples = np.random.default_rng(0).exponential(size=200_000)
    wide, narrow = (clocks.p99_range(samples, count, seed=1)[1] for count in (50, 1000))
    assert narrow == pytest.approx(
        2 * 1.96 * math.sqrt(0.99 * 0.01 / 1000) / 0.01, rel=0.15
    )
    assert wide > 2.5 * narrow
    case = clocks.early_percentile(bench)
    assert (
        case.wrong > 0
        and case.right > 0
        and all(len(found) == 1000 for found in case.extra["p99"].values())
    )


def test_12_an_index_is_not_a_name(bench):
    case = answers.folder_numbers(bench)
    assert (case.wrong, case.right) == (10, 102)
    agree = [i for i in range(102) if case.extra["told"][i] == case.extra["meant"][i]]
    assert agree == list(range(70, 80)), (
        "the only ten numbers that stand in their own place among sorted words"
    )
    assert sorted(case.extra["meant"]) == sorted(bench.class_names)


def test_13_judged_by_the_images_that_chose_it(bench):
    case = choices.chosen_on(bench)
    assert 0.8 < case.right < case.wrong - 0.015
    alone = choices.chosen_on(bench, heads=1)
    assert alone.wrong == pytest.approx(alone.right, abs=0.006), (
        "nothing was chosen, so nothing is optimistic"
    )


def test_14_the_best_of_layers_that_are_all_alike(bench):
    case = choices.best_layer(bench)
    assert case.wrong > 1.5 and abs(case.right) < 0.8
    assert (
        case.extra["found by the paired test"] <= 0.1
        and 0.005 < case.extra["changed"] < 0.1
    )
    assert len(case.extra["few"]) == 24 and sum(case.extra["images"]) == 1020 + 204


def test_the_paired_test_finds_a_layer_that_is_better():
    truly = np.random.default_rng(0).random(1000) < 0.9
    better = truly.copy()
    better[np.flatnonzero(~truly)[:12]] = True
    assert statistics.mcnemar(truly, better)[2] < 0.01


def test_15_the_head_was_quantized_too(bench):
    case = conduct.head_too(bench)
    linears = sum(isinstance(module, nn.Linear) for module in bench.model.modules())
    assert (case.wrong, case.right) == (linears, linears - 1) == (73, 72)
    assert "73 Linears are quantized" in case.extra["refused"]


def test_16_an_option_that_changes_nothing(bench):
    case = conduct.nothing_kept(bench)
    assert (case.wrong, case.right) == (
        0,
        sum(isinstance(m, nn.Linear) for m in bench.model.vit.layers[0].modules()),
    )
    assert "changes nothing" in case.extra["refused"]


def test_17_an_error_swallowed(bench):
    case = conduct.swallowed(bench)
    assert (case.wrong, case.right) == (1, 0)
    careless, careful = case.extra["careless"], case.extra["careful"]
    assert careless.status.tolist() == ["ok"] * 3 and careful.status.tolist() == [
        "ok",
        "ok",
        "failed",
    ]
    measured = careless.drop(columns="variant")
    assert measured.iloc[2].equals(measured.iloc[1]), (
        "the last row measured the variant before"
    )
    assert careful.kept.tolist() == [1, 7, ""] and "vit.layers.12" in careful.reason[2]


def test_18_cells_run_out_of_order(bench):
    case = conduct.out_of_order(bench)
    assert case.right == pytest.approx(bench.top1(bench.test.pixels), abs=1.5 / 204)
    assert case.wrong < case.right - 0.3


def test_19_a_file_that_runs_code(bench):
    case = conduct.pickled(bench)
    assert (case.wrong, case.right) == (1, 0)
    assert case.extra["refused"].startswith("pytorch_model.bin is a pickle")


@pytest.fixture(scope="module")
def nineteen(mini_yaml) -> list[Case]:
    """Return all cases of another study, with a base that knows nothing."""
    return anatomy.all_cases(Bench.of(str(mini_yaml), seconds=0.02))


def test_there_are_nineteen_and_any_study_will_do(nineteen):
    assert (
        [case.number for case in nineteen] == list(anatomy.CASES) == list(range(1, 20))
    )
    table = anatomy_case.table(reversed(nineteen))
    assert table.index.tolist() == list(range(1, 20)) and table.notna().all(axis=None)
    assert all(
        math.isfinite(case.wrong) and math.isfinite(case.right) for case in nineteen
    )
    assert "An index is not a name: wrong 0, right 4 classes named rightly" in lines(
        nineteen
    )
    assert all(case.lesson in styled(table).data for case in nineteen)


def test_figures_show_both_numbers(nineteen):
    by_number = {case.number: case for case in nineteen}
    axes = figures.beside(nineteen).axes
    labels = [text.get_text() for axis in axes for text in axis.texts]
    table = anatomy_case.table(nineteen)
    assert labels == [
        number for row in table.itertuples() for number in (row.wrong, row.right)
    ]
    for figure in (
        figures.seen(by_number[1]),
        figures.curves(by_number[2]),
        figures.chance(by_number[13], by_number[14]),
        figures.percentiles(by_number[11]),
        figures.operators(by_number[8]),
        figures.megabytes(by_number[7]),
    ):
        assert isinstance(figure, Figure) and figure.axes
        figure.draw_without_rendering()
