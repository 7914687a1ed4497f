"""What every benchmark prints: one object with machine, versions, rows and targets."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from comeba_ext.machine import machine, versions
from comeba_ext.text.request import as_requests

DATA = Path(os.environ.get("COMEBA_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def counterfact(part: str, count: int | None = None) -> list[dict]:
    """The first records of ``counterfact-train.json`` or ``counterfact-edit.json``."""
    return json.loads((DATA / "counterfact" / f"counterfact-{part}.json").read_text())[:count]


def one_a_subject(records: list[dict]) -> list:
    """Requests, the last one of every subject: of several the earlier ones are written anew, which is more to do."""
    return list({request.subject: request for request in as_requests(records)}.values())


def target(name: str, value: float, limit: float, holds: bool) -> dict:
    return {"name": name, "value": round(value, 4), "limit": limit, "holds": bool(holds)}


def finish(rows: list[dict], targets: list[dict], as_json: bool) -> None:
    """Print the result; exit code 1 when a target is missed."""
    result = {"machine": machine(), "versions": versions(), "rows": rows, "targets": targets}
    if as_json:
        print(json.dumps(result))
    else:
        for entry in targets:
            print(f"{'holds ' if entry['holds'] else 'MISSED'} {entry['name']}: {entry['value']} (limit {entry['limit']})")
        print(", ".join(f"{k} {v}" for k, v in {**machine(), **versions()}.items()))
    sys.exit(0 if all(entry["holds"] for entry in targets) else 1)
