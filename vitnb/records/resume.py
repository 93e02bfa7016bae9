"""Resume a killed measurement from the results that it has already written.

Each result is a small file. The name of the file is a digest of everything that the
result depends on. If the checkpoint or anything else changes, no file has that name,
and the measurement starts anew. ``records.run.Run.save`` removes the folder.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from vitnb.records.files import write_file


class ResumeCache:
    """The results of one measurement on disk, each with the question that it answers.

    Args:
        folder: where the results lie; None to store nothing.
        key: of the identity that every result has, see ``identity.Identity``.
        depends: what every result depends on besides, as values that JSON can hold.

    Attributes:
        found_before: number of results that an earlier run has left.
    """

    def __init__(self, folder: Path | None, key: str = "", **depends):
        self.folder = folder
        self.depends = depends | {"identity": key}
        self.seen: set[Path] = set()
        self.found_before = 0

    def get(self, make: Callable[[], dict], **asked) -> dict:
        """Return the result for ``asked``: from disk, or made and written.

        Args:
            make: measures the result, a mapping that JSON can hold.
            asked: the question, such as the bits of each layer.
        """
        if self.folder is None:
            return make()
        key = json.dumps([self.depends, asked], sort_keys=True)
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        if path.exists():
            self.found_before += path not in self.seen
            self.seen.add(path)
            return json.loads(path.read_text(encoding="utf-8"))
        result = make()
        write_file(path, json.dumps(result))
        self.seen.add(path)
        return result
