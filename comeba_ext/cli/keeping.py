"""Commands about the edits that a folder keeps: ``edits list``, ``edits retract``."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import typer

from comeba_ext.cli.app import Device, Dtype, Json, Model, Trust, app
from comeba_ext.cli.inputs import edits_folder, loaded, size_of_edits
from comeba_ext.cli.terminal import bytes_as_text, counted, reporting
from comeba_ext.errors import ComebaError, RequestError, StorageError

edits = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List the edits in a folder, and take some back.")
app.add_typer(edits, name="edits")

LIVE, SUPERSEDED, TAKEN_BACK, DECLINED = "live", "superseded", "taken back", "declined"


@edits.command("list")
def list_edits(folder: Annotated[Path, typer.Argument(help="of saved edits")], as_json: Json = False) -> None:
    """What a folder's edits are, by their ids, and which are live. Needs no model."""
    with reporting(as_json) as report:
        manifest, rows = kept(folder)
        numbers = {state: sum(row["state"] == state for row in rows) for state in (LIVE, SUPERSEDED, TAKEN_BACK, DECLINED)}
        if rows:
            yes = {True: "yes", False: "no", None: ""}
            columns = ("id", "step", "prompt", "target", "state", "answered")
            report.table(columns, [(r["id"], r["step"], r["prompt"], r["target_new"], r["state"], yes[r["answered"]]) for r in rows])
        said = ", ".join(f"{number} {state}" for state, number in numbers.items() if number)
        report.say(f"{manifest.get('method', 'COMEBA-HK')}, step {manifest['step']}: {said or 'no edits yet'}.")
        report.result = {
            "folder": str(folder),
            "method": manifest.get("method", "COMEBA-HK"),
            "step": manifest["step"],
            "live": numbers[LIVE],
            "edits": rows,
            "records": {"read": len(rows), "used": len(rows), "skipped": []},
        }


@edits.command()
def retract(
    model: Model,
    folder: Annotated[Path, typer.Argument(help="of saved edits")],
    names: Annotated[list[str], typer.Argument(metavar="ID_OR_SUBJECT...", help="ids, or subjects: all live edits about one")],
    device: Device = None,
    dtype: Dtype = "auto",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Take edits back, all that are named or none, and save the rest. 'comeba edits list FOLDER' says which there are."""
    from comeba_ext.editor import Editor

    with reporting(as_json) as report:
        kept(folder)  # a folder that is not there is not made
        report.kept = f"the edits in {folder} are as they were"
        with edits_folder(folder, resume=True):
            _, rows = kept(folder)
            chosen = meant(rows, names, folder)
            net, tokenizer = loaded(model, device, dtype, trust=trust)
            editor = Editor.from_pretrained(net, tokenizer, folder)
            try:
                editor.retract([row["id"] for row in chosen])
            except RequestError as error:
                raise ComebaError(f"{error} (Editor.rollback, in Python); the edits in {folder} are as they were") from None
            editor.save_pretrained(folder)
        size = size_of_edits(folder)
        report.table(("id", "prompt", "no longer"), [(row["id"], row["prompt"], row["target_new"]) for row in chosen])
        done = f"{counted(len(chosen), 'edit')} taken back, {len(editor.ledger)} live"
        report.say(f"{done}; step {editor.step} saved to {folder}, {bytes_as_text(size)}.")
        report.result = {
            "folder": str(folder),
            "retracted": chosen,
            "live": len(editor.ledger),
            "step": editor.step,
            "bytes": size,
            "records": {"read": len(names), "used": len(names), "skipped": []},
        }


def kept(folder: Path) -> tuple[dict, list[dict]]:
    """The manifest of a folder, and every edit that it knows of, oldest first: ``id``, ``step``, ``prompt`` (filled in), ``subject``,
    ``target_new``, ``state``, and whether it was ``answered`` right after its batch (``None``: not asked).

    Raises:
        StorageError: no folder of edits, one that was saved for inference only, or a damaged one.
    """
    from comeba_ext.storage import read_folder, read_manifest

    manifest = read_manifest(folder)
    if "log" not in manifest["files"]:
        number = counted(manifest.get("edits", 0), "edit")
        raise StorageError(f"{folder} was saved for inference only: it holds {number} and does not say which, and none can be taken back")
    manifest, (log,) = read_folder(folder, "log")
    try:
        live = {saved["request"]["request_id"] for saved in manifest["ledger"] if saved["removed"] is None}
        return manifest, rows_of([json.loads(line) for line in log.splitlines()], live)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{folder} is incomplete or damaged: {type(error).__name__}: {error}") from None


def rows_of(log: list[dict], live: set[str]) -> list[dict]:
    """The edits of a log, and the ids of those that are live, as :func:`kept` gives them."""
    from comeba_ext.text.request import EditRequest

    rows: list[dict] = []
    for event in log:
        if event["event"] == "rollback":
            for row in rows:
                if row["state"] != DECLINED and row["step"] > event["step"]:
                    row |= {"state": TAKEN_BACK, "removed": None}
                elif (row["removed"] or 0) > event["step"]:
                    row |= {"state": LIVE, "removed": None}
        elif event["event"] == "retract":
            _remove(rows, event["request_ids"], event["step"], TAKEN_BACK)
        elif event["event"] == "edit":
            _remove(rows, event.get("superseded", []), event["step"], SUPERSEDED)
            requests = [EditRequest.from_record(record) for record in event["requests"]]
            took = event.get("answered") or [None] * len(requests)
            for request, answered in zip(requests, took, strict=True):
                rows.append(_row(event, request.request_id, request.text, request.subject, request.target_new, LIVE, answered))
            for own in event.get("declined", []):
                known = (own["request_id"], own["prompt"], own.get("subject", ""), own.get("target_new", ""))
                rows.append(_row(event, *known, DECLINED, None))
    if {row["id"] for row in rows if row["state"] == LIVE} != live:
        raise ValueError("log and ledger name other live edits")
    return [{key: value for key, value in row.items() if key != "removed"} for row in rows]


def _row(event: dict, name: str, prompt: str, subject: str, target: str, state: str, answered: bool | None) -> dict:
    own = {"id": name, "step": event["step"], "prompt": prompt, "subject": subject, "target_new": target}
    return {**own, "state": state, "answered": answered, "removed": None}


def _remove(rows: list[dict], ids: list[str], step: int, state: str) -> None:
    for row in rows:
        if row["id"] in ids and row["state"] == LIVE:
            row |= {"state": state, "removed": step}


def meant(rows: list[dict], names: list[str], folder: Path) -> list[dict]:
    """The live edits that are named, each once: by its id, or, where no live edit has that id, by its subject.

    Raises:
        ComebaError: something names none; with the names that are near, or what has become of it.
    """
    live = [row for row in rows if row["state"] == LIVE]
    found: dict[str, dict] = {}
    for name in names:
        own = [row for row in live if row["id"] == name] or [row for row in live if row["subject"] == name.strip()]
        if not own:
            raise ComebaError(_unknown(rows, live, name, folder))
        found |= {row["id"]: row for row in own}
    return list(found.values())


def _unknown(rows: list[dict], live: list[dict], name: str, folder: Path) -> str:
    gone = [row for row in rows if name in (row["id"], row["subject"])]
    if gone:
        return f"{name!r} is not live in {folder}: {gone[-1]['id']} ({gone[-1]['prompt']!r}) is {gone[-1]['state']}; nothing was taken back"
    known = list(dict.fromkeys(own for row in live for own in (row["subject"], row["id"])))
    lower = {own.casefold(): own for own in reversed(known)}
    near = [repr(lower[own]) for own in get_close_matches(name.casefold(), lower, n=3, cutoff=0.5)]
    hint = f"near are {', '.join(near)}" if near else f"'comeba edits list {folder}' says which there are"
    return f"no live edit in {folder} has the id or subject {name!r}; {hint}; nothing was taken back"
