"""Publishing: files that are copied, files that stay, and records that are refused."""

import json
import shutil
from pathlib import Path

import pytest

from vitnb import cli
from vitnb.data.duplicates import find_duplicates
from vitnb.data.splits import load_split
from vitnb.records.run import Run
from vitnb.report import page, publication
from vitnb.study import load_study

RECORDS = ("records/finetune.json", "records/ablate.json")
MEASURED = ("ratios.csv", "times.csv", "ablation-linear.csv", "waterfall.csv")
MADE = ("summary.csv", "figures/latency.png", "report.html")
SMALL = (*RECORDS, *MEASURED, *MADE)
LEFT = (
    "predictions.csv",
    "predictions-patients.csv",
    "notes.csv",
    "records/infer-patients.json",
    "checkpoints/nf4/model.safetensors",
    "logits/evaluate-nf4-sdpa.npy",
    "notebooks/ablate.ipynb",
    "base/model.safetensors",
    "unfinished/compare/1.json",
    "earlier/ablate-20260101/records/ablate.json",
    "plans/plus12.json",
)
NAME = "patient-jane-doe"


def stand_in(study) -> None:
    """Write what a report consists of."""
    for name in MADE:
        (study.outputs / name).parent.mkdir(exist_ok=True)
        (study.outputs / name).write_text("made anew")


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
            "notebook": path.stem.split("-")[0],
            "started": "2026-01-01",
            "asked": {"images": "/patients"} if "infer" in path.stem else {},
            "machine": {"commit": "c0ffee", "dirty": False},
        }
        path.write_text(json.dumps(about, indent=1) + "\n")
    monkeypatch.setattr(page, "write_report", stand_in)
    return folder


def files(folder) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file()
    }


def publish(mini, to) -> int:
    return cli.main(["publish", mini.typed, "--to", str(to)])


def test_what_is_small_takes_the_place_of_what_was_there(done, mini, tmp_path):
    to = tmp_path / "published"
    assert publish(mini, to) == 0
    (to / "mini" / "times-of-a-removed-variant.csv").write_text("old")
    assert publish(mini, to) == 0
    assert files(to) == {f"mini/{name}" for name in (*SMALL, ".vitnb")}
    for name in (*RECORDS, *MEASURED):
        assert (to / "mini" / name).read_bytes() == (done / name).read_bytes()
    assert (to / "mini" / "report.html").read_text() == "made anew"
    assert files(done) == {*SMALL, *LEFT}, "the study's own files stay as they are"
    assert (done / "report.html").read_text() == "report.html"


@pytest.mark.parametrize("where", ["outputs", "outputs/mini", "outputs/mini/records"])
def test_a_publication_and_what_it_is_made_from_lie_apart(
    done, mini, tmp_path, capsys, where
):
    before = files(tmp_path)
    assert publish(mini, tmp_path / where) == 1
    said = capsys.readouterr().err
    assert "and one lies in the other: name another folder" in said
    assert len(said.splitlines()) == 1 and files(tmp_path) == before


def test_a_link_to_the_results_is_no_other_folder(done, mini, tmp_path):
    (tmp_path / "elsewhere").symlink_to(done.parent)
    before = files(done)
    assert publish(mini, tmp_path / "elsewhere") == 1 and files(done) == before


def test_the_results_may_not_lie_in_the_publication(done, mini, tmp_path, monkeypatch):
    """The target is called like the study, and holds its outputs."""
    monkeypatch.setenv("VITNB_OUTPUTS", str(tmp_path / "mini" / "outputs"))
    shutil.move(tmp_path / "outputs", tmp_path / "mini" / "outputs")
    before = files(tmp_path)
    assert publish(mini, tmp_path) == 1 and files(tmp_path) == before


def test_somebody_elses_folder_is_not_replaced(done, mini, tmp_path, capsys):
    own = tmp_path / "home" / "mini"
    own.mkdir(parents=True)
    (own / "thesis.tex").write_text("years of work")
    assert publish(mini, tmp_path / "home") == 1
    said = capsys.readouterr().err
    assert "(thesis.tex): move it away, or name another folder" in said
    assert len(said.splitlines()) == 1
    assert files(own) == {"thesis.tex"}


@pytest.mark.parametrize("more", ["", "thesis.tex", "figures/own.svg"])
def test_what_an_older_version_published_is_known_by_its_content(
    done, mini, tmp_path, more
):
    published = tmp_path / "published" / "mini"
    for name in filter(None, ("report.html", "records/old.json", "claims.csv", more)):
        (published / name).parent.mkdir(parents=True, exist_ok=True)
        (published / name).write_text("old")
    before = files(published)
    assert publish(mini, tmp_path / "published") == bool(more)
    assert files(published) == (before if more else {*SMALL, ".vitnb"})


def test_the_folders_that_are_published_here_may_be_replaced():
    """They were written before there were markers."""
    root = Path(__file__).parent.parent.parent / "outputs" / "published"
    for name in ("embedded", "vit-l16-qlora", "vit-s14-flowers5"):
        folder = root / name
        if folder.exists() and not (folder / ".vitnb").exists():
            assert publication.is_publication(folder), name


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (
            {"commit": "c0ffee", "dirty": True},
            "ablate was measured with changes that are not committed",
        ),
        (
            {"commit": None, "dirty": None},
            "ablate was measured by code of an unknown commit",
        ),
        (
            {"commit": "", "dirty": False},
            "ablate was measured by code of an unknown commit",
        ),
        (
            {"commit": "c0ffee", "dirty": None},
            "ablate was measured by code of an unknown commit",
        ),
    ],
)
def test_code_that_was_not_committed_is_not_published(
    done, mini, tmp_path, capsys, made, told
):
    path, to = done / "records" / "ablate.json", tmp_path / "published"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"machine": made}))
    assert publish(mini, to) == 1
    said = capsys.readouterr().err
    assert told in said and len(said.splitlines()) == 1
    assert "delete the record and run" in said
    assert not (to / "mini").exists()


def test_no_name_of_a_private_picture_is_published(
    mini, mini_yaml, tmp_path, monkeypatch
):
    """A picture with a name is in every place where names are written down."""
    home = tmp_path / "home" / "jane roe"
    data = home / "my scans"
    shutil.copytree(mini_yaml.parent / "shapes", data)
    picture = data / "train" / "ring" / f"{NAME}.png"
    shutil.copy(data / "train" / "ring" / "00.png", picture)
    shutil.copy(picture, data / "valid" / "ring" / f"{NAME}.png")
    shutil.copy(picture, data / "test" / "ring" / f"{NAME} of ward 7.png")
    shutil.copy(picture, data / "test" / "ring" / NAME)
    path = tmp_path / "private.yaml"
    text = mini_yaml.read_text().replace(str(mini_yaml.parent / "shapes"), str(data))
    path.write_text(text)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("VITNB_OUTPUTS", str(home / "outputs"))
    study = load_study(str(path))
    splits = [load_split(study, name) for name in ("train", "valid", "test")]
    doubles = find_duplicates(splits)
    assert NAME in json.dumps(doubles)

    def save(notebook, results, reason="", **asked):
        run = Run(notebook, study, asked)
        run.record["machine"] |= {"commit": "c0ffee", "dirty": False}
        if reason:
            return run.fail(RuntimeError(reason))
        return run.save(**results)

    row = {"epoch": 1, "loss": 1.0, "valid_top1": 0.5, "seconds": 1, "peak_bytes": None}
    trained = {"history": [row], "checkpoint_sha256": {}, "base_precision": "fp32"}
    trained |= {"disk_bytes": {"merged": 4, "nf4": 1, "int8": 2}, "seeds": []}
    trained |= {"floors": {"pixels": 0.2, "untrained": 0.3, "probe": 0.4}}
    trained |= {"images": {"train": 1, "valid": 1, "test": 1}, "split": "test"}
    trained |= {"trained": {"adapters": 1, "head": 1, "all": 3, "linears": 1}}
    trained |= {"targets": 1, "class_names": list("abcd")}
    trained |= {"training": {"seconds": 1.0, "peak_bytes": None}}
    trained |= {"duplicates": doubles, "layout": f"folders in {data}"}
    save("finetune", trained, rank=8, alpha=32)
    reasons = [
        f"cannot read {picture} (not a picture): replace it or delete it",
        f"UnreadableImage: {NAME} of ward 7.PNG is cut",
        f"cannot read {data}/test/ring/{NAME}: the file is empty",
    ]
    for reason, variant in zip(
        reasons, ("fp32-sdpa", "nf4-sdpa", "int8-sdpa"), strict=True
    ):
        save("evaluate", {}, reason, variant=variant, batch_size=None)
    save("infer", {"images": 3, "csv": "x"}, variant="nf4-sdpa", images=str(data))
    for name in ("predictions.csv", f"predictions-{NAME}.csv"):
        (study.outputs / name).write_text(f"path\n{NAME}.png\n")
    waterfall = f'step,reason\n1,"cannot read {picture}, so"\n2,ok\n'
    (study.outputs / "waterfall.csv").write_text(waterfall)

    to = tmp_path / "published"
    assert cli.main(["publish", str(path), "--to", str(to)]) == 0
    published = to / "private"
    assert "report.html" in files(published)
    assert not [name for name in files(published) if name.startswith("predictions")]
    for name in files(published):
        content = (published / name).read_bytes()
        for private in (NAME, "jane", str(home), str(tmp_path)):
            assert private.encode() not in content, (name, private)
            assert private not in name
    told = (published / "waterfall.csv").read_text().splitlines()
    assert told == ["step,reason", f"1,{publication.NO_PICTURE}", "2,ok"]
    found = json.loads((published / "records" / "finetune.json").read_text())
    assert found["duplicates"]["in_two_splits"] == doubles["in_two_splits"]
    assert found["study_asked"]["data"] == "my scans"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("no room in /home/jane/x/y.json: go", "no room in y.json: go"),
        ("see https://a.org/b/c and 3 img/s, 1/2", None),
        ("~/flowers is missing", "flowers is missing"),
        ("void at::native::vectorized<4, (anonymous)>", None),
        ("a.JPG", publication.NO_PICTURE),
        ("fp32-sdpa", None),
    ],
)
def test_paths_are_cut_to_their_last_part_and_other_words_stay(mini, text, kept):
    assert publication.censor(text, mini) == (text if kept is None else kept)
    assert publication.censor({"a": [text, 1.5]}, mini)["a"][1] == 1.5
