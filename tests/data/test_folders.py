"""Recognize published layouts, made by hand, and check their splits."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import write_base
from PIL import Image
from scipy.io import savemat
from transformers import AutoConfig

from vitnb.data import dataset, flowers102, folders
from vitnb.data.splits import (
    SPLITS,
    Split,
    describe_split,
    evaluation_split,
    image_folder,
    load_layout,
    load_split,
)
from vitnb.errors import UserError
from vitnb.measure import accuracy
from vitnb.models import checkpoints, pretrained
from vitnb.study import ROOT, Study, load_study


def write(root: Path, *names: str) -> None:
    """Files that are no pictures yet: layouts look at names alone."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def write_oxford(
    root: Path, labels: list[int], train: list[int], valid: list[int], test: list[int]
) -> None:
    write(root, *(f"jpg/image_{i + 1:05d}.jpg" for i in range(len(labels))))
    savemat(root / "imagelabels.mat", {"labels": np.array([labels], dtype=np.uint8)})
    ids = {"trnid": train, "valid": valid, "tstid": test}
    savemat(
        root / "setid.mat",
        {key: np.array([numbers], dtype=np.uint16) for key, numbers in ids.items()},
    )


def parts(root: Path, seed: int = 0) -> dict[str, list[tuple[str, str]]]:
    """Every split as (path below the root, class name)."""
    found = folders.recognize_layout(root, seed)
    return {
        name: [
            (path.relative_to(root).as_posix(), found.class_names[label])
            for path, label in zip(part.paths, part.labels, strict=True)
        ]
        for name in SPLITS
        for part in [found.part(name)]
    }


def study_of(tmp_path: Path, mini_yaml: Path, folder: str) -> Study:
    path = tmp_path / "own.yaml"
    lines = mini_yaml.read_text().splitlines()
    path.write_text(
        "\n".join(
            f"data: {folder}" if line.startswith("data:") else line for line in lines
        )
    )
    return load_study(str(path))


def test_oxford_flowers_as_published(tmp_path):
    """The ids are in no order, and a label is a class's number from 1."""
    write_oxford(tmp_path, [3, 1, 2, 2, 3, 1], train=[6, 1, 3], valid=[4], test=[5, 2])
    assert parts(tmp_path) == {
        "train": [
            ("jpg/image_00006.jpg", "pink primrose"),
            ("jpg/image_00001.jpg", "canterbury bells"),
            ("jpg/image_00003.jpg", "hard-leaved pocket orchid"),
        ],
        "valid": [("jpg/image_00004.jpg", "hard-leaved pocket orchid")],
        "test": [
            ("jpg/image_00005.jpg", "canterbury bells"),
            ("jpg/image_00002.jpg", "pink primrose"),
        ],
    }


def test_oxfords_official_split_and_names(tmp_path):
    ids = (1 + np.random.RandomState(0).permutation(8189)).tolist()
    write_oxford(
        tmp_path,
        [i % 102 + 1 for i in range(8189)],
        ids[:1020],
        ids[1020:2040],
        ids[2040:],
    )
    found = folders.recognize_layout(tmp_path, 0)
    assert [len(found.part(name).paths) for name in SPLITS] == [1020, 1020, 6149]
    assert len(found.class_names) == len(set(found.class_names)) == 102
    # From the data set's own list of categories.
    known = {1: "pink primrose", 21: "fire lily", 45: "bolero deep blue",
             54: "sunflower", 60: "pink-yellow dahlia", 74: "rose",
             102: "blackberry lily"}  # fmt: skip
    assert {number: flowers102.CLASS_NAMES[number - 1] for number in known} == known


def test_an_incomplete_oxford(tmp_path):
    write_oxford(tmp_path / "whole", [1, 2, 1, 2], [1, 2], [3], [4])
    damage = {
        "lacks imagelabels.mat": lambda root: (root / "imagelabels.mat").unlink(),
        "lacks jpg": lambda root: shutil.rmtree(root / "jpg"),
        "lacks 1 images of the test split, such as image_00004": lambda root: (
            root / "jpg/image_00004.jpg"
        ).unlink(),
        "is damaged": lambda root: (root / "setid.mat").write_bytes(b"404 not found"),
        "do not belong together": lambda root: savemat(
            root / "imagelabels.mat", {"labels": np.array([[1, 2]])}
        ),
    }
    for i, (told, harm) in enumerate(damage.items()):
        shutil.copytree(tmp_path / "whole", tmp_path / str(i))
        harm(tmp_path / str(i))
        with pytest.raises(
            UserError, match=rf"{told}.*python -m vitnb download flowers-102"
        ):
            folders.recognize_layout(tmp_path / str(i), 0)


def write_kaggle(root: Path) -> None:
    """Numbered folders below ``dataset``, the names beside it, and a flat test."""
    for name, count in (("train", 3), ("valid", 2)):
        write(
            root,
            *(
                f"dataset/{name}/{key}/image_{key}_{i}.jpg"
                for key in ("1", "2", "10", "100")
                for i in range(count)
            ),
        )
    write(root, "dataset/test/image_1.jpg", "dataset/test/image_2.jpg", "README.md")
    names = {
        "10": "globe thistle",
        "1": "pink primrose",
        "2": "hard-leaved pocket orchid",
        "100": "blanket flower",
        "3": "x",
    }
    (root / "cat_to_name.json").write_text(json.dumps(names))


def test_kaggles_numbered_folders_are_named_in_their_sorted_order(tmp_path):
    """As text, 10 comes before 2: a class's index is not its folder's number."""
    write_kaggle(tmp_path)
    for data_folder in (tmp_path, tmp_path / "dataset"):
        found = folders.recognize_layout(data_folder, 0)
        assert found.class_names == [
            "pink primrose",
            "globe thistle",
            "blanket flower",
            "hard-leaved pocket orchid",
        ]
        for name in ("train", "valid"):
            part = found.part(name)
            number = {
                "pink primrose": "1",
                "globe thistle": "10",
                "blanket flower": "100",
            }
            shown = [number.get(found.class_names[label], "2") for label in part.labels]
            assert shown == [path.parent.name for path in part.paths]
    assert "names from cat_to_name.json" in found.told


def test_a_test_without_labels_is_named_and_not_scored(tmp_path, mini_yaml):
    write_kaggle(tmp_path / "k")
    study = study_of(tmp_path, mini_yaml, f"{tmp_path}/k")
    test, scored = load_split(study, "test"), evaluation_split(study)
    assert [path.name for path in test.paths] == [
        "image_1.jpg",
        "image_2.jpg",
    ] and test.labels == []
    assert (test.name, scored.name) == (
        "test",
        "valid",
    ) and scored.labels == load_split(study, "valid").labels
    assert "no labelled test images" in describe_split(
        scored
    ) and "8 images that also choose the epoch" in describe_split(scored)
    with pytest.raises(UserError, match="have no labels"):
        accuracy.predict(None, test)


def test_unlabelled_images_in_one_folder_of_their_own(tmp_path):
    """As Tiny-ImageNet's test/images, or test/unknown for torchvision's ImageFolder."""
    write(
        tmp_path,
        *(f"{s}/{c}/1.png" for s in ("train", "valid") for c in "ab"),
        "test/unknown/1.png",
    )
    assert folders.recognize_layout(tmp_path, 0).part("test").labels == []
    write(tmp_path, "test/more/1.png")
    with pytest.raises(UserError, match="has no counterpart in train"):
        folders.recognize_layout(tmp_path, 0).part("test")


def test_the_names_travel_with_the_checkpoint(tmp_path, mini_yaml):
    write_kaggle(tmp_path / "k")
    write_base(tmp_path / "base")
    path = tmp_path / "own.yaml"
    path.write_text(
        mini_yaml.read_text().replace(f"{mini_yaml.parent}/shapes", f"{tmp_path}/k")
    )
    study = load_study(str(path))
    names = load_split(study, "train").class_names
    pretrained.load_base(study, names).save_pretrained(tmp_path / "saved")
    config = AutoConfig.from_pretrained(tmp_path / "saved")
    assert [config.id2label[i] for i in range(4)] == names and config.label2id[
        "globe thistle"
    ] == 1


def test_tiny_imagenet(tmp_path):
    for key in ("n02", "n01"):
        write(
            tmp_path,
            *(f"train/{key}/images/{key}_{i}.JPEG" for i in range(2)),
            f"train/{key}/{key}_boxes.txt",
        )
    write(
        tmp_path,
        "val/images/val_0.JPEG",
        "val/images/val_1.JPEG",
        "test/images/test_0.JPEG",
    )
    (tmp_path / "val/val_annotations.txt").write_text(
        "val_1.JPEG\tn01\t0\t0\t9\t9\nval_0.JPEG\tn02\t0\t0\t9\t9\n"
    )
    (tmp_path / "wnids.txt").write_text("n02\nn01\n")
    (tmp_path / "words.txt").write_text(
        "n00\tentity\nn01\tgoldfish, Carassius auratus\nn02\tbullfrog\n"
    )
    found = folders.recognize_layout(tmp_path, 0)
    assert found.class_names == ["goldfish", "bullfrog"] and found.part(
        "train"
    ).labels == [0, 0, 1, 1]
    valid, test = found.part("valid"), found.part("test")
    assert [
        (path.name, label)
        for path, label in zip(valid.paths, valid.labels, strict=True)
    ] == [
        ("val_0.JPEG", 1),
        ("val_1.JPEG", 0),
    ]
    assert [path.name for path in test.paths] == ["test_0.JPEG"] and test.labels == []
    (tmp_path / "val/images/val_0.JPEG").unlink()
    with pytest.raises(
        UserError,
        match=r"lacks 1 images that val_annotations.txt names, such as val_0.JPEG",
    ):
        folders.recognize_layout(tmp_path, 0).part("valid")


def write_imagenet(root: Path) -> Path:
    """ImageNet as Kaggle has it: two cranes, flat val, label files three levels up."""
    inside = root / "ILSVRC" / "Data" / "CLS-LOC"
    write(
        inside,
        *(
            f"train/{key}/{key}_1.JPEG"
            for key in ("n03126707", "n02012849", "n01440764")
        ),
    )
    write(inside, "val/v_1.JPEG", "val/v_2.JPEG", "val/v_3.JPEG", "test/t_1.JPEG")
    (root / "LOC_synset_mapping.txt").write_text(
        "n01440764 tench, Tinca tinca\nn02012849 crane\nn03126707 crane\n"
    )
    (root / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\nv_2,n02012849 1 2 3 4 n02012849 5 6 7 8 \n"
        "v_1,n03126707 1 2 3 4 \nv_3,n01440764 1 2 3 4 \n"
    )
    return inside


def test_imagenet(tmp_path):
    found = folders.recognize_layout(write_imagenet(tmp_path), 0)
    assert found.class_names == ["tench", "crane (n02012849)", "crane (n03126707)"]
    assert found.part("valid").labels == [2, 1, 0] and found.part("test").labels == []


def test_imagenet_in_class_folders_without_a_test(tmp_path, mini_yaml):
    write(
        tmp_path,
        *(
            f"{split}/{key}/1.JPEG"
            for split in ("train", "val")
            for key in ("n01", "n02")
        ),
    )
    study = study_of(tmp_path, mini_yaml, str(tmp_path))
    valid, test = load_split(study, "valid"), load_split(study, "test")
    assert test == valid and test.name == "valid" and test.paths[0].parts[-3] == "val"
    assert load_layout(study).told == "folders train, val"


def one_folder(root: Path, counts: dict[str, int]) -> None:
    write(
        root,
        *(f"{key}/{i:03d}.jpg" for key, count in counts.items() for i in range(count)),
    )


def test_one_folder_is_split_by_the_seed_in_each_class(tmp_path):
    one_folder(tmp_path, {"rose": 40, "daisy": 20, "tulip": 3})
    found = parts(tmp_path, 0)
    every = [path for split in found.values() for path, _ in split]
    assert len(every) == len(set(every)) == 63
    for key, counts in (
        ("rose", (28, 6, 6)),
        ("daisy", (14, 3, 3)),
        ("tulip", (1, 1, 1)),
    ):
        assert (
            tuple(sum(name == key for _, name in found[split]) for split in SPLITS)
            == counts
        )
    assert all(
        path.split("/")[0] == name for split in found.values() for path, name in split
    )
    assert found == parts(tmp_path, 0) != parts(tmp_path, 1)


def test_the_split_by_seed_is_the_same_on_every_machine(tmp_path):
    """The two smallest of ``echo -n 0/a/000.jpg | sha256sum`` and so on.

    Worked out in a shell: 26f7 and 7664, 55b9 and 66f4.
    """
    one_folder(tmp_path, {"a": 5, "b": 5})
    for key, (valid, test) in {
        "a": ("001.jpg", "000.jpg"),
        "b": ("002.jpg", "004.jpg"),
    }.items():
        found = parts(tmp_path, 0)
        assert [path for path, name in found["valid"] if name == key] == [
            f"{key}/{valid}"
        ]
        assert [path for path, name in found["test"] if name == key] == [
            f"{key}/{test}"
        ]


def test_a_new_image_moves_few_others(tmp_path):
    one_folder(tmp_path, {"a": 200, "b": 200})
    before = {
        path: split for split, some in parts(tmp_path).items() for path, _ in some
    }
    write(tmp_path, "a/new.jpg")
    after = {path: split for split, some in parts(tmp_path).items() for path, _ in some}
    assert sum(after[path] != split for path, split in before.items()) <= 3


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (
            [],
            "no layout that is known: looked for train/ and valid/ or val/"
            ".*imagelabels.mat.*two class folders",
        ),
        (["1.png", "2.png"], "no layout that is known"),
        (["a/1.png"], "no layout that is known"),
        (["a/1.txt", "b/2.txt"], "no layout that is known"),
        (["Train/a/1.png", "Test/a/1.png"], "has a folder Test and no train"),
        (
            ["a/1.png", "a/2.png", "a/3.png", "b/1.png", "b/2.png"],
            "b has 2 images: it takes 3",
        ),
        (["train/a/1.png", "valid/a/1.png"], "1 class folders: at least two"),
    ],
)
def test_what_is_no_layout_is_one_line(tmp_path, names, told):
    write(tmp_path, *names)
    with pytest.raises(UserError, match=told) as error:
        folders.recognize_layout(tmp_path, 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"a": "rose"}', "has no name for class folder 'b'"),
        ('{"a": "rose", "b": ', "is not JSON"),
        ('{"a": "rose", "b": 3}', "must map folders to names"),
        ('["rose", "tulip"]', "must map folders to names"),
    ],
)
def test_a_file_of_names_that_is_none(tmp_path, text, told):
    write(tmp_path, *(f"{s}/{c}/1.png" for s in ("train", "valid") for c in "ab"))
    (tmp_path / "cat_to_name.json").write_text(text)
    with pytest.raises(UserError, match=told):
        folders.recognize_layout(tmp_path, 0)


def test_hidden_folders_are_no_classes(tmp_path):
    write(tmp_path, *(f"{s}/{c}/1.png" for s in ("train", "valid") for c in "ab"))
    write(
        tmp_path,
        "train/.ipynb_checkpoints/1.png",
        "train/__MACOSX/1.png",
        "valid/a/.ipynb_checkpoints/1.png",
    )
    found = folders.recognize_layout(tmp_path, 0)
    assert found.class_names == ["a", "b"] and len(found.part("valid").paths) == 2


def test_where_a_studys_images_may_be(tmp_path, mini_yaml, monkeypatch):
    write(
        tmp_path / "home" / "pictures",
        *(f"{s}/{c}/1.png" for s in ("train", "valid") for c in "ab"),
    )
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert (
        image_folder(study_of(tmp_path, mini_yaml, "~/pictures"))
        == tmp_path / "home" / "pictures"
    )
    assert image_folder(study_of(tmp_path, mini_yaml, "studies")) == ROOT / "studies"
    with pytest.raises(
        UserError, match=r"needs its images at .*/home/nowhere: put them there"
    ):
        image_folder(study_of(tmp_path, mini_yaml, "~/nowhere"))


def test_a_split_spread_thin():
    whole = Split(
        Path(), [Path(str(i)) for i in range(10)], list(range(10)), ["x"] * 10, "test"
    )
    assert whole.subsample(10) is whole and whole.subsample(5).labels == [0, 2, 4, 6, 8]
    assert [
        path.name for path in Split(Path(), whole.paths, [], []).subsample(2).paths
    ] == ["0", "5"]


def test_pixels_of_images_without_labels(tmp_path, mini):
    Image.new("RGB", (9, 9)).save(tmp_path / "1.png")
    split = Split(tmp_path, [tmp_path / "1.png"], [], ["a"])
    pixels = dataset.PixelDataset(
        split, checkpoints.load_processor(pretrained.find_base(mini))
    )
    assert pixels[0][1] == dataset.NO_LABEL and [
        labels.tolist() for _, labels in dataset.make_batches(pixels, 2)
    ] == [[-1]]
