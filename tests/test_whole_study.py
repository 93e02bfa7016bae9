"""A whole study, as ``vitnb study`` runs it: every number follows from a record."""

import base64
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score, top_k_accuracy_score

from vitnb.report.page import write_report
from vitnb.study import load_study

ROOT = Path(__file__).resolve().parent.parent
FIGURES = [
    f"figures/{name}.png"
    for name in [
        "accuracy_latency",
        "accuracy_size",
        "effects",
        "ends",
        "kernels",
        "latency",
        "layers",
        "learning",
        "size_memory",
    ]
]


def vitnb(*words: str, outputs: Path) -> subprocess.CompletedProcess:
    env = os.environ | {"VITNB_OUTPUTS": str(outputs), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "vitnb", *words],
        env=env,
        cwd=outputs,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def done(mini_yaml, tmp_path_factory) -> Path:
    """The mini study's results, from an empty output root.

    Its path holds what a shell would take for more than a name. The first run is killed
    with all its processes after the training; the second goes on.
    """
    root = tmp_path_factory.mktemp("study")
    path = root / "it's $(touch PWNED); a 'study'" / "mini.yaml"
    path.parent.mkdir()
    path.write_text(mini_yaml.read_text())
    env = os.environ | {"VITNB_OUTPUTS": str(root), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "vitnb", "study", str(path)]
    killed = subprocess.Popen(words, env=env, cwd=root, start_new_session=True)
    trained = root / "mini" / "records" / "finetune.json"
    while killed.poll() is None and not trained.exists():
        time.sleep(0.2)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    first = trained.read_bytes()
    ended = vitnb("study", str(path), outputs=root)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert trained.read_bytes() == first, "what was done was done again"
    assert not list(root.rglob("PWNED")) and not (ROOT / "PWNED").exists()
    return root / "mini"


def yaml_of(done: Path) -> str:
    """Return the path of the study's YAML."""
    (path,) = done.parent.glob("it's*/mini.yaml")
    return str(path)


def times_of_files(done: Path) -> dict[Path, int]:
    """Return when each file was written, but for the marks of jobs and the lock."""
    return {
        path: path.stat().st_mtime_ns
        for path in done.rglob("*")
        if path.is_file() and path.name != ".lock" and path.parent.name != ".jobs"
    }


def load(done: Path, name: str) -> dict:
    return json.loads((done / "records" / f"{name}.json").read_text())


def test_what_a_study_leaves(done):
    for name in (
        "report.html",
        "summary.csv",
        "predictions.csv",
        "ablation.csv",
        "ratios.csv",
        "accuracy.csv",
        "claims.csv",
    ):
        assert (done / name).stat().st_size > 100
    names = {path.stem for path in (done / "records").iterdir()}
    (ceilings,) = (name for name in names if name.startswith("ceilings-"))
    assert names - {ceilings} == {
        "finetune",
        "evaluate-fp32-sdpa",
        "evaluate-nf4-fa2",
        "ablate",
        "infer",
        "compare",
    }
    known = {".jobs", ".lock", ".vitnb"}  # of workflow, and the marker of a folder
    hidden = [path.name for path in done.rglob(".*") if path.name not in known]
    assert hidden == [], "something half-written was left"


def test_the_report_is_one_file_that_names_every_variant(done):
    page = (done / "report.html").read_text()
    assert (
        "fp32-sdpa" in page
        and "nf4-fa2" in page
        and page.count("data:image/png;base64") >= 7
    )
    assert (
        'src="http' not in page and 'href="http' not in page and "<script" not in page
    )
    for name in FIGURES:  # each is a file, too
        assert base64.b64encode((done / name).read_bytes()).decode() in page


def test_summary_follows_from_the_raw_records(done):
    """summary.csv again, from raw samples and predictions, without the package."""
    table = pd.read_csv(done / "summary.csv")
    assert list(zip(table.variant, table.batch_size, strict=True)) == [
        ("fp32-sdpa", 1),
        ("fp32-sdpa", 3),
        ("nf4-fa2", 1),
        ("nf4-fa2", 3),
    ]
    checked = {"variant", "batch_size"}
    (path,) = (done / "records").glob("ceilings-*.json")
    limits = json.loads(path.read_text())["ceilings"]
    for row in table.to_dict("records"):
        record = load(done, row["record"])
        timing = next(
            t for t in record["timings"] if t["batch_size"] == row["batch_size"]
        )
        trace = next(
            t for t in record["traces"] if t["batch_size"] == row["batch_size"]
        )
        samples = sorted(timing["device_ms"] or timing["host_ms"])
        peaks = next(
            p for p in record["memory"] if p["batch_size"] == row["batch_size"]
        )
        p50 = np.median(samples) / 1e3
        flops = record["roofline"]["flops"][str(row["batch_size"])]
        ((kind, operations),) = flops.items()  # nothing is in 8 bits
        product = 1e12 * max(map(max, limits["products"][kind].values()))
        copy = 1e9 * max(limits["copy_gbs"])
        labels, top5 = (
            np.array(record["predictions"]["labels"]),
            np.array(record["predictions"]["top5"]),
        )
        classes = top5.max() + 1
        ranks = np.zeros(
            (len(labels), classes)
        )  # a score for scikit-learn: the likelier, the higher
        for k in range(top5.shape[1]):
            ranks[np.arange(len(labels)), top5[:, k]] = 10 - k

        def percentile(share, samples=samples):
            """Linear between the two nearest ranks."""
            at = share * (len(samples) - 1)
            low = math.floor(at)
            return samples[low] + (at - low) * (
                samples[min(low + 1, len(samples) - 1)] - samples[low]
            )

        files = done / "checkpoints" / {"fp32": "merged", "nf4": "nf4"}[row["weights"]]
        expected = {
            "weights": row["variant"].split("-")[0],
            "attention": row["variant"].split("-")[1],
            "status": "ok",
            "reason": np.nan,
            "attention_ran": trace["attention_ran"],
            "images": len(labels),
            "record": record["name"],
            "top1": sum(a == b for a, b in zip(labels, top5[:, 0], strict=True))
            / len(labels),
            "top5": 1.0
            if classes <= 5
            else top_k_accuracy_score(labels, ranks, k=5, labels=range(classes)),
            "f1": f1_score(labels, top5[:, 0], average="weighted", zero_division=0),
            "parameters": record["parameters"],
            "linears_quantized": 18 * (row["weights"] == "nf4"),
            "linears_kept": 1 if row["weights"] == "nf4" else 19,
            "latency_mean_ms": math.fsum(samples) / len(samples),
            "latency_p50_ms": percentile(0.5),
            "latency_p95_ms": percentile(0.95) if len(samples) >= 200 else np.nan,
            "latency_p99_ms": percentile(0.99) if len(samples) >= 1000 else np.nan,
            "host_p50_ms": np.median(timing["host_ms"]),
            "cold_p50_ms": np.median(timing["cold_ms"]),
            "first_ms": timing["first_ms"],
            "warm_up_stable": timing["warm_up"]["stable"],
            "tflops": operations / p50 / 1e12,
            "matmul_share": operations / product / p50,
            "roofline_share": max(operations / product, record["resident_bytes"] / copy)
            / p50,
            "share_reason": np.nan,
            "driver_peak_mb": peaks["driver_peak_bytes"] / 2**20,
            "launches": trace["launches"],
            "idle_time_ms": trace["idle_ms"],
            "latency_samples": len(samples),
            "throughput_ips": timing["images_per_second"],
            "disk_mb": sum(path.stat().st_size for path in files.iterdir()) / 2**20,
            "resident_mb": record["resident_bytes"] / 2**20,
            "peak_mb": peaks["allocator_peak_bytes"] / 2**20,
            "engine": "eager",
            "engine_ran": "eager",
            "scratch_mb": 0.0,
            "attention_time_ms": trace["attention_ms"],
            "total_time_ms": sum(trace["operators_ms"].values()),
            "device": record["machine"]["gpu"] or record["machine"]["cpu"],
            "commit": record["machine"]["commit"],
        }
        for name, value in expected.items():
            found = row[name]
            same = (
                found == pytest.approx(value, rel=1e-9, nan_ok=True)
                if isinstance(value, float)
                else found == value
            )
            assert same, (
                f"{row['variant']} batch {row['batch_size']}: "
                f"{name} is {found}, the record says {value}"
            )
        # Intervals: Wilson's by its formula; those of percentiles hold the percentile
        # (see test_statistics).
        n, p, z = len(labels), expected["top1"], 1.959963984540054
        middle, half = (
            p + z * z / (2 * n),
            z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)),
        )
        ends = ((middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n))
        assert (row["top1_low"], row["top1_high"]) == pytest.approx(ends)
        assert (
            row["latency_p50_low_ms"]
            <= row["latency_p50_ms"]
            <= row["latency_p50_high_ms"]
        )
        assert all(
            np.isnan(row[f"latency_{name}_{end}_ms"])
            for name in ("p95", "p99")
            for end in ("low", "high")
        )
        checked |= (
            set(expected)
            | {"top1_low", "top1_high"}
            | {c for c in table if c.endswith(("_low_ms", "_high_ms"))}
        )
    assert checked == set(table.columns), "a column that nothing recomputes"


def test_ratios_follow_from_the_raw_rounds(done):
    """ratios.csv's Hodges-Lehmann ratio again, from the record's blocks, by loops."""
    table, record = pd.read_csv(done / "ratios.csv"), load(done, "compare")
    assert list(table.columns) == [
        "a",
        "b",
        "batch_size",
        "a_ran",
        "b_ran",
        "ratio",
        "low",
        "high",
        "samples",
        "df",
        "p",
    ]
    assert {*table.a_ran, *table.b_ran} == {"eager"}
    assert list(zip(table.a, table.b, table.batch_size, strict=True)) == [
        ("nf4-fa2", "fp32-sdpa", 1),
        ("nf4-fa2", "fp32-sdpa", 3),
    ]
    for row in table.itertuples():
        blocks = record["blocks_ms"][str(row.batch_size)]
        logs = [
            math.log(np.median(a) / np.median(b))
            for a, b in zip(blocks[row.a], blocks[row.b], strict=True)
        ]
        walsh = [
            (logs[i] + logs[j]) / 2
            for i in range(len(logs))
            for j in range(i, len(logs))
        ]
        assert row.samples == len(logs) == 20 and row.ratio == pytest.approx(
            math.exp(np.median(walsh))
        )
        assert row.low < row.ratio < row.high


def test_answers_follow_from_the_raw_logits(done):
    table, record = (
        pd.read_csv(done / "accuracy.csv").set_index("variant"),
        load(done, "compare"),
    )
    base, other = (
        np.load(done / "logits" / f"evaluate-{name}.npy").astype(float)
        for name in ("fp32-sdpa", "nf4-fa2")
    )
    p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (base, other))
    kl = (p * np.log(p / q)).sum(1)
    assert record["answers"]["nf4-fa2"]["kl_by_image"] == pytest.approx(
        kl, rel=1e-3, abs=1e-9
    )
    assert table.kl["nf4-fa2"] == pytest.approx(kl.mean(), rel=1e-3)
    labels = np.array(load(done, "evaluate-nf4-fa2")["predictions"]["labels"])
    assert table.points["nf4-fa2"] == pytest.approx(
        100 * ((other.argmax(1) == labels).mean() - (base.argmax(1) == labels).mean())
    )


def test_throughput_and_latency_agree(done):
    """Images per second over the whole loop can be no higher than the samples allow."""
    for name in ("evaluate-fp32-sdpa", "evaluate-nf4-fa2"):
        for timing in load(done, name)["timings"]:
            samples = timing["device_ms"] or timing["host_ms"]
            busy = sum(samples) / 1e3
            assert (
                0.5
                < timing["images_per_second"]
                / (timing["batch_size"] * len(samples) / busy)
                <= 1.0
            )


def test_attention_that_ran(done):
    assert [
        load(done, "evaluate-nf4-fa2")["traces"][i]["attention_ran"] for i in (0, 1)
    ] == ["flash-cpu"] * 2


def test_a_second_run_makes_nothing_and_a_lost_record_is_made_again(done):
    before = times_of_files(done)
    assert vitnb("study", yaml_of(done), outputs=done.parent).returncode == 0
    assert times_of_files(done) == before
    lost = done / "records" / "infer.json"
    lost.unlink()
    ended = vitnb("study", yaml_of(done), outputs=done.parent)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    made = {path for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert {path.relative_to(done).as_posix() for path in made} == {
        "records/infer.json",
        "notebooks/infer-nf4-sdpa.ipynb",
        "predictions.csv",
        "report.html",
        "summary.csv",
        "accuracy.csv",
        "claims.csv",
        "sensitivity.csv",
        *FIGURES,
    }


def test_without_a_variant_s_record_the_comparison_is_made_again_too(done):
    """Its answers are the variants' own."""
    record = done / "records" / "evaluate-nf4-fa2.json"
    aside = record.rename(done.parent / record.name)
    try:
        planned = vitnb("study", yaml_of(done), "--dry-run", outputs=done.parent)
    finally:
        aside.rename(record)
    assert planned.returncode == 0, planned.stderr
    jobs = {
        line.split()[0]
        for line in planned.stdout.splitlines()
        if re.fullmatch(r"\w+ +1", line)
    }
    assert jobs == {"evaluate", "compare", "report", "all"}


def test_one_seed_gives_the_same_predictions_byte_for_byte(done, mini_yaml, tmp_path):
    for words in (["run", "finetune"], ["run", "infer"]):
        ended = vitnb(*words, "-p", "study", str(mini_yaml), outputs=tmp_path)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (tmp_path / "mini" / "predictions.csv").read_bytes() == (
        done / "predictions.csv"
    ).read_bytes()


def test_a_record_of_another_checkpoint_is_left_out(done, mini_yaml):
    """A number belongs to its model: after another fine-tuning its row is empty."""
    path = done / "records" / "finetune.json"
    kept = path.read_text()
    try:
        changed = json.loads(kept)
        changed["checkpoint_sha256"]["nf4"] = "0" * 64
        path.write_text(json.dumps(changed))
        assert vitnb("report", str(mini_yaml), outputs=done.parent).returncode == 0
        table = pd.read_csv(done / "summary.csv").set_index("variant")
        assert (
            set(table.loc["nf4-fa2"].status) == {"outdated"}
            and table.loc["nf4-fa2"].top1.isna().all()
        )
        assert "another checkpoint" in table.loc["nf4-fa2"].reason.iloc[0]
        assert set(table.loc["fp32-sdpa"].status) == {"ok"}
        assert "another checkpoint" in (done / "report.html").read_text()
    finally:
        path.write_text(kept)
        assert vitnb("report", str(mini_yaml), outputs=done.parent).returncode == 0


def test_what_is_left_of_a_removed_plan_goes_with_the_next_report(
    done, mini_yaml, monkeypatch
):
    monkeypatch.setenv("VITNB_OUTPUTS", str(done.parent))
    before = {path for path in done.rglob("*") if path.is_file()}
    for name in ("plan-gone.csv", "figures/curve-plan-gone.png"):
        (done / name).write_text("of a plan whose record was removed")
    write_report(load_study(str(mini_yaml)))
    assert {path for path in done.rglob("*") if path.is_file()} == before


def test_show_prints_where_a_number_came_from(done):
    ended = vitnb(
        "show", str(done / "records" / "evaluate-nf4-fa2.json"), outputs=done.parent
    )
    assert ended.returncode == 0, ended.stderr
    lines = dict(line.split(": ", 1) for line in ended.stdout.splitlines())
    record = load(done, "evaluate-nf4-fa2")
    assert (
        lines["machine.commit"] == record["machine"]["commit"]
        or not record["machine"]["commit"]
    )
    assert lines["machine.dirty"] == str(record["machine"]["dirty"]) and lines[
        "machine.gpu_uuid"
    ] in (
        "-",
        record["machine"]["gpu_uuid"],
    )
    assert (
        lines["versions.torch"] == record["versions"]["torch"]
        and lines["asked.seed"] == "0"
        and lines["study"] == "mini"
    )
    assert (
        lines["asked.variant"] == "nf4-fa2"
        and lines["traces[0].attention_ran"] == record["traces"][0]["attention_ran"]
    )
    samples = len(
        record["timings"][0]["host_ms"]
    )  # 24, or fewer where another program slows the machine down
    assert (
        lines["timings[0].host_ms"].startswith(f"[{samples} values, ")
        and 20 <= samples <= 24
    )
    for name, text in (
        ("evaluate-nf4-fa", "no record"),
        (str(done / "summary.json"), "no record at"),
        (str(done / "report.html"), "no record"),
    ):
        ended = vitnb("show", name, outputs=done.parent)
        assert (
            ended.returncode == 1
            and text in ended.stderr
            and len(ended.stderr.splitlines()) == 1
        )
