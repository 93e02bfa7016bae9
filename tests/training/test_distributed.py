"""Training in several processes: what one process learns, and failures in one line."""

import json
import signal
import subprocess
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from vitnb import cli, devices
from vitnb.analysis import learning
from vitnb.errors import UserError
from vitnb.models import pretrained
from vitnb.training import distributed, lora

# Programs that the processes run in place of ``distributed``.
FP32_SGD = """
import sys
from contextlib import nullcontext
from pathlib import Path
import torch
from vitnb import devices
from vitnb.training import distributed
devices.autocast = lambda device: nullcontext()
torch.optim.AdamW = lambda weights, lr, weight_decay: torch.optim.SGD(weights, lr)
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
FAILING = """
import os, sys
from pathlib import Path
from vitnb.training import distributed
def broken(*_):
    raise KeyError("a")
if os.environ["RANK"] == "1":
    distributed.pretrained.load_base = broken
distributed.main(Path(sys.argv[1]))
"""
ENDLESS = """
import time
time.sleep(600)
"""

needs_two_gpus_or_none = pytest.mark.skipif(
    torch.cuda.device_count() == 1, reason="needs 2 GPUs, or none"
)


@pytest.fixture
def program(monkeypatch, tmp_path):
    """Let the processes run another program."""

    def use(source: str) -> None:
        (tmp_path / "instead.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(distributed, "MODULE", "instead")

    return use


def fit(
    study, shapes, processes, images, **options
) -> tuple[list[dict], torch.Tensor, torch.Tensor]:
    """Train on the first images.

    Returns:
        The learning curve, and all trained weights before and after.
    """
    train_split, valid_split, processor = shapes
    torch.manual_seed(0)
    model = lora.add_adapters(study, train_split.class_names, **options)
    weights = [p for p in model.parameters() if p.requires_grad]
    before = torch.cat([p.detach().flatten() for p in weights])
    first_images = replace(
        train_split,
        paths=train_split.paths[:images],
        labels=train_split.labels[:images],
    )
    # No prediction is right, so the first epoch is the best. An image between two
    # classes cannot change that.
    valid_split = replace(valid_split, labels=[4] * len(valid_split))
    history = distributed.train_shared(
        model,
        study,
        processor,
        first_images,
        valid_split,
        epochs=2,
        processes=processes,
    )
    return history, before, torch.cat([p.detach().flatten() for p in weights])


@needs_two_gpus_or_none
@pytest.mark.parametrize(
    ("batch_size", "options"),
    [(14, {}), (10, {"base_precision": "nf4", "gradient_checkpointing": True})],
)
def test_several_processes_learn_what_one_learns(
    mini, shapes, monkeypatch, program, capfd, batch_size, options
):
    """Of 31 images the last batch has 3, or 1, for two processes to share.

    The gradient of a batch is the sum of two rounded parts, and differs from that of
    one process by the rounding. The training is by SGD, whose steps are proportional to
    the gradients. AdamW is no measure here. The input matrix of an adapter has its
    first gradient in the second step, because the output matrix starts at zero. A few
    of these gradients are nothing but rounding (-6e-7 in one process and 1e-7 in two).
    AdamW divides the first gradient by its own size, and takes a whole step up or down.
    Two such weights of 21,764 make 99.8 % of a difference of 0.015. In float64 the
    difference is 3e-13, and by SGD in float32 it is 4e-7. The number of threads changes
    nothing. There is no dropout, because each process draws its own.
    """
    budget = replace(
        mini.finetune, batch_size=batch_size, dropout=0.0, learning_rate=0.1
    )
    study = replace(mini, finetune=budget)
    monkeypatch.setattr(devices, "autocast", lambda device: nullcontext())
    monkeypatch.setattr(
        torch.optim,
        "AdamW",
        lambda weights, lr, weight_decay: torch.optim.SGD(weights, lr),
    )
    program(FP32_SGD)
    one_history, before, one = fit(study, shapes, 1, 31, **options)
    one_lines = capfd.readouterr().out
    history, start, several = fit(study, shapes, 2, 31, **options)
    lines = capfd.readouterr().out
    tolerance = 1e-5  # a hundred times the rounding of float32, 6e-8
    if options and devices.compute_dtype(one.device) != torch.float32:
        tolerance = 0.01  # NF4 computes in 16 bits, whose rounding is 2^-8
    assert torch.equal(before, start)
    one_losses = [row["loss"] for row in one_history]
    losses = [row["loss"] for row in history]
    assert losses == pytest.approx(one_losses, rel=tolerance)
    difference = (several - one).norm() / (one - before).norm()
    assert difference < tolerance
    assert progress(lines) == progress(one_lines)


def progress(lines: str) -> list[list[str]]:
    """Return the lines' words on the progress; losses are compared as numbers."""
    return [line.split("  ")[:2] for line in lines.splitlines()]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 NVIDIA GPUs")
@pytest.mark.parametrize("weights", ["fp32", "nf4", "int8"])
def test_a_base_is_loaded_onto_the_gpu_of_its_process(mini, weights):
    with torch.cuda.device(1):
        model = pretrained.load_base(mini, ["a", "b"], weights)
    assert {p.device.index for p in model.parameters()} == {1}


@needs_two_gpus_or_none
@pytest.mark.parametrize(
    ("source", "line"),
    [
        (
            KILLED,
            r"^one of 2 processes was killed \(signal 9\), most likely out of memory: "
            "lower",
        ),
        (FAILING, "^process 2 of 2 failed with KeyError: 'a': with processes 1"),
        ("raise SystemExit('no such option')", "^2 processes did not start: no such"),
    ],
)
def test_a_process_that_fails_ends_the_run(mini, shapes, program, source, line):
    program(source)
    with pytest.raises(UserError, match=line):
        fit(mini, shapes, 2, 32)


def test_an_interrupt_leaves_no_process_behind(tmp_path, program, monkeypatch):
    workers = []

    def interrupt(started: list[subprocess.Popen], folder) -> None:
        workers.extend(started)
        raise KeyboardInterrupt

    program(ENDLESS)
    monkeypatch.setattr(distributed, "_wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        distributed.run_processes(tmp_path, 3)
    assert [worker.returncode for worker in workers] == [-signal.SIGTERM] * 3


@pytest.mark.parametrize(
    ("note", "exit_codes", "line"),
    [
        (
            [1, "UserError", "cannot read x.png: replace it"],
            [1, 1, None, None],
            "cannot read x.png: replace it",
        ),
        (
            [1, "OutOfMemoryError", "12 GiB"],
            [None, 1, None, None],
            "process 2 of 4 failed with OutOfMemoryError: 12 GiB: lower the study's",
        ),
        (
            [0, "KeyError", "'a'"],
            [1, -6, -6, None],  # NCCL aborts the peers
            "process 1 of 4 failed with KeyError: 'a': "
            "with processes 1, the notebook shows where",
        ),
        (
            [0, "RuntimeError", "connection closed by peer"],
            [1, None, -9, None],
            "one of 4 processes was killed (signal 9), most likely out of memory",
        ),
        (
            None,
            [None, None, None, -6],
            "one of 4 processes was killed (signal 6), most likely out of memory",
        ),
        (
            None,
            [None, 2, None, None],
            "4 processes did not start: no such option: with processes 1",
        ),
    ],
)
def test_the_reason_is_one_line(tmp_path, note, exit_codes, line):
    (tmp_path / "stderr-1").write_text("usage\nno such option\n")
    if note:
        (tmp_path / "error.json").write_text(json.dumps(note))
    error = distributed.explain_failure(tmp_path, exit_codes)
    assert str(error).startswith(line)


@pytest.mark.parametrize(
    ("processes", "message"),
    [
        (0, "processes must be at least 1, got 0"),
        (
            3,
            "3 do not divide the study's finetune: batch_size 8: "
            "take one of 1, 2, 4, or another batch_size",
        ),
        (16, "16 do not divide"),
    ],
)
def test_processes_that_make_no_sense(mini, shapes, processes, message, monkeypatch):
    monkeypatch.setattr(devices, "select_device", lambda: torch.device("cpu"))
    with pytest.raises(UserError, match=message):
        fit(mini, shapes, processes, 32)


def test_more_processes_than_gpus(mini, monkeypatch):
    monkeypatch.setattr(devices, "select_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    distributed.check_processes(mini, 2)
    message = "processes: 4 need a GPU each, and PyTorch sees 2: take at most 2"
    with pytest.raises(UserError, match=message):
        distributed.check_processes(mini, 4)


@needs_two_gpus_or_none
def test_the_notebook_trains_on_several_processes(
    mini, mini_yaml, tmp_path, monkeypatch
):
    monkeypatch.setenv("VITNB_OUTPUTS", str(tmp_path))
    parameters = f"-p study {mini_yaml} -p epochs 1 -p processes 2"
    assert cli.main(["run", "finetune", *parameters.split()]) == 0
    record = json.loads((tmp_path / "mini/records/finetune.json").read_text())
    assert record["asked"]["processes"] == 2 and len(record["history"]) == 1
    assert record["training"] == learning.training_cost(record["history"])
    on_cpu = devices.select_device().type == "cpu"
    assert (record["training"]["peak_bytes"] is None) == on_cpu
