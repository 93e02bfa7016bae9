"""Download from a local server that cuts connections, ignores ranges, and so on."""

import errno
import hashlib
import http.server
import io
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from vitnb import cli
from vitnb.data import flowers102, folders
from vitnb.errors import UserError


class Server(http.server.ThreadingHTTPServer):
    """Serve ``files`` (name -> bytes).

    ``plan``: what to do with the next requests: cut them after so many bytes, answer
    "no ranges" or "says 404". Later requests get the whole file.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.plan, self.ranges = {}, [], []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        act = self.server.plan.pop(0) if self.server.plan else "whole"
        content, asked = self.server.files.get(self.path[1:]), self.headers.get("Range")
        self.server.ranges.append(asked)
        if content is None or str(act).startswith("says "):
            self.send_error(404 if content is None else int(act.removeprefix("says ")))
            return
        begin = (
            int(asked.removeprefix("bytes=").removesuffix("-"))
            if asked and act != "no ranges"
            else 0
        )
        if begin >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header(
                "Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}"
            )
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        self.wfile.write(
            content[begin : begin + act] if isinstance(act, int) else content[begin:]
        )
        self.close_connection = True  # after ``act`` bytes: less than it had promised

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(flowers102, "PAUSE", 0.0)
    monkeypatch.setattr(flowers102, "CHUNK", 1000)
    with Server() as server:
        thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.02}
        )
        thread.start()
        yield server
        server.shutdown()
        thread.join()


CONTENT = np.random.RandomState(0).bytes(100_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


def test_an_interrupted_download_goes_on_where_it_stopped(
    server, tmp_path, capsys, monkeypatch
):
    server.files["it"], server.plan = CONTENT, [40_000, 25_000]  # cut twice
    monkeypatch.setattr(flowers102, "TELL_EVERY", 0.0)
    flowers102.fetch(server.url + "it", tmp_path / "it", MD5)
    assert (tmp_path / "it").read_bytes() == CONTENT and not (
        tmp_path / "it.part"
    ).exists()
    assert server.ranges == [None, "bytes=40000-", "bytes=65000-"]
    said = capsys.readouterr().out
    assert (
        "the connection ended after 40,000 of 100,000 bytes; trying again" in said
        and "\r" not in said
    )
    assert said.splitlines()[-1] == "it: 0.1 of 0.1 MB" and len(said.splitlines()) > 50


def test_the_next_call_goes_on_too(server, tmp_path, monkeypatch):
    """What a killed process has left, and a connection that never brings anything."""
    server.files["it"], server.plan = CONTENT, [30_000] + [0] * flowers102.TRIES
    with pytest.raises(
        UserError,
        match=r"connection ended.*what came so far is kept; "
        r"run the command again to go on",
    ):
        flowers102.fetch(server.url + "it", tmp_path / "it", MD5)
    assert [path.name for path in tmp_path.iterdir()] == ["it.part"] and len(
        server.ranges
    ) == 1 + flowers102.TRIES
    flowers102.fetch(server.url + "it", tmp_path / "it", MD5)
    assert (
        server.ranges[-1] == "bytes=30000-"
        and (tmp_path / "it").read_bytes() == CONTENT
    )
    asked = len(server.ranges)
    flowers102.fetch(server.url + "it", tmp_path / "it", MD5)
    assert len(server.ranges) == asked, "there already"


def test_a_server_that_knows_no_ranges_sends_the_whole_again(server, tmp_path):
    server.files["it"], server.plan = CONTENT, [40_000, "no ranges"]
    flowers102.fetch(server.url + "it", tmp_path / "it", MD5)
    assert (tmp_path / "it").read_bytes() == CONTENT and server.ranges == [
        None,
        "bytes=40000-",
    ]


def test_a_part_that_is_whole_already(server, tmp_path):
    server.files["it"] = CONTENT
    (tmp_path / "it.part").write_bytes(CONTENT)
    flowers102.fetch(server.url + "it", tmp_path / "it", MD5)
    assert (tmp_path / "it").read_bytes() == CONTENT and server.ranges == [
        "bytes=100000-"
    ]


@pytest.mark.parametrize("left", [b"", b"x" * 500, b"x" * 200_000])
def test_other_bytes_than_were_published_are_not_kept(server, tmp_path, left):
    """Whether the server's file is another, or what an earlier try left is damaged."""
    server.files["it"] = b"y" + CONTENT[1:]
    if left:
        (tmp_path / "it.part").write_bytes(left)
    with pytest.raises(
        UserError,
        match=rf"not the file that was published \(its MD5 is not {MD5}\), "
        "and was deleted",
    ):
        flowers102.fetch(server.url + "it", tmp_path / "it", MD5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("answer", "told", "asked"),
    [(404, "404 Not Found", 1), (403, "403 Forbidden", 1), (503, "503 ", 5)],
)
def test_a_server_that_says_no(server, tmp_path, answer, told, asked):
    server.files["it"], server.plan = CONTENT, [f"says {answer}"] * 9
    with pytest.raises(
        UserError,
        match=rf"the server says {told}.*get it elsewhere, "
        r"put it into .* and run the command",
    ) as error:
        flowers102.fetch(server.url + "it", tmp_path / "it", MD5)
    assert (
        "\n" not in str(error.value)
        and len(server.ranges) == asked
        and list(tmp_path.iterdir()) == []
    )


def test_no_server_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(flowers102, "PAUSE", 0.0)
    with pytest.raises(UserError, match=r"refused.*run the command again"):
        flowers102.fetch("http://127.0.0.1:1/it", tmp_path / "it", MD5)


def packed(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return buffer.getvalue()


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def mat(**values: list[int]) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, {key: np.array([value]) for key, value in values.items()})
    return buffer.getvalue()


@pytest.fixture
def flowers(server, monkeypatch):
    """Six flowers in the place of 8189."""
    server.files = {
        "imagelabels.mat": mat(labels=[1, 1, 1, 2, 2, 2]),
        "setid.mat": mat(trnid=[1, 4], valid=[2, 5], tstid=[3, 6]),
        "102flowers.tgz": packed(
            {f"jpg/image_{i:05d}.jpg": picture(i) for i in range(1, 7)}
        ),
    }
    publish(server, monkeypatch)
    return server


def publish(server, monkeypatch):
    sums = {
        name: hashlib.md5(content).hexdigest() for name, content in server.files.items()
    }
    monkeypatch.setitem(
        flowers102.SOURCES, "flowers-102", flowers102.Source(server.url, sums)
    )


def test_the_command_fetches_the_published_layout(flowers, tmp_path, capsys):
    flowers.plan = ["whole", "whole", 300]  # the archive is cut
    to = tmp_path / "deep" / "flowers"
    assert cli.main(["download", "flowers-102", "--to", str(to)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"vitnb: {to}"
    assert sorted(path.name for path in to.iterdir()) == [
        "imagelabels.mat",
        "jpg",
        "setid.mat",
    ]
    assert [path.name for path in to.parent.iterdir()] == ["flowers"]
    found = folders.recognize_layout(to, 0)
    assert [len(found.part(name).paths) for name in ("train", "valid", "test")] == [
        2,
        2,
        2,
    ]
    assert found.part("test").paths[1].read_bytes() == picture(6)
    asked = len(flowers.ranges)
    assert (
        cli.main(["download", "flowers-102", "--to", str(to)]) == 0
        and len(flowers.ranges) == asked
    )


def test_nothing_half_done_is_put_in_place(flowers, tmp_path, capsys, monkeypatch):
    """A lost connection, then a process killed while it unpacked, then success."""
    to = tmp_path / "flowers"
    flowers.plan = ["whole", "whole", 300] + [0] * flowers102.TRIES
    assert (
        cli.main(["download", "flowers-102", "--to", str(to)]) == 1 and not to.exists()
    )
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "run the command again" in line
    (tmp_path / "flowers.part" / "jpg").mkdir()
    (tmp_path / "flowers.part" / "jpg" / "image_00001.jpg").write_bytes(b"half")
    assert cli.main(["download", "flowers-102", "--to", str(to)]) == 0
    assert (to / "jpg" / "image_00001.jpg").read_bytes() == picture(1)
    assert [path.name for path in tmp_path.iterdir()] == ["flowers"]


def test_files_that_were_put_there_by_hand_count(flowers, tmp_path):
    part = tmp_path / "flowers.part"
    part.mkdir()
    for name, content in flowers.files.items():
        (part / name).write_bytes(content)
    flowers.plan = ["says 404"] * 9
    assert (
        flowers102.download("flowers-102", tmp_path / "flowers").is_dir()
        and flowers.ranges == []
    )


def test_an_archive_that_writes_elsewhere(flowers, tmp_path, monkeypatch):
    flowers.files["102flowers.tgz"] = packed({"../../evil.jpg": b"x"})
    publish(flowers, monkeypatch)
    with pytest.raises(UserError, match="cannot be unpacked"):
        flowers102.download("flowers-102", tmp_path / "a" / "flowers")
    assert (
        not list(tmp_path.rglob("evil.jpg"))
        and not (tmp_path / "a" / "flowers").exists()
    )


def test_a_python_whose_tarfile_has_no_filter(flowers, tmp_path, monkeypatch):
    monkeypatch.delattr(tarfile, "data_filter")
    with pytest.raises(UserError, match=r"since Python 3\.11\.4: take a newer Python"):
        flowers102._unpack(tmp_path / "any.tgz", tmp_path)


def test_an_archive_that_lacks_images(flowers, tmp_path, monkeypatch):
    flowers.files["102flowers.tgz"] = packed({"jpg/image_00001.jpg": picture(1)})
    publish(flowers, monkeypatch)
    with pytest.raises(UserError, match="lacks 1 images of the train split"):
        flowers102.download("flowers-102", tmp_path / "flowers")
    assert not (tmp_path / "flowers").exists()


def test_a_folder_that_holds_something_else_is_left_alone(flowers, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(
        UserError,
        match=r"is there and not whole: move it away, or name another with --to",
    ):
        flowers102.download("flowers-102", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [
        "mine.txt"
    ] and flowers.ranges == []


def test_an_unknown_data_set(capsys):
    assert cli.main(["download", "flowers102"]) == 1
    assert "did you mean 'flowers-102'?" in capsys.readouterr().err


def test_where_it_can_be_written_to(flowers, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        UserError, match=r"cannot write .*make room or name another folder"
    ):
        flowers102.download("flowers-102", Path(tmp_path / "file" / "flowers"))


def test_pictures_that_somebody_put_there_are_not_unpacked_over(flowers, tmp_path):
    own = tmp_path / "flowers.part" / "jpg"
    own.mkdir(parents=True)
    (own / "holiday.jpg").write_bytes(picture(3))
    with pytest.raises(UserError, match=r"holiday.jpg\): move it away"):
        flowers102.download("flowers-102", tmp_path / "flowers")
    assert [path.name for path in own.iterdir()] == ["holiday.jpg"]


def test_an_unpacking_that_breaks_off_leaves_no_pictures(
    flowers, tmp_path, monkeypatch
):
    """The next call unpacks anew what is there."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(flowers102.tarfile.TarFile, "extractall", full)
        with pytest.raises(UserError, match=r"cannot write .*make room"):
            flowers102.download("flowers-102", tmp_path / "flowers")
    part = tmp_path / "flowers.part"
    assert {path.name for path in part.iterdir()} == set(flowers.files)
    flowers102.download("flowers-102", tmp_path / "flowers")
    assert len(list((tmp_path / "flowers" / "jpg").glob("*.jpg"))) == 6
