"""``ui``: a page in the browser to try edits."""

from __future__ import annotations

import contextlib
import sys
import threading
from pathlib import Path
from typing import Annotated, Optional

import typer

from comeba_ext.cli.app import Config, Device, Dtype, Json, Scope, Trust, app
from comeba_ext.cli.inputs import covariance_source, loaded, settings_of
from comeba_ext.cli.terminal import counted, reporting, size_of


@app.command()
def ui(
    model: Annotated[str, typer.Argument(help="local model folder, hub name, or 'testbed' for the embedded model")] = "testbed",
    edits: Annotated[Optional[Path], typer.Option("--edits", help="folder of edits to begin with, and to save every change to")] = None,
    covariance: Annotated[Optional[Path], typer.Option(help="file made by 'comeba covariance'")] = None,
    texts: Annotated[Optional[Path], typer.Option(help="corpus to collect the covariance from instead, at the first edit")] = None,
    method: Annotated[Optional[str], typer.Option(help="COMEBA-HK (default), MEMIT, ROME, FT …")] = None,
    scope: Scope = None,
    config: Config = None,
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0: whoever reaches this machine may edit")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 7860,
    browser: Annotated[bool, typer.Option("--open", help="open the page in this machine's browser")] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Open a page in the browser: edit facts, see what changes, take edits back, save them."""
    with contextlib.ExitStack() as open_:
        with reporting(as_json) as report:
            from comeba_ext.methods import method_named
            from comeba_ext.serving.service import EditingService
            from comeba_ext.storage import MANIFEST
            from comeba_ext.ui import check_ready, running

            check_ready(host, port)
            kind = method_named(method or "COMEBA-HK")
            saved = edits is not None and (edits / MANIFEST).exists()  # they bring their covariance, settings and method
            needs = kind.needs_covariance and not saved
            source = covariance or (covariance_source(model, None, texts, not as_json) if needs else None)
            net, tokenizer = loaded(model, device, dtype, trust=trust)
            given = {"config": settings_of(net, config, kind, scope) if config or scope else None, "method": kind if method else None}
            service = EditingService(net, tokenizer, edits=edits, covariance=source, autosave=edits is not None, **given)
            open_.enter_context(service)
            url = open_.enter_context(running(service, model, size_of(net), host=host, port=port))
            report.say(f"Page: {url}")
            alone = ", which only this machine reaches" if host == "127.0.0.1" else ""
            report.say(f"It listens on {host}{alone}. Ctrl-C ends it.")
            report.result = {"url": url, "host": host, "model": model, "edits": str(edits) if edits else None, "step": service.step}
        sys.stdout.flush()  # whoever has started this waits for the address
        if browser:
            typer.launch(url)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        if edits is None and service.step:
            print(f"{counted(service.step, 'step')} of editing ended with the page, but for what was saved from it.", file=sys.stderr)
