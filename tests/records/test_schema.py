"""Older records are read through one function, and newer ones are refused."""

import json

import pytest

from vitnb.errors import UserError
from vitnb.records.reader import read_record
from vitnb.records.schema import SCHEMA, upgrade
from vitnb.study import ROOT

PUBLISHED = sorted((ROOT / "outputs" / "published").glob("*/records/*.json"))


@pytest.mark.parametrize(
    "path", PUBLISHED, ids=lambda path: "/".join(path.parts[-3::2])
)
def test_every_published_record_is_read_in_today_s_shape(path):
    record = read_record(path, "")
    assert record["schema"] == SCHEMA
    assert {"identity", "arrays", "tables", "asked", "status"} <= record.keys()
    written = json.loads(path.read_text())
    if written["notebook"] == "evaluate" and written["status"] == "ok":
        (sums,) = record["identity"]["checkpoints"].values()
        assert sums == written["checkpoint_sha256"]
    names = {record["machine"]["cpu"], record["machine"]["gpu"]}
    assert record["identity"]["device"] in names
    assert upgrade(record) == record, "today's shape stays as it is"


@pytest.mark.parametrize(
    "path", PUBLISHED, ids=lambda path: "/".join(path.parts[-3::2])
)
def test_an_older_record_s_engine_is_that_of_each_of_its_batch_sizes(path):
    written, record = json.loads(path.read_text()), read_record(path, "")
    if written["status"] != "ok":
        return
    if written["notebook"] == "evaluate":
        sizes = {str(size) for size in written["asked"]["batch_sizes"]}
        assert record["engine_ran"] == dict.fromkeys(sizes, written["engine_ran"])
        assert record["engine_reason"] == {}
        assert record["scratch_bytes"] == written["scratch_bytes"]
    if written["notebook"] == "waterfall":
        for name, step in written["steps"].items():
            ran = record["steps"][name]["engine_ran"]
            assert ran == dict.fromkeys(written["blocks_ms"], step["engine_ran"])
    if written["notebook"] == "compare":
        assert record["warm_up"] == written["warm_up"]


def test_a_record_from_before_there_were_engines_ran_eagerly():
    record = {"name": "evaluate-x", "notebook": "evaluate", "status": "ok"}
    record |= {"asked": {"variant": "fp32-sdpa"}, "timings": [{"batch_size": 4}]}
    record |= {"machine": {"cpu": "a CPU", "gpu": None}}
    found = upgrade(record)
    assert found["engine_ran"] == {"4": "eager"} and found["engine_reason"] == {}
    assert found["scratch_bytes"] == 0
    fell_back = {"engine_ran": "eager", "engine_reason": "no CUDA graph"}
    assert upgrade(record | fell_back)["engine_reason"] == {"4": "no CUDA graph"}
    record = {"name": "compare", "notebook": "compare", "status": "ok", "asked": {}}
    record |= {"machine": {"cpu": "a CPU"}, "blocks_ms": {"1": {}, "4": {}}}
    assert upgrade(record)["warm_up"] == {"1": {}, "4": {}}, "not known"


def test_a_record_of_a_newer_version_is_refused():
    record = {"name": "evaluate", "notebook": "evaluate", "schema": SCHEMA + 1}
    told = rf"has schema {SCHEMA + 1}, and this vitnb reads up to {SCHEMA}"
    with pytest.raises(UserError, match=told):
        upgrade(record)
