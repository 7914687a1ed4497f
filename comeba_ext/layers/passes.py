"""Forward passes in progress, and the edit that waits for them.

Any number of threads may run a hooked model; an edit becomes visible between their passes, never within one. So a pass says
when it begins and ends, and whoever changes the hooked layers does it while none is in progress. Changes are prepared beside
the model (:mod:`comeba_ext.layers.twin`), so that passes wait for a copy of the finished layers and not for an optimisation.
"""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager
from types import FrameType


class Passes:
    """Readers and a writer: passes of all threads, or one change."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: dict[int, int | None] = {}  # threads, and the ids of the frames that their passes are called in
        self._writing = False

    def begin(self, frame: FrameType | None = None) -> None:
        """A pass of this thread begins, after a change that is being made.

        Args:
            frame: what calls it. A pass that is interrupted (Ctrl-C) is over without an end when that has returned; of one whose frame is
                not known, that is known only when its thread ends or begins another.
        """
        me = threading.get_ident()
        with self._changed:
            while self._writing and me not in self._running:
                self._changed.wait()
            self._running[me] = None if frame is None else id(frame)  # if it is there already, its last pass was interrupted

    def end(self) -> None:
        with self._changed:
            self._running.pop(threading.get_ident(), None)
            self._changed.notify_all()

    @contextmanager
    def between(self):
        """Inside, no other thread's pass is in progress."""
        with self._changed:
            while self._writing:
                self._changed.wait()
            self._writing = True
            try:
                self._running.pop(threading.get_ident(), None)
                while self._forget_cut_off():
                    self._changed.wait(timeout=0.1)  # a pass may be over without an end
            except BaseException:
                self._done()
                raise
        try:
            yield
        finally:
            with self._changed:
                self._done()

    def _forget_cut_off(self) -> bool:
        """Whether passes are in progress, those left out whose thread, or whose call, is over."""
        stacks = sys._current_frames()
        for thread, called in list(self._running.items()):
            frame = stacks.get(thread)
            while frame is not None and called is not None and id(frame) != called:
                frame = frame.f_back
            if frame is None:
                del self._running[thread]
        return bool(self._running)

    def _done(self) -> None:
        self._writing = False
        self._changed.notify_all()

    def __reduce__(self):
        return Passes, ()  # a copied model has passes of its own
