"""A batch before it is edited: what its requests must agree on, and their ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from comeba_ext.errors import RequestError
from comeba_ext.memory.ledger import Entry, Ledger
from comeba_ext.text.request import EditRequest


def check_consistent(batch: list[EditRequest], ledger: Ledger) -> list[EditRequest]:
    """The batch, after the checks that depend on a request's mates and on the live edits.

    Raises:
        RequestError: it is empty, contradicts itself, or an id is another fact's.
    """
    if not batch:
        raise RequestError("the batch is empty; give at least one request")
    targets: dict[tuple[str, str], str] = {}
    ids: set[str] = set()
    for request in batch:
        before = targets.setdefault(request.fact, request.target_new)
        if before != request.target_new:
            raise RequestError(
                f"two requests of the batch contradict each other: {request.text!r} -> {before!r} and {request.target_new!r}"
            )
        if request.request_id is not None:
            live = ledger.by_id(request.request_id)
            if request.request_id in ids or (live is not None and live.request.fact != request.fact):
                raise RequestError(f"request_id {request.request_id!r} is used by another request; ids must differ")
            ids.add(request.request_id)
    return batch


def with_ids(batch: list[EditRequest], ledger: Ledger, number: int, given: Iterable[str] = ()) -> tuple[list[EditRequest], int]:
    """The same requests, each with an id: its own, or one that neither they, nor those ``given``, nor a live edit uses.

    Args:
        number: of the first id to try, ``edit-<number>``.

    Returns:
        The requests, and the number to go on with.
    """
    taken = {request.request_id for request in batch} | set(given)
    named = []
    for request in batch:
        if request.request_id is None:
            while ledger.by_id(f"edit-{number}") or f"edit-{number}" in taken:
                number += 1
            request = dataclasses.replace(request, request_id=f"edit-{number}")
            number += 1
        named.append(request)
    return named, number


def live_entries(request_ids: str | Iterable[str], ledger: Ledger) -> list[Entry]:
    """The live entries of some ids.

    Raises:
        RequestError: no id is given, one is given twice, or one is not live.
    """
    ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
    entries = [ledger.by_id(request_id) for request_id in ids]
    unknown = [request_id for request_id, entry in zip(ids, entries, strict=True) if entry is None]
    if unknown or not ids or len(set(ids)) != len(ids):
        what = f"no live edit has the id {', '.join(map(repr, unknown))}" if unknown else "no or repeated ids given"
        raise RequestError(f"{what}; ids are in every report's request_ids, and in editor.ledger")
    return [entry for entry in entries if entry is not None]


def declined_in(log: list[dict]) -> set[tuple[str, str, str]]:
    """``(text, subject, new object)`` of what was declined in the steps of a log that were not rolled back."""
    found: list[tuple[int, tuple[str, str, str]]] = []
    for event in log:
        if event["event"] == "edit":
            found += [(event["step"], (d["prompt"], d.get("subject", ""), d.get("target_new", ""))) for d in event["declined"]]
        elif event["event"] == "rollback":
            found = [(step, asked) for step, asked in found if step <= event["step"]]
    return {asked for _, asked in found}
