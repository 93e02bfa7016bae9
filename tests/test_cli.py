"""A user's mistakes: one line that names the fix, exit code 1 or 2.

Nothing is written, and no kernel is started.
"""

import errno
import json
import os

import papermill
import pytest
import torch
import yaml
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from vitnb import cli, devices, notebooks
from vitnb.errors import UserError
from vitnb.study import load_study, study_names


@pytest.fixture
def kernels(monkeypatch) -> list:
    """Notebooks that were executed, with their parameters, in place of running them."""
    started = []
    monkeypatch.setattr(
        papermill,
        "execute_notebook",
        lambda path, out, parameters, **_: started.append(parameters),
    )
    return started


def refused(capsys, *words: str) -> str:
    """Run a command that must fail; returns its one line."""
    assert cli.main(list(words)) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("vitnb: ")
    return lines[0]


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["evaluate", "-p", "seeed", "1"], "did you mean 'seed'"),
        (["evaluate", "-p", "variant", "nf4-fa3"], "did you mean 'nf4-fa2'"),
        (["evaluate", "-p", "study", "embeded"], "did you mean 'embedded'"),
        (["evalute"], "did you mean 'evaluate'"),
        (["evaluate", "-p", "batch_size", "two"], "must be int, got 'two'"),
        (["evaluate", "-p", "batch_size", "1.5"], "must be int"),
        (["evaluate", "-p", "batch_size", "true"], "must be int"),
        (["evaluate", "-p", "batch_size", "["], "must be int, got '['"),
        (["evaluate", "-p", "batch_size", "0"], "at least 1"),
        (["evaluate", "-p", "device", "gpu"], "device must be cpu or cuda"),
        (["evaluate", "-p", "seed", "-1"], "seed must be in 0 to 4294967295"),
        (["evaluate", "-p", "seed", "4294967296"], "seed must be in 0 to 4294967295"),
        (["finetune", "-p", "rank", "0"], "rank must be at least 1"),
        (["finetune", "-p", "alpha", "0"], "alpha must be at least 1"),
        (["finetune", "-p", "epochs", "0"], "epochs must be at least 1"),
        (["finetune", "-p", "seeds", "0"], "seeds must be at least 1"),
        (["finetune", "-p", "processes", "0"], "processes must be at least 1"),
        (["finetune", "-p", "processes", "5"], "do not divide the study's finetune"),
        (["finetune", "-p", "targets", "mlp;fc1"], "targets must be all, or names"),
        (["finetune", "-p", "base_precision", "fp8"], "base_precision must be fp32"),
        (["ablate", "-p", "by", "head"], "by must be layer or linear"),
        (["infer", "-p", "images", "no/such"], "no folder no/such: 'images' takes"),
        (["finetune", "-p", "gradient_checkpointing", "1"], "must be true or false"),
        (
            ["evaluate", "-p", "study", "no/such/file.yaml"],
            "no study 'no/such/file.yaml'",
        ),
    ],
)
def test_a_mistake_is_refused_before_a_kernel_starts(
    capsys, kernels, outputs, words, fix
):
    before = sorted(outputs.rglob("*"))
    assert fix in refused(capsys, "run", *words)
    assert kernels == [] and sorted(outputs.rglob("*")) == before


def test_right_parameters_arrive_with_their_types(kernels, outputs):
    words = ["-p", "batch_size", "8", "-p", "variant", "int8-sdpa", "-p", "seed", "3"]
    assert cli.main(["run", "evaluate", *words]) == 0
    words = [
        "-p",
        "gradient_checkpointing",
        "true",
        "-p",
        "targets",
        "mlp",
        "-p",
        "rank",
        "4",
    ]
    assert cli.main(["run", "finetune", *words]) == 0
    assert kernels == [
        {"batch_size": 8, "variant": "int8-sdpa", "seed": 3},
        {"gradient_checkpointing": True, "targets": "mlp", "rank": 4},
    ]


def test_numbers_as_people_write_them():
    assert (
        notebooks._parse_value("lr", "1e-3", "float") == 0.001
        and notebooks._parse_value("lr", "2", "float") == 2.0
    )
    assert (
        notebooks._parse_value("name", "007", "str") == "007"
        and notebooks._parse_value("on", "false", "bool") is False
    )
    for text, kind in (
        ("x", "float"),
        ("true", "float"),
        ("", "int"),
        ("yes please", "bool"),
    ):
        with pytest.raises(UserError, match="must be"):
            notebooks._parse_value("it", text, kind)


def test_a_study_that_needs_a_gpu(capsys, kernels, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words in (
        ["run", "finetune", "-p", "study", "flowers102"],
        ["study", "flowers102"],
    ):
        assert "needs an NVIDIA GPU" in refused(capsys, *words)
    assert kernels == []


def test_missing_images_say_where_they_come_from(capsys, monkeypatch):
    monkeypatch.setattr(devices, "check_requirements", lambda study: None)
    monkeypatch.setattr("vitnb.models.pretrained.find_base", lambda study: "base")
    line = refused(capsys, "study", "flowers102")
    assert "data/flowers-102" in line and "python -m vitnb download flowers-102" in line


def test_a_missing_base_says_how_to_restore_it(capsys, mini_yaml, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(mini_yaml.read_text().replace("/base\n", "/nobase\n"))
    assert "no base model at" in refused(capsys, "study", str(path))


def test_a_missing_checkpoint_names_the_command(
    capsys, mini_yaml, tmp_path, monkeypatch
):
    """The notebook's own error leaves the kernel as one line; no record is written."""
    monkeypatch.setenv("VITNB_OUTPUTS", str(tmp_path))
    line = refused(capsys, "run", "infer", "-p", "study", str(mini_yaml))
    assert (
        "no checkpoint at" in line and "python -m vitnb run finetune -p study" in line
    )
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [
        "infer.ipynb"
    ]


def raises(monkeypatch, error: Exception) -> None:
    """Let every notebook end with an error."""

    def execute(*_, **__):
        raise error

    monkeypatch.setattr(papermill, "execute_notebook", execute)


def test_an_error_nobody_foresaw_is_one_line_that_says_where_its_trace_is(
    capsys, mini_yaml, monkeypatch, outputs
):
    raises(
        monkeypatch,
        PapermillExecutionError(1, 3, "source", "RuntimeError", "it broke\nbadly", []),
    )
    line = refused(capsys, "run", "ablate", "-p", "study", str(mini_yaml))
    assert "cell 3 failed with RuntimeError: it broke" in line
    assert str(outputs / "mini" / "notebooks" / "ablate.ipynb") in line


def test_a_killed_kernel_leaves_a_failed_row(capsys, mini_yaml, monkeypatch, tmp_path):
    """A dead kernel writes no record; only an evaluate's row lets a study go on."""
    monkeypatch.setenv("VITNB_OUTPUTS", str(tmp_path))
    raises(monkeypatch, DeadKernelError("Kernel died"))
    words = [
        "-p",
        "study",
        str(mini_yaml),
        "-p",
        "variant",
        "int8-sdpa",
        "-p",
        "batch_size",
        "2",
    ]
    assert "out of memory" in refused(capsys, "run", "evaluate", *words)
    assert cli.main(["run", "evaluate", *words, "--allow-failed"]) == 0
    (path,) = (tmp_path / "mini" / "records").iterdir()
    record = json.loads(path.read_text())
    assert path.name == "evaluate-int8-sdpa-b2.json"
    assert record["status"] == "failed" and "out of memory" in record["reason"]
    assert (record["asked"]["variant"], record["asked"]["batch_sizes"]) == (
        "int8-sdpa",
        [2],
    )
    assert "out of memory" in refused(
        capsys, "run", "infer", "-p", "study", str(mini_yaml), "--allow-failed"
    )
    assert len(list(path.parent.iterdir())) == 1


def test_a_report_without_records(capsys, outputs, tmp_path):
    for words in (
        ["report", "embedded"],
        ["publish", "embedded", "--to", str(tmp_path / "published")],
    ):
        assert "python -m vitnb study embedded" in refused(capsys, *words)
    assert (
        not (outputs / "embedded" / "report.html").exists()
        and not (tmp_path / "published").exists()
    )


def test_commands_that_are_none(capsys):
    for words in ([], ["runn"], ["run"], ["run", "evaluate", "-p", "seed"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 2


def test_variants_are_listed(capsys):
    assert cli.main(["variants"]) == 0
    *listed, rest = capsys.readouterr().out.splitlines()
    assert {
        "fp32-sdpa",
        "nf4-sdpa",
        "int8-sdpa",
        "nf4-fa2",
        "int8-fa2",
        "bf16-sdpa",
        "fp32-math",
    } == set(listed)
    assert (
        "fp8" in rest
        and "mem-efficient" in rest
        and "engine eager, graph, compile, fused" in rest
    )


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("variant: [fp32-sdpa]", "unknown key 'variant': did you mean 'variants'"),
        ("seed: one", "'seed' must be int"),
        ("variants: [fp32-sdp]", "did you mean 'fp32-sdpa'"),
        ("batch_sizes: [1, 0]", "batch_sizes must be positive"),
        ("ablate_bits: [3]", "may hold 4 and 8"),
        ("finetune: {epoch: 3}", "did you mean 'epochs'"),
        ("latency: 5", "expected a mapping"),
        ("title: [", "not valid YAML: line "),
        ("batch_sizes: 5", "'batch_sizes' must be list[int], got 5"),
        ("batch_sizes: [true]", "'batch_sizes' must be list[int]"),
        ("batch_sizes: []", "batch_sizes must be positive"),
        ("variants: fp32-sdpa", "'variants' must be list[str], got 'fp32-sdpa'"),
        ("variants: []", "must name at least one"),
        ("ablate_bits: [[4]]", "'ablate_bits' must be list[int]"),
        ("seed: true", "'seed' must be int, got True"),
        ("expected: {valid top1: 0.9}", "'expected' must be dict[str, list[float]]"),
        ("expected: {valid top1: [0.9]}", "must be [low, high], got [0.9]"),
        ("expected: {valid top1: [0.9, 0.8]}", "must be [low, high], got [0.9, 0.8]"),
        ("finetune: {epochs: 0}", "'epochs' cannot be 0"),
        ("finetune: {crop_scale: 1.5}", "'crop_scale' cannot be 1.5"),
        ("requires: gpus", "'gpu' or left out"),
        ("name: ../elsewhere", "a folder below outputs/"),
    ],
)
def test_a_study_file_with_a_mistake(
    tmp_path, mini_yaml, capsys, kernels, outputs, text, fix
):
    path, before = tmp_path / "mine.yaml", sorted(outputs.rglob("*"))
    kept = yaml.safe_load(mini_yaml.read_text())
    kept.pop(text.split(":")[0], None)
    path.write_text(yaml.safe_dump(kept) + text)
    line = refused(capsys, "run", "evaluate", "-p", "study", str(path))
    assert fix in line
    assert kernels == [] and sorted(outputs.rglob("*")) == before


def test_a_study_file_that_is_a_list_or_lacks_a_field(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("- 1\n")
    with pytest.raises(UserError, match="a study is a mapping"):
        load_study(str(path))
    path.write_text("title: x\n")
    with pytest.raises(UserError, match=r"mine\.yaml: lacks question, data$"):
        load_study(str(path))
    path.write_bytes(b"title: \xff\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load_study(str(path))


def test_numbers_in_a_study_file_as_people_write_them(tmp_path, mini_yaml):
    path = tmp_path / "mine.yaml"
    path.write_text(
        mini_yaml.read_text().replace("learning_rate: 0.003", "learning_rate: 3e-3")
    )
    assert load_study(str(path)).finetune.learning_rate == 0.003


def test_shipped_studies_load():
    assert set(study_names()) >= {"embedded", "flowers102"}
    for name in study_names():
        assert load_study(name).name == name


def test_outputs_that_cannot_be_written(capsys, kernels, tmp_path, monkeypatch):
    """A file stands in the place of their folder."""
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("VITNB_OUTPUTS", str(tmp_path / "file"))
    line = refused(capsys, "run", "evaluate")
    assert line.startswith("vitnb: cannot write ") and str(tmp_path / "file") in line
    assert "move away what is in its place, or name another folder" in line
    assert kernels == [] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.EACCES, "cannot write /x/y: Permission denied: make it writable"),
        (errno.EROFS, "cannot write /x/y: Read-only file system: make it writable"),
        (errno.ENOSPC, "cannot write /x/y: No space left on device: make room"),
        (errno.EDQUOT, "cannot write /x/y: Disk quota exceeded: make room"),
        (errno.ENOTDIR, "cannot write /x/y: Not a directory: move away"),
        (errno.EEXIST, "cannot write /x/y: File exists: move away"),
        (errno.EIO, "cannot open /x/y: Input/output error"),
        (errno.ENOENT, "cannot open /x/y: No such file or directory"),
    ],
)
def test_an_error_of_the_file_system_is_one_line(capsys, monkeypatch, number, told):
    def fail(_):
        raise OSError(number, os.strerror(number), "/x/y")

    monkeypatch.setattr(cli, "_variants", fail)
    assert told in refused(capsys, "variants")


def test_an_error_without_a_file_keeps_its_trace(monkeypatch):
    """It is a mistake in the code, or of a library."""

    def fail(_):
        raise OSError("a library's own")

    monkeypatch.setattr(cli, "_variants", fail)
    with pytest.raises(OSError, match="a library's own"):
        cli.main(["variants"])


def test_the_base_of_no_steps(capsys, tmp_path):
    for option in ("--steps", "--batch-size"):
        line = refused(capsys, "pretrain", "--out", str(tmp_path / "b"), option, "0")
        assert "must be at least 1, got 0" in line
    assert "seed must be" in refused(capsys, "pretrain", "--seed", "-1")
