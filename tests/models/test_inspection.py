"""`vitnb check`: one precise line for each way a checkpoint can be broken."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vitnb import cli
from vitnb.errors import UserError
from vitnb.models import inspection


@pytest.fixture
def broken(mini, tmp_path):
    """A copy of an export, for damage."""

    def copy(name: str = "merged"):
        return shutil.copytree(mini.checkpoint(name), tmp_path / name)

    return copy


def edit(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("merged", "0 Linears quantized, 19 kept"),
        ("nf4", "4-bit, as declared"),
        ("int8", "8-bit, as declared"),
    ],
)
def test_an_export_passes(mini, capsys, name, words):
    assert cli.main(["check", str(mini.checkpoint(name))]) == 0
    printed = capsys.readouterr().out
    assert (
        words in printed
        and "classes       4, from circle to square" in printed
        and "32x32" in printed
    )


def test_a_cut_file(broken):
    folder = broken()
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut or damaged"):
        inspection.inspect_checkpoint(folder)


def test_weights_that_do_not_fit_the_config(broken):
    folder = broken()
    rewrite(folder, lambda tensors: tensors.pop("classifier.bias"))
    with pytest.raises(UserError, match=r"1 missing keys, such as classifier.bias"):
        inspection.inspect_checkpoint(folder)
    rewrite(
        folder,
        lambda tensors: tensors.update(
            {"classifier.bias": torch.zeros(4), "surplus.weight": torch.zeros(2)}
        ),
    )
    with pytest.raises(UserError, match=r"1 unexpected keys, such as surplus.weight"):
        inspection.inspect_checkpoint(folder)


def test_a_config_of_another_size(broken):
    folder = broken()
    edit(folder / "config.json", hidden_size=128)
    line = (
        r"52 mismatched keys, such as classifier.weight: "
        r"\[4, 64\] and not \[4, 128\]"
    )
    with pytest.raises(UserError, match=line):
        inspection.inspect_checkpoint(folder)


def test_class_names_that_are_none(broken):
    folder = broken()
    edit(folder / "config.json", id2label={str(i): f"LABEL_{i}" for i in range(4)})
    with pytest.raises(UserError, match="no class names"):
        inspection.inspect_checkpoint(folder)


def test_preprocessing_missing_or_of_another_size(broken):
    folder = broken()
    edit(folder / "preprocessor_config.json", size={"height": 64, "width": 64})
    with pytest.raises(
        UserError,
        match=r"does not take images of 64 x 64 pixels, which its preprocessing gives",
    ):
        inspection.inspect_checkpoint(folder)
    edit(folder / "preprocessor_config.json", size={"longest_edge": 64})
    with pytest.raises(UserError, match="gives images of no fixed size"):
        inspection.inspect_checkpoint(folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="has no preprocessing"):
        inspection.inspect_checkpoint(folder)


def test_quantization_that_is_declared_and_not_there(broken, mini):
    folder = broken()
    declared = json.loads((mini.checkpoint("nf4") / "config.json").read_text())[
        "quantization_config"
    ]
    edit(folder / "config.json", quantization_config=declared)
    with pytest.raises(UserError, match="declares 4-bit weights and none are there"):
        inspection.inspect_checkpoint(folder)


def test_quantization_of_another_kind(broken):
    folder = broken()
    for method in ("gptq", "unheard-of"):
        edit(
            folder / "config.json",
            quantization_config={"quant_method": method, "bits": 4},
        )
        with pytest.raises(UserError, match=rf"does not load|quantized by {method}"):
            inspection.inspect_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("model.safetensors.index.json", "is no index of weights"),
        ("preprocessor_config.json", "has no preprocessing"),
    ],
)
def test_a_file_that_holds_something_else(broken, name, line):
    folder = broken()
    (folder / name).write_text("[]")
    with pytest.raises(UserError, match=line):
        inspection.inspect_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "line"),
    [({"hidden_size": "wide"}, "cannot be read"), ({"patch_size": 0}, "does not load")],
)
def test_a_config_with_a_senseless_value(broken, change, line):
    folder = broken()
    edit(folder / "config.json", **change)
    with pytest.raises(UserError, match=line):
        inspection.inspect_checkpoint(folder)


def test_pickles_missing_folders_and_bad_config(broken, tmp_path):
    (tmp_path / "pickled").mkdir()
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(UserError, match="is a pickle"):
        inspection.inspect_checkpoint(tmp_path / "pickled")
    with pytest.raises(UserError, match="no folder"):
        inspection.inspect_checkpoint(tmp_path / "nowhere")
    folder = broken()
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json cannot be read"):
        inspection.inspect_checkpoint(folder)
