"""The log of a protocol's run: JSON lines that are complete up to a known place after a kill at any moment."""

from __future__ import annotations

import json
import os
from pathlib import Path

from comeba_ext.errors import StorageError
from comeba_ext.storage import write_text


class RunLog:
    """An append-only file of records ``{"event": …}``; the first one identifies the run.

    Args:
        path: the file; its folder must exist.
        header: what the run is. A file with another header is refused.

    Attributes:
        records: everything after the header that was there before and is complete (a torn last line is dropped).

    Raises:
        StorageError: the file belongs to another run or is not ours.
    """

    def __init__(self, path: Path, header: dict):
        self.path = path
        self.header = json.loads(json.dumps({"event": "run", **header}))
        self.records: list[dict] = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").split("\n")[:-1]:  # what follows the last newline is torn
                try:
                    self.records.append(json.loads(line))
                except ValueError:
                    raise StorageError(f"{path} is not a log of JSON lines") from None
            found = self.records.pop(0) if self.records else self.header
            keys = [k for k in {**found, **self.header} if found.get(k) != self.header.get(k)]
            if keys:
                raise StorageError(
                    f"{path} belongs to another run ({', '.join(keys)} differ); choose another folder, or remove {path.parent}"
                )

    def keep(self, records: list[dict]) -> None:
        """Go on behind these records; what else was in the file is dropped."""
        self.records = list(records)
        write_text(self.path, "".join(json.dumps(r) + "\n" for r in (self.header, *self.records)))

    def append(self, records: list[dict]) -> None:
        self.records += records
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))
            file.flush()
            os.fsync(file.fileno())
