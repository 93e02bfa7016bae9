"""Stored logits: only those of one model, one set of images and one device count."""

import json

import numpy as np
import pytest

from vitnb import devices
from vitnb.measure.accuracy import kl_to_baseline, load_logits
from vitnb.records.files import write_file
from vitnb.records.identity import Checkpoints, identify
from vitnb.records.run import Run
from vitnb.study import Study, load_study

SUMS = {"fp32-sdpa": {"merged": "m"}, "nf4-sdpa": {"nf4": "n"}}
IDENTITY = identify(devices.select_device())
COMPARED = IDENTITY.depend_on(*(Checkpoints(sums) for sums in SUMS.values()))


@pytest.fixture
def study(mini_yaml, tmp_path, monkeypatch) -> Study:
    monkeypatch.setenv("VITNB_OUTPUTS", str(tmp_path))
    return load_study(str(mini_yaml))


def store(study: Study, variant: str, value: float, **asked) -> Run:
    """Store the logits of three images, as evaluate does."""
    run = Run("evaluate", study, {"variant": variant} | asked)
    run.depend_on(Checkpoints(SUMS[variant]))
    logits = np.float32([[value, 0.0], [0.0, value], [1.0, value]])
    run.save(logits=run.save_array("logits", logits))
    return run


def change(run: Run, **identity) -> None:
    """Change the identity in a record that was written."""
    record = json.loads(run.path.read_text())
    record["identity"] |= identity
    write_file(run.path, json.dumps(record))


def test_the_logits_of_every_variant_are_loaded(study):
    for variant, value in (("fp32-sdpa", 2.0), ("nf4-sdpa", 3.0)):
        store(study, variant, value)
    store(study, "nf4-sdpa", 9.0, batch_size=8)
    logits = load_logits(study, COMPARED)
    assert {name: float(array[0, 0]) for name, array in logits.items()} == {
        "fp32-sdpa": 2.0,
        "nf4-sdpa": 3.0,
    }
    p, q = (logits[name].double().softmax(-1) for name in ("fp32-sdpa", "nf4-sdpa"))
    by_hand = (p * (p / q).log()).sum(-1)
    (found,) = kl_to_baseline(logits)["nf4-sdpa"].values()
    assert found == pytest.approx(by_hand.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        {"checkpoints": {"nf4": "of another training"}},
        {"device": "another device"},
        {"data": {"test": "of other images"}},
    ],
)
def test_logits_of_another_model_device_or_image_are_left_out(study, other):
    """Their KL would be the distance of two models, and not of two precisions."""
    baseline = store(study, "fp32-sdpa", 2.0)
    change(store(study, "nf4-sdpa", 3.0), **other)
    change(baseline, data={"test": "of these images"})
    path = study.outputs / "records" / "evaluate-fp32-sdpa.json"
    newest = json.loads(path.read_text()) | {"started": "2999"}
    write_file(path, json.dumps(newest))
    assert list(load_logits(study, COMPARED)) == ["fp32-sdpa"]


def test_an_array_that_its_record_does_not_know_is_left_out(study):
    """A kill between the array and its record leaves the two apart."""
    run = store(study, "fp32-sdpa", 2.0)
    np.save(study.outputs / "logits" / f"{run.name}.npy", np.zeros((3, 2), np.float32))
    assert load_logits(study, COMPARED) == {}
