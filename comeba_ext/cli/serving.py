"""``serve``: an edited model for programs that speak OpenAI's API."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from comeba_ext.cli.app import Config, Device, Dtype, Edits, Json, Model, Scope, Trust, app
from comeba_ext.cli.inputs import covariance_source, loaded, settings_of
from comeba_ext.cli.terminal import counted, reporting
from comeba_ext.errors import ComebaError

_Token = Annotated[
    Optional[str],
    typer.Option("--edit-token", envvar="COMEBA_EDIT_TOKEN", help="let who sends this token see and change the edits at /v1/edits"),
]


@app.command()
def serve(
    model: Model,
    edits: Edits = None,
    host: Annotated[str, typer.Option(help="address to listen at; 0.0.0.0: whoever reaches this machine is answered")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8000,
    name: Annotated[Optional[str], typer.Option(help="what clients call the model (default: its folder's name)")] = None,
    edit_token: _Token = None,
    method: Annotated[Optional[str], typer.Option(help="for new edits: COMEBA-HK (default), MEMIT, ROME, FT …")] = None,
    scope: Scope = None,
    config: Config = None,
    covariance: Annotated[Optional[Path], typer.Option(help="for new edits: file made by 'comeba covariance'")] = None,
    texts: Annotated[Optional[Path], typer.Option(help="corpus to collect the covariance from instead")] = None,
    threads: Annotated[int, typer.Option(min=1, help="requests that are answered at once; others wait")] = 1,
    waiting: Annotated[int, typer.Option(min=0, help="requests that may wait; others are told to come back")] = 256,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="most tokens that a request may ask for")] = 1024,
    max_texts: Annotated[int, typer.Option(min=1, help="most texts that a request may ask for (prompts times n)")] = 64,
    max_body: Annotated[int, typer.Option(min=1, help="most bytes that a request may have")] = 4 * 2**20,
    device: Device = None,
    dtype: Dtype = "auto",
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Answer OpenAI's API with an edited model: /v1/completions, /v1/chat/completions, /v1/models, /health.

    Edits can be made and taken back while it runs (/v1/edits), if an edit token is given; they are kept in --edits. --json: the one
    object comes when it is ready.
    """
    with reporting(as_json) as report:
        try:
            from comeba_ext.serving.app import UNEDITED, create_app
            from comeba_ext.serving.listen import bound, is_local, run, url_of
            from comeba_ext.serving.requests import Limits
        except ImportError as error:
            raise ComebaError(f"serving needs {error.name}: pip install 'comeba_ext[serve]'") from None
        from comeba_ext.serving.service import EditingService

        if edit_token is not None and not edit_token.strip():
            raise ComebaError("--edit-token is empty; leave it out, or give one that is hard to guess")
        given = {"--method": method, "--scope": scope, "--config": config, "--covariance": covariance, "--texts": texts}
        idle = [option for option, value in given.items() if value is not None]
        if edit_token is None and idle:
            raise ComebaError(f"{idle[0]} is for edits that are made while the model is served: add --edit-token")
        with bound(host, port) as listening:
            net, tokenizer = loaded(model, device, dtype, trust=trust)
            settings = settings_of(net, config, method, scope) if scope or config else None
            with EditingService(
                net,
                tokenizer,
                edits=edits,
                covariance=lambda editor: covariance_source(model, covariance, texts, not as_json)(editor),
                config=settings,
                method=method,
                editable=edit_token is not None,
                autosave=True,
            ) as service:
                if edit_token is not None:
                    service.prepare()
                called = name or (Path(model).resolve().name if Path(model).exists() else model)
                url = url_of(listening)
                limits = Limits(body=max_body, new_tokens=max_new_tokens, texts=max_texts)
                application = create_app(service, called, edit_token=edit_token, limits=limits, threads=threads, waiting=waiting)
                report.result = {
                    "url": f"{url}/v1",
                    "models": [called, called + UNEDITED],
                    "edits": service.live,
                    "editing": edit_token is not None,
                    "local": is_local(listening),
                }

                def ready() -> None:
                    report.say(f"{called} with {counted(service.live, 'edit')}: {url}/v1 (without them: the model {called + UNEDITED})")
                    if is_local(listening):
                        report.say("Only programs on this machine can reach it; see --host.")
                    else:
                        report.say("! Whoever reaches this machine is answered: no key is asked for, and nothing is encrypted.")
                    if edit_token is not None:
                        kept = f"kept in {edits}" if edits is not None else "gone when this ends, as there is no --edits"
                        report.say(f"Edits can be changed at {url}/v1/edits with the token; they are {kept}.")
                    report.say("Ctrl-C ends it.")
                    report.announce()

                if not run(application, listening, ready):
                    report.say("Stopped in the middle of a request; what was complete is kept.")
                    sys.stdout.flush()
                    os._exit(130)  # threads may be at work for long, on what is whole only when it is complete
                report.say("Stopped; every request was answered.")
