"""README.md and docs/*.md: numbers follow from published records, links resolve.

Each function under ``@fact`` computes sentences from records; a page must hold them.
Any other number on a page must be listed in ``STATED``, as a setting and no result.
"""

import functools
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import mutants
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from vitnb import statistics
from vitnb.analysis import (
    accuracy,
    claims,
    comparison,
    plan_validation,
    sensitivity,
    summary,
    waterfall,
)
from vitnb.records import files
from vitnb.records.schema import upgrade
from vitnb.study import PEERS, Compare, load_study, study_names

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "outputs" / "published"
EMBEDDED = RESULTS / "embedded"
WITHOUT_BF16 = RESULTS / "embedded-without-bf16"
INSTRUMENT = RESULTS / "instrument"
ON_GPU = RESULTS / "vit-l16-garden"
QLORA = RESULTS / "vit-l16-qlora"
PHOTOGRAPHS = RESULTS / "vit-s14-flowers5"
EARLIER = RESULTS / "vit-s14-flowers5-earlier"
TWO_GPUS = RESULTS / "vit-s14-flowers5-two-gpus"
ON_CPU = RESULTS / "vit-s14-flowers5-cpu"

PATHS = {
    path.stem: path
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
# Without line breaks: a phrase may be wrapped anywhere.
TEXT = {page: " ".join(path.read_text().split()) for page, path in PATHS.items()}

MAX_README_LINES = 110
MAX_PAGE_WORDS = 1000
MAX_COLUMNS = 8

# Numbers that are no results: settings, versions, limits of the code, dates. Each
# phrase must still stand on its page.
STATED = {
    "README": [
        "Python 3.11.4 or newer",
        "(about 2 GB)",
        "New York University, 2025",
    ],
    "results-cpu": [
        "102 species",
        "800 other drawn species",
        "with its 99.8% interval; above 1 is slower",
    ],
    "results-gpu": [
        "images of 224 pixels",
        "102 other species",
        "25 minutes that were planned",
        "for 1, 8, 32 and 128 images",
        "Layer 0 alone",
    ],
    "results-photographs": [],
    "measurement": [
        "One MB is 2²⁰ bytes",
        "have 95% bootstrap intervals",
        "Intervals are exact, at 95%",
        "in 14 configurations",
    ],
    "mixed-precision": [
        "This allows 12% more bytes",
        "by step 1 alone",
    ],
    "variants": [
        "outlier threshold 6",
        "(threshold 0)",
        "An Image is Worth 16x16 Words",
    ],
    "data": [
        "the official 1020, 1020 and 6149 images",
        "70% train, 15% valid, 15% test",
        "1, 10, 100, 2",
        "if the files exceed 1 GB",
        "over 89 million pixels",
        "fetches 330 MB",
        "102 species of flowers from a seed, the same on every machine: 10 training, "
        "10 validation and 20 test images",
    ],
    "troubleshooting": [
        "holds 1, or nearly",
        "about 20 minutes on 2 CPU cores, timed by hand",
    ],
}

# Names and widths with digits, numbers of list items, references.
NOT_RESULTS = re.compile(
    r"arXiv:[\d.]+|\b(?:ICLR|ICVGIP|NeurIPS) \d{4}"
    r"|\b[A-Za-z]+(?:[-/]?[A-Za-z]*[-/])?\d+\w*(?:-[A-Z]+\d+)?"
    r"|\b(?:(?:4|8|16) (?:and|or) )?(?:1|4|8|16|32)(?:-bit| bits?)\b"
    r"|\bbatch (?:size )?\d+\b"
)


def read_record(name: str, folder: Path = EMBEDDED) -> dict:
    return upgrade(json.loads((folder / "records" / f"{name}.json").read_text()))


def record_names(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "records").iterdir()}


def evaluate_records(folder: Path = EMBEDDED) -> list[dict]:
    return [
        upgrade(json.loads(path.read_text()))
        for path in sorted((folder / "records").glob("evaluate-*.json"))
    ]


def read_csv(file) -> pd.DataFrame:
    return pd.read_csv(file, keep_default_na=False, na_values=[""])


def published_table(name: str, folder: Path = EMBEDDED) -> pd.DataFrame:
    return read_csv(folder / name)


def as_published(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table as it reads after it was written as CSV."""
    cells = table.map(files.escape_formula)
    return read_csv(io.StringIO(cells.to_csv(index=False)))


def assert_equal_tables(found: pd.DataFrame, wanted: pd.DataFrame) -> None:
    """Compare cell by cell; blanks and nothing are equal."""
    assert list(found.columns) == list(wanted.columns) and len(found) == len(wanted)
    for name in wanted:
        for a, b in zip(found[name], wanted[name], strict=True):
            if b is None or b == "" or b != b:
                assert a == "" or a != a, name
            else:
                assert a == (
                    pytest.approx(b, rel=1e-9) if isinstance(b, float) else b
                ), name


def ratios_of(folder: Path, baseline: str = "fp32-sdpa") -> pd.DataFrame:
    """Return published ratios to a baseline, indexed by variant and batch size."""
    table = comparison.ratios_to_baseline(
        published_table("ratios.csv", folder), baseline
    )
    return table.set_index(["variant", "batch_size"])


# --- The published tables follow from the published records ---


def remake_tables(folder: Path) -> dict[str, pd.DataFrame]:
    """Make the published tables again, from the published records alone."""
    names = record_names(folder)
    compared = read_record("compare", folder) if "compare" in names else None
    ablated = read_record("ablate", folder)
    plans = [read_record(name, folder) for name in names if name.startswith("plan-")]
    records = [read_record(name, folder) for name in names]
    records.sort(key=lambda record: record["started"])
    table = summary.summarize_records(records)
    ratios = pd.DataFrame(columns=comparison.RATIO_COLUMNS)
    found = {
        "summary.csv": table,
        "ablation.csv": sensitivity.sensitivity_table(ablated["rows"]),
    }
    if {row["kept"] for row in ablated["rows"]} & {
        f"{sensitivity.ONLY}layer 0"
    }:  # in both directions
        found["sensitivity.csv"] = sensitivity.part_effects(ablated["rows"])
    for plan in plans:
        found[f"{plan['name']}.csv"] = plan_validation.trade_off(
            plan["curve"], plan["plan"]["uniform_bytes"]
        )
    if compared:
        ratios = comparison.ratio_table(compared)
        found |= {"ratios.csv": ratios, "times.csv": comparison.time_table(compared)}
    if "waterfall" in names:
        found["waterfall.csv"] = waterfall.waterfall_table(
            read_record("waterfall", folder)
        )
    answers = accuracy.compare_devices(evaluate_records(folder), compared)
    measured = claims.measured_claims(table, ratios, answers, ablated)
    return found | {
        "accuracy.csv": answers,
        "claims.csv": claims.claim_verdicts(measured),
    }


@pytest.mark.parametrize(
    ("folder", "rows"),
    [(EMBEDDED, 14), (ON_GPU, 36), (PHOTOGRAPHS, 10)],
    ids=lambda it: getattr(it, "name", ""),
)
def test_the_published_tables_follow_from_the_published_records(folder, rows):
    found = remake_tables(folder)
    assert {path.name for path in folder.glob("*.csv")} == set(found)
    for name, table in found.items():
        assert_equal_tables(published_table(name, folder), as_published(table))
    assert len(found["summary.csv"]) == rows and set(found["summary.csv"].status) == {
        "ok"
    }


def test_a_plan_without_a_whole_study_follows_from_its_record():
    made = read_record("plan-plus12", ON_CPU)
    table = plan_validation.trade_off(made["curve"], made["plan"]["uniform_bytes"])
    assert_equal_tables(published_table("plan-plus12.csv", ON_CPU), as_published(table))


def test_every_published_record_says_where_it_comes_from():
    names = record_names(EMBEDDED)
    assert {"finetune", "ablate", "infer", "compare"} < names
    for name in names:
        record = read_record(name)
        assert (
            len(record["machine"]["commit"]) == 40
            and record["machine"]["dirty"] is False
        ), name
        assert (
            record["machine"]["cpu"]
            and record["versions"]["torch"]
            and record["study_asked"]["name"] == "embedded"
        )


def test_the_records_of_the_gpu_are_of_one_code_and_one_kind_of_gpu():
    codes = set()
    for folder in (ON_GPU, QLORA):
        for name in record_names(folder):
            record = read_record(name, folder)
            assert (
                record["machine"]["gpu"] == "NVIDIA H200"
                and record["study_asked"]["name"] == folder.name
            )
            codes.add(record["machine"]["code_sha256"])
    assert len(codes) == 1


def test_the_records_of_the_photographs_are_of_one_code():
    code = read_record("finetune", PHOTOGRAPHS)["machine"]["code_sha256"]
    for name in record_names(PHOTOGRAPHS):
        record = read_record(name, PHOTOGRAPHS)
        machine = record["machine"]
        assert (
            machine["gpu"] == "NVIDIA H200"
            and machine["dirty"] is False
            and record["study"] == PHOTOGRAPHS.name
        )
        assert machine["code_sha256"] == code


def first_rows(folder: Path) -> pd.DataFrame:
    """Return the summary's first row of each variant, by its name."""
    table = published_table("summary.csv", folder)
    return table.drop_duplicates("variant").set_index("variant")


# --- Tables of the pages ---


def markdown_tables(page: str) -> list[list[list[str]]]:
    """Return the tables of a page: rows of cells, the header first."""
    found, rows = [], []
    for line in [*PATHS[page].read_text().splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif rows:
            found.append([rows[0], *rows[2:]])
            rows = []
    return found


def table_under(page: str, *header: str) -> list[list[str]]:
    """Return the rows of the one table whose header begins like this."""
    (rows,) = (
        rows
        for first, *rows in markdown_tables(page)
        if tuple(first[: len(header)]) == header
    )
    return [[cell.strip("`") for cell in row] for row in rows]


# Tables that are compared with records as wholes: (page, first cells of the header).
RESULT_TABLES = {
    ("results-cpu", "variant", "top-1"),
    ("results-cpu", "variant", "disk MB"),
    ("results-gpu", "variant", "top-1"),
    ("results-photographs", "variant", "time relative to fp32, batch 1"),
}


@pytest.mark.parametrize("page", PATHS)
def test_no_table_is_too_wide_and_none_is_ragged(page):
    for table in markdown_tables(page):
        assert {len(row) for row in table} == {len(table[0])} and len(
            table[0]
        ) <= MAX_COLUMNS, table[0]


def test_the_tables_of_the_cpu_are_the_published_ones():
    table, ratios = published_table("summary.csv"), ratios_of(EMBEDDED)
    small, large = sorted(set(table.batch_size))
    times, sizes = (
        table_under("results-cpu", "variant", "top-1"),
        table_under("results-cpu", "variant", "disk MB"),
    )
    names = list(dict.fromkeys(table.variant))
    assert (
        sorted(row[0] for row in times)
        == sorted(row[0] for row in sizes)
        == sorted(names)
    )
    for name, *cells in times:
        rows = table[table.variant == name].set_index("batch_size")
        wanted = [f"{rows.top1[small]:.3f}", rows.attention_ran[small]]
        wanted += [f"{rows.latency_p50_ms[size]:.1f}" for size in (small, large)]
        if name == "fp32-sdpa":
            wanted += ["1", "1"]
        else:
            beside = [ratios.loc[name, size] for size in (small, large)]
            wanted += [f"{r.ratio:.2f} ({r.low:.2f} to {r.high:.2f})" for r in beside]
        assert cells == wanted
    for name, *cells in sizes:
        first = table[table.variant == name].iloc[0]
        assert cells == [f"{first.disk_mb:.2f}", f"{first.resident_mb:.2f}"]


def test_the_table_of_the_gpu_is_the_published_one():
    table = published_table("summary.csv", ON_GPU)
    times = published_table("times.csv", ON_GPU)
    p50 = times.set_index(["variant", "batch_size"]).p50_ms
    faster = 1 / ratios_of(ON_GPU).ratio
    rows = table_under("results-gpu", "variant", "top-1")
    assert [row[0] for row in rows] == list(times.variant.unique())
    for name, top1, kernel, *cells, memory in rows:
        assert cells == [
            f"{p50[name, size]:.2f} ({faster[name, size]:.1f}x)"
            for size in (1, 8, 32, 128)
        ]
        if name in PEERS:
            assert (top1, kernel, memory) == ("", "", "")
            continue
        first = table[table.variant == name].iloc[0]
        assert (top1, kernel) == (f"{first.top1:.3f}", first.attention_ran)
        scratch = f" + {first.scratch_mb:.0f}" if first.scratch_mb else ""
        assert memory == f"{first.resident_mb:.1f}{scratch}"


def test_the_table_of_the_photographs_is_the_published_one():
    ratio = ratios_of(PHOTOGRAPHS).ratio
    rows = table_under(
        "results-photographs", "variant", "time relative to fp32, batch 1"
    )
    assert {row[0] for row in rows} == {"nf4-sdpa", "bf16-sdpa"}
    for name, *cells in rows:
        assert cells == [f"{ratio[name, size]:.2f}" for size in (1, 32)]


# --- Sentences of the pages: each function yields (page, phrase) from records ---

Fact = tuple[str, str]
FACTS: dict[str, Callable[[], list[Fact]]] = {}


def fact(source: Callable[[], Iterator[Fact]]) -> Callable[[], list[Fact]]:
    """Register a function that yields phrases; it runs once."""
    FACTS[source.__name__] = functools.cache(lambda: list(source()))
    return FACTS[source.__name__]


@fact
def the_embedded_study():
    records = [read_record(name) for name in record_names(EMBEDDED)]
    machines = {(one["machine"]["cpu"], one["machine"]["threads"]) for one in records}
    assert machines == {("AMD EPYC", 2)}
    seconds = [one["seconds"] for one in records if one["notebook"] != "plan"]
    yield (
        "README",
        f"On 2 CPU cores, the stages of `make study` took {sum(seconds) / 60:.0f} "
        "minutes by their own records",
    )
    yield "README", "on 2 CPU cores. Time is relative to"
    ratio, table = ratios_of(EMBEDDED).ratio, first_rows(EMBEDDED)
    slower = f"takes {ratio['nf4-sdpa', 1]:.2f} times as long as fp32."
    yield "README", f"On 2 CPU cores, a 4-bit forward of one image {slower}"
    (parameters,) = set(table.parameters)
    yield "results-cpu", f"a ViT with {parameters / 1e6:.1f} million parameters"
    yield "results-cpu", f"Top-1 is on {table.images['fp32-sdpa']:,} test images"
    smaller = table.disk_mb["fp32-sdpa"] / table.disk_mb["nf4-sdpa"]
    yield "results-cpu", f"The checkpoint is {smaller:.1f} times smaller than fp32"
    assert 1.45 < ratio["nf4-sdpa", 1] < 1.55  # "half as long again"
    assert 0.9 < ratio["nf4-sdpa", 16] < 0.98  # "a few percent less"
    assert ratio["bf16-sdpa", 16] < 0.75  # "over a quarter less"
    yield (
        "results-cpu",
        "A trained head on the frozen base reaches "
        f"{read_record('finetune')['floors']['probe']:.3f}",
    )
    answers = published_table("accuracy.csv").set_index("variant")
    assert_none_differs(answers)
    assert answers.top1.min() == answers.top1["nf4-sdpa"]
    yield "results-cpu", f"gives it p = {answers.p_corrected['nf4-sdpa']:.2f}"


@fact
def the_source_study():
    ledger = claims.load_claims()
    yield (
        "results-cpu",
        f"each of the {len(ledger)} numbers that the source study published",
    )
    reduction = ledger[
        (ledger.metric == "latency_reduction") & (ledger.variant == "nf4-fa2")
    ].value.max()
    yield (
        "results-cpu",
        f"a 4-bit variant that takes {reduction:.1f}% less time than fp32",
    )
    slides = ledger[
        (ledger.source == "slides") & (ledger.table == "Final benchmark table")
    ]
    mean = slides[slides.metric == "latency_mean"].set_index("variant").value
    yield (
        "results-cpu",
        f"one that takes {mean['nf4-sdpa'] / mean['fp32-sdpa']:.1f} times as long",
    )


@fact
def a_cpu_without_bf16():
    compared = read_record("compare", WITHOUT_BF16)
    machine = compared["machine"]
    assert machine["dirty"] is False and compared["study_asked"]["name"] == "embedded"
    assert machine["cpu"].startswith("Intel(R) Xeon") and machine["threads"] == 2
    table = comparison.ratios_to_baseline(comparison.ratio_table(compared))
    ratio = table.query("batch_size == 16").set_index("variant").ratio
    yield (
        "results-cpu",
        "On 2 cores of an Intel Xeon without them, 16 bits take "
        f"{ratio['bf16-sdpa']:.2f} times as long as fp32 "
        f"at batch 16, and NF4 takes {ratio['nf4-sdpa']:.2f} times as long",
    )


def assert_none_differs(answers: pd.DataFrame) -> None:
    """Check that no variant was called better or worse than fp32."""
    without = ("the baseline", "no difference beyond noise", "too few images differ")
    assert answers.verdict.str.startswith(without).all()


def join_numbers(values: list[float]) -> str:
    *first, last = [f"{value:.2f}" for value in values]
    return f"{', '.join(first)} and {last}"


@fact
def times_on_the_gpu():
    page, steps = "results-gpu", published_table("waterfall.csv", ON_GPU)
    half, nf4, fp8 = (f"{weights}-sdpa-fused" for weights in ("bf16", "nf4", "fp8"))

    def times_faster(baseline: str, variant: str) -> list[float]:
        return list(ratios_of(ON_GPU, variant).ratio[baseline].sort_index())

    gain = times_faster("fp32-sdpa", nf4)[0]
    yield (
        "README",
        f"On an H200, 4-bit ViT-L/16 becomes {gain:.1f} times as fast as fp32 for one "
        "image",
    )
    yield page, f"are {gain:.1f} times as fast as fp32**, with a seventh of the memory"
    first = first_rows(ON_GPU)
    held = first.resident_mb[nf4] + first.scratch_mb[nf4]
    assert round(first.resident_mb["fp32-sdpa"] / held) == 7  # "a seventh"
    assert round(2 * times_faster("fp32-sdpa", "nf4-sdpa")[0]) == 1  # "half as fast"
    assert times_faster("fp32-sdpa", half)[0] > gain  # "16 bits gain even more"
    yield page, f"with {first.parameters['fp32-sdpa'] / 1e6:.0f} million parameters"
    yield (
        page,
        f"4 bits take {join_numbers(times_faster(nf4, half))} times as long as 16 "
        "bits with the same launch",
    )
    yield (
        page,
        f"weights and activations are {join_numbers(times_faster(half, fp8))} times "
        "as fast as those",
    )
    yield (
        page,
        f"16 bits are {join_numbers(times_faster('timm-compile', half))} times as "
        "fast as timm",
    )
    yield (
        page,
        f"Float8 is {join_numbers(times_faster('torchao-fp8-compile', fp8))} times as "
        "fast as torchao's",
    )
    steps = steps[(steps.ladder == "4 bits") & (steps.batch_size == 1)]
    whole = steps.total_gain.iloc[-1]
    yield page, f"The waterfall below gives {whole:.1f} times"
    graph = steps[steps.variant == "nf4-sdpa-graph"]
    yield (
        page,
        f"4-bit forward of one image {graph.gain.item():.0f} times as fast as it was",
    )
    table = published_table("summary.csv", ON_GPU).query("variant == @half")
    share = table.set_index("batch_size").matmul_share
    yield (
        page,
        f"16 bits reach {share[32]:.0%} of the largest measured product's speed at "
        f"batch 32, and {share[128]:.0%} at batch 128",
    )


@fact
def time_of_the_whole_gpu_study():
    page, compared = "results-gpu", read_record("compare", ON_GPU)
    ratios = ratios_of(ON_GPU)
    seconds = [read_record(name, ON_GPU)["seconds"] for name in record_names(ON_GPU)]
    tuning = sum(
        first["torchao-fp8-compile"]["first_seconds"]
        for first in compared["warm_up"].values()
    )
    whole, comparing = f"{sum(seconds) / 60:.0f}", f"{compared['seconds'] / 60:.0f}"
    yield page, f"stages' records add up to {whole} minutes"
    yield page, f"The comparison takes {comparing} of the {whole} minutes"
    yield page, f"its tuning take {tuning / 60:.0f} of these {comparing}"
    yield (
        page,
        "Intervals of ratios to fp32 are up to "
        f"{((ratios.high - ratios.low) / ratios.ratio).max():.0%} wide",
    )
    waterfall = read_record("waterfall", ON_GPU)
    machines = [record["machine"] for record in (waterfall, compared)]
    assert machines[0]["gpu_uuid"] != machines[1]["gpu_uuid"]
    yield (
        page,
        "in another process on another GPU, with "
        f"{machines[0]['threads']} threads instead of {machines[1]['threads']}",
    )
    evaluated = evaluate_records(ON_GPU)
    loads = [
        timing["before"]["load_1min"] for one in evaluated for timing in one["timings"]
    ]
    (cores,) = {one["machine"]["cores"] for one in evaluated}
    assert "load_1min" not in json.dumps(compared) + json.dumps(waterfall)
    yield (
        page,
        f"The host had {cores} cores and a load of {min(loads):.0f} to "
        f"{max(loads):.0f} during every evaluation",
    )


@fact
def answers_and_layers_on_the_gpu():
    page, ablated = "results-gpu", read_record("ablate", ON_GPU)
    kl = published_table("ablation.csv", ON_GPU).query("bits == 4").set_index("kept").kl
    removed = 1 - kl / kl["none"]
    others = [
        value
        for name, value in removed.items()
        if name.startswith("layer ") and name != "layer 0"
    ]
    assert len(others) == 23
    yield (
        page,
        "the first and the last layer of 24 in 16 bits removes "
        f"{removed['first and last']:.0%} of the KL divergence to fp32. "
        f"Layer 0 alone removes {removed['layer 0']:.0%}",
    )
    yield page, f"No other layer removes more than {max(others):.0%}"
    late, _ = sensitivity.claim_sentences(ablated["rows"], [4])
    assert "late layers are less sensitive than the others" in str(late)
    (images,) = {len(row["kl_by_image"]) for row in ablated["rows"]}
    yield page, f"The measurement on {images:,} images took {ablated['seconds']:.0f} s"
    table = published_table("accuracy.csv", ON_GPU)
    assert_none_differs(table)
    yield page, f"beyond noise** on {table.images.max():,} test images"
    yield (
        "README",
        f"On {table.images.max():,} test images, no variant of ViT-L/16 differs from "
        "fp32 beyond noise. At most "
        f"{(table.only_baseline_right + table.only_variant_right).max():.0f} images "
        "are right in one of the two alone",
    )
    engines = read_record("compare", ON_GPU)["engines"]
    (spacing,) = {row["spacing"] for row in engines}
    assert all(row["gap"] <= spacing for row in engines)
    yield (
        page,
        f"Their logits differ by {max(row['largest'] for row in engines):.2f} at most, "
        f"where neighbouring 16-bit numbers lie {spacing:.4f} apart",
    )
    yield (
        page,
        f"That gives {engines[0]['changed']} and {engines[1]['changed']} images "
        "another first class",
    )


@fact
def qlora_beside_lora():
    lora, qlora = read_record("finetune", ON_GPU), read_record("finetune", QLORA)
    assert (lora["base_precision"], qlora["base_precision"]) == ("fp32", "nf4")
    for record in (lora, qlora):
        assert record["study_asked"]["finetune"]["batch_size"] == 32
    evaluated = [read_record("evaluate-fp32-sdpa", one) for one in (QLORA, ON_GPU)]
    top1 = [accuracy.scores(record["predictions"])["top1"] for record in evaluated]
    peaks = [record["training"]["peak_bytes"] / 2**30 for record in (qlora, lora)]
    yield "results-gpu", f"ended at top-1 {top1[0]:.3f} against LoRA's {top1[1]:.3f}"
    yield (
        "results-gpu",
        f"peak was {peaks[0]:.1f} GiB instead of {peaks[1]:.1f} GiB, at batch 32",
    )


def plan_phrase(made: dict) -> tuple[str, str]:
    """Return two phrases: what a plan cuts on held-out images, and what it beats."""
    found, plan = plan_validation.validate(made), made["plan"]
    assert found["met"] and found["random"] == 20
    return (
        f"{plan['extra_bytes'] / plan['uniform_bytes']:.1%} more bytes than uniform "
        "NF4 cut the KL divergence by "
        f"{found['cut']:.1%} ({found['low']:.1%} to {found['high']:.1%}) on the "
        f"{found['images']} images that did not choose it",
        f"beats {found['beaten']} of 20 random plans",
    )


@fact
def the_plan_of_the_embedded_study():
    page, made = "mixed-precision", read_record("plan-plus12")
    found, plan = plan_validation.validate(made), made["plan"]
    assert found["met"] and list(plan["widths"].values()) == [16] * 4
    layers = {made["parts"][name].rpartition(" ")[0] for name in plan["widths"]}
    assert layers == {"layer 0", "layer 1"}
    yield (
        page,
        f"These are {plan['extra_bytes'] / plan['uniform_bytes']:.1%} more bytes than "
        "uniform NF4",
    )
    yield (
        page,
        f"On the {found['images']:,} test images it cuts the KL divergence to fp32 by "
        f"{found['cut']:.1%} "
        f"({found['low']:.1%} to {found['high']:.1%}). It beats {found['beaten']} of "
        "20 random plans; "
        f"the best random plan cuts {found['best_random']:.1%}",
    )
    yield page, f"at least {plan_validation.TARGET:.0%} and beat every random plan"
    yield page, f"with {found['random']} random plans of the same bytes"
    rows = read_record("ablate")["rows"]
    kl = {row["kept"]: row["kl"] for row in rows if row["bits"] == 4}
    assert sum(name.startswith("layer ") for name in kl) == 12
    yield (
        page,
        "the first and the last layer of 12 removes "
        f"{1 - kl['first and last'] / kl['none']:.0%} of the KL divergence",
    )
    late, ends = sensitivity.claim_sentences(rows, [4])
    assert "does not hold here: it matters" in str(ends)
    assert "no difference beyond noise between late layers and the others" in str(late)
    photographs = plan_validation.validate(read_record("plan-plus12", PHOTOGRAPHS))
    yield (
        page,
        "on photographs](results-photographs.md) cuts the KL divergence by "
        f"{photographs['cut']:.1%}",
    )


@fact
def training_on_photographs():
    page, trained = "results-photographs", read_record("finetune", PHOTOGRAPHS)
    earlier, images = read_record("finetune", EARLIER), trained["images"]
    held_out = plan_validation.validate(read_record("plan-plus12", PHOTOGRAPHS))
    yield page, f"uses {images['train']:,} photographs"
    yield page, f"The {images['valid']} validation images also chose the epoch"
    yield page, f"the other {held_out['images']} validate it"
    (top1, seconds), (top1_alone, seconds_alone) = (
        [[seed[key] for seed in record["seeds"]] for key in ("valid_top1", "seconds")]
        for record in (trained, earlier)
    )
    assert len(top1) == len(top1_alone) == 3 and max(seconds_alone) < 60
    yield (
        page,
        f"Three seeds of LoRA name {np.mean(top1):.3f} ± {np.std(top1, ddof=1):.3f} "
        "of the validation images; "
        f"a linear probe names {trained['floors']['probe']:.3f}. Each seed took "
        f"{np.mean(seconds):.0f} s",
    )
    yield page, f"On an idle host each took {np.mean(seconds_alone):.0f} s"
    yield page, f"{np.mean(top1_alone):.3f} ± {np.std(top1_alone, ddof=1):.3f})"
    shared = read_record("finetune", TWO_GPUS)
    assert (shared["asked"]["processes"], shared["asked"]["seed"]) == (2, 0)
    assert trained["asked"]["processes"] == 1
    assert shared["machine"]["code_sha256"] == trained["machine"]["code_sha256"]
    (first,) = shared["seeds"]
    peaks = [record["training"]["peak_bytes"] / 2**30 for record in (shared, trained)]
    yield (
        page,
        f"first seed ends at {first['valid_top1']:.3f} after {first['seconds']:.0f} "
        f"s, with {peaks[0]:.1f} GiB at its peak "
        f"on each GPU instead of {peaks[1]:.1f} GiB",
    )


@fact
def quantization_of_photographs():
    page = "results-photographs"
    answers = published_table("accuracy.csv", PHOTOGRAPHS).set_index("variant")
    drawn = published_table("accuracy.csv").set_index("variant")
    # "4 bits cost more than on drawn flowers"
    assert answers.kl["nf4-sdpa"] > drawn.kl["nf4-sdpa"]
    yield (
        page,
        f"is {answers.kl['nf4-sdpa']:.4f} for uniform NF4 and "
        f"{answers.kl['int8-sdpa']:.5f} for int8. In top-1",
    )
    yield (
        page,
        f"NF4 has {answers.top1['nf4-sdpa']:.3f} and fp32 has "
        f"{answers.top1['fp32-sdpa']:.3f}",
    )
    assert_none_differs(answers)
    rows = read_record("ablate", PHOTOGRAPHS)["rows"]
    late, ends = sensitivity.claim_sentences(rows, [4])
    assert "no difference beyond noise between late layers and the others" in str(late)
    kl = {row["kept"]: row["kl"] for row in rows if row["bits"] == 4}
    yield (
        page,
        "The first and the last layer together save "
        f"{1 - kl['first and last'] / kl['none']:.0%}",
    )
    assert "does not hold here: it matters" in str(ends)
    made = read_record("plan-plus12", PHOTOGRAPHS)
    cut, beaten = plan_phrase(made)
    yield page, cut
    best = plan_validation.validate(made)["best_random"]
    yield page, f"It {beaten} of the same bytes; the best random plan cuts {best:.1%}"
    before = read_record("plan-plus12", EARLIER)
    found, uniform = plan_validation.validate(before), before["curve"][0]
    assert not found["met"]
    yield (
        page,
        f"That plan cut {found['cut']:.1%} and beat {found['beaten']} of "
        f"{found['random']} random plans",
    )
    yield page, f"add up to {uniform['predicted_kl']:.3f} of {uniform['kl']:.3f} nats"


@fact
def photographs_on_a_cpu():
    page, made = "results-photographs", read_record("plan-plus12", ON_CPU)
    trained = read_record("finetune", ON_CPU)
    for record in (trained, made):
        machine = record["machine"]
        assert record["study"] == "vit-s14-flowers5" and machine["dirty"] is False
        assert (machine["cpu"], machine["threads"]) == ("AMD EPYC", 2)
    assert made["plan"]["merged_sha256"] == trained["checkpoint_sha256"]["merged"]
    (seed,), asked = trained["seeds"], trained["asked"]
    assert asked["seeds"] == 1
    yield (
        page,
        f"One seed, {asked['epochs']} epochs in bf16 and "
        f"{trained['machine']['threads']} cores of an AMD EPYC",
    )
    yield page, f"notebook took {trained['seconds'] / 60:.0f} minutes"
    yield page, f"The model names {seed['valid_top1']:.3f} of the validation images"
    yield page, f"The linear probe of that record, {trained['floors']['probe']:.3f},"
    kl = {row["name"]: row["kl"] for row in made["curve"]}
    yield (
        page,
        f"is {kl['uniform NF4']:.4f} for uniform NF4 and {kl['uniform int8']:.5f} for "
        "int8. - A plan",
    )
    cut, beaten = plan_phrase(made)
    found = plan_validation.validate(made)
    assert found["images"] == made["images"]["valid"]
    yield page, cut
    yield page, f"It {beaten}; the best random plan cuts {found['best_random']:.1%}"


def describe_share(hits: int, count: int) -> str:
    """Return a count with its exact 95% interval (Clopper and Pearson, 1934)."""
    low, high = exact_interval(hits, count)
    return f"{hits} of {count} ({low:.1%} to {high:.1%})"


def exact_interval(hits: int, count: int) -> tuple[float, float]:
    """Return Clopper's and Pearson's 95% interval, by quantiles of the beta."""
    low = stats.beta.ppf(0.025, hits, count - hits + 1) if hits else 0.0
    high = stats.beta.ppf(0.975, hits + 1, count - hits) if hits < count else 1.0
    return float(low), float(high)


def series_of_launches(kind: str) -> pd.DataFrame:
    """Return one published series, checked to be in the setting of the study."""
    table = pd.read_csv(INSTRUMENT / f"{kind}.csv")
    study = load_study("embedded")
    budget = study.compare
    (setting,) = table[
        ["study", "names", "processes", "most_rounds", "most_seconds", "forwards"]
    ].drop_duplicates().values.tolist()  # fmt: skip
    assert setting == [
        *("embedded", len(study.variants), budget.processes),
        *(budget.rounds, budget.seconds, budget.forwards),
    ]
    assert set(table.precision) == {budget.precision}
    assert set(table.batch_size) == {1} and table.launch.is_unique
    assert set(table.level) == {statistics.PAIR_LEVEL}
    assert set(table.df) == {len(study.variants) * (budget.processes - 1)}
    assert table.code_sha256.nunique() == 1 and not table.dirty.any()
    # The rule is applied anew to the published intervals.
    called = [
        statistics.outside_margin(row.low, row.high, row.df)
        for row in table.itertuples()
    ]
    assert (table.different == called).all()
    assert (table.excludes_one == ((table.low > 1) | (table.high < 1))).all()
    return table


@fact
def equal_pairs_and_different_pairs():
    """False calls and misses, of at least 100 and 50 launches that count once each."""
    page = "measurement"
    same, slower = series_of_launches("same"), series_of_launches("slower")
    assert len(same) >= 100 and len(slower) >= 50
    called, count = int(same.different.sum()), len(same)
    below = int((same.p < 0.05).sum())
    low, high = exact_interval(below, count)
    assert low <= 0.05 <= high, "p-values are not what they say"
    _, rate = exact_interval(called, count)
    assert rate <= statistics.FALSE_CALL_RATE < rate + 0.001
    yield (
        page,
        f"**Equal pairs**: {describe_share(called, count)} were called different",
    )
    yield page, f"the stated rate is at most {100 * statistics.FALSE_CALL_RATE:.3g}%"
    without = describe_share(int(same.excludes_one.sum()), count)
    yield page, f"Without the margin {without} were"
    yield page, f"{describe_share(below, count)} have p below 0.05"
    seen = int((slower.different & (slower.ratio > 1)).sum())
    assert set(slower.extra) == {0.02} and set(same.extra) == {0.0}
    yield (
        page,
        "with 2% more work in one, "
        f"{describe_share(seen, len(slower))} were called slower",
    )


@fact
def the_rule_of_the_comparison():
    page = "measurement"
    assert (statistics.PAIR_LEVEL, statistics.PAIR_MARGIN) == (0.99, 0.0025)
    yield page, f"The interval is Student's, at {statistics.PAIR_LEVEL:.0%}"
    yield page, f"nothing below {statistics.SINGLE_MARGIN:.0%} is called"
    yield page, f"process's time is known to {Compare().precision:.1%}"
    for name in study_names():
        budget = load_study(name).compare
        assert (budget.processes, budget.precision) == (2, 0.002), name


@fact
def the_earlier_series():
    """Twenty pairs of a launch share its processes: they are no independent pairs."""
    table = pd.read_csv(INSTRUMENT / "one-launch-many-pairs" / "same.csv")
    launches = [np.log(rows.ratio) for _, rows in table.groupby("launch")]
    assert stats.f_oneway(*launches).pvalue < 1e-6
    yield "measurement", f"took {len(table)} pairs of {len(launches)} launches"


def read_gpu_times(folder: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    names = ("gpu.csv", "rounds.csv")
    return tuple(pd.read_csv(INSTRUMENT / folder / name) for name in names)


@pytest.mark.parametrize(
    ("folder", "beyond"), [("", 1), ("busy-host", 3), ("same-forwards", 7)]
)
def test_times_on_a_gpu_beside_triton(folder, beyond):
    """Published rows follow from published rounds; rows beyond 1% are counted."""
    table, rounds = read_gpu_times(folder)
    for row in table.itertuples():
        times = rounds[
            (rounds.variant == row.variant) & (rounds.batch_size == row.batch_size)
        ]
        assert len(times) == row.rounds and times.ours_ms.median() == pytest.approx(
            row.p50_ms, rel=1e-9
        )
        for found, numerator, denominator in (
            (row.over_do_bench, "ours_ms", "theirs_ms"),
            (row.do_bench_over_itself, "theirs_ms", "theirs_again_ms"),
        ):
            ratio = np.exp(np.log(times[numerator] / times[denominator]).median())
            assert found == pytest.approx(ratio, rel=1e-9)
    assert len(table) == 14 and table.code_sha256.nunique() == 1
    assert (abs(table.over_do_bench - 1) > 0.01).sum() == beyond


@fact
def times_on_a_gpu_beside_triton():
    page = "measurement"
    timelines = []
    for folder, host, first_words in (
        ("", "instrument", "within 1% in "),
        ("busy-host", "instrument/busy-host", ""),
        ("same-forwards", "instrument/same-forwards", ""),
    ):
        table, _ = read_gpu_times(folder)
        off, itself = abs(table.over_do_bench - 1), abs(table.do_bench_over_itself - 1)
        assert ((table.low < 1) & (table.high > 1))[off > 0.001].all()
        busy = table.idle_share < 0.02
        assert busy.sum() == 2 and max(off[busy].max(), itself[busy].max()) < 0.001
        assert (table.unclassified == 0).all()
        timelines.append(abs(table.timeline_ratio - 1).max())
        ours, theirs = (
            f"{(found <= 0.01).sum()} of 14 rows, and {100 * found.max():.1f}% off"
            for found in (off, itself)
        )
        yield page, f"published/{host}) | {first_words}{ours} at worst | {theirs} |"
    assert max(timelines) < 0.012
    yield page, "make up the event latency within 1.2%"
    yield page, "Every interval of a row that is more than 0.1% off holds 1"
    yield page, "In two rows the GPU hardly waits; there all are within 0.1%"
    table, _ = read_gpu_times("same-forwards")
    off = 1 - table.same_forwards
    assert (
        len(table) == 14 and (table.forwards >= 20).all() and off.between(0, 0.01).all()
    )
    yield (
        page,
        f"p50 within 1% in 14 of 14 rows, ours shorter by {100 * off.max():.1f}% at "
        "most",
    )


@fact
def percentiles_need_samples():
    from vitnb.analysis.latency import percentiles

    for name, samples in (("p95", 200), ("p99", 1000)):
        assert (
            percentiles([1.0] * samples)[name]
            and not percentiles([1.0] * (samples - 1))[name]
        )
        yield "measurement", f"the {name} needs {samples:,}"


@fact
def planted_bugs():
    page, table = "measurement", mutants.read_table()
    assert set(table.result) == {"caught"}
    commits = sorted(set(table.commit))
    at = f"at commit {commits[0]}"
    if len(commits) > 1:
        # A copy without history cannot tell the newest: the page names one of them.
        named = re.search(r"the newest ([0-9a-f]{7}\+?)", TEXT[page])
        newest = mutants.newest_commit(commits) or (named and named[1])
        assert newest in commits
        at = f"at {len(commits)} commits, the newest {newest}"
    yield page, f"The tests catch {len(table)} of {len(table)} planted bugs, {at}"
    if new := len(mutants.read_bugs()) - len(table):
        yield page, f"{new} more are listed and not planted yet"


@pytest.mark.parametrize("name", FACTS)
def test_sentences_follow_from_records(name):
    facts = FACTS[name]()
    assert facts
    for page, phrase in facts:
        assert phrase and phrase in TEXT[page], f"{page} lacks: {phrase}"


def unchecked_text(page: str) -> str:
    """Return a page without code, numbers of list items and RESULT_TABLES."""
    text = re.sub(r"```.*?```", "", PATHS[page].read_text(), flags=re.DOTALL)
    for at, *header in RESULT_TABLES:
        if at == page:
            text = re.sub(
                rf"^\| {re.escape(' | '.join(header))} .*?\n\n",
                "",
                text,
                count=1,
                flags=re.DOTALL | re.MULTILINE,
            )
    return " ".join(re.sub(r"^\s*\d\. ", "", text, flags=re.MULTILINE).split())


@pytest.mark.parametrize("page", PATHS)
def test_no_other_number_stands_on_a_page(page):
    """A number that is no fact and not STATED follows from no record."""
    left = unchecked_text(page)
    phrases = [phrase for name in FACTS for at, phrase in FACTS[name]() if at == page]
    for phrase in STATED.get(page, []):
        assert phrase in TEXT[page], f"{page} no longer says: {phrase}"
        phrases.append(phrase)
    for phrase in sorted(phrases, key=len, reverse=True):
        left = left.replace(phrase, " ")
    left = re.sub(r"`[^`]*`", " ", left)
    left = re.sub(r"\]\([^)]*\)", "] ", left)
    left = NOT_RESULTS.sub(" ", left)
    assert not re.findall(r".{0,30}\d[\d.,]*%?.{0,15}", left)


# --- Shape: one screen, short pages, links, the tree ---


def test_the_readme_is_one_screen():
    assert 80 <= len(PATHS["README"].read_text().splitlines()) <= MAX_README_LINES


@pytest.mark.parametrize("page", [page for page in PATHS if page != "README"])
def test_a_page_reads_in_five_minutes(page):
    assert len(re.findall(r"\S*\w\S*", PATHS[page].read_text())) <= MAX_PAGE_WORDS


def heading_anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in headings
    }


@pytest.mark.parametrize(
    "path", [*PATHS.values(), ROOT / "CONTRIBUTING.md"], ids=lambda path: path.stem
)
def test_every_relative_link_resolves(path):
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if re.match(r"[a-z]+://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists() and file.is_relative_to(ROOT), target
        assert not anchor or anchor in heading_anchors(file), target


def test_every_page_is_linked_from_the_readme():
    for page, path in PATHS.items():
        assert (
            page == "README"
            or f"({path.relative_to(ROOT).as_posix()})" in TEXT["README"]
        ), page


def rooms() -> set[str]:
    """Return the folders of the package, relative to it."""
    package = ROOT / "vitnb"
    return {
        path.parent.relative_to(package).as_posix() for path in package.rglob("*.py")
    } - {"."}


def test_the_tree_is_the_real_one():
    tree = PATHS["README"].read_text().partition("## The tree")[2].split("```")[1]
    found, above = set(), []
    for indent, name in re.findall(r"^( +)(\w+)/ ", tree, flags=re.MULTILINE):
        above = [*above[: len(indent) // 2 - 1], name]
        found.add("/".join(above))
    assert found == rooms()
    below = tree.partition("the wall")[2]
    assert set(re.findall(r"^  (\w+)/ ", below, flags=re.MULTILINE)) == {
        "analysis",
        "figures",
        "report",
    }
    for name in tree.strip().splitlines()[-1].split():
        assert (ROOT / name).is_dir(), name


def test_the_architecture_has_a_line_for_each_module():
    text = PATHS["architecture"].read_text().partition("## Modules")[2]
    found, room = set(), ""
    for line in text.splitlines():
        if heading := re.match(r"`([\w/]+)`.*:$|Top folder:$", line):
            room = f"{heading[1]}/" if heading[1] else ""
        elif module := re.match(r"- `(\w+)`: ", line):
            found.add(f"{room}{module[1]}")
    package = ROOT / "vitnb"
    modules = {
        path.relative_to(package).with_suffix("").as_posix()
        for path in package.rglob("*.py")
    }
    assert found == {name for name in modules if not name.endswith("__")}


def test_the_notebooks_of_the_readme_are_all_of_them():
    listed = re.findall(
        r"^\| \[(\w+)\]\(notebooks/", PATHS["README"].read_text(), flags=re.MULTILINE
    )
    assert (
        sorted(listed)
        == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
        and len(listed) == 5
    )
