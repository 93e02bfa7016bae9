"""Inference on a folder with everything that people leave in folders."""

import csv
import gc
import os
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import shape
from data.test_images import png
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from vitnb import figures, inference, variants
from vitnb.data.images import read_image
from vitnb.errors import UserError, VariantError
from vitnb.inference import (
    COLUMNS,
    classify,
    find_pictures,
    gallery_entries,
    predictions_table,
)
from vitnb.models import loader
from vitnb.records.files import write_csv

BAD = {"b/cut.jpg", "b/text.png", "b/empty.png"}


@pytest.fixture
def folder(tmp_path):
    root, random = tmp_path / "pictures", np.random.RandomState(9)
    (root / "a").mkdir(parents=True)
    (root / "b").mkdir()
    for i in range(70):  # more than one batch
        shape("ring", random).save(root / "a" / f"{i:02d}.png")
    plain = shape("cross", random, 200)
    plain.save(root / "b" / "good.jpg")
    plain.convert("CMYK").save(root / "b" / "print.jpg")
    plain.convert("L").save(root / "b" / "grey.bmp")
    plain.save(
        root / "b" / "moving.gif",
        save_all=True,
        append_images=[shape("ring", random, 200)],
    )
    Image.fromarray(np.asarray(plain.convert("L")).astype(np.uint16) * 257).save(
        root / "b" / "deep.png"
    )
    (root / "b" / "cut.jpg").write_bytes((root / "b" / "good.jpg").read_bytes()[:1500])
    (root / "b" / "text.png").write_text("hello")
    (root / "b" / "empty.png").write_bytes(b"")
    return root


@pytest.fixture
def loaded(mini):
    return loader.load_variant(mini, variants.parse("fp32-sdpa"))


def test_every_file_has_its_row_and_bad_ones_their_reason(mini, loaded, folder):
    root, paths, _ = find_pictures(mini, str(folder))
    rows, speed = classify(loaded, paths, root)
    names = [row["path"] for row in rows]
    assert names == sorted(names) and len(names) == 78 and speed > 0
    assert {row["path"] for row in rows if row["error"]} == BAD
    for row in rows:
        assert bool(row["error"]) != bool(row["top1"]), (
            "a row has either names or a reason"
        )
        assert str(folder) not in row["error"]


def test_names_and_probabilities_are_plain_transformers(mini, loaded, folder):
    checkpoint = mini.checkpoint("merged")
    model, processor = (
        AutoModelForImageClassification.from_pretrained(checkpoint).eval(),
        AutoImageProcessor.from_pretrained(checkpoint),
    )
    rows, _ = classify(loaded, *find_pictures(mini, str(folder))[1::-1])
    for row in rows:
        if row["error"]:
            continue
        with torch.inference_mode():
            logits = model(
                **processor(read_image(folder / row["path"]), return_tensors="pt")
            ).logits[0]
        ps, order = logits.softmax(-1).sort(descending=True)
        for k in range(4):
            assert float(row[f"p{k + 1}"]) == pytest.approx(ps[k].item(), abs=1e-4)
            if k == 0 and ps[0] - ps[1] > 1e-3:
                assert row["top1"] == model.config.id2label[order[0].item()]
        assert row["top5"] == row["p5"] == "", "the model knows four classes"


def test_the_csv_reads_back(mini, loaded, folder, tmp_path):
    rows, _ = classify(loaded, *find_pictures(mini, str(folder))[1::-1])
    path = tmp_path / "out" / "p.csv"
    write_csv(path, predictions_table(rows))
    table = pd.read_csv(path, keep_default_na=False)
    assert list(table.columns) == COLUMNS and len(table) == 78
    assert set(table.path[table.error != ""]) == BAD
    good = table[table.error == ""]
    probabilities = good[["p1", "p2", "p3", "p4"]].astype(float).to_numpy()
    assert (np.diff(probabilities) <= 0).all() and np.abs(
        probabilities.sum(1) - 1
    ).max() < 5e-4


def test_logits_that_are_not_finite_are_no_names(mini, loaded, folder):
    def break_last(module, inputs, output):
        if len(output.logits) < 64:  # the second batch
            output.logits[-3:] = float("nan")

    loaded.model.register_forward_hook(break_last)
    root, paths, _ = find_pictures(mini, str(folder))
    with pytest.raises(VariantError, match=r"3 of \d+ images are not finite"):
        classify(loaded, paths, root)


def test_the_test_split_is_the_default(mini):
    root, paths, named = find_pictures(mini, None)
    assert len(paths) == 24 and all(
        path.is_relative_to(root) and "/test/" in path.as_posix() for path in paths
    )
    assert named == [path.parent.name for path in paths]


def test_folders_without_images(mini, tmp_path):
    with pytest.raises(UserError, match="holds no images"):
        find_pictures(mini, str(tmp_path))
    with pytest.raises(UserError, match="no folder"):
        find_pictures(mini, str(tmp_path / "nowhere"))


def test_a_folder_without_a_readable_picture(mini, loaded, tmp_path):
    """Every row has its reason, and the figure is empty: the notebook goes on."""
    (tmp_path / "text.png").write_text("hello")
    folder, paths, named = find_pictures(mini, str(tmp_path))
    rows, _ = classify(loaded, paths, folder)
    assert [row["path"] for row in rows] == ["text.png"] and rows[0]["error"]
    assert not any(
        axis.images
        for axis in figures.gallery(*gallery_entries(rows, paths, named)).axes
    )


def test_pictures_for_the_eye(mini, loaded, folder):
    _, paths, named = find_pictures(mini, str(folder))
    rows, _ = classify(loaded, paths, folder)
    images, titles, right = gallery_entries(rows, paths, named, 10)
    assert len(images) == len(titles) == len(right) == 10 and not any(right), (
        "no folder here bears a class's name"
    )
    assert all(gallery_entries(rows, paths, [""] * len(paths), 10)[2]), (
        "of which nothing is known"
    )


def hostile(root) -> tuple[set[str], dict[str, str]]:
    """Write odd and hostile files.

    Returns the names of the readable ones, and the beginning of each other's reason.
    """
    root.mkdir()
    plain = shape("cross", np.random.RandomState(9), 60)
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = np.asarray(plain.convert("L")).astype(np.uint16) * 257
    odd = {
        "plain.png": plain, "grey.png": plain.convert("L"),
        "ink.tif": plain.convert("CMYK"), "ink.jpg": plain.convert("CMYK"),
        "palette.gif": plain.convert("P"), "palette.png": plain.convert("P"),
        "bits.png": plain.convert("1"),
        "alpha.png": plain.convert("RGBA"), "grey-alpha.png": plain.convert("LA"),
        "lab.tif": plain.convert("LAB"),
        "small.png": plain.resize((1, 1)), "thin.png": plain.resize((1, 3000)),
        "flat.png": plain.resize((3000, 3)),
        "deep.png": Image.fromarray(deep),
        "icon.ico": plain,
        "Blüte 花.png": plain, "two\nlines.png": plain, "capital.JPEG": plain,
    }  # fmt: skip
    for name, image in odd.items():
        image.save(root / name)
    plain.save(root / "turned.jpg", exif=exif)
    for name in ("moving.gif", "moving.png", "pages.tif"):
        plain.save(root / name, save_all=True, append_images=[plain.rotate(90), plain])
    whole = (root / "plain.png").read_bytes()
    (root / "really-a-png.jpg").write_bytes(whole)
    (root / "no-ending").write_bytes(whole)
    with open(
        os.fsencode(root) + b"/caf\xe9.png", "wb"
    ) as file:  # a name that is no UTF-8
        file.write(whole)
    good = {
        *odd,
        "turned.jpg",
        "moving.gif",
        "moving.png",
        "pages.tif",
        "really-a-png.jpg",
        "no-ending",
    }
    good = good - {"two\nlines.png"} | {"two\\nlines.png", "caf\\udce9.png"}
    Image.fromarray(np.ones((4, 4), np.float32)).save(root / "float.tif")
    Image.fromarray(np.full((4, 4), 10**6, np.int32)).save(root / "wide.tif")
    plain.save(root / "program.eps")
    jpeg = (root / "capital.JPEG").read_bytes()
    written = {
        "empty.png": b"", "text.png": b"hello", "page.jpg": b"<html></html>",
        "archive.jpg": b"PK\3\4" + bytes(40),
        "cut.png": whole[: len(whole) // 2], "cut.jpg": jpeg[: len(jpeg) // 2],
        "head.gif": b"GIF89a" + bytes(7),
        "flipped.png": whole[:60] + bytes([whole[60] ^ 255]) + whole[61:],
        "bomb.png": png(60_000, 60_000, 8, 2, b""),
        "phone.heic": b"\0\0\0\x18ftypheic", "drawing.svg": b"<svg/>",
        "noise.webp": bytes(range(256)), "paper.pdf": b"%PDF-1.7",
        "tiff.tif": b"II*\0" + b"\xff" * 60,
    }  # fmt: skip
    for name, content in written.items():
        (root / name).write_bytes(content)
    os.mkfifo(root / "pipe.png")
    (root / "dead.png").symlink_to(root / "gone.png")
    (root / "up").symlink_to(root.parent)
    (root / "folder.png").mkdir()
    (root / ".hidden.png").write_bytes(b"")
    bad = dict.fromkeys(written, "") | {
        "empty.png": "the file is empty", "text.png": "not a picture",
        "page.jpg": "not a picture",
        "bomb.png": "more than 89 million",
        "phone.heic": "Pillow does not read .heic",
        "drawing.svg": "Pillow does not read .svg", "float.tif": "floating point",
        "wide.tif": "32-bit", "program.eps": "EPS is a program",
        "pipe.png": "not a file", "dead.png": "not a file",
    }  # fmt: skip
    return good, bad


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged files
def test_odd_and_hostile_files_in_one_folder(mini, loaded, tmp_path):
    """Readable files are classified; every other is listed with its reason."""
    good, bad = hostile(tmp_path / "pile")
    folder, paths, named = find_pictures(mini, str(tmp_path / "pile"))
    rows, _ = classify(loaded, paths, folder)
    assert len(good) >= 20 and len(bad) >= 17 and len(rows) == len(good) + len(bad)
    assert {row["path"] for row in rows if not row["error"]} == good
    for row in rows:
        assert (
            bool(row["error"]) != bool(row["top1"])
            and row["path"].isprintable()
            and row["error"].isprintable()
        )
        assert (
            row["error"].startswith(bad.get(row["path"], ""))
            and str(tmp_path) not in row["error"]
        )
    write_csv(tmp_path / "named.csv", predictions_table(rows))
    table = pd.read_csv(tmp_path / "named.csv", keep_default_na=False)
    assert set(table.path[table.error == ""]) == good and set(
        table.path[table.error != ""]
    ) == set(bad)
    assert len(gallery_entries(rows, paths, named, 100)[0]) == len(good)
    same = {row["path"]: row["p1"] for row in rows}
    assert (
        same["plain.png"]
        == same["really-a-png.jpg"]
        == same["moving.png"]
        == same["caf\\udce9.png"]
    )


def test_one_picture_in_memory_at_a_time(mini, loaded, folder, monkeypatch):
    """A batch of photographs of 50 megapixels would take ten gigabytes."""
    seen, most, read = [], [], inference.read_image

    def counted(path):
        image = read(path)
        seen.append(weakref.ref(image))
        gc.collect()
        most.append(sum(one() is not None for one in seen))
        return image

    monkeypatch.setattr(inference, "read_image", counted)
    classify(loaded, sorted((folder / "a").iterdir())[:20], folder)
    assert len(most) == 20 and max(most) <= 2


HOSTILE = {
    "=HYPERLINK(1).png": "'=HYPERLINK(1).png",
    "@SUM(A1).png": "'@SUM(A1).png",
    "+1+1.png": "'+1+1.png",
    "-2+3.png": "'-2+3.png",
    'a,"b" $c.png': 'a,"b" $c.png',
    "two\nlines.png": "two\\nlines.png",
}


def test_no_name_becomes_a_formula_of_a_spreadsheet(mini, loaded, tmp_path):
    """Neither a picture's name nor a class's; other names arrive whole."""
    folder = tmp_path / "pile"
    folder.mkdir()
    for name in HOSTILE:
        shape("ring", np.random.RandomState(1)).save(folder / name)
    loaded.class_names = ["=cmd()", "-a", "@b", "+c"]
    rows, _ = classify(loaded, *find_pictures(mini, str(folder))[1::-1])
    write_csv(tmp_path / "p.csv", predictions_table(rows))
    with (tmp_path / "p.csv").open(newline="") as file:
        head, *found = csv.reader(file)
    assert head == COLUMNS and {row[0] for row in found} == set(HOSTILE.values())
    for row in found:
        assert set(row[1:5]) == {"'=cmd()", "'-a", "'@b", "'+c"}
        assert sum(map(float, row[6:10])) == pytest.approx(1, abs=1e-3)
