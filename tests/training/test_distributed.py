"""Several processes: they learn what one process learns, and one that dies ends the run in one line."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from vitnb import cli, devices
from vitnb.analysis import learning
from vitnb.errors import UserError
from vitnb.models import pretrained
from vitnb.training import distributed, lora

# What the processes run instead of ``vitnb.launch``: 16 bits would round a batch's parts otherwise than the batch.
IN_FP32 = """
import sys
from contextlib import nullcontext
from pathlib import Path
from vitnb import devices
from vitnb.training import distributed
devices.autocast = lambda on: nullcontext()
distributed.main(Path(sys.argv[1]))
"""
KILLED = """
import os, signal, sys
from pathlib import Path
from vitnb.training import distributed
if os.environ["RANK"] == "1":
    distributed.pretrained.load_base = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
distributed.main(Path(sys.argv[1]))
"""


@pytest.fixture
def instead(monkeypatch, tmp_path):
    def run(program: str) -> None:
        (tmp_path / "instead.py").write_text(program)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(distributed, "MODULE", "instead")

    return run


def fitted(study, shapes, processes, images, **options) -> tuple[list[dict], torch.Tensor, torch.Tensor]:
    """The learning curve of training on the first so many images, and all trained weights, before and after."""
    train, valid, processor = shapes
    torch.manual_seed(0)
    model = lora.add_adapters(study, train.class_names, **options)
    learned = [p for p in model.parameters() if p.requires_grad]
    before = torch.cat([p.detach().flatten() for p in learned])
    some = replace(train, paths=train.paths[:images], labels=train.labels[:images])
    # No answer is right, so that the first epoch is the best, and no image that lies between two classes can change that.
    valid = replace(valid, labels=[4] * len(valid))
    history = distributed.train_shared(model, study, processor, some, valid, epochs=2, processes=processes)
    return history, before, torch.cat([p.detach().flatten() for p in learned])


@pytest.mark.parametrize(
    ("batch_size", "options", "same_loss", "same_weights"),
    # NF4 computes in 16 bits, which round a part of a batch otherwise than the whole.
    [(14, {}, 1e-5, 0.01), (10, {"base_precision": "nf4", "gradient_checkpointing": True}, 5e-4, 0.2)],
)
def test_several_processes_learn_what_one_learns(
    mini, shapes, monkeypatch, instead, capfd, batch_size, options, same_loss, same_weights
):
    """Of 31 images the last batch has 3, or 1, for two processes to share. Without dropout, which each draws for itself."""
    if devices.select_device().type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs, or none")
    study = replace(mini, finetune=replace(mini.finetune, batch_size=batch_size, dropout=0.0))
    monkeypatch.setattr(devices, "autocast", lambda on: nullcontext())
    instead(IN_FP32)
    one, before, alone = fitted(study, shapes, 1, 31, **options)
    shown = capfd.readouterr().out
    several, start, shared = fitted(study, shapes, 2, 31, **options)
    assert torch.equal(before, start)
    assert [row["loss"] for row in several] == pytest.approx([row["loss"] for row in one], rel=same_loss)
    # As a share of what was learned. Adam makes a step of every gradient, so weights whose gradient is rounding may differ.
    off = (shared - alone).norm() / (alone - before).norm()
    assert off < same_weights
    told = capfd.readouterr().out
    assert [line.split("  ")[:3] for line in told.splitlines()] == [line.split("  ")[:3] for line in shown.splitlines()]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 NVIDIA GPUs")
@pytest.mark.parametrize("weights", ["fp32", "nf4", "int8"])
def test_a_base_is_loaded_onto_the_gpu_of_its_process(mini, weights):
    with torch.cuda.device(1):
        model = pretrained.load_base(mini, ["a", "b"], weights)
    assert {p.device.index for p in model.parameters()} == {1}


def test_a_process_that_is_killed_ends_the_run(mini, shapes, instead):
    instead(KILLED)
    with pytest.raises(
        UserError, match=r"^one of 2 processes was killed \(signal 9\), most likely out of memory: lower"
    ):
        fitted(mini, shapes, 2, 32)


@pytest.mark.parametrize(
    ("note", "line"),
    [
        ([1, "UserError", "cannot read x.png: replace it"], "cannot read x.png: replace it"),
        ([1, "OutOfMemoryError", "12 GiB"], "process 2 of 4 failed with OutOfMemoryError: 12 GiB: lower the study's"),
        (
            [0, "KeyError", "'a'"],
            "process 1 of 4 failed with KeyError: 'a': with processes 1, the notebook shows where",
        ),
        (None, "4 processes did not start: no such option: with processes 1"),
    ],
)
def test_the_reason_is_one_line(tmp_path, note, line):
    (tmp_path / "stderr").write_text("usage\nexitcode  : 1 (pid: 7)\nexitcode : -15 (pid: 8)\nno such option\n")
    if note:
        (tmp_path / "error.json").write_text(json.dumps(note))
    assert str(distributed._error(tmp_path, 4)).startswith(line)


@pytest.mark.parametrize(
    ("processes", "message"),
    [
        (0, "processes must be at least 1, got 0"),
        (3, "3 do not divide the study's finetune: batch_size 8: take one of 1, 2, 4, or another batch_size"),
        (16, "16 do not divide"),
    ],
)
def test_processes_that_make_no_sense(mini, shapes, processes, message, monkeypatch):
    monkeypatch.setattr(devices, "select_device", lambda: torch.device("cpu"))
    with pytest.raises(UserError, match=message):
        fitted(mini, shapes, processes, 32)


def test_more_processes_than_gpus(mini, monkeypatch):
    monkeypatch.setattr(devices, "select_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    distributed.check_processes(mini, 2)
    with pytest.raises(UserError, match="processes: 4 need a GPU each, and PyTorch sees 2: take at most 2"):
        distributed.check_processes(mini, 4)


def test_the_notebook_trains_on_several_processes(mini, mini_yaml, tmp_path, monkeypatch):
    if devices.select_device().type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs, or none")
    monkeypatch.setenv("VITNB_OUTPUTS", str(tmp_path))
    words = ["-p", "study", str(mini_yaml), "-p", "epochs", "1", "-p", "processes", "2"]
    assert cli.main(["run", "finetune", *words]) == 0
    record = json.loads((tmp_path / "mini" / "records" / "finetune.json").read_text())
    assert record["asked"]["processes"] == 2 and len(record["history"]) == 1
    assert record["training"] == learning.training_cost(record["history"])
    assert (record["training"]["peak_bytes"] is None) == (devices.select_device().type == "cpu")
