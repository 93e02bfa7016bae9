"""Find a picture that is in two splits, whatever its name and its format."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitnb.data import duplicates
from vitnb.data.images import read_image
from vitnb.data.splits import SPLITS, Split


def picture(seed: int, size: tuple[int, int] = (12, 9)) -> Image.Image:
    return Image.fromarray(
        np.random.RandomState(seed).randint(0, 256, (*size[::-1], 3)).astype(np.uint8)
    )


@pytest.fixture
def splits(tmp_path):
    """Twelve different pictures in three splits; and a function that lists them."""
    for i in range(12):
        path = tmp_path / SPLITS[i // 4] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        picture(i).save(path)

    def listed() -> list[Split]:
        found = []
        for name in SPLITS:
            paths = sorted((tmp_path / name).iterdir())
            found.append(
                Split(tmp_path, paths, [0] * len(paths), ["a"], name, tmp_path / name)
            )
        return found

    return tmp_path, listed


def counts(found: dict) -> list[int]:
    return [
        found["in_two_splits"][pair]
        for pair in ("test and train", "test and valid", "valid and train")
    ]


def test_different_pictures(splits):
    found = duplicates.find_duplicates(splits[1]())
    assert (
        found["images"] == 12 and counts(found) == [0, 0, 0] and found["examples"] == []
    )
    assert duplicates.describe_duplicates(found).startswith(
        "no picture is in two splits (12 compared pixel by pixel"
    )


def test_copies_in_another_format_or_turned_are_found(splits):
    root, listed = splits
    picture(0).save(root / "test" / "other-name.bmp")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned, shown a quarter clockwise
    picture(1).rotate(90, expand=True).save(root / "test" / "turned.png", exif=exif)
    picture(4).convert("RGBA").save(root / "train" / "with-alpha.png")
    found = duplicates.find_duplicates(listed())
    assert (
        counts(found) == [2, 0, 1]
        and ["test/other-name.bmp", "train/0.png"] in found["examples"]
    )
    line = duplicates.describe_duplicates(found)
    assert (
        line.startswith("warning: ")
        and "2 in test and train, 1 in valid and train" in line
        and "\n" not in line
    )


def test_what_is_not_counted(splits):
    """Count no copies within a split and no lossy, reshaped or unreadable ones."""
    root, listed = splits
    picture(0).save(root / "train" / "again.png")
    picture(0).save(root / "test" / "lossy.jpg")
    Image.frombytes("RGB", (9, 12), picture(0).tobytes()).save(
        root / "test" / "reshaped.png"
    )
    for name in ("train", "test"):
        (root / name / "broken.png").write_bytes(b"broken")
        (root / name / "empty.png").write_bytes(b"")
    assert counts(duplicates.find_duplicates(listed())) == [0, 0, 0]


def test_a_picture_that_is_twice_in_both(splits):
    """Pictures of the first split are counted, not pairs."""
    root, listed = splits
    for name in ("test/x.png", "test/y.png", "train/again.png"):
        picture(0).save(root / name)
    assert counts(duplicates.find_duplicates(listed())) == [2, 0, 0]


def test_only_pictures_of_a_size_that_two_splits_have_are_decoded(splits, monkeypatch):
    root, listed = splits
    for path in [*(root / "valid").iterdir(), *(root / "test").iterdir()]:
        picture(7, (20 + int(path.stem), 5)).save(path)
    picture(3).save(root / "test" / "copy.png")
    read, seen = read_image, []
    monkeypatch.setattr(
        duplicates, "read_image", lambda path: (seen.append(path.name), read(path))[1]
    )
    assert counts(duplicates.find_duplicates(listed())) == [1, 0, 0]
    assert sorted(seen) == ["0.png", "1.png", "2.png", "3.png", "copy.png"]


def test_many_files_are_compared_byte_by_byte_and_few_are_read_whole(
    splits, monkeypatch
):
    root, listed = splits
    monkeypatch.setattr(duplicates, "DECODED", 0)
    monkeypatch.setattr(duplicates, "read_image", lambda path: pytest.fail("decoded"))
    middle, same = b"m" * 9000, (root / "train" / "0.png").read_bytes()
    files = {"test/copy.png": same, "train/a.jpg": b"1" * 9000 + middle + b"3",
             "test/a.jpg": b"2" * 9000 + middle + b"3",
             "train/b.jpg": b"x" * 50, "test/b.jpg": b"y" * 50}  # fmt: skip
    for name, content in files.items():
        (root / name).write_bytes(content)
    picture(1).save(root / "test" / "1.bmp")
    digest, whole = duplicates._digest, []
    monkeypatch.setattr(
        duplicates, "_digest", lambda path: (whole.append(path.name), digest(path))[1]
    )
    found = duplicates.find_duplicates(listed())
    assert (
        found["compared"] == "files"
        and counts(found) == [1, 0, 0]
        and found["examples"] == [["test/copy.png", "train/0.png"]]
    )
    assert sorted(whole) == ["0.png", "a.jpg", "a.jpg", "copy.png"], (
        "of the same size, and the same in the middle"
    )
    assert "byte by byte" in duplicates.describe_duplicates(found)


def test_without_a_test_the_validation_images_are_no_copies_of_themselves(splits):
    train, valid, _ = splits[1]()
    found = duplicates.find_duplicates([train, valid, valid])
    assert found["in_two_splits"] == {"valid and train": 0} and found["images"] == 8


def test_paths_that_are_gone(splits):
    train, valid, test = splits[1]()
    Path(train.paths[0]).unlink()
    assert counts(duplicates.find_duplicates([train, valid, test])) == [0, 0, 0]
