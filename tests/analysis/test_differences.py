"""Two records, or two studies' outputs, side by side."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.metrics import f1_score

from vitnb import statistics
from vitnb.analysis.differences import (
    evaluation,
    findings,
    pairs,
    text,
    verdicts,
)
from vitnb.analysis.differences.verdicts import BEYOND, SAME, UNKNOWN, WITHIN
from vitnb.cli import main
from vitnb.errors import UserError
from vitnb.records.files import array_digest
from vitnb.records.schema import SCHEMA
from vitnb.study import ROOT

PUBLISHED = ROOT / "outputs" / "published"
IMAGES = 400
CLASSES = 8


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


LABELS = [i % CLASSES for i in range(IMAGES)]


def predictions(wrong: range, labels: list[int] = LABELS) -> dict[str, list]:
    """Return answers that are right but for some images; the truth comes second."""
    top5 = []
    for i, label in enumerate(labels):
        row = [(label + k) % CLASSES for k in range(5)]
        if i in wrong:
            row[:2] = row[1::-1]
        top5.append(row)
    return {"labels": labels, "top5": top5}


def samples(median: float, seed: int, count: int = 200) -> list[float]:
    return (median * generator(seed).lognormal(0, 0.01, count)).tolist()


def record(notebook: str, name: str = "", **results) -> dict:
    """Return a record of today's shape."""
    asked = results.pop("asked", {"seed": 0, "device": None})
    data = results.pop("data", "shapes")
    identity = {
        "checkpoints": {"nf4": "abcdef0123456789"},
        "data": {"test": "0123456789abcdef"},
        "code": "c" * 64,
        "packages": {"torch": "2.13.0", "numpy": "2.4.6"},
        "dtype": "float32",
        "device_kind": "cpu AVX2, no 16-bit units",
        "host": "h1",
        "cores": 2,
        "threads": 2,
        "device": "a CPU",
        "device_id": "",
        "driver": "",
    } | results.pop("identity", {})
    return {
        "schema": SCHEMA,
        "notebook": notebook,
        "study": "mini",
        "name": name or notebook,
        "asked": asked,
        "started": "2026-01-01T00:00:00+00:00",
        "study_asked": {"data": data, "latency": {"samples": 200, "seconds": 2.0}},
        "machine": {"commit": "1" * 40, "dirty": False},
        "versions": identity["packages"],
        "identity": identity,
        "arrays": {},
        "tables": [],
        "seconds": 1.0,
        "status": "ok",
        "reason": "",
    } | results


def evaluated(
    wrong: range = range(40), ms: float = 10.0, seed: int = 0, **more
) -> dict:
    """Return an evaluate record whose first ``wrong`` images are answered wrongly."""
    variant = more.pop("variant", "nf4-sdpa")
    results = {
        "asked": {"variant": variant, "device": None, "seed": 0, "batch_sizes": [1]},
        "parameters": 1000,
        "dtype": "float32",
        "attention_launched": "sdpa",
        "linears_quantized": 18,
        "linears_kept": 1,
        "disk_bytes": 5000,
        "resident_bytes": 4000,
        "scratch_bytes": 0,
        "engine_ran": {"1": "eager"},
        "engine_reason": {},
        "predictions": predictions(wrong),
        "split": "test",
        "logits": f"logits/evaluate-{variant}.npy",
        "timings": [
            {
                "batch_size": 1,
                "device_ms": None,
                "host_ms": samples(ms, seed),
            }
        ],
        "traces": [{"batch_size": 1, "attention_ran": "flash-cpu"}],
        "memory": [
            {
                "batch_size": 1,
                "allocator_peak_bytes": 6000,
                "driver_peak_bytes": 9000,
            }
        ],
    }
    return record("evaluate", f"evaluate-{variant}", **(results | more))


def as_old(new: dict) -> dict:
    """Return a record as version 1 wrote it: no identity, one engine."""
    old = {k: v for k, v in new.items() if k not in ("schema", "identity", "arrays")}
    old["machine"] = {
        "cpu": "a CPU",
        "cores": 2,
        "threads": 2,
        "gpu": None,
        "commit": "0" * 40,
        "dirty": False,
        "code_sha256": "d" * 64,
    }
    if new["notebook"] == "evaluate":
        old |= {"device": "cpu", "engine_ran": "eager", "engine_reason": ""}
        old["checkpoint_sha256"] = "abcdef0123456789"
    return old


def write(folder: Path, *records: dict) -> Path:
    (folder / "records").mkdir(parents=True, exist_ok=True)
    for one in records:
        (folder / "records" / f"{one['name']}.json").write_text(json.dumps(one))
    return folder


def compare(a: dict, b: dict, folder: Path) -> pairs.Differences:
    """Compare two records that lie in folders of their own."""
    paths = [
        write(folder / side, one) / "records" / f"{one['name']}.json"
        for side, one in (("a", a), ("b", b))
    ]
    return pairs.find_differences(*map(str, paths))


def found_by_name(a: dict, b: dict, folder: Path) -> dict[str, verdicts.Finding]:
    (pair,) = compare(a, b, folder).pairs
    return {one.what: one for one in pair.found}


# --- Verdicts ---


def test_intervals_that_overlap_are_within_noise():
    cases = {
        ((1.0, 0.9, 1.1), (1.15, 1.05, 1.25)): WITHIN,
        ((1.0, 0.9, 1.1), (1.3, 1.2, 1.4)): BEYOND,
        ((1.0, 0.9, 1.1), (1.0, 0.9, 1.1)): SAME,
    }
    for (a, b), verdict in cases.items():
        for pair in ((a, b), (b, a)):
            assert verdicts.compare_intervals("it", *pair, ".2f").verdict == verdict


def test_a_time_must_differ_by_more_than_two_launches_do():
    """Narrow intervals apart by 1% say nothing: a launch is one sample of launches."""
    base = (10.0, 9.99, 10.01)
    near, far = (10.1, 10.09, 10.11), (10.5, 10.49, 10.51)
    assert verdicts.compare_times("p50", base, near, "ms").verdict == WITHIN
    assert verdicts.compare_times("p50", near, base, "ms").verdict == WITHIN
    assert verdicts.compare_times("p50", base, far, "ms").verdict == BEYOND
    wide = (10.5, 9.0, 12.0)
    assert verdicts.compare_times("p50", base, wide, "ms").verdict == WITHIN


def test_a_count_has_no_noise():
    found = verdicts.compare_counts("bytes", 1000, 1001, verdicts.show_count)
    assert (found.verdict, found.exact, found.a, found.b) == (
        *(BEYOND, True),
        *("1,000", "1,001"),
    )
    assert verdicts.compare_counts("bytes", 7, 7).verdict == SAME


def test_tests_are_corrected_for_their_number():
    """Twenty tests at p = 0.03 are what chance gives; one alone is a finding."""

    def tests(count: int) -> list[verdicts.Finding]:
        one = verdicts.compare_by_test("top-1", "1", "2", 0.03, "McNemar")
        return verdicts.correct_tests([verdicts.unchanged("F1"), *[one] * count])

    assert [one.verdict for one in tests(1)] == [SAME, BEYOND]
    many = tests(20)
    assert {one.verdict for one in many[1:]} == {WITHIN}
    assert "p = 0.03 (0.6 corrected for 20 tests)" in many[-1].note


def test_a_test_that_can_find_nothing_says_so():
    least = statistics.least_mcnemar_pvalue(3)
    one = verdicts.compare_by_test("top-1", "1", "2", least, "McNemar", least)
    (judged,) = verdicts.correct_tests([one])
    assert judged.verdict == WITHIN and "too few images differ" in judged.note


# --- evaluate ---


def test_a_difference_in_noise_and_one_beyond_it(tmp_path):
    """30 more wrong answers on the same images are a loss; 2 more are not."""
    first = evaluated(range(40))
    small = found_by_name(first, evaluated(range(42)), tmp_path / "small")
    large = found_by_name(first, evaluated(range(70)), tmp_path / "large")
    assert small["top-1"].verdict == WITHIN and large["top-1"].verdict == BEYOND
    assert small["F1"].verdict == WITHIN and large["F1"].verdict == BEYOND
    assert (large["top-1"].a, large["top-1"].b) == ("0.9000", "0.8250")
    assert "-7.50 points" in large["top-1"].note
    assert "30 of 400 first classes changed, McNemar" in large["top-1"].note
    p = statistics.mcnemar(np.arange(400) >= 40, np.arange(400) >= 70)[2]
    assert large["top-1"].p == p < 1e-8
    assert large["top-5"].verdict == SAME, "the truth comes second at worst"
    for same in ("bytes on disk", "bytes resident", "p50 at batch 1"):
        assert large[same].verdict == SAME, same


def test_a_paired_test_sees_what_two_intervals_cannot(tmp_path):
    """On other images the same shares are within noise: Wilson's intervals overlap."""
    first, second = evaluated(range(40)), evaluated(range(55))
    paired = found_by_name(first, second, tmp_path / "paired")
    assert paired["top-1"].verdict == BEYOND
    other = evaluated(range(55), identity={"data": {"test": "other"}})
    apart = found_by_name(first, other, tmp_path / "apart")
    assert apart["top-1"].verdict == WITHIN and apart["top-1"].note == "other images"
    low, high = statistics.wilson(360, 400)
    assert apart["top-1"].a == f"0.9000 ({low:.4f} to {high:.4f})"
    assert apart["KL of B to A"].verdict == UNKNOWN
    shuffled = evaluated(range(40))
    shuffled["predictions"] = predictions(range(40), LABELS[::-1])
    apart = found_by_name(first, shuffled, tmp_path / "labels")
    assert apart["F1"].note == "other images", "labels in another order"


def test_old_records_are_paired_by_the_labels_of_one_studys_data(tmp_path):
    old, new = as_old(evaluated(range(40))), evaluated(range(55))
    found = compare(old, new, tmp_path / "one")
    (pair,) = found.pairs
    assert pair.found[0].verdict == BEYOND and "McNemar" in pair.found[0].note
    assert "host" in pair.ran.unknown and "host" not in pair.ran.differ
    assert "device kind" not in pair.ran.differ, "older records name no units"
    assert pair.ran.differ["commit"] == ("0000000", "1111111")
    printed = text.format_differences(found)
    assert "not in the older record: host" in printed
    assert "Older records do not name their images" in printed
    other = evaluated(range(55), data="other shapes")
    apart = found_by_name(old, other, tmp_path / "two")
    assert apart["top-1"].note == "other images", "equal labels of other data"


def test_weighted_f1_is_scikit_learns():
    random = generator()
    labels = random.integers(0, CLASSES, 300).tolist()
    answers = random.integers(0, CLASSES + 1, 300)
    score = evaluation.weighted_f1(
        {"labels": labels, "top5": [[int(answer)] for answer in answers]}
    )
    draws = random.integers(0, 300, (5, 300))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = [
            f1_score(np.asarray(labels)[one], answers[one], average="weighted")
            for one in draws
        ]
    np.testing.assert_allclose(score(draws), wanted, rtol=1e-12)


def test_times_of_two_runs(tmp_path):
    """10% slower is beyond noise, 1% is not: the runs were not timed in turns."""
    first = evaluated(ms=10.0, seed=1)
    near = found_by_name(first, evaluated(ms=10.1, seed=2), tmp_path / "near")
    far = found_by_name(first, evaluated(ms=11.0, seed=2), tmp_path / "far")
    assert near["p50 at batch 1"].verdict == WITHIN
    assert far["p50 at batch 1"].verdict == BEYOND
    assert far["p50 at batch 1"].note.startswith("ms, 1.10x")
    few = evaluated(seed=2)
    few["timings"][0]["host_ms"] = few["timings"][0]["host_ms"][:19]
    found = found_by_name(first, few, tmp_path / "few")
    assert found["p50 at batch 1"].verdict == UNKNOWN


def test_times_of_different_machines_say_so(tmp_path):
    moved = {"host": "h2", "threads": 8}
    other = evaluated(ms=11.0, seed=2, identity=moved)
    found = compare(evaluated(seed=1), other, tmp_path)
    (pair,) = found.pairs
    (p50,) = [one for one in pair.found if one.what.startswith("p50")]
    assert "different machines (host, threads)" in p50.note
    assert pair.ran.differ["host"] == ("h1", "h2")
    assert pair.ran.differ["threads"] == ("2", "8")
    assert "not timed in turns" in text.format_differences(found)


def test_memory_is_exact_and_the_drivers_count_is_read_once(tmp_path):
    heavy = evaluated(disk_bytes=5001)
    heavy["memory"][0] |= {"allocator_peak_bytes": 6001, "driver_peak_bytes": 9001}
    found = found_by_name(evaluated(), heavy, tmp_path)
    for what in ("bytes on disk", "allocator peak at batch 1"):
        assert found[what].verdict == BEYOND and found[what].exact
    driver = found["driver peak at batch 1"]
    assert driver.verdict == UNKNOWN and "read once" in driver.note
    assert (driver.a, driver.b) == ("9,000", "9,001")


def test_what_ran_is_listed_where_it_differs(tmp_path):
    other = evaluated(
        engine_ran={"1": "graph"},
        linears_kept=5,
        traces=[{"batch_size": 1, "attention_ran": "math"}],
        identity={
            "checkpoints": {"nf4": "9876543210fedcba"},
            "packages": {"torch": "2.14.0", "numpy": "2.4.6"},
        },
    )
    (pair,) = compare(evaluated(), other, tmp_path).pairs
    assert pair.ran.differ == {
        "checkpoint nf4": ("abcdef01", "98765432"),
        "package torch": ("2.13.0", "2.14.0"),
        "linears kept": ("1", "5"),
        "attention kernel at batch 1": ("flash-cpu", "math"),
        "engine at batch 1": ("eager", "graph"),
    }
    assert {"package numpy", "code", "commit", "host"} <= set(pair.ran.same)


def write_logits(folder: Path, one: dict, logits: np.ndarray) -> dict:
    (folder / "logits").mkdir(parents=True)
    np.save(folder / one["logits"], logits)
    one["arrays"] = {one["logits"]: array_digest(logits)}
    return one


def test_kl_where_both_arrays_are_there(tmp_path):
    """KL of B's answers to A's; rounding in float32 is within noise."""
    random = generator()
    first = random.normal(0, 4, (IMAGES, CLASSES)).astype(np.float32)
    shifted = first / 2  # the KL of A to B would be another number
    rounded = np.nextafter(first, np.float32(100))
    found = {}
    for name, second in (("far", shifted), ("near", rounded), ("same", first)):
        a = write_logits(tmp_path / name / "a", evaluated(range(40)), first)
        b = write_logits(tmp_path / name / "b", evaluated(range(41)), second)
        found[name] = found_by_name(a, b, tmp_path / name)
    far, near = found["far"]["KL of B to A"], found["near"]["KL of B to A"]
    assert far.verdict == BEYOND and near.verdict == WITHIN
    assert found["same"]["logits"].verdict == SAME
    p, q = (log_softmax(x.astype(float), axis=-1) for x in (first, shifted))
    wanted = (np.exp(p) * (p - q)).sum(-1).mean()
    assert far.note.startswith(f"{wanted:.2g} nats (")


def test_logits_of_another_run_do_not_count(tmp_path):
    logits = generator().normal(0, 1, (IMAGES, CLASSES)).astype(np.float32)
    a = write_logits(tmp_path / "a", evaluated(range(40)), logits)
    b = write_logits(tmp_path / "b", evaluated(range(41)), logits + 1)
    b["arrays"] = {b["logits"]: "of another run"}
    assert found_by_name(a, b, tmp_path)["KL of B to A"].verdict == UNKNOWN


# --- Other notebooks ---


def trained(top1: list[float], **more) -> dict:
    results = {
        "asked": {"rank": 8, "seed": 0},
        "history": [{"epoch": 1, "valid_top1": top1[0]}],
        "seeds": [
            {"seed": i, "valid_top1": value, "epoch": 1} for i, value in enumerate(top1)
        ],
        "floors": {"pixels": 0.2, "untrained": 0.1, "probe": 0.7, "images": [800, 200]},
        "trained": {"adapters": 10, "head": 5, "all": 1000, "linears": 18},
        "disk_bytes": {"merged": 4000, "nf4": 500},
        "checkpoint_sha256": {"merged": "m" * 64, "nf4": "n" * 64},
        "images": {"train": 800, "valid": 200, "test": 400},
        "split": "test",
    }
    return record("finetune", **(results | more))


def test_two_trainings(tmp_path):
    first = trained([0.80, 0.81, 0.79])
    near = found_by_name(first, trained([0.83, 0.80, 0.81]), tmp_path / "near")
    assert near["valid top-1"].verdict == WITHIN
    assert near["mean valid top-1 over seeds"].verdict == WITHIN
    assert near["baseline probe"].verdict == SAME
    sums = {"merged": "x" * 64, "nf4": "n" * 64}
    other = trained([0.95, 0.96, 0.94], checkpoint_sha256=sums)
    far = found_by_name(first, other, tmp_path / "far")
    assert far["valid top-1"].verdict == BEYOND
    assert far["mean valid top-1 over seeds"].verdict == BEYOND
    assert far["checksum of merged"].verdict == BEYOND
    assert far["checksum of merged"].b == "x" * 8, "a long digest is shortened"
    assert far["checksum of nf4"].verdict == SAME
    alone = found_by_name(first, trained([0.95]), tmp_path / "alone")
    assert alone["mean valid top-1 over seeds"].verdict == UNKNOWN


def compared(ratio: float, seed: int, processes: int = 3, **more) -> dict:
    """Return a compare record: nf4-sdpa takes ``ratio`` times as long as fp32-sdpa."""
    random, rounds = generator(seed), 60
    turns = [i % processes for i in range(rounds)]
    names = {"fp32-sdpa": 10.0, "nf4-sdpa": 10.0 * ratio}
    blocks = {
        name: (ms * random.lognormal(0, 0.004, (rounds, 2))).tolist()
        for name, ms in names.items()
    }
    results = {
        "asked": {"variants": list(names), "peers": [], "device": None, "seed": 0},
        "blocks_ms": {"1": blocks},
        "turns": {"1": dict.fromkeys(names, turns)},
        "warm_up": {"1": {name: {"engine_ran": "eager"} for name in names}},
        "attention_launched": dict.fromkeys(names, "sdpa"),
        "peers": {},
        "failed": {},
        "answers": {name: {"kl_by_image": [0.0, 0.1, 0.2]} for name in names},
        "engines": [],
    }
    return record("compare", **(results | more))


def test_ratios_are_compared_by_their_intervals(tmp_path):
    what = "nf4-sdpa / fp32-sdpa at batch 1"
    near = found_by_name(compared(1.2, 1), compared(1.2, 2), tmp_path / "near")
    assert what not in near and near["other ratios of times (1)"].verdict == WITHIN
    far = found_by_name(compared(1.2, 1), compared(1.5, 2), tmp_path / "far")
    assert far[what].verdict == BEYOND
    turned = found_by_name(compared(1.2, 1), compared(0.8, 2), tmp_path / "turned")
    assert turned[what].a.endswith("slower") and turned[what].b.endswith("faster")
    same = compared(1.2, 1) | {"engines": [{"a": 1}]}
    found = found_by_name(compared(1.2, 1), same, tmp_path / "same")
    assert found["other ratios of times (1)"].verdict == SAME


def test_ratios_of_one_process_each_must_differ_by_more(tmp_path):
    """1% between two runs of one process each is what processes differ by."""
    one = [compared(ratio, seed, processes=1) for ratio, seed in ((1.2, 1), (1.212, 2))]
    found = found_by_name(*one, tmp_path)
    assert found["other ratios of times (1)"].verdict == WITHIN


def test_a_variant_that_failed_in_one_record(tmp_path):
    failed = compared(1.2, 1, failed={"nf4-fa2": "no kernel"})
    found = found_by_name(compared(1.2, 1), failed, tmp_path)["failures"]
    assert found.verdict == UNKNOWN
    assert (found.a, found.b) == ("nf4-fa2: ran", "nf4-fa2: no kernel")


def ablated(shifts: dict[str, float], seed: int = 0, **more) -> dict:
    """Return an ablate record; some configurations' KL is shifted on every image."""
    common = generator(9).lognormal(-5, 1, 300)
    own = generator(seed)
    rows = [
        {
            "bits": 4,
            "kept": f"layer {i}",
            "kl_by_image": (
                common * own.lognormal(0, 0.1, 300) * (1 + shifts.get(f"layer {i}", 0))
            ).tolist(),
        }
        for i in range(12)
    ]
    labels = [i % 3 for i in range(300)]
    results = {"asked": {"by": "layer", "seed": 0}, "rows": rows, "labels": labels}
    return record("ablate", **(results | {"images": 300, "keep": {}} | more))


def test_configurations_are_tested_in_pairs_and_corrected(tmp_path):
    first = ablated({}, 1)
    quiet = found_by_name(first, ablated({}, 2), tmp_path / "quiet")
    assert {one.verdict for one in quiet.values()} == {WITHIN}
    loud = found_by_name(first, ablated({"layer 3": 0.1}, 2), tmp_path / "loud")
    beyond = loud["KL of 1 of 12 configurations"]
    assert beyond.verdict == BEYOND and "layer 3 kept at 4 bits" in beyond.note
    assert loud["other configurations' KL (11)"].verdict == WITHIN
    smaller = found_by_name(ablated({"layer 3": 0.1}, 2), first, tmp_path / "less")
    assert smaller["KL of 1 of 12 configurations"].verdict == BEYOND, "two-sided"
    elsewhere = ablated({"layer 3": 0.1}, 2, identity={"data": {"valid": "other"}})
    apart = found_by_name(first, elsewhere, tmp_path / "apart")
    assert {one.verdict for one in apart.values()} == {WITHIN}, "not paired"


def planned(widths: dict[str, int], share: float, seed: int, **more) -> dict:
    nf4 = generator(1).lognormal(-4, 1, 300)
    noise = generator(seed).lognormal(0, 0.1, 300)
    rows = [
        {"name": "uniform NF4", "kl_by_image": nf4.tolist()},
        {"name": "plan", "kl_by_image": (nf4 * share * noise).tolist()},
        {"name": "random 1", "kl_by_image": (nf4 * 0.95).tolist()},
    ]
    extra = {"curve": "", "extra_bytes": 100, "predicted_kl": 0.01}
    extra |= {"linears_quantized": 1, "linears_kept": 1, "top1": 0.9}
    results = {
        "asked": {"name": "p", "seed": 0},
        "plan": {"widths": widths, "extra_bytes": 100, "uniform_bytes": 1000},
        "proof": rows,
        "curve": [rows[0] | extra, rows[1] | extra | {"curve": "x"}],
        "disk_bytes": 1100,
        "checkpoint_sha256": "p",
        "proven_on": "test images",
        "images": {"valid": 300, "proof": 300},
        "parts": {"a": "layer 0 q", "b": "layer 1 v"},
    }
    return record("plan", "plan-p", **(results | more))


def test_two_plans(tmp_path):
    first = planned({"a": 16}, 0.5, 3)
    near = found_by_name(first, planned({"a": 16}, 0.5, 2), tmp_path / "near")
    assert near["Linears kept"].verdict == SAME
    assert near["cut of NF4's KL"].verdict == WITHIN
    far = found_by_name(first, planned({"b": 16}, 0.9, 2), tmp_path / "far")
    assert (far["Linears kept"].a, far["Linears kept"].b) == (
        "layer 0 q in 16 bits",
        "layer 1 v in 16 bits",
    )
    cut = far["cut of NF4's KL"]
    assert cut.verdict == BEYOND
    assert cut.a.endswith("met the target") and cut.b.endswith("missed the target")
    on = planned({"a": 16}, 0.9, 2, proven_on="validation images that did not choose")
    assert (
        found_by_name(first, on, tmp_path / "on")["cut of NF4's KL"].verdict == UNKNOWN
    )


def test_two_predictions(tmp_path):
    asked = {"variant": "nf4-sdpa", "images": None, "seed": 0}
    a = record("infer", images=3, unreadable=0, csv="predictions.csv", asked=asked)
    b = a | {"unreadable": 1}
    found = found_by_name(a, b, tmp_path)
    assert found["unreadable files"].verdict == BEYOND
    assert found["predictions"].verdict == UNKNOWN
    (tmp_path / "a" / "predictions.csv").write_text("path,top1\nx,1\ny,2\nz,3\n")
    (tmp_path / "b" / "predictions.csv").write_text("path,top1\nz,3\ny,1\nx,1\n")
    found = found_by_name(a, b, tmp_path)["first classes"]
    assert found.note.startswith("1 of 3 pictures") and found.exact


def test_failed_records_show_their_reasons(tmp_path):
    failed = evaluated() | {"status": "failed", "reason": "out of memory"}
    for key in ("predictions", "timings", "traces", "memory", "engine_ran"):
        del failed[key]
    found = found_by_name(evaluated(), failed, tmp_path / "one")["results"]
    assert (found.verdict, found.note) == (UNKNOWN, "B failed")
    assert (found.a, found.b) == ("ran", "failed: out of memory")
    other = failed | {"reason": "no kernel"}
    found = found_by_name(failed, other, tmp_path / "two")["results"]
    assert found.note == "A and B failed" and found.b == "failed: no kernel"
    found = found_by_name(failed, failed, tmp_path / "three")
    assert {one.verdict for one in found.values()} == {SAME}


def test_records_of_different_notebooks_show_what_was_asked(tmp_path):
    found = compare(evaluated(), trained([0.8]), tmp_path)
    (pair,) = found.pairs
    assert pair.asked.differ == {"notebook": ("evaluate", "finetune")}
    (only,) = pair.found
    assert only.verdict == UNKNOWN and "measure different things" in only.note


def test_every_notebook_has_a_rule():
    published = {
        json.loads(path.read_text())["notebook"]
        for path in PUBLISHED.glob("*/records/*.json")
    }
    assert published | {"ceilings"} <= set(findings.BY_NOTEBOOK)
    ceilings = {"products": {"int8": {"64": [1.0, 1.1], "128": [2.0, 2.1]}}}
    fastest = findings._fastest(ceilings | {"copy_gbs": [3.0]})
    assert fastest["int8 product, Tflop/s"] == [2.0, 2.1]


# --- Folders ---


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Two outputs: one record with the same results, one other, one on each side."""
    same = trained([0.8])
    only_a = evaluated(variant="fp32-sdpa")
    only_b = record("infer", images=3, unreadable=0)
    a = write(tmp_path / "a", same, evaluated(range(40), 10.0, 1), only_a)
    b = write(tmp_path / "b", same, evaluated(range(70), 12.0, 2), only_b)
    return a, b


def test_folders_are_compared_record_by_record(folders):
    found = pairs.find_differences(*map(str, folders))
    assert [pair.name for pair in found.pairs] == ["evaluate-nf4-sdpa", "finetune"]
    assert (found.only_a, found.only_b) == (["evaluate-fp32-sdpa"], ["infer"])
    printed = text.format_differences(found)
    assert "only in A: evaluate-fp32-sdpa\nonly in B: infer\n" in printed
    assert text.summarize(found) == (
        "2 of 2 records have the same question; 3 differences are beyond noise: "
        "evaluate-nf4-sdpa (top-1, F1, p50 at batch 1); "
        "values that cannot be compared: 1."
    )
    assert "\n  finetune\n    same: all results\n" in printed


def mirrored(found: pairs.Differences) -> list:
    """Return what must be equal, A and B exchanged, when the sides are."""
    return [
        (
            pair.name,
            {name: ab[::-1] for name, ab in pair.asked.differ.items()},
            {name: ab[::-1] for name, ab in pair.ran.differ.items()},
            {(one.what, one.b, one.a, one.verdict) for one in pair.found},
        )
        for pair in found.pairs
    ]


def plain(found: pairs.Differences) -> list:
    return [
        (
            *(pair.name, pair.asked.differ, pair.ran.differ),
            {(one.what, one.a, one.b, one.verdict) for one in pair.found},
        )
        for pair in found.pairs
    ]


def test_swapped_sides_give_the_mirrored_differences(folders):
    a, b = map(str, folders)
    there, back = pairs.find_differences(a, b), pairs.find_differences(b, a)
    assert mirrored(there) == plain(back)
    assert (there.only_a, there.only_b) == (back.only_b, back.only_a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("embedded", "vit-s14-flowers5"),
        ("vit-s14-flowers5", "vit-s14-flowers5-earlier"),
        ("vit-l16-garden", "vit-l16-qlora"),
        ("embedded", "embedded-without-bf16"),
    ],
)
def test_published_outputs_side_by_side(a, b):
    """Old records of every notebook can be compared, either way round."""
    first, second = str(PUBLISHED / a), str(PUBLISHED / b)
    there = pairs.find_differences(first, second)
    back = pairs.find_differences(second, first)
    assert mirrored(there) == plain(back)
    printed = text.format_differences(there)
    assert all(len(line) <= text.WIDTH for line in printed.splitlines()[2:])
    assert {"asked", "ran", "found"} <= set(printed.splitlines())


def test_the_earlier_training_on_photographs_differs_in_noise_alone():
    found = pairs.find_differences(
        *(
            str(PUBLISHED / name)
            for name in ("vit-s14-flowers5", "vit-s14-flowers5-earlier")
        )
    )
    assert text.summarize(found).startswith(
        "2 of 2 records have the same question; no difference is beyond noise; exact"
    )


@pytest.mark.parametrize(
    "folder", sorted(path.parent for path in PUBLISHED.glob("*/records"))
)
def test_published_outputs_do_not_differ_from_themselves(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copy")
    found = pairs.find_differences(str(folder), str(copied))
    assert text.summarize(found).endswith("; nothing differs.")
    assert all(
        one.verdict == SAME and not pair.ran.differ
        for pair in found.pairs
        for one in pair.found
    )


# --- The command ---


def test_the_command_prints_three_sections_and_a_sentence(folders, capsys):
    assert main(["diff", *map(str, folders)]) == 0, "a difference is no error"
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line in ("asked", "ran", "found")] == [
        *("asked", "ran", "found")
    ]
    assert lines[-1].endswith(".")


def test_a_study_and_a_record_are_found_by_their_names(folders, capsys, monkeypatch):
    root = folders[0].parent
    monkeypatch.setenv("VITNB_OUTPUTS", str(root))
    shutil.copytree(folders[0], root / "embedded")
    assert main(["diff", "embedded", str(folders[1])]) == 0
    assert f"A: {root / 'embedded'}" in capsys.readouterr().out
    assert main(["diff", "evaluate-fp32-sdpa", "evaluate-nf4-sdpa"]) == 0
    assert "variant  fp32-sdpa -> nf4-sdpa" in capsys.readouterr().out
    with pytest.raises(UserError, match="did you mean 'embedded'"):
        pairs.find_differences("embeded", "embedded")
    with pytest.raises(UserError, match="did you mean 'evaluate-nf4-sdpa'"):
        pairs.find_differences("evaluate-nf4-sdp", "embedded")


def test_mistakes_end_in_one_line_that_names_the_fix(folders, capsys, tmp_path):
    a, b = map(str, folders)
    one = str(folders[0] / "records" / "finetune.json")
    (tmp_path / "empty" / "records").mkdir(parents=True)
    write(tmp_path / "apart", record("ablate"))
    (tmp_path / "text.json").write_text("no JSON")
    for sides_given, told in (
        ((one, b), "name two records, or two studies or folders of outputs"),
        ((b, one), "name two records, or two studies or folders of outputs"),
        ((a, str(tmp_path / "empty")), "has no records"),
        ((a, str(tmp_path)), "has no folder 'records'"),
        ((a, str(tmp_path / "nowhere")), "no folder"),
        ((a, str(tmp_path / "apart")), "name one record of each"),
        ((one, str(tmp_path / "nowhere.json")), "no record at"),
        ((one, str(tmp_path / "text.json")), "name the JSON file of a record"),
    ):
        assert main(["diff", *sides_given]) == 1, sides_given
        out, error = capsys.readouterr()
        assert out == "" and told in error and error.count("\n") == 1, error
