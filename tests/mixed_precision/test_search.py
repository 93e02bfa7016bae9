"""Plans: the choice against brute force, the export against plain transformers.

The validation of a plan is checked against numbers made by hand.
"""

import json
import re
import shutil
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import killed_at
from transformers import AutoModelForImageClassification

from vitnb import cli, devices, variants
from vitnb.analysis import plan_validation
from vitnb.data import dataset
from vitnb.data.images import read_image
from vitnb.data.splits import Split, load_split
from vitnb.errors import UserError, VariantError
from vitnb.figures import mixed_precision
from vitnb.measure import accuracy
from vitnb.mixed_precision import knapsack, search, switchable
from vitnb.models import checkpoints, layers, loader, plans, quantization
from vitnb.report.page import write_report
from vitnb.study import Study, load_study


def costs(random: np.random.Generator, count: int) -> knapsack.Costs:
    names = [f"linear {i}" for i in range(count)]
    extra = {
        bits: dict(
            zip(names, random.integers(low, 3 * low, count).tolist(), strict=True)
        )
        for bits, low in ((8, 40), (16, 120))
    }
    kl = dict(zip(names, random.exponential(1.0, count).tolist(), strict=True))
    return knapsack.Costs(kl, {16: 0.0, 8: 0.1}, extra, 0.5, 10_000)


@pytest.mark.parametrize("allowed", [[16], [8, 16]])
def test_the_choice_is_the_best_there_is(allowed):
    """Try every combination of widths of seven Linears, for budgets of any size."""
    for seed, limit in product(range(4), (0, 30, 130, 400, 900, 3_000)):
        found = costs(np.random.default_rng(seed), 7)
        best = 0.0
        for widths in product([4, *allowed], repeat=7):
            kept = {
                name: bits
                for name, bits in zip(found.kl, widths, strict=True)
                if bits != 4
            }
            # Costs are rounded up to the steps of the budget, so a choice that fits by
            # less than the rounding may be missed.
            if found.bytes(kept) <= limit * (1 - 7 / knapsack.STEPS):
                best = max(
                    best, sum(found.saved(name, bits) for name, bits in kept.items())
                )
        chosen = knapsack.solve(found, allowed, limit)
        assert found.bytes(chosen) <= limit and set(chosen.values()) <= set(allowed)
        assert (
            sum(found.saved(name, bits) for name, bits in chosen.items())
            >= best - 1e-12
        )


def test_costs_add():
    found = knapsack.Costs(
        {"a": 0.2, "b": 0.1},
        {16: 0.0, 8: 0.25},
        {8: {"a": 3, "b": 4}, 16: {"a": 9, "b": 12}},
        0.01,
        100,
    )
    assert found.predicted({}) == pytest.approx(0.31) and found.predicted(
        {"a": 16}
    ) == pytest.approx(0.11)
    assert (
        found.predicted({"a": 8, "b": 16}) == pytest.approx(0.06)
        and found.bytes({"a": 8, "b": 16}) == 15
    )
    harmless = replace(found, kl={"a": 0.2, "b": -0.001})
    assert knapsack.solve(harmless, [16], 1_000) == {"a": 16}, (
        "what costs nothing is not kept"
    )


def test_the_costs_of_a_quadratic_form_add_up_to_all_of_it():
    """Each share is half of the Linear's row of the form, mixed terms included.

    No measurement of a Linear quantized alone can see the mixed terms.
    """
    form = np.random.default_rng(0).normal(size=(6, 6))
    form = (
        form @ form.T + 0.7
    )  # symmetric, with mixed terms that do not vanish on average

    def kl(quantized) -> dict:
        return {"kl": 0.01 + form[np.ix_(quantized, quantized)].sum() / 2}

    every = list(range(6))
    alone = {str(i): kl([i]) for i in every}
    kept_alone = {str(i): kl([j for j in every if j != i]) for i in every}
    measured = {
        plan_validation.NF4: kl(every),
        plan_validation.BF16: kl([]),
        plan_validation.INT8: kl([]),
    }
    sizes = SimpleNamespace(extra={}, uniform_bytes=1)
    own, found = search.estimate_costs(sizes, alone, kept_alone, measured)
    assert list(found.kl.values()) == pytest.approx(form.sum(1) / 2)
    assert list(own.kl.values()) == pytest.approx(form.diagonal() / 2)
    assert found.predicted({}) == pytest.approx(measured[plan_validation.NF4]["kl"])
    assert abs(sum(own.kl.values()) / sum(found.kl.values()) - 1) > 0.3


@pytest.mark.parametrize("better", ["a", "b"])
def test_of_two_choices_the_one_that_is_better_as_measured_is_taken(better):
    extra = {16: {"a": 10, "b": 10}}
    several = [
        knapsack.Costs({"a": a, "b": 1.0}, {16: 0.0}, extra, 0.0, 100)
        for a in (2.0, 0.5)
    ]
    evaluated = []

    def evaluate(images, widths):
        evaluated.append((images, widths))
        return {"kl": 0.1 if better in widths else 0.2}

    measured = SimpleNamespace(evaluate=evaluate, uniform_bytes=100)
    found = search.choose_widths(measured, several, [16], 0.1)
    assert found == ({better: 16}, several["ab".index(better)])
    assert evaluated == [("valid", {"a": 16}), ("valid", {"b": 16})]


def test_random_plans_hold_the_same_bytes():
    found = costs(np.random.default_rng(0), 30)
    plan = knapsack.solve(found, [8, 16], 2_000)
    drawn = knapsack.random_plans(found, [8, 16], plan, 20)
    limit = found.bytes(plan)
    assert (
        len(drawn) == 20
        and plan not in drawn
        and len({json.dumps(one, sort_keys=True) for one in drawn}) == 20
    )
    assert all(
        limit - 0.01 * (10_000 + limit) <= found.bytes(one) <= limit for one in drawn
    )
    assert {bits for one in drawn for bits in one.values()} == {8, 16}
    assert (
        drawn
        == knapsack.random_plans(found, [8, 16], plan, 20)
        != knapsack.random_plans(found, [8, 16], plan, 20, seed=1)
    )
    extra = {"a": 100, "b": 100, "c": 100, "d": 60, "e": 60, "f": 80}
    few = knapsack.Costs(dict.fromkeys(extra, 1.0), {16: 0.0}, {16: extra}, 0.0, 100)
    drawn = {
        frozenset(one)
        for one in knapsack.random_plans(few, [16], {"a": 16, "b": 16}, 20)
    }
    assert drawn == {frozenset(one) for one in ("ac", "bc", "def")}, (
        "what leaves a gap is not taken"
    )
    two = knapsack.Costs(
        {"a": 1.0, "b": 0.5}, {16: 0.0}, {16: {"a": 9, "b": 9}}, 0.0, 100
    )
    assert knapsack.random_plans(two, [16], {"a": 16}, 20) == [{"b": 16}], (
        "as many as there are"
    )
    with pytest.raises(UserError, match="take another budget"):
        knapsack.random_plans(two, [16], {"a": 16, "b": 16}, 20)


def test_a_plans_variants():
    found = variants.parse("plan:plus12-mem-efficient-graph")
    assert (found.plan, found.attention, found.engine) == (
        "plus12",
        "mem-efficient",
        "graph",
    )
    assert (
        found.checkpoint == "plan-plus12"
        and found.quantized
        and found.file == "plan-plus12-mem-efficient-graph"
    )
    assert found.name == "plan:plus12-mem-efficient-graph"
    assert variants.parse(found.name) == found
    others = max(map(variants.sort_key, variants.every_variant()))
    assert variants.sort_key(found) > others, "plans come after all others in tables"
    assert (
        variants.parse("nf4-sdpa").plan == ""
        and variants.parse("nf4-sdpa").file == "nf4-sdpa"
    )
    for wrong in (
        "plan:plus12",
        "plan:-sdpa",
        "plan:a/b-sdpa",
        "plan:..-sdpa",
        "plan:plus12-spda",
        "plan:plus12-sdpa-eagre",
    ):
        with pytest.raises(UserError, match="plan:NAME-attention"):
            variants.parse(wrong)


@pytest.fixture(scope="module")
def planned(mini, tmp_path_factory):
    """Return the mini study with one plan in 16 bits and one in 8 or 16.

    Its outputs are its own.
    """
    root = tmp_path_factory.mktemp("plans")
    shutil.copytree(mini.outputs / "checkpoints", root / "mini" / "checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITNB_OUTPUTS", str(root))
        search.make_plan(mini, "wide", 0.4)
        search.make_plan(mini, None, 0.3, [8, 16])
        yield mini


@pytest.fixture
def without_test(planned, mini_yaml, tmp_path, monkeypatch) -> Study:
    """Return the mini study, fine-tuned, but without its test images."""
    shutil.copytree(
        mini_yaml.parent / "shapes",
        tmp_path / "shapes",
        ignore=shutil.ignore_patterns("test"),
    )
    shutil.copytree(
        planned.outputs / "checkpoints" / "merged",
        tmp_path / "own" / "checkpoints" / "merged",
    )
    path = tmp_path / "own.yaml"
    path.write_text(
        mini_yaml.read_text().replace(
            f"{mini_yaml.parent}/shapes", f"{tmp_path}/shapes"
        )
    )
    monkeypatch.setenv("VITNB_OUTPUTS", str(tmp_path))
    return load_study(str(path))


def record(study: Study, name: str) -> dict:
    return json.loads((study.outputs / "records" / f"plan-{name}.json").read_text())


@pytest.mark.parametrize("name", ["wide", "plus30_8"])
def test_a_plan_is_a_variant_like_any_other(planned, name):
    """Counts, bytes and KL of the loaded export equal those measured in place."""
    plan = plans.read_plan(planned, name)
    loaded = loader.load_variant(planned, variants.parse(f"plan:{name}-sdpa"))
    types = {
        linear: type(module).__name__
        for linear, module in layers.linears(loaded.model).items()
    }
    kinds = {4: "Linear4bit", 8: "Linear8bitLt", 16: "Linear"}
    assert types == {
        linear: kinds[16 if linear == "classifier" else plan.widths.get(linear, 4)]
        for linear in types
    }
    assert (
        plan.widths
        and "Linear4bit" in types.values()
        and (name == "wide" or plan.of(8))
    )
    assert loaded.linears_kept == 1 + len(
        plan.of(16)
    ) and loaded.linears_quantized == 18 - len(plan.of(16))
    nf4 = loader.load_variant(planned, variants.parse("nf4-sdpa"))
    assert nf4.resident_bytes == plan.uniform_bytes
    assert (
        loaded.resident_bytes
        == plan.uniform_bytes + plan.extra_bytes
        <= plan.uniform_bytes * (1 + plan.budget)
    )
    full, valid = (
        loader.load_variant(planned, variants.parse("fp32-sdpa")),
        load_split(planned, "valid"),
    )
    oracle = accuracy.kl_divergence(
        accuracy.compute_logits(full, valid), accuracy.compute_logits(loaded, valid)
    )
    assert (
        plan.kl == pytest.approx(oracle.mean().item(), rel=0.02)
        and plan.kl_low <= plan.kl <= plan.kl_high
    )
    assert plan.kl < plan.uniform_kl and plan.images == len(valid)
    images = switchable.reference_answers(full, valid)
    logits = switchable.compute_logits(loaded, images.pixels, loaded.dtype)
    chosen = next(
        row for row in record(planned, name)["curve"] if row["widths"] == plan.widths
    )
    scores = images.scores(logits)  # bit for bit
    assert (chosen["kl"], chosen["kl_by_image"]) == (
        scores["kl"],
        scores["kl_by_image"],
    )
    test = load_split(planned, "test")
    oracle = accuracy.kl_divergence(
        accuracy.compute_logits(full, test), accuracy.compute_logits(loaded, test)
    )
    proven = next(
        row for row in record(planned, name)["proof"] if row["name"] == "plan"
    )
    assert proven["kl"] == pytest.approx(oracle.mean().item(), rel=0.02) and len(
        proven["kl_by_image"]
    ) == len(test)


def test_the_export_loads_with_plain_transformers(planned):
    """Weights equal, bit for bit, those of the uniform export or the merged model."""
    folder = planned.checkpoint("plan-wide")
    found = layers.linears(AutoModelForImageClassification.from_pretrained(folder))
    nf4 = layers.linears(
        AutoModelForImageClassification.from_pretrained(planned.checkpoint("nf4"))
    )
    merged = layers.linears(
        AutoModelForImageClassification.from_pretrained(
            planned.checkpoint("merged"), dtype=torch.bfloat16
        )
    )
    kept = {*plans.read_plan(planned, "wide").widths, "classifier"}
    for name, module in found.items():
        assert torch.equal(
            module.weight.data,
            (merged if name in kept else nf4)[name].weight.data.to(
                module.weight.device
            ),
        ), name
    assert checkpoints.load_processor(folder).size == {"height": 32, "width": 32}


def test_the_record_holds_the_trade_off_and_the_proof(planned):
    found = record(planned, "wide")
    names = [row["name"] for row in found["curve"]]
    assert names[:4] == [
        "uniform NF4",
        "uniform int8",
        "16 bits everywhere",
        "first and last in 16 bits",
    ]
    curve = plan_validation.trade_off(found["curve"], found["plan"]["uniform_bytes"])
    assert (curve.linears_quantized[:4] == [18, 18, 0, 6]).all() and curve.extra[
        0
    ] == curve.cut[0] == 0
    budgets = curve[curve.curve != ""]
    assert (
        set(budgets.curve) == set(search.ALLOWED)
        and (budgets.extra < [row["budget"] + 1e-9 for row in found["curve"][4:]]).all()
    )
    alone, kept_alone = (
        {k: np.mean(v) for k, v in found[key].items()}
        for key in ("alone", "kept_alone")
    )
    uniform, plain = curve.kl[0], curve.kl[2]
    own = {name: alone[name] - plain for name in alone}
    shares = {name: (own[name] + uniform - kept_alone[name]) / 2 for name in alone}
    kept = found["plan"]["widths"]
    predicted = [
        plain + sum(cost for name, cost in costs.items() if name not in kept)
        for costs in (own, shares)
    ]
    assert len(shares) == 18 and found["plan"]["predicted_kl"] in [
        pytest.approx(one, rel=1e-4) for one in predicted
    ]
    assert curve.predicted_kl[0] == pytest.approx(uniform, rel=0.1), (
        "costs in both directions add up to about all"
    )
    tested = plan_validation.trade_off(found["proof"], found["plan"]["uniform_bytes"])
    chance = tested[tested.name.str.startswith("random ")]
    size = found["plan"]["uniform_bytes"] + found["plan"]["extra_bytes"]
    assert (
        0 < len(chance) <= 20
        and (found["plan"]["extra_bytes"] - chance.extra_bytes)
        .between(0, 0.01 * size)
        .all()
    )
    assert found["checkpoint_sha256"] == checkpoints.fingerprint(
        planned.checkpoint("plan-wide")
    )
    assert found["disk_bytes"] == checkpoints.disk_bytes(
        planned.checkpoint("plan-wide")
    )
    assert not (planned.outputs / "unfinished").exists(), (
        "what was kept for a killed run goes when the record is written"
    )


def kl_without_search(
    study: Study, split: Split, widths: dict[str, int]
) -> list[float]:
    """Return the KL of each image, of a model whose Linears are quantized one by one.

    The Linears in ``widths`` stay in 16 bits, all others but the head are NF4.
    """
    full = loader.load_variant(study, variants.parse("fp32-sdpa"))
    reference = accuracy.compute_logits(full, split)
    dtype = devices.compute_dtype(full.device)
    # Exports hold 16-bit weights, whatever the model computes in.
    model = full.model.to(devices.half_dtype(full.device)).to(dtype)
    for name, linear in layers.linears(model).items():
        if name != "classifier" and name not in widths:
            model.set_submodule(name, quantization.quantized_copy(linear, 4, dtype))
    images = [read_image(path) for path in split.paths]
    pixels = dataset.to_pixels(images, full.processor).to(full.device, dtype)
    with torch.inference_mode():
        logits = model(pixel_values=pixels).logits.cpu()
    return accuracy.kl_divergence(reference, logits).tolist()


def test_without_test_images_a_plan_is_proven_on_those_that_did_not_choose_it(
    without_test, capsys
):
    """Of 20 validation images, five a class, ten choose and the other ten prove."""
    search.make_plan(without_test, "p", 0.4)
    printed = capsys.readouterr().out
    found = record(without_test, "p")
    valid = load_split(without_test, "valid")
    widths = found["plan"]["widths"]
    proven = next(row for row in found["proof"] if row["name"] == "plan")
    chosen = next(row for row in found["curve"] if row["widths"] == widths)
    every = kl_without_search(without_test, valid, widths)
    assert chosen["kl_by_image"] == pytest.approx(every[::2], rel=0.02)
    assert proven["kl_by_image"] == pytest.approx(every[1::2], rel=0.02)
    assert not set(proven["kl_by_image"]) & set(chosen["kl_by_image"]), (
        "the images can be told apart"
    )
    assert all(len(row["kl_by_image"]) == 10 for row in found["curve"] + found["proof"])
    assert found["proven_on"] == "validation images that did not choose" and found[
        "images"
    ] == {
        "valid": 10,
        "proof": 10,
    }
    assert (
        found["plan"]["images"] == 10
        and "validation images that did not choose, plan: KL" in printed
    )
    said = plan_validation.describe_plan(found)
    titles = [axis.get_title() for axis in mixed_precision.plan_curve(found).axes]
    plt.close("all")
    assert (
        "On 10 validation images that did not choose, it cuts the KL" in said
        and "test" not in said
    )
    assert titles == [
        "Chosen: validation images",
        "Proven: validation images that did not choose",
    ]


def test_a_record_that_does_not_say_where_it_was_proven(planned):
    found = record(planned, "wide")
    assert (
        found.pop("proven_on")
        == "test images"
        == plan_validation.validation_images(found)
    )
    assert (
        "On 24 test images, which chose nothing, it cuts the KL"
        in plan_validation.describe_plan(found)
    )
    assert [axis.get_title() for axis in mixed_precision.plan_curve(found).axes][
        1
    ] == "Proven: test images"
    plt.close("all")


def test_test_images_without_labels_prove_too(without_test, mini_yaml, tmp_path):
    """Six images in one folder: KL asks for no labels."""
    flat = tmp_path / "shapes" / "test"
    flat.mkdir()
    for i, path in enumerate(
        sorted((mini_yaml.parent / "shapes" / "test").rglob("*.png"))[:6]
    ):
        shutil.copy(path, flat / f"{i}.png")
    measured = search.PlanSearch(without_test, tmp_path / "unfinished")
    keep = {"vit.layers.1.mlp.fc1": 16}
    found = measured.evaluate("test", keep)
    assert measured.validated_on == "test images" and found["top1"] is None
    split = load_split(without_test, "test")
    assert split.labels == [] and len(split) == 6
    oracle = kl_without_search(without_test, split, keep)
    assert found["kl_by_image"] == pytest.approx(oracle, rel=0.02)
    rows = [
        {"name": "uniform NF4", "curve": "", "extra_bytes": 0, "predicted_kl": 0.0}
        | found
    ]
    assert plan_validation.trade_off(rows, 1).kl[0] == pytest.approx(
        found["kl"], rel=1e-4
    )


def test_what_cannot_be_had_ends_in_one_line(planned, mini_yaml, capsys):
    with pytest.raises(
        VariantError, match=r"take the engine graph, plan:wide-sdpa-graph$"
    ):
        loader.load_variant(planned, variants.parse("plan:wide-sdpa-fused"))
    with pytest.raises(
        UserError,
        match=r"has no plan 'wide0': did you mean 'wide'\? "
        r"Or make it with .* plan .* --name wide0'",
    ):
        loader.load_variant(planned, variants.parse("plan:wide0-sdpa"))
    refusals = (
        (["--budget", "0"], "budget is a share"),
        (["--budget", "0.0001"], "keeps no Linear: the smallest takes 0.0"),
        (["--budget", "9"], "take bf16-sdpa"),
        (["--name", "a-b"], "letters, digits, dots and underscores, got 'a-b'"),
        (["--widths", "5"], "widths may be 8 and 16"),
    )
    for words, said in refusals:
        assert cli.main(["plan", str(mini_yaml), *words]) == 1
        lines = capsys.readouterr().err.strip().splitlines()
        assert (
            len([line for line in lines if line.startswith("vitnb:")]) == 1
            and said in lines[-1]
        ), words
    assert {path.stem for path in (planned.outputs / "plans").iterdir()} == {
        "wide",
        "plus30_8",
    }
    path = plans.plan_path(planned, "wide")
    whole = path.read_text()
    for broken in (
        "{",
        "[]",
        "{}",
        whole.replace(": 16", ": 5", 1),
        whole.replace('"wide"', '"narrow"'),
    ):
        path.write_text(broken)
        with pytest.raises(UserError, match=r"is not a plan .* make it again with"):
            plans.read_plan(planned, "wide")
    wider = json.loads(whole)
    wider["widths"]["vit.layers.0.attention.q_proj"] = 24 - wider["widths"].get(
        "vit.layers.0.attention.q_proj", 8
    )
    path.write_text(json.dumps(wider))
    with pytest.raises(VariantError):
        loader.load_variant(planned, variants.parse("plan:wide-sdpa"))
    path.write_text(whole)
    moved = planned.checkpoint("plan-wide")
    moved.rename(moved.with_name("elsewhere"))
    with pytest.raises(
        UserError,
        match=r"no checkpoint at .*plan-wide: make it with "
        r"'python -m vitnb plan .* --name wide --budget 0.4'",
    ):
        loader.load_variant(planned, variants.parse("plan:wide-sdpa"))
    moved.with_name("elsewhere").rename(moved)


def test_a_killed_plan_goes_on(planned, monkeypatch):
    evaluated = killed_at(monkeypatch, 45)
    with pytest.raises(KeyboardInterrupt):
        search.make_plan(planned, "again", 0.4)
    assert (
        not plans.plan_path(planned, "again").exists()
        and not planned.checkpoint("plan-again").exists()
    )
    assert len(list((planned.outputs / "unfinished" / "plan-again").iterdir())) == 44
    search.make_plan(planned, "again", 0.4)
    again, wide = record(planned, "again"), record(planned, "wide")
    assert again["curve"] == wide["curve"] and again["proof"] == wide["proof"]
    most = 44 + 2 * len(wide["curve"]) + len(wide["proof"])
    assert len(evaluated) - 1 < most, "two choices are measured for a budget"


def test_a_plan_through_the_notebooks_and_the_report(planned, mini_yaml, run_cells):
    """Notebooks take a plan by name, and the report says what it keeps and saves."""
    run_cells("evaluate", study=str(mini_yaml), variant="plan:wide-sdpa", batch_size=1)
    run_cells("infer", study=str(mini_yaml), variant="plan:wide-sdpa")
    found = {
        path.stem: json.loads(path.read_text())
        for path in (planned.outputs / "records").glob("*-plan-wide-sdpa*")
    }
    assert set(found) == {"evaluate-plan-wide-sdpa-b1", "infer-plan-wide-sdpa"}
    sha256 = found["evaluate-plan-wide-sdpa-b1"]["checkpoint_sha256"]
    assert (
        sha256 == record(planned, "wide")["checkpoint_sha256"]
        and found["infer-plan-wide-sdpa"]["images"] == 24
    )
    page = write_report(load_study(str(mini_yaml))).read_text()
    verdict = plan_validation.describe_plan(record(planned, "wide"))
    kept = plan_validation.describe_kept(record(planned, "wide"))
    assert "Mixed precision within a byte budget" in page
    assert verdict[1:] in page and f"Kept: {kept}." in page
    rows = (planned.outputs / "summary.csv").read_text().splitlines()
    assert (
        len(rows) == 2
        and rows[1].startswith("plan:wide-sdpa,plan:wide,sdpa")
        and ",ok," in rows[1]
    )
    assert len((planned.outputs / "plan-wide.csv").read_text().splitlines()) == 1 + len(
        record(planned, "wide")["curve"]
    )
    mixed_precision.linears_map(record(planned, "wide"))
    plt.close("all")


def by_hand(plan: float, chance: list[float], curve: float = 0.4) -> dict:
    """Return a record of 300 test images with these mean KLs; uniform NF4's is 1."""
    shape = 1 + 0.3 * np.random.default_rng(0).standard_normal(300)

    def row(name: str, kl: float, kind: str = "", extra: int = 12) -> dict:
        return {
            "name": name,
            "curve": kind,
            "extra_bytes": extra,
            "predicted_kl": kl,
            "kl_by_image": (kl * shape).tolist(),
            "linears_quantized": 9,
            "linears_kept": 1,
            "top1": 0.5,
        }

    rows = [row("uniform NF4", 1.0, extra=0), row("plan", plan)] + [
        row(f"random {i}", kl) for i, kl in enumerate(chance)
    ]
    curve = [
        row("uniform NF4", 1.0, extra=0),
        row("+5%", 0.9, "kept in 16 bits", 5),
        row("+50%", 1 - curve, "kept in 16 bits", 50),
    ]
    return {
        "plan": {"name": "p", "uniform_bytes": 100, "extra_bytes": 12},
        "proof": rows,
        "curve": curve,
    }


def test_the_verdict():
    met = plan_validation.validate(by_hand(0.7, [0.8, 0.9, 1.0]))
    assert met["cut"] == pytest.approx(0.3) and met["low"] == pytest.approx(
        met["high"]
    ), "each image is cut by as much"
    assert met["met"] and (met["random"], met["beaten"], met["beyond_noise"]) == (
        3,
        3,
        3,
    )
    assert met["best_random"] == pytest.approx(
        0.2
    ) and "asked for: met" in plan_validation.describe_plan(by_hand(0.7, [0.8]))
    few = plan_validation.describe_plan(by_hand(0.7, [0.8] * 19))
    assert "beats 19 of 19" in few and "cannot tell a plan from luck: 20" in few
    assert "luck" not in plan_validation.describe_plan(by_hand(0.7, [0.8] * 20))
    lost = by_hand(0.7, [0.8, 0.69])
    assert not plan_validation.validate(lost)[
        "met"
    ] and "beats 1 of 2" in plan_validation.describe_plan(lost)
    short = plan_validation.describe_plan(by_hand(0.8, [0.9]))
    assert (
        "missed. The best that any budget on the curve gives, on validation images, "
        "is a cut of 40.0% for 50.0% more" in short
    )


def test_the_interval_of_a_cut_covers_the_truth():
    """About 95 of 100 intervals of samples with the true cut 0.4 should hold it."""
    held = 0
    for seed in range(100):
        random = np.random.default_rng(seed)
        nf4 = random.exponential(1.0, 200)
        _, low, high = plan_validation.kl_reduction(
            nf4, 0.6 * nf4 + 0.1 * random.standard_normal(200)
        )
        held += low <= 0.4 <= high
    assert 85 <= held <= 100


def test_a_study_names_its_plans(mini_yaml, tmp_path):
    path, text = tmp_path / "mini.yaml", mini_yaml.read_text()
    path.write_text(text.replace("nf4-fa2]", "plan:p1-sdpa]\nplans: {p1: 0.1}"))
    assert load_study(str(path)).plans == {"p1": 0.1}
    for plans_line, said in (
        ("", "add it, such as 'plans: {p1: 0.12}'"),
        ("plans: {p1: 0}", "got 'p1: 0'"),
        ("plans: {p1: 0.1, a-b: 1}", "a-b: 1"),
    ):
        path.write_text(text.replace("nf4-fa2]", f"plan:p1-sdpa]\n{plans_line}"))
        with pytest.raises(UserError, match=said):
            load_study(str(path))


def test_a_study_makes_its_plans_before_what_needs_them(
    mini_yaml, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("VITNB_OUTPUTS", str(tmp_path))
    path = tmp_path / "mini.yaml"
    path.write_text(
        mini_yaml.read_text().replace(
            "nf4-fa2]", "plan:p1-sdpa]\nplans: {p1: 0.1, p2: 0.2}"
        )
    )
    assert cli.main(["study", str(path), "--dry-run"]) == 0
    jobs = dict(
        line.split()
        for line in capfd.readouterr().out.splitlines()
        if re.fullmatch(r"\w+ +\d+", line)
    )
    assert jobs["plan"] == jobs["evaluate"] == "2" and jobs["finetune"] == "1"
