"""``ui``: a page in the browser to try edits."""

from __future__ import annotations

import contextlib
import os
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
    with reporting(as_json) as report:
        from comeba_ext.methods import method_named
        from comeba_ext.serving.service import EditingService
        from comeba_ext.storage import MANIFEST
        from comeba_ext.ui import check_installed, running

        check_installed()  # it brings what the next line imports
        from comeba_ext.serving.listen import bound, is_local, until_asked_to_stop, url_of

        with bound(host, port) as listening:  # the port is ours while the model loads
            kind, own = method_named(method or "COMEBA-HK"), edits is not None and (edits / MANIFEST).exists()
            source = covariance
            if source is None and kind.needs_covariance and not own:  # edits bring theirs
                source = covariance_source(model, None, texts, not as_json)
            net, tokenizer = loaded(model, device, dtype, trust=trust)
            settings = settings_of(net, config, kind, scope) if config or scope else None
            chosen = {"config": settings, "method": kind if method else None}
            service = EditingService(net, tokenizer, edits=edits, covariance=source, autosave=True, **chosen)
            url, local, place = url_of(listening), is_local(listening), listening.getsockname()[1]
        try:
            with service, running(service, model, size_of(net), host=host, port=place, local=local):
                threading.Thread(target=_prepared, args=(service,), name="covariance").start()
                report.say(f"Page: {url}")
                if local:
                    report.say("Only this machine can reach it; see --host.")
                else:
                    report.say("! Whoever reaches this machine can edit: no password is asked for, and nothing is encrypted.")
                report.say("Ctrl-C ends it.")
                report.result = {"url": url, "local": local, "model": model, "edits": service.live, "folder": str(edits) if edits else None}
                report.announce()
                if browser:
                    typer.launch(url)
                until_asked_to_stop()
                report.say("Closing, once the step in progress is complete; Ctrl-C again closes at once.")
        except KeyboardInterrupt:  # a second one, while an edit or the covariance is being finished
            report.say("Stopped in the middle of a step; what was complete is kept where it was saved.")
            sys.stdout.flush()
            os._exit(130)
        if edits is None and service.step:
            report.say(f"Closed with {counted(service.live, 'edit')}, gone but for what was saved on the page.")


def _prepared(service) -> None:
    """The covariance, while the user reads; what is wrong with it the first edit will say."""
    with contextlib.suppress(Exception):
        service.prepare()
