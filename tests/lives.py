"""Runs in processes of their own, forked from a server that has imported everything and started nothing.

So a life costs a second and not ten, and may be ended in any way.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jax_ccm.config.schema import Config, from_mapping, to_mapping
from jax_ccm.distributed import processes
from jax_ccm.errors import RunError, UserError
from jax_ccm.training.run import Run


def use_programs(folder: str) -> None:
    """Compiled programs are kept in the folder, however quick they were to compile."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _live(tree, workdir, programs, environment, user, answer) -> None:
    with open(workdir.with_name(f"{workdir.name}.{environment.get('JAX_PROCESS_ID', 0)}.log"), "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    jax.config.update("jax_disable_most_optimizations", True)
    use_programs(programs)
    os.environ.update(environment)
    if user is not None:
        os.setuid(user)
    config = from_mapping(tree)
    try:
        processes.initialize(config.train.heartbeat)
        answer.send(Run(config, workdir).train()["status"])
    except (RunError, UserError) as e:
        answer.send(f"{type(e).__name__}: {e}")
        print(e, file=sys.stderr)
        processes.leave(1)
        sys.exit(1)


class Life:
    """One process of a run.

    Attributes:
      process: that process.
      log: what it printed.
    """

    server: Any = None

    def __init__(
        self,
        config: Config,
        workdir: Path,
        programs: str,
        environment: Mapping[str, str] | None = None,
        user: int | None = None,
    ):
        if Life.server is None:
            Life.server = multiprocessing.get_context("forkserver")
            Life.server.set_forkserver_preload(["tests.lives", "orbax.checkpoint", "grain", "tensorboardX"])
        self._answer, send = Life.server.Pipe(duplex=False)
        self.log = workdir.with_name(f"{workdir.name}.{(environment or {}).get('JAX_PROCESS_ID', 0)}.log")
        arguments = (to_mapping(config), workdir, programs, dict(environment or {}), user, send)
        self.process = Life.server.Process(target=_live, args=arguments)
        self.process.start()
        send.close()

    def end(self, code: int = 0) -> str:
        """Waits for the end; the status of the run, or its error. Empty if it ended without a word."""
        try:
            text = self._answer.recv() if self._answer.poll(300) else "still running"
        except EOFError:
            text = ""
        self.process.join(120)
        assert self.process.exitcode == code, (self.process.exitcode, text, self.log.read_text()[-3000:])
        return text


def start_all(count: int, config: Config, workdir: Path | list[Path], programs: str) -> list[Life]:
    """So many processes that make one run, on the loopback interface; in one folder, or each in one of its own."""
    folders = workdir if isinstance(workdir, list) else [workdir] * count
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    return [Life(config, folders[i], programs, {**shared, "JAX_PROCESS_ID": str(i)}) for i in range(count)]
