"""Training on several GPUs: accelerate's launcher starts a process for each, and they share every batch (see ``training``).

A folder holds what they need: study, adapters and head as they are, preprocessing, splits. Back come the learning curve and the
weights that were trained, which are small. The base is loaded by each process from where it lies.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file, save_file

from vitnb import devices
from vitnb.data.splits import Split
from vitnb.errors import UserError, one_line
from vitnb.models import checkpoints, pretrained
from vitnb.study import ROOT, Study, load_study
from vitnb.training import loop

MODULE = "vitnb.training.distributed"  # what every process runs, see ``main``


def check_processes(study: Study, processes: int) -> None:
    """Raise UserError where so many processes cannot share the study's batches, or have no GPU each."""
    if processes < 1:
        raise UserError(f"processes must be at least 1, got {processes}")
    gpus, batch_size = torch.cuda.device_count(), study.finetune.batch_size
    if devices.select_device().type == "cuda" and processes > gpus:
        raise UserError(f"processes: {processes} need a GPU each, and PyTorch sees {gpus}: take at most {gpus}")
    if batch_size % processes:
        fit = [n for n in range(1, batch_size + 1) if batch_size % n == 0 and n < 2 * processes]
        raise UserError(
            f"processes: {processes} do not divide the study's finetune: batch_size {batch_size}: "
            f"take one of {', '.join(map(str, fit))}, or another batch_size"
        )


def train_shared(
    model: PeftModel,
    study: Study,
    processor,
    train: Split,
    valid: Split,
    *,
    seed=0,
    epochs=None,
    processes=1,
) -> list[dict]:
    """``training.train``, in this process or shared by several; the model ends up trained either way.

    Several start from this model's weights and learn from the same batches as one would: ``study.finetune.batch_size`` is
    what they share. Each has a GPU of its own; without a GPU they run on the CPU. Only dropout differs from one process.

    Raises UserError as ``check`` and ``training.train`` do, and for a process that died.
    """
    check_processes(study, processes)
    if processes == 1:
        return loop.train(model, study, processor, train, valid, seed=seed, epochs=epochs)
    with tempfile.TemporaryDirectory(prefix="vitnb-launch-") as temporary:
        folder = Path(temporary)
        _write(folder, model, study, processor)
        job = {"train": asdict(train), "valid": asdict(valid), "seed": seed, "epochs": epochs}
        job |= {"base_precision": _precision(model), "gradient_checkpointing": model.is_gradient_checkpointing}
        (folder / "job.json").write_text(json.dumps(job, default=str))
        _run(folder, processes)
        learned = load_file(folder / "learned.safetensors")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(learned[name])
        return json.loads((folder / "history.json").read_text())


def _write(folder: Path, model: PeftModel, study: Study, processor) -> None:
    model.save_pretrained(folder / "adapters")  # with the head
    processor.save_pretrained(folder / "processor")
    fields = {key: value for key, value in asdict(study).items() if value is not None}
    (folder / "study.yaml").write_text(json.dumps(fields))  # JSON is YAML


def _precision(model: PeftModel) -> str:
    """What the frozen base was loaded in, in the words of ``bases.load``."""
    settings = getattr(model.get_base_model().config, "quantization_config", None)
    return "fp32" if settings is None else "nf4" if settings.load_in_4bit else "int8"


def _run(folder: Path, processes: int) -> None:
    """Start the processes, show what the first one prints, and wait for them; UserError if one dies."""
    # --multi_gpu: a process a device, whatever the device is. What is spelled out would else come from the user's own settings
    # of accelerate.
    options = (
        f"--multi_gpu --num_processes {processes} --num_machines 1 --gpu_ids all --main_process_port 0 "
        "--mixed_precision no --dynamo_backend no "
        f"--num_cpu_threads_per_process {max(1, torch.get_num_threads() // processes)} --module {MODULE}"
    )
    words = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), str(folder)]
    python_path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    env = os.environ | {"PYTHONPATH": python_path}
    with (folder / "stderr").open("w") as said:
        launched = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=said, text=True, env=env)
    with launched:
        try:
            for line in launched.stdout:
                print(line, end="", flush=True)
        except BaseException:  # an interrupted notebook leaves no processes behind
            launched.terminate()
            launched.wait()
            raise
    if launched.returncode:
        raise _error(folder, processes)


def _error(folder: Path, processes: int) -> UserError:
    """Why the processes ended, in one line: the first to fail has written it down, unless it was killed."""
    said, note = (folder / "stderr").read_text(errors="replace"), folder / "error.json"
    advice = "lower the study's finetune: batch_size, take base_precision nf4, or close other programs"
    codes = [int(code) for code in re.findall(r"exitcode\s*:\s*-(\d+)", said)]
    killed = [code for code in codes if code != 15]  # the launcher ends the others with 15
    if killed:
        return UserError(
            f"one of {processes} processes was killed (signal {killed[0]}), most likely out of memory: {advice}"
        )
    if not note.exists():
        last = said.strip().splitlines()[-1:] or ["no message"]
        return UserError(f"{processes} processes did not start: {last[0]}: with processes 1, no launcher is needed")
    rank, kind, text = json.loads(note.read_text())
    if kind == "UserError":
        return UserError(text)
    fix = advice if kind == "OutOfMemoryError" else "with processes 1, the notebook shows where"
    return UserError(f"process {rank + 1} of {processes} failed with {kind}: {text}: {fix}")


def main(folder: Path) -> None:
    """One of the processes, started by accelerate's launcher; the first writes what was learned into the folder."""
    job, rank = json.loads((folder / "job.json").read_text()), int(os.environ["RANK"])
    try:
        team = Accelerator(cpu=devices.select_device().type == "cpu", mixed_precision="no")
        train, valid = (
            Split(**job[name] | {"paths": [Path(path) for path in job[name]["paths"]]})
            for name in ("train", "valid")
        )
        study = load_study(str(folder / "study.yaml"))
        base = pretrained.load_base(study, train.class_names, job["base_precision"])
        if job["gradient_checkpointing"]:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model = PeftModel.from_pretrained(base, folder / "adapters", is_trainable=True, torch_device="cpu")
        torch.manual_seed(job["seed"] * 10_000 + rank)  # each draws its own dropout
        history = loop.train(
            model, study, checkpoints.load_processor(folder / "processor"), train, valid,
            seed=job["seed"], epochs=job["epochs"], team=team,
        )  # fmt: skip
        if team.is_main_process:
            learned = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
            save_file(learned, folder / "learned.safetensors")
            (folder / "history.json").write_text(json.dumps(history))
        team.end_training()
    except Exception as error:
        with suppress(FileExistsError), (folder / "error.json").open("x") as file:
            json.dump([rank, type(error).__name__, one_line(error)], file)
        raise


if __name__ == "__main__":
    main(Path(sys.argv[1]))
