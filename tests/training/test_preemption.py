"""A request to stop: asked once, and with a limit that holds even when the main thread is busy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from jax_ccm.training import preemption
from jax_ccm.training.preemption import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_request(number, capfd):
    before = signal.getsignal(number)
    with StopRequest(0, str) as stop:
        assert stop.name is None
        os.kill(os.getpid(), number)
        assert stop.name == signal.Signals(number).name
        os.kill(os.getpid(), signal.SIGTERM)  # sent again by an impatient scheduler
        assert stop.name == signal.Signals(number).name
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err == f"{signal.Signals(number).name}: stopping after the step in hand\n"


# The main thread is in C all the time, as it is while it waits for a step; the file alone starts quickly.
BUSY = """
import hashlib, runpy, sys
StopRequest = runpy.run_path(sys.argv[1])["StopRequest"]
with StopRequest(float(sys.argv[2]), lambda: "the checkpoint of step 4 is kept"):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


@pytest.mark.processes
def test_a_step_longer_than_the_grace_is_given_up():
    command = [sys.executable, "-c", BUSY, preemption.__file__, "0.2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.splitlines() == [
        "SIGTERM: stopping after the step in hand",
        "SIGTERM: the 0.2 s of train.grace are over; the checkpoint of step 4 is kept",
    ]
