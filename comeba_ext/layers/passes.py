"""Forward passes in progress, and the edit that waits for them.

Any number of threads may run a hooked model; an edit becomes visible between their passes, never within one. So a pass says
when it begins and ends, and whoever changes the hooked layers does it while none is in progress. Changes are prepared beside
the model (:mod:`comeba_ext.layers.twin`), so that passes wait for a copy of the finished layers and not for an optimisation.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager


class Passes:
    """Readers and a writer: passes of all threads, or one change."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: set[int] = set()  # threads
        self._writing = False

    def begin(self) -> None:
        """A pass of this thread begins, after a change that is being made."""
        me = threading.get_ident()
        with self._changed:
            while self._writing and me not in self._running:
                self._changed.wait()
            self._running.add(me)  # if it is there already, its last pass was interrupted

    def end(self) -> None:
        with self._changed:
            self._running.discard(threading.get_ident())
            self._changed.notify_all()

    @contextmanager
    def between(self):
        """Inside, no other thread's pass is in progress."""
        with self._changed:
            while self._writing:
                self._changed.wait()
            self._writing = True
            try:
                self._running.discard(threading.get_ident())
                while self._running & {thread.ident for thread in threading.enumerate()}:
                    self._changed.wait(timeout=0.1)  # a thread may end without ending its pass
            except BaseException:
                self._done()
                raise
        try:
            yield
        finally:
            with self._changed:
                self._done()

    def _done(self) -> None:
        self._writing = False
        self._changed.notify_all()

    def __reduce__(self):
        return Passes, ()  # a copied model has passes of its own
