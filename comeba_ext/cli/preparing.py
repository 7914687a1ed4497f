"""Commands that come first: ``covariance``, ``tune``, ``doctor``."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from comeba_ext.cli.app import Config, Device, Dtype, Json, Model, Scope, Trust, app
from comeba_ext.cli.inputs import fitting, loaded, settings_of, some_usable
from comeba_ext.cli.terminal import reporting, size_of
from comeba_ext.errors import ComebaError


@app.command()
def covariance(
    model: Model,
    texts: Annotated[Path, typer.Argument(help=".txt, .csv (text column), .jsonl (text field), or a folder of them")],
    out: Annotated[Path, typer.Option("--out", help="file; an unfinished one is resumed")],
    tokens: Annotated[Optional[int], typer.Option(min=1, help="default: 10 per input dimension")] = None,
    config: Config = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Collect the covariance of all edited layers in one corpus pass."""
    from comeba_ext import distributed
    from comeba_ext.covariance import TOKENS_PER_DIMENSION, covariance_of_blocks
    from comeba_ext.data import read_texts
    from comeba_ext.forward.architectures import Architecture
    from comeba_ext.forward.budget import token_budget
    from comeba_ext.storage import writable

    with reporting(as_json, parallel=True) as report:
        stream = read_texts(texts)
        distributed.together(lambda: writable(out) if report.first else None)
        net, tokenizer = loaded(model, device, dtype, trust=trust)
        settings = settings_of(net, config)
        architecture = Architecture.of(net, settings.blocks, settings.projection)
        start = time.perf_counter()
        found = covariance_of_blocks(
            net,
            tokenizer,
            stream,
            settings.layers,
            architecture,
            tokens=tokens,
            max_tokens=token_budget(net, settings.max_tokens),
            path=out,
            progress=not as_json,
        )
        wanted = tokens or TOKENS_PER_DIMENSION * max(len(moment) for moment in found.moments.values())
        seconds = time.perf_counter() - start
        report.say(f"{found.tokens} tokens of {found.texts} texts, {len(found.moments)} layers, {seconds:.1f} s; saved to {out}.")
        if found.tokens < wanted:
            report.say(f"! The corpus ended after {found.tokens} of {wanted} tokens; with more text the covariance gets better.")
        report.result = {
            "tokens": found.tokens,
            "tokens_wanted": wanted,
            "complete": found.tokens >= wanted,
            "layers": list(found.moments),
            "seconds": seconds,
            "out": str(out),
            "records": {"read": found.texts, "used": found.texts, "skipped": []},
        }


@app.command()
def tune(
    model: Model,
    out: Annotated[
        Path,
        typer.Option("--out", help="folder for config.yaml, tune.json, tune.png and the covariance; an unfinished search goes on there"),
    ],
    texts: Annotated[Optional[Path], typer.Option("--texts", help="corpus for the covariance")] = None,
    covariance: Annotated[Optional[Path], typer.Option(help="file made by 'comeba covariance' of all layers that are tried")] = None,
    records: Annotated[Optional[Path], typer.Option("--records", help="edits to try (default: shipped facts)")] = None,
    edits: Annotated[int, typer.Option("--edits", min=2, help="trial edits a setting")] = 20,
    scope: Scope = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Find settings that edit a model: layers, learning rate, weight of the covariance."""
    import yaml

    from comeba_ext import testbed
    from comeba_ext.covariance import Covariance
    from comeba_ext.data import read_requests, read_texts
    from comeba_ext.storage import alone, write_text
    from comeba_ext.tuning import tune as search
    from comeba_ext.tuning.search import blocks

    with reporting(as_json) as report, alone(out):
        net, tokenizer = loaded(model, device, dtype, trust=trust)
        home = testbed.folder_of(model)
        if texts is None and covariance is None and not home:
            raise ComebaError("no corpus: add --texts TEXTS (plain text such as Wikipedia articles), or --covariance FILE")
        corpus = read_texts(texts) if texts else testbed.texts(folder=home) if home else None
        read, used, skipped = read_requests(records) if records else None, None, []
        if read is not None:
            used, skipped = fitting(net, tokenizer, read)
            some_usable(records, read.read, used, skipped)
        report.say(f"{model}: {size_of(net)}")
        names = ("trial", "block", "optimiser", "  ratio", "reliability", "written", "generality", "locality", "s/edit")
        report.table_head(*names, least=6, gap=1)
        count = itertools.count(1)

        def show(trial) -> None:
            own, scores = trial.settings, (trial.reliability, trial.written, trial.generality, trial.locality, trial.seconds)
            optimiser = own.get("optimizer", "default") + (f" {own['lr']:g}" if own.get("lr") else "")
            ratio = str(own.get("leverage_ratio", "default"))
            report.table_row(str(next(count)), blocks(own), optimiser, ratio, *(f"{score:.3f}" for score in scores))

        found = search(
            net,
            tokenizer,
            corpus,
            records=used,
            scope=scope,
            folder=out,
            edits=edits,
            covariance=Covariance.load(covariance) if covariance else None,
            progress=not as_json,
            on_trial=show,
        )
        write_text(out / "config.yaml", yaml.safe_dump(found.best, sort_keys=False))
        write_text(out / "tune.json", json.dumps(found.to_dict(), indent=1) + "\n")
        from comeba_ext.tuning.plot import draw

        draw(found, out / "tune.png")
        if found.patching:
            top = max(range(len(found.patching)), key=found.patching.__getitem__)
            report.say(
                f"The model answers {found.known} of {found.facts} facts; the subject's last token decides up to "
                f"{max(found.patching):.2f} of them (block {top})."
            )
        report.say(f"Best: {found.best}")
        report.say(f"{found.seconds:.0f} s. Written to {out}: config.yaml (for --config), tune.json, tune.png.")
        counts = {"read": found.facts, "used": found.facts, "skipped": []} if read is None else read.counts(used, skipped)
        report.result = {**found.to_dict(), "records": counts, "out": str(out)}


@app.command()
def doctor(
    model: Annotated[Optional[str], typer.Argument(help="also look at a model: where and how it would be edited")] = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Versions, devices, compiled operations; what is missing and how to get it; what editing a model would mean."""
    from comeba_ext.doctor import examine, examine_model

    with reporting(as_json) as report:
        found = examine()
        report.table(("what", "found"), [(k, str(v)) for k, v in found["found"].items()])
        if model is not None and not found["problems"]:
            found["model"], hints = examine_model(*loaded(model, "cpu", "auto", trust=trust))
            found["hints"] += hints
            report.table((model, ""), [(k, str(v)) for k, v in found["model"].items()])
        for problem in found["problems"]:
            report.say(f"! {problem}")
        for hint in found["hints"]:
            report.say(f"  {hint}")
        report.say("Ready." if not found["problems"] else "Not ready.")
        report.result = found
        report.code = 3 if found["problems"] else 0
