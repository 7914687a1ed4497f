"""Facts and texts in tables: CSV, and whatever else separates its columns (tabs, the semicolons of half of Europe's spreadsheets)."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from comeba_ext.errors import RequestError, StorageError

TABLE_SUFFIXES = (".csv", ".tsv")
NEEDED = ("prompt", "subject", "target_new")
LISTS = ("rephrase_prompts", "wordings", "aliases", "locality_prompts")  # several texts in a cell
NESTED = ("portability_prompts", "portability_aliases", "questions")  # more than a cell can say
BETWEEN = " | "  # two texts in a cell


def table_records(path: Path, file) -> Iterator[tuple[int, dict | RequestError]]:
    """``(line number from 1, record)`` of every row below the header that is not empty; in a record's place what is wrong with its row.

    Raises:
        StorageError: the header lacks a column, has one twice, or one that holds more than texts.
    """
    first = next((line for line in file if line.strip()), "")
    file.seek(0)
    separator = max(",;\t", key=first.count)
    rows, header, end = csv.reader(file, delimiter=separator, strict=True), None, 0
    for row in long_fields(path, rows):
        line, end = end + 1, rows.line_num  # a quoted text may go over several
        row = [cell.strip() for cell in row]
        if not any(row):
            continue
        if header is None:
            header = row
            _check(path, header)
        elif len(row) > len(header):
            yield line, RequestError(f"{len(row)} cells under {len(header)} columns; put texts that hold a {separator!r} in double quotes")
        else:
            filled = {name: cell for name, cell in zip(header, row, strict=False) if name and cell}
            yield line, {name: cell.split(BETWEEN) if name in LISTS else cell for name, cell in filled.items()}


def _check(path: Path, header: list[str]) -> None:
    missing = [name for name in NEEDED if name not in header]
    if missing:
        raise StorageError(
            f"{path}: no column {', '.join(map(repr, missing))} in the first line, which has {header}; a table of facts has the columns "
            f"{', '.join(NEEDED)}, and others where wanted ({', '.join(('ground_truth', *LISTS))})"
        )
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise StorageError(f"{path}: the column {twice[0]!r} is there twice; several texts go into one cell, with {BETWEEN!r} between")
    if nested := [name for name in header if name in NESTED]:
        raise StorageError(f"{path}: {nested[0]!r} holds more than texts, so it cannot be a column; write such records as JSON")


def long_fields(path: Path, rows) -> Iterator[list[str]]:
    """Rows without the csv module's limit of 131,072 characters a field, which long articles exceed.

    The limit is a setting of the whole process, so it is lifted only while a row is parsed.
    """
    while True:
        limit = csv.field_size_limit(sys.maxsize)
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise StorageError(f"{path}: line {rows.line_num} is not valid CSV ({error})") from None
        finally:
            csv.field_size_limit(limit)
        yield row
