"""A page in the browser to try edits (Gradio, extra ``ui``)."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from comeba_ext.errors import ComebaError
from comeba_ext.serving.service import EditingService

PORT = 7860  # Gradio's


def check_ready(host: str, port: int) -> None:
    """What can be known before a model is loaded.

    Raises:
        ComebaError: Gradio is not installed, or nothing can be bound to this host and port.
    """
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ComebaError(f"the page needs {error.name}: pip install 'comeba_ext[ui]'") from None
    free_port(host, port)


def free_port(host: str, port: int) -> int:
    """The port, or with 0 one that is free.

    Raises:
        ComebaError: it is taken, or the host is not this machine's.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return probe.getsockname()[1]
    except OverflowError:
        raise ComebaError(f"port {port} is none; choose one of 1024 to 65535") from None
    except socket.gaierror:
        raise ComebaError(f"{host!r} is no host of this machine; choose 127.0.0.1, or 0.0.0.0 for all its addresses") from None
    except OSError as error:
        raise ComebaError(f"cannot listen on {host}, port {port} ({error.strerror}); choose another --port") from None


@contextmanager
def running(
    service: EditingService,
    model: str,
    size: str,
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
) -> Iterator[str]:
    """Inside, the page is open at the address that is yielded, in threads of its own.

    Args:
        service: what it edits.
        model: its name, by which examples are chosen; ``size``: in words.
        host: where it is another one than this machine alone, the page writes to no folder that a user names.
        port: 0: any that is free.

    Raises:
        ComebaError: Gradio is not installed, or the port is taken.
    """
    check_ready(host, port)
    from comeba_ext.ui.desk import Desk
    from comeba_ext.ui.page import About, build, theme
    from comeba_ext.ui.suggestions import relations_of

    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="comeba-ui-") as scratch:
        os.environ["GRADIO_TEMP_DIR"] = scratch  # uploads and downloads go with the page
        page = build(Desk(service), relations_of(model), About(model, size, host, service.folder), Path(scratch))
        try:
            _, url, _ = page.queue(max_size=100).launch(
                server_name=host,
                server_port=free_port(host, port),
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                enable_monitoring=False,
                run_history=False,
                footer_links=[],
                max_file_size="200mb",
                theme=theme(),
                css_paths=Path(__file__).with_name("page.css"),
            )
            yield url
        finally:
            page.close(verbose=False)
            os.environ.pop("GRADIO_TEMP_DIR") if before is None else os.environ.update(GRADIO_TEMP_DIR=before)
