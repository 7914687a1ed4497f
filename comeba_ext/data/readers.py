"""Readers: files of records into edit requests, files of text into a stream for the covariance."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

from tqdm.auto import tqdm

from comeba_ext.data.tables import TABLE_SUFFIXES, long_fields, table_records
from comeba_ext.errors import ComebaError, StorageError
from comeba_ext.text.records import LONE, UNSTRUCTURED
from comeba_ext.text.request import EditRequest, Ids, UnknownFields

JSONL_SUFFIXES = (".jsonl", ".ndjson")
TEXT_COLUMN = "text"


@dataclass(frozen=True)
class ReadResult:
    """What a file of records held.

    Attributes:
        requests: those of the usable records, in file order.
        read: number of records read.
        skipped: :meth:`skip` of each record that cannot be used.
        places: the position in the file of every request's record; default: one request a record that can be used.
        lines: the line in the file of every record, from 1, where records are lines.
    """

    requests: list[EditRequest]
    read: int
    skipped: list[dict]
    places: list[int] | None = None
    lines: list[int] | None = None

    def skip(self, index: int, reason: object) -> dict:
        """``{"index": position in the file from 0, "reason": text}`` of a record that cannot be used, and its ``line``, if it is one."""
        return _skip(index, reason, self.lines[index] if self.lines else None)

    def placed(self) -> list[tuple[int, EditRequest]]:
        """The requests with their records' positions in the file."""
        unusable = {skip["index"] for skip in self.skipped}
        places = self.places if self.places is not None else [n for n in range(self.read) if n not in unusable]
        return list(zip(places, self.requests, strict=True))

    def counts(self, used: list[EditRequest], skipped: list[dict]) -> dict:
        """How many records were ``read``, how many ``used``, which ``skipped``."""
        chosen = set(map(id, used))
        return {"read": self.read, "used": len({place for place, own in self.placed() if id(own) in chosen}), "skipped": skipped}

    def usable(
        self, check: Callable[[int, EditRequest], None], *, limit: int | None = None, seed: int = 0, progress: bool = False
    ) -> tuple[list[EditRequest], list[dict]]:
        """The requests that pass a check, and, as ``skipped``, all records that cannot be used.

        Args:
            check: called with a record's position and its request; raises :class:`ComebaError` for one that cannot be used.
            limit: stop at so many records' requests.
            seed: 0 takes them in file order, another one in an order of its own.
        """
        used, skipped, ids, taken = [], list(self.skipped), Ids(), 0
        records = [(place, [request for _, request in own]) for place, own in groupby(self.placed(), key=lambda pair: pair[0])]
        if seed:
            random.Random(seed).shuffle(records)
        for position, own in tqdm(records, unit="record", desc="checking", disable=not progress or len(records) < 1000):
            if taken == limit:
                break
            try:
                for request in own:  # of a case all or none: what it asks follows from all
                    check(position, request)
                for request in own:
                    ids.add(request)
                used += own
                taken += 1
            except ComebaError as error:
                skipped.append(self.skip(position, error))
        return used, sorted(skipped, key=lambda skip: skip["index"])


def read_requests(path, limit: int | None = None, *, unstructured: bool = False) -> ReadResult:
    """Edit requests from a JSON or JSONL file, or a table. What nothing reads in a record of this package's own form is logged.

    Args:
        path: a JSON file (a list of records, or an object that holds one list or is itself a record), a JSONL file
            (one record a line, blank lines ignored), or a CSV or TSV file with a header (:mod:`comeba_ext.data.tables`). The
            records may have any form that :mod:`comeba_ext.text.records` knows: this package's, EasyEdit's, CounterFact's,
            ZsRE's, MQuAKE's …
        limit: read at most this many records, usable or not; ``None`` reads all.
        unstructured: of AKEW's records, edit the paragraph that states a fact (``fact_new_uns``) behind its question, not the fact.

    Raises:
        StorageError: the file is missing, truncated, not JSON, a table without the columns that facts need, or holds no
            record. A record that is valid JSON but no usable request is no error: it is listed in ``skipped``.
        ValueError: ``limit`` is less than 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    path = Path(path)
    requests: list[EditRequest] = []
    places: list[int] = []
    skipped: list[dict] = []
    lines: list[int] = []
    unknown = UnknownFields(str(path))
    read = 0
    with _opened(path) as file:
        for index, (line, record) in enumerate(islice(_records(path, file), limit)):
            read += 1
            if line is not None:
                lines.append(line)
            try:
                if isinstance(record, Exception):
                    raise record
                own = EditRequest.all_from_record({**record, UNSTRUCTURED: True} if unstructured and isinstance(record, dict) else record)
                unknown.add(record)
                requests += own
                places += [index] * len(own)
            except (ValueError, TypeError, KeyError, AttributeError) as error:  # RequestError is a ValueError
                skipped.append(_skip(index, error, line))
    if not read:
        raise StorageError(f"{path}: holds no records")
    unknown.warn()
    return ReadResult(requests, read, skipped, places, lines or None)


def _skip(index: int, reason: object, line: int | None) -> dict:
    return {"index": index, **({} if line is None else {"line": line}), "reason": str(reason)}


def place_of(skip: dict) -> str:
    """What people call a skipped record's place: counted from 1, with its line."""
    return f"record {skip['index'] + 1}" + (f" (line {skip['line']})" if "line" in skip else "")


def read_texts(path) -> Iterator[str]:
    """Texts for the covariance, one at a time, so that a corpus need not fit into memory.

    Args:
        path: ``.txt`` (paragraphs separated by blank lines, or lines where there is no blank line between two texts),
            ``.csv`` with a ``text`` column, ``.jsonl`` with a ``text`` field, or a folder, whose files of these kinds
            are read in the order of their names (other files and subfolders are left out).

    Returns:
        iterator over the texts, stripped; blank ones are left out.

    Raises:
        StorageError: nothing is at ``path`` or it is of another kind (at once); a file is damaged, has no ``text`` or
            nothing holds any text (when the iterator gets there).
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and file.suffix.lower() in _TEXT_READERS)
        if not files:
            raise StorageError(f"{path}: the folder holds no {', '.join(_TEXT_READERS)} file")
    elif not path.exists():
        raise StorageError(f"{path}: no such file or folder")
    elif path.suffix.lower() not in _TEXT_READERS:
        raise StorageError(f"{path}: cannot read texts from {path.suffix or 'a file without suffix'!r}; use {', '.join(_TEXT_READERS)}")
    else:
        files = [path]
    return _stream(path, files)


def _stream(path: Path, files: list[Path]) -> Iterator[str]:
    found = False
    for file in files:
        with _opened(file) as lines:
            for text in _TEXT_READERS[file.suffix.lower()](file, lines):
                if text.strip():
                    found = True
                    yield text.strip()
    if not found:
        raise StorageError(f"{path}: holds no text")


def _records(path: Path, file) -> Iterator[tuple[int | None, object]]:
    """The records, each with the line that it is, if it is one."""
    if path.suffix.lower() in JSONL_SUFFIXES:
        yield from _json_lines(path, file)
        return
    if path.suffix.lower() in TABLE_SUFFIXES:
        yield from table_records(path, file)
        return
    content = file.read()
    if not content.strip():
        return
    try:
        value = _parsed(content)
    except json.JSONDecodeError as error:
        if _starts_with_record_line(content):  # JSONL under another name
            yield from _json_lines(path, content.split("\n"))
            return
        raise StorageError(
            f"{path}: not valid JSON at line {error.lineno}, column {error.colno} ({error.msg}); the file may be truncated"
        ) from None
    yield from ((None, record) for record in _record_list(path, value))


def _starts_with_record_line(content: str) -> bool:
    first, _, rest = content.strip().partition("\n")
    try:
        return bool(rest) and isinstance(_parsed(first), dict)
    except json.JSONDecodeError:
        return False


def _parsed(text: str):
    """JSON; what Python's reader does not take, although it is JSON, is an error in its words."""
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, 0) from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # an integer of more than 4,300 digits
        raise json.JSONDecodeError(str(error).partition(";")[0], text, 0) from None


def _record_list(path: Path, value) -> list:
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        if value.keys() & set(LONE):  # a lone record; its own lists are not records
            return [value]
        lists = [v for v in value.values() if isinstance(v, list)]
        if len(lists) == 1:
            return lists[0]
        raise StorageError(f"{path}: the JSON object holds {len(lists)} lists, expected one list of records")
    raise StorageError(f"{path}: expected a JSON list of records, found {type(value).__name__}")


def _json_lines(path: Path, lines) -> Iterator[tuple[int, object]]:
    """``(line number from 1, value)`` of every line that is not blank."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, _parsed(line)
        except json.JSONDecodeError as error:
            raise StorageError(
                f"{path}: line {number} is not valid JSON ({error.msg} at column {error.colno}); the file may be truncated"
            ) from None


def _txt_texts(path: Path, file) -> Iterator[str]:
    by_paragraph = _has_inner_blank_line(file)
    file.seek(0)
    if not by_paragraph:
        yield from file
        return
    paragraph: list[str] = []
    for line in file:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph)
            paragraph = []
    yield "".join(paragraph)


def _has_inner_blank_line(lines) -> bool:
    """Whether a blank line stands between two texts; blank lines at either end separate nothing."""
    seen_text = seen_blank = False
    for line in lines:
        if not line.strip():
            seen_blank = seen_text
        elif seen_blank:
            return True
        else:
            seen_text = True
    return False


def _csv_texts(path: Path, file) -> Iterator[str]:
    rows = csv.reader(file, strict=True)  # strict: a file that ends inside quotes is an error, not a shorter text
    header = None
    for row in long_fields(path, rows):
        if header is None:
            header = row
            if TEXT_COLUMN not in header:
                raise StorageError(f"{path}: no {TEXT_COLUMN!r} column among {header}")
            column = header.index(TEXT_COLUMN)
        elif row:  # the csv module gives an empty list for an empty line
            if len(row) <= column:
                raise StorageError(f"{path}: line {rows.line_num} has no {TEXT_COLUMN!r} field")
            yield row[column]


def _jsonl_texts(path: Path, file) -> Iterator[str]:
    for number, record in _json_lines(path, file):
        text = record.get(TEXT_COLUMN) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise StorageError(f"{path}: line {number} has no {TEXT_COLUMN!r} field with text")
        yield text


_TEXT_READERS = {".txt": _txt_texts, ".csv": _csv_texts, ".jsonl": _jsonl_texts}


@contextmanager
def _opened(path: Path):
    """The file as UTF-8 text (with or without a byte order mark); what the system says against it as a StorageError."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield file
    except FileNotFoundError:
        raise StorageError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise StorageError(f"{path}: is a folder, expected a file") from None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise StorageError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
