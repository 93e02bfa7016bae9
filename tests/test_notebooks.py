"""The notebooks: they run from the top, headless and by hand alike.

Their stored outputs guard their results.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
import torch
from transformers import AutoModelForImageClassification

from vitnb import cli, notebooks
from vitnb.data.splits import load_split
from vitnb.models import checkpoints, pretrained, quantization
from vitnb.notebooks import run_label
from vitnb.study import load_study

NAMES = ("finetune", "evaluate", "ablate", "infer", "anatomy")
ROOT = Path(__file__).resolve().parent.parent
TYPED_BY_USERS = {
    "finetune": {
        "study",
        "seed",
        "rank",
        "alpha",
        "targets",
        "epochs",
        "base_precision",
    },
    "evaluate": {"study", "seed", "variant", "batch_size", "device"},
    "ablate": {"study", "seed"},
    "infer": {"study", "seed", "variant", "images"},
    "anatomy": {"study", "seed"},
}


def cells(name: str) -> list:
    return nbformat.read(notebooks.FOLDER / f"{name}.ipynb", 4).cells


def code(name: str) -> list:
    return [cell for cell in cells(name) if cell.cell_type == "code"]


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_typed_and_explained(name):
    known = papermill.inspect_notebook(str(notebooks.FOLDER / f"{name}.ipynb"))
    assert TYPED_BY_USERS[name] <= set(known)
    for parameter, about in known.items():
        assert (
            about["inferred_type_name"] in notebooks.TYPES and len(about["help"]) > 5
        ), parameter


@pytest.mark.parametrize("name", NAMES)
def test_logic_lives_in_the_package(name):
    lines = 0
    for cell in code(name):
        lines += sum(
            bool(line.strip()) and not line.strip().startswith("#")
            for line in cell.source.splitlines()
        )
        defined = [
            node
            for node in ast.walk(ast.parse(cell.source))
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda))
        ]
        assert not defined
    assert 10 < lines <= 60


@pytest.mark.parametrize("name", NAMES)
def test_stored_outputs_are_those_of_one_run_from_the_top(name):
    """nbval passes a checked cell without outputs: there must be some."""
    found = code(name)
    assert [cell.execution_count for cell in found] == list(range(1, len(found) + 1))
    checked = [
        cell for cell in found if "nbval-check-output" in cell.metadata.get("tags", [])
    ]
    assert checked and all(cell.outputs for cell in checked)
    outputs = [output for cell in found for output in cell.outputs]
    assert not [
        output
        for output in outputs
        if output.output_type == "error" or output.get("name") == "stderr"
    ]
    assert not re.search(r"(?<![\w.])/(home|root|work|tmp|Users)/", json.dumps(outputs))
    assert name == "infer" or any(
        "image/png" in output.get("data", {}) for output in outputs
    )


@pytest.mark.parametrize("name", NAMES[:3])
def test_the_stored_verdicts_are_good(name):
    text = json.dumps([cell.outputs for cell in code(name)])
    assert "as expected" in text and "NOT as expected" not in text


def test_two_questions_never_share_an_executed_copy():
    asked = [
        {},
        {"rank": 8},
        {"seeds": 8},
        {"variant": "nf4-sdpa"},
        {"variant": "plan:nf4-sdpa"},
        {"variant": "nf4-sdpa", "batch_size": 8},
        {"images": "/data/monday/new"},
        {"images": "/data/tuesday/new"},
        {"targets": "q_proj,v_proj"},
        {"targets": "q_proj.v_proj"},
    ]
    labels = [run_label("finetune", one) for one in asked]
    assert len(set(labels)) == len(asked)
    assert labels[:4] == [
        "finetune",
        "finetune-rank-8",
        "finetune-seeds-8",
        "finetune-nf4-sdpa",
    ]
    assert all(label == Path(label).name and label.isprintable() for label in labels)
    assert run_label("infer", {"study": "x"}) == "infer"


def test_vitnb_run_and_plain_papermill_do_the_same_work(
    mini, mini_yaml, tmp_path, monkeypatch
):
    """The same record, from another working directory as well."""
    path = mini.outputs / "records" / "evaluate-nf4-fa2.json"
    assert (
        cli.main(
            [
                "run",
                "evaluate",
                "-p",
                "study",
                str(mini_yaml),
                "-p",
                "variant",
                "nf4-fa2",
            ]
        )
        == 0
    )
    one = json.loads(path.read_text())
    path.unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    parameters = {"study": str(mini_yaml), "variant": "nf4-fa2"}
    papermill.execute_notebook(
        str(notebooks.FOLDER / "evaluate.ipynb"),
        "out.ipynb",
        parameters,
        kernel_name="python3",
        progress_bar=False,
    )
    two = json.loads(path.read_text())
    assert one.keys() == two.keys()
    for key in (
        "asked",
        "predictions",
        "parameters",
        "linears_quantized",
        "linears_kept",
        "resident_bytes",
        "disk_bytes",
        "versions",
    ):
        assert one[key] == two[key], key
    assert one["predictions"]["labels"] == load_split(mini, "test").labels, (
        "scored on the images that chose nothing"
    )
    assert [t["batch_size"] for t in one["timings"]] == [
        t["batch_size"] for t in two["timings"]
    ]


def test_a_variant_that_fails_keeps_its_row(
    mini, mini_yaml, tmp_path, monkeypatch, capsys
):
    """Here: an "nf4" checkpoint in which nothing is quantized."""
    merged = mini.checkpoint("merged")
    monkeypatch.setenv("VITNB_OUTPUTS", str(tmp_path))
    for name in ("merged", "nf4"):
        shutil.copytree(merged, mini.checkpoint(name))
    words = [
        "run",
        "evaluate",
        "-p",
        "study",
        str(mini_yaml),
        "-p",
        "variant",
        "nf4-sdpa",
    ]
    assert cli.main(words) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "is not quantized" in line and "its row stays in the table" in line
    record = json.loads(
        (tmp_path / "mini" / "records" / "evaluate-nf4-sdpa.json").read_text()
    )
    assert record["status"] == "failed" and "is not quantized" in record["reason"]
    assert cli.main([*words, "--allow-failed"]) == 0
    assert cli.main(["report", str(mini_yaml)]) == 0
    rows = (tmp_path / "mini" / "summary.csv").read_text().splitlines()
    assert len(rows) == 3 and all(
        "failed" in row and "is not quantized" in row for row in rows[1:]
    )
    assert "is not quantized" in (tmp_path / "mini" / "report.html").read_text()


def test_a_random_head_fails_the_checked_cells(tmp_path):
    """The guard works: evaluate's stored outputs refuse an untrained model."""
    study = load_study("embedded")
    names = sorted(path.name for path in (ROOT / "data" / "garden" / "train").iterdir())
    torch.manual_seed(0)
    folder = tmp_path / "embedded" / "checkpoints"
    pretrained.load_base(study, names).save_pretrained(folder / "merged")
    settings = quantization.bnb_config("nf4", ["classifier"])
    AutoModelForImageClassification.from_pretrained(
        folder / "merged", dtype=torch.bfloat16, quantization_config=settings
    ).save_pretrained(folder / "nf4")
    checkpoints.load_processor(pretrained.find_base(study)).save_pretrained(
        folder / "nf4"
    )
    words = [
        "-m",
        "pytest",
        "-q",
        "--nbval-lax",
        "--nbval-current-env",
        "-p",
        "no:cacheprovider",
        "notebooks/evaluate.ipynb",
    ]
    env = os.environ | {"VITNB_OUTPUTS": str(tmp_path), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, *words], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 1, ended.stdout
    assert "NOT as expected" in ended.stdout and "1 failed" in ended.stdout, (
        "the cell of the scores fails, and no other"
    )
