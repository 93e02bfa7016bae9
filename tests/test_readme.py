"""The README's numbers are those of the published files, and these follow from the published records."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from vitnb import ablate, accuracy, claims, compare, depth, intervals, proof, studies, summary, waterfall

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "outputs" / "published" / "embedded"
WITHOUT_BF16 = ROOT / "outputs" / "published" / "embedded-without-bf16"
INSTRUMENT = ROOT / "outputs" / "published" / "instrument"
ON_GPU = ROOT / "outputs" / "published" / "vit-l16-garden"
QLORA = ROOT / "outputs" / "published" / "vit-l16-qlora"
PHOTOGRAPHS = ROOT / "outputs" / "published" / "vit-s14-flowers5"
EARLIER = ROOT / "outputs" / "published" / "vit-s14-flowers5-earlier"
TWO_GPUS = ROOT / "outputs" / "published" / "vit-s14-flowers5-two-gpus"
ON_CPU = ROOT / "outputs" / "published" / "vit-s14-flowers5-cpu"
README = (ROOT / "README.md").read_text()


def record(name: str, folder: Path = PUBLISHED) -> dict:
    return json.loads((folder / "records" / f"{name}.json").read_text())


def evaluated(folder: Path = PUBLISHED) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((folder / "records").glob("evaluate-*.json"))]


def same(found: pd.DataFrame, wanted: pd.DataFrame) -> None:
    """Cell by cell; blanks and nothing are the same."""
    assert list(found.columns) == list(wanted.columns) and len(found) == len(wanted)
    for name in wanted:
        for a, b in zip(found[name], wanted[name], strict=True):
            if b is None or b == "" or b != b:
                assert a == "" or a != a, name
            else:
                assert a == (pytest.approx(b, rel=1e-9) if isinstance(b, float) else b), name


def reread(file) -> pd.DataFrame:
    return pd.read_csv(file, keep_default_na=False, na_values=[""])


def published(name: str, folder: Path = PUBLISHED) -> pd.DataFrame:
    return reread(folder / name)


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    """The published tables again, from the published records alone."""
    names = {path.stem for path in (folder / "records").iterdir()}
    turns, ablated = record("compare", folder) if "compare" in names else None, record("ablate", folder)
    made = [record(name, folder) for name in names if name.startswith("plan-")]
    training = summary.with_plans(record("finetune", folder), made)
    rows = [row for found in evaluated(folder) for row in summary.rows(found, training)]
    order = [(a.variant, a.batch_size) for a in published("summary.csv", folder).itertuples()]
    rows.sort(key=lambda row: order.index((row["variant"], row["batch_size"])))
    table, every = pd.DataFrame(rows, columns=summary.COLUMNS), pd.DataFrame(columns=compare.RATIO_COLUMNS)
    found = {"summary.csv": table, "ablation.csv": ablate.table(ablated["rows"])}
    if {row["kept"] for row in ablated["rows"]} & {f"{ablate.ONLY}layer 0"}:  # in both directions
        found["sensitivity.csv"] = ablate.effects(ablated["rows"])
    for plan in made:
        found[f"{plan['name']}.csv"] = proof.trade_off(plan["curve"], plan["plan"]["uniform_bytes"])
    if turns:
        every = compare.ratios(turns)
        found |= {"ratios.csv": every, "times.csv": compare.times(turns)}
    if "waterfall" in names:
        found["waterfall.csv"] = waterfall.table(record("waterfall", folder))
    answers = accuracy.compared(evaluated(folder), turns)
    return found | {
        "accuracy.csv": answers, "claims.csv": claims.verdicts(claims.measured(table, every, answers, ablated)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("folder", "rows"), [(PUBLISHED, 14), (ON_GPU, 36), (PHOTOGRAPHS, 10)], ids=lambda it: getattr(it, "name", "")
)
def test_the_published_tables_follow_from_the_published_records(folder, rows):
    found = tables(folder)
    assert {path.name for path in folder.glob("*.csv")} == set(found)
    for name, table in found.items():
        same(published(name, folder), reread(io.StringIO(table.to_csv(index=False))))
    assert len(found["summary.csv"]) == rows and set(found["summary.csv"].status) == {"ok"}


def test_every_published_record_says_where_it_comes_from():
    names = {path.stem for path in (PUBLISHED / "records").iterdir()}
    assert {"finetune", "ablate", "infer", "compare"} < names
    for name in names:
        found = record(name)
        assert len(found["machine"]["commit"]) == 40 and found["machine"]["dirty"] is False, name
        assert found["machine"]["cpu"] and found["versions"]["torch"] and found["study_asked"]["name"] == "embedded"


def test_the_records_of_the_gpu_are_of_one_code_and_one_kind_of_gpu():
    codes = set()
    for folder in (ON_GPU, QLORA):
        for path in (folder / "records").iterdir():
            found = record(path.stem, folder)
            assert found["machine"]["gpu"] == "NVIDIA H200" and found["study_asked"]["name"] == folder.name
            codes.add(found["machine"]["code_sha256"])
    assert len(codes) == 1


def test_the_table_in_the_readme_is_the_published_one():
    section = README.partition("## What comes out")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if re.match(r"\| `\w+-\w+` \|", line)]
    table, ratios = published("summary.csv"), compare.against(published("ratios.csv"))
    assert len(lines) == len(set(table.variant))
    sizes = sorted(set(table.batch_size))
    for line in lines:
        name, top1, kernel, *cells, disk, resident = [cell.strip(" `") for cell in line.strip("|").split("|")]
        rows = table[table.variant == name].set_index("batch_size")
        beside, first = ratios[ratios.variant == name].set_index("batch_size"), rows.loc[sizes[0]]
        assert (top1, kernel) == (f"{first.top1:.3f}", first.attention_ran)
        assert cells[:2] == [f"{rows.loc[size].latency_p50_ms:.1f}" for size in sizes]
        wanted = [f"{r.ratio:.2f} ({r.low:.2f} to {r.high:.2f})" for r in (beside.loc[size] for size in sizes)]
        assert cells[2:] == (["1", "1"] if name == "fp32-sdpa" else wanted)
        assert (disk, resident) == (f"{first.disk_mb:.2f}", f"{first.resident_mb:.2f}")


def test_the_gpu_table_in_the_readme_is_the_published_one():
    table, times = published("summary.csv", ON_GPU), published("times.csv", ON_GPU)
    p50 = times.set_index(["variant", "batch_size"]).p50_ms
    faster = 1 / compare.against(published("ratios.csv", ON_GPU)).set_index(["variant", "batch_size"]).ratio
    lines = [line for line in README.splitlines() if re.match(r"\| `[\w-]+` \|.*\dx\)", line)]
    assert [line.split("`")[1] for line in lines] == list(times.variant.unique())
    for line in lines:
        name, top1, kernel, *cells, memory = [cell.strip(" `") for cell in line.strip("|").split("|")]
        assert cells == [f"{p50[name, size]:.2f} ({faster[name, size]:.1f}x)" for size in (1, 8, 32, 128)]
        if name in studies.PEERS:
            assert (top1, kernel, memory) == ("", "", "")
            continue
        first = table[table.variant == name].iloc[0]
        assert (top1, kernel) == (f"{first.top1:.3f}", first.attention_ran)
        assert memory == f"{first.resident_mb:.1f}" + f" + {first.scratch_mb:.0f}" * bool(first.scratch_mb)


def in_words(values: list[float]) -> str:
    """Four numbers as the README says them."""
    *first, last = [f"{value:.2f}" for value in values]
    return f"{', '.join(first)} and {last}"


def test_the_times_that_the_readme_gives_of_the_gpu():
    ratios, steps = published("ratios.csv", ON_GPU), published("waterfall.csv", ON_GPU)
    half, nf4, fp8 = (f"{weights}-sdpa-fused" for weights in ("bf16", "nf4", "fp8"))

    def over(a: str, b: str) -> list[float]:
        return list(compare.against(ratios, b).query("variant == @a").sort_values("batch_size").ratio)

    assert f"well: {over('fp32-sdpa', nf4)[0]:.1f} times as fast" in README
    assert f"4 bits take {in_words(over(nf4, half))} times as long as 16 bits" in README
    assert f"weights and activations are {in_words(over(half, fp8))} times as fast as those" in README
    assert f"16 bits are {in_words(over('timm-compile', half))} times as fast as timm" in README
    assert f"float8 is {in_words(over('torchao-fp8-compile', fp8))} times as fast as torchao's" in README
    whole = steps[(steps.ladder == "4 bits") & (steps.batch_size == 1)].total_gain.iloc[-1]
    assert f"({whole:.1f} times in the waterfall below" in README
    graph = steps[(steps.variant == "nf4-sdpa-graph") & (steps.batch_size == 1)]
    assert f"forward of one image {graph.gain.item():.0f}x as fast as it was" in README
    share = published("summary.csv", ON_GPU).query("variant == @half").set_index("batch_size").matmul_share
    assert f"{share[32]:.0%} of the largest measured product's speed at 32, {share[128]:.0%} at 128" in README
    turns, wide = record("compare", ON_GPU), compare.against(ratios)
    peers = sum(first["torchao-fp8-compile"]["first_seconds"] for first in turns["warm_up"].values())
    seconds = [record(path.stem, ON_GPU)["seconds"] for path in (ON_GPU / "records").iterdir()]
    assert f"stages' records add up to {sum(seconds) / 60:.0f} minutes" in README
    assert (
        f"{turns['seconds'] / 60:.0f} are those of the comparison, of which torchao's compiler\nand its tuning take {peers / 60:.0f}"
        in README
    )
    assert f"intervals up to {((wide.high - wide.low) / wide.ratio).max():.0%} wide" in README


def test_what_the_readme_says_of_answers_and_layers_on_the_gpu():
    ablated = record("ablate", ON_GPU)
    kl = published("ablation.csv", ON_GPU).query("bits == 4").set_index("kept").kl
    removed = 1 - kl / kl["none"]
    others = [value for name, value in removed.items() if name.startswith("layer ") and name != "layer 0"]
    assert (
        f"removes {removed['first and last']:.0%} of the KL to fp32, and layer 0 alone {removed['layer 0']:.0%}"
        in README
    )
    assert f"no other layer removes more than {max(others):.0%}" in README
    late, _ = depth.answers(ablated["rows"], [4])
    assert "late layers are less sensitive than the others" in str(late)
    assert f"on 1,020 images, took {ablated['seconds']:.0f} s" in README and ablated["seconds"] < 180
    assert {len(row["kl_by_image"]) for row in ablated["rows"]} == {1020}
    verdicts = published("accuracy.csv", ON_GPU).verdict
    assert set(verdicts) == {"the baseline", "no difference beyond noise"}
    engines = record("compare", ON_GPU)["engines"]
    assert f"differ by {max(row['largest'] for row in engines):.2f} in a logit at most" in README
    assert {row["spacing"] for row in engines} == {0.0625} and all(row["gap"] <= 0.0625 for row in engines)
    assert f"that gives {engines[0]['changed']} and {engines[1]['changed']} images another first class" in README
    lora, qlora = record("finetune", ON_GPU), record("finetune", QLORA)
    assert (lora["base_precision"], qlora["base_precision"]) == ("fp32", "nf4")
    top1 = [accuracy.scores(record("evaluate-fp32-sdpa", folder)["predictions"])["top1"] for folder in (QLORA, ON_GPU)]
    peaks = [found["training"]["peak_bytes"] for found in (qlora, lora)]
    assert (
        f"top-1 {top1[0]:.3f} against LoRA's {top1[1]:.3f}, with {peaks[0] / 2**30:.1f} GiB instead of "
        f"{peaks[1] / 2**30:.1f} GiB at its peak"
    ) in README


def test_what_the_readme_says_of_the_plan():
    made = record("plan-plus12")
    found, plan = proof.proven(made), made["plan"]
    assert found["met"] and set(plan["widths"].values()) == {16} and len(plan["widths"]) == 4
    assert {made["parts"][name].rpartition(" ")[0] for name in plan["widths"]} == {"layer 0", "layer 1"}
    assert (
        f"{plan['extra_bytes'] / plan['uniform_bytes']:.1%} more bytes than uniform NF4. On the {found['images']:,} test images it "
        f"cuts the KL to fp32 by {found['cut']:.1%} ({found['low']:.1%} to {found['high']:.1%}) and beats {found['beaten']} of 20"
    ) in README
    assert f"which cuts {found['best_random']:.1%}" in README.replace("\n", " ")
    rows = record("ablate")["rows"]
    ends = next(one for one in depth.answers(rows, [4]) if "First and last" in str(one))
    late = next(one for one in depth.answers(rows, [4]) if "Late layers" in str(one))
    kl = {row["kept"]: row["kl"] for row in rows if row["bits"] == 4}
    assert f"first and the last layer of 12 removes {1 - kl['first and last'] / kl['none']:.0%} of the KL" in README
    assert "does not hold here: it matters" in str(ends)
    assert "no difference beyond noise between late layers and the others" in str(late)


def test_what_the_readme_says_of_photographs():
    trained, ablated, made = (record(name, PHOTOGRAPHS) for name in ("finetune", "ablate", "plan-plus12"))
    for path in (PHOTOGRAPHS / "records").iterdir():
        found = record(path.stem, PHOTOGRAPHS)
        about = found["machine"]
        assert about["gpu"] == "NVIDIA H200" and about["dirty"] is False and found["study"] == PHOTOGRAPHS.name
        assert about["code_sha256"] == trained["machine"]["code_sha256"]
    images, earlier = trained["images"], record("finetune", EARLIER)
    assert f"{images['train']:,} photographs" in README and f"the {images['valid']} validation images also" in README
    (top1, seconds), (top1_alone, seconds_alone) = (
        [[seed[key] for seed in found["seeds"]] for key in ("valid_top1", "seconds")] for found in (trained, earlier)
    )
    assert len(top1) == len(top1_alone) == 3 and max(seconds_alone) < 60
    assert (
        f"name {np.mean(top1):.3f} ± {np.std(top1, ddof=1):.3f} of the validation images; a linear probe names "
        f"{trained['floors']['probe']:.3f}. They took {np.mean(seconds):.0f} s each while other jobs had the host's cores, and "
        f"{np.mean(seconds_alone):.0f} s each on"
    ) in README
    assert f"{np.mean(top1_alone):.3f} ± {np.std(top1_alone, ddof=1):.3f})" in README
    shared = record("finetune", TWO_GPUS)
    assert (shared["asked"]["processes"], shared["asked"]["seed"], trained["asked"]["processes"]) == (2, 0, 1)
    assert shared["machine"]["code_sha256"] == trained["machine"]["code_sha256"]
    (first,), peaks = shared["seeds"], [found["training"]["peak_bytes"] / 2**30 for found in (shared, trained)]
    assert (
        f"first seed ends at {first['valid_top1']:.3f} after {first['seconds']:.0f} s, with {peaks[0]:.1f} GiB at its peak on "
        f"each instead of {peaks[1]:.1f} GiB"
    ) in README
    answers = published("accuracy.csv", PHOTOGRAPHS).set_index("variant")
    assert f"{answers.kl['nf4-sdpa']:.4f} for uniform NF4, {answers.kl['int8-sdpa']:.5f} for int8" in README
    assert f"NF4 has {answers.top1['nf4-sdpa']:.3f} and fp32 {answers.top1['fp32-sdpa']:.3f}" in README
    assert set(answers.verdict) == {"the baseline", "no difference beyond noise"}
    ratio = compare.against(published("ratios.csv", PHOTOGRAPHS)).set_index(["variant", "batch_size"]).ratio
    assert (
        f"NF4 takes {ratio['nf4-sdpa', 1]:.2f} times as long as fp32 for one image and {ratio['nf4-sdpa', 32]:.2f} times as long for "
        f"32, plain 16 bits {ratio['bf16-sdpa', 1]:.2f} and {ratio['bf16-sdpa', 32]:.2f} times"
    ) in README
    late, ends = depth.answers(ablated["rows"], [4])
    assert "no difference beyond noise between late layers and the others" in str(late)
    kl = {row["kept"]: row["kl"] for row in ablated["rows"] if row["bits"] == 4}
    assert f"the first and the last together save {1 - kl['first and last'] / kl['none']:.0%}" in README
    assert "does not hold here: it matters" in str(ends)
    found, plan = proof.proven(made), made["plan"]
    assert found["met"] and found["images"] == 330
    assert (
        f"{plan['extra_bytes'] / plan['uniform_bytes']:.1%} more bytes than uniform NF4 cut the KL by {found['cut']:.1%} "
        f"({found['low']:.1%} to {found['high']:.1%}) on the 330 images that did not choose it, and beat {found['beaten']} of 20 "
        f"random plans, the best of which cuts {found['best_random']:.1%}."
    ) in README
    before = record("plan-plus12", EARLIER)
    found, uniform = proof.proven(before), before["curve"][0]
    assert f"had cut {found['cut']:.1%} and beaten {found['beaten']}: " in README and not found["met"]
    assert f"adds up to {uniform['predicted_kl']:.3f} of {uniform['kl']:.3f} nats" in README


def test_what_the_readme_says_of_photographs_on_a_cpu():
    trained, made = record("finetune", ON_CPU), record("plan-plus12", ON_CPU)
    for found in (trained, made):
        about = found["machine"]
        assert found["study"] == "vit-s14-flowers5" and about["dirty"] is False
        assert (about["cpu"], about["threads"]) == ("AMD EPYC", 2)
    assert made["plan"]["merged_sha256"] == trained["checkpoint_sha256"]["merged"]
    same(
        published("plan-plus12.csv", ON_CPU),
        reread(io.StringIO(proof.trade_off(made["curve"], made["plan"]["uniform_bytes"]).to_csv(index=False))),
    )
    (seed,), asked = trained["seeds"], trained["asked"]
    assert (asked["seeds"], asked["epochs"]) == (1, 6)
    assert (
        f"whole took {trained['seconds'] / 60:.0f} minutes" in README and f"names {seed['valid_top1']:.3f} of" in README
    )
    assert f"probe in that finetune record, {trained['floors']['probe']:.3f}," in README
    kl = {row["name"]: row["kl"] for row in made["curve"]}
    assert f"{kl['uniform NF4']:.4f} for uniform NF4 and {kl['uniform int8']:.5f} for int8" in README
    found, plan = proof.proven(made), made["plan"]
    assert found["images"] == made["images"]["valid"] == 330 and found["met"]
    assert (
        f"{plan['extra_bytes'] / plan['uniform_bytes']:.1%} more bytes than uniform NF4 cut the KL by {found['cut']:.1%} "
        f"({found['low']:.1%} to {found['high']:.1%}) on the 330 images that did not choose it, and beat "
        f"{found['beaten']} of 20 random plans, the best of which cuts {found['best_random']:.1%}"
    ) in README


def test_single_numbers_in_the_readme():
    assert f"reaches {record('finetune')['floors']['probe']:.3f}" in README
    assert f"each of the {len(claims.ledger())} numbers" in README


def test_what_the_readme_says_of_a_cpu_without_bf16():
    turns = record("compare", WITHOUT_BF16)
    assert turns["machine"]["dirty"] is False and turns["machine"]["cpu"].startswith("Intel(R) Xeon")
    assert turns["machine"]["threads"] == 2 and turns["study_asked"]["name"] == "embedded"
    ratio = compare.against(compare.ratios(turns)).query("batch_size == 16").set_index("variant").ratio
    assert (
        f"that lacks them 16 bits take {ratio['bf16-sdpa']:.2f} times\n  as long as fp32, and NF4 {ratio['nf4-sdpa']:.2f} times"
        in README
    )


def test_the_comparison_tells_equal_from_different():
    """200 pairs that are the same, 100 of which one does 2% more work: the rule, applied to the published intervals."""
    for name, pairs in (("same", 200), ("slower", 100)):
        table = pd.read_csv(INSTRUMENT / f"{name}.csv")
        called = sum(intervals.differ(row.low, row.high) for row in table.itertuples())
        assert len(table) == pairs and table.p.between(0, 1).all() and (table.rounds >= 100).all()
        assert (table.level == intervals.PAIR_LEVEL).all() and (table.low < table.ratio).all()
        assert called <= 2 if name == "same" else called >= 95
        assert f"{called} of {pairs}" in README


@pytest.mark.parametrize(("folder", "beyond"), [("", 1), ("busy-host", 3), ("same-forwards", 7)])
def test_times_on_a_gpu_beside_tritons(folder, beyond):
    """What the README says of the published runs; rows beyond 1% are counted, not hidden."""
    table, rounds = pd.read_csv(INSTRUMENT / folder / "gpu.csv"), pd.read_csv(INSTRUMENT / folder / "rounds.csv")
    for row in table.itertuples():
        times = rounds[(rounds.variant == row.variant) & (rounds.batch_size == row.batch_size)]
        assert len(times) == row.rounds and times.ours_ms.median() == pytest.approx(row.p50_ms, rel=1e-9)
        for found, of, over in (
            (row.over_do_bench, "ours_ms", "theirs_ms"),
            (row.do_bench_over_itself, "theirs_ms", "theirs_again_ms"),
        ):
            assert found == pytest.approx(np.exp(np.log(times[of] / times[over]).median()), rel=1e-9)
    off, itself = abs(table.over_do_bench - 1), abs(table.do_bench_over_itself - 1)
    assert len(table) == 14 and (off > 0.01).sum() == beyond and table.code_sha256.nunique() == 1
    for found in (off, itself):
        assert f"{(found <= 0.01).sum()} of 14 rows, and {100 * found.max():.1f}% off" in README
    assert ((table.low < 1) & (table.high > 1))[off > 0.001].all()
    busy = table.idle_share < 0.02
    assert busy.sum() == 2 and max(off[busy].max(), itself[busy].max()) < 0.001
    assert (table.unclassified < 0.01).all() and abs(table.timeline_ratio - 1).max() < 0.012


def test_times_on_a_gpu_beside_tritons_of_the_same_forwards():
    table = pd.read_csv(INSTRUMENT / "same-forwards" / "gpu.csv")
    off = 1 - table.same_forwards
    assert len(table) == 14 and (table.forwards >= 20).all() and off.between(0, 0.01).all()
    assert f"within 1% in 14 of 14 rows, ours shorter by {100 * off.max():.1f}% at most" in README


def test_no_planted_bug_survived():
    table = pd.read_csv(ROOT / "outputs" / "published" / "mutants.csv")
    assert list(table.columns) == ["bug", "patch", "test", "result"]
    bugs = yaml.safe_load((ROOT / "tests" / "mutants.yaml").read_text())
    assert list(table.bug) == [bug["bug"] for bug in bugs] and list(table.test) == [bug["test"] for bug in bugs]
    assert set(table.result) == {"caught"} and f"{len(table)} of {len(table)} planted bugs" in README
    defects = sorted(int(bug.split()[1].strip(":")) for bug in table.bug if bug.startswith("defect "))
    assert defects == list(range(1, 20)) and len(table) - len(defects) >= 20
