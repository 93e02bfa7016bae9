"""Publishing: files that are copied, files that stay, and records that are refused."""

import json

import pytest

from vitnb import cli
from vitnb.report import page
from vitnb.study import load_study

SMALL = (
    "records/finetune.json",
    "records/ablate.json",
    "summary.csv",
    "ratios.csv",
    "figures/latency.png",
    "report.html",
)
LEFT = (
    "predictions.csv",
    "checkpoints/nf4/model.safetensors",
    "logits/evaluate-nf4-sdpa.npy",
    "notebooks/ablate.ipynb",
    "base/model.safetensors",
    "unfinished/compare/1.json",
    "plans/plus12.json",
)


@pytest.fixture
def done(mini, tmp_path, monkeypatch):
    """Make the files of a finished study; a stand-in writes the report."""
    monkeypatch.setenv("VITNB_OUTPUTS", str(tmp_path / "outputs"))
    folder = load_study(mini.typed).outputs
    for name in (*SMALL, *LEFT):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for path in (folder / "records").iterdir():
        about = {
            "name": path.stem,
            "notebook": path.stem,
            "started": "2026-01-01",
            "machine": {"dirty": False},
        }
        path.write_text(json.dumps(about))
    monkeypatch.setattr(
        page,
        "write_report",
        lambda study: (study.outputs / "report.html").write_text("made anew"),
    )
    return folder


def files(folder) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_what_is_small_takes_the_place_of_what_was_there(done, mini, tmp_path):
    to = tmp_path / "published"
    (to / "mini").mkdir(parents=True)
    (to / "mini" / "times-of-a-removed-variant.csv").write_text("old")
    assert cli.main(["publish", mini.typed, "--to", str(to)]) == 0
    assert files(to) == {f"mini/{name}" for name in SMALL}
    assert all(
        (to / "mini" / name).read_bytes() == (done / name).read_bytes()
        for name in SMALL
    )
    assert (to / "mini" / "report.html").read_text() == "made anew" and files(done) == {
        *SMALL,
        *LEFT,
    }


def test_code_that_was_not_committed_is_not_published(done, mini, tmp_path, capsys):
    path, to = done / "records" / "ablate.json", tmp_path / "published"
    path.write_text(path.read_text().replace("false", "true"))
    assert cli.main(["publish", mini.typed, "--to", str(to)]) == 1
    said = capsys.readouterr().err
    assert (
        "ablate was measured with changes that are not committed" in said
        and len(said.splitlines()) == 1
    )
    assert not to.exists()
