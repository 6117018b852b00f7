"""Settings for every test: flax in tree mode, so that a graph-only feature fails at once; quick compilation."""

import importlib.metadata
import os

os.environ.setdefault("NNX_GRAPH_MODE", "false")
os.environ.setdefault("NNX_GRAPH_UPDATES", "false")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Commands that are run here leave nothing in the user's cache folder, and take nothing from it.
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""
# Tiny models compile for much longer than they run; this and the setting below make it four times as quick.
if importlib.metadata.version("jax").startswith("0.10."):  # later versions have no such flag
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"

import jax
import pytest

from jax_ccm.config import cli  # noqa: F401  it names its folder by what the processor can do
from jax_ccm.numerics import precision

jax.config.update("jax_disable_most_optimizations", True)

# A few thousand compiled programs take gigabytes, and as many memory maps as Linux gives a process (65,530); beyond
# that the compiler crashes. They are dropped in time.
MOST_BYTES, MOST_MAPS = 3 * 2**30, 20_000


@pytest.fixture(scope="session", autouse=True)
def _float32():
    """`auto` is float32 whatever processor tests run on; those of another precision ask for it by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "processor_flags", lambda: frozenset())
        yield


# After each test: the common tests of all methods alone would go beyond.
@pytest.fixture(autouse=True)
def _drop_programs():
    yield
    try:
        with open("/proc/self/statm") as statm, open("/proc/self/maps") as maps:
            used, mapped = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"), sum(1 for _ in maps)
    except OSError:  # no such files but on Linux
        return
    if used > MOST_BYTES or mapped > MOST_MAPS:
        jax.clear_caches()
