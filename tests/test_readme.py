"""The README's numbers are those of the published records."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from vitnb import summary

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "outputs" / "published" / "embedded"


def test_the_published_summary_follows_from_the_published_records():
    table = pd.read_csv(PUBLISHED / "summary.csv", keep_default_na=False, na_values=[""])
    rows = {}
    for path in (PUBLISHED / "records").glob("evaluate-*.json"):
        for row in summary.rows(json.loads(path.read_text())):
            rows[row["variant"], row["batch_size"]] = row
    assert len(rows) == len(table) >= 7
    for found in table.to_dict("records"):
        for name, value in rows[found["variant"], found["batch_size"]].items():
            if value is None or value == "":
                assert pd.isna(found[name]), name
            else:
                assert found[name] == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value), name


def test_the_table_in_the_readme_is_the_published_one():
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if re.match(r"\| `\w+-\w+` \|", line)]
    table = pd.read_csv(PUBLISHED / "summary.csv")
    assert len(lines) == len(set(table.variant))
    sizes = sorted(set(table.batch_size))
    for line in lines:
        name, top1, kernel, *times, disk, resident = [cell.strip(" `") for cell in line.strip("|").split("|")]
        rows = table[table.variant == name].set_index("batch_size")
        first = rows.loc[sizes[0]]
        assert (top1, kernel) == (f"{first.top1:.3f}", first.attention_ran)
        assert times == [f"{rows.loc[size].latency_p50_ms:.1f}" for size in sizes]
        assert (disk, resident) == (f"{first.disk_mb:.2f}", f"{first.resident_mb:.2f}")
