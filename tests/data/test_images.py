"""Every kind of file is read in one stated way, or refused with its reason."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from vitnb.data.images import UnreadableImage, image_files, read_image


@pytest.fixture
def ramp() -> np.ndarray:
    """A picture in which every corner differs: uint8 [6, 8, 3]."""
    return np.random.RandomState(1).randint(0, 256, (6, 8, 3)).astype(np.uint8)


def test_exif_rotation_is_applied(tmp_path, ramp):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: show it a quarter clockwise
    Image.fromarray(ramp).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(
        np.asarray(read_image(tmp_path / "turned.png")), np.rot90(ramp, -1)
    )


def test_sixteen_bit_grey_is_scaled_not_cut(tmp_path):
    values = np.array([[0, 257, 30000, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    found = np.asarray(read_image(tmp_path / "deep.png"))
    assert found.shape == (1, 4, 3) and np.array_equal(found[0, :, 1], [0, 1, 116, 255])


def test_transparency_lies_on_white(tmp_path):
    rgba = np.array(
        [[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 128]]], dtype=np.uint8
    )
    Image.fromarray(rgba).save(tmp_path / "clear.png")
    found = np.asarray(read_image(tmp_path / "clear.png")).astype(int)
    assert np.abs(found - [[[255, 0, 0], [255, 255, 255], [127, 127, 127]]]).max() <= 1


def test_a_palette_with_a_transparent_colour(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.save(tmp_path / "palette.png", transparency=0)
    assert np.array_equal(
        np.asarray(read_image(tmp_path / "palette.png")),
        [[[255, 255, 255], [200, 100, 50]]],
    )


def test_cmyk_grey_and_the_first_frame_of_an_animation(tmp_path, ramp):
    Image.fromarray(ramp).convert("CMYK").save(tmp_path / "print.tif")
    assert np.array_equal(np.asarray(read_image(tmp_path / "print.tif")), ramp)
    Image.fromarray(ramp[..., 0]).save(tmp_path / "grey.png")
    assert np.array_equal(
        np.asarray(read_image(tmp_path / "grey.png")), ramp[..., :1].repeat(3, 2)
    )
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "moving.gif").getpixel((3, 3)) == (255, 0, 0)


def test_what_is_no_whole_picture_is_refused(tmp_path, ramp, monkeypatch):
    Image.fromarray(ramp.repeat(40, 0).repeat(40, 1)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("cut.jpg", "text.png", "empty.png", "missing.png"):
        with pytest.raises(UnreadableImage):
            read_image(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableImage):
        read_image(tmp_path / "whole.jpg")


def test_damaged_files_that_pillow_stumbles_over_are_refused_too(tmp_path, ramp):
    """Pillow raises a RuntimeError, a TypeError or a struct.error.

    The first for an AVIF without its pixels, the others for EXIF of a wrong type.
    """
    image, exif = Image.fromarray(ramp), Image.Exif()
    exif[0x0112] = 6
    exif[0x011A] = 72.5  # a resolution: the numbers that are damaged below
    image.save(tmp_path / "whole.jpg", exif=exif)
    whole = (tmp_path / "whole.jpg").read_bytes()
    entry = whole.index(
        b"\x01\x1a\x00\x05" if b"MM\x00*" in whole else b"\x1a\x01\x05\x00"
    )
    kind = entry + 2 + (b"MM\x00*" in whole)
    (tmp_path / "exif.jpg").write_bytes(
        whole[:kind] + b"\x02" + whole[kind + 1 :]
    )  # a text, they now say
    read_image(tmp_path / "whole.jpg")
    with pytest.raises(UnreadableImage):
        read_image(tmp_path / "exif.jpg")
    if not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    image.save(tmp_path / "whole.avif")
    read_image(tmp_path / "whole.avif")
    whole = (tmp_path / "whole.avif").read_bytes()
    payload = whole.index(b"mdat") + 4
    (tmp_path / "zeros.avif").write_bytes(whole[:payload] + bytes(len(whole) - payload))
    with pytest.raises(UnreadableImage):
        read_image(tmp_path / "zeros.avif")


def chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk of a PNG, with its length and checksum."""
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png(
    width: int, height: int, depth: int, colour: int, rows: bytes, *more: bytes
) -> bytes:
    """Make a PNG by hand (colour 0 is grey, 2 RGB).

    ``rows``: for each row a filter byte, 0, and its pixels.
    """
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [
        chunk(b"IHDR", head),
        *more,
        chunk(b"IDAT", zlib.compress(rows)),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def refused(path, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason) as caught:
        read_image(path)
    assert "\n" not in str(caught.value) and str(path.parent) not in str(caught.value)


def test_sixteen_bit_colour_keeps_its_upper_bits(tmp_path):
    values = [0x0000, 0x12FF, 0xFF00]
    (tmp_path / "deep.png").write_bytes(
        png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", *values))
    )
    assert read_image(tmp_path / "deep.png").getpixel((0, 0)) == (0x00, 0x12, 0xFF)


def test_pixels_without_a_range_are_refused(tmp_path):
    ramp = np.linspace(0, 65535, 12).reshape(3, 4)
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "float.tif")
    refused(tmp_path / "float.tif", "floating point has no stated range")
    Image.fromarray((ramp * 1000).astype(np.int32)).save(tmp_path / "wide.tif")
    refused(tmp_path / "wide.tif", "32-bit pixels have no stated range")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "narrow.tif")
    assert np.array_equal(
        np.asarray(read_image(tmp_path / "narrow.tif"))[..., 0],
        (ramp.astype(int) / 257).astype(int),
    )


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    """89 million pixels are the limit at which Pillow only warns."""
    assert Image.MAX_IMAGE_PIXELS == 89_478_485
    for name, width in (
        ("more.png", 9_500),
        ("most.png", 60_000),
    ):  # Pillow alone warns of the first
        (tmp_path / name).write_bytes(png(width, width, 8, 2, b""))
        monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
        refused(tmp_path / name, "more than 89 million pixels .*make it smaller")


def test_a_text_that_unpacks_to_gigabytes(tmp_path):
    text = b"Comment\0\0" + zlib.compress(bytes(80 * 2**20), 1)
    (tmp_path / "text.png").write_bytes(
        png(1, 1, 8, 2, b"\0\1\2\3", chunk(b"zTXt", text))
    )
    refused(tmp_path / "text.png", "[Dd]ecompressed data too large|too large")


def test_what_looks_like_a_picture_and_is_none(tmp_path, ramp):
    (tmp_path / "empty.jpg").write_bytes(b"")
    refused(tmp_path / "empty.jpg", "the file is empty")
    (tmp_path / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    refused(
        tmp_path / "phone.HEIC", "Pillow does not read .heic: save it as JPEG or PNG"
    )
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    refused(tmp_path / "page.jpg", "^not a picture$")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dead.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "round.png").symlink_to(tmp_path / "round.png")
    for name in ("pipe.png", "dead.png", "round.png"):
        refused(tmp_path / name, "not a file")


def test_a_program_is_not_run(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(
        EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("Ghostscript was started")
    )
    Image.new("RGB", (8, 8), "red").save(tmp_path / "drawing.eps")
    refused(tmp_path / "drawing.eps", "EPS is a program")


def test_a_wrong_ending_does_not_matter(tmp_path, ramp):
    content = io.BytesIO()
    Image.fromarray(ramp).save(content, "PNG")
    for name in ("really.jpg", "without"):
        (tmp_path / name).write_bytes(content.getvalue())
        assert np.array_equal(np.asarray(read_image(tmp_path / name)), ramp)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged files
def test_whatever_is_damaged_is_refused_or_read_and_nothing_else(tmp_path, ramp):
    """Every format that Pillow writes, cut and with bytes changed, from a seed."""
    random, wholes = np.random.RandomState(4), []
    for kind in (
        "JPEG",
        "PNG",
        "GIF",
        "TIFF",
        "BMP",
        "WEBP",
        "ICO",
        "TGA",
        "PPM",
        "JPEG2000",
        "ICNS",
        "DDS",
        "PCX",
    ):
        try:
            content = io.BytesIO()
            Image.fromarray(ramp.repeat(6, 0).repeat(6, 1)).save(content, kind)
            wholes.append(content.getvalue())
        except (KeyError, OSError):  # not in this Pillow
            continue
    assert len(wholes) > 7
    refusals = 0
    for whole in wholes:
        for _ in range(60):
            damaged = bytearray(whole[: random.randint(1, len(whole) + 1)])
            for at in random.randint(0, min(len(damaged), 300), 4):
                damaged[at] = random.randint(256)
            (tmp_path / "damaged").write_bytes(damaged)
            try:
                assert read_image(tmp_path / "damaged").mode == "RGB"
            except UnreadableImage as error:
                refusals += bool(str(error))
    assert refusals > 300


def test_files_of_a_folder(tmp_path):
    """Links to folders are not followed: one may lead upwards."""
    for name in (
        "b/2.png",
        "a-b.png",
        "a/1.JPG",
        "a/.hidden.png",
        ".checkpoints/3.png",
        "__MACOSX/4.png",
        "a/notes.txt",
        "raw.NEF",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    found = [path.relative_to(tmp_path).as_posix() for path in image_files(tmp_path)]
    assert found == ["a/1.JPG", "a-b.png", "b/2.png", "raw.NEF"], (
        "in the order of their folders"
    )
