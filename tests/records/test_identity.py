"""One identity: whatever a result depends on changes it, and nothing else does."""

import dataclasses
import json
import shutil

import pytest
import torch

from vitnb import variants
from vitnb.data.splits import Split, load_split
from vitnb.models import checkpoints, loader
from vitnb.records import identity, machine
from vitnb.records.identity import Checkpoints, Identity, identify
from vitnb.records.resume import ResumeCache

CPU = torch.device("cpu")

ANSWERS = {
    "checkpoints": {"nf4": "other"},
    "data": {"test": "other"},
    "code": "other",
    "packages": {"torch": "0.0"},
    "dtype": "other",
    "device_kind": "cuda 9.0",
}
TIMES = {
    "host": "other",
    "cores": -1,
    "threads": -1,
    "device": "other",
    "device_id": "other",
    "driver": "other",
}


def test_every_field_belongs_to_answers_or_to_times_alone():
    fields = {field.name for field in dataclasses.fields(Identity)}
    assert fields == set(ANSWERS) | set(TIMES)


@pytest.mark.parametrize("field", [*ANSWERS, *TIMES])
def test_times_depend_on_everything_and_answers_on_a_part(field):
    plain = identify(CPU)
    other = dataclasses.replace(plain, **{field: (ANSWERS | TIMES)[field]})
    assert other.times_key() != plain.times_key()
    assert (other.answers_key() != plain.answers_key()) == (field in ANSWERS)
    assert json.loads(json.dumps(other.as_record())) == other.as_record()


def test_threads_and_cores_are_those_of_this_process(monkeypatch):
    before, threads = identify(CPU), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert identify(CPU).times_key() != before.times_key()
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(identity.os, "sched_getaffinity", lambda _: {0})
    assert identify(CPU).cores == 1
    monkeypatch.setattr(identity.platform, "node", lambda: "another host")
    found = identify(CPU)
    assert found.host != before.host and "another" not in found.host


def test_the_packages_are_all_that_a_comparison_may_load():
    known = machine.versions()
    assert {"timm", "torchao", "triton", "bitsandbytes", "flash-attn"} <= set(known)


def test_code_that_only_shows_results_does_not_count(tmp_path, monkeypatch):
    for name in ("measure/a.py", "report/b.py", "figures/c.py"):
        path = tmp_path / "vitnb" / name
        path.parent.mkdir(parents=True)
        path.write_text("1")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    before = machine.code_sha256()
    (tmp_path / "vitnb" / "report" / "b.py").write_text("2")
    assert machine.code_sha256() == before
    (tmp_path / "vitnb" / "measure" / "a.py").write_text("2")
    assert machine.code_sha256() != before


def test_a_checkpoint_is_its_weights_its_config_and_its_preprocessing(tmp_path):
    sums = set()
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text("1")
        sums.add(checkpoints.fingerprint(tmp_path))
        (tmp_path / name).write_text("2")
        sums.add(checkpoints.fingerprint(tmp_path))
    assert len(sums) == 6
    (tmp_path / "README.md").write_text("no part of the model")
    assert checkpoints.fingerprint(tmp_path) in sums


def test_a_split_is_the_bytes_of_its_files_in_order_and_its_labels(tmp_path):
    paths = []
    for i in range(3):
        path = tmp_path / f"{i}.png"
        path.write_bytes(bytes([i]))
        paths.append(path)
    split = Split(
        root=tmp_path,
        paths=paths,
        labels=[0, 1, 0],
        class_names=["a", "b"],
        name="test",
    )
    others = [
        dataclasses.replace(split, paths=paths[::-1]),
        dataclasses.replace(split, labels=[0, 1, 1]),
        dataclasses.replace(split, class_names=["b", "a"]),
    ]
    digests = [one.as_dependency()["data"]["test"] for one in [split, *others]]
    (tmp_path / "0.png").write_bytes(b"edited")
    digests.append(split.as_dependency()["data"]["test"])
    assert len(set(digests)) == 5
    (tmp_path / "0.png").unlink()
    assert split.as_dependency()["data"]["test"] not in digests


def test_an_identity_is_of_the_model_that_was_loaded(mini, tmp_path):
    """The checkpoint that is replaced after loading is not the one that ran."""
    folder = tmp_path / "merged"
    before = checkpoints.fingerprint(mini.checkpoint("merged"))
    shutil.copytree(mini.checkpoint("merged"), folder)
    loaded = loader.load_variant(mini, variants.parse("fp32-sdpa"), checkpoint=folder)
    (folder / "config.json").write_text("{}")
    found = identify(CPU).depend_on(loaded, load_split(mini, "valid"))
    assert found.checkpoints == {"merged": before}
    assert loaded.as_record()["checkpoint_sha256"] == before
    assert list(found.data) == ["valid"] and found.dtype == "float32"


def test_unfinished_work_counts_for_its_identity_alone(tmp_path):
    made = []

    def make() -> dict:
        made.append(1)
        return {"value": len(made)}

    plain = identify(CPU).depend_on(Checkpoints({"nf4": "sha"}))
    assert ResumeCache(tmp_path, plain.times_key()).get(make, size=1) == {"value": 1}
    assert ResumeCache(tmp_path, plain.times_key()).get(make, size=1) == {"value": 1}
    other = dataclasses.replace(plain, threads=plain.threads + 1)
    assert ResumeCache(tmp_path, other.times_key()).get(make, size=1) == {"value": 2}
