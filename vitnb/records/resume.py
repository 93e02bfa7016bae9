"""Unfinished measurements: what a killed run has found already, so that the next one goes on from there.

Every finding is a small file of its own, written whole, under a name that is a digest of what it depends on. Whatever of that
changes, the checkpoint above all, no file is found, and the measurement starts anew. ``records.Run.save`` removes the folder.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from vitnb.records import machine
from vitnb.records.files import write_file


class ResumeCache:
    """Findings of one measurement in ``folder``; None: nothing is kept.

    ``depends``: what all findings depend on, as JSON holds it; the versions of the packages always do.
    """

    def __init__(self, folder: Path | None, **depends):
        self.folder, self.depends = folder, depends | {"versions": machine.versions()}
        self.seen: set[Path] = set()
        self.found_before = 0  # findings of a run before this one

    def get(self, make: Callable[[], dict], **asked) -> dict:
        """The finding for ``asked``: read, if it was found before, else made and kept. ``make`` gives what JSON can hold."""
        if self.folder is None:
            return make()
        key = json.dumps([self.depends, asked], sort_keys=True)
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        if path.exists():
            self.found_before += path not in self.seen
            self.seen.add(path)
            return json.loads(path.read_text(encoding="utf-8"))
        found = make()
        write_file(path, json.dumps(found))
        self.seen.add(path)
        return found
