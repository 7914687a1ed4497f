"""Ctrl-C at a place where everything is whole."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager


@contextmanager
def uninterrupted():
    """Inside, Ctrl-C waits until the end, and raises ``KeyboardInterrupt`` there."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    interrupted = []
    before = signal.signal(signal.SIGINT, lambda *signalled: interrupted.append(signalled))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted:
        raise KeyboardInterrupt
