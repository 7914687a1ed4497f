"""A page in the browser to try edits (Gradio, extra ``ui``)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from comeba_ext.errors import ComebaError
from comeba_ext.serving.service import EditingService

QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",  # an option of newer versions
    "NO_PROXY": "*",  # Gradio asks whether its own page is there, which is no proxy's business
}


def check_installed() -> None:
    """Raises :class:`ComebaError` where Gradio is not installed."""
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ComebaError(f"the page needs {error.name}: pip install 'comeba_ext[ui]'") from None


@contextmanager
def running(service: EditingService, model: str, size: str, *, host: str = "127.0.0.1", port: int, local: bool = True) -> Iterator[None]:
    """Inside, the page is open, in threads of its own.

    Args:
        service: what it edits.
        model: its name, by which examples are chosen; ``size``: in words.
        host, port: to listen at.
        local: whether only this machine reaches it; else the page writes to no folder that a user names.

    Raises:
        ComebaError: Gradio is not installed, or it cannot listen there.
    """
    check_installed()
    from comeba_ext.ui.desk import Desk
    from comeba_ext.ui.page import About, build, theme
    from comeba_ext.ui.suggestions import relations_of

    # Uploads and downloads go with the page.
    with tempfile.TemporaryDirectory(prefix="comeba-ui-") as scratch, _environment(GRADIO_TEMP_DIR=scratch, **QUIET):
        page = build(Desk(service), relations_of(model), About(model, size, host, local, service.folder), Path(scratch))
        try:
            page.queue(max_size=100).launch(
                server_name=host,
                server_port=port,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                enable_monitoring=False,
                footer_links=[],
                max_file_size="200mb",
                theme=theme(),
                css_paths=Path(__file__).with_name("page.css"),
            )
        except OSError as error:
            raise ComebaError(f"the page cannot listen on port {port} of {host}: {error}") from None
        try:
            yield
        finally:
            page.close(verbose=False)


@contextmanager
def _environment(**values: str):
    """Inside, these environment variables are set."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
