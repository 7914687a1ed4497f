"""``export``: edited models for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from comeba_ext.cli.app import Device, Dtype, Json, Limit, Model, Trust, app
from comeba_ext.cli.inputs import fitting, loaded, some_usable
from comeba_ext.cli.terminal import METRICS, counted, reporting, say_counts
from comeba_ext.errors import ComebaError

HOW = {
    "folder": (
        "AutoModelForCausalLM.from_pretrained({out!r}, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained({out!r}, trust_remote_code=True)",  # without, it asks whether the folder's code may run
    ),
    "merged": ("AutoModelForCausalLM.from_pretrained({out!r})", "AutoTokenizer.from_pretrained({out!r})"),
    "lora": ("peft.PeftModel.from_pretrained(model, {out!r})", "AutoTokenizer.from_pretrained({model!r})"),
}


@app.command()
def export(
    model: Model,
    edits: Annotated[Path, typer.Option("--edits", help="folder of saved edits")],
    to: Annotated[str, typer.Option("--to", help="folder (with its gate, for Transformers), merged (plain weights) or lora (for PEFT)")],
    out: Annotated[Path, typer.Option("--out", help="a new folder")],
    records: Annotated[
        Optional[Path], typer.Option(help="with merged and lora: records to measure on what it costs that every token meets the edits")
    ] = None,
    limit: Limit = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Write an edited model for programs that know nothing of this package."""
    from comeba_ext import testbed
    from comeba_ext.data import read_requests
    from comeba_ext.experiments.table import cell
    from comeba_ext.exporting import FORMATS, measure
    from comeba_ext.exporting.new_folder import must_be_new
    from comeba_ext.storage import read_manifest

    with reporting(as_json) as report:
        if to not in FORMATS:
            raise ComebaError(f"unknown --to {to!r}; choose {', '.join(FORMATS)}")
        if to == "folder" and records is not None:
            raise ComebaError("--records measures what it costs to leave the gate behind, and --to folder keeps it; see 'comeba eval'")
        must_be_new(out)
        read_manifest(edits)
        read = read_requests(records, limit) if records is not None else None
        net, tokenizer = loaded(model, device, dtype, trust=trust)
        used, skipped = fitting(net, tokenizer, read) if read else ([], [])
        if read:
            some_usable(records, read.read, used, skipped)
        done = FORMATS[to](net, tokenizer, edits, out)
        rank = f", rank {done.rank}" if done.rank else ""
        report.say(f"{counted(done.edits, 'edit')} in {counted(len(done.layers), 'layer')}{rank}; {done.bytes / 1e6:.1f} MB in {out}.")
        report.say("Load it with")
        for line in HOW[to]:
            report.say("  " + line.format(out=str(out), model=str(testbed.folder_of(model) or model)))
        for note in done.notes:
            report.say(f"! {note}.")
        counts = {"read": 0, "used": 0, "skipped": []}
        columns = {}
        if used:
            columns = measure(net, tokenizer, edits, out, to, used, progress=not as_json)
            report.table(("", *columns), [(name, *(cell(own, name) for own in columns.values())) for name in METRICS])
            counts = read.counts(used, skipped)
            say_counts(report, counts)
        elif to != "folder":
            report.say("Every token meets these edits now; --records FILE measures what that costs.")
        report.result = {
            "out": str(out),
            "to": to,
            "edits": done.edits,
            "layers": done.layers,
            "rank": done.rank,
            "bytes": done.bytes,
            "notes": list(done.notes),
            "measured": {name: own.to_dict() for name, own in columns.items()},
            "records": counts,
            "edits_folder": str(edits),
        }
