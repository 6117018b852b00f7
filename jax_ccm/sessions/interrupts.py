"""Ctrl-C, kept waiting while something must be done as a whole."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """What is done within is done before an interrupt is: a donated cache is gone until the new one is noted down."""
    before = signal.getsignal(signal.SIGINT)
    # Python interrupts the main thread alone; a handler that is no function is not Python's.
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    waiting: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda *given: waiting.append(given))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    # However often it was pressed, it is one interrupt.
    if waiting:
        before(*waiting[-1])
