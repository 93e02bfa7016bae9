"""The README's numbers are those of the published files, and these follow from the published records."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from vitnb import ablate, accuracy, claims, compare, intervals, summary

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "outputs" / "published" / "embedded"
INSTRUMENT = ROOT / "outputs" / "published" / "instrument"
README = (ROOT / "README.md").read_text()


def record(name: str) -> dict:
    return json.loads((PUBLISHED / "records" / f"{name}.json").read_text())


def evaluated() -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((PUBLISHED / "records").glob("evaluate-*.json"))]


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


def published(name: str) -> pd.DataFrame:
    return reread(PUBLISHED / name)


def tables() -> dict[str, pd.DataFrame]:
    """The published tables again, from the published records alone."""
    turns, ablated = record("compare"), record("ablate")
    rows = [row for found in evaluated() for row in summary.rows(found, record("finetune"))]
    order = [(a.variant, a.batch_size) for a in published("summary.csv").itertuples()]
    rows.sort(key=lambda row: order.index((row["variant"], row["batch_size"])))
    table, every = pd.DataFrame(rows, columns=summary.COLUMNS), compare.ratios(turns)
    answers = accuracy.compared(evaluated(), turns)
    return {
        "summary.csv": table, "ratios.csv": every, "times.csv": compare.times(turns), "accuracy.csv": answers,
        "ablation.csv": ablate.table(ablated["rows"]),
        "claims.csv": claims.verdicts(claims.measured(table, every, answers, ablated)),
    }  # fmt: skip


def test_the_published_tables_follow_from_the_published_records():
    found = tables()
    assert {path.name for path in PUBLISHED.glob("*.csv")} == set(found)
    for name, table in found.items():
        same(published(name), reread(io.StringIO(table.to_csv(index=False))))
    assert len(found["summary.csv"]) == 14 and set(found["summary.csv"].status) == {"ok"}


def test_every_published_record_says_where_it_comes_from():
    names = {path.stem for path in (PUBLISHED / "records").iterdir()}
    assert {"finetune", "ablate", "infer", "compare"} < names
    for name in names:
        found = record(name)
        assert len(found["machine"]["commit"]) == 40 and found["machine"]["dirty"] is False, name
        assert found["machine"]["cpu"] and found["versions"]["torch"] and found["study_asked"]["name"] == "embedded"


def test_the_table_in_the_readme_is_the_published_one():
    lines = [line for line in README.splitlines() if re.match(r"\| `\w+-\w+` \|", line)]
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


def test_single_numbers_in_the_readme():
    assert f"reaches {record('finetune')['floors']['probe']:.3f}" in README
    assert f"each of the {len(claims.ledger())} numbers" in README


def test_the_comparison_tells_equal_from_different():
    """200 pairs that are the same, 100 of which one does 2% more work: the rule, applied to the published intervals."""
    for name, pairs in (("same", 200), ("slower", 100)):
        table = pd.read_csv(INSTRUMENT / f"{name}.csv")
        called = sum(intervals.differ(row.low, row.high) for row in table.itertuples())
        assert len(table) == pairs and table.p.between(0, 1).all() and (table.rounds >= 100).all()
        assert (table.level == intervals.PAIR_LEVEL).all() and (table.low < table.ratio).all()
        assert called <= 2 if name == "same" else called >= 95
        assert f"{called} of {pairs}" in README


def test_times_on_a_gpu_beside_tritons():
    """What the README says of the published run; rows beyond 1% are counted, not hidden."""
    table, rounds = pd.read_csv(INSTRUMENT / "gpu.csv"), pd.read_csv(INSTRUMENT / "rounds.csv")
    for row in table.itertuples():
        times = rounds[(rounds.variant == row.variant) & (rounds.batch_size == row.batch_size)]
        assert len(times) == row.rounds and times.ours_ms.median() == pytest.approx(row.p50_ms, rel=1e-9)
        for found, of, over in (
            (row.over_do_bench, "ours_ms", "theirs_ms"),
            (row.do_bench_over_itself, "theirs_ms", "theirs_again_ms"),
        ):
            assert found == pytest.approx(np.exp(np.log(times[of] / times[over]).median()), rel=1e-9)
    off, itself = abs(table.over_do_bench - 1), abs(table.do_bench_over_itself - 1)
    (worst,) = table[off > 0.01].itertuples()
    assert len(table) == 14 and f"within 1% in {(off <= 0.01).sum()} of 14 rows, and {100 * off.max():.1f}% off" in README
    assert f"within 1% in {(itself <= 0.01).sum()} of 14 rows, and {100 * itself.max():.1f}% off" in README
    assert worst.low < 1 < worst.high
    busy = table.idle_share < 0.02
    assert busy.sum() == 2 and max(off[busy].max(), itself[busy].max()) < 0.001
    assert (table.unclassified < 0.01).all() and abs(table.timeline_ratio - 1).max() < 0.012
    assert table.code_sha256.nunique() == 1


def test_no_planted_bug_survived():
    table = pd.read_csv(ROOT / "outputs" / "published" / "mutants.csv")
    assert list(table.columns) == ["bug", "patch", "test", "result"]
    bugs = yaml.safe_load((ROOT / "tests" / "mutants.yaml").read_text())
    assert list(table.bug) == [bug["bug"] for bug in bugs] and list(table.test) == [bug["test"] for bug in bugs]
    assert set(table.result) == {"caught"} and f"{len(table)} of {len(table)} planted bugs" in README
    defects = sorted(int(bug.split()[1].strip(":")) for bug in table.bug if bug.startswith("defect "))
    assert defects == list(range(1, 20)) and len(table) - len(defects) >= 20
