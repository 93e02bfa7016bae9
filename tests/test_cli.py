"""What a user can get wrong: one line that names the fix, exit code 1 or 2, nothing written, no kernel started."""

import papermill
import pytest
import torch

from vitnb import cli, records, runner, studies
from vitnb.errors import UserError


@pytest.fixture
def kernels(monkeypatch) -> list:
    """Notebooks that were executed, with their parameters, in place of running them."""
    started = []
    monkeypatch.setattr(papermill, "execute_notebook", lambda path, out, parameters, **_: started.append(parameters))
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
        (["finetune", "-p", "gradient_checkpointing", "1"], "must be true or false"),
        (["evaluate", "-p", "study", "no/such/file.yaml"], "no study 'no/such/file.yaml'"),
    ],
)
def test_a_mistake_is_refused_before_a_kernel_starts(capsys, kernels, outputs, words, fix):
    before = sorted(outputs.rglob("*"))
    assert fix in refused(capsys, "run", *words)
    assert kernels == [] and sorted(outputs.rglob("*")) == before


def test_right_parameters_arrive_with_their_types(kernels, outputs):
    words = ["-p", "batch_size", "8", "-p", "variant", "int8-sdpa", "-p", "seed", "3"]
    assert cli.main(["run", "evaluate", *words]) == 0
    words = ["-p", "gradient_checkpointing", "true", "-p", "targets", "mlp", "-p", "rank", "4"]
    assert cli.main(["run", "finetune", *words]) == 0
    assert kernels == [
        {"batch_size": 8, "variant": "int8-sdpa", "seed": 3},
        {"gradient_checkpointing": True, "targets": "mlp", "rank": 4},
    ]


def test_numbers_as_people_write_them():
    assert runner._typed("lr", "1e-3", "float") == 0.001 and runner._typed("lr", "2", "float") == 2.0
    assert runner._typed("name", "007", "str") == "007" and runner._typed("on", "false", "bool") is False
    for text, kind in (("x", "float"), ("true", "float"), ("", "int"), ("yes please", "bool")):
        with pytest.raises(UserError, match="must be"):
            runner._typed("it", text, kind)


def test_a_study_that_needs_a_gpu(capsys, kernels, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words in (["run", "finetune", "-p", "study", "flowers102"], ["study", "flowers102"]):
        assert "needs an NVIDIA GPU" in refused(capsys, *words)
    assert kernels == []


def test_missing_images_say_where_they_come_from(capsys, monkeypatch):
    monkeypatch.setattr(records, "check_machine", lambda study: None)
    monkeypatch.setattr("vitnb.models.find_base", lambda study: "base")
    line = refused(capsys, "study", "flowers102")
    assert "data/flowers102" in line and "download" in line


def test_a_missing_base_says_how_to_restore_it(capsys, mini_yaml, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(mini_yaml.read_text().replace("/base\n", "/nobase\n"))
    assert "no base model at" in refused(capsys, "study", str(path))


def test_a_report_without_records(capsys, outputs):
    line = refused(capsys, "report", "embedded")
    assert "python -m vitnb study embedded" in line and not (outputs / "embedded" / "report.html").exists()


def test_commands_that_are_none(capsys):
    for words in ([], ["runn"], ["run"], ["run", "evaluate", "-p", "seed"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 2


def test_variants_are_listed(capsys):
    assert cli.main(["variants"]) == 0
    listed = capsys.readouterr().out.split()
    assert {"fp32-sdpa", "nf4-sdpa", "int8-sdpa", "nf4-fa2", "int8-fa2", "bf16-sdpa", "fp32-math"} == set(listed)


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
        ("title: [", "not valid YAML"),
    ],
)
def test_a_study_file_with_a_mistake(tmp_path, mini_yaml, text, fix):
    path = tmp_path / "mine.yaml"
    key = text.split(":")[0]
    kept = [line for line in mini_yaml.read_text().splitlines() if not line.startswith(f"{key}:")]
    path.write_text("\n".join([*kept, text]))
    with pytest.raises(UserError) as error:
        studies.load(str(path))
    assert fix in str(error.value) and "\n" not in str(error.value)


def test_a_study_file_that_is_a_list_or_lacks_a_field(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("- 1\n")
    with pytest.raises(UserError, match="a study is a mapping"):
        studies.load(str(path))
    path.write_text("title: x\n")
    with pytest.raises(UserError, match="question"):
        studies.load(str(path))


def test_shipped_studies_load():
    assert set(studies.names()) >= {"embedded", "flowers102"}
    for name in studies.names():
        assert studies.load(name).name == name
