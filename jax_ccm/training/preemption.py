"""SIGTERM and Ctrl-C as a request to stop, with a limit on how long that may take."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable


class StopRequest:
    """Turns the first SIGTERM or Ctrl-C into a request that the run looks at between steps. Use as a context manager.

    A second Ctrl-C raises KeyboardInterrupt, further SIGTERMs change nothing. If the block is still not left ``grace``
    seconds after SIGTERM, the process says so and exits with 1, before whoever sent the signal kills it. A thread of
    its own watches for signals, because Python runs a handler only when the main thread comes back from the runtime,
    and that may be a whole training step later.

    Attributes:
      name: of the signal, such as "SIGTERM"; None as long as there was none.
    """

    def __init__(self, grace: float, lost: Callable[[], str]):
        """
        Args:
          grace: seconds from SIGTERM to the forced exit; 0 for no limit. Ctrl-C has none.
          lost: what the last message says of the state that the run is left in.
        """
        self.name: str | None = None
        self._grace, self._lost = grace, lost

    def __enter__(self) -> StopRequest:
        self._main = threading.current_thread() is threading.main_thread()
        if not self._main:
            return self  # Python delivers signals to the main thread only.
        # Python's handler in C writes the number of a signal into this socket at once, whatever the main thread does.
        self._read, self._write = socket.socketpair()
        # `set_wakeup_fd` takes no descriptor that could block.
        self._write.setblocking(False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        self._before = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        # Only signals that Python handles are written to the socket; the default action would end the process.
        self._handlers = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        if not self._main:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._before)
        self._write.close()  # ends the thread
        self._thread.join()
        self._read.close()

    def _handle(self, number: int, frame: object) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = self.name or signal.Signals(number).name

    def _watch(self) -> None:
        deadline: float | None = None
        told = False
        while True:
            left = None if deadline is None else max(deadline - time.monotonic(), 0)
            if not select.select([self._read], [], [], left)[0]:
                _say(f"SIGTERM: the {self._grace:g} s of train.grace are over; {self._lost()}")
                # sys.exit would end this thread alone, and the main thread may be in the runtime until long after the
                # kill.
                os._exit(1)
            received = self._read.recv(1)
            if not received:
                return
            number = received[0]
            if not told and number in (signal.SIGTERM, signal.SIGINT):
                told = True
                _say(f"{signal.Signals(number).name}: stopping after the step in hand")
            if number == signal.SIGTERM and self._grace and deadline is None:
                deadline = time.monotonic() + self._grace


def _say(text: str) -> None:
    # Past Python's buffers: `os._exit` does not flush them.
    os.write(2, f"{text}\n".encode())
