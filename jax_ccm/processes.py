"""Several processes that run one program, each with its share of the devices (`jax.distributed`)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def is_first() -> bool:
    """Whether this process is the one that prints, logs and exports."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agree(yes: bool) -> bool:
    """Whether all processes say yes; each of them waits for the others."""
    if jax.process_count() == 1:
        return yes
    return bool(np.all(multihost_utils.process_allgather(np.array(yes))))


class Vote:
    """A question to all processes whose answer is waited for later.

    Each process asks at the same places of the program. The devices answer in turn with the other work that they are
    given, so that asking before a training step and looking after the step before it costs no wait.
    """

    def __init__(self, question: Callable[[], bool]):
        """
        Args:
          question: of this process; the answer is whether any process says yes.
        """
        self._question = question
        if jax.process_count() > 1:
            mesh = Mesh(np.array(jax.devices()), ("all",), axis_types=(AxisType.Auto,))
            self._votes = NamedSharding(mesh, PartitionSpec("all"))
            self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def ask(self) -> Callable[[], bool]:
        """Asks; returns a function that waits for the answer. A single process answers when that is called."""
        if jax.process_count() == 1:
            return self._question
        mine = np.full(jax.local_device_count(), self._question())
        answer = self._any(jax.make_array_from_process_local_data(self._votes, mine))
        return lambda: bool(answer)
