"""Several processes that run one program, each with its share of the devices (`jax.distributed`)."""

from __future__ import annotations

import glob
import importlib.util
import os
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_ccm.errors import RunError, UserError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize(heartbeat: int) -> None:
    """Joins the other processes, if the environment says that there are some. Call it before any device is touched.

    In this order: the variables of `VARIABLES`, all three of them; SLURM (inside ``srun``) and Open MPI; a Cloud TPU
    slice, as a TPU VM or on GKE. Otherwise, and for one process, nothing is done. Only the first process writes to the
    standard output from then on; all of them write errors.

    Args:
      heartbeat: seconds of silence after which a process counts as dead and the others stop.

    Raises:
      UserError: for variables that are missing or make no sense.
      RunError: if the others do not come.
    """
    arguments = _named()
    if arguments and arguments["num_processes"] == 1 or not arguments and not _in_cluster():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # without effect on other devices
    try:
        jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=heartbeat)
    except Exception as e:  # Timeouts, unreachable hosts, metadata servers: JAX raises many kinds.
        where = f"at {arguments['coordinator_address']}" if arguments else "that JAX looked for"
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise RunError(
            f"the processes {where} did not find each other ({reason}). See that all of them were started and can "
            "reach the first; JAX_NUM_PROCESSES=1 with the other two variables runs this one alone"
        ) from e
    # An error that nobody catches must end the process as `leave` does, too.
    shown = sys.excepthook
    sys.excepthook = lambda *error: (shown(*error), leave(1))[0]
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # for the rest of this process


def refuse_several(*, devices: bool = False) -> None:
    """Refuses to go on as one of several processes, which would all do the same work and write the same files.

    For commands that run in one process. What a launcher says is known at once; the hosts of a TPU slice are known to
    the devices alone.

    Args:
      devices: ask these as well, which starts them.

    Raises:
      UserError: saying what tells of the others, and what to do.
    """
    named = _named()
    sign = None
    if named:
        sign = f"JAX_NUM_PROCESSES={named['num_processes']}" if named["num_processes"] > 1 else None
    elif launcher := _launcher():
        sign = f"{launcher}={os.environ[launcher]}"
    if sign is None and devices and jax.process_count() > 1:
        sign = f"the devices are those of {jax.process_count()} processes"
    if sign is not None:
        raise UserError(
            f"this command runs in one process, and this is one of several ({sign}): each would do the same work and "
            "write the same files. Start it once, with srun --ntasks=1, mpirun -n 1 or JAX_NUM_PROCESSES unset; it "
            "uses all devices that it sees. Training is what several processes share"
        )


def _named() -> dict[str, Any]:
    """What the variables of `VARIABLES` say, as `jax.distributed.initialize` takes it; empty without them."""
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if not given:
        return {}
    if len(given) < len(VARIABLES):
        missing = ", ".join(name for name in VARIABLES if name not in given)
        raise UserError(f"{', '.join(given)} without {missing}: set all three for a run of several processes, or none")
    address, *numbers = (given[name] for name in VARIABLES)
    if not all(number.isdecimal() for number in numbers) or not int(numbers[1]) < int(numbers[0]):
        raise UserError(
            f"JAX_NUM_PROCESSES={numbers[0]} and JAX_PROCESS_ID={numbers[1]}; the first is the number of "
            "processes, the second this one's, from 0 on"
        )
    found = {"num_processes": int(numbers[0]), "process_id": int(numbers[1])}
    # The variables say it all: JAX shall not ask SLURM or a metadata server for the rest.
    return found | {"coordinator_address": address, "cluster_detection_method": "deactivate"}


def _launcher() -> str | None:
    """The variable by which SLURM (inside ``srun``) or Open MPI tells of several processes."""
    # An allocation (sbatch, salloc) sets SLURM_NTASKS as well; other processes there are within a step alone.
    if "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        return "SLURM_NTASKS"
    return "OMPI_COMM_WORLD_SIZE" if int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1 else None


def _in_cluster() -> bool:
    """Whether JAX can find other processes by itself."""
    if _launcher():
        return True
    # Without the variable JAX takes a TPU where it finds one.
    if "tpu" not in (os.environ.get("JAX_PLATFORMS") or "tpu") or importlib.util.find_spec("libtpu") is None:
        return False
    gke = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    # The chips of a TPU VM, whose metadata server knows the other hosts.
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    # Not where the variables say who is there (one host of GKE), or that there is no metadata server to ask.
    return gke or (bool(chips) and "TPU_SKIP_MDS_QUERY" not in os.environ and "TPU_WORKER_HOSTNAMES" not in os.environ)


def is_lost_connection(error: Exception) -> bool:
    """Whether the runtime says that it cannot reach another process."""
    words = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "coordination service")
    return jax.process_count() > 1 and any(word in str(error) for word in words)


def leave(code: int) -> None:
    """Ends a process that failed, if it is one of several: at once, for a usual exit would wait for the others."""
    if code and jax.distributed.is_initialized():
        if is_first():
            time.sleep(3)  # The others end with this one; those that have a reason of their own shall say it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def is_first() -> bool:
    """Whether this process is the one that prints, logs and exports."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def agree(yes: bool) -> bool:
    """Whether all processes say yes; each of them waits for the others."""
    if jax.process_count() == 1:
        return yes
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.array(yes))))


def whole(x: Any) -> np.ndarray:
    """An array on the host, all of it in each process; each of them waits for the others."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        from jax.experimental import multihost_utils

        # JAX gathers arrays that are spread over processes in this form only.
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def require_shared(folder: Path) -> None:
    """Refuses a folder that is not the same for all processes.

    Raises:
      UserError: on each of them.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    # Each process has made up a name of its own; all look for the first one's, which is sent as numbers of equal
    # length.
    mark = folder / f".shared-{uuid.uuid4().hex}"
    if is_first():
        mark.write_bytes(b"")
    name = np.frombuffer(mark.name.encode(), np.uint8)
    seen = folder / bytes(np.asarray(multihost_utils.broadcast_one_to_all(name))).decode()
    shared = agree(seen.exists())
    if is_first():
        # `agree` has waited until everybody has looked.
        mark.unlink()
    if not shared:
        raise UserError(
            f"{folder} is not the same folder for all {jax.process_count()} processes; put --workdir on storage that "
            "all hosts share, because all of them write the checkpoints"
        )


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
        # bool [devices], a vote of each: so the array is spread over all of them.
        mine = np.full(jax.local_device_count(), self._question())
        answer = self._any(jax.make_array_from_process_local_data(self._votes, mine))
        return lambda: bool(answer)
