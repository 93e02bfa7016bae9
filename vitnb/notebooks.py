"""Run one notebook (papermill) or a whole study (Snakemake), headless.

Parameters are checked before a kernel starts, and every error ends in one line.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from vitnb import variants
from vitnb.errors import UserError, VariantError, suggest
from vitnb.processes import child_environment
from vitnb.study import ROOT, Study, load_study

FOLDER = ROOT / "notebooks"
TYPES = {"int": int, "float": float, "str": str, "bool": bool}
SNAKEMAKE_OPTIONS = (
    "--cores all --rerun-triggers mtime input params "
    "--quiet rules host --keep-incomplete"
)


def notebook_path(name: str) -> Path:
    """Return the path of a notebook; raise UserError with the nearest right name."""
    known = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    if name not in known:
        raise UserError(f"no notebook '{name}': {suggest(name, known)}")
    return FOLDER / f"{name}.ipynb"


def parse_parameters(
    path: Path, given: list[tuple[str, str]]
) -> tuple[dict[str, object], dict[str, object]]:
    """Return typed parameters from pairs of words.

    The annotations in the notebook's parameters cell say the types.

    Returns:
        The given parameters, and all parameters with the notebook's defaults.

    Raises:
        UserError: an unknown name (with the nearest right one), a wrong type, a variant
            or a study that does not exist.
    """
    known = papermill.inspect_notebook(str(path))
    parameters = {}
    for name, text in given:
        if name not in known:
            hint = suggest(name, known)
            raise UserError(f"{path.stem} has no parameter '{name}': {hint}")
        kind = known[name]["inferred_type_name"].split("|")[0].strip()
        parameters[name] = _parse_value(name, text, kind)
    asked = {
        name: ast.literal_eval(about["default"]) for name, about in known.items()
    } | parameters
    study = load_study(asked["study"])
    if study.requires:
        # Late, as torch takes seconds: a notebook's kernel imports torch anyway.
        from vitnb import devices

        devices.check_requirements(study)
    study.sizes(asked.get("batch_size"))
    study.trainings(asked.get("seeds"))
    if asked.get("variant") is not None:
        variants.parse(asked["variant"])
    return parameters, asked


def _parse_value(name: str, text: str, kind: str) -> object:
    if kind == "str":
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if kind == "float" and type(value) in (int, str):
        try:
            return float(value)  # YAML takes 1e-3 for a string
        except ValueError:
            pass
    if type(value) is not TYPES[kind]:
        wanted = "true or false" if kind == "bool" else kind
        raise UserError(f"parameter '{name}' must be {wanted}, got '{text}'")
    return value


def run_notebook(
    name: str, given: list[tuple[str, str]], allow_failed: bool = False
) -> Path:
    """Run a notebook with parameters and return the path of the executed copy.

    The copy goes to ``outputs/<study>/notebooks``.

    Args:
        allow_failed: a variant that cannot run ends in its record, not in an error, so
            that a study goes on.

    Raises:
        UserError: bad parameters or data, before or while the notebook runs.
        VariantError: the variant failed (its record says why), unless ``allow_failed``.
    """
    path = notebook_path(name)
    parameters, asked = parse_parameters(path, given)
    study = load_study(asked["study"])
    words = [Path(str(v)).name for k, v in parameters.items() if k != "study"]
    label = "-".join([name, *words])
    output = study.outputs / "notebooks" / f"{label.replace(':', '-')}.ipynb"
    output.parent.mkdir(parents=True, exist_ok=True)
    print(f"vitnb: {label} of study {study.name}", flush=True)
    # papermill hands this process's environment to the kernel.
    os.environ["PYTHONPATH"] = child_environment()["PYTHONPATH"]
    try:
        papermill.execute_notebook(
            str(path),
            str(output),
            parameters,
            kernel_name="python3",
            cwd=str(Path.cwd()),
            progress_bar=sys.stderr.isatty(),
            stdout_file=sys.stdout,
            extra_arguments=["--IPKernelApp.log_level=40"],  # errors only
        )
    except PapermillExecutionError as error:
        _raise_as_it_was(error, output, allow_failed)
    except DeadKernelError:
        _record_dead_kernel(name, study, asked, allow_failed)
    return output


def _raise_as_it_was(
    error: PapermillExecutionError, output: Path, allow_failed: bool
) -> None:
    """Raise a failing cell's error again, in one line."""
    if error.ename == "UserError":
        raise UserError(error.evalue) from None
    if error.ename == "VariantError":
        if not allow_failed:
            raise VariantError(f"{error.evalue} (its row stays in the table)") from None
        print(
            f"vitnb: this variant failed, and its row says so: {error.evalue}",
            flush=True,
        )
        return
    message = (error.evalue.strip() or "no message").splitlines()[0]
    raise UserError(
        f"cell {error.exec_count} failed with {error.ename}: {message}; "
        f"the whole trace is in {output}"
    ) from None


def _record_dead_kernel(
    name: str, study: Study, asked: dict, allow_failed: bool
) -> None:
    """Write the record that a killed kernel could not write, and raise its reason."""
    from vitnb.records.run import Run  # late, as torch takes seconds

    reason = VariantError(
        "the notebook's kernel died, most likely out of memory: "
        "lower batch_size, or close other programs"
    )
    if name == "evaluate":
        Run(name, study, asked).fail(reason)
        if allow_failed:
            print(f"vitnb: {reason}", flush=True)
            return
    raise reason


def run_study(name: str, dry_run: bool = False) -> Path:
    """Run a study to its report and return the report's path.

    Snakemake runs what is not done yet, in the order that the ``Snakefile`` says.

    Args:
        name: a name under ``studies/``, or the path of a YAML file.
        dry_run: only list the jobs.

    Raises:
        UserError: a bad study, missing images, a missing base, or a job that stopped.
    """
    from vitnb import devices
    from vitnb.data.splits import load_layout
    from vitnb.models.pretrained import find_base

    study = load_study(name)
    devices.check_requirements(study)
    if not study.pretrain:  # else the first job makes the base
        find_base(study)
    load_layout(study)
    command = [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")),
        *("--directory", str(ROOT), *SNAKEMAKE_OPTIONS.split()),
        *("--config", f"study={name}"),
    ]
    if dry_run:
        command.append("--dry-run")
    if subprocess.run(command, env=child_environment(), check=False).returncode:
        raise UserError(
            f"study {study.name} stopped; the line above says why. "
            "What is done is kept: run it again to go on"
        )
    return study.outputs / "report.html"
