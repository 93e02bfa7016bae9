"""Records: what one run of a notebook was asked, what ran, its raw samples, and the machine. JSON, whole or not at all."""

import json
import random
import shutil
import time
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from IPython import get_ipython

from vitnb import devices, variants
from vitnb.errors import UserError, VariantError, one_line
from vitnb.records import machine
from vitnb.records.files import write_array, write_file
from vitnb.study import Study, load_study


def _plain(value: object):
    """JSON for what numpy and torch return."""
    if isinstance(value, (np.generic, torch.Tensor)):
        return value.item() if value.ndim == 0 else value.tolist()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a record cannot hold a {type(value).__name__}")


class Run:
    """One run of one notebook: holds what was asked, collects what was found, and saves it as one record."""

    def __init__(self, notebook: str, study: Study, asked: dict):
        self.study = study
        self.seed = asked["seed"] = study.seed if asked.get("seed") is None else asked["seed"]
        self.variant = variants.parse(asked["variant"]) if asked.get("variant") else None
        self.name = self._name(notebook, study, asked)
        self.path = study.outputs / "records" / f"{self.name}.json"
        self.unfinished = study.outputs / "unfinished" / self.name  # see ``unfinished``
        if notebook == "evaluate":
            self.batch_sizes = asked["batch_sizes"] = study.sizes(asked.get("batch_size"))
        self.record = {
            "notebook": notebook,
            "study": study.name,
            "name": self.name,
            "asked": asked,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "study_asked": asdict(study),
            "machine": machine.describe_machine(),
            "versions": machine.versions(),
        }
        self._begin = time.perf_counter()

    @staticmethod
    def _name(notebook: str, study: Study, asked: dict) -> str:
        """One record for each thing that can be asked of a study: a variant, a batch size, a folder of images.

        ``infer`` with the study's own variant is plain ``infer``: the one that the report shows.
        """
        parts = [notebook]
        if notebook == "evaluate":
            parts += [variants.parse(asked["variant"]).file] + [f"b{asked['batch_size']}"] * bool(asked.get("batch_size"))
            parts += [asked.get("device")] * bool(asked.get("device"))
        elif notebook == "infer":
            parts += [variants.parse(asked["variant"]).file] * (asked["variant"] != study.infer_variant)
            if asked.get("images"):
                parts.append(Path(asked["images"]).expanduser().resolve().name)
        elif notebook == "ablate":
            parts += [asked["by"]] * (asked.get("by", "layer") != "layer")
        elif notebook == "plan":
            parts.append(asked["name"])
        return "-".join(parts)

    def keep(self, kind: str, values: np.ndarray) -> str:
        """Write an array beside the records, too large to be in one; returns its path below the study's outputs."""
        name = f"{kind}/{self.name}.npy"
        write_array(self.study.outputs / name, values)
        return name

    def save(self, **found) -> dict:
        """Write the record, with its findings, and return it as it was written."""
        written = self._write({"status": "ok", "reason": ""} | found)
        shutil.rmtree(self.unfinished, ignore_errors=True)
        with suppress(OSError):  # it is missing, or another measurement has something in it
            self.unfinished.parent.rmdir()
        return written

    def fail(self, error: BaseException) -> dict:
        """Write a record without findings that says why the variant has none."""
        return self._write({"status": "failed", "reason": one_line(error)})

    def _write(self, found: dict) -> dict:
        whole = self.record | {"seconds": round(time.perf_counter() - self._begin, 1)} | found
        text = json.dumps(whole, default=_plain, allow_nan=False, indent=1)
        write_file(self.path, text + "\n")
        return json.loads(text)


def begin(notebook: str, study: str, **asked) -> Run:
    """Begin a run: load the study, check that the machine can do it, and seed every generator.

    Args:
        notebook: which notebook asks.
        study: a name under ``studies/`` or the path of a YAML file.
        asked: the notebook's other parameters, kept in the record as they are; ``seed=None`` for the study's own.

    Raises:
        UserError: unknown study or variant, or a study that needs a GPU on a machine without one.
    """
    _tell_errors_in_one_line()
    loaded = load_study(study)
    devices.check_requirements(loaded)
    run = Run(notebook, loaded, asked)
    random.seed(run.seed)
    np.random.seed(run.seed)
    torch.manual_seed(run.seed)
    if run.variant:
        _CURRENT.append(run)
    return run


_CURRENT: list[Run] = []  # the run that a failing variant belongs to


def _tell_errors_in_one_line() -> None:
    """In a notebook, show our own errors as one line without a stack trace, and record a variant that failed."""
    shell = get_ipython()
    if shell is None:
        return

    def tell(shell, kind, error, trace, tb_offset=None):
        if isinstance(error, torch.OutOfMemoryError):
            error = VariantError(f"out of memory: lower batch_size, or take an nf4 variant ({one_line(error)[:80]})")
            kind = VariantError
        if isinstance(error, VariantError) and _CURRENT:
            _CURRENT[-1].fail(error)
        shell._showtraceback(kind, error, [f"{kind.__name__}: {one_line(error)}"])

    shell.set_custom_exc((UserError, VariantError, torch.OutOfMemoryError), tell)
