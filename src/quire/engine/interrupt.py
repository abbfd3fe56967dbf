"""Ctrl-C between two steps of an engine: an exception out of the middle of one would leave it torn."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Whether Ctrl-C `came`."""

    def __init__(self, patient: bool) -> None:
        self._patient = patient
        self.came = False

    def check(self) -> None:
        """Raises KeyboardInterrupt if it did."""
        if self.came:
            raise KeyboardInterrupt

    def note(self, number: int, frame: FrameType | None) -> None:
        if not self._patient:
            self.check()
        self.came = True


@contextmanager
def held_interrupt(*, patient: bool = False) -> Iterator[Interrupt]:
    """Within, Ctrl-C is noted for whoever asks after each step. Pressed again it does not wait: KeyboardInterrupt is raised at
    once, and an engine whose step it comes out of is dead. patient: it is noted, however often it is pressed.

    In threads that signals don't reach, and where Ctrl-C would not raise KeyboardInterrupt, nothing changes.
    """
    interrupt = Interrupt(patient)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupt
        return
    before = signal.signal(signal.SIGINT, interrupt.note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
