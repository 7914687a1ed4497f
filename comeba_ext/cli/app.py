"""The application, and the options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from comeba_ext import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Correct facts in a Hugging Face language model without retraining it.",
)

Model = Annotated[str, typer.Argument(help="local model folder, hub name, or 'testbed' for the embedded model")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")]
Edits = Annotated[Optional[Path], typer.Option("--edits", help="folder of saved edits to put onto the model, or their name on the hub")]
Config = Annotated[Optional[Path], typer.Option("--config", help="settings as JSON or YAML, those that differ from the model's defaults")]
Scope = Annotated[Optional[str], typer.Option("--scope", help="nearest, reference or zscore (the paper's)")]
Limit = Annotated[Optional[int], typer.Option("--limit", min=1, help="read at most this many records")]
Unstructured = Annotated[
    bool, typer.Option("--unstructured", help="of AKEW's records: edit the paragraphs that state the facts, behind their questions")
]
Device = Annotated[Optional[str], typer.Option("--device", help="cpu, cuda, …; auto: spread over all (default: cuda where there is one)")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="run code that the model's folder or hub page brings")]
DTYPES = ("auto", "float32", "bfloat16", "float16")
Dtype = Annotated[str, typer.Option("--dtype", help=", ".join(DTYPES))]


def say_version(wanted: bool) -> None:
    if wanted:
        print(f"comeba_ext {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=say_version, is_eager=True, help="print the version, and no more")] = False,
) -> None:
    pass
