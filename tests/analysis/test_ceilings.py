"""Shares of ceilings by hand: of the largest, of the own kind, and never above 1."""

import json
import random
from pathlib import Path

import pandas as pd
import pytest

from vitnb.analysis import ceilings, provenance, summary, tables
from vitnb.records.schema import upgrade

PUBLISHED = Path(__file__).resolve().parents[2] / "outputs" / "published"
REPORTED = sorted(path.parent.name for path in PUBLISHED.glob("*/summary.csv"))


def identity(host: str = "one", device: str = "a CPU") -> dict:
    return {"host": host, "device": device}


def ceilings_record(
    products: dict[str, list[float]],
    copy_gbs: float = 1000.0,
    missing: dict[str, str] | None = None,
    **where: str,
) -> dict:
    """Return a record of ceilings; products are in TFLOP/s."""
    return {
        "notebook": "ceilings",
        "name": "ceilings-1",
        "status": "ok",
        "identity": identity(**where),
        "ceilings": {
            "products": {kind: {"a": rates} for kind, rates in products.items()},
            "copy_gbs": [copy_gbs],
            "missing": missing or {},
        },
    }


def timing(milliseconds: float, size: int = 4) -> dict:
    return {
        "batch_size": size,
        "device_ms": [],
        "host_ms": [milliseconds / 2, milliseconds, 9 * milliseconds],
    }


def evaluated(
    operations: dict[str, float], milliseconds: float, resident: float = 1e6, **where
) -> dict:
    """Return the parts of an evaluate record that shares need."""
    return {
        "notebook": "evaluate",
        "name": "evaluate-1",
        "status": "ok",
        "identity": identity(**where),
        "roofline": {"flops": {"4": operations}},
        "resident_bytes": resident,
        "timings": [timing(milliseconds)],
    }


def shares(record: dict, *others: dict) -> dict:
    """Return the shares of an evaluate record beside other records of its study."""
    found = ceilings.study_ceilings([record, *others])
    limits = found.get(ceilings.machine_of(record), {})
    forward = ceilings.forward_of(record, record["timings"][0])
    return ceilings.roofline_shares(forward, limits)


def test_shares_of_given_ceilings():
    """40 GFLOP in 20 ms are 2 TFLOP/s, of 8.

    Reading 90 MB at 9 GB/s takes 10 ms, longer than the arithmetic's 5.
    """
    ceiling = ceilings_record({"float32": [8.0]}, copy_gbs=9.0)
    assert shares(evaluated({"float32": 40e9}, 20, 90e6), ceiling) == {
        "tflops": pytest.approx(2.0),
        "matmul_share": pytest.approx(0.25),
        "roofline_share": pytest.approx(0.5),
        "share_reason": "",
    }
    small = shares(evaluated({"float32": 40e9}, 20, 9e6), ceiling)
    assert small["roofline_share"] == pytest.approx(0.25)


def test_a_share_is_not_cut_off():
    """The arithmetic takes 5 ms and the reading 10, of 4: a ceiling is too low."""
    limits = {"float32": ceilings.Ceiling(8e12), "copy": ceilings.Ceiling(9e9)}
    forward = ceilings.Forward({"float32": 40e9}, 90e6, 0.004)
    found = ceilings.roofline_shares(forward, limits)
    assert found["matmul_share"] == pytest.approx(1.25)
    assert found["roofline_share"] == pytest.approx(2.5)
    # Such ceilings do not count. So no table has such a share.
    left = ceilings.refute(limits, [forward])
    assert [left[kind].rate for kind in limits] == [None, None]


def test_each_kind_of_product_counts_at_its_own_ceiling():
    """30 GFLOP at 10 TFLOP/s and 10 GFLOP at 5 take 3 and 2 ms, of 20."""
    record = evaluated({"int8": 30e9, "bfloat16": 10e9}, 20)
    found = shares(record, ceilings_record({"int8": [10.0], "bfloat16": [5.0]}))
    assert found["matmul_share"] == pytest.approx(0.25)
    assert found["tflops"] == pytest.approx(2.0)


@pytest.mark.parametrize("kind", ["float8", "int8"])
def test_no_share_of_the_ceiling_of_another_kind(kind):
    """Neither of one that was not measured, nor of one that the machine lacks."""
    record = evaluated({kind: 30e9, "bfloat16": 10e9}, 20)
    found = shares(record, ceilings_record({"bfloat16": [5.0], "float32": [1.0]}))
    assert found["matmul_share"] is None and found["roofline_share"] is None
    assert found["share_reason"] == f"{kind}: not measured on this machine"
    lacking = ceilings_record({"bfloat16": [5.0]}, missing={kind: "no units"})
    assert shares(record, lacking)["share_reason"] == f"{kind}: no units"
    assert shares(record, lacking)["tflops"] == pytest.approx(2.0)


def test_the_largest_measurement_counts_whichever_is_newest():
    rates = [4.0, 8.0, 5.0]
    record = evaluated({"float32": 40e9}, 20)
    for _ in range(6):
        random.shuffle(rates)
        together = ceilings_record({"float32": rates})
        apart = [ceilings_record({"float32": [rate]}) for rate in rates]
        assert shares(record, together)["matmul_share"] == pytest.approx(0.25)
        assert shares(record, *apart)["matmul_share"] == pytest.approx(0.25)


@pytest.mark.parametrize("other", [{"host": "two"}, {"device": "a GPU"}])
def test_a_ceiling_belongs_to_its_host_and_device(other):
    record = evaluated({"float32": 40e9}, 20)
    faster = ceilings_record({"float32": [100.0]}, **other)
    own = ceilings_record({"float32": [8.0]})
    assert shares(record, own, faster)["matmul_share"] == pytest.approx(0.25)
    assert shares(record, faster)["matmul_share"] is None


def test_a_failed_record_has_no_ceiling():
    failed = ceilings_record({"float32": [100.0]}) | {"status": "failed"}
    own = ceilings_record({"float32": [8.0]})
    record = evaluated({"float32": 40e9}, 20)
    assert shares(record, own, failed)["matmul_share"] == pytest.approx(0.25)


def test_a_forward_that_is_faster_refutes_the_ceiling():
    """Also for slower forwards of the kind; other kinds keep theirs."""
    ceiling = ceilings_record({"bfloat16": [8.0], "float32": [8.0]})
    fast = evaluated({"bfloat16": 40e9}, 4.9)  # 8.2 TFLOP/s
    slow = evaluated({"bfloat16": 40e9}, 20)
    other = evaluated({"float32": 40e9}, 20)
    for record in (fast, slow):
        found = shares(record, ceiling, fast, slow, other)
        assert found["matmul_share"] is None and found["roofline_share"] is None
        assert "a forward was faster than the largest product" in found["share_reason"]
        assert found["tflops"] > 0
    assert shares(other, ceiling, fast, slow)["matmul_share"] == pytest.approx(0.25)
    elsewhere = evaluated({"bfloat16": 40e9}, 4.9, host="two")
    assert shares(slow, ceiling, elsewhere)["matmul_share"] == pytest.approx(0.25)


def test_a_mixed_forward_that_is_faster_refutes_all_kinds_that_it_used():
    ceiling = ceilings_record({"int8": [10.0], "bfloat16": [5.0], "float32": [8.0]})
    mixed = evaluated({"int8": 30e9, "bfloat16": 10e9}, 4.9)  # 5 ms at the least
    for kind in ("int8", "bfloat16"):
        record = evaluated({kind: 10e9}, 20)
        assert shares(record, ceiling, mixed)["matmul_share"] is None
    record = evaluated({"float32": 40e9}, 20)
    assert shares(record, ceiling, mixed)["matmul_share"] == pytest.approx(0.25)


def test_weights_that_are_read_faster_than_a_copy_refute_the_copy():
    """The share of the product stays: it needs no copy."""
    ceiling = ceilings_record({"float32": [8.0]}, copy_gbs=9.0)
    found = shares(evaluated({"float32": 40e9}, 20, 200e6), ceiling)
    assert found["matmul_share"] == pytest.approx(0.25)
    assert found["roofline_share"] is None
    assert found["share_reason"] == (
        "copy: a forward was faster than the fastest copy measured allows"
    )


def test_no_share_is_above_one_and_none_is_cut_off():
    """Random studies: a share is the exact ratio, or blank with a reason."""
    draw = random.Random(0)
    exact = blank = 0
    for _ in range(300):
        rates = {kind: draw.uniform(1, 10) for kind in ("float32", "bfloat16", "int8")}
        ceiling = ceilings_record({kind: [rate] for kind, rate in rates.items()})
        records = [
            evaluated(
                {kind: draw.uniform(1, 50) * 1e9 for kind in draw.sample([*rates], 2)},
                draw.uniform(5, 60),
            )
            for _ in range(3)
        ]
        for record in records:
            found = shares(record, ceiling, *records)
            operations = record["roofline"]["flops"]["4"]
            shortest = sum(n / rates[kind] for kind, n in operations.items()) / 1e12
            share = shortest / (record["timings"][0]["host_ms"][1] / 1e3)
            if found["matmul_share"] is None:
                blank += 1
                assert found["share_reason"]
            else:
                exact += 1
                assert found["matmul_share"] == pytest.approx(share) and share <= 1
            if share > 1:
                assert found["matmul_share"] is None
    assert exact > 50 and blank > 50


def test_a_cpu_without_16_bit_units_has_no_absurd_share():
    """Version 1 measured a ceiling of 0.001 TFLOP/s there; today it is left out."""
    old = ceilings_record({"bfloat16": [0.001], "float32": [0.1]})
    now = ceilings_record({"float32": [0.1]}, missing={"bfloat16": "emulated"})
    full = evaluated({"float32": 0.3e9}, 6)
    half = evaluated({"bfloat16": 0.3e9}, 10)
    eight = evaluated({"int8": 0.2e9, "float32": 0.1e9}, 10)
    for ceiling in (old, now):
        for record in (half, eight):
            assert shares(record, ceiling, full, half, eight)["matmul_share"] is None
        assert shares(full, ceiling, half, eight)["matmul_share"] == pytest.approx(0.5)


def test_the_table_of_one_variant():
    measured = ceilings_record({"float32": [8.0]}, copy_gbs=9.0)["ceilings"]
    roof = {"flops": {"4": {"float32": 40e9}, "8": {"float32": 80e9}}}
    timings = [timing(20, 4), timing(20, 8)]
    table = ceilings.roofline_table(measured, roof, 9e6, timings)
    assert list(table["of the product's peak"]) == ["25%", "50%"]
    assert list(table.GFLOP) == ["40.00 in float32", "80.00 in float32"]
    assert "why blank" not in table
    timings[1] = timing(9, 8)  # 80 GFLOP in 9 ms, of 10 at the least
    table = ceilings.roofline_table(measured, roof, 9e6, timings)
    assert list(table["of the product's peak"]) == ["", ""]
    assert all("was faster" in reason for reason in table["why blank"])


def test_the_table_of_ceilings_shows_largest_and_smallest():
    found = ceilings.study_ceilings(
        [ceilings_record({"int8": [3.0, 5.0]}, missing={"float8": "no units"})]
    )
    table = ceilings.ceilings_table(found).set_index("ceiling of")
    assert table.loc["int8 product", "largest"] == "5.000 TFLOP/s"
    assert table.loc["int8 product", "smallest"] == "3.000 TFLOP/s"
    assert table.loc["int8 product", "samples"] == 2
    assert table.loc["copy", "largest"] == "1000.0 GB/s"
    assert table.loc["float8 product", "largest"] == ""
    assert table.loc["float8 product", "why blank"] == "no units"


# --- Records of old ---


def old_record(name: str, weights: str) -> dict:
    """Return an evaluate record of version 1, as it was in bfloat16."""
    return {
        "notebook": "evaluate",
        "name": name,
        "status": "ok",
        "asked": {"variant": f"{weights}-sdpa"},
        "machine": {"cpu": "a CPU", "gpu": None},
        "dtype": "bfloat16",
        "roofline": {"matmul_tflops": 4.0, "copy_gbs": 9.0, "flops": {"4": 40_000}},
        "resident_bytes": 1000,
        "timings": [timing(1e-4)],  # 100 ns
    }


@pytest.mark.parametrize("weights", ["bf16", "nf4"])
def test_an_old_record_keeps_its_product(weights):
    """And all of one study give one ceiling: 40,000 operations in 100 ns, of 8."""
    faster = old_record("other", "bf16")
    faster["roofline"] = faster["roofline"] | {"matmul_tflops": 8.0}
    record = upgrade(old_record("own", weights))
    assert record["roofline"] == {"flops": {"4": {"bfloat16": 40_000}}}
    assert shares(record)["matmul_share"] == pytest.approx(0.1)
    assert shares(record, upgrade(faster))["matmul_share"] == pytest.approx(0.05)


@pytest.mark.parametrize("weights", ["int8", "w8a8", "fp8", "plan:plus12"])
def test_an_old_record_with_8_bit_products_has_no_share(weights):
    record = upgrade(old_record("own", weights))
    found = shares(record, upgrade(old_record("other", "bf16")))
    assert found["matmul_share"] is None and found["roofline_share"] is None
    assert found["tflops"] == pytest.approx(0.4)
    told = "does not tell 8-bit" if ":" in weights else "only the bfloat16 product was"
    assert told in found["share_reason"]


def test_ceilings_outlast_a_new_fine_tuning():
    """They name no checkpoint, as they depend on none."""
    measured = ceilings_record({"float32": [8.0]}) | {"started": "2026-01-01"}
    trained = {
        "notebook": "finetune",
        "name": "finetune",
        "status": "ok",
        "started": "2026-01-02",
        "checkpoint_sha256": {"merged": "new"},
    }
    for record in (measured, trained):
        record["identity"] = identity() | {"checkpoints": {}, "data": {}}
    assert provenance.outdated_reasons([measured, trained]) == {}


# --- Published records ---


def read(study: str) -> list[dict]:
    paths = (PUBLISHED / study / "records").glob("*.json")
    records = [json.loads(path.read_text()) for path in paths]
    return sorted(records, key=lambda record: record["started"])


@pytest.mark.parametrize("study", REPORTED)
def test_no_published_share_is_above_one(study):
    """And each is of one ceiling for its machine and type: the largest measured."""
    raw = read(study)
    table = summary.summarize_records([upgrade(record) for record in raw])
    table = table[table.status == "ok"]
    given = table[table.matmul_share.notna()]
    assert len(given) and (given.matmul_share <= 1).all()
    assert (given.roofline_share <= 1).all() and (given.share_reason == "").all()
    blank = table[table.matmul_share.isna()]
    assert (blank.share_reason != "").all() and blank.roofline_share.isna().all()
    by_name = {record["name"]: record for record in raw}
    for row in given.itertuples():
        record = by_name[row.record]
        if "matmul_tflops" in record["roofline"]:  # one product, as of old
            assert row.weights in ("fp32", "bf16", "nf4")
            largest = max(
                other["roofline"]["matmul_tflops"]
                for other in raw
                if other["notebook"] == "evaluate"
                and other["dtype"] == record["dtype"]
                and row.device == (other["machine"]["gpu"] or other["machine"]["cpu"])
            )
            assert row.tflops / row.matmul_share == pytest.approx(largest)


@pytest.mark.parametrize("study", REPORTED)
def test_no_published_table_shows_a_share_above_one(study):
    """The table in git, and the one that a reader sees."""
    table = pd.read_csv(PUBLISHED / study / "summary.csv")
    for name in ("matmul_share", "roofline_share"):
        assert not (table[name] > 1).any()
    formatted = tables.format_summary(
        summary.summarize_records([upgrade(record) for record in read(study)])
    )
    for heading in ("of product peak", "of roofline"):
        shown = formatted[heading].str.removesuffix("%")
        assert not (pd.to_numeric(shown) > 100).any()
