"""Listening: a port that is free, a server that stops when it is asked to and lets requests in flight finish."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from comeba_ext.errors import ComebaError

STOPS = (signal.SIGINT, signal.SIGTERM)


def bound(host: str, port: int) -> socket.socket:
    """A socket that has the port (0: any that is free); nobody is answered yet.

    Raises:
        ComebaError: the port is taken or not ours to take, or the host is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        own = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ComebaError(f"--host {host}: no address of this machine ({error.strerror or error})") from None
    try:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind(address)
    except OSError as error:
        own.close()
        why = {errno.EADDRINUSE: "is taken by another program", errno.EACCES: "may not be used by you"}.get(error.errno or 0)
        if why is None:
            raise ComebaError(f"--host {host}: no address of this machine ({error.strerror})") from None
        raise ComebaError(f"port {port} of {host} {why}; choose another --port, or 0 for any that is free") from None
    return own


def is_local(own: socket.socket) -> bool:
    """Whether only programs of this machine can reach it."""
    address = own.getsockname()[0]
    return address.startswith("127.") or address == "::1"


def url_of(own: socket.socket) -> str:
    host, port = own.getsockname()[:2]
    host = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}"


def run(app: FastAPI, own: socket.socket, ready: Callable[[], None]) -> bool:
    """Serve until SIGINT or SIGTERM; requests in flight finish, unless there is a second SIGINT.

    Args:
        ready: called once requests are answered.

    Returns:
        Whether they did; if not, some thread may still be at work on one.
    """
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))

    async def serve() -> None:
        async def announce() -> None:
            while not server.started:
                await asyncio.sleep(0.01)
            ready()

        announced = asyncio.create_task(announce())
        try:
            await server.serve(sockets=[own])
        finally:
            announced.cancel()

    with asked_to_stop(lambda: setattr(server, "should_exit", True)):
        asyncio.run(serve())
    return not server.force_exit


def until_asked_to_stop() -> None:
    """Wait for SIGINT or SIGTERM."""
    stopped = threading.Event()
    with asked_to_stop(stopped.set):
        stopped.wait()


@contextmanager
def asked_to_stop(stop: Callable[[], object]):
    """Inside, ``stop`` is called at a signal to stop, which is none to die of: uvicorn, having stopped, would raise it again."""
    before = {number: signal.signal(number, lambda *signalled: stop()) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
