"""``train``: methods that learn to edit."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Optional

import typer

from comeba_ext.cli.app import Config, Device, Dtype, Json, Limit, Model, Trust, app
from comeba_ext.cli.inputs import loaded, settings_of
from comeba_ext.cli.terminal import counted, reporting
from comeba_ext.errors import ComebaError

VALIDATED = 10  # without --val, every so manieth record of --train


@app.command()
def train(
    method: Annotated[str, typer.Argument(help="MEND, KE or SERAC")],
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="folder for the editor, its log and curve; an unfinished training goes on there")],
    records: Annotated[
        Optional[list[Path]], typer.Option("--train", help="records to learn from; may be repeated (default for testbed: its own facts)")
    ] = None,
    val: Annotated[Optional[Path], typer.Option("--val", help="records to choose the best editor by (default: a tenth of --train)")] = None,
    config: Config = None,
    steps: Annotated[int, typer.Option(min=1, help="of the optimiser, at most")] = 2000,
    edits: Annotated[int, typer.Option(min=1, help="edits that are made together, or shared by several processes")] = 1,
    accumulate: Annotated[int, typer.Option(min=1, help="passes a step of the optimiser")] = 4,
    lr: Annotated[Optional[float], typer.Option(help="Adam's rate (default: the method's)")] = None,
    validate_every: Annotated[int, typer.Option(min=1, help="steps between validations")] = 100,
    patience: Annotated[int, typer.Option(min=1, help="validations without a lower loss after which it ends")] = 5,
    seed: Annotated[int, typer.Option(help="of the order of the records")] = 0,
    minutes: Annotated[Optional[float], typer.Option(help="end after so long, with a validation; more of them go on there")] = None,
    mixed_precision: Annotated[str, typer.Option(help="no, bf16 or fp16")] = "no",
    limit: Limit = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Train a method's editor for a model; 'comeba edit --method METHOD --editor DIR' edits with it."""
    from comeba_ext import testbed
    from comeba_ext.data import ReadResult, read_requests
    from comeba_ext.editor import Editor
    from comeba_ext.methods import method_named
    from comeba_ext.text.request import EditRequest
    from comeba_ext.training import TrainConfig, Trainer

    with reporting(as_json, parallel=True) as report:
        settings = TrainConfig(
            steps=steps,
            edits=edits,
            accumulate=accumulate,
            lr=lr,
            validate_every=validate_every,
            patience=patience,
            seed=seed,
            mixed_precision=mixed_precision,
            minutes=minutes,
        )
        kind, home = method_named(method), testbed.folder_of(model)
        if records:
            files = [read_requests(file, limit) for file in records]
        elif home:
            facts = testbed.facts(folder=home)[1000:][:limit]  # tables edit the first thousand
            files = [ReadResult(facts, len(facts), [])]
        else:
            raise ComebaError("no records to learn from: add --train FILE (with locality prompts, as ZsRE and CounterFact have)")
        net, tokenizer = loaded(model, device, dtype, trust=trust)
        editor = Editor(net, tokenizer, settings_of(net, config, kind), method=kind)
        own = None if val is None else read_requests(val)
        apart, more = ([], []) if own is None else own.usable(lambda _, request: editor.check([request]))
        known = {request.fact for request in apart}

        def check(_: int, request: EditRequest) -> None:
            if request.fact in known:
                raise ComebaError("--val holds the same fact")
            editor.check([request])

        usable = [read.usable(check, progress=not as_json and report.first) for read in files]
        learned = [request for turn in zip_longest(*(found for found, _ in usable)) for request in turn if request is not None]
        skipped = [
            {**({"file": str(records[n])} if len(files) > 1 else {}), **skip} for n, (_, skips) in enumerate(usable) for skip in skips
        ]
        counts = [read.counts(*found) for read, found in zip(files, usable, strict=True)]
        if own is None:
            apart = learned[::VALIDATED]
            known = {request.fact for request in apart}
            learned = [request for request in learned if request.fact not in known]
        else:
            counts.append(own.counts(apart, more))
        blocks = list(editor.config.layers)
        report.say(f"{kind.name} learns from {counted(len(learned), 'record')}, validated on {len(apart)}; blocks {blocks}.")
        trainer = Trainer(editor, learned, apart, out, settings)
        report.table_head("step", "loss", "reliability", "generality", "locality", "seconds")

        def show(found: dict) -> None:
            scores = (f"{found[name]:.3f}" for name in ("loss", "reliability", "generality", "locality"))
            report.table_row(str(found["step"]), *scores, f"{found['seconds']:.0f}")

        result = trainer.run(progress=not as_json and report.first, on_validation=show)
        if result:
            best = result["best"]
            report.say(
                f"Best after {best['step']} steps; {result['seconds']:.0f} s, {result['parameters'] / 1e6:.1f}M parameters, "
                f"{result['bytes'] / 1e6:.0f} MB. Written to {out}: editor.safetensors, train.json, log.jsonl, curve.png."
            )
        records_of = {name: sum(one[name] for one in counts) for name in ("read", "used")}
        report.result = {**result, "records": {**records_of, "skipped": skipped + more}, "out": str(out)}
