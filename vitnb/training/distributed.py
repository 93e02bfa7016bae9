"""Training on several GPUs: one process for each GPU, and every batch is shared.

A folder carries the job to the processes: the study, adapters and head, the
preprocessing and the splits. The first process writes the learning curve and the
trained weights into the same folder. Both are small, because each process loads the
frozen base itself. ``torchrun --nproc-per-node N -m vitnb.training.distributed FOLDER``
runs the same job.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
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
from vitnb.processes import child_environment
from vitnb.records.parameters import check_parameter
from vitnb.study import Study, load_study
from vitnb.training import loop

MODULE = "vitnb.training.distributed"  # the module that each process runs, see ``main``
POLL_SECONDS = 0.1
GRACE_SECONDS = 2.0  # in which the peers of a failed process may end by themselves


def check_processes(study: Study, processes: int) -> None:
    """Raise UserError if the processes cannot share a batch or have no GPU each."""
    check_parameter("processes", processes)
    gpus = torch.cuda.device_count()
    if devices.select_device().type == "cuda" and processes > gpus:
        raise UserError(
            f"processes: {processes} need a GPU each, and PyTorch sees {gpus}: "
            f"take at most {gpus}"
        )
    batch_size = study.finetune.batch_size
    if batch_size % processes:
        divisors = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
        possible = [str(n) for n in divisors if n < 2 * processes]
        raise UserError(
            f"processes: {processes} do not divide the study's finetune: "
            f"batch_size {batch_size}: take one of {', '.join(possible)}, "
            "or another batch_size"
        )


def train_shared(
    model: PeftModel,
    study: Study,
    processor,
    train_split: Split,
    valid_split: Split,
    *,
    seed: int = 0,
    epochs: int | None = None,
    processes: int = 1,
) -> list[dict]:
    """Train as ``loop.train`` does, in this process or in several that share the work.

    Several processes start from the weights of this model and see the same batches as
    one process would: ``study.finetune.batch_size`` is the size that they share. Each
    process has a GPU of its own, or runs on the CPU if there is no GPU. Only dropout
    differs from one process to the next. The model holds the trained weights afterwards
    in either case.

    Raises:
        UserError: as ``check_processes`` and ``loop.train`` do, and for a process that
            fails.
    """
    check_processes(study, processes)
    if processes == 1:
        return loop.train(
            model, study, processor, train_split, valid_split, seed=seed, epochs=epochs
        )
    with tempfile.TemporaryDirectory(prefix="vitnb-training-") as temporary:
        folder = Path(temporary)
        job = {
            "train": asdict(train_split),
            "valid": asdict(valid_split),
            "seed": seed,
            "epochs": epochs,
            "base_precision": _base_precision(model),
            "gradient_checkpointing": model.is_gradient_checkpointing,
        }
        _write_job(folder, job, model, study, processor)
        run_processes(folder, processes)
        _copy_weights(load_file(folder / "weights.safetensors"), model)
        return json.loads((folder / "history.json").read_text())


def _write_job(
    folder: Path, job: dict, model: PeftModel, study: Study, processor
) -> None:
    model.save_pretrained(folder / "adapters")  # with the head
    processor.save_pretrained(folder / "processor")
    fields = {key: value for key, value in asdict(study).items() if value is not None}
    (folder / "study.yaml").write_text(json.dumps(fields))  # JSON is YAML
    (folder / "job.json").write_text(json.dumps(job, default=str))


def _base_precision(model: PeftModel) -> str:
    """Return the precision of the frozen base, as ``pretrained.load_base`` takes it."""
    settings = getattr(model.get_base_model().config, "quantization_config", None)
    if settings is None:
        return "fp32"
    return "nf4" if settings.load_in_4bit else "int8"


@torch.no_grad()
def _copy_weights(weights: dict[str, torch.Tensor], model: PeftModel) -> None:
    for name, weight in loop.trainable_weights(model).items():
        weight.copy_(weights[name])


def run_processes(folder: Path, processes: int) -> None:
    """Run a job in several processes, and show the lines that the first one prints.

    No process is left behind, however this function ends.

    Raises:
        UserError: a process was killed, failed or did not start.
    """
    port = _free_port()
    workers: list[subprocess.Popen] = []
    try:
        for rank in range(processes):
            workers.append(_start_process(folder, rank, processes, port))
        exit_codes = _wait(workers, folder)
    finally:
        _stop(workers)
    if any(exit_codes):
        raise explain_failure(folder, exit_codes)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _start_process(
    folder: Path, rank: int, processes: int, port: int
) -> subprocess.Popen:
    """Start one process, with the environment variables that torchrun would set."""
    environment = child_environment() | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes)),
    }
    with (
        _stdout_path(folder, rank).open("w") as stdout,
        _stderr_path(folder, rank).open("w") as stderr,
    ):
        return subprocess.Popen(
            [sys.executable, "-m", MODULE, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=environment,
        )


def _stdout_path(folder: Path, rank: int) -> Path:
    return folder / f"stdout-{rank}"


def _stderr_path(folder: Path, rank: int) -> Path:
    return folder / f"stderr-{rank}"


def _wait(workers: list[subprocess.Popen], folder: Path) -> list[int | None]:
    """Wait until all processes have ended or one has failed; return the exit codes.

    An exit code below zero is the number of the signal that killed the process. It is
    None for a process that still runs.
    """
    with _stdout_path(folder, 0).open() as stdout:
        while True:
            exit_codes = [worker.poll() for worker in workers]
            print(stdout.read(), end="", flush=True)
            if None not in exit_codes:
                return exit_codes
            if any(exit_codes):
                # A process that dies breaks the connection of its peers. The system may
                # report the end of a peer first, and the cause a moment later.
                time.sleep(GRACE_SECONDS)
                return [worker.poll() for worker in workers]
            time.sleep(POLL_SECONDS)


def _stop(workers: list[subprocess.Popen]) -> None:
    """End the processes that still run."""
    for worker in workers:
        worker.terminate()
    for worker in workers:
        try:
            worker.wait(timeout=10)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def explain_failure(folder: Path, exit_codes: list[int | None]) -> UserError:
    """Return why a job failed, in one line.

    Args:
        folder: of the job. The first process that raised an error has noted it there.
        exit_codes: one for each process, see ``_wait``.
    """
    processes = len(exit_codes)
    advice = (
        "lower the study's finetune: batch_size, take base_precision nf4, "
        "or close other programs"
    )
    note = folder / "error.json"
    signals = [-code for code in exit_codes if code is not None and code < 0]
    if note.exists():
        # NCCL aborts a process whose peer has failed. The note names the peer.
        signals = [number for number in signals if number != signal.SIGABRT]
    if signals:
        return UserError(
            f"one of {processes} processes was killed (signal {signals[0]}), "
            f"most likely out of memory: {advice}"
        )
    if not note.exists():
        rank = next(rank for rank, code in enumerate(exit_codes) if code)
        stderr = _stderr_path(folder, rank).read_text(errors="replace")
        last_line = (stderr.strip().splitlines() or ["no message"])[-1]
        return UserError(
            f"{processes} processes did not start: {last_line}: "
            "with processes 1, none has to be started"
        )
    rank, kind, text = json.loads(note.read_text())
    if kind == "UserError":
        return UserError(text)
    fix = "with processes 1, the notebook shows where"
    if kind == "OutOfMemoryError":
        fix = advice
    return UserError(
        f"process {rank + 1} of {processes} failed with {kind}: {text}: {fix}"
    )


def main(folder: Path) -> None:
    """Run one of the processes of a job; the first one writes the results."""
    try:
        _run_job(folder)
    except Exception as error:
        note = [int(os.environ["RANK"]), type(error).__name__, one_line(error)]
        # The first error is the cause of the others.
        with suppress(FileExistsError), (folder / "error.json").open("x") as file:
            json.dump(note, file)
        raise


def _run_job(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    on_cpu = devices.select_device().type == "cpu"
    team = Accelerator(cpu=on_cpu, mixed_precision="no")
    study = load_study(str(folder / "study.yaml"))
    train_split = _read_split(job["train"])
    model = _load_model(folder, job, study, train_split.class_names)
    # Each process draws a dropout of its own.
    torch.manual_seed(job["seed"] * 10_000 + team.process_index)
    history = loop.train(
        model,
        study,
        checkpoints.load_processor(folder / "processor"),
        train_split,
        _read_split(job["valid"]),
        seed=job["seed"],
        epochs=job["epochs"],
        team=team,
    )
    if team.is_main_process:
        weights = {
            name: weight.detach().cpu()
            for name, weight in loop.trainable_weights(model).items()
        }
        save_file(weights, folder / "weights.safetensors")
        (folder / "history.json").write_text(json.dumps(history))
    team.end_training()


def _read_split(fields: dict) -> Split:
    paths = [Path(path) for path in fields["paths"]]
    return Split(**fields | {"paths": paths})


def _load_model(
    folder: Path, job: dict, study: Study, class_names: list[str]
) -> PeftModel:
    base = pretrained.load_base(study, class_names, job["base_precision"])
    if job["gradient_checkpointing"]:
        base.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    return PeftModel.from_pretrained(
        base, folder / "adapters", is_trainable=True, torch_device="cpu"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
