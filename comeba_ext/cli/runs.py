"""A run of ``edit``: when it saves, and what it says of edits that are not answered."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

from comeba_ext.cli.inputs import continued
from comeba_ext.cli.terminal import Report, counted
from comeba_ext.errors import ComebaError

if TYPE_CHECKING:
    from comeba_ext.editor import Editor

PAUSE = 60.0  # seconds of edits that a kill may cost, where saves are cheap
LEAST = 30  # times as long as a save took is edited before the next one: no more than 3 % of a run
SHOWN = 10  # edits that are not answered, with what is said instead
NEW_TOKENS = 8


class Saves:
    """Saves a run's edits every so many batches, and where batches take long, every minute too; and has the report know what an
    interruption leaves."""

    def __init__(self, editor: Editor, out: Path, every: int, report: Report, begun: bool):
        self.editor, self.out, self.every, self.report = editor, out, every, report
        self.last, self.took = time.monotonic(), 0.0
        if report.first:
            report.kept = f"the edits in {out} are as they were" if begun else "nothing was saved"

    def after_batch(self, steps: list[dict]) -> None:
        if len(steps) % self.every == 0 or time.monotonic() - self.last >= max(PAUSE, LEAST * self.took):
            self.save(steps)

    def save(self, steps: list[dict], inference_only: bool = False) -> None:
        if not self.report.first:
            return
        start = time.monotonic()
        self.editor.save_pretrained(self.out, inference_only=inference_only)
        self.last = time.monotonic()
        self.took = self.last - start
        edits = sum(len(step["request_ids"]) for step in steps)
        what = f"{counted(edits, 'edit')} of this run {'is' if edits == 1 else 'are'} saved in {self.out}"
        self.report.kept = f"{what if steps else f'no edit was made, but {self.out} is ready for them'}; go on with --resume"


def unanswered(editor: Editor, steps: list[dict]) -> list[dict]:
    """The edits of these last steps that were not answered right after their batch: ``request_id``, ``prompt``, ``wanted``, and of the
    first :data:`SHOWN` what the model ``says`` there now, to the end of the line."""
    from comeba_ext.text.request import EditRequest

    found = []
    for event in editor.log[len(editor.log) - len(steps) :]:
        requests = [EditRequest.from_record(record) for record in event["requests"]]
        took = zip(requests, event["answered"], strict=True)
        found += [{"request_id": r.request_id, "prompt": r.text, "wanted": r.target_new, "says": None} for r, own in took if not own]
    for row in found[:SHOWN]:
        with contextlib.suppress(ComebaError):  # a prompt that fills the context
            (row["says"],) = continued(editor.model, editor.tokenizer, [row["prompt"]], NEW_TOKENS)
    return found


def say_unanswered(report: Report, rows: list[dict]) -> None:
    if rows:
        report.say("Not answered:")
        report.table(("prompt", "wanted", "says now"), [(row["prompt"], row["wanted"], row["says"] or "") for row in rows[:SHOWN]])
    if len(rows) > SHOWN:
        report.say(f"… and {len(rows) - SHOWN} more (all with --json)")


def unsuited(editor: Editor, edits: int) -> bool:
    """Whether a run of so many edits shows that the settings do not suit the model: a single edit shows nothing, and neither does a run
    in a folder where most took."""
    asked = [took for event in editor.log if event["event"] == "edit" for took in (*event["answered"], *(False for _ in event["declined"]))]
    return edits > 1 and 2 * sum(asked) < len(asked)
